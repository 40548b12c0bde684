"""Pieces that networks and losses share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pad_edges(x: Tensor, size: int) -> Tensor:
    """[N, C, h, w] -> [N, C, h + 2 size, w + 2 size], edges repeated.

    As F.pad(mode="replicate"), whose backward torch.compile cannot run on channels_last tensors (torch 2.13: the
    compiled code expects other strides than the CPU operator gives).
    """
    x = torch.cat((*[x[:, :, :1]] * size, x, *[x[:, :, -1:]] * size), dim=2)
    return torch.cat((*[x[..., :1]] * size, x, *[x[..., -1:]] * size), dim=3)


class EdgeConv2d(nn.Conv2d):
    """conv3x3 whose input goes on past the border as its edge. [N, in, h, w] -> [N, out, h, w]"""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad_edges(input, 1))
