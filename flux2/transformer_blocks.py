"""Parts of the flow-matching transformers: embeddings, positions, attention, blocks, last layer.

Shapes: tokens x [B, T, D], row by row; conditioning c [B, 1, D], or [B, T, D] where each token has its own; rotary
tables (cos, sin), each [T, head dimension / 2]. Parameter names are those of the SiT and LightningDiT code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.latents import patchify
from kernels import attention

NORM_EPS = 1e-6  # every norm
TIME_FEATURES = 256
FLUX2_THETA = 2000.0  # rotary base of FLUX.2; 10,000 elsewhere

Rotary = tuple[Tensor, Tensor]


def time_frequencies(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[128] angular frequencies 10000^(-i/128) of the sinusoid of t (DiT, SiT)."""
    half = TIME_FEATURES // 2
    return torch.exp(-math.log(10000.0) / half * torch.arange(half, device=device, dtype=dtype))


def sincos_positions(h: int, w: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[h w, width]: of the column, then of the row: width/4 sines, as many cosines, frequencies 10000^(-4i/width).

    Columns come first in DiT and all that follow it, because MAE's code meshes its grid the other way round.
    """
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, device=device, dtype=dtype) / quarter)
    rows, columns = (torch.arange(n, device=device, dtype=dtype)[:, None] * omega for n in (h, w))  # [n, width/4]
    of_rows, of_columns = (torch.cat((a.sin(), a.cos()), 1) for a in (rows, columns))
    both = (of_columns.expand(h, -1, -1), of_rows[:, None].expand(-1, w, -1))
    return torch.cat(both, 2).flatten(0, 1)


def rotary_positions(h: int, w: int, head_dim: int, flux2: bool, device: torch.device, dtype: torch.dtype) -> Rotary:
    """(cos, sin), each [h w, head_dim/2]: the angles by which pairs of neighbouring channels turn.

    LightningDiT: half of the pairs turn with the row, half with the column. FLUX.2 gives a quarter each to the ids
    (t, row, column, l); in one image t = l = 0, so that the first and the last quarter do not turn.
    """
    axes, theta = (4, FLUX2_THETA) if flux2 else (2, 10000.0)
    pairs = head_dim // (2 * axes)
    omega = theta ** (-torch.arange(pairs, device=device, dtype=dtype) / pairs)
    rows, columns = (torch.arange(n, device=device, dtype=dtype)[:, None] * omega for n in (h, w))
    angles = torch.cat((rows[:, None].expand(-1, w, -1), columns.expand(h, -1, -1)), 2).flatten(0, 1)
    if flux2:
        angles = F.pad(angles, (pairs, pairs))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [B, H, T, head_dim], pairs of channels (2i, 2i + 1) turned by their token's angles, in the tables' dtype."""
    cos, sin = rotary
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x [B, T, D], the others broadcastable."""
    return x * (1 + scale) + shift


def make_norm(kind: str, width: int) -> nn.Module:
    """LayerNorm without parameters ("layer") or RMSNorm with a weight ("rms")."""
    return nn.RMSNorm(width, NORM_EPS) if kind == "rms" else nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over a head's channels, for queries and keys: [B, H, T, head_dim] -> same, in x's dtype."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)  # under autocast x is bf16, the weight is not


class PatchEmbed(nn.Module):
    """Latents [B, C, p h, p w] -> tokens [B, h w, D], a linear map of p x p patches kept as a convolution's weight."""

    def __init__(self, in_channels: int, width: int, patch: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch, bias=bias)
        self.patch = patch

    def forward(self, z: Tensor) -> Tensor:
        tokens = patchify(z, self.patch).flatten(2).transpose(1, 2)
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbed(nn.Module):
    """t [B] -> [B, D]: features of scale * t, then Linear-SiLU-Linear.

    "sinusoid": 128 cosines, then 128 sines, of `time_frequencies` (DiT). "fourier": 256 sines, then 256 cosines, of
    2 pi W, where W is drawn once from a normal distribution and stays (RAE).
    """

    def __init__(self, width: int, kind: str = "sinusoid", scale: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        self.kind, self.scale = kind, scale
        if kind == "fourier":
            self.register_buffer("W", torch.randn(TIME_FEATURES))
        features = TIME_FEATURES * (2 if kind == "fourier" else 1)
        self.mlp = nn.Sequential(nn.Linear(features, width, bias), nn.SiLU(), nn.Linear(width, width, bias))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        t = self.scale * t.to(torch.promote_types(dtype, torch.float32))[:, None]
        if self.kind == "fourier":
            angles = 2 * math.pi * t * self.get_buffer("W").to(t.dtype)
            features = torch.cat((angles.sin(), angles.cos()), 1)
        else:
            angles = t * time_frequencies(t.device, t.dtype)
            features = torch.cat((angles.cos(), angles.sin()), 1)
        return self.mlp(features.to(dtype))


class LabelEmbed(nn.Module):
    """Classes [B] -> [B, D]; row num_classes of the table is "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention with optional norms of queries and keys. [B, T, D] -> same"""

    def __init__(self, width: int, heads: int, qk_norm: bool, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (HeadNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        return self.proj(attend(self.qkv(x), self.heads, self.q_norm, self.k_norm, rotary, self.backend))


def attend(
    qkv: Tensor, heads: int, q_norm: nn.Module, k_norm: nn.Module, rotary: Rotary | None, backend: str
) -> Tensor:
    """qkv [B, T, 3 D], ordered (q k v), head, channel -> [B, T, D]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, head_dim] each
    q, k = q_norm(q), k_norm(k)
    if rotary is not None:
        q, k = rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype)
    return attention(q, k, v, backend=backend).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear. [B, T, D] -> same"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Linear of SiLU(a) * b, where a and b are the halves of a Linear. [B, T, D] -> same"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """adaLN-zero block of DiT: attention, then MLP, each normed, modulated and gated by c. (x, c, rotary) -> x"""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, norm: str, mlp: str, qk_norm: bool, backend: str
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, width)
        self.attn = Attention(width, heads, qk_norm, backend)
        self.norm2 = make_norm(norm, width)
        hidden = int(mlp_ratio * width)
        # Two thirds: three matrices instead of two, at as many parameters
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if mlp == "swiglu" else Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, rotary: Rotary | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rotary)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ParallelBlock(nn.Module):
    """FLUX.2's single-stream block: attention and SwiGLU side by side, without bias. (x, modulation, rotary) -> x

    linear1 gives q, k, v and both halves of the SwiGLU; linear2 takes attention's output and the SwiGLU's together.
    modulation: (shift, scale, gate), [B, 1, 3 D], which all blocks share. Facts: black-forest-labs/flux2.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.split = (3 * width, 2 * int(mlp_ratio * width))
        self.norm = make_norm("layer", width)
        self.linear1 = nn.Linear(width, sum(self.split), bias=False)
        self.q_norm, self.k_norm = HeadNorm(width // heads), HeadNorm(width // heads)
        self.linear2 = nn.Linear(width + self.split[1] // 2, width, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, rotary: Rotary | None) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        qkv, hidden = self.linear1(modulate(self.norm(x), shift, scale)).split(self.split, dim=-1)
        attended = attend(qkv, self.heads, self.q_norm, self.k_norm, rotary, self.backend)
        a, b = hidden.chunk(2, dim=-1)
        return x + gate * self.linear2(torch.cat((attended, F.silu(a) * b), -1))


class FinalLayer(nn.Module):
    """Norm, modulation, Linear: [B, T, D] -> [B, T, p^2 C], ordered (row, column, channel)."""

    def __init__(self, width: int, out_features: int, norm: str, bias: bool = True) -> None:
        super().__init__()
        self.norm_final = make_norm(norm, width)
        self.linear = nn.Linear(width, out_features, bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
