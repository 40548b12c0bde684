"""Semantic alignment of the latent: the head that maps it onto a teacher's tokens, and the losses between the two."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from flux2.layers import unit
from kernels import repa_loss


class AlignmentHead(nn.Conv2d):
    """Trainable 1x1 projection of the patchified latent onto teacher tokens: [N, C, h, w] -> [N, D, h, w].

    Without a bias, as VA-VAE's: the teacher's mean direction has to come out of the latent too.
    """

    def __init__(self, latent_channels: int, teacher_channels: int) -> None:
        super().__init__(latent_channels, teacher_channels, 1, bias=False)


def _check(pred: Tensor, target: Tensor) -> None:
    if pred.shape != target.shape or pred.ndim != 4:
        shapes = f"{list(pred.shape)} and {list(target.shape)}"
        raise ValueError(f"alignment: expected two equal shapes [N, D, h, w], got {shapes}")


def _rows(x: Tensor) -> Tensor:
    """[N, D, h, w] -> [N, h w, D]; no copy of channels_last."""
    return x.flatten(2).transpose(1, 2)


def cosine_alignment(pred: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cos(pred, target) over positions, fp32 scalar; both [N, D, h, w], cosine over D. Gradient to both.

    The REPA loss (arXiv:2410.06940, eq. 8) plus one, so that 0 is perfect alignment. On a GPU one fused kernel.
    """
    _check(pred, target)
    return 1.0 + repa_loss(_rows(pred), _rows(target))


def vf_loss(pred: Tensor, target: Tensor, *, cosine_margin: float = 0.5, distance_margin: float = 0.25) -> Tensor:
    """VA-VAE's vision foundation loss (arXiv:2501.01423, section 3.2), fp32 scalar; both [N, D, h, w].

    mean relu(1 - cosine_margin - cos(p_i, t_i)) over positions, plus mean relu(|cos(p_i, p_j) - cos(t_i, t_j)| -
    distance_margin) over pairs of positions of one image. The first is content with a cosine of 1 - cosine_margin, the
    second with similarities that differ by distance_margin, so that neither fights reconstruction to the end.
    """
    _check(pred, target)
    p, t = unit(_rows(pred.float()), 2), unit(_rows(target.float()), 2)
    marginal_cosine = F.relu(1 - cosine_margin - (p * t).sum(2)).mean()
    difference = (p @ p.transpose(1, 2) - t @ t.transpose(1, 2)).abs()  # [N, h w, h w]
    return marginal_cosine + F.relu(difference - distance_margin).mean()
