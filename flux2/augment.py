"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv:2006.10738).

Real and fake pass through the same random changes, so that a discriminator cannot learn the few training pictures by
heart, and the changes are differentiable, so that the generator is told about the picture before them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIFFAUG_DRAWS = 10  # uniforms a picture uses: three gates, two shifts, three colours, two places of the hole
_COLOURS = ("brightness", "saturation", "contrast")


@dataclass(frozen=True, kw_only=True)
class DiffAug:
    """Translation, then colour (brightness, saturation, contrast), then cutout: the order and the strengths of RAE.

    probability: of each of the three, for each picture by itself. translation: the largest shift as a share of the
    side; what moves in is 0, mid grey. brightness: largest change, in pixel units of [-1, 1]. saturation, contrast:
    largest change of the distance to the pixel's or the picture's mean, 1 being to 0 or twice. cutout: side of a hole
    as a share of the picture's. Strength 0 leaves out the operation; all 0, or probability 0, is the identity.
    """

    probability: float = 1.0
    translation: float = 0.125
    brightness: float = 0.5
    saturation: float = 1.0
    contrast: float = 0.5
    cutout: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """Pixels [N, C, H, W] in [-1, 1] -> the same shape and dtype, not clamped; computed in fp32 (fp64 of fp64).

        draws: [N, 10] uniforms in (0, 1), e.g. of `kernels.philox.uniform`: gates of translation, colour and cutout,
        shift down and right, brightness, saturation, contrast, centre of the hole down and right. Nothing else is
        random: the same draws change two batches alike. ValueError for other shapes.
        """
        if x.ndim != 4 or draws.shape != (len(x), DIFFAUG_DRAWS):
            raise ValueError(
                f"DiffAug: expected pixels [N, C, H, W] and draws [N, {DIFFAUG_DRAWS}],"
                f" got {list(x.shape)} and {list(draws.shape)}"
            )
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        moved, coloured, cut = (draws[:, :3] < self.probability).unbind(1)  # [N] each
        if self.translation:
            for dim, u in ((2, draws[:, 3]), (3, draws[:, 4])):
                x = _shift(x, dim, moved * _shift_length(x.shape[dim], self.translation, u))
        for name, u in zip(_COLOURS, draws[:, 5:8].unbind(1), strict=True):
            if strength := getattr(self, name):
                amount = (coloured * (2 * u - 1) * strength).to(x.dtype).view(-1, 1, 1, 1)  # in (-strength, strength)
                x = x + amount * _distance(x, name)
        if self.cutout:
            inside = (
                _hole(x.shape[2], self.cutout, draws[:, 8])[:, :, None]
                & _hole(x.shape[3], self.cutout, draws[:, 9])[:, None, :]
            )
            x = torch.where((inside & cut[:, None, None])[:, None], 0.0, x)
        return x.to(dtype)


def _shift_length(side: int, share: float, u: Tensor) -> Tensor:
    """Uniform u [N] -> pixels, uniform on -s, ..., s with s = `share` of the side, rounded; int64 [N]"""
    longest = int(side * share + 0.5)
    return (u * (2 * longest + 1)).long() - longest


def _shift(x: Tensor, dim: int, length: Tensor) -> Tensor:
    """Moves each picture by `length` [N] pixels along dim, towards higher indices; zeros come in.

    A gather of rows inside the picture, whose backward adds each value once: the same bits in any order.
    """
    side = x.shape[dim]
    source = torch.arange(side, device=x.device) - length[:, None]  # [N, side]
    shape = [len(x), 1, 1, 1]
    shape[dim] = side
    inside = ((source >= 0) & (source < side)).view(shape)
    rows = x.gather(dim, source.clamp(0, side - 1).view(shape).expand_as(x))
    return torch.where(inside, rows, 0.0)


def _distance(x: Tensor, name: str) -> Tensor:
    """What a colour change adds in proportion to its amount: 1, or the distance to a mean."""
    if name == "brightness":
        return torch.ones_like(x)
    return x - x.mean(1 if name == "saturation" else (1, 2, 3), keepdim=True)


def _hole(side: int, share: float, u: Tensor) -> Tensor:
    """bool [N, side], true for `share` of the side (rounded) around a centre that u [N] places anywhere in it."""
    length = int(side * share + 0.5)
    first = (u * (side + 1 - length % 2)).long() - length // 2
    index = torch.arange(side, device=u.device)
    return (index >= first[:, None]) & (index < first[:, None] + length)
