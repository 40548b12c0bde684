"""Laws of the training timestep, the time shift, and the times a sampler visits.

Time t in [0, 1]: 0 is data, 1 is noise; z_t = (1 - t) x + t eps. The shift s(a, t) = a t / (1 + (a - 1) t) moves times
towards noise for a > 1; in logits it adds log a (Esser et al. 2024, arXiv:2403.03206, eq. 23). A latent of m times the
dimensions needs a = sqrt(m) to be as noisy at the same t; `shift_for` is that prediction from 16 channels a token, and
`AUTO_SHIFTS` what the FLUX.2 representation comparison found best by search.

    UniformLaw            t = s(a, u): the baseline that the others beat
    LogitNormal           logit t ~ N(mu + log a, sigma^2)
    PlateauLogitNormal    that density up to its mode, and from there flat to t = 1
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from kernels import sample_timesteps
from kernels.timesteps import Plateau, plateau

# Channels a token -> (training shift, sampling shift). FLUX.2 representation comparison, section 4 (bfl.ai/research);
# the sampling shift of 64 channels is not stated there.
AUTO_SHIFTS = {16: (1.0, 2.95), 64: (1.78, 2.95), 128: (4.63, 6.93), 768: (6.93, 6.93)}


def time_shift(t: Tensor, shift: float) -> Tensor:
    """s(a, t) = a t / (1 + (a - 1) t), of t's shape and dtype; time_shift(time_shift(t, a), 1 / a) is t.

    ValueError if shift is not positive.
    """
    _positive("shift", shift)
    return shift * t / (1 + (shift - 1) * t)


def shift_for(channels_per_token: int) -> float:
    """The predicted shift sqrt(channels / 16): noise of equal strength hides wider tokens less."""
    _positive("channels_per_token", channels_per_token)
    return math.sqrt(channels_per_token / 16)


def auto_shifts(channels_per_token: int) -> tuple[float, float]:
    """(training shift, sampling shift): `AUTO_SHIFTS`, between its widths log-interpolated, outside as at its ends."""
    _positive("channels_per_token", channels_per_token)
    widths = sorted(AUTO_SHIFTS)
    low = max((w for w in widths if w <= channels_per_token), default=widths[0])
    high = min((w for w in widths if w >= channels_per_token), default=widths[-1])
    part = 0.0 if low >= high else math.log(channels_per_token / low) / math.log(high / low)
    ends = zip(AUTO_SHIFTS[low], AUTO_SHIFTS[high], strict=True)
    train, sample = (a if a == b else a ** (1 - part) * b**part for a, b in ends)
    return train, sample


def check_shifts(train_shift: float, sample_shift: float) -> None:
    """Warns where sampling is shifted less than training: every autoencoder of the comparison wants it no less."""
    _positive("train_shift", train_shift)
    _positive("sample_shift", sample_shift)
    if sample_shift < train_shift:
        warnings.warn(
            f"the sampling shift {sample_shift:g} is below the training shift {train_shift:g}; at or above it samples "
            "are better for every autoencoder of the FLUX.2 representation comparison",
            stacklevel=2,
        )


def sampling_times(num_steps: int, shift: float = 1.0) -> Tensor:
    """fp64 [num_steps + 1], from 1 down to 0, both included: s(shift, 1 - i / num_steps)."""
    if num_steps < 1:
        raise ValueError(f"num_steps: expected 1 or more, got {num_steps}")
    return time_shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def flux1_mu(num_tokens: int) -> float:
    """mu of FLUX.1 for an image of that many tokens: a line through 0.5 at 256 and 1.15 at 4096; the shift is e^mu."""
    return 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)


def flux2_mu(num_tokens: int, num_steps: int) -> float:
    """Empirical mu of FLUX.2's sampler; the shift is e^mu (black-forest-labs/flux2, `compute_empirical_mu`).

    Lines in the number of tokens at 10 and at 200 steps, and between them a line in the number of steps; that of 200
    alone above 4300 tokens.
    """
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-5 * num_tokens + 1.89833333
    return at_10 + (at_200 - at_10) * (num_steps - 10) / 190


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


_warned_of_uniform = False


class Law:
    """What the laws share; each has log_prob, cdf and icdf of a tensor (fp64 in, fp64 out), and mean."""

    name: ClassVar[str]
    shift: float

    def sample(
        self, n: int, *, seed: int = 0, step: int = 0, first_index: int = 0, device: torch.device | str | None = None
    ) -> Tensor:
        """fp32 [n]: draw i is a function of (seed, step, first_index + i) alone (`kernels.sample_timesteps`)."""
        return sample_timesteps(
            n, law=self.name, shift=self.shift, mu=getattr(self, "mu", 0.0), sigma=getattr(self, "sigma", 1.0),
            seed=seed, step=step, first_index=first_index, device=device,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class UniformLaw(Law):
    """t = s(shift, u), u uniform on (0, 1). Density a / (a + (1 - a) t)^2, a = shift."""

    name: ClassVar[str] = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        global _warned_of_uniform
        _positive("shift", self.shift)
        if not _warned_of_uniform:
            _warned_of_uniform = True
            warnings.warn(
                "uniform timesteps are the baseline: LogitNormal or PlateauLogitNormal train better on every "
                "autoencoder of the FLUX.2 representation comparison",
                stacklevel=3,
            )

    def log_prob(self, t: Tensor) -> Tensor:
        """log density at t in [0, 1]; t's shape and dtype."""
        return math.log(self.shift) - 2 * torch.log(self.shift + (1 - self.shift) * t)

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""
        return time_shift(t, 1 / self.shift)

    def icdf(self, u: Tensor) -> Tensor:
        """Inverse of `cdf`."""
        return time_shift(u, self.shift)

    @cached_property
    def mean(self) -> float:
        a = self.shift
        if abs(a - 1) < 1e-4:  # the two terms below cancel; series about 1
            return 0.5 + (a - 1) / 6 - (a - 1) ** 2 / 12
        return a / (a - 1) - a * math.log(a) / (a - 1) ** 2


