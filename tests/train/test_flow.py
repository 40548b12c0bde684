"""train.flow and train.sample end to end at toy size: what they write, exact resume, caches, interruption, errors."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flux2 import AutoEncoder, AutoencoderConfig, save_autoencoder
from flux2.checkpoint_folders import Checkpoints
from flux2.checkpoints import load_tensors
from train import data, flow, sample, vae
from train.flow import main
from train.flow_config import FLOW_PRESETS, parse_flow
from train.flow_data import LabelledCrops, newest_autoencoder
from train.loop import read_log
from train.sample import chosen_labels, generate, load_flow

AE = AutoencoderConfig(
    z_channels=4, ch=4, decoder_ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2, latent_norm="batchnorm"
)
TOY = ["--transformer.width", "16", "--transformer.depth", "2", "--transformer.heads", "2", "--resolution", "32"]
TOY += ["--transformer.repa-depth", "1", "--batch", "4", "--precision", "fp32", "--warmup", "2", "--repa-hidden", "8"]
TOY += ["--sample-steps", "2", "--cache", "", "--cached-crops", "10", "--shift", "auto"]


@pytest.fixture(autouse=True)
def few_crops(monkeypatch):
    monkeypatch.setattr(flow, "VALIDATION_CROPS", 4)
    monkeypatch.setattr(flow, "SHOWN_EACH", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An autoencoder, five pictures in two classes and their cache"""
    folder = tmp_path_factory.mktemp("flow")
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AE), folder / "ae.safetensors")
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "pictures" / "ab"[i % 2] / f"{i}.png")
    made = ["--autoencoder", str(folder / "ae.safetensors"), "--data", str(folder / "pictures"), "--resolution", "32"]
    assert data.main(["cache", *made, "--teacher", "hog", "--out", str(folder / "cache")]) == 0
    return folder


def run(place, out, *flags):
    ae = [] if "--autoencoder" in flags else ["--autoencoder", str(place / "ae.safetensors")]
    pictures = [] if "--data" in flags else ["--data", str(place / "pictures")]
    return main([*TOY, *ae, *pictures, "--out", str(out), *flags])


def checkpoint(folder):
    steps = Checkpoints(folder / "checkpoints", keep=9)
    last = steps.path(steps.steps()[-1])
    return {p.name: load_tensors(p)[0] for p in last.glob("*.safetensors")}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(v, b[name][k]) for k, v in a[name].items()), name


@pytest.fixture(scope="module")
def finished(place):
    """A run over the embedded photographs, to its report"""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(flow, "VALIDATION_CROPS", 4)
        m.setattr(flow, "SHOWN_EACH", 2)
        assert run(place, place, "--data", "photographs", "--steps", "4", "--save-every", "2", "--name", "x") == 0
    return place / "x"


