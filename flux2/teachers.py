"""Teachers: frozen networks, or HOG, whose tokens a latent is aligned to. The ViTs here are RAE's encoders too.

A teacher maps pixels [N, 3, H, W] in [-1, 1] to tokens [N, D, H/patch, W/patch], fp32, one for each position of the
normalised latent; `patch` is the pixels a position covers along a side. HOG needs no weights; oriented gradients rival
learned targets for masked image modelling (MaskFeat, arXiv:2112.09133). The others are vision transformers of timm,
read as REPA reads its teacher (arXiv:2410.06940): pixels normalised as the network was trained, resized bicubically
until its own patch grid is the latent's, and its patch tokens taken after the final norm.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.compat import ensure_torchvision
from flux2.tensor_files import load_tensors, mismatch, nearest

RANDOM = "random"  # as `weights`: seeded random ones, for tests
POOLING = ("head.", "attn_pool.")  # what only timm's pooled output reads


@dataclass(frozen=True, kw_only=True)
class HOGConfig:
    """cell: pixels a histogram covers along a side; bins: unsigned orientations. Dalal & Triggs 2005; MaskFeat.

    eps: gradient magnitude below which a cell counts as flat.
    """

    cell: int = 8
    bins: int = 9
    eps: float = 0.02


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer of timm: its name and the tag of its weights, channels of its tokens, pixels they cover.

    options: arguments of timm's constructor that differ from the name's own.
    """

    model: str
    channels: int
    patch: int
    options: dict[str, Any] = field(default_factory=dict)


# fmt: off
VITS: dict[str, ViTConfig] = {
    "dinov2-s":     ViTConfig(model="vit_small_patch14_dinov2.lvd142m",            channels=384,  patch=14),
    "dinov2-b":     ViTConfig(model="vit_base_patch14_dinov2.lvd142m",             channels=768,  patch=14),
    "dinov2-l":     ViTConfig(model="vit_large_patch14_dinov2.lvd142m",            channels=1024, patch=14),
    "dinov2-s-reg": ViTConfig(model="vit_small_patch14_reg4_dinov2.lvd142m",       channels=384,  patch=14),
    "dinov2-b-reg": ViTConfig(model="vit_base_patch14_reg4_dinov2.lvd142m",        channels=768,  patch=14),
    "dinov2-l-reg": ViTConfig(model="vit_large_patch14_reg4_dinov2.lvd142m",       channels=1024, patch=14),
    "dinov3-s":     ViTConfig(model="vit_small_patch16_dinov3.lvd1689m",           channels=384,  patch=16),
    "dinov3-b":     ViTConfig(model="vit_base_patch16_dinov3.lvd1689m",            channels=768,  patch=16),
    "dinov3-l":     ViTConfig(model="vit_large_patch16_dinov3.lvd1689m",           channels=1024, patch=16),
    "clip-b/16":    ViTConfig(model="vit_base_patch16_clip_quickgelu_224.openai",  channels=768,  patch=16),
    "siglip2-b/16": ViTConfig(model="vit_base_patch16_siglip_gap_256.v2_webli",    channels=768,  patch=16),
    "mae-b/16":     ViTConfig(model="vit_base_patch16_224.mae",                    channels=768,  patch=16),
}
# fmt: on
TEACHERS: dict[str, HOGConfig | ViTConfig] = {"hog": HOGConfig(), **VITS}


class Teacher(nn.Module):
    """What all teachers share: no parameter takes a gradient, nothing passes one on, and `train` leaves it in eval.

    patch: pixels a token covers along a side; channels: D. Its weights are not a run's own: keep it outside the module
    that is trained and saved.
    """

    patch: int
    channels: int

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1], sides multiples of `patch` -> tokens [N, D, H/patch, W/patch], fp32."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % self.patch or x.shape[3] % self.patch:
            expected = f"[N, 3, H, W] with sides that are multiples of {self.patch}"
            raise ValueError(f"teacher: expected pixels {expected}, got {list(x.shape)}")
        return self.tokens(x.float())

    def tokens(self, x: Tensor) -> Tensor:
        """`forward` on checked fp32 pixels."""
        raise NotImplementedError


