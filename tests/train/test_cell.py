"""One model of a comparison: interrupted anywhere it goes on to the same figures; cells of a seed compare in pairs."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
import toy

from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import save_autoencoder
from flux2.distances import frechet_distance
from flux2.features import build_features
from flux2.transformer import TransformerConfig
from train import cell as cells
from train.cell import Judging, drop_checkpoints, save_every, train_cell
from train.cell_data import Crops, load_latents, make_latents, reference_moments
from train.flow_config import FlowConfig
from train.loop import Interrupted

CPU = torch.device("cpu")
CROPS = Crops(resolution=32, cached_crops=14)
JUDGING = Judging(every=2, sampling_shifts=(1.0, 3.0), samples=6, sample_steps=2, sample_batch=4)
FLOW = FlowConfig(
    preset="cell", transformer=TransformerConfig(width=32, depth=2, heads=2, repa_depth=1), batch=4, steps=6,
    resolution=32, precision="fp32", label_dropout=1.0, ema_decays=(0.5,), repa_hidden=16, shift=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    path = str(folder / "ae.safetensors")
    save_autoencoder(AutoEncoder(dataclasses.replace(toy.toy().autoencoder, z_channels=2)), path)
    features = build_features("hog")
    make_latents(path, folder / "cache", CROPS, held_out=8, device=CPU, teacher="hog")
    return load_latents(path, folder / "cache", reference_moments(CROPS, features, 16, CPU), CPU)


@pytest.fixture(scope="module")
def features():
    return build_features("hog")


def train(latents, features, folder, config=FLOW, judging=JUDGING, **kwargs):
    return train_cell(config, latents, judging, features, folder=folder, device=CPU, **kwargs)


@pytest.fixture(scope="module")
def whole(latents, features, tmp_path_factory):
    """What an uninterrupted cell finds."""
    return train(latents, features, tmp_path_factory.mktemp("whole") / "cell")


def test_judged_at_every_checkpoint_and_at_the_end(whole, latents, features, tmp_path):
    assert [c["nimg"] for c in whole] == [8, 16, 24]
    assert all(len(c["bins"]) == 10 and set(c["fd"]) == {"1.00", "3.00"} for c in whole)
    assert whole[0]["velocity"] == pytest.approx(np.mean(whole[0]["bins"]))
    assert len({c["velocity"] for c in whole}) == 3
    assert JUDGING.judged(7) == [2, 4, 6, 7]


@pytest.mark.parametrize("last", [2, 3])  # of which 3 ends in a judged checkpoint
def test_interrupted_by_a_signal_in_training_goes_on_to_the_same_bits(
    whole, latents, features, tmp_path, monkeypatch, last
):
    stepped = cells.FlowTrainer.step

    def step(self, number, batch):
        if number == last:  # a real signal, to this process, between checkpoints
            os.kill(os.getpid(), signal.SIGINT)
        return stepped(self, number, batch)

    monkeypatch.setattr(cells.FlowTrainer, "step", step)
    with pytest.raises(Interrupted) as raised:
        train(latents, features, tmp_path / "cell")
    assert raised.value.signal == signal.SIGINT
    assert [p.name for p in (tmp_path / "cell" / "checkpoints").iterdir()] == [f"step_0000000{last + 1}"]
    monkeypatch.setattr(cells.FlowTrainer, "step", stepped)
    assert train(latents, features, tmp_path / "cell") == whole


@pytest.mark.parametrize("after", [1, 3, 6, 11])
def test_stopped_between_two_measurements_goes_on_to_the_same_bits(whole, latents, features, tmp_path, after):
    calls = [0]

    def check():  # before each checkpoint and each batch of samples
        calls[0] += 1
        if calls[0] == after:
            raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        train(latents, features, tmp_path / "cell", check=check)
    assert train(latents, features, tmp_path / "cell") == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after, kept", [(3, ["1.00"]), (5, ["1.00", "3.00"])])  # 5: in the last batch of samples
def test_interrupted_by_a_signal_between_two_distances_goes_on_to_the_same_bits(
    whole, latents, features, tmp_path, after, kept, number
):
    calls, folder = [0], tmp_path / "cell"

    def check():  # once before the checkpoint, then before 2 batches at each of 2 shifts
        calls[0] += 1
        if calls[0] == after:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as raised:
        train(latents, features, folder, check=check)
    assert raised.value.signal == number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    there = json.loads((folder / "evaluations" / "step_00000002.json").read_text())
    assert there["fd"] == {k: whole[0]["fd"][k] for k in kept} and there["velocity"] == whole[0]["velocity"]
    calls[0] = after
    assert train(latents, features, folder, check=check) == whole
    assert calls[0] - after == 2 * 5 + 2 * (2 - len(kept))  # what was measured is not measured again


def test_cells_of_a_seed_see_the_same_data_and_sample_from_the_same_noise(latents, features, tmp_path, monkeypatch):
    seen, times = {}, {}
    stepped, generated = cells.FlowTrainer.step, cells.generate

    def step(self, number, batch):
        where = self.config.law, self.config.seed
        seen.setdefault(where, []).extend(v.clone() for _, v in sorted(batch.items()))
        found = stepped(self, number, batch)
        times.setdefault(where, []).append(found["velocity"].item())
        return found

    def generate(velocity_of, labels, *args, **kwargs):  # standing still, samples are the noise they start from
        where = config.law, kwargs["seed"]
        seen[where] += [labels.clone(), generated(lambda y: lambda z, t: torch.zeros_like(z), labels, *args, **kwargs)]
        return generated(velocity_of, labels, *args, **kwargs)

    monkeypatch.setattr(cells.FlowTrainer, "step", step)
    monkeypatch.setattr(cells, "generate", generate)
    for law, seed in (("uniform", 0), ("logit_normal", 0), ("uniform", 1)):
        config = dataclasses.replace(FLOW, law=law, seed=seed, steps=2, label_dropout=0.5)
        train(latents, features, tmp_path / f"{law}-{seed}", config)
    same = list(zip(seen["uniform", 0], seen["logit_normal", 0], strict=True))
    assert len(same) == 2 * 4 + 2 * 5  # 2 steps of mean, logvar, labels, tokens; 4 batches of samples and the sheet
    for a, b in same:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(not torch.equal(a, b) for a, b in zip(seen["uniform", 0], seen["uniform", 1], strict=True))
    first, second, sheet = (seen["uniform", 0][k] for k in (-9, -7, -1))  # noise of a distance's batches, and shown
    assert torch.equal(torch.cat([first, second]), sheet) and len(sheet) == JUDGING.samples
    assert times["uniform", 0] != times["logit_normal", 0]  # the law is another


def test_model_aligned_to_a_teacher_is_another(whole, latents, features, tmp_path):
    found = train(latents, features, tmp_path / "cell", dataclasses.replace(FLOW, repa="hog"))
    assert found[-1]["velocity"] != whole[-1]["velocity"]


def test_another_config_or_a_lost_evaluation_is_refused_by_name(whole, latents, features, tmp_path):
    folder = tmp_path / "cell"
    assert train(latents, features, folder) == whole
    sheet = (folder / "samples.png").read_bytes()
    with pytest.raises(ValueError, match="another config; judging.samples: saved 6, now 5"):
        train(latents, features, folder, judging=dataclasses.replace(JUDGING, samples=5))
    (folder / "evaluations" / "step_00000002.json").unlink()
    with pytest.raises(ValueError, match="no evaluation of step 2; remove the folder to train again"):
        train(latents, features, folder)
    drop_checkpoints(folder)
    assert not list(folder.rglob("*.safetensors")) and (folder / "log.jsonl").is_file()
    assert (folder / "evaluations" / "step_00000006.json").is_file() and (folder / "samples.png").is_file()
    drop_checkpoints(folder)  # again, to no harm
    assert train(latents, features, folder) == whole  # from the start, whatever evaluations there were
    assert (folder / "samples.png").read_bytes() == sheet


def test_lost_evaluation_is_found_before_more_steps_are_spent(latents, features, tmp_path, monkeypatch):
    calls, folder = [0], tmp_path / "cell"

    def check():
        calls[0] += 1
        if calls[0] == 8:  # judging step 4
            raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        train(latents, features, folder, check=check)
    (folder / "evaluations" / "step_00000002.json").unlink()
    monkeypatch.setattr(cells.FlowTrainer, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=f"{folder}: no evaluation of step 2"):
        train(latents, features, folder)


def test_place_that_cannot_be_written_is_an_error(latents, features, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        train(latents, features, tmp_path / "file" / "cell")


@pytest.mark.parametrize(
    "every, saved", [(2, 2), (2500, 2500), (4000, 2000), (10**5, 2500), (5006, 2503), (10007, 10007)]
)
def test_judged_steps_are_saved_and_few_others(every, saved):
    assert save_every(every) == saved


def test_distance_is_that_of_the_samples(latents, features, tmp_path, monkeypatch):
    made = []
    original = cells._Cell.samples

    def samples(self, shift, first, num):
        images = original(self, shift, first, num)
        made.append((self.trainer, shift, first, images))
        return images

    monkeypatch.setattr(cells._Cell, "samples", samples)
    config = dataclasses.replace(FLOW, steps=2)
    (found,) = train(latents, features, tmp_path / "cell", config)
    images = torch.cat([x for _, shift, _, x in made[:2]])
    assert len(images) == 6 and [m[1:3] for m in made[:4]] == [(1.0, 0), (1.0, 4), (3.0, 0), (3.0, 4)]
    moments = cells.Moments(features.channels)
    moments.add(features(images)["pool"])
    assert found["fd"]["1.00"] == pytest.approx(frechet_distance(moments, latents.reference), rel=1e-9)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"every": 0}, "every: expected 1 or more, got 0"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
        ({"sample_steps": -1}, "sample_steps: expected 1 or more, got -1"),
        ({"sample_batch": 0}, "sample_batch: expected 1 or more, got 0"),
        ({"sampling_shifts": ()}, "sampling_shifts: expected different numbers above 0"),
        ({"sampling_shifts": (1.0, 0.0)}, "sampling_shifts: expected different numbers above 0"),
        ({"sampling_shifts": (float("nan"),)}, "sampling_shifts: expected different numbers above 0"),
        ({"sampling_shifts": (1.0, 1.001)}, "sampling_shifts: expected different numbers above 0"),
    ],
)
def test_errors_name_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(JUDGING, **fields)
