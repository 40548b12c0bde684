"""RAE's decoder: a plain vision transformer from latent positions to blocks of pixels, as the decoder of ViT-MAE.

Layers, order and constants follow bytetriper/RAE `stage1/decoders` (which follows He et al. 2022, arXiv:2111.06377):
pre-norm blocks with LayerNorm eps 1e-12 and exact GELU, fixed 2D sine-cosine positions, and a trainable class token,
dropped at the end. Attention is torch's own: 257 tokens are too few for another kernel to matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-12
PATCH = 16  # pixels a latent position covers along a side


@dataclass(frozen=True, kw_only=True)
class ViTDecoderConfig:
    """width: channels of a token, a multiple of 4 and of heads; mlp: hidden width of a block's second half."""

    width: int
    depth: int
    heads: int
    mlp: int


# fmt: off
DECODERS: dict[str, ViTDecoderConfig] = {
    "tiny": ViTDecoderConfig(width=192,  depth=4,  heads=3,  mlp=768),
    "b":    ViTDecoderConfig(width=768,  depth=12, heads=12, mlp=3072),
    "l":    ViTDecoderConfig(width=1024, depth=24, heads=16, mlp=4096),
    "xl":   ViTDecoderConfig(width=1152, depth=28, heads=16, mlp=4096),
}
# fmt: on


def sincos_positions(h: int, w: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions of an h x w grid, fp32 [h w, width]: the first half of the channels says the column, the second
    the row, each as sines and then cosines of frequencies 1 down to about 1/10000."""
    omega = 10000.0 ** -(torch.arange(width // 4, device=device) / (width // 4))
    rows, columns = (torch.arange(n, device=device)[:, None] * omega for n in (h, w))
    rows, columns = (torch.cat((angle.sin(), angle.cos()), 1) for angle in (rows, columns))  # [h or w, width / 2]
    halves = columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)
    return torch.cat(halves, 2).flatten(0, 1)


def blocks_of(x: Tensor) -> Tensor:
    """Pixels [N, 3, 16 h, 16 w] -> [N, h w, 16 16 3]: row, column, colour of each block."""
    x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [N, 3, h, 16, w, 16]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def pixels_of(blocks: Tensor, h: int, w: int) -> Tensor:
    """Inverse of `blocks_of`, for a grid of h x w blocks."""
    x = blocks.unflatten(2, (PATCH, PATCH, 3)).unflatten(1, (h, w))  # [N, h, w, 16, 16, 3]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class ViTBlock(nn.Module):
    """[N, T, D] -> [N, T, D]: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ViTDecoderConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.norm1 = nn.LayerNorm(cfg.width, NORM_EPS)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)
        self.norm2 = nn.LayerNorm(cfg.width, NORM_EPS)
        self.fc1 = nn.Linear(cfg.width, cfg.mlp)
        self.fc2 = nn.Linear(cfg.mlp, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # [N, T, 3, H, D / H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViTDecoder(nn.Module):
    """Raw latents [N, C, h, w] -> pixels [N, 3, 16 h, 16 w], in the encoder's normalisation; any grid."""

    def __init__(self, cfg: ViTDecoderConfig, in_channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels, cfg.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, NORM_EPS)
        self.pred = nn.Linear(cfg.width, PATCH * PATCH * 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.with_features(z)[0]

    def with_features(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(pixels, h): h [N, h w, D] is what `pred`, the last layer, reads."""
        h, w = z.shape[2:]
        x = self.embed(z.flatten(2).transpose(1, 2))
        x = x + sincos_positions(h, w, x.shape[2], x.device).to(x.dtype)
        x = torch.cat((self.cls_token.to(x.dtype).expand(len(x), -1, -1), x), 1)  # at no position: zeros are added
        for block in self.blocks:
            x = block(x)
        features = self.norm(x[:, 1:])
        return pixels_of(self.pred(features), h, w), features

    @torch.no_grad()
    def last_layer_grad(self, h: Tensor, grad: Tensor) -> Tensor:
        """Gradient of pred.weight, fp32 of its shape, where d loss / d pixels is `grad`; outside autograd."""
        with torch.autocast(h.device.type, enabled=False):
            outward = blocks_of(grad.float()).flatten(0, 1)  # [N h w, 768]
            return outward.T @ h.float().flatten(0, 1)
