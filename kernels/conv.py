"""aten's convolution, but where a CPU lacks what that needs: fp32 inside 16 bits, gradients of weights as products.

An x86 processor without AVX-512 BF16 or AMX unpacks bf16 in the inner loop of a convolution, and takes three to five
times as long as in fp32 (docs/log.md). There x and the weights are widened beforehand and the sums rounded once: what a
processor with bf16 products computes, for it sums in fp32 too. What autograd keeps stays 16 bits wide.

oneDNN has no fast gradient of the weights in channels_last below AVX-512. There it is a product of matrices for each
place of the kernel: in channels_last a shift of the picture is a shift of its rows in memory, so nothing is unfolded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import autocast_dtype, multiplies, vectors, without_autocast

WIDE = 128  # channels in and out from which products of matrices are faster (docs/log.md)

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


def by_products(x: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of the weights is faster as products of matrices; x is in channels_last, or a cut of it."""
    if x.device.type != "cpu" or vectors() != "AVX2" or torch.compiler.is_exporting():
        return False
    wide = min(weight.shape[:2]) >= WIDE and weight.shape[2:].numel() > 1
    return wide and x.ndim == 4 and x.stride(1) == 1 and (_dtype(x) == torch.float32 or in_fp32(x))


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: Sides, padding: Sides) -> Tensor:
    """That of F.conv2d(x, weight, None, stride, padding), as a product for each place of the kernel; differentiable.

    x is padded, and parted into stride x stride pictures, in each of which one step of the kernel is one pixel; dy is
    padded with zeros below and to the right to their size. Then rows of dy meet rows of x, as many further on as the
    place is from the corner, and what would meet across an edge meets a zero. dy [N, C_out, H', W'], x [N, C, H, W] ->
    as weight.
    """
    (down, right), (top, left) = _both(stride), _both(padding)
    (n, out, height, width), (high, wide) = dy.shape, weight.shape[2:]
    rows, columns = height + (high - 1) // down, width + (wide - 1) // right
    below, beside = rows * down - x.shape[2] - top, columns * right - x.shape[3] - left
    pictures = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, beside, top, below))
    pictures = pictures.unflatten(2, (columns, right)).unflatten(1, (rows, down)).permute(2, 4, 0, 1, 3, 5)
    pictures = pictures.reshape(down, right, n * rows * columns, x.shape[1])
    padded = F.pad(dy.permute(0, 2, 3, 1), (0, 0, 0, columns - width, 0, rows - height)).reshape(-1, out).t()
    places = []
    for i in range(high):
        for j in range(wide):
            shift = i // down * columns + j // right
            met = padded.shape[1] - shift
            places.append(padded[:, :met] @ pictures[i % down, j % right, shift:])
    return torch.stack(places, -1).unflatten(-1, (high, wide))


def conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sides, padding: Sides, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias where `wanted`; differentiable."""
    wide, products, of_bias = in_fp32(x), wanted[1] and by_products(x, weight), False
    a, b, c = (t.float() for t in (dy, x, weight)) if wide else (dy, x, weight)
    if products:
        wanted, of_bias = [wanted[0], False, False], wanted[2]  # oneDNN has the bias's by way of the weights'
    grads = torch.ops.aten.convolution_backward(
        a, b, c, [weight.shape[0]] if wanted[2] else None, _both(stride), _both(padding), [1, 1], False, [0, 0], 1,
        wanted,
    )  # fmt: skip
    if products:
        with without_autocast(x):
            bias = a.sum((0, 2, 3)) if of_bias else None
            grads = grads[0], weight_gradient(a, b, c, stride, padding), bias
    return tuple(g.to(x.dtype) if wide and g is not None else g for g in grads)  # pyright: ignore[reportReturnType]


class _Conv2d(torch.autograd.Function):
    """F.conv2d by what is faster here, which keeps x and weight as they were given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, stride, padding):
        run = _widened if in_fp32(x) else F.conv2d
        return run(x, weight, bias, stride, padding)

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
    """F.conv2d(x, weight, bias, stride, padding), faster where `in_fp32` or `by_products`.

    [N, C, H, W] -> [N, C_out, H', W']
    """
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if not (in_fp32(x) or (learns and by_products(x, weight))):
        return F.conv2d(x, weight, bias, stride, padding)  # pyright: ignore[reportArgumentType]
    dtype = _dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    with without_autocast(x):
        if learns:
            return _Conv2d.apply(x, weight, bias, stride, padding)  # pyright: ignore[reportReturnType]
        return _widened(x, weight, bias, stride, padding)
