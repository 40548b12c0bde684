"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """Keeps `model`, a frozen copy of the averaged weights: average <- decay * average + (1 - decay) * weights.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short run is not held back by its start.
    Buffers are copied.
    """

    def __init__(self, model: Model, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights of `model` after its update number `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