@dataclass(frozen=True, kw_only=True)
class LogitNormal(Law):
    """logit t ~ N(m, sigma^2), m = mu + log shift: shifting t by a is adding log a to mu."""

    name: ClassVar[str] = "logit_normal"
    shift: float = 1.0
    mu: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        _positive("shift", self.shift)
        _positive("sigma", self.sigma)

    @property
    def location(self) -> float:
        """Mean of logit t."""
        return self.mu + math.log(self.shift)

    def _z(self, t: Tensor) -> Tensor:
        return (torch.logit(t) - self.location) / self.sigma

    def log_prob(self, t: Tensor) -> Tensor:
        """log density at t in (0, 1); t's shape and dtype."""
        z = self._z(t)
        return -0.5 * z * z - torch.log(t) - torch.log1p(-t) - math.log(self.sigma * math.sqrt(2 * math.pi))

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""
        return torch.special.ndtr(self._z(t))

    def icdf(self, u: Tensor) -> Tensor:
        """Inverse of `cdf`."""
        return torch.sigmoid(self.location + self.sigma * torch.special.ndtri(u))

    @cached_property
    def mean(self) -> float:
        return self._mean_below(math.inf)

    def _mean_below(self, end: float) -> float:
        """Integral of t over the part of the law whose z is below `end`, by Gauss-Legendre; to 1e-12 for sigma <= 4."""
        import numpy as np

        nodes, weights = np.polynomial.legendre.leggauss(400)
        low, high = -12.0, min(end, 12.0)
        z = torch.from_numpy((high - low) / 2 * nodes + (high + low) / 2)
        t = torch.sigmoid(self.location + self.sigma * z)
        return float((t * _normal_density(z) * torch.from_numpy(weights)).sum() * (high - low) / 2)


@dataclass(frozen=True, kw_only=True)
class PlateauLogitNormal(LogitNormal):
    """The density of `LogitNormal` up to its mode t*, from there flat to t = 1, normalised.

    p(t) = p_ln(min(t, t*)) / Z with Z = P_ln(t*) + (1 - t*) p_ln(t*): the plotting code of the FLUX.2 representation
    comparison, there for sigma = 1. The knee is the mode of the shifted law, not its median: shift first, then the
    plateau. Where sigma >= sqrt 2 lets the density have two modes, the higher one is meant.
    """

    name: ClassVar[str] = "plateau_logit_normal"

    @cached_property
    def _plateau(self) -> Plateau:
        return plateau(self.location, self.sigma)

    @property
    def mode(self) -> float:
        """t*."""
        return self._plateau.knee

    @property
    def normaliser(self) -> float:
        """Z."""
        return self._plateau.normaliser

    def log_prob(self, t: Tensor) -> Tensor:
        """log density at t in (0, 1]; t's shape and dtype."""
        return super().log_prob(t.clamp(max=self.mode)) - math.log(self.normaliser)

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""
        below = super().cdf(t.clamp(max=self.mode))
        return (below + (t - self.mode).clamp(min=0) * self._plateau.density) / self.normaliser

    def icdf(self, u: Tensor) -> Tensor:
        """Inverse of `cdf`."""
        w, mass = u * self.normaliser, self._plateau.mass
        flat = self.mode + (w - mass) / self._plateau.density
        return torch.where(w < mass, super().icdf(w.clamp(max=mass)), flat)

    @cached_property
    def mean(self) -> float:
        flat = self._plateau.density * (1 - self.mode**2) / 2
        return (self._mean_below(self._plateau.z) + flat) / self.normaliser