def test_a_run_writes_everything(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["steps"] == 4 and config["transformer"]["width"] == 16 and config["law"] == "plateau_logit_normal"
    assert Checkpoints(finished / "checkpoints", keep=9).steps() == [2, 4]
    names = {"model", "ema_0.99", "ema_0.998", "optimiser_model", "projector"}
    assert {Path(n).stem for n in checkpoint(finished)} == names
    records = read_log(finished / "log.jsonl")
    validated = [r for r in records if "held_out_velocity" in r]
    assert [r["step"] for r in validated] == [0, 2, 4]
    for r in validated:
        assert len(r["held_out_bins"]) == 10 and r["fresh_velocity"] == pytest.approx(np.mean(r["fresh_bins"]))
    assert {"loss", "velocity", "repa", "grad_norm", "lr"} <= next(r for r in records if "loss" in r).keys()
    samples = {p.name for p in (finished / "samples").iterdir()}
    sheets = {"samples.png", "training_crops.png", "step_00000002.png", "step_00000004.png"}
    assert samples == sheets | {"losses.png", "time_bins.png"}
    shape = (2 * (7 * 34 - 2), 2 * (2 * 34 - 2), 3)  # seven classes of two, twice as large
    assert all(np.asarray(Image.open(finished / "samples" / s)).shape == shape for s in sheets)
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page and "astronaut, " in page
    results = json.loads((finished / "results.json").read_text())["normalised_velocity_loss"]
    assert list(results) == ["0.99", "0.998"]
    assert results["0.99"]["held_out"]["mean"] == pytest.approx(validated[-1]["held_out_velocity"], rel=1e-6)


def test_the_runs_own_autoencoder_has_the_same_bits(place, finished):
    kept, given = load_tensors(finished / "autoencoder.safetensors")[0], load_tensors(place / "ae.safetensors")[0]
    assert all(torch.equal(v, given[k]) for k, v in kept.items()) and kept.keys() == given.keys()


def test_real_crops_stand_beside_the_samples(finished):
    """Row k of training_crops.png is of class k: its colours are those of that photograph"""
    sheet = np.asarray(Image.open(finished / "samples" / "training_crops.png")).astype(float)
    names = load_flow(finished).classes
    means = {n: sheet[68 * i : 68 * i + 64].mean((0, 1)) for i, n in enumerate(names)}
    assert means["hubble_deep_field"].max() < 60 and means["ihc"].min() > 120
    red, _, blue = means["retina"]
    assert red > 2 * blue


def test_a_runs_own_cache_holds_equal_shares_of_its_pictures(place, tmp_path):
    flags = ["--cache", "auto", "--steps", "2", "--stop-after", "1", "--augmentation.crop-scale", "1", "1.2"]
    assert run(place, tmp_path, *flags, "--name", "x") == 0
    manifest = json.loads((tmp_path / "x" / "latents" / "manifest.json").read_text())
    preprocessing = {"resolution": 32, "crops_per_picture": 2, "flip": False, "crop_scale": [1.0, 1.2], "seed": 0}
    assert manifest["crops"] == 10 and manifest["content"]["preprocessing"] == preprocessing  # of five pictures
    assert run(place, tmp_path, *flags, "--augmentation.colour", "0.1") == 2


def test_an_interruption_while_caching_leaves_and_is_gone_on_with(place, tmp_path, monkeypatch, capsys):
    flags = ["--cache", "auto", "--steps", "2", "--stop-after", "1", "--name", "x"]
    with monkeypatch.context() as m:
        m.setattr(flow, "make_cache", lambda config: 130)
        assert run(place, tmp_path, *flags) == 130
    assert run(place, tmp_path, *flags, "--resume", "auto") == 0


def test_resume_refuses_another_config_and_takes_the_runs_own_autoencoder(place, tmp_path, capsys):
    ae = tmp_path / "ae.safetensors"
    ae.write_bytes((place / "ae.safetensors").read_bytes())
    flags = ["--autoencoder", str(ae), "--name", "x", "--steps", "4"]
    assert run(place, tmp_path, *flags, "--stop-after", "1") == 0
    ae.unlink()
    assert run(place, tmp_path, *flags, "--law", "uniform", "--shift", "2", "--resume", "auto") == 2
    error = capsys.readouterr().err
    assert "law: saved plateau_logit_normal, now uniform" in error and "shift: saved auto, now 2.0" in error
    assert run(place, tmp_path, *flags, "--resume", "auto", "--stop-after", "2") == 0


def test_interruption_saves_and_says_how_to_go_on(place, tmp_path, monkeypatch, capsys):
    real, calls = flow.FlowTrainer.step, []

    def step(self, *arguments):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments)

    monkeypatch.setattr(flow.FlowTrainer, "step", step)
    assert run(place, tmp_path, "--steps", "9", "--name", "x") == 130
    assert "after 3 of 9 steps; go on with --resume auto --name x" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "x" / "checkpoints", keep=9).steps() == [3]


def test_training_lowers_the_validation_loss(place, tmp_path):
    flags = [
        "--data",
        "photographs",
        "--steps",
        "121",
        "--batch",
        "16",
        "--lr",
        "5e-3",
        "--repa",
        "none",
        "--cache",
        "auto",
    ]
    assert run(place, tmp_path, *flags, "--name", "x", "--stop-after", "120") == 0
    losses = [r["fresh_velocity"] for r in read_log(tmp_path / "x" / "log.jsonl") if "fresh_velocity" in r]
    assert losses[0] > 0.9 and losses[-1] < 0.7 * losses[0]


