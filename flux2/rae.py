"""Representation autoencoders: the tokens of a frozen vision transformer as latent, and a decoder that inverts them.

RAE (Zheng et al. 2025, arXiv:2510.11690; facts after bytetriper/RAE). Spaces of a tensor and methods are those of
autoencoder.py with a patch of 1: what works on an AutoEncoder works on an RAE. Two things differ. The latent is a
point, without a variance of its own: its posterior adds the noise it is given. And its statistics are one mean and
variance for each position, so that normalised latents exist at one resolution, `cfg.resolution`; `forward`,
`posterior`, `decode_raw` and `reconstruct` stay in raw latents and take any size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flux2.hub import HubMixin
from flux2.layers import check_pixels, pad_by_reflection
from flux2.teachers import RANDOM, VITS, ViTConfig, ViTTeacher
from flux2.tensor_files import nearest
from flux2.vit_decoder import DECODERS, PATCH, ViTDecoder
from kernels.dispatch import BACKENDS

STATS_EPS = 1e-5

# "tiny-random" is a narrow network with fixed random weights: no download, and no representation to speak of.
RAE_ENCODERS: dict[str, ViTConfig] = {
    **{name: VITS[name] for name in ("dinov2-b-reg", "siglip2-b/16", "mae-b/16")},
    "tiny-random": ViTConfig(model="vit_tiny_patch16_224", channels=192, patch=16, options={"depth": 2}),
}


@dataclass(frozen=True, kw_only=True)
class RAEConfig:
    """Shape of a representation autoencoder.

    encoder, decoder: rows of RAE_ENCODERS and DECODERS. resolution: side, in pixels, of the pictures whose latents are
    normalised. noise_tau: noise of the decoder's training, tau U(0, 1) times a standard normal on raw latents.
    """

    encoder: str = "dinov2-b-reg"
    decoder: str = "xl"
    resolution: int = 256
    noise_tau: float = 0.8
    kind: str = field(default="rae", init=False)  # tells its dict from an AutoencoderConfig's

    def __post_init__(self) -> None:
        for name, rows in (("encoder", RAE_ENCODERS), ("decoder", DECODERS)):
            if (got := getattr(self, name)) not in rows:
                raise ValueError(f"RAE {name}: expected one of {', '.join(rows)}, got {got!r}{nearest(got, rows)}")
        if self.resolution % PATCH or self.resolution <= 0:
            raise ValueError(f"RAE resolution: expected a positive multiple of {PATCH}, got {self.resolution}")
        if self.noise_tau < 0:
            raise ValueError(f"RAE noise_tau: expected 0 or more, got {self.noise_tau}")

    @property
    def z_channels(self) -> int:
        """Channels of the raw latent (768 for a ViT-B)."""
        return RAE_ENCODERS[self.encoder].channels

    @property
    def latent_channels(self) -> int:
        """Channels of the normalised latent: the same."""
        return self.z_channels

    @property
    def downsample(self) -> int:
        """Pixels a raw latent position covers along a side."""
        return PATCH

    @property
    def multiple(self) -> int:
        """Pixels a normalised latent position covers along a side; image sides must be multiples of it."""
        return PATCH

    @property
    def patch(self) -> int:
        """Latents are not patchified."""
        return 1

    @property
    def latent_norm(self) -> Literal["stats"]:
        """Stored mean and variance, here of each position."""
        return "stats"

    @property
    def shortcut(self) -> Literal["none"]:
        """There is no linear path beside the networks."""
        return "none"

    @property
    def channels(self) -> int:
        """Of the pixels: RGB, which the encoders know alone."""
        return 3


# fmt: off
RAES: dict[str, RAEConfig] = {
    "rae":         RAEConfig(),
    "rae-siglip2": RAEConfig(encoder="siglip2-b/16"),
    "rae-mae":     RAEConfig(encoder="mae-b/16"),
    "rae-tiny":    RAEConfig(encoder="tiny-random", decoder="tiny", resolution=64),
}
# fmt: on


class NoisedLatent:
    """A raw latent [N, C, h, w] in the place of a posterior; what it samples is itself plus noise.

    tau: of the noise it draws by itself, tau U(0, 1) a sample times a standard normal.
    """

    def __init__(self, mean: Tensor, tau: float) -> None:
        self.mean, self.tau = mean, tau

    def mode(self) -> Tensor:
        """[N, C, h, w]"""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + noise, [N, C, h, w]; noise: of that shape, scaled by the caller; drawn here if not given."""
        if noise is None:
            level = self.tau * torch.rand(len(self.mean), 1, 1, 1, device=self.mean.device)
            noise = level * torch.randn_like(self.mean, dtype=torch.float32)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise: expected shape {tuple(self.mean.shape)}, got {tuple(noise.shape)}")
        return self.mean + noise.to(self.mean)

    def kl(self) -> Tensor:
        """Zeros [N], fp32: there is no distribution to hold to a prior."""
        return torch.zeros(len(self.mean), device=self.mean.device)


