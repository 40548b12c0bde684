"""The two halves of a residual block: GroupNorm + SiLU + conv as one op, and what follows the conv in one pass.

`norm_silu_conv2d` keeps its input x and the statistics [N, G, 2] for backward, nothing else, and normalises x once more
there: plain modules keep three activations (the norm's input, SiLU's, the convolution's). Chen et al. 2016,
arXiv:1604.06174. The price is one pass of 4 bytes an element in bf16.

`add_bias_group_stats` adds the residual and the convolution's bias, and leaves the statistics of the sum for the next
norm. With the first convolution's bias folded into the second norm (`input_bias`), the passes over memory of a block,
in bf16 bytes an element, convolutions not counted:

    plain:  (bias 4, statistics 2, norm 4, SiLU 4) + (bias 4, residual 6, statistics 2, norm 4, SiLU 4) = 34
    fused:  (statistics 2, norm + SiLU 4)          + (residual + bias + statistics 6, norm + SiLU 4)    = 16
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .conv import conv2d, conv2d_backward
from .dispatch import autocast_dtype, call, resolve, tl, triton, without_autocast
from .group_norm import (
    NAMESPACE,
    check_norm,
    dense,
    detached,
    group_norm_silu_reference,
    stats_like,
    triton_backward,
    triton_forward,
)
from .group_norm_aten import as_laid_out, aten_backward, aten_forward
from .group_stats import merge_stats, store_partial_stats, welford
from .tiles import launch, place, plan, unsupported, walk
from .winograd import may_pay, winograd_conv2d

# --- reference -----------------------------------------------------------------------------------------------------


def norm_silu_conv2d_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    stride: int = 1,
    padding: int = 1,
    input_bias: Tensor | None = None,
) -> Tensor:
    """The definition."""
    h = group_norm_silu_reference(x, norm_weight, norm_bias, num_groups, eps, input_bias)
    return F.conv2d(h, weight, bias, stride, padding)


def add_bias_group_stats_reference(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor]:
    """The definition: the sum in fp32 (fp64 if given fp64), rounded once; statistics of what is stored."""
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.to(acc)
    if residual is not None:
        y = y + residual.to(acc)
    if bias is not None:
        y = y + bias.to(acc).view(-1, *[1] * (x.ndim - 2))
    y = y.to(x.dtype)
    size = math.prod(x.shape[2:]) * (x.shape[1] // num_groups)
    var, mean = torch.var_mean(y.detach().to(acc).reshape(x.shape[0], num_groups, size), dim=2, correction=0)
    return y, torch.stack((mean, var), dim=-1)


# --- kernel --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_sum(x_ptr, residual_ptr, bias, s, keep, x_ss, r_ss, HAS_RESIDUAL: tl.constexpr):
    """x + residual + bias at rows s, in fp32."""
    y = tl.load(x_ptr + s * x_ss, mask=keep, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + s * r_ss, mask=keep, other=0.0).to(tl.float32)
    return y + bias


@triton.jit(do_not_specialize=["chunks"])
def _add_bias_stats_kernel(
    x_ptr, residual_ptr, bias_ptr, y_ptr, partial_ptr, x_sn, x_sc, x_ss, r_sn, r_sc, r_ss, y_sn, y_sc, y_ss,
    C, L, chunk_rows, chunks, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x + residual + bias over one chunk, and the statistics of each channel of y as it is stored."""
    n, c, chunk, start, end = place(C, L, chunk_rows, chunks, BLOCK_C, False)
    x_ptr += n.to(tl.int64) * x_sn + c.to(tl.int64)[None, :] * x_sc
    y_ptr += n.to(tl.int64) * y_sn + c.to(tl.int64)[None, :] * y_sc
    if HAS_RESIDUAL:
        residual_ptr += n.to(tl.int64) * r_sn + c.to(tl.int64)[None, :] * r_sc
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    else:
        bias = tl.zeros([1, BLOCK_C], tl.float32)
    pivot = _load_sum(x_ptr, residual_ptr, bias, start.to(tl.int64), (c < C)[None, :], x_ss, r_ss, HAS_RESIDUAL)
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s0 in range(start, end, BLOCK_S):
        s = (s0 + tl.arange(0, BLOCK_S))[:, None]
        keep = (s < L) & (c < C)[None, :]
        y = _load_sum(x_ptr, residual_ptr, bias, s.to(tl.int64), keep, x_ss, r_ss, HAS_RESIDUAL)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + s.to(tl.int64) * y_ss, y, mask=keep)
        step = ((s0 - start) // BLOCK_S + 1).to(tl.float32)  # counted in a float it would cost a spill on sm_100
        mean, m2 = welford(y.to(tl.float32) - pivot, keep, step, mean, m2)
    store_partial_stats(partial_ptr, tl.sum(pivot, 0), mean, m2, n, c, chunk, chunks, start, end, C, BLOCK_S)


def _triton_add(x: Tensor, residual: Tensor | None, bias: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor]:
    p = plan(x)
    y = torch.empty_like(x)
    r_strides = (0, 0, 0) if residual is None else walk(residual)
    if residual is not None and r_strides is None:
        residual = torch.empty_like(x).copy_(residual)
        r_strides = walk(residual)
    y_strides = walk(y)
    assert r_strides is not None and y_strides is not None
    partial = torch.empty(p.n, p.chunks, 3, p.channels, dtype=torch.float32, device=x.device)
    stats = stats_like(x, num_groups)
    launch(
        _add_bias_stats_kernel, p.programs, x, residual, bias, y, partial, *p.strides, *r_strides, *y_strides,
        p.channels, p.rows, p.chunk_rows, p.chunks, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None,
        BLOCK_S=p.tiles.rows_grad, BLOCK_C=p.tiles.block_c, num_warps=p.tiles.num_warps,
    )  # fmt: skip
    merge_stats(partial, None, stats, p.rows, p.chunk_rows, num_groups)
    return y, stats


# --- add_bias_group_stats ------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::add_bias_group_stats", mutates_args=())
def add_bias_group_stats_op(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, num_groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    """y and the statistics of y."""
    if backend == "triton" and x.numel():
        return _triton_add(x, residual, bias, num_groups)
    y, stats = add_bias_group_stats_reference(x, residual, bias, num_groups)
    return as_laid_out(y, x) if y is not x else x.clone(), stats


@add_bias_group_stats_op.register_fake
def _(x, residual, bias, num_groups, backend):
    return torch.empty_like(x), stats_like(x, num_groups)


def _add_setup_context(ctx, inputs, output):
    _, residual, bias, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _add_backward(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    dresidual = dbias = None
    if ctx.residual_dtype is not None:
        dresidual = dy.to(ctx.residual_dtype)
    if ctx.bias_dtype is not None:
        acc = torch.promote_types(dy.dtype, torch.float32)
        dbias = dy.sum([0, *range(2, dy.ndim)], dtype=acc).to(ctx.bias_dtype)
    return dy, dresidual, dbias, None, None


add_bias_group_stats_op.register_autograd(_add_backward, setup_context=_add_setup_context)


def add_bias_group_stats(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, num_groups: int = 32, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(y, stats): y = x + residual + bias in one pass, with the statistics of y for the norm that follows.

    x [N, C, *S], NCHW or channels_last; residual like x or None; bias [C] or None. y has x's shape, dtype and layout,
    summed in fp32 and rounded once. stats: fp32 [N, G, 2], mean and biased variance of y as it is stored, for the
    `stats=` of `group_norm`, `group_norm_silu` and `norm_silu_conv2d` with the same num_groups; not differentiable.

    Saves nothing for backward. backend as in `group_norm`. A residual that cannot be walked like x is copied first.
    ValueError, naming expected and got, for wrong shapes, dtypes and devices, and where the backend cannot run.
    """
    name = "add_bias_group_stats"
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"{name}: x: expected floating-point [N, C, *S], got {x.dtype} {list(x.shape)}")
    if num_groups < 1 or x.shape[1] % num_groups or x.shape[1] == 0:
        raise ValueError(f"{name}: num_groups: expected a divisor of the {x.shape[1]} channels, got {num_groups}")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: x: expected spatial dimensions that are not empty, got {list(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{name}: residual: expected {x.dtype} {list(x.shape)} like x, got {residual.dtype} {list(residual.shape)}"
        )
    if bias is not None and (bias.shape != x.shape[1:2] or not bias.is_floating_point()):
        raise ValueError(f"{name}: bias: expected floating-point [{x.shape[1]}], got {bias.dtype} {list(bias.shape)}")
    for what, other in (("residual", residual), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: {what}: expected a tensor on {x.device} like x, got one on {other.device}")
    backend = resolve(name, backend, x, unsupported=unsupported)
    return call(add_bias_group_stats_op, x, residual, dense(bias), num_groups, backend)


# --- norm_silu_conv2d ----------------------------------------------------------------------------------------------


def _conv_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """What aten's convolution gives: channels_last if x or weight is."""
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


@torch.library.custom_op(f"{NAMESPACE}::norm_silu_conv2d", mutates_args=())
def norm_silu_conv2d_op(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, input_bias: Tensor | None,
    stats: Tensor | None, num_groups: int, eps: float, stride: int, padding: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the statistics [N, G, 2] of x where none were given, else an empty tensor.

    backend "winograd" is "torch" with that convolution, which has no backward.
    """
    forward = triton_forward if backend == "triton" and x.numel() else aten_forward
    with without_autocast(x):
        h, computed = forward(x, norm_weight, norm_bias, input_bias, stats, num_groups, eps, True)
        y = winograd_conv2d(h, weight, bias) if backend == "winograd" else conv2d(h, weight, bias, stride, padding)
    return y.contiguous(memory_format=_conv_format(x, weight)), computed if stats is None else x.new_empty(0)


@norm_silu_conv2d_op.register_fake
def _(x, norm_weight, norm_bias, weight, bias, input_bias, stats, num_groups, eps, stride, padding, backend):
    sides = [(side + 2 * padding - k) // stride + 1 for side, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    y = x.new_empty(x.shape[0], weight.shape[0], *sides).to(memory_format=_conv_format(x, weight))
    return y, stats_like(x, num_groups) if stats is None else x.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::norm_silu_conv2d_backward", mutates_args=())
def norm_silu_conv2d_backward_op(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, input_bias: Tensor | None,
    stats: Tensor, eps: float, stride: int, padding: int, of_weight: bool, of_bias: bool, given: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, norm_weight, norm_bias, weight, bias, input_bias; [0] of those not wanted or not there."""
    triton_runs = backend == "triton" and x.numel()
    num_groups = stats.shape[1]
    z = None
    if triton_runs:
        h, _ = triton_forward(x, norm_weight, norm_bias, input_bias, stats, num_groups, eps, True)
    else:
        seen = stats if given else None
        z, _ = aten_forward(x, norm_weight, norm_bias, input_bias, seen, num_groups, eps, False)
        h = F.silu(z)
    dh, dweight, dbias = conv2d_backward(dy, h, weight, stride, padding, [True, of_weight, of_bias])
    del h
    if triton_runs:
        grads = triton_backward(dh, x, norm_weight, norm_bias, input_bias, stats, eps, True)
    else:
        grads = aten_backward(dh, x, norm_weight, norm_bias, input_bias, stats, eps, True, given, z)
    none = x.new_empty(0)
    return *grads[:3], as_laid_out(dweight, weight) if of_weight else none, dbias if of_bias else none.clone(), grads[3]


@norm_silu_conv2d_backward_op.register_fake
def _(
    dy, x, norm_weight, norm_bias, weight, input_bias, stats, eps, stride, padding, of_weight, of_bias, given, backend
):  # fmt: skip
    return (
        torch.empty_like(x),
        torch.empty_like(norm_weight),
        torch.empty_like(norm_bias),
        torch.empty_like(weight) if of_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
        x.new_empty(0) if input_bias is None else torch.empty_like(input_bias),
    )


def _conv_setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, weight, bias, input_bias, stats, *rest = inputs
    _, ctx.eps, ctx.stride, ctx.padding, ctx.backend = rest
    ctx.has_bias, ctx.given = bias is not None, stats is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, input_bias, stats if ctx.given else output[1])


def _conv_backward(ctx, dy, _):
    if dy is None:
        return (None,) * 12
    x, norm_weight, norm_bias, weight, input_bias, stats = ctx.saved_tensors
    of_weight, of_bias = ctx.needs_input_grad[3], ctx.has_bias and ctx.needs_input_grad[4]
    grads = norm_silu_conv2d_backward_op(
        dy, x, norm_weight, norm_bias, weight, input_bias, stats, ctx.eps, ctx.stride, ctx.padding, of_weight, of_bias,
        ctx.given, ctx.backend,
    )  # fmt: skip
    dinput_bias = None if input_bias is None else grads[5]
    dweight, dbias = grads[3] if of_weight else None, grads[4] if of_bias else None
    return *grads[:3], dweight, dbias, dinput_bias, None, None, None, None, None, None


norm_silu_conv2d_op.register_autograd(_conv_backward, setup_context=_conv_setup_context)


@register_flop_formula([getattr(torch.ops, NAMESPACE).norm_silu_conv2d])
def _conv_flop(x_shape, norm_weight, norm_bias, w_shape, *_, out_shape, **__) -> int:
    """The convolution's, for torch.utils.flop_counter: norms are not counted, as in aten."""
    y_shape = out_shape[0]
    return 2 * math.prod(y_shape) * math.prod(w_shape[1:])


@register_flop_formula([getattr(torch.ops, NAMESPACE).norm_silu_conv2d_backward])
def _conv_backward_flop(dy_shape, x_shape, norm_weight, norm_bias, w_shape, *_, **__) -> int:
    """The gradients of the convolution's input and weight."""
    return 4 * math.prod(dy_shape) * math.prod(w_shape[1:])


def norm_silu_conv2d(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_groups: int = 32,
    eps: float = 1e-6,
    stride: int = 1,
    padding: int = 1,
    stats: Tensor | None = None,
    input_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """conv2d(silu(group_norm(x + input_bias)), weight, bias), keeping x and the statistics only for backward.

    x [N, C, H, W], NCHW or channels_last; norm_weight, norm_bias, input_bias [C]; weight [C_out, C, kh, kw] and bias
    [C_out] of x's dtype -> [N, C_out, H', W'], channels_last if x or weight is. stats as in `group_norm`. Gradients,
    once differentiable, of all six. `backend` chooses the norm; the convolution is aten's, or in fp32 on a CPU without
    gradients that of `kernels/winograd.py`.

    Under autocast x, weight and bias are taken in its dtype, the norm's parameters as they are. ValueError, naming
    expected and got, for wrong shapes, dtypes and devices, and where the backend cannot run.
    """
    name = "norm_silu_conv2d"
    if (dtype := autocast_dtype(x)) is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    check_norm(name, x, norm_weight, norm_bias, input_bias, num_groups, stats, prefix="norm_")
    if x.ndim != 4:
        raise ValueError(f"{name}: x: expected [N, C, H, W], got {list(x.shape)}")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"{name}: weight: expected {x.dtype} [C_out, {x.shape[1]}, kh, kw], got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"{name}: bias: expected {x.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    for what, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.device != x.device:
            raise ValueError(f"{name}: {what}: expected a tensor on {x.device} like x, got one on {p.device}")
    if stride < 1 or padding < 0:
        what, least, got = ("stride", 1, stride) if stride < 1 else ("padding", 0, padding)
        raise ValueError(f"{name}: {what}: expected {least} or more, got {got}")
    if any(side + 2 * padding < k for side, k in zip(x.shape[2:], weight.shape[2:], strict=True)):
        least = "x".join(str(k - 2 * padding) for k in weight.shape[2:])
        raise ValueError(f"{name}: x: expected sides of at least {least} with padding {padding}, got {list(x.shape)}")
    backend = resolve(name, backend, x, unsupported=unsupported)
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    input_bias, stats = dense(input_bias), detached(stats)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, norm_weight, norm_bias, weight, bias, input_bias)
    )
    if backend == "torch" and not learns and may_pay(x, weight, stride, padding):
        backend = "winograd"
    y, _ = call(
        norm_silu_conv2d_op,
        x,
        norm_weight,
        norm_bias,
        weight,
        bias,
        input_bias,
        stats,
        num_groups,
        eps,
        stride,
        padding,
        backend,
    )
    return y