def test_an_autoencoder_is_found_or_made(place, tmp_path, monkeypatch, capsys):
    """The newest run of train.vae in --out; a run of train.flow beside it is none"""
    runs = tmp_path / "runs"
    assert newest_autoencoder(runs) is None

    def stand_in(argv):
        assert argv == ["--out", str(runs)]
        ae = AutoEncoder(AE)
        plain = {"format": "flux2-tokenizer", "autoencoder": flow.to_dict(AE), "train": {"steps": 3}}
        saved = Checkpoints(runs / "photos" / "checkpoints", keep=1)
        saved.save(2, {"ema": ae.state_dict()}, {**plain, "step": 2})  # interrupted, the first time
        if len(called) == 0:
            called.append(0)
            return 130
        saved.save(3, {"ema": ae.state_dict()}, {**plain, "step": 3})
        return 0

    called = []

    monkeypatch.setattr(vae, "main", stand_in)
    flags = [*TOY, "--out", str(runs), "--steps", "1", "--name", "f", "--data", str(place / "pictures")]
    assert main(flags) == 130
    capsys.readouterr()
    assert newest_autoencoder(runs) == (runs / "photos", False) and main(flags) == 2
    assert "photos is not trained to its end: go on with" in capsys.readouterr().err
    stand_in(["--out", str(runs)])
    assert main(flags) == 0
    assert newest_autoencoder(runs) == (runs / "photos", True)
    monkeypatch.setattr(vae, "main", None)  # now it is there
    flags = ["--stop-after", "1", "--data", str(place / "pictures")]
    assert main([*TOY, "--out", str(runs), "--steps", "2", *flags]) == 0


