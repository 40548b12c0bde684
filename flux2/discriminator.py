"""Networks that tell photographs from reconstructions: PatchGAN, and heads on a frozen vision transformer's tokens.

Both take pixels and return logits, positive for real, one for each patch. The losses on them are in adversarial.py.
Their norms are torch's own, not those of `kernels`: R1 differentiates twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from flux2.teachers import RANDOM, ViTConfig, build_vit

SLOPE = 0.2  # of every LeakyReLU here
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDOM_BACKBONE = "random-tiny"  # for tests and dry runs: random weights, 32 pixels
_TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
BACKBONES = {
    "dino-s/8": ViTConfig(model="vit_small_patch8_224.dino", channels=384, patch=8),
    RANDOM_BACKBONE: ViTConfig(model="vit_tiny_patch16_224", channels=32, patch=8, options=_TINY),
}


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004) as in LDM: [N, in_channels, H, W] -> logits [N, 1, h, w].

    n_layers convolutions of stride 2, then two of stride 1, all 4x4; widths `width` times 1, 2, 4, 8, 8, ... A logit
    sees 70x70 pixels with three layers. Weights start from N(0, 0.02). State-dict keys are those of LDM's
    NLayerDiscriminator (`main.0.weight`), whose weights load where norm is "batch", running statistics left out.

    norm: "group" (the default) normalises each picture by itself. "batch" is LDM's: a logit then depends on the other
    pictures of its batch and on whether real and fake share one, the result changes with gradient accumulation and
    with the number of GPUs (unless synchronised), and R1 is no sum over pictures. It uses the batch's own statistics in
    eval too: LDM's never leaves train mode. The statistics of either look at
    more than one patch, group norm's at the whole picture: the field above is that of the convolutions.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        width: int = 64,
        n_layers: int = 3,
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        super().__init__()
        if norm not in ("group", "batch"):
            raise ValueError(f"norm: expected group or batch, got {norm!r}")
        if n_layers < 1:
            raise ValueError(f"n_layers: expected at least 1, got {n_layers}")
        self.in_channels, self.n_layers = in_channels, n_layers
        widths = [width * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i in range(1, n_layers + 1):
            stride, before, after = 2 if i < n_layers else 1, widths[i - 1], widths[i]
            layers.append(nn.Conv2d(before, after, 4, stride, padding=1, bias=False))  # the norm has a bias
            groups, batch = math.gcd(32, after), norm == "batch"
            layers.append(nn.BatchNorm2d(after, track_running_stats=False) if batch else nn.GroupNorm(groups, after))
            layers.append(nn.LeakyReLU(SLOPE))
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; LDM's running statistics are passed over: nobody reads them, here or there."""
        unread = ("running_mean", "running_var", "num_batches_tracked")
        return super().load_state_dict({k: v for k, v in state_dict.items() if not k.endswith(unread)}, strict, assign)

    def forward(self, x: Tensor) -> Tensor:
        """ValueError if the channels are not `in_channels` or a side is too short for one logit."""
        shortest = 3 * 2**self.n_layers
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < shortest:
            raise ValueError(
                f"discriminator: expected [N, {self.in_channels}, H, W] with sides of at least {shortest},"
                f" got {list(x.shape)}"
            )
        return self.main(x)


class SpectralConv1d(nn.Conv1d):
    """nn.Conv1d whose weight, to be wrapped in spectral_norm, is normalised in fp32 also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            weight = self.weight
        return self._conv_forward(input, weight, self.bias)


def _block(channels: int, kernel_size: int) -> nn.Sequential:
    conv = SpectralConv1d(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    # a group a channel: each picture's channel by its own mean and variance over tokens, which is RAE's local
    # BatchNorm of virtual batch 1
    return nn.Sequential(spectral_norm(conv), nn.GroupNorm(channels, channels, eps=1e-6), nn.LeakyReLU(SLOPE))


class TokenHead(nn.Module):
    """Tokens [N, D, L] -> logits [N, 1, L]: 1x1 block, residual block of kernel 9 around the sequence, 1x1."""

    def __init__(self, channels: int, kernel_size: int = 9) -> None:
        super().__init__()
        self.point, self.line = _block(channels, 1), _block(channels, kernel_size)
        self.out = spectral_norm(SpectralConv1d(channels, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.point(tokens)
        return self.out((self.line(h) + h) / math.sqrt(2))


class ViTDiscriminator(nn.Module):
    """RAE's discriminator (arXiv:2510.11690): five heads on the patch tokens of a frozen vision transformer.

    backbone: a timm VisionTransformer, e.g. `load_backbone("dino-s/8")`; it is set to eval and its weights take no
    gradient, while the gradient of the logits still flows through it to the pixels. One head each reads the tokens
    after the blocks that end a quarter of the depth (2, 5, 8 and 11 of twelve), before the final norm; the fifth
    reads the last of them again.

    The backbone is no submodule: `parameters`, `state_dict`, `requires_grad_`, `train` and wrappers such as DDP see
    the heads alone, so that what is trained and what is saved is all of this module. `.to(...)` moves both. In train
    mode a forward also takes one power iteration of the spectral norms; in eval mode (the generator's phase) none.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._frozen: tuple[Any] = (backbone.eval().requires_grad_(False),)  # a tuple, so that it is not registered
        depth, side = len(self.backbone.blocks), self.backbone.patch_embed.img_size[0]
        self.side: int = side
        self.blocks = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.heads = nn.ModuleList(TokenHead(self.backbone.embed_dim) for _ in range(len(self.blocks) + 1))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def backbone(self) -> Any:
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ViTDiscriminator:
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    def tokens(self, x: Tensor) -> list[Tensor]:
        """Pixels [N, 3, H, W] -> what each head reads, five times [N, D, L]. Bilinear, without antialiasing, as RAE."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 pixels have fewer than 8 bits left once resized
        x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        x = (0.5 * x + 0.5 - self.mean) / self.std
        maps = self.backbone.forward_intermediates(x, self.blocks, output_fmt="NLC", intermediates_only=True)
        return [tokens.transpose(1, 2) for tokens in (*maps, maps[-1])]

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1], any size -> logits [N, 5, L], a row for each head and L patches."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"discriminator: expected pixels [N, 3, H, W], got {list(x.shape)}")
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, self.tokens(x), strict=True)], dim=1)


def load_backbone(name: str = "dino-s/8", weights: str | Path = "") -> nn.Module:
    """A timm VisionTransformer for `ViTDiscriminator`; "random-tiny" has random weights, the same each time.

    weights: "" takes timm's, from its cache or the hub; a local file under timm's key names, which are DINO's own as
    well; "random" is for tests. FileNotFoundError without that file; ValueError, in one sentence, on an unknown name,
    on a file of another network, or if weights cannot be had.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")
    if name == RANDOM_BACKBONE:
        if weights not in ("", RANDOM):
            raise ValueError(f"backbone {name}: has no weights to load, got {weights}")
        weights = RANDOM
    return build_vit(BACKBONES[name], weights, option="--gan.backbone-weights")
