"""Losses of the autoencoder. Every loss is a mean, so that its weight means the same at any resolution and batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2.layers import pad_edges

_BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)  # Burt & Adelson 1983, a = 0.375


def l1(recon: Tensor, target: Tensor) -> Tensor:
    """Mean |recon - target| over all elements, fp32 scalar. Shapes equal, pixels [N, 3, H, W]."""
    return (recon.float() - target.float()).abs().mean()


def _blur(x: Tensor) -> Tensor:
    """5-tap binomial filter along both axes, edges replicated. [N, C, h, w] -> same"""
    taps = torch.tensor(_BINOMIAL, dtype=x.dtype, device=x.device) / 16
    kernel = taps.view(1, 1, 1, 5).expand(x.shape[1], 1, 1, 5)
    return F.conv2d(F.conv2d(pad_edges(x, 2), kernel, groups=x.shape[1]), kernel.transpose(2, 3), groups=x.shape[1])


def laplacian_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """Band-pass images of [N, C, h, w], finest first, each half the sides of the one before; the last is low-pass.

    Burt & Adelson 1983, with the band taken as x - blur(x) before subsampling. ValueError if a side is too small.
    """
    if min(x.shape[-2:]) < 2 ** (levels - 1) * 2:
        raise ValueError(f"laplacian_pyramid: {levels} levels need sides >= {2**levels}, got {list(x.shape[-2:])}")
    bands = []
    for _ in range(levels - 1):
        low = _blur(x)
        bands.append(x - low)
        x = low[:, :, ::2, ::2]
    return [*bands, x]


def laplacian_loss(recon: Tensor, target: Tensor, levels: int = 4) -> Tensor:
    """Mean over levels of the mean |band of recon - band of target|, fp32 scalar; pixels [N, 3, H, W].

    The weight-free perceptual term: errors in each octave count alike, as in Bojanowski et al. 2017
    (arXiv:1707.05776). The pyramid is linear, so one pyramid of the difference serves.
    """
    bands = laplacian_pyramid(recon.float() - target.float(), levels)
    return torch.stack([band.abs().mean() for band in bands]).mean()


def cosine_alignment(pred: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cos(pred, target) over positions, fp32 scalar; both [N, D, h, w], cosine over D. Gradient to both.

    The REPA loss (arXiv:2410.06940, eq. 8) plus one, so that 0 is perfect alignment.
    """
    if pred.shape != target.shape:
        raise ValueError(f"cosine_alignment: shapes must be equal, got {list(pred.shape)} and {list(target.shape)}")
    return 1.0 - F.cosine_similarity(pred.float(), target.float(), dim=1, eps=1e-8).mean()