def test_dry_run_writes_nothing(place, tmp_path, capsys):
    assert run(place, tmp_path, "--dry-run") == 0
    assert re.search(r"[\d,]+ parameters, fp32; plateau_logit_normal, shift 1,", capsys.readouterr().out)
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert "the autoencoder `photos` would be trained first" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(place, tmp_path, capsys):
    cache = ["--cache", str(place / "cache")]
    for flags, message in (
        (["--autoencoder", str(tmp_path / "missing")], "no such file or folder"),
        (["--resolution", "40"], "resolution: expected a multiple of 16, got 40"),
        (["--batch", "4", "--accumulate", "3"], "accumulate: expected a divisor of batch=4, got 3"),
        (["--ema-decays", "0.9", "0.9"], "ema_decays: expected different numbers"),
        (["--preset", "sit-xxl"], "did you mean 'sit-xl'?"),
        ([*cache, "--resolution", "64"], "expected crops of --resolution 64 pixels, got 32"),
        (["--cache", str(place / "pictures")], "expected a latent cache"),
    ):
        assert run(place, tmp_path, *flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error


def test_labels_follow_their_pictures(place):
    pictures, _ = data.open_pictures(str(place / "pictures"))
    crops = LabelledCrops(
        pictures, str(place / "pictures"), ["b", "c"], resolution=32, batch=8, augmentation=data.Augmentation(), seed=0
    )
    labels = [0 if pictures.paths[crops.crops.picture_of(5, i)].parent.name == "b" else 2 for i in range(8)]
    assert crops[5]["labels"].tolist() == labels and {0, 2} == set(labels)  # a is none of the two: no class
    assert crops.names(5)[0] == pictures.paths[crops.crops.picture_of(5, 0)].name


def test_default_preset_is_the_embedded_job():
    config = FLOW_PRESETS["flow"]
    assert (config.data, config.law, config.cache) == ("photographs", "plateau_logit_normal", "auto")
    assert FLOW_PRESETS["sit-xl"].shift == "auto" and FLOW_PRESETS["sit-xl"].train_shift(128) == 4.63
    config, options = parse_flow(["--preset", "sit-xl", "--shift", "2.5", "--compile"])
    assert config.shift == 2.5 and options.compile and config.repa == "dinov2-b" and config.batch == 256


def test_sampling_writes_a_sheet_and_arrays(finished, tmp_path, capsys):
    flags = ["--run", str(finished), "--num", "6", "--steps", "3", "--precision", "fp32", "--columns", "3"]
    assert sample.main([*flags, "--classes", "retina", "0", "none", "--out", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert "6 samples of" in said and "shift 2.95 (trained at 1)" in said
    arrays = np.load(tmp_path / "s.npz")
    classes = load_flow(finished).classes
    assert arrays["labels"].tolist() == [classes.index("retina")] * 2 + [0] * 2 + [7] * 2
    assert arrays["arr_0"].shape == (6, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (2 * 66, 2 * 100, 3)
    assert np.array_equal(sheet[:64:2, :64:2], arrays["arr_0"][0])
    assert sample.main([*flags, "--out", str(tmp_path / "t"), "--batch", "4", "--classes", "retina", "0", "none"]) == 0
    again = np.load(tmp_path / "t.npz")["arr_0"].astype(int)
    assert np.abs(again - arrays["arr_0"]).max() <= 1  # another batch size: the same noise


def test_sampling_options_matter(finished, tmp_path):
    flags = ["--run", str(finished), "--num", "2", "--steps", "3", "--precision", "fp32"]
    seen = {}
    for name, extra in {
        "plain": [],
        "seed": ["--seed", "1"],
        "heun": ["--sampler", "heun"],
        "sde": ["--sampler", "euler_maruyama"],
        "shift": ["--shift", "1.5"],
        "guide": ["--guide", str(finished), "--guide-scale", "1.5"],
    }.items():
        assert sample.main([*flags, *extra, "--out", str(tmp_path / name)]) == 0
        seen[name] = np.load(tmp_path / f"{name}.npz")["arr_0"].tobytes()
    assert seen.pop("guide") == seen["plain"]  # guided by itself: nothing changes
    assert len(set(seen.values())) == len(seen)


def test_guidance_reaches_the_samplers(finished, tmp_path, monkeypatch):
    asked = []
    real_cfg, real_auto = sample.classifier_free, sample.autoguidance
    monkeypatch.setattr(sample, "classifier_free", lambda *a: asked.append(a[1:]) or real_cfg(*a))
    monkeypatch.setattr(sample, "autoguidance", lambda *a: asked.append(a[2]) or real_auto(*a))
    flags = ["--run", str(finished), "--num", "1", "--steps", "1", "--classes", "ihc", "--out", str(tmp_path / "s")]
    flags += ["--guidance", "3", "--interval", "0.2", "0.7", "--guide", str(finished), "--guide-scale", "1.25"]
    assert sample.main(flags) == 0
    label = torch.tensor([load_flow(finished).classes.index("ihc")])
    assert asked == [(label, 7, 3.0, (0.2, 0.7))] * 2 + [1.25]


def test_each_average_can_be_loaded(finished):
    files = checkpoint(finished)
    for ema, name in ((None, "ema_0.99"), (0.99, "ema_0.99"), (0.998, "ema_0.998")):
        state = load_flow(finished, ema=ema).model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in files[f"{name}.safetensors"].items())
    weight = "final_layer.linear.weight"
    assert not torch.equal(files["ema_0.99.safetensors"][weight], files["model.safetensors"][weight])


def test_a_shift_below_the_training_shift_warns(finished, tmp_path):
    with pytest.warns(UserWarning, match="the sampling shift 0.5 is below the training shift 1"):
        flags = ["--num", "1", "--steps", "1", "--shift", "0.5", "--out", str(tmp_path / "s")]
        assert sample.main(["--run", str(finished), *flags]) == 0


def test_sampling_errors_are_one_line(place, finished, tmp_path, capsys):
    for flags, message in (
        (["--run", str(place)], "expected a run of train.flow"),
        (["--run", str(finished), "--classes", "cat"], "classes: expected astronaut, "),
        (["--run", str(finished), "--ema", "0.5"], "ema: expected one of 0.99, 0.998, got 0.5"),
        (["--run", str(finished), "--interval", "0.9", "0.1"], "interval: expected 0 <= low <= high <= 1"),
    ):
        assert sample.main([*flags, "--num", "1", "--steps", "1", "--out", str(tmp_path / "s")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_labels_in_equal_shares():
    assert chosen_labels(["a", "b", "c"], (), 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert chosen_labels(["a", "b", "c"], ("c", "none"), 3).tolist() == [2, 2, 3]
    assert chosen_labels(["1", "0"], ("0",), 1).tolist() == [1]  # a name before a number


def test_generation_of_a_known_flow():
    """v = z - mean of the class (data a point): every sample ends on its class's point, whatever the noise"""
    means = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)

    def velocity_of(y):
        return lambda z, t: (z - means[y]) / t.view(-1, 1, 1, 1)

    y = torch.tensor([0, 1, 0])
    z = generate(velocity_of, y, (3, 2, 2), steps=4, shift=3.0, batch=2)
    torch.testing.assert_close(z, means[y].expand(3, 3, 2, 2), rtol=1e-4, atol=1e-4)
