"""Trackers: what they get, that they cannot stop a run, and one run each through the program."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy import TOY

from train import dist
from train.configs import RunOptions
from train.loop import read_log
from train.run import Run
from train.trackers import MOST_FAILURES, TRACKERS, Trackers
from train.vae import main

RECORD = {"step": 10, "nimg": 20, "loss": 0.5, "verdict": "learns", "skipped": ["a", "b"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("sheet", "step_00000001"):
        Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(tmp_path / "samples" / f"{name}.png")
    return tmp_path


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    return read.Reload()


def test_tensorboard_has_numbers_text_and_pictures(folder):
    trackers = Trackers(("tensorboard",), folder, {"lr": 1}, 0)
    trackers.log(RECORD)
    trackers.close()
    found = events(folder)
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(10, 0.5)]
    assert set(found.Tags()["scalars"]) == {"nimg", "loss"}
    text = {t: found.Tensors(t)[0].tensor_proto.string_val[0].decode() for t in found.Tags()["tensors"]}
    assert text["verdict/text_summary"] == "learns" and text["skipped/text_summary"] == "['a', 'b']"
    assert text["config/text_summary"] == "    lr: 1"
    (image,) = found.Images("sheet")
    assert (image.step, image.width, image.height) == (10, 6, 4) and found.Tags()["images"] == ["sheet"]
    assert trackers.failures == {"tensorboard": 0}


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    first = Trackers(("tensorboard",), tmp_path, {}, 0)
    for step in (10, 20, 30):
        first.log({"step": step, "loss": 1.0})
    first.close()
    again = Trackers(("tensorboard",), tmp_path, {}, 20)
    again.log({"step": 30, "loss": 2.0})
    again.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(10, 1.0), (20, 1.0), (30, 2.0)]


class Service:
    """Stands in for the modules wandb and trackio: notes what is called, with what."""

    def __init__(self):
        self.calls = []
        self.Image = lambda path: ("image", path.rpartition("/")[2])

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def define_metric(self, name, *, step_metric):
        self.calls.append(("metric", name, step_metric))

    def log(self, values, step=None):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def service(monkeypatch):
    service = Service()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, service)
    return service


def test_wandb(folder, service):
    values = {"nimg": 20, "loss": 0.5, "verdict": "learns", "skipped": "['a', 'b']"}
    for start in (0, 10):
        trackers = Trackers(("wandb",), folder, {"lr": 1}, start)
        trackers.log(RECORD)
        trackers.close()
    first, again = service.calls[:5], service.calls[5:]
    assert first == again  # the same id, so the same run
    kind, options = first[0]
    assert kind == "init" and options["config"] == {"lr": 1} and options["resume"] == "allow"
    assert options["dir"] == str(folder) and len(options["id"]) == 32
    assert first[1:] == [
        ("metric", "*", "step"),
        ("log", {"step": 10, **values}, None),
        ("log", {"step": 10, "sheet": ("image", "sheet.png")}, None),
        ("finish",),
    ]
    Trackers(("wandb",), folder, {}, 0)
    assert service.calls[-2][1]["id"] != options["id"]  # a new run in the folder of an old one


def test_trackio(folder, service):
    trackers = Trackers(("trackio",), folder, {"lr": 1}, 0)
    trackers.log(RECORD)
    trackers.close()
    kind, options = service.calls[0]
    assert kind == "init" and options["name"] == folder.name and options["config"] == {"lr": 1}
    assert [c[0] for c in service.calls[1:]] == ["log", "log", "finish"]
    assert service.calls[1][1]["loss"] == 0.5 and service.calls[1][2] == 10
    assert service.calls[2][1:] == ({"sheet": ("image", "sheet.png")}, 10)


class Broken:
    """Fails at what it is told to."""

    def __init__(self, at, calls):
        self.at, self.calls = at, calls

    def __call__(self, folder, config, start):
        self._fail("open")
        return self

    def _fail(self, at):
        self.calls.append(at)
        if at in self.at:
            raise ConnectionError("no route to host\nand a long story")

    def log(self, record):
        self._fail("log")

    def images(self, name, path, step):
        self._fail("images")

    def close(self):
        self._fail("close")


@pytest.mark.parametrize(
    ("at", "calls"),
    [
        (("open",), ["open"]),
        (("log",), ["open"] + ["log"] * MOST_FAILURES),
        (("images", "close"), ["open"] + ["log"] * 9 + ["images", "close"]),
    ],
)
def test_a_tracker_that_fails_is_said_once_counted_and_left(at, calls, folder, monkeypatch, capsys):
    seen = []
    monkeypatch.setitem(TRACKERS, "wandb", Broken(at, seen))
    trackers = Trackers(("wandb", "tensorboard"), folder, {}, 0)
    for step in range(9):
        trackers.log({"step": step, "loss": 1.0})
    trackers.close()
    failed = sum(call in at for call in calls)
    assert seen == calls and trackers.failures == {"wandb": failed, "tensorboard": 0}
    said = capsys.readouterr().err
    assert said.count("warning: --track wandb: no route to host; training goes on") == 1
    assert f"--track wandb: {failed} calls failed" in said and "long story" not in said
    assert len(events(folder).Scalars("loss")) == 9


def test_a_failure_that_passes_leaves_a_tracker_in_use(folder, monkeypatch):
    tracker = Broken(("log",), [])
    monkeypatch.setitem(TRACKERS, "wandb", tracker)
    trackers = Trackers(("wandb",), folder, {}, 0)
    for step in range(3 * MOST_FAILURES):
        tracker.at = ("log",) if step % 2 else ()
        trackers.log({"step": step})
    assert tracker.calls.count("log") == 3 * MOST_FAILURES


def test_only_the_first_process_tracks(tmp_path, monkeypatch, service):
    monkeypatch.setattr(dist, "is_main", lambda: False)
    run = Run(RunOptions(out=tmp_path, name="x", track=("wandb",)), preset="photos", config={})
    run.open("", torch.device("cpu"))
    run.log.write(RECORD)
    run.trackers.close()
    assert service.calls == [] and not (tmp_path / "x" / "log.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*TOY, "--out", str(tmp_path), "--steps", "1", "--track", "wandb"]) == 2
    said = capsys.readouterr().err
    assert "--track wandb: expected an installed wandb" in said and "pip install 'flux2-tokenizer[track]'" in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_tracker_that_works_and_one_that_does_not(tmp_path, monkeypatch, capsys):
    """The same weights and the same log as without them, up to times."""
    monkeypatch.setattr("train.vae.FITTED_PIXELS", 65536)
    monkeypatch.setattr("train.vae.HELD_OUT_CROPS", 16)
    monkeypatch.setattr("train.vae.STATISTICS_CROPS", 16)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # has no init
    for name, flags in (("plain", []), ("tracked", ["--track", "tensorboard", "wandb"])):
        assert main([*TOY, "--out", str(tmp_path), "--name", name, "--steps", "2", *flags]) == 0
    assert "warning: --track wandb: " in capsys.readouterr().err
    weights = [(tmp_path / n / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
               for n in ("plain", "tracked")]  # fmt: skip
    assert weights[0] == weights[1]
    found, lines = events(tmp_path / "tracked"), read_log(tmp_path / "tracked" / "log.jsonl")
    assert [e.step for e in found.Scalars("held_out_psnr")] == [r["step"] for r in lines if "held_out_psnr" in r]
    loss = next(k for k in lines[-2] if k.startswith("loss") or k == "l1")
    logged = [r[loss] for r in lines if loss in r]
    assert [e.value for e in found.Scalars(loss)] == [float(torch.tensor(v)) for v in logged]
    assert found.Tags()["images"], json.dumps(found.Tags())