class HOGTeacher(Teacher):
    """Histograms of oriented gradients: 9 unsigned orientations per colour channel and 8-pixel cell.

    patch: a multiple of 8. Each histogram is L2-normalised, then its mean over orientations is taken off, so that a
    cell without structure is the zero vector. D = 3 * 9 * (patch / 8)^2. Computed in fp32 whatever autocast is on.
    """

    def __init__(self, patch: int = 16, cfg: HOGConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg or HOGConfig()
        if patch % self.cfg.cell:
            raise ValueError(f"HOG patch: expected a multiple of {self.cfg.cell} pixels, got {patch}")
        self.patch = patch
        self.channels = 3 * self.cfg.bins * (patch // self.cfg.cell) ** 2

    def tokens(self, x: Tensor) -> Tensor:
        num = self.cfg.bins
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        gx = 0.5 * (x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2])
        gy = 0.5 * (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1])
        magnitude = torch.sqrt(gx * gx + gy * gy)
        angle = torch.atan2(gy, gx) / math.pi * num  # in bins; orientation is angle modulo 180 degrees
        bins = torch.arange(num, device=x.device, dtype=x.dtype).view(1, 1, -1, 1, 1)
        distance = (angle.unsqueeze(2) - bins).remainder(num)  # circular, in [0, bins)
        share = (1 - torch.minimum(distance, num - distance)).clamp(min=0)  # linear between the two nearest bins
        votes = magnitude.unsqueeze(2) * share  # [N, 3, bins, H, W]
        cells = F.avg_pool2d(votes.flatten(1, 2), self.cfg.cell).unflatten(1, (3, num))  # [N, 3, bins, H/8, W/8]
        cells = cells / torch.sqrt(cells.square().sum(2, keepdim=True) + self.cfg.eps**2)
        cells = (cells - cells.mean(2, keepdim=True)).flatten(1, 2)
        return F.pixel_unshuffle(cells, self.patch // self.cfg.cell)


class ViTTeacher(Teacher):
    """Patch tokens of a vision transformer, class and register tokens dropped.

    Pixels are normalised by the network's own mean and std and resized (bicubic, as REPA and RAE do, without
    antialiasing) to `net_patch` pixels a position; resizing fp32, the network in its weights' type, or in autocast's
    where that is on. weights: "" for timm's pretrained, a file, or "random" (seeded; the caller says so to its user).
    plain_norm drops the final norm's weight and bias, as RAE does.
    """

    def __init__(
        self,
        cfg: ViTConfig,
        patch: int,
        weights: str | Path = "",
        *,
        plain_norm: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.net_patch, self.channels = patch, cfg.patch, cfg.channels
        self.net: Any = build_vit(cfg, weights)
        if plain_norm:
            self.net.norm = nn.LayerNorm(cfg.channels, eps=self.net.norm.eps, elementwise_affine=False)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.net.pretrained_cfg[name]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def tokens(self, x: Tensor) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        x = (0.5 * x + 0.5 - mean.float()) / std.float()
        grid = [side // self.patch for side in x.shape[2:]]
        if self.patch != self.net_patch:
            size = [n * self.net_patch for n in grid]
            x = F.interpolate(x, size, mode="bicubic", align_corners=False)
        tokens = self.net.forward_features(x.to(self.net.patch_embed.proj.weight.dtype))  # [N, prefix + h w, D]
        return tokens[:, self.net.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).float()


def build_vit(cfg: ViTConfig, weights: str | Path = "", option: str = "--teacher-weights") -> Any:
    """timm's network of `cfg`. weights: "" for timm's pretrained, a file, or "random" (the same each time).

    option: how the user names a file of weights. FileNotFoundError without that file; ValueError if weights cannot be
    had or are another network's.
    """
    with torch.random.fork_rng(devices=[]):  # so that the choice of network changes nothing that is drawn later
        torch.default_generator.manual_seed(0)
        net: Any = _create(cfg) if weights else _pretrained(cfg, option)
        if str(weights) == RANDOM and net.patch_embed.proj.bias is not None:
            nn.init.normal_(net.patch_embed.proj.bias)  # else the norms would take brightness out of a token
    if weights and str(weights) != RANDOM:
        _load(net, cfg, Path(weights))
    return net


def _create(cfg: ViTConfig, pretrained: bool = False) -> nn.Module:
    """timm's network without its classifier, for any grid of patches (position embeddings resampled in the forward)."""
    ensure_torchvision()
    import timm

    return timm.create_model(cfg.model, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **cfg.options)


def _pretrained(cfg: ViTConfig, option: str) -> nn.Module:
    try:
        return _create(cfg, pretrained=True)
    except Exception as error:  # the hub's client raises whatever its transport does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot get the weights of {cfg.model} ({reason}); pass a local file of them with {option} FILE"
        ) from None


def _load(net: nn.Module, cfg: ViTConfig, path: Path) -> None:
    """Sets the weights from a file in timm's names, or in the original release's where timm knows how to rename them.

    FileNotFoundError if there is none; ValueError, in one sentence, if it is no file of tensors or of another network.
    """
    tensors, _ = load_tensors(path)
    expected = net.state_dict()
    kernel = expected["patch_embed.proj.weight"]
    given = next(
        (v for k, v in tensors.items() if k.endswith(("patch_embed.proj.weight", "visual.conv1.weight"))), None
    )
    if given is not None and given.ndim == 4 and given.shape != kernel.shape:  # timm would resample it without a word
        raise ValueError(f"{path}: expected patches {list(kernel.shape)} of {cfg.model}, got {list(given.shape)}")
    rename = importlib.import_module(type(net).__module__).checkpoint_filter_fn
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints a line for each bias that DINOv3 does without
            renamed = rename(tensors, net)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not the weights of {cfg.model} ({str(error).splitlines()[0]})") from None
    renamed = {k: v for k, v in renamed.items() if not k.startswith(POOLING) or k in expected}
    if problems := mismatch(expected, renamed):
        raise ValueError(f"{path}: not the weights of {cfg.model}: {problems}")
    net.load_state_dict(renamed)


def build_teacher(
    name: str, patch: int, weights: str | Path = "", device: str | torch.device = "cpu"
) -> HOGTeacher | ViTTeacher:
    """The teacher `name`, a key of TEACHERS, for latent positions of `patch` pixels; frozen, in eval, on `device`.

    weights: "" takes timm's pretrained ones, from its cache or the hub; a .safetensors file, or a torch file of tensors
    alone, in timm's names or the original release's; "random" is for tests, and warns. FileNotFoundError without that
    file; ValueError on an unknown name, on weights of another network or that cannot be had, or weights for HOG.
    """
    if name not in TEACHERS:
        raise ValueError(f"teacher: expected one of {', '.join(TEACHERS)}, got {name!r}{nearest(name, TEACHERS)}")
    cfg = TEACHERS[name]
    if isinstance(cfg, HOGConfig):
        if weights:
            raise ValueError(f"teacher 'hog' is computed and has no weights, got {weights}")
        return HOGTeacher(patch, cfg=cfg).to(device)
    if str(weights) == RANDOM:
        warnings.warn(f"teacher {name!r} has random weights: alignment to it teaches nothing", stacklevel=2)
    return ViTTeacher(cfg, patch, weights).to(device)
