"""Latents: 2x2 patchifying, and fitting the statistics that normalise them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flux2.autoencoder import AutoEncoder


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
def fit_latent_statistics(ae: AutoEncoder, batches: Iterable[Tensor]) -> int:
    """Sets the autoencoder's latent statistics from the pixels in `batches` ([N, 3, H, W] each, in [-1, 1]).

    Mean and variance per patchified channel over all positions, of the posterior's mode, in fp64 with Chan's merge.
    Returns the number of images. ValueError if the autoencoder has no fitted statistics, or there are no batches.
    """
    if ae.cfg.latent_norm == "affine":
        raise ValueError(
            "this autoencoder's latents are normalised by constants (latent_norm='affine'): nothing to fit"
        )
    num_images, count = 0, 0
    mean = m2 = torch.zeros(())
    for x in batches:
        z = patchify(ae.posterior(x).mode(), ae.cfg.patch).double()  # [N, C, h, w]
        flat = z.transpose(0, 1).flatten(1)  # [C, N h w]
        n = flat.shape[1]
        batch_mean = flat.mean(1)
        batch_m2 = (flat - batch_mean[:, None]).square().sum(1)
        if count == 0:
            mean, m2 = batch_mean, batch_m2
        else:
            delta = batch_mean - mean
            mean = mean + delta * n / (count + n)
            m2 = m2 + batch_m2 + delta.square() * count * n / (count + n)
        count += n
        num_images += len(x)
    if count < 2:
        raise ValueError("latent statistics need at least two latent positions; got no batches or one position")
    var = m2 / (count - 1)
    if ae.cfg.latent_norm == "batchnorm":
        assert ae.bn.running_mean is not None and ae.bn.running_var is not None
        ae.bn.running_mean.copy_(mean)
        ae.bn.running_var.copy_(var)
        if ae.bn.num_batches_tracked is not None:
            ae.bn.num_batches_tracked.fill_(1)
    else:
        ae.get_buffer("latent_mean").copy_(mean)
        ae.get_buffer("latent_std").copy_(var.sqrt())
    return num_images
