"""What a latent holds for the model that is trained on it: teacher features, spectrum, rank, how it moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flux2.equivariance import Transform

RIDGE = 1e-3  # of standardised inputs, times the number of positions


def _rows(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [N h w, C], fp64"""
    return x.permute(0, 2, 3, 1).flatten(0, 2).double()


def linear_probe_r2(z: Tensor, features: Tensor, z_test: Tensor, features_test: Tensor) -> float:
    """Share of the test features' variance that a linear map of one latent position explains: R^2, at most 1.

    z [N, C, h, w] and features [N, D, h, w] fit the map, by ridge regression in closed form on standardised latents;
    z_test, features_test judge it. Sums of squares are over all D features together; the total is about the mean of the
    fitting features. ValueError if grids differ.
    """
    for a, b in ((z, features), (z_test, features_test)):
        if a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:]:
            raise ValueError(
                f"linear probe: latents and features need one grid, got {list(a.shape)} and {list(b.shape)}"
            )
    x, y, x_test, y_test = _rows(z), _rows(features), _rows(z_test), _rows(features_test)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-12)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    centre = y.mean(0)
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (y - centre))
    residual = (y_test - centre - x_test @ weight).square().sum()
    return float(1 - residual / (y_test - centre).square().sum())


def radial_spectrum(z: Tensor) -> tuple[Tensor, Tensor]:
    """(frequencies in cycles a sample, power) of [N, C, s, s], each fp64 [s / 2]: rings 1 to s / 2 of the mean power.

    Each map's mean is taken off and a Hann window put on, which keeps its border from reading as high frequencies.
    Channels count by their variance. ValueError unless the sides are equal and at least 8.
    """
    side = z.shape[-1]
    if z.ndim != 4 or z.shape[2] != side or side < 8:
        raise ValueError(f"spectrum: expected square maps of at least 8 x 8, got {list(z.shape)}")
    z = z.double()
    window = torch.hann_window(side, periodic=False, dtype=z.dtype, device=z.device)
    z = (z - z.mean((2, 3), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(z).abs().square().mean((0, 1))  # [s, s]
    cycles = torch.fft.fftfreq(side, dtype=z.dtype, device=z.device) * side
    radius = torch.sqrt(cycles.square() + cycles.square()[:, None]).round().long().flatten()
    rings = torch.zeros(int(radius.max()) + 1, dtype=z.dtype, device=z.device)
    mean = rings.index_add(0, radius, power.flatten()) / torch.bincount(radius)
    k = torch.arange(1, side // 2 + 1, device=z.device)
    return k / side, mean[k]


def spectrum_slope(z: Tensor) -> float:
    """Slope of log power over log frequency of [N, C, s, s]: 0 is white, -2 to -3 what photographs have.

    Flatter means more of the latent's variance at the finest scale, which a flow model learns last.
    """
    frequency, power = radial_spectrum(z)
    x, y = frequency.log(), power.clamp(min=1e-300).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def covariance_eigenvalues(z: Tensor) -> Tensor:
    """Eigenvalues of the covariance of a position's channels, over all positions of [N, C, h, w]: fp64 [C], falling.

    ValueError for fewer than two positions.
    """
    if z.ndim != 4 or z.numel() < 2 * z.shape[1]:
        raise ValueError(f"covariance: expected [N, C, h, w] with at least two positions, got {list(z.shape)}")
    return torch.linalg.eigvalsh(torch.atleast_2d(torch.cov(_rows(z).T))).flip(0).clamp(min=0)


def effective_rank(z: Tensor) -> float:
    """How many directions of a position's channels carry variance: e^H, H the entropy of the eigenvalues' shares.

    [N, C, h, w] -> between 1 and C (Roy & Vetterli 2007); C if all directions have the same variance. It depends on how
    channels are scaled: latents are compared normalised. nan where there is no variance at all.
    """
    values = covariance_eigenvalues(z)
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def equivariance_error(encode: Callable[[Tensor], Tensor], x: Tensor, transform: Transform, factor: int) -> float:
    """How far encode(T x) is from T encode(x), as a root mean square in standard deviations of encode(T x).

    encode: pixels [N, 3, H, W] to spatial latents [N, C, H/factor, W/factor], not patchified: a turn would not move the
    positions inside a patch. T turns and scales both alike. Each channel counts by its own standard deviation, so that
    no normalisation of channels changes the figure: 0 is a latent that moves as its picture does, sqrt(2) one that does
    not know of it. Channels without variance are passed over; nan if that is all.
    """
    z = encode(x)
    sides = transform.sides(*z.shape[2:])
    moved = encode(transform(x, (factor * sides[0], factor * sides[1])))
    expected = transform(z, sides)
    if moved.shape != expected.shape:
        raise ValueError(f"equivariance: expected latents {list(expected.shape)}, got {list(moved.shape)}")
    a, b = _rows(moved), _rows(expected)
    variance = a.var(0, correction=0)
    alive = variance > 1e-12 * variance.max()
    return float(((a - b).square().mean(0) / variance)[alive].mean().sqrt())
