"""Building blocks of the convolutional autoencoders, on the fused operations of `kernels` or on stock modules.

A block maps (x, stats) to (y, stats): an activation [N, C, h, w], and the mean and variance of its groups, fp32
[N, G, 2], where its producer left them, else None. Each block's `backend` chooses how:

    "auto"    fused operations. Where Triton runs, they also take the biases of convolutions, and statistics travel with
              the activation. On a CPU convolutions add their bias for nothing, and a norm finds its statistics itself.
    "triton"  the same, or a ValueError that says why Triton cannot run.
    "torch"   stock modules: SiLU after GroupNorm, convolution after interpolation. Their forward hooks run.

All three are one function up to rounding, of the same parameters under the same names.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kernels import add_bias_group_stats, group_norm, norm_silu_conv2d, upsample_conv2d
from kernels.conv import by_products, conv2d, in_fp32
from kernels.dispatch import resolve
from kernels.tiles import unsupported

NORM_EPS = 1e-6  # every GroupNorm


class Block(nn.Module):
    """What the blocks share: the backend, and what it does with the bias of a convolution."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.backend = "auto"

    def runs_triton(self, x: Tensor) -> bool:
        """Whether the fused operations run on x in Triton, and so take biases and hand on statistics."""
        if self.backend == "torch":
            return False
        return resolve(type(self).__name__, self.backend, x, unsupported=unsupported) == "triton"

    def norm_silu_conv(
        self,
        norm: nn.GroupNorm,
        conv: nn.Conv2d,
        x: Tensor,
        stats: Tensor | None = None,
        input_bias: Tensor | None = None,
        with_bias: bool = True,
    ) -> Tensor:
        """conv(SiLU(norm(x + input_bias))), with conv's bias or without; conv has one stride and one padding."""
        if self.backend == "torch":
            assert input_bias is None and with_bias
            return conv(F.silu(norm(x)))
        stride, padding = conv.stride[0], int(conv.padding[0])
        return norm_silu_conv2d(
            x, norm.weight, norm.bias, conv.weight, conv.bias if with_bias else None, norm.num_groups, norm.eps, stride,
            padding, stats, input_bias, self.backend,
        )  # fmt: skip

    def add(self, y: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """y + residual + bias and its statistics, in one pass in Triton."""
        if residual is not None and residual.dtype != y.dtype:  # autocast, with a first block's fp32 input
            y = y + residual
            return (y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)), None
        return add_bias_group_stats(y, residual, bias, self.num_groups, self.backend)

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """conv(x), by `kernels.conv.conv2d` where that is faster."""
        if self.backend == "torch" or not (in_fp32(x) or by_products(x, conv.weight)):
            return conv(x)
        return conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)  # pyright: ignore[reportArgumentType]

    def conv_add(self, conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """conv(x) + residual; with its statistics where one pass gives bias, sum and statistics."""
        if self.runs_triton(x):
            return self.add(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), residual, conv.bias)
        y = self.convolve(conv, x)
        return y if residual is None else residual + y, None


class ResBlock(Block):
    """GroupNorm-SiLU-conv3x3 twice, plus a skip that is 1x1 where the width changes. [N, in, h, w] -> [N, out, h, w]"""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__(num_groups)
        self.norm1 = nn.GroupNorm(num_groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.same_width = in_channels == out_channels

    def forward(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if not self.runs_triton(x):
            h = self.norm_silu_conv(self.norm1, self.conv1, x, stats)
            h = self.norm_silu_conv(self.norm2, self.conv2, h)
            skip = x if self.same_width else self.convolve(self.nin_shortcut, x)
            mine = self.backend != "torch" and h.dtype == skip.dtype and not h.requires_grad  # nobody else has h
            return (h.add_(skip) if mine else h + skip), None
        h = self.norm_silu_conv(self.norm1, self.conv1, x, stats, with_bias=False)
        h = self.norm_silu_conv(self.norm2, self.conv2, h, input_bias=self.conv1.bias, with_bias=False)
        skip, bias = x, self.conv2.bias
        if not self.same_width:
            assert bias is not None and self.nin_shortcut.bias is not None
            skip, bias = F.conv2d(x, self.nin_shortcut.weight), bias + self.nin_shortcut.bias
        return self.add(h, skip, bias)


class AttnBlock(Block):
    """Single-head self-attention over all positions, head dimension = channels. [N, C, h, w] -> same"""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(num_groups)
        self.norm = nn.GroupNorm(num_groups, channels, NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        norm = self.norm
        if self.backend == "torch":
            normed = norm(x)
        else:
            normed = group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, stats, backend=self.backend)
        q, k, v = (
            self.convolve(m, normed).flatten(2).transpose(1, 2).unsqueeze(1) for m in (self.q, self.k, self.v)
        )  # [N, 1, hw, C]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.conv_add(self.proj_out, out.squeeze(1).transpose(1, 2).reshape(x.shape), residual=x)


class Downsample(Block):
    """Halves the sides: zeros on the right and below, then conv3x3 of stride 2. [N, C, h, w] -> [N, C, h/2, w/2]"""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(num_groups)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.conv_add(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsample(Block):
    """Doubles the sides: nearest neighbour, then conv3x3. [N, C, h, w] -> [N, C, 2h, 2w]"""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(num_groups)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.backend == "torch":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), None
        if not self.runs_triton(x):
            return upsample_conv2d(x, self.conv.weight, self.conv.bias), None
        return self.add(upsample_conv2d(x, self.conv.weight, None), None, self.conv.bias)


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level. [N, C, h, w] -> same"""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResBlock(channels, channels, num_groups)

    def forward(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.block_2(*self.attn_1(*self.block_1(x, stats)))


class Level(nn.Module):
    """Residual blocks widths[0] -> widths[1] -> ..., attention after each where asked, then a change of sides.

    [N, widths[0], h, w] -> [N, widths[-1], h', w'], sides halved ("down"), doubled ("up") or as they are.
    """

    def __init__(self, widths: list[int], *, attention: bool, num_groups: int, resample: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(i, o, num_groups) for i, o in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(o, num_groups) for o in widths[1:] if attention)
        self.resample = resample
        if resample == "down":
            self.downsample = Downsample(widths[-1], num_groups)
        elif resample == "up":
            self.upsample = Upsample(widths[-1], num_groups)

    def forward(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        for j, block in enumerate(self.block):
            x, stats = block(x, stats)
            if self.attn:
                x, stats = self.attn[j](x, stats)
        if self.resample == "down":
            return self.downsample(x)
        return self.upsample(x) if self.resample == "up" else (x, stats)
