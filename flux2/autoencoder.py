"""The convolutional autoencoders of SD, SDXL, FLUX.1, FLUX.2 and VA-VAE: one network, one table of shapes.

Spaces a tensor can be in (N batch, H x W pixels, f = downsampling of the convolutions, p = patch):

    pixels              [N, 3, H, W]           values in [-1, 1]
    moments             [N, 2z, H/f, W/f]      mean and log-variance, stacked
    raw latents         [N, z, H/f, W/f]       what the decoder network reads
    normalised latents  [N, z p^2, H/fp, W/fp] what a flow model reads: patchified p x p, then normalised

`encode` returns normalised latents and `decode` takes them, so that normalisation cannot be forgotten. State-dict keys
are those of the original FLUX.2 code (`encoder.down.0.block.0.norm1.weight`, `bn.running_mean`). Layers, paddings and
constants follow black-forest-labs/flux2 `src/flux2/autoencoder.py` (Apache-2.0) and CompVis/latent-diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2 import banded
from flux2.blocks import NORM_EPS, Block, Level, Middle
from flux2.hub import HubMixin
from flux2.latents import patchify, unpatchify
from flux2.layers import EdgeConv2d, check_pixels, pad_by_reflection
from kernels.dispatch import BACKENDS

BN_EPS, BN_MOMENTUM = 1e-4, 0.1  # FLUX.2's latent BatchNorm
LOGVAR_RANGE = (-30.0, 20.0)  # LDM
Memory = Literal["normal", "low"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of an autoencoder.

    ch, decoder_ch: width of the first level, multiplied by ch_mult[i] at level i; every level but the last halves the
    sides. attn_levels: levels with attention after each residual block (the middle always has one block).
    latent_norm: "batchnorm" (per-channel running statistics of the patchified latent), "affine" ((z - shift) * scale)
    or "stats" (stored per-channel mean and std). shortcut: "patch" adds a trainable space-to-channel path beside
    encoder and decoder, on blocks of f x f pixels, of hidden width shortcut_width (after the residual autoencoding of
    DC-AE, arXiv:2410.10733); "none" is every published shape. channels: of the pixels, 1 grey, 3 RGB, 4 RGBA; wherever
    shapes here say 3, it is this number.
    """

    z_channels: int
    ch: int = 128
    decoder_ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_levels: tuple[int, ...] = ()
    quant_conv: bool = True
    patch: int = 2
    latent_norm: Literal["batchnorm", "affine", "stats"] = "affine"
    scale: float = 1.0
    shift: float = 0.0
    num_groups: int = 32
    shortcut: Literal["none", "patch"] = "none"
    shortcut_width: int = 256
    channels: int = 3

    def __post_init__(self) -> None:
        for name, width in (("ch", self.ch), ("decoder_ch", self.decoder_ch)):
            if bad := [width * m for m in self.ch_mult if width * m % self.num_groups]:
                raise ValueError(f"{name}={width}: widths must be multiples of num_groups={self.num_groups}, got {bad}")
        for name, allowed in (("latent_norm", ("batchnorm", "affine", "stats")), ("shortcut", ("none", "patch"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")

        if self.channels not in (1, 3, 4):
            raise ValueError(f"channels: expected 1 (grey), 3 (RGB) or 4 (RGBA), got {self.channels}")

    @property
    def downsample(self) -> int:
        """Pixels a raw latent position covers along a side (8 for FLUX.2)."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def multiple(self) -> int:
        """Pixels a normalised latent position covers along a side; image sides must be multiples of it."""
        return self.downsample * self.patch

    @property
    def latent_channels(self) -> int:
        """Channels of the normalised latent (128 for FLUX.2)."""
        return self.z_channels * self.patch**2


# fmt: off
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "sd":                   AutoencoderConfig(z_channels=4, scale=0.18215),
    "sdxl":                 AutoencoderConfig(z_channels=4, scale=0.13025),
    "flux.1":               AutoencoderConfig(z_channels=16, scale=0.3611, shift=0.1159, quant_conv=False),
    "flux.2":               AutoencoderConfig(z_channels=32, latent_norm="batchnorm"),
    "flux.2-small-decoder": AutoencoderConfig(z_channels=32, latent_norm="batchnorm", decoder_ch=96),
    "va-vae":               AutoencoderConfig(z_channels=32, latent_norm="stats", ch_mult=(1, 1, 2, 2, 4),
                                              attn_levels=(4,), patch=1),
}
# fmt: on


class Posterior:
    """Diagonal Gaussian over raw latents, from moments [N, 2z, h, w]; log-variance clamped to [-30, 20]."""

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)  # [N, z, h, w] each
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    def mode(self) -> Tensor:
        """[N, z, h, w]"""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise, [N, z, h, w]; noise: standard normal of that shape, drawn here if not given."""
        noise = torch.randn_like(self.mean) if noise is None else noise.to(self.mean)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise: expected shape {tuple(self.mean.shape)}, got {tuple(noise.shape)}")
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl_elements(self) -> Tensor:
        """KL divergence of each latent element to the standard normal, nats: [N, z, h, w], fp32."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)

    def kl(self) -> Tensor:
        """`kl_elements`, mean per latent element: [N], fp32."""
        return self.kl_elements().flatten(1).mean(1)


class PatchShortcut(nn.Module):
    """conv3x3, plus conv3x3-SiLU-conv3x3, on the grid of f x f pixel blocks. [N, in, h, w] -> [N, out, h, w]

    The linear part is a good code by itself and learns fast; the other adds to it, from zero. Edges are replicated, so
    that the border of a picture is not a step to grey.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.linear = EdgeConv2d(in_channels, out_channels)
        self.inner, self.outer = EdgeConv2d(in_channels, width), EdgeConv2d(width, out_channels)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.outer(F.silu(self.inner(x)))


class Encoder(Block):
    """Pixels [N, 3, H, W] -> moments [N, 2z, H/f, W/f]; the 1x1 quant_conv included."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__(cfg.num_groups)
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(cfg.channels, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = cfg.ch
        for i, out in enumerate(widths):
            blocks, resample = [width] + [out] * cfg.num_res_blocks, "down" if i < len(widths) - 1 else "none"
            level = Level(blocks, attention=i in cfg.attn_levels, num_groups=cfg.num_groups, resample=resample)
            self.down.append(level)
            width = out
        self.mid = Middle(width, cfg.num_groups)
        self.norm_out = nn.GroupNorm(cfg.num_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, 2 * cfg.z_channels, 3, padding=1)
        if cfg.quant_conv:
            self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        if cfg.shortcut == "patch":
            self.block = cfg.downsample
            self.shortcut = PatchShortcut(cfg.channels * cfg.downsample**2, cfg.z_channels, cfg.shortcut_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_features(x)[0]

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(moments, h): h [N, C, H/f, W/f] is what norm_out, SiLU and conv_out turn into them."""
        h, stats = self.conv_add(self.conv_in, x)
        for level in self.down:
            h, stats = level(h, stats)
        features, stats = self.mid(h, stats)
        return self._moments(self.norm_silu_conv(self.norm_out, self.conv_out, features, stats), x), features

    def banded(self, x: Tensor) -> Tensor:
        """forward, in bands of rows: `flux2.banded`."""
        return self._moments(banded.run(self, x), x)

    def _moments(self, h: Tensor, x: Tensor) -> Tensor:
        if hasattr(self, "quant_conv"):
            h = self.convolve(self.quant_conv, h)
        if hasattr(self, "shortcut"):
            mean, logvar = h.chunk(2, dim=1)
            h = torch.cat((mean + self.shortcut(F.pixel_unshuffle(x, self.block)), logvar), dim=1)
        return h


class Decoder(Block):
    """Raw latents [N, z, h, w] -> pixels [N, 3, fh, fw]; the 1x1 post_quant_conv included."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__(cfg.num_groups)
        widths = [cfg.decoder_ch * m for m in cfg.ch_mult]
        if cfg.quant_conv:
            self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)
        width = widths[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, width, 3, padding=1)
        self.mid = Middle(width, cfg.num_groups)
        levels: list[Level] = []
        for i in reversed(range(len(widths))):
            blocks, resample = [width] + [widths[i]] * (cfg.num_res_blocks + 1), "up" if i > 0 else "none"
            level = Level(blocks, attention=i in cfg.attn_levels, num_groups=cfg.num_groups, resample=resample)
            levels.insert(0, level)  # up.0 is the full-resolution level
            width = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(cfg.num_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, cfg.channels, 3, padding=1)
        if cfg.shortcut == "patch":
            self.block = cfg.downsample
            self.shortcut = PatchShortcut(cfg.z_channels, cfg.channels * cfg.downsample**2, cfg.shortcut_width)

    def forward(self, z: Tensor) -> Tensor:
        return self.with_features(z)[0]

    def with_features(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(pixels, h): h [N, C, fh, fw] is what norm_out, SiLU and conv_out turn into pixels."""
        features, stats = self.mid(*self.conv_add(self.conv_in, self._unquantised(z)))
        for level in reversed(self.up):
            features, stats = level(features, stats)
        h = self.norm_silu_conv(self.norm_out, self.conv_out, features, stats)
        return self._pixels(h, z), features

    def banded(self, z: Tensor) -> Tensor:
        """forward, in bands of rows: `flux2.banded`."""
        return self._pixels(banded.run(self, self._unquantised(z)), z)

    def _unquantised(self, z: Tensor) -> Tensor:
        return self.convolve(self.post_quant_conv, z) if hasattr(self, "post_quant_conv") else z

    def _pixels(self, h: Tensor, z: Tensor) -> Tensor:
        return h + F.pixel_shuffle(self.shortcut(z), self.block) if hasattr(self, "shortcut") else h


class AutoEncoder(HubMixin, nn.Module):
    """Image autoencoder of the shape `cfg`; weights random until loaded (`flux2.load_autoencoder`).

    Weights and activations are channels_last inside; inputs of either memory format are taken. `backend` is "auto",
    "triton" or "torch" (`flux2.blocks` says what they are; ValueError for others); `set_backend` changes it.
    """

    def __init__(self, cfg: AutoencoderConfig, backend: str = "auto") -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        if cfg.latent_norm == "batchnorm":
            self.bn = nn.BatchNorm2d(cfg.latent_channels, eps=BN_EPS, momentum=BN_MOMENTUM, affine=False).eval()
        elif cfg.latent_norm == "stats":
            self.register_buffer("latent_mean", torch.zeros(cfg.latent_channels))
            self.register_buffer("latent_std", torch.ones(cfg.latent_channels))
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.set_backend(backend)

    def set_backend(self, backend: str) -> AutoEncoder:
        """Runs all blocks on that backend from now on. ValueError if it is none of "auto", "triton" and "torch"."""
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
        for module in self.modules():
            if isinstance(module, Block):
                module.backend = backend
        return self

    def train(self, mode: bool = True) -> AutoEncoder:
        """As nn.Module.train, but the latent BatchNorm stays in eval: its statistics are fitted, not averaged."""
        super().train(mode)
        if self.cfg.latent_norm == "batchnorm":
            self.bn.eval()
        return self

    def encode_moments(self, x: Tensor, memory: Memory = "normal") -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] -> moments [N, 2z, H/f, W/f]. ValueError if a side is not a `cfg.multiple`.

        memory: "low" is the same function in bands of rows, for large pictures (`flux2.banded`); ValueError if a
        gradient is asked for.
        """
        if not self._runs_banded(x, memory):
            return self.encode_with_features(x)[0]
        check_pixels(x, self.cfg.multiple)
        return self.encoder.banded(x.contiguous(memory_format=torch.channels_last))

    def encode_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(`encode_moments(x)`, h): features h [N, C, H/f, W/f] are what `encoder_grad` needs."""
        check_pixels(x, self.cfg.multiple, self.cfg.channels)
        return self.encoder.with_features(x.contiguous(memory_format=torch.channels_last))

    def posterior(self, x: Tensor, memory: Memory = "normal") -> Posterior:
        """Pixels [N, 3, H, W] in [-1, 1] -> Gaussian over raw latents [N, z, H/f, W/f]. memory as `encode_moments`."""
        return Posterior(self.encode_moments(x, memory))

    def latent_affine(self) -> tuple[Tensor, Tensor]:
        """(mean, std), fp32, broadcastable over patchified latents: normalised = (patchified - mean) / std."""
        if self.cfg.latent_norm == "batchnorm":
            assert self.bn.running_mean is not None and self.bn.running_var is not None
            mean, std = self.bn.running_mean.float(), (self.bn.running_var.float() + BN_EPS).sqrt()
        elif self.cfg.latent_norm == "stats":
            mean, std = self.get_buffer("latent_mean").float(), self.get_buffer("latent_std").float()
        else:
            device = self.decoder.conv_in.weight.device
            mean = torch.full((1,), self.cfg.shift, device=device)
            std = torch.full((1,), 1.0 / self.cfg.scale, device=device)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents [N, z, h, w] -> normalised latents [N, z p^2, h/p, w/p], dtype kept."""
        mean, std = self.latent_affine()
        return ((patchify(z, self.cfg.patch) - mean) / std).to(z.dtype)

    def denormalise(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        if z.ndim != 4 or z.shape[1] != self.cfg.latent_channels:
            raise ValueError(f"latents: expected [N, {self.cfg.latent_channels}, h, w], got {list(z.shape)}")
        mean, std = self.latent_affine()
        return unpatchify((z * std + mean).to(z.dtype), self.cfg.patch)

    def encode(self, x: Tensor, memory: Memory = "normal") -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] -> normalised latents [N, z p^2, H/fp, W/fp] of the posterior's mode.

        memory as `encode_moments`.
        """
        return self.normalise(self.posterior(x, memory).mode())

    def decode(self, z: Tensor, memory: Memory = "normal") -> Tensor:
        """Normalised latents [N, z p^2, h, w] -> pixels [N, 3, fp h, fp w], about [-1, 1], not clamped.

        memory as `encode_moments`.
        """
        return self.decode_raw(self.denormalise(z), memory)

    def decode_raw(self, z: Tensor, memory: Memory = "normal") -> Tensor:
        """Raw latents [N, z, h, w] -> pixels [N, 3, fh, fw]. memory as `encode_moments`."""
        if not self._runs_banded(z, memory):
            return self.decode_with_features(z)[0]
        return self.decoder.banded(z.contiguous(memory_format=torch.channels_last))

    def _runs_banded(self, given: Tensor, memory: str) -> bool:
        if memory not in ("normal", "low"):
            raise ValueError(f"memory: expected normal or low, got {memory!r}")
        if memory == "normal":
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in (given, *self.parameters())):
            raise ValueError('memory="low" is for inference: expected torch.no_grad() around it')
        return True

    def decode_with_features(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(`decode_raw(z)`, h): features h [N, C, fh, fw] are what `last_layer_grad` needs."""
        return self.decoder.with_features(z.contiguous(memory_format=torch.channels_last))

    def last_layer_grad(self, h: Tensor, grad: Tensor) -> Tensor:
        """Gradient of decoder.conv_out.weight, fp32 of its shape, where d loss / d pixels is `grad`.

        h: of `decode_with_features`. What adaptive loss weights compare (VQGAN, arXiv:2012.09841, eq. 7); one layer's
        weight gradient, outside autograd.
        """
        return _conv_grad(self.decoder.norm_out, self.decoder.conv_out, h, grad)

    def encoder_grad(self, h: Tensor, grad: Tensor) -> Tensor:
        """Gradient of encoder.conv_out.weight, fp32 of its shape, where d loss / d moments is `grad`.

        h: of `encode_with_features`. As VA-VAE weighs its alignment (arXiv:2501.01423).
        """
        if self.cfg.quant_conv:
            grad = F.conv_transpose2d(grad.float(), self.encoder.quant_conv.weight.float())
        return _conv_grad(self.encoder.norm_out, self.encoder.conv_out, h, grad)

    def forward(self, x: Tensor, sample: bool = False, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Training forward, in raw latents: pixels [N, 3, H, W] -> (reconstruction of the same shape, posterior).

        sample=False decodes the mode; True decodes a draw with `noise` [N, z, H/f, W/f]. The latent normalisation is
        neither used nor changed.
        """
        posterior = self.posterior(x)
        z = posterior.sample(noise) if sample else posterior.mode()
        return self.decode_raw(z), posterior

    def pad(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] of any size -> sides continued by reflection, right and below, to the next multiple."""
        return pad_by_reflection(x, self.cfg.multiple, self.cfg.channels)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, memory: Memory = "normal") -> Tensor:
        """Pixels [N, 3, H, W] of any size -> reconstruction of the same size in [-1, 1]: `pad`, then crop back.

        memory as `encode_moments`.
        """
        return self.decode(self.encode(self.pad(x), memory), memory)[:, :, : x.shape[2], : x.shape[3]].clamp(-1, 1)


@torch.no_grad()
def _conv_grad(norm: nn.GroupNorm, conv: nn.Conv2d, h: Tensor, grad: Tensor) -> Tensor:
    """d loss / d conv.weight of conv(SiLU(norm(h))) with d loss / d output = grad, all in fp32."""
    with torch.autocast(h.device.type, enabled=False):
        x = F.silu(F.group_norm(h.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps))
        shape = conv.weight.shape
        return torch.nn.grad.conv2d_weight(x, shape, grad.float(), padding=conv.padding)  # type: ignore[arg-type]
