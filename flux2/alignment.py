"""Teachers for semantic alignment of the latent, and the head that maps a latent onto their tokens.

A teacher maps pixels [N, 3, H, W] in [-1, 1] to tokens [N, D, H/m, W/m], one for each position of the patchified
latent. HOG needs no weights; oriented gradients rival learned targets for masked image modelling (MaskFeat,
arXiv:2112.09133).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HOG_CELL, HOG_BINS = 8, 9  # Dalal & Triggs 2005; MaskFeat


class HOGTeacher(nn.Module):
    """Histograms of oriented gradients: 9 unsigned orientations per colour channel and 8-pixel cell.

    patch: pixels a token covers along a side, a multiple of 8. Each histogram is L2-normalised, then its mean over
    orientations is taken off, so that a cell without structure is the zero vector. D = 3 * 9 * (patch / 8)^2.
    """

    def __init__(self, patch: int = 16, eps: float = 0.02) -> None:
        super().__init__()
        if patch % HOG_CELL:
            raise ValueError(f"HOG patch: expected a multiple of {HOG_CELL} pixels, got {patch}")
        self.patch, self.eps = patch, eps  # eps: gradient magnitude below which a cell counts as flat

    @property
    def channels(self) -> int:
        return 3 * HOG_BINS * (self.patch // HOG_CELL) ** 2

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """pixels [N, 3, H, W], sides multiples of `patch` -> tokens [N, D, H/patch, W/patch], fp32"""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(f"HOG: sides must be multiples of {self.patch}, got {x.shape[2]}x{x.shape[3]}")
        x = F.pad(x.float(), (1, 1, 1, 1), mode="replicate")
        gx = 0.5 * (x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2])
        gy = 0.5 * (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1])
        magnitude = torch.sqrt(gx * gx + gy * gy)
        angle = torch.atan2(gy, gx) / math.pi * HOG_BINS  # in bins; orientation is angle modulo 180 degrees
        bins = torch.arange(HOG_BINS, device=x.device, dtype=x.dtype).view(1, 1, -1, 1, 1)
        distance = (angle.unsqueeze(2) - bins).remainder(HOG_BINS)  # circular, in [0, 9)
        share = (1 - torch.minimum(distance, HOG_BINS - distance)).clamp(min=0)  # linear between the two nearest bins
        votes = magnitude.unsqueeze(2) * share  # [N, 3, 9, H, W]
        cells = F.avg_pool2d(votes.flatten(1, 2), HOG_CELL).unflatten(1, (3, HOG_BINS))  # [N, 3, 9, H/8, W/8]
        cells = cells / torch.sqrt(cells.square().sum(2, keepdim=True) + self.eps**2)
        cells = (cells - cells.mean(2, keepdim=True)).flatten(1, 2)
        return F.pixel_unshuffle(cells, self.patch // HOG_CELL)


class AlignmentHead(nn.Conv2d):
    """Trainable 1x1 projection of the patchified latent onto teacher tokens: [N, C, h, w] -> [N, D, h, w]."""

    def __init__(self, latent_channels: int, teacher_channels: int) -> None:
        super().__init__(latent_channels, teacher_channels, 1)


TEACHERS = {"hog": HOGTeacher}
