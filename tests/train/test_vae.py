"""The program end to end at toy size: what it writes, exact resume, interruption, and its errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from toy import TOY, few_pixels, run, saved

from flux2 import load_autoencoder
from flux2.checkpoint_folders import Checkpoints
from flux2.latents import patchify
from train import vae
from train.data import CropBatches, embedded_photographs
from train.loop import read_log
from train.vae import main
from train.vae_config import parse_vae

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def small_fits(monkeypatch):
    """PCA and latent statistics on few pixels: the toy runs are about what happens, not how well."""
    few_pixels(monkeypatch, held_out=16)


def test_a_run_writes_everything(tmp_path, capsys):
    assert run(tmp_path, "--steps", "6", "--name", "x", "--save-every", "3") == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(r"held-out PSNR \d+\.\d\d dB \(EMA, 16 crops\)", last)
    folder = tmp_path / "x"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["steps"] == 6 and config["autoencoder"]["ch"] == 8 and config["precision"] == "fp32"
    env = json.loads((folder / "env.json").read_text())
    assert env["packages"]["torch"] == torch.__version__ and {"commit", "processor", "gpu", "threads"} <= env.keys()
    records = read_log(folder / "log.jsonl")
    losses = [r for r in records if "loss" in r]
    assert {"l1", "laplacian", "kl", "align", "grad_norm", "lr", "images_per_second", "peak_memory_bytes"} <= losses[
        -1
    ].keys()
    assert losses[-1]["step"] == 6 and losses[-1]["nimg"] == 12
    assert [r["step"] for r in records if "held_out_psnr" in r] == [0, 3, 6]
    assert float(last.split()[2]) == pytest.approx(records[-1]["held_out_psnr"], abs=0.006)
    assert Checkpoints(folder / "checkpoints", keep=9).steps() == [3, 6]
    samples = {p.name for p in (folder / "samples").iterdir()}
    assert {"reconstructions.png", "losses.png", "held_out_0_ours.png", "held_out_1_normalised_latent.png"} <= samples
    for name in samples:
        picture = np.asarray(Image.open(folder / "samples" / name))
        assert picture.std() > 1, name  # something is drawn
    page = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == len(samples) and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # opens without a network
    results = json.loads((folder / "results.json").read_text())["held_out"]
    assert [label.split(",")[0] for label in results] == [
        "ours (EMA)",
        "bicubic",
        "bicubic at equal code size",
        "PCA of 8x8 blocks",
    ]
    assert f"{results['ours (EMA)']['psnr_db']:.2f}" == last.split()[2]


def test_the_result_loads_and_its_latents_are_normalised(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "STATISTICS_CROPS", 256)
    assert run(tmp_path, "--steps", "2", "--name", "x") == 0
    ae = load_autoencoder(tmp_path / "x")
    config, _ = parse_vae([*TOY])
    crops = CropBatches(embedded_photographs()[0], resolution=32, batch=64, augmentation=config.augmentation, seed=123)
    z = ae.encode(crops[0].float() / 127.5 - 1).transpose(0, 1).flatten(1)
    assert z.mean(1).abs().mean() < 0.3 and (z.std(1) - 1).abs().mean() < 0.4
    raw = patchify(ae.posterior(crops[0].float() / 127.5 - 1).mean, 2).transpose(0, 1).flatten(1)
    assert (raw.std(1) - 1).abs().mean() > 0.4  # it was the statistics that did it
    assert not any(torch.equal(a, b) for a, b in [(ae.bn.running_var, torch.ones(128))])


def test_another_seed_is_another_run(tmp_path):
    run(tmp_path, "--steps", "3", "--name", "a", "--stop-after", "2")
    run(tmp_path, "--steps", "3", "--name", "b", "--seed", "1", "--stop-after", "2")
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert not torch.equal(
        a["model.safetensors"]["encoder.mid.block_1.conv1.weight"],
        b["model.safetensors"]["encoder.mid.block_1.conv1.weight"],
    )


def test_resume_of_nothing_starts_and_names_are_not_taken_twice(tmp_path, capsys):
    assert run(tmp_path, "--steps", "2", "--resume", "auto", "--name", "x", "--stop-after", "1") == 0
    assert run(tmp_path, "--steps", "1", "--name", "x") == 2
    assert "exists: choose another --name" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "2", "--stop-after", "1") == 0
    assert run(tmp_path, "--steps", "2", "--stop-after", "1") == 0
    assert f"run folder: {tmp_path / 'photos-2'}" in capsys.readouterr().out


def test_a_finished_run_resumes_to_its_report(tmp_path, capsys):
    assert run(tmp_path, "--steps", "2", "--name", "x") == 0
    first = capsys.readouterr().out.strip().splitlines()[-1]
    assert run(tmp_path, "--steps", "2", "--name", "x", "--resume", "auto") == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == first


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_interruption_saves_and_says_how_to_go_on(tmp_path, number, workers):
    """Sent to the whole process group, as a terminal sends Ctrl-C."""
    code = "import train.vae as v; v.FITTED_PIXELS = 65536; v.HELD_OUT_CROPS = v.STATISTICS_CROPS = 16\n"
    code += "raise SystemExit(v.main())"
    flags = ["--steps", "100000", "--name", "x", "--out", str(tmp_path), "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *TOY, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    log = tmp_path / "x" / "log.jsonl"
    deadline = time.monotonic() + 120
    while len(read_log(log)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, out
    assert "go on with --resume auto --name x" in out.strip().splitlines()[-1]
    saved = Checkpoints(tmp_path / "x" / "checkpoints", keep=9).steps()
    assert len(saved) == 1 and saved[0] >= 10
    assert load_autoencoder(tmp_path / "x").cfg.ch == 8


def test_own_pictures_with_class_folders(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "pictures" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 70, 3), dtype=np.uint8)).save(
            folder / f"{i}.{('jpg', 'png', 'webp')[i % 3]}"
        )
    assert run(tmp_path, "--data", str(tmp_path / "pictures"), "--steps", "2", "--name", "x") == 0
    assert "5 training pictures, 1 held out" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flags, message in (
        (["--out", str(tmp_path / "file")], "file"),
        (["--data", str(tmp_path / "missing")], "no such file or folder"),
        (["--device", "tpu"], "device: expected one this machine has"),
        (["--device", "meta", "--backend", "triton"], "--backend: backend 'triton' cannot run: there is no Triton for"),
    ):
        assert main([*TOY, "--steps", "1", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    damaged = tmp_path / "pictures"
    damaged.mkdir()
    for i in range(3):
        (damaged / f"{i}.jpg").write_bytes(b"\xff\xd8\xff damaged")
    assert run(tmp_path, "--data", str(damaged), "--steps", "1", "--name", "y") == 2
    assert re.search(r"pictures/\d\.jpg", capsys.readouterr().err)


def test_training_lowers_the_loss_from_random_weights(tmp_path):
    flags = [
        "--warm-start",
        "none",
        "--autoencoder.shortcut",
        "none",
        "--steps",
        "120",
        "--lr",
        "3e-3",
        "--align-weight",
        "0",
    ]
    assert run(tmp_path, *flags, "--name", "x") == 0
    losses = [r["l1"] for r in read_log(tmp_path / "x" / "log.jsonl") if "l1" in r]
    assert losses[-1] < 0.8 * losses[0]


def test_compile_without_a_compiler_runs_eager(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae, "cpp_compiler", lambda: None)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found"):
        assert run(tmp_path, "--compile", "--steps", "2", "--name", "x", "--stop-after", "1", "--device", "cpu") == 0
