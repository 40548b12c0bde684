"""aten's convolution, with fp32 inside where a CPU has no products of the 16-bit dtype.

An x86 processor without AVX-512 BF16 or AMX unpacks bf16 in the inner loop of a convolution, and takes three to five
times as long as in fp32 (docs/log.md). There x and the weights are widened beforehand and the sums rounded once: what a
processor with bf16 products computes, for it sums in fp32 too. What autograd keeps stays 16 bits wide.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import autocast_dtype, multiplies, without_autocast

Sides = int | tuple[int, ...] | list[int]  # of a stride or a padding


def _dtype(x: Tensor) -> torch.dtype:
    """What a convolution of x computes in, fp64 also under autocast."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype


def in_fp32(x: Tensor) -> bool:
    """Whether a convolution of x, in the dtype that autocast gives it, is faster with fp32 inside.

    Not in what torch.export writes down, which may run elsewhere.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    return not multiplies(_dtype(x))


def _both(sides: Sides) -> list[int]:
    return [sides, sides] if isinstance(sides, int) else list(sides)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Any) -> Tensor:
    return F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), stride, padding).to(x.dtype)


def conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sides, padding: Sides, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias where `wanted`; differentiable."""
    wide = in_fp32(x)
    a, b, c = (t.float() for t in (dy, x, weight)) if wide else (dy, x, weight)
    grads = torch.ops.aten.convolution_backward(
        a, b, c, [weight.shape[0]] if wanted[2] else None, _both(stride), _both(padding), [1, 1], False, [0, 0], 1,
        wanted,
    )  # fmt: skip
    return tuple(g.to(x.dtype) if wide and g is not None else g for g in grads)  # pyright: ignore[reportReturnType]


class _Widened(torch.autograd.Function):
    """F.conv2d with fp32 inside, which keeps x and weight as they were given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, stride, padding):
        return _widened(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.stride, ctx.padding = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
        return *conv2d_backward(grads[0], x, weight, ctx.stride, ctx.padding, wanted), None, None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sides = 1, padding: Sides = 0) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding), faster where `in_fp32`. [N, C, H, W] -> [N, C_out, H', W']"""
    if not in_fp32(x):
        return F.conv2d(x, weight, bias, stride, padding)  # pyright: ignore[reportArgumentType]
    dtype = _dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    with without_autocast(x):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return _Widened.apply(x, weight, bias, stride, padding)  # pyright: ignore[reportReturnType]
        return _widened(x, weight, bias, stride, padding)
