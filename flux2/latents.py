"""Latents: 2x2 patchifying, and fitting the statistics that normalise them, over all processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from flux2.autoencoder import AutoEncoder
    from flux2.rae import RAE


def patchify(z: Tensor, patch: int) -> Tensor:
    """[N, C, h, w] -> [N, C p^2, h/p, w/p]; channel index c p^2 + row p + column, as black-forest-labs/flux2."""
    if z.shape[2] % patch or z.shape[3] % patch:
        raise ValueError(f"patchify: sides must be multiples of {patch}, got {z.shape[2]}x{z.shape[3]}")
    return torch.nn.functional.pixel_unshuffle(z, patch) if patch > 1 else z


def unpatchify(z: Tensor, patch: int) -> Tensor:
    """Inverse of `patchify`: [N, C p^2, h, w] -> [N, C, hp, wp]."""
    if z.shape[1] % patch**2:
        raise ValueError(f"unpatchify: channels must be a multiple of {patch**2}, got {z.shape[1]}")
    return torch.nn.functional.pixel_shuffle(z, patch) if patch > 1 else z


@torch.no_grad()
def fit_latent_statistics(ae: AutoEncoder | RAE, batches: Iterable[Tensor]) -> int:
    """Sets the autoencoder's latent statistics from the pixels in `batches` ([N, 3, H, W] each, in [-1, 1]).

    Mean and variance of the posterior's mode, in fp64 with Chan's merge: per patchified channel over all positions, or,
    of an RAE, per channel and position over the pictures. Where torch.distributed is initialised, every process calls
    this with batches of its own, perhaps none, and all get the statistics of all batches, to the bit. Returns the
    number of images, over all processes. ValueError if the autoencoder has no fitted statistics, if an RAE's pictures
    are not of its resolution, or on too few batches.
    """
    if ae.cfg.latent_norm == "affine":
        raise ValueError(
            "this autoencoder's latents are normalised by constants (latent_norm='affine'): nothing to fit"
        )
    mean = ae.latent_affine()[0][0]
    shape = mean.shape  # [C, 1, 1]; [C, h, w] where each position has its own
    per_position = shape[1:].numel() > 1
    zeros = torch.zeros(shape.numel(), dtype=torch.float64, device=mean.device)
    num_images, moments = 0, (0, zeros, zeros)
    for x in batches:
        z = patchify(ae.posterior(x).mode(), ae.cfg.patch).double()  # [N, C, h, w]
        if per_position:
            ae.normalise(z)  # a ValueError if this is another resolution
            rows = z.flatten(1)  # [N, C h w]
        else:
            rows = z.transpose(0, 1).flatten(1).T  # [N h w, C]
        batch_mean = rows.mean(0)
        moments = _merged(moments, (len(rows), batch_mean, (rows - batch_mean).square().sum(0)))
        num_images += len(x)
    if dist.is_available() and dist.is_initialized():
        num_images, moments = _of_all_processes(num_images, moments)
    count, mean, m2 = moments
    if count < 2:
        raise ValueError(
            "latent statistics need at least two latent positions (of an RAE: pictures); got no batches or one"
        )
    var = m2 / (count - 1)
    buffers = dict(ae.named_buffers())
    if "bn.running_mean" in buffers:
        buffers["bn.running_mean"].copy_(mean)
        buffers["bn.running_var"].copy_(var)
        if "bn.num_batches_tracked" in buffers:
            buffers["bn.num_batches_tracked"].fill_(1)
    elif "latent_var" in buffers:
        buffers["latent_mean"].copy_(mean.view(shape))
        buffers["latent_var"].copy_(var.view(shape))
    else:
        buffers["latent_mean"].copy_(mean)
        buffers["latent_std"].copy_(var.sqrt())
    return num_images


Moments = tuple[int, Tensor, Tensor]  # number of rows; fp64 [K]: their mean, and sum of squared distances to it


def _merged(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both (Chan, Golub & LeVeque 1979)."""
    (n, mean, m2), (k, other_mean, other_m2) = a, b
    if not n or not k:
        return a if n else b
    delta = other_mean - mean
    return n + k, mean + delta * k / (n + k), m2 + other_m2 + delta.square() * n * k / (n + k)


def _of_all_processes(num_images: int, moments: Moments) -> tuple[int, Moments]:
    """Both over all processes, merged by rank in each, so that all have the same bits."""
    count, mean, m2 = moments
    own = torch.cat((mean.new_tensor([num_images, count]), mean, m2))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    total, moments = 0, (0, mean, m2)
    for part in parts:
        mean, m2 = part[2:].chunk(2)
        total += int(part[0])
        moments = _merged(moments, (int(part[1]), mean, m2))
    return total, moments
