"""Quality of reconstructions, per picture, on 8-bit values."""

from __future__ import annotations

import torch
from torch import Tensor

from flux2.images import as_rgb, from_uint8
from flux2.perceptual import LPIPS


def _check(a: Tensor, b: Tensor) -> None:
    for name, x in (("first", a), ("second", b)):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3, 4):
            raise ValueError(
                f"{name} argument: expected uint8 [N, C, H, W] of 1, 3 or 4 channels, got {x.dtype} {list(x.shape)}"
            )
    if a.shape != b.shape:
        raise ValueError(f"expected equal shapes, got {list(a.shape)} and {list(b.shape)}")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair, 10 log10(255^2 / MSE): uint8 [N, C, H, W] twice -> fp64 [N].

    C is 1, 3 or 4. inf where a pair is equal. Means over pictures are means of these, not of the MSE.
    """
    _check(a, b)
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004): uint8 [N, C, H, W] twice -> fp64 [N].

    scikit-image's, with the paper's Gaussian window (sigma 1.5, 11 pixels) and population covariance, mean over
    channels.
    nan where a side is shorter than the window.
    """
    from skimage.metrics import structural_similarity

    _check(a, b)
    if min(a.shape[-2:]) < 11:
        return torch.full((len(a),), float("nan"), dtype=torch.float64)
    values = [
        structural_similarity(
            x, y, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def lpips_distance(a: Tensor, b: Tensor, net: LPIPS) -> Tensor:
    """Learned perceptual distance of each pair (Zhang et al. 2018, v0.1): uint8 [N, 3, H, W] twice -> fp32 [N].

    net: LPIPS("vgg") or LPIPS("alex"); a figure means nothing without that word. The column "LPIPS" of the article on
    FLUX.2's latent space is on the scale of the older "PSIM" of latent-diffusion's model cards (SD's autoencoder has
    0.95 there and about 0.14 here): orders of autoencoders compare with it, values do not. ValueError on other shapes
    or types, or sides below 32.
    """
    _check(a, b)
    return net.distances(as_rgb(from_uint8(a)), as_rgb(from_uint8(b)))
