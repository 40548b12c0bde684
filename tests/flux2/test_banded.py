"""memory="low": the same function as the whole network, of every shape, and the memory that it promises."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import assert_no_worse

from flux2 import AUTOENCODERS, AutoEncoder, banded

ROOT = Path(__file__).parents[2]
TINY = dataclasses.replace(AUTOENCODERS["flux.2"], ch=8, decoder_ch=8, num_groups=2)


@pytest.fixture
def small_bands(monkeypatch):
    """Bands of a few rows at sides of a hundred pixels"""
    monkeypatch.setattr(banded, "CPU_BAND", 2**13)


def made(cfg, **kwargs):
    """Weights whose norms and biases do something; statistics of a latent that is not normal"""
    torch.manual_seed(0)
    ae = AutoEncoder(cfg, **kwargs).eval().requires_grad_(False)
    for p in ae.parameters():
        p.add_(0.1 * torch.randn_like(p))
    if cfg.latent_norm == "batchnorm":
        ae.bn.running_var.uniform_(0.5, 2)
    return ae


def narrow(name, shortcut="none"):
    row = AUTOENCODERS[name]
    return dataclasses.replace(
        row, ch=row.ch // 16, decoder_ch=row.decoder_ch // 16, num_groups=2, shortcut=shortcut, shortcut_width=8
    )


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize(
    ("name", "shortcut"),
    [("sd", "none"), ("flux.1", "none"), ("flux.2", "none"), ("flux.2", "patch"), ("flux.2-small-decoder", "none")]
    + [("va-vae", "none"), ("va-vae", "patch")],
)
def test_bands_are_the_whole_network(name, shortcut):
    ae = made(narrow(name, shortcut))
    m = ae.cfg.multiple
    x = torch.rand(1, 3, 6 * m, 5 * m) * 2 - 1
    z = ae.encode(x)
    moments, pixels = [[f(a, k) for k in ("normal", "low")] for f, a in ((ae.encode_moments, x), (ae.decode, z))]
    ae.double()
    for (base, got), truth in ((moments, ae.encode_moments(x.double())), (pixels, ae.decode(z.double()))):
        assert not torch.equal(got, base)  # else nothing was done in bands
        assert_no_worse(got, base, truth)
    x, z = x.double(), z.double()
    torch.testing.assert_close(ae.encode(x, "low"), ae.encode(x), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(ae.decode(z, "low"), ae.decode(z), rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_more_often(dtype):
    ae = made(TINY)
    z = torch.randn(1, 128, 6, 5)
    truth = ae.to(dtype).double().decode(z.to(dtype).double())  # of the rounded weights
    ae.to(dtype)
    got, base = (ae.decode(z.to(dtype), memory) for memory in ("low", "normal"))
    assert got.dtype == dtype
    assert_no_worse(got, base, truth)


@pytest.mark.usefixtures("small_bands")
def test_autocast_means_what_it_does_without_bands():
    ae = made(TINY)
    x, z = torch.rand(1, 3, 96, 80) * 2 - 1, torch.randn(1, 128, 6, 5)
    truths = ae.double().encode_moments(x.double()), ae.decode(z.double())
    ae.float()
    with torch.autocast("cpu", torch.bfloat16):
        base, got = ((ae.encode_moments(x, m), ae.decode(z, m)) for m in ("normal", "low"))
    for g, b, t in zip(got, base, truths, strict=True):
        assert_no_worse(g, b, t)


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 2)])
def test_narrow_and_low_pictures(size):
    ae = made(TINY).double()
    z = torch.randn(1, 128, *size, dtype=torch.float64)
    x = torch.rand(1, 3, 16 * size[0], 16 * size[1], dtype=torch.float64)
    torch.testing.assert_close(ae.decode(z, "low"), ae.decode(z))
    torch.testing.assert_close(ae.encode(x, "low"), ae.encode(x))


@pytest.mark.parametrize("band", [1, 2**12, 2**24])
def test_any_band_gives_the_same_picture(band, monkeypatch):
    """From the fewest rows to all at once"""
    ae = made(TINY).double()
    z = torch.randn(1, 128, 5, 3, dtype=torch.float64)
    monkeypatch.setattr(banded, "CPU_BAND", band)
    torch.testing.assert_close(ae.decode(z, "low"), ae.decode(z), rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("small_bands")
def test_pictures_of_a_batch_do_not_meet_and_nothing_given_is_written():
    ae = made(TINY)
    x, z = torch.rand(3, 3, 48, 64) * 2 - 1, torch.randn(3, 128, 3, 4)
    given = x.clone(), z.clone()
    moments, pixels = ae.encode_moments(x, "low"), ae.decode(z, "low")
    assert torch.equal(x, given[0]) and torch.equal(z, given[1])
    for i in range(3):
        assert torch.equal(moments[i], ae.encode_moments(x[i : i + 1], "low")[0])
        assert torch.equal(pixels[i], ae.decode(z[i : i + 1], "low")[0])
    assert torch.equal(ae.reconstruct(x, "low"), ae.decode(ae.encode(x, "low"), "low").clamp(-1, 1))


@pytest.mark.usefixtures("small_bands")
def test_other_formats_and_backends():
    z = torch.randn(1, 128, 2, 3, dtype=torch.float64)
    ae = made(TINY).double()
    expected = ae.decode(z)
    torch.testing.assert_close(ae.set_backend("torch").decode(z, "low"), expected)
    ae.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(ae.decode(z, "low"), expected)


def test_triton_norms_take_the_statistics(monkeypatch):
    monkeypatch.setattr(banded, "CPU_BAND", 2**14)
    cfg = dataclasses.replace(TINY, ch_mult=(1, 2), num_res_blocks=1)
    z = torch.randn(1, 128, 2, 2)
    ours, truth = made(cfg, backend="triton"), made(cfg).double().decode(z.double())
    assert_no_worse(ours.decode(z, "low"), ours.set_backend("torch").decode(z), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments_of_bands_are_those_of_the_whole(dtype, monkeypatch):
    """Far from zero, where the difference of two squares has no digit left"""
    monkeypatch.setattr(banded, "CPU_BAND", 2**8)
    x = (3000 + torch.randn(1, 12, 37, 9)).to(dtype).contiguous(memory_format=torch.channels_last)
    moments = banded.Moments()
    for rows in x.split([5, 1, 13, 18], 2):
        moments.add(rows)
    stats = moments.stats(4, dtype)
    assert stats.dtype == torch.promote_types(dtype, torch.float32)
    values = x.double().reshape(4, -1)
    expected = torch.stack((values.mean(1), values.var(1, correction=0)), -1)[None]
    torch.testing.assert_close(stats.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "maps"), [("flux.2", 1.5), ("sd", 1.5), ("va-vae", 1.25)])
def test_maps_that_are_held(name, maps):
    """In units of the decoder's last feature map, and the encoder's first one"""
    side = 1024
    with torch.device("meta"):
        ae = AutoEncoder(AUTOENCODERS[name])
    unit = ae.cfg.ch * side**2
    raw = side // ae.cfg.downsample
    assert banded.most_elements(ae.decoder, raw, raw)[0] == maps * unit
    assert banded.most_elements(ae.encoder, side, side)[0] == 1.25 * unit


def test_resident_memory_stays_within_the_bound(tmp_path):
    """1024 x 1024 at an eighth of FLUX.2's width: a map is 64 MiB in fp32, and the plain decoder holds several"""
    command = [sys.executable, str(ROOT / "benchmarks" / "high_resolution.py"), "--model", "narrow", "--way", "low"]
    command += ["--side", "1024", "--dtype", "fp32", "--threads", "1", "--picture", str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with torch.device("meta"):
        decoder = AutoEncoder(dataclasses.replace(AUTOENCODERS["flux.2"], decoder_ch=16, num_groups=16)).decoder
    bound = banded.most_bytes(decoder, 128, 128, torch.float32, torch.device("cpu"))
    assert 64 * 2**20 < json.loads(done.stdout)["peak_bytes"] <= bound < 3 * 64 * 2**20


def test_low_memory_is_for_inference():
    ae = AutoEncoder(TINY)
    x, z = torch.zeros(1, 3, 16, 16), torch.zeros(1, 128, 1, 1)
    for call in (ae.decode, ae.encode):
        with pytest.raises(ValueError, match=r"for inference: expected torch.no_grad\(\) around it"):
            call(z if call == ae.decode else x, memory="low")
    ae.requires_grad_(False)
    with pytest.raises(ValueError, match="for inference"):
        ae.decode(z.requires_grad_(), memory="low")
    with pytest.raises(ValueError, match="memory: expected normal or low, got 'lower'"):
        ae.decode(z, memory="lower")
    with pytest.raises(ValueError, match="multiples of 16, got 24x32"):
        ae.encode(torch.zeros(1, 3, 24, 32), memory="low")
