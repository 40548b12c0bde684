"""Probes on latents whose answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flux2.equivariance import Transform
from flux2.probes import (
    covariance_eigenvalues,
    effective_rank,
    equivariance_error,
    linear_probe_r2,
    radial_spectrum,
    spectrum_slope,
)


def test_probe_finds_what_is_linear_and_nothing_else():
    z, z_test = torch.randn(64, 6, 4, 4), torch.randn(32, 6, 4, 4)
    weight = torch.randn(5, 6)

    def features(x, noise):
        return torch.einsum("dc,nchw->ndhw", weight, x) + 3.0 + noise * torch.randn(len(x), 5, 4, 4)

    assert linear_probe_r2(z, features(z, 0), z_test, features(z_test, 0)) == pytest.approx(1, abs=1e-4)
    noise = weight.square().sum().div(5).sqrt().item()  # as much noise as signal
    assert linear_probe_r2(z, features(z, noise), z_test, features(z_test, noise)) == pytest.approx(0.5, abs=0.06)
    assert linear_probe_r2(z, torch.randn(64, 5, 4, 4), z_test, torch.randn(32, 5, 4, 4)) == pytest.approx(0, abs=0.05)


def test_probe_equals_numpy_least_squares():
    z, f = torch.randn(50, 3, 2, 2, dtype=torch.float64) * 4 + 1, torch.randn(50, 2, 2, 2, dtype=torch.float64)
    f[:, 0] += z[:, 1].tanh()
    got = linear_probe_r2(z[:40], f[:40], z[40:], f[40:])
    x, y = (v.permute(0, 2, 3, 1).reshape(-1, v.shape[1]).numpy() for v in (z, f))
    design = np.c_[x, np.ones(len(x))]
    weight = np.linalg.lstsq(design[:160], y[:160], rcond=None)[0]
    residual = ((y[160:] - design[160:] @ weight) ** 2).sum()
    assert got == pytest.approx(1 - residual / ((y[160:] - y[:160].mean(0)) ** 2).sum(), abs=1e-4)


def test_probe_refuses_other_grids():
    with pytest.raises(ValueError, match=r"one grid, got \[2, 3, 4, 4\] and \[2, 5, 4, 2\]"):
        linear_probe_r2(*[torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 2)] * 2)


@pytest.mark.parametrize("slope", [0.0, -1.0, -2.5])
def test_slope_of_noise_with_a_known_spectrum(slope):
    side = 64
    cycles = np.fft.fftfreq(side) * side
    radius = np.hypot(cycles, cycles[:, None])
    radius[0, 0] = 1
    rng = np.random.default_rng(0)
    white = np.fft.fft2(rng.standard_normal((16, 4, side, side)))
    z = torch.from_numpy(np.fft.ifft2(white * radius ** (slope / 2)).real)
    assert spectrum_slope(z) == pytest.approx(slope, abs=0.15)
    assert spectrum_slope(5 * z + 3) == pytest.approx(spectrum_slope(z), abs=1e-6)


def test_a_wave_shows_in_its_ring():
    columns = torch.arange(32.0)
    wave = torch.sin(2 * torch.pi * 6 * columns / 32).expand(1, 1, 32, 32)
    frequency, power = radial_spectrum(wave)
    assert frequency[power.argmax()].item() == pytest.approx(6 / 32)
    with pytest.raises(ValueError, match=r"square maps of at least 8 x 8, got \[1, 1, 4, 4\]"):
        spectrum_slope(torch.zeros(1, 1, 4, 4))


def latent_of(covariance_root, num=4000):
    """[num, C, 2, 2] whose covariance over positions is exactly root root^T"""
    x = np.random.default_rng(0).standard_normal((4 * num, len(covariance_root)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T)).T) @ covariance_root.T
    return torch.from_numpy(x).reshape(num, 2, 2, -1).permute(0, 3, 1, 2)


def test_effective_rank_of_known_spectra():
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    assert effective_rank(latent_of(turn)) == pytest.approx(6, rel=1e-9)  # white, in any basis
    alive = latent_of(turn @ np.diag([1, 1, 1, 0, 0, 0]))
    assert effective_rank(alive) == pytest.approx(3, rel=1e-9)
    assert effective_rank(5 * alive + 2) == pytest.approx(3, rel=1e-9)
    shares = np.array([8, 4, 2, 1, 0.5, 0.5]) / 16
    halves = latent_of(turn @ np.diag(np.sqrt(16 * shares)))
    torch.testing.assert_close(covariance_eigenvalues(halves), torch.from_numpy(16 * shares), rtol=1e-9, atol=1e-9)
    assert effective_rank(halves) == pytest.approx(2 ** -(shares * np.log2(shares)).sum(), rel=1e-9)  # 2^(31/16)
    assert effective_rank(halves) == pytest.approx(2 ** (31 / 16), rel=1e-9)


def test_effective_rank_of_what_has_no_variance():
    assert np.isnan(effective_rank(torch.ones(2, 3, 4, 4)))
    assert effective_rank(torch.randn(3, 1, 2, 2)) == 1
    with pytest.raises(ValueError, match=r"at least two positions, got \[1, 3, 1, 1\]"):
        effective_rank(torch.zeros(1, 3, 1, 1))


TRANSFORMS = [Transform(turns=1), Transform(turns=2), Transform(scale=0.5), Transform(scale=0.5, turns=3)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_latent_of_averages_moves_as_its_picture_does(transform):
    def encode(x):  # channel by channel another scale and offset: of no consequence
        return F.avg_pool2d(x, 4) * torch.tensor([1.0, 20.0, 0.1]).view(3, 1, 1) + 7

    x = F.interpolate(torch.randn(4, 3, 4, 4), size=(64, 64), mode="bicubic")  # smooth
    assert equivariance_error(encode, x, transform, 4) < (
        1e-4 if transform.scale == 1 else 0.1
    )  # at the border it does not


def test_a_latent_that_knows_nothing_of_turns_is_sqrt_two_off():
    generator = torch.Generator().manual_seed(0)

    def encode(x):
        return torch.randn(len(x), 8, 16, 16, generator=generator)

    x = torch.randn(64, 3, 64, 64)
    assert equivariance_error(encode, x, Transform(turns=1), 4) == pytest.approx(2**0.5, abs=0.01)
    fixed = torch.linspace(-1, 1, 16).view(1, 1, 1, 16).expand(4, 2, 16, 16)  # a ramp that stays where it is
    error = equivariance_error(lambda x: fixed[: len(x)], x[:4], Transform(turns=2), 4)
    assert error == pytest.approx(2.0, abs=1e-5)  # against its mirror image: twice itself off everywhere


def test_channels_without_variance_are_passed_over():
    def encode(x):
        return torch.cat((F.avg_pool2d(x, 4), torch.full((len(x), 1, x.shape[2] // 4, x.shape[3] // 4), 3.0)), 1)

    assert equivariance_error(encode, torch.randn(2, 3, 32, 32), Transform(turns=1), 4) < 1e-5
    assert np.isnan(equivariance_error(lambda x: torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 32, 32), Transform(), 4))


def test_an_encoder_of_another_factor_is_refused():
    with pytest.raises(ValueError, match=r"expected latents \[1, 3, 4, 4\], got \[1, 3, 2, 2\]"):
        equivariance_error(lambda x: F.avg_pool2d(x, 4), torch.randn(1, 3, 32, 32), Transform(scale=0.5), 2)
