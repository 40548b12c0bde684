"""One model of a comparison: interrupted anywhere it goes on to the same figures; cells of a seed compare in pairs."""

import dataclasses
import os
import signal
from pathlib import Path

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
from train.cell import Judging, drop_checkpoints, train_cell
from train.cell_data import FIXED_STEP, Crops, fixed_crops, load_latents, make_latents, reference_moments
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


def test_interrupted_by_a_signal_in_training_goes_on_to_the_same_bits(whole, latents, features, tmp_path, monkeypatch):
    stepped = cells.FlowTrainer.step

    def step(self, number, batch):
        if number == 3:  # a real signal, to this process, between checkpoints
            os.kill(os.getpid(), signal.SIGINT)
        return stepped(self, number, batch)

    monkeypatch.setattr(cells.FlowTrainer, "step", step)
    with pytest.raises(Interrupted) as raised:
        train(latents, features, tmp_path / "cell")
    assert raised.value.signal == signal.SIGINT
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


def test_cells_of_a_seed_see_the_same_samples_and_noise(latents, features, tmp_path, monkeypatch):
    seen = {}
    stepped = cells.FlowTrainer.step

    def step(self, number, batch):
        seen.setdefault(self.config.law, []).append(batch["mean"].clone())
        return stepped(self, number, batch)

    monkeypatch.setattr(cells.FlowTrainer, "step", step)
    for law in ("uniform", "logit_normal"):
        train(latents, features, tmp_path / law, dataclasses.replace(FLOW, law=law, steps=2))
    for a, b in zip(seen["uniform"], seen["logit_normal"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_model_aligned_to_a_teacher_is_another(whole, latents, features, tmp_path):
    found = train(latents, features, tmp_path / "cell", dataclasses.replace(FLOW, repa="hog"))
    assert found[-1]["velocity"] != whole[-1]["velocity"]


def test_another_config_or_a_lost_evaluation_is_refused_by_name(whole, latents, features, tmp_path):
    folder = tmp_path / "cell"
    assert train(latents, features, folder) == whole
    assert (folder / "samples.png").is_file()
    with pytest.raises(ValueError, match="another config; judging.samples: saved 6, now 5"):
        train(latents, features, folder, judging=dataclasses.replace(JUDGING, samples=5))
    (folder / "evaluations" / "step_00000002.json").unlink()
    with pytest.raises(ValueError, match="no evaluation of step 2; remove the folder to train again"):
        train(latents, features, folder)
    drop_checkpoints(folder)
    assert not (folder / "checkpoints").exists()
    assert train(latents, features, folder) == whole  # from the start, as the error says


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


def test_reference_is_of_crops_that_training_does_not_draw(features):
    pixels = torch.cat([x for x, _ in fixed_crops(CROPS, CROPS.pictures()[0], [], 70)])
    again = torch.cat([x for x, _ in fixed_crops(CROPS, CROPS.pictures()[0], [], 70)])
    assert pixels.shape == (70, 3, 32, 32) and torch.equal(pixels, again)
    moments = reference_moments(CROPS, features, 70, CPU)
    rows = features(pixels)["pool"].double().numpy()
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.cov.numpy(), np.cov(rows, rowvar=False), atol=1e-12)
    assert FIXED_STEP > 400_000  # beyond any training


def test_centre_squares_are_of_pictures_spread_evenly():
    crops = Crops(resolution=16, cached_crops=0)
    pictures = crops.pictures()[0]
    names = [Path(p).stem for p in pictures.paths]
    found = [(x, y) for x, y in fixed_crops(crops, pictures, names, 3)]
    assert [y.tolist() for _, y in found] == [[0, 3, 6]] and found[0][0].shape == (3, 3, 16, 16)
    assert len(torch.cat([x for x, _ in fixed_crops(crops, pictures, names, 100)])) == 7


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"every": 0}, "every: expected 1 or more, got 0"),
        ({"sampling_shifts": ()}, "sampling_shifts: expected different numbers above 0"),
        ({"sampling_shifts": (1.0, 1.001)}, "sampling_shifts: expected different numbers above 0"),
    ],
)
def test_errors_name_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(JUDGING, **fields)
