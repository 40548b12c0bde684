"""`python -m flux2`: what each command writes, and one line for each thing that can be wrong."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flux2 import RAE, AutoEncoder, AutoencoderConfig, banded, load_autoencoder, save_autoencoder
from flux2.__main__ import main
from flux2.images import load_image, to_array, to_pixels, to_uint8
from flux2.tensor_files import load_tensors, save_tensors

TINY = AutoencoderConfig(
    z_channels=4, ch=32, decoder_ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, latent_norm="batchnorm"
)


@pytest.fixture
def weights(tmp_path):
    ae = AutoEncoder(TINY)
    ae.bn.running_mean.normal_()
    save_autoencoder(ae, tmp_path / "ae.safetensors")
    return tmp_path / "ae.safetensors"


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a.png": (32, 48), "sub/a.png": (17, 33), "sub/b.png": (5, 60)}
    for name, size in sizes.items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def test_reconstruct_writes_sheets_and_metrics(weights, pictures, tmp_path, capsys):
    (pictures / "bad.jpg").write_text("not a picture")
    out = tmp_path / "out"
    code = main(
        ["reconstruct", str(pictures), str(pictures / "sub" / "a.png"), str(pictures / "a.png")]
        + ["--weights", str(weights), "--out", str(out)]
    )
    printed = capsys.readouterr()
    assert code == 1 and "bad.jpg: not a picture" in printed.err and "1 of 6 files" in printed.err
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
    assert written == ["a-2.png", "a-3.png", "a.png", "sub/a.png", "sub/b.png"]
    sheet = load_image(out / "sub" / "a.png")
    original = load_image(pictures / "sub" / "a.png")
    assert sheet.shape == (17, 3 * 33 + 4, 3) and np.array_equal(sheet[:, :33], original)
    ours = to_array(to_uint8(load_autoencoder(weights).reconstruct(to_pixels(original)[None]))[0])
    assert np.array_equal(sheet[:, 35:68], ours)
    assert np.array_equal(sheet[:, 70:], np.clip(5 * np.abs(original.astype(int) - ours), 0, 255))
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert len(rows) == 5 and f"PSNR {float(rows[0]['psnr_db']):.2f} dB" in printed.out
    mean = np.mean([float(r["psnr_db"]) for r in rows])
    assert f"mean of 5  PSNR {mean:.2f} dB" in printed.out


def test_encode_then_decode_is_reconstruct(weights, pictures, tmp_path):
    assert main(["encode", str(pictures), "--weights", str(weights), "--out", str(tmp_path / "z")]) == 0
    tensors, metadata = load_tensors(tmp_path / "z" / "sub" / "a.safetensors")
    assert tensors["latents"].shape == (16, 2, 3) and (metadata["height"], metadata["width"]) == ("17", "33")
    assert main(["decode", str(tmp_path / "z"), "--weights", str(weights), "--out", str(tmp_path / "x")]) == 0
    ae = load_autoencoder(weights)
    for name in ("a.png", "sub/a.png", "sub/b.png"):
        expected = to_uint8(ae.reconstruct(to_pixels(load_image(pictures / name))[None]))[0]
        assert np.array_equal(load_image(tmp_path / "x" / name), to_array(expected))


def test_low_memory_writes_the_same_pictures(weights, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(banded, "CPU_BAND", 2**10)
    used = []
    run = banded.run
    monkeypatch.setattr(banded, "run", lambda network, x: used.append(type(network).__name__) or run(network, x))
    for memory in ("normal", "low"):
        out = tmp_path / memory
        use = ["--weights", str(weights), "--memory", memory, "--out"]
        assert main(["reconstruct", str(pictures), *use, str(out / "r")]) == 0
        assert used == (["Encoder", "Decoder"] * 3 if memory == "low" else [])
        used.clear()
        assert main(["encode", str(pictures), *use, str(out / "z")]) == 0
        assert main(["decode", str(out / "z"), *use, str(out / "x")]) == 0
        assert used == (["Encoder"] * 3 + ["Decoder"] * 3 if memory == "low" else [])
        used.clear()
    for path in (tmp_path / "low").rglob("*.png"):
        normal = load_image(tmp_path / "normal" / path.relative_to(tmp_path / "low")).astype(int)
        assert abs(load_image(path) - normal).max() <= (
            5 if "r" in path.parts else 1
        )  # the sheet shows the error times five


def test_low_memory_is_not_for_an_rae(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flux2.__main__.load_autoencoder", lambda *a, **k: RAE.__new__(RAE))
    assert main(["reconstruct", str(tmp_path), "--weights", str(tmp_path), "--memory", "low"]) == 2
    assert "--memory low: expected a convolutional autoencoder, got an RAE" in capsys.readouterr().err


def test_convert_both_ways(weights, tmp_path, capsys):
    assert main(["convert", str(weights), str(tmp_path / "vae"), "--layout", "diffusers"]) == 0
    assert (tmp_path / "vae" / "config.json").is_file()
    assert main(["convert", str(tmp_path / "vae"), str(tmp_path / "b.safetensors"), "--layout", "bfl"]) == 0
    a, b = (load_tensors(p)[0] for p in (weights, tmp_path / "b.safetensors"))
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    assert "wrote" in capsys.readouterr().out


def test_info(weights, capsys):
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    assert "flux.2-small-decoder" in table and "84,046,115" in table and "128 x 16x16" in table
    assert main(["info", "flux.1"]) == 0
    assert "0.3611" in capsys.readouterr().out
    assert main(["info", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "latent statistics     fitted" in out and "16 channels for 16x16 pixels" in out


def test_one_line_for_each_error(weights, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save_tensors(tmp_path / "z" / "a.safetensors", {"latents": torch.zeros(4, 2, 2)})
    use = ["--weights", str(weights)]
    for argv, code, message in (
        (["reconstruct", str(tmp_path / "none"), *use], 2, "no such file or folder of pictures"),
        (["reconstruct", *use], 2, "expected at least one file or folder, got none"),
        (
            ["reconstruct", str(pictures), "--weights", str(tmp_path / "none")],
            2,
            "expected a .safetensors file, a diff",
        ),
        (["reconstruct", str(pictures), *use, "--out", str(tmp_path / "file" / "x")], 2, "file"),
        (["reconstruct", str(pictures), *use, "--device", "cuda:7"], 2, "--device cuda:7"),
        (
            ["decode", str(tmp_path / "z"), *use, "--out", str(tmp_path / "x")],
            1,
            "expected latents [16, h, w], got latents [4",
        ),
        (["decode", str(weights), *use, "--out", str(tmp_path / "x")], 1, "got tensors bn."),
        (["decode", str(pictures), *use], 2, "expected .safetensors files in this folder"),
        (["info", str(tmp_path / "file")], 2, "got an empty file"),
    ):
        assert main(argv) == code, argv
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert code == 1 or (error.startswith("error: ") and error.count("\n") == 1)


def test_as_a_program():
    out = subprocess.run([sys.executable, "-m", "flux2", "info", "sd"], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and "83,653,863" in out.stdout
    out = subprocess.run(
        [sys.executable, "-m", "flux2", "reconstruct", "--help"], capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0 and "python -m flux2 reconstruct a.jpg" in out.stdout
