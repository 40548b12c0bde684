"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Container
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
        self._of: dict[Tensor, Tensor] = dict(zip(model.parameters(), self.model.parameters(), strict=True))

    def of(self, parameter: Tensor) -> Tensor | None:
        """The average of a parameter of the model that this was made from; None for any other."""
        return self._of.get(parameter)

    def weight(self, step: int) -> float:
        """What the model's weights count in update number `step`: 1 - decay."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, but: Container[Tensor] = ()) -> None:
        """Takes in the weights of `model` after its update number `step` (counted from 0).

        but: parameters whose averages (`of`) are up to date, for the optimiser's pass over memory took them along.
        """
        pairs = [
            (e, p)
            for e, p in zip(self.model.parameters(), model.parameters(), strict=True)
            if p not in but or self.of(p) is not e
        ]
        if pairs:
            averages, weights = (list(column) for column in zip(*pairs, strict=True))
            torch._foreach_lerp_(averages, weights, self.weight(step))  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
