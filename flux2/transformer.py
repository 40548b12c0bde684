"""Flow-matching transformers on latents: SiT, LightningDiT, RAE's wide head and FLUX.2's blocks, one table of shapes.

t = 0 is data, t = 1 noise: z_t = (1 - t) x + t eps, and the model predicts v = eps - x. It reads normalised latents
[B, C, h, w] of any sides, patch 1; patch 2 is for published weights on raw latents. Sources: DiT (arXiv:2212.09748),
SiT (arXiv:2401.08740), REPA (arXiv:2410.06940), LightningDiT (arXiv:2501.01423), DDT (arXiv:2504.05741) as in RAE
(arXiv:2510.11690), black-forest-labs/flux2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flux2.transformer_blocks import (
    Block,
    FinalLayer,
    LabelEmbed,
    ParallelBlock,
    PatchEmbed,
    Rotary,
    TimeEmbed,
    rotary_positions,
    sincos_positions,
)

PROJECTOR_WIDTH = 2048  # REPA


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a transformer.

    width, depth, heads: of the blocks; repa_depth: the block, counted from 1, whose tokens are the features. Switches:
    norm "layer" (no parameters) or "rms"; mlp "gelu" or "swiglu" (2/3 of the hidden width); sincos and rope, the
    positions, which may be combined; qk_norm, an RMSNorm of queries and keys; time_embed "sinusoid" of time_scale * t
    or "fourier". head_width, head_depth, head_heads: RAE's wide head, none at depth 0. block "flux2": parallel blocks
    without bias under one shared modulation, of which SwiGLU, qk_norm and rope on a quarter of the channels an axis are
    parts, so that the switches for these do not apply.
    """

    width: int
    depth: int
    heads: int
    repa_depth: int
    patch: int = 1
    mlp_ratio: float = 4.0
    block: Literal["sit", "flux2"] = "sit"
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    sincos: bool = True
    rope: bool = False
    qk_norm: bool = False
    time_embed: Literal["sinusoid", "fourier"] = "sinusoid"
    time_scale: float = 1.0
    head_width: int = 0
    head_depth: int = 0
    head_heads: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("block", ("sit", "flux2")), ("norm", ("layer", "rms")), ("mlp", ("gelu", "swiglu")),
            ("time_embed", ("sinusoid", "fourier")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 1 <= self.repa_depth <= self.depth:
            raise ValueError(f"repa_depth: expected 1 to depth={self.depth}, got {self.repa_depth}")
        unit = 8 if self.block == "flux2" else 4 if self.rope else 1  # channels a head that positions divide among them
        self._check_width("width", self.width, self.heads, unit)
        if self.sincos and self.width % 4:
            raise ValueError(f"width: expected a multiple of 4 for sincos, got {self.width}")
        if self.head_depth:
            self._check_width("head_width", self.head_width, self.head_heads, unit)
        if self.block == "flux2" and (self.head_depth or self.norm == "rms" or self.mlp == "swiglu" or self.qk_norm):
            raise ValueError("block 'flux2' has its own norms and SwiGLU: expected norm, mlp, qk_norm and head unset")

    @staticmethod
    def _check_width(name: str, width: int, heads: int, unit: int) -> None:
        if heads < 1 or width < 1 or width % (heads * unit):
            raise ValueError(f"{name}: expected a positive multiple of {heads} heads x {unit}, got {width}")


# fmt: off
_LIGHTNING = {"norm": "rms", "mlp": "swiglu", "rope": True}
_FLUX2 = {"block": "flux2", "sincos": False, "mlp_ratio": 3.0, "time_scale": 1000.0}
TRANSFORMERS: dict[str, TransformerConfig] = {
    "sit-tiny":        TransformerConfig(width=192,  depth=6,  heads=3,  repa_depth=2),
    "sit-s":           TransformerConfig(width=384,  depth=12, heads=6,  repa_depth=4),
    "sit-b":           TransformerConfig(width=768,  depth=12, heads=12, repa_depth=4),
    "sit-l":           TransformerConfig(width=1024, depth=24, heads=16, repa_depth=8),
    "sit-xl":          TransformerConfig(width=1152, depth=28, heads=16, repa_depth=8),
    "lightningdit-b":  TransformerConfig(width=768,  depth=12, heads=12, repa_depth=4, **_LIGHTNING),
    "lightningdit-l":  TransformerConfig(width=1024, depth=24, heads=16, repa_depth=8, **_LIGHTNING),
    "lightningdit-xl": TransformerConfig(width=1152, depth=28, heads=16, repa_depth=8, **_LIGHTNING),
    "ddt-xl":          TransformerConfig(width=1152, depth=28, heads=16, repa_depth=8, **_LIGHTNING,
                                         time_embed="fourier", head_width=2048, head_depth=2, head_heads=16),
    "flux2-tiny":      TransformerConfig(width=192,  depth=6,  heads=3,  repa_depth=2, **_FLUX2),
}
# fmt: on


class RepaProjector(nn.Sequential):
    """Linear-SiLU-Linear-SiLU-Linear from the model's features to a teacher's: [..., width] -> [..., channels]."""

    def __init__(self, width: int, channels: int, hidden: int = PROJECTOR_WIDTH) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
        )
        self.apply(_xavier)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """Predicts the velocity of latents of `in_channels` channels, given time and a class of `num_classes`.

    Fresh weights are DiT's: Xavier, 0.02 for time and labels, modulations and the last layer zero, so that each block
    is the identity and v is 0. backend: that of `kernels.attention`. `model.checkpoint = True` keeps only the blocks'
    inputs for backward and computes the rest again.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        in_channels: int,
        num_classes: int = 1000,
        *,
        backend: str = "auto",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 0:
            raise ValueError(
                f"SiT: expected in_channels >= 1 and num_classes >= 0, got in_channels={in_channels}, "
                f"num_classes={num_classes}"
            )
        self.cfg, self.in_channels, self.num_classes, self.checkpoint = cfg, in_channels, num_classes, checkpoint
        flux2, head = cfg.block == "flux2", cfg.head_depth > 0
        switches = {"norm": cfg.norm, "mlp": cfg.mlp, "qk_norm": cfg.qk_norm, "backend": backend}
        embed = PatchEmbed(in_channels, cfg.width, cfg.patch, bias=not flux2)
        if head:  # the head reads the latent anew
            self.s_embedder, embed = embed, PatchEmbed(in_channels, cfg.head_width, cfg.patch)
            self.s_projector = nn.Linear(cfg.width, cfg.head_width) if cfg.width != cfg.head_width else nn.Identity()
        self.x_embedder = embed
        self.t_embedder = TimeEmbed(cfg.width, cfg.time_embed, cfg.time_scale, bias=not flux2)
        self.y_embedder = LabelEmbed(num_classes, cfg.width)
        if flux2:
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 3 * cfg.width, bias=False))
            blocks = [ParallelBlock(cfg.width, cfg.heads, cfg.mlp_ratio, backend=backend) for _ in range(cfg.depth)]
        else:
            blocks = [Block(cfg.width, cfg.heads, cfg.mlp_ratio, **switches) for _ in range(cfg.depth)]
            blocks += [Block(cfg.head_width, cfg.head_heads, cfg.mlp_ratio, **switches) for _ in range(cfg.head_depth)]
        self.blocks = nn.ModuleList(blocks)
        last_width = cfg.head_width if head else cfg.width
        self.final_layer = FinalLayer(last_width, in_channels * cfg.patch**2, cfg.norm, bias=not flux2)
        self._kept: dict[tuple, tuple[Tensor | None, Rotary | None, Rotary | None]] = {}
        self._init_weights()

    def _init_weights(self) -> None:
        self.apply(_xavier)
        for module in self.modules():
            if isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.flatten(1))  # as the linear map it is
                if module.proj.bias is not None:
                    nn.init.zeros_(module.proj.bias)
            elif isinstance(module, (TimeEmbed, LabelEmbed)):
                for weight in module.parameters():
                    if weight.ndim == 2:
                        nn.init.normal_(weight, std=0.02)
        for name, p in self.named_parameters():
            if "modulation" in name or name.startswith("final_layer.linear."):
                nn.init.zeros_(p)

    def _positions(self, h: int, w: int, z: Tensor) -> tuple[Tensor | None, Rotary | None, Rotary | None]:
        """Of a grid: sines [h w, width] in the weights' dtype, rotary tables of trunk and head in at least fp32.

        Kept for the next call; inside torch.compile, or on tensors that only stand in, they are part of the graph.
        """
        dtype = self.x_embedder.proj.weight.dtype
        key = (h, w, z.device, dtype)
        keeps = type(z) is Tensor and not torch.compiler.is_compiling()
        if keeps and key in self._kept:
            return self._kept[key]
        cfg, acc = self.cfg, torch.promote_types(dtype, torch.float32)
        with torch.inference_mode(False):  # tables made while sampling serve training, too
            flux2 = cfg.block == "flux2"
            sincos = sincos_positions(h, w, cfg.width, z.device, acc).to(dtype) if cfg.sincos else None
            trunk = head = None
            if cfg.rope or flux2:
                trunk = rotary_positions(h, w, cfg.width // cfg.heads, flux2, z.device, acc)
                if cfg.head_depth:
                    head = rotary_positions(h, w, cfg.head_width // cfg.head_heads, False, z.device, acc)
        if keeps:
            if len(self._kept) >= 8:  # grids of many sizes
                self._kept.clear()
            self._kept[key] = (sincos, trunk, head)
        return sincos, trunk, head

    def _run(self, block: nn.Module, x: Tensor, c: Tensor, rotary: Rotary | None) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, c, rotary, use_reentrant=False)
        return block(x, c, rotary)

    def _check(self, z: Tensor, t: Tensor, y: Tensor | None, drop: Tensor | None) -> None:
        multiple = self.cfg.patch
        if z.ndim != 4 or z.shape[1] != self.in_channels or not z.is_floating_point():
            raise ValueError(
                f"SiT: z: expected floating-point [B, {self.in_channels}, h, w], got {z.dtype} {list(z.shape)}"
            )
        if 0 in z.shape[2:] or z.shape[2] % multiple or z.shape[3] % multiple:
            raise ValueError(f"SiT: z: sides must be positive multiples of {multiple}, got {z.shape[2]}x{z.shape[3]}")
        if t.shape not in ((), (len(z),)) or not t.is_floating_point():
            raise ValueError(f"SiT: t: expected floating-point [{len(z)}] or [], got {t.dtype} {list(t.shape)}")
        if y is not None and (y.shape != (len(z),) or y.is_floating_point() or y.dtype == torch.bool):
            raise ValueError(f"SiT: y: expected integers [{len(z)}], got {y.dtype} {list(y.shape)}")
        if drop is not None and (drop.shape != (len(z),) or drop.dtype != torch.bool):
            raise ValueError(f"SiT: drop: expected bool [{len(z)}], got {drop.dtype} {list(drop.shape)}")

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        return_features: bool = False,
        drop: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Latents z [B, C, h, w] at times t, [B] or [], in [0, 1], of classes y [B] -> velocity v, like z.

        y: integers below num_classes, or num_classes for no class, which y=None means for all. drop: bool [B], true
        where the class is to be left out for classifier-free guidance; the caller draws it, nothing here is random.
        return_features: (v, tokens [B, T, D] after block repa_depth), T row by row; the tokens are in the weights'
        dtype, under autocast too. ValueError for other shapes and dtypes, naming expected and got.
        """
        self._check(z, t, y, drop)
        cfg, weight = self.cfg, self.x_embedder.proj.weight
        h, w = z.shape[2] // cfg.patch, z.shape[3] // cfg.patch
        sincos, rotary, head_rotary = self._positions(h, w, z)

        if y is None:
            y = torch.full((len(z),), self.num_classes, device=z.device)
        elif drop is not None:
            y = torch.where(drop, self.num_classes, y)
        time = self.t_embedder(t.expand(len(z))).unsqueeze(1)
        c = time + self.y_embedder(y).unsqueeze(1)  # [B, 1, D]
        if cfg.head_depth:
            c = F.silu(c)  # besides the one in each modulation, as RAE's weights want it
        given = self.modulation(c) if cfg.block == "flux2" else c

        latent = z.to(weight.dtype)
        x = (self.s_embedder if cfg.head_depth else self.x_embedder)(latent).to(weight.dtype)
        if sincos is not None:
            x = x + sincos
        features, blocks = x, list(self.blocks)
        for i, block in enumerate(blocks[: cfg.depth], 1):
            x = self._run(block, x, given, rotary)
            if i == cfg.repa_depth:
                features = x
        if cfg.head_depth:
            c = self.s_projector(F.silu(time + x))  # [B, T, head width]
            x = self.x_embedder(latent).to(weight.dtype)
            for block in blocks[cfg.depth :]:
                x = self._run(block, x, c, head_rotary)
        v = self.final_layer(x, c).to(z.dtype)
        v = v.view(-1, h, w, cfg.patch, cfg.patch, self.in_channels).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)
        return (v, features) if return_features else v
