"""Losses of the autoencoder on pixels and on its posterior; others are in perceptual, adversarial and alignment.

Every loss is a mean, so that its weight means the same at any resolution and batch. LDM and taming-transformers sum
over an image's pixels; `kl_weight_from_ldm` converts their one weight for which that matters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.autoencoder import Posterior
from flux2.layers import pad_edges

_BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)  # Burt & Adelson 1983, a = 0.375


def l1(recon: Tensor, target: Tensor) -> Tensor:
    """Mean |recon - target| over all elements, fp32 scalar. Shapes equal, pixels [N, 3, H, W]."""
    return (recon.float() - target.float()).abs().mean()


def l2(recon: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, fp32 scalar. Shapes equal, pixels [N, 3, H, W]."""
    return (recon.float() - target.float()).square().mean()


def charbonnier(recon: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(error^2 + eps^2) - eps, fp32 scalar: l1, smooth where |error| < eps; 0 for no error.

    Charbonnier et al. 1994; pixels [N, 3, H, W] in [-1, 1], so that eps = 1e-3 is an eighth of an 8-bit step.
    """
    return (torch.sqrt((recon.float() - target.float()).square() + eps**2) - eps).mean()


def _blur(x: Tensor) -> Tensor:
    """5-tap binomial filter along both axes, edges replicated. [N, C, h, w] -> same"""
    taps = torch.cat([x.new_full((1,), weight / 16) for weight in _BINOMIAL])  # filled there: a copy would wait
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


def kl(posterior: Posterior, free_bits: float = 0.0) -> Tensor:
    """KL divergence of the posterior to the standard normal, mean per latent element, in nats; fp32 scalar.

    free_bits: bits an element of each channel may cost for nothing (Kingma et al. 2016, arXiv:1606.04934): a channel
    counts as that much at least, by its mean over batch and positions.
    """
    if not free_bits:
        return posterior.kl().mean()
    per_channel = posterior.kl_elements().transpose(0, 1).flatten(1).mean(1)  # [z]
    return per_channel.clamp(min=free_bits * math.log(2)).mean()


def kl_weight_from_ldm(weight: float, *, z_channels: int, downsample: int) -> float:
    """Weight for `kl` that equals LDM's `weight` of a KL summed over an image's latent beside a summed pixel loss.

    LDM's loss of an image is sum(|error|) + weight sum(KL); over 3 H W pixel values it is mean(|error|) + weight
    (z H W / f^2) / (3 H W) mean(KL). LDM's 1e-6 for z = 4, f = 8 is 2.08e-8 here.
    """
    return weight * z_channels / (3 * downsample**2)


class LogVariance(nn.Module):
    """Learned scale of a reconstruction loss, as LDM and taming-transformers: loss / exp(logvar) + logvar.

    Its best logvar is the loss's own logarithm, so that the other terms weigh against a loss of 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, loss: Tensor) -> Tensor:
        """Scalar -> scalar."""
        return loss / self.logvar.exp() + self.logvar
