"""A run in parts equals the run in one piece, bit for bit; what differs from the run's config is refused key by key."""

import programs
import pytest
import torch
from toy import assert_same_bits, few_pixels, run, saved

from flux2.checkpoint_folders import Checkpoints
from train import flow
from train.data import CropBatches, batches, embedded_photographs
from train.loop import read_log
from train.vae_config import parse_vae

EVERYTHING = [
    *("--gan.weight", "0.5", "--gan.width", "8", "--gan.norm", "batch", "--gan.lecam", "0.1", "--gan.augment", "1"),
    *("--gan.r1", "0.1", "--gan.r1-every", "3", "--gan.start.when", "plateau", "--gan.start.window", "2"),
    *("--gan.start.threshold", "0.99", "--gan.start.step", "4", "--gan.start.warmup", "2", "--gan.start.ramp", "2"),
    *("--lpips-weight", "1", "--lpips-net", "alex", "--lpips-weights", "random", "--learn-logvar"),
    *("--vf-weight", "0.1", "--eq-probability", "0.5", "--eq-scales", "1.0", "--ema-decays", "0.9", "0.5"),
    *("--schedules", "lpips=0:0,1:1", "gan=0.5:1,1:2"),
]

pytestmark = pytest.mark.filterwarnings("ignore:LPIPS with a random backbone")


@pytest.fixture(autouse=True)
def small_fits(monkeypatch):
    few_pixels(monkeypatch)
    monkeypatch.setattr(flow, "VALIDATION_CROPS", 4)
    monkeypatch.setattr(flow, "SHOWN_EACH", 2)


def records(folder, key):
    return [r for r in read_log(folder / "log.jsonl") if key in r]


def test_autoencoder_with_everything_on(soak, tmp_path):
    """Stopped mid-epoch: inside a plateau's window, where D's start was just decided, and while it warms up. The parts
    read with two workers."""
    flags = [*EVERYTHING, "--steps", "12", "--warm-start", "none"]
    assert run(tmp_path, *flags, "--name", "whole", "--stop-after", "10") == 0
    workers = ["--workers", "2", "--allow-changed", "workers"]
    stops = ("3", "4", "5", "10") if not soak.long else tuple(str(i) for i in range(1, 11))
    for stop in stops:
        now = workers if stop == stops[0] else [*workers, "--resume", "auto"]
        assert run(tmp_path, *flags, "--name", "parts", "--stop-after", stop, *now) == 0
    files = saved(tmp_path / "whole")
    assert {n.removesuffix(".safetensors") for n in files} == {
        "model", "ema", "ema_0.5", "optimiser", "extra", "discriminator", "discriminator_optimiser",
        "discriminator_state",
    }  # fmt: skip
    assert_same_bits(files, saved(tmp_path / "parts"))
    assert files["discriminator_state.safetensors"]["started_at"] == 4
    whole, parts = (records(tmp_path / name, "loss") for name in ("whole", "parts"))
    assert "gan" in whole[-1] and parts[-1]["step"] == 10
    assert all("d_loss" not in r for r in parts if r["step"] <= 4)
    soak.found("train.vae resumed mid-epoch, everything on: the same bits", stops=len(stops), tensors=count(files))


FLOWS = {"crops": [], "cache": ["--cache", "auto", "--cached-crops", "14"], "muon": ["--optimiser", "muon"]}


@pytest.mark.parametrize("flags", FLOWS.values(), ids=FLOWS.keys())
def test_flow(soak, tmp_path, flags):
    ae = programs.tiny_autoencoder(tmp_path)
    flags = [
        *programs.FLOW[1:],
        *flags,
        "--autoencoder",
        str(ae),
        "--out",
        str(tmp_path),
        "--steps",
        "20",
        "--repa",
        "hog",
    ]
    flags += ["--repa", "hog", "--ema-decays", "0.9", "0.5", "--accumulate", "2"]
    assert flow.main([*flags, "--name", "whole", "--stop-after", "7"]) == 0
    stops = ("2", "5", "7") if not soak.long else tuple(str(i) for i in range(1, 8))
    for stop in stops:
        assert flow.main([*flags, "--name", "parts", "--stop-after", stop, "--resume", "auto"]) == 0
    files = saved(tmp_path / "whole")
    assert {"model.safetensors", "ema_0.9.safetensors", "ema_0.5.safetensors"} <= files.keys()
    assert_same_bits(files, saved(tmp_path / "parts"))
    soak.found("train.flow resumed mid-epoch: the same bits", stops=len(stops), tensors=count(files))


def count(files):
    return sum(len(tensors) for tensors in files.values())


def test_workers_give_the_same_batches(soak):
    config = parse_vae(["--batch", "8"])[0]
    pictures = embedded_photographs()[0]
    dataset = CropBatches(pictures, resolution=32, batch=8, augmentation=config.augmentation, seed=3)
    last = soak.rounds(6, 60)
    alone = list(batches(dataset, 0, last, workers=0))
    for workers in (1, 2):
        found = list(batches(dataset, 0, last, workers=workers))
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    soak.found("0, 1 and 2 workers give the same batches", batches=last)


def test_changed_config_is_refused_key_by_key_and_let_in_by_name(soak, tmp_path, capsys):
    flags = ["--steps", "4", "--name", "x", "--resume", "auto"]
    assert run(tmp_path, *flags, "--stop-after", "1") == 0
    changed = [*flags, "--lr", "0.5", "--gan.lr", "0.25"]
    assert run(tmp_path, *changed) == 2
    error = capsys.readouterr().err
    assert "gan.lr: saved 0.0001, now 0.25" in error and "lr: saved" in error and "--allow-changed KEY" in error
    assert run(tmp_path, *changed, "--allow-changed", "lr") == 2
    assert "gan.lr: saved" in capsys.readouterr().err and Checkpoints(tmp_path / "x" / "checkpoints").steps() == [1]
    assert run(tmp_path, *changed, "--stop-after", "2", "--allow-changed", "lr", "gan") == 0
    (record,) = records(tmp_path / "x", "changed")
    assert record["step"] == 1 and [line.split(":")[0] for line in record["changed"]] == ["gan.lr", "lr"]
    soak.found(
        "A changed config is refused key by key; --allow-changed lets in what it names, and the log says so", keys=2
    )
