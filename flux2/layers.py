"""Pieces that networks and losses share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def pad_edges(x: Tensor, size: int) -> Tensor:
    """[N, C, h, w] -> [N, C, h + 2 size, w + 2 size], edges repeated.

    As F.pad(mode="replicate"), whose backward torch.compile cannot run on channels_last tensors (torch 2.13: the
    compiled code expects other strides than the CPU operator gives).
    """
    x = torch.cat((*[x[:, :, :1]] * size, x, *[x[:, :, -1:]] * size), dim=2)
    return torch.cat((*[x[..., :1]] * size, x, *[x[..., -1:]] * size), dim=3)


def unit(x: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """x / |x| along `dim`. A vector whose squares sum to less than eps becomes zeros, with gradient zero.

    F.normalize and x / (|x| + eps) hand such a vector a gradient of 1 / eps, or NaN.
    """
    squares = x.square().sum(dim, keepdim=True)
    return x * torch.where(squares > eps, squares.clamp(min=eps).rsqrt(), 0.0)


class EdgeConv2d(nn.Conv2d):
    """conv3x3 whose input goes on past the border as its edge. [N, in, h, w] -> [N, out, h, w]"""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad_edges(input, 1))


def check_pixels(x: Tensor, multiple: int, channels: int = 3) -> None:
    """ValueError unless x is floating-point [N, channels, H, W] with sides positive multiples of `multiple`."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"pixels: expected [N, {channels}, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"pixels: expected a floating-point tensor in [-1, 1], got {x.dtype}")
    if x.shape[2] % multiple or x.shape[3] % multiple or 0 in x.shape:
        raise ValueError(
            f"pixels: height and width must be positive multiples of {multiple}, got {x.shape[2]}x{x.shape[3]}"
            " (`reconstruct` pads and crops)"
        )


def pad_by_reflection(x: Tensor, multiple: int, channels: int = 3) -> Tensor:
    """Pixels [N, channels, H, W] of any size -> sides continued by reflection, right and below, to a multiple."""
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"pixels: expected [N, {channels}, H, W] with no empty side, got {list(x.shape)}")
    rows, columns = (_reflected_index(side, multiple, x.device) for side in x.shape[2:])
    return x[:, :, rows][:, :, :, columns]


def _reflected_index(side: int, multiple: int, device: torch.device) -> Tensor:
    """Indices 0..side-1 continued by reflection (edge not repeated) up to the next multiple; any padding length."""
    index = torch.arange(math.ceil(side / multiple) * multiple, device=device)
    if side == 1:
        return torch.zeros_like(index)
    period = 2 * (side - 1)
    index = index % period
    return torch.where(index < side, index, period - index)
