"""The velocity loss of flow matching: for each sample, for each bin of the timestep, and normalised.

v = eps - x is the target at z_t = (1 - t) x + t eps (`flux2.samplers` has the convention). The mean squared error says
how training goes; it is not comparable between latents or bins, for each has its own size of v. The normalised loss of
a bin is the share of v's variance that the model leaves unexplained:

    sum |v - prediction|^2 / sum |v - mean v|^2        0: perfect, 1: no better than the mean

with the mean of each channel over the bin's samples and positions. Its plain mean over the bins compares training laws,
whatever law they drew t from.
"""

from __future__ import annotations

import torch
from torch import Tensor


def velocity_mse(pred: Tensor, v: Tensor) -> Tensor:
    """Mean squared error of each sample, fp32 [N]; pred, v of one shape [N, ...]. Differentiable in both.

    ValueError if the shapes differ.
    """
    _same_shape("velocity_mse", pred, v)
    return (pred.float() - v.float()).square().flatten(1).mean(1)


def time_bin(t: Tensor, bins: int) -> Tensor:
    """int64, t's shape: the index of the equal part of [0, 1] that t lies in; t = 1 is of the last one."""
    return (t.double() * bins).long().clamp(0, bins - 1)


def by_time_bin(values: Tensor, t: Tensor, bins: int = 10) -> tuple[Tensor, Tensor]:
    """(mean of `values` in each bin of t, fp64 [bins], nan where there are none; their number, int64 [bins]).

    values, t: [N]. Detached. ValueError if the shapes are not [N] and equal.
    """
    if values.ndim != 1 or values.shape != t.shape:
        raise ValueError(f"by_time_bin: expected [N] twice, got {list(values.shape)} and {list(t.shape)}")
    index = time_bin(t, bins)
    sums = torch.zeros(bins, dtype=torch.float64, device=values.device).index_add_(0, index, values.detach().double())
    count = torch.bincount(index, minlength=bins)
    return sums / count, count


class NormalisedVelocityLoss:
    """Sums of the normalised velocity loss over batches: `add` each, then `per_bin` and `mean`."""

    def __init__(self, bins: int = 10) -> None:
        self.bins = bins
        self.count = torch.zeros(bins, dtype=torch.int64)  # samples
        self.error = torch.zeros(bins, dtype=torch.float64)
        self.moments: Tensor | None = None  # fp64 [3, bins, C]: number, sum and sum of squares of v's elements

    def add(self, pred: Tensor, v: Tensor, t: Tensor) -> None:
        """Takes in predictions and targets [N, C, *S] at times t [N], on any device. ValueError on other shapes."""
        _same_shape("NormalisedVelocityLoss", pred, v)
        if t.shape != v.shape[:1] or v.ndim < 2:
            raise ValueError(f"NormalisedVelocityLoss: expected v [N, C, *S], t [N], got {v.shape} and {t.shape}")
        pred, v, index = (x.detach().cpu() for x in (pred.double(), v.double(), time_bin(t, self.bins)))
        elements = v.flatten(2) if v.ndim > 2 else v.unsqueeze(2)  # [N, C, S]
        size = torch.full(elements.shape[:2], elements.shape[2], dtype=torch.float64)
        if self.moments is None:
            self.moments = torch.zeros(3, self.bins, v.shape[1], dtype=torch.float64)
        self.moments.index_add_(1, index, torch.stack((size, elements.sum(2), elements.square().sum(2))))
        self.error.index_add_(0, index, (pred - v).square().flatten(1).sum(1))
        self.count += torch.bincount(index, minlength=self.bins)

    def per_bin(self) -> Tensor:
        """fp64 [bins]; nan where there are no samples."""
        if self.moments is None:
            return torch.full((self.bins,), float("nan"), dtype=torch.float64)
        number, total, squares = self.moments
        return self.error / (squares - total.square() / number).sum(1)

    def mean(self) -> float:
        """Plain mean over the bins. ValueError if a bin has no samples."""
        if (self.count == 0).any():
            raise ValueError(f"NormalisedVelocityLoss: bins without samples, counts are {self.count.tolist()}")
        return self.per_bin().mean().item()


def _same_shape(name: str, pred: Tensor, v: Tensor) -> None:
    if pred.shape != v.shape:
        raise ValueError(f"{name}: shapes must be equal, got {list(pred.shape)} and {list(v.shape)}")