class RAE(HubMixin, nn.Module):
    """Representation autoencoder of the shape `cfg`: a decoder with random weights on a frozen encoder.

    encoder_weights: "" takes timm's pretrained ones, from its cache or the hub; a file (`flux2.teachers.build_teacher`
    says which); "random" is for tests, and warns; None leaves them to a file that is loaded into the whole. The encoder
    "tiny-random" is always the same random one. backend is one of AutoEncoder's; no layer here has a second one.
    ValueError if the weights cannot be had or are another network's.
    """

    def __init__(self, cfg: RAEConfig, encoder_weights: str | Path | None = "", backend: str = "auto") -> None:
        super().__init__()
        self.cfg = cfg
        weights = RANDOM if encoder_weights is None or cfg.encoder == "tiny-random" else encoder_weights
        if encoder_weights == RANDOM and cfg.encoder != "tiny-random":
            warnings.warn(f"encoder {cfg.encoder!r} has random weights: its latents mean nothing", stacklevel=2)
        self.encoder = ViTTeacher(RAE_ENCODERS[cfg.encoder], PATCH, weights, plain_norm=True)
        self.decoder = ViTDecoder(DECODERS[cfg.decoder], cfg.z_channels)
        grid = (cfg.resolution // PATCH,) * 2
        self.register_buffer("latent_mean", torch.zeros(cfg.latent_channels, *grid))
        self.register_buffer("latent_var", torch.ones(cfg.latent_channels, *grid))
        self.set_backend(backend)

    def set_backend(self, backend: str) -> RAE:
        """Changes nothing. ValueError if it is none of "auto", "triton" and "torch"."""
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
        return self

    def encode_moments(self, x: Tensor) -> Tensor:
        """ValueError: a latent that is a point has none."""
        raise ValueError("an RAE has no moments: its latent is a point, `posterior(x).mode()`")

    def posterior(self, x: Tensor) -> NoisedLatent:
        """Pixels [N, 3, H, W] in [-1, 1] -> raw latents [N, C, H/16, W/16], without gradient; in the type of x.

        ValueError if a side is not a `cfg.multiple`.
        """
        check_pixels(x, self.cfg.multiple)
        return NoisedLatent(self.encoder(x).to(x.dtype), self.cfg.noise_tau)

    def latent_affine(self) -> tuple[Tensor, Tensor]:
        """(mean, std), fp32 [1, C, R/16, R/16] with R the resolution: normalised = (raw - mean) / std."""
        mean, var = self.get_buffer("latent_mean").float(), self.get_buffer("latent_var").float()
        return mean[None], (var + STATS_EPS).sqrt()[None]

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents [N, C, h, w] of pictures of `cfg.resolution` -> normalised latents, dtype kept."""
        self._check_grid(z)
        mean, std = self.latent_affine()
        return ((z - mean) / std).to(z.dtype)

    def denormalise(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        self._check_grid(z)
        mean, std = self.latent_affine()
        return (z * std + mean).to(z.dtype)

    def _check_grid(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.cfg.latent_channels:
            raise ValueError(f"latents: expected [N, {self.cfg.latent_channels}, h, w], got {list(z.shape)}")
        side, (height, width) = self.cfg.resolution, (PATCH * n for n in z.shape[2:])
        if (height, width) != (side, side):
            raise ValueError(
                f"the latent statistics are of {side}x{side} pixels, position by position; got {height}x{width} pixels"
            )

    def encode(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, R, R] in [-1, 1], R `cfg.resolution` -> normalised latents [N, C, R/16, R/16]."""
        return self.normalise(self.posterior(x).mode())

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents [N, C, R/16, R/16] -> pixels [N, 3, R, R], about [-1, 1], not clamped."""
        return self.decode_raw(self.denormalise(z))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents [N, C, h, w] -> pixels [N, 3, 16 h, 16 w]."""
        return self.decode_with_features(z)[0]

    def decode_with_features(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(`decode_raw(z)`, h): features h [N, h w, D] are what `last_layer_grad` needs."""
        recon, h = self.decoder.with_features(z)
        mean, std = (self.encoder.get_buffer(name).to(recon) for name in ("mean", "std"))
        return 2 * (recon * std + mean) - 1, h

    def last_layer_grad(self, h: Tensor, grad: Tensor) -> Tensor:
        """Gradient of decoder.pred.weight, fp32 of its shape, where d loss / d pixels is `grad`.

        h: of `decode_with_features`. What adaptive loss weights compare; outside autograd.
        """
        return self.decoder.last_layer_grad(h, 2 * self.encoder.get_buffer("std").float() * grad.float())

    def forward(self, x: Tensor, sample: bool = False, noise: Tensor | None = None) -> tuple[Tensor, NoisedLatent]:
        """Training forward, in raw latents: pixels [N, 3, H, W] -> (reconstruction of the same shape, posterior).

        sample=False decodes the latent; True adds `noise` [N, C, H/16, W/16] to it. The latent normalisation is neither
        used nor changed.
        """
        posterior = self.posterior(x)
        z = posterior.sample(noise) if sample else posterior.mode()
        return self.decode_raw(z), posterior

    def pad(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] of any size -> sides continued by reflection, right and below, to the next multiple."""
        return pad_by_reflection(x, self.cfg.multiple)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] of any size -> reconstruction of the same size in [-1, 1]: `pad`, then crop back."""
        return self(self.pad(x))[0][:, :, : x.shape[2], : x.shape[3]].clamp(-1, 1)
