"""Probes on latents whose answer is known."""

import numpy as np
import pytest
import torch

from flux2.probes import linear_probe_r2, radial_spectrum, spectrum_slope


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
