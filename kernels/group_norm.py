"""GroupNorm and GroupNorm + SiLU, forward and backward, on NCHW and channels_last as they lie in memory.

Over a group of M = L C/G values (Wu & He 2018, arXiv:1803.08494):

    xhat = (x + input_bias - mean) rstd      rstd = (var + eps)^-1/2, var biased
    z = w xhat + b                           y = z, or silu(z) = z sigmoid(z)
    dz = dy, or dy sigmoid(z) (1 + z (1 - sigmoid(z)))
    db = sum dz      dw = sum dz xhat
    dx = rstd (w dz - c1 - xhat c2)          c1 = mean over the group of w dz, c2 = of w dz xhat

Bytes moved per element in bf16: statistics 2, apply 4, so 6 forward, or 4 where the producer gave the statistics;
backward reads x and dy twice and writes dx, 10. Where the tensor, or one sample after another, fits L2, the second
pass reads L2 and main memory sees 4 and 6. Saved for backward: x and the statistics.

Each pass splits a sample into chunks (tiles.py), each of which leaves one partial result a channel: any number of
channels a group, no atomics, the same bits every run, and a batch of one fills the device.

Kernel arguments: n, c, s are sample, channel, row (spatial position); C, L, G their numbers and of groups; *_sn, *_sc,
*_ss strides; CG channels a group. `stats` is [N, G, 2], `partial` [N, chunks, 2, C], both fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import call, resolve, tl, triton
from .group_norm_aten import aten_backward, aten_forward
from .group_stats import triton_stats
from .tiles import launch, place, plan, samples_per_pass, unsupported, walk

NAMESPACE = "flux2_" + __name__.rpartition(".")[0].replace(".", "_")  # a vendored copy has its own ops


# --- reference -----------------------------------------------------------------------------------------------------


def group_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, input_bias: Tensor | None = None
) -> Tensor:
    """The definition: x [N, C, *S] -> same. Statistics and affine in fp32 (fp64 if given fp64)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    h = x.to(acc)
    if input_bias is not None:
        h = h + input_bias.to(acc).view(-1, *[1] * (x.ndim - 2))
    return F.group_norm(h, num_groups, weight.to(acc), bias.to(acc), eps).to(x.dtype)


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, input_bias: Tensor | None = None
) -> Tensor:
    """The definition, rounded once: silu(group_norm(x))."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return F.silu(group_norm_reference(x.to(acc), weight, bias, num_groups, eps, input_bias)).to(x.dtype)


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def channel_constants(stats_ptr, weight_ptr, bias_ptr, input_bias_ptr, n, c, C, CG, eps, HAS_INPUT_BIAS: tl.constexpr):
    """Per channel [1, BLOCK_C]: shift, scale, bias, rstd. xhat = (x - shift) rstd, z = (x - shift) scale + bias."""
    stats_ptr += (n.to(tl.int64) * (C // CG) + c // CG) * 2
    shift = tl.load(stats_ptr, mask=c < C, other=0.0)
    # cast: callers may hand eps over as fp64, and fp64 arithmetic would follow
    rstd = tl.rsqrt(tl.load(stats_ptr + 1, mask=c < C, other=0.0) + tl.cast(eps, tl.float32))
    w = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_INPUT_BIAS:
        shift -= tl.load(input_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return shift[None, :], (rstd * w)[None, :], b[None, :], rstd[None, :]


@triton.jit(do_not_specialize=["chunks"])
def _apply_kernel(
    x_ptr, stats_ptr, weight_ptr, bias_ptr, input_bias_ptr, y_ptr, x_sn, x_sc, x_ss, y_sn, y_sc, y_ss,
    C, L, chunk_rows, chunks, CG, eps, SILU: tl.constexpr, HAS_INPUT_BIAS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of one chunk."""
    n, c, _, start, end = place(C, L, chunk_rows, chunks, BLOCK_C, REVERSE)
    shift, scale, b, _ = channel_constants(
        stats_ptr, weight_ptr, bias_ptr, input_bias_ptr, n, c, C, CG, eps, HAS_INPUT_BIAS
    )
    x_ptr += n.to(tl.int64) * x_sn + c.to(tl.int64)[None, :] * x_sc
    y_ptr += n.to(tl.int64) * y_sn + c.to(tl.int64)[None, :] * y_sc
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        keep = (s < L)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + s.to(tl.int64)[:, None] * x_ss, mask=keep, other=0.0).to(tl.float32)
        y = (x - shift) * scale + b
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(y_ptr + s.to(tl.int64)[:, None] * y_ss, y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def grad_of_z(dy, centred, scale, b, SILU: tl.constexpr):
    """dz from dy; z is recomputed."""
    if SILU:
        z = centred * scale + b
        sigmoid = tl.sigmoid(z)
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@triton.jit(do_not_specialize=["chunks"])
def _partial_grads_kernel(
    x_ptr, dy_ptr, stats_ptr, weight_ptr, bias_ptr, input_bias_ptr, partial_ptr, x_sn, x_sc, x_ss, dy_sn, dy_sc, dy_ss,
    C, L, chunk_rows, chunks, CG, eps, SILU: tl.constexpr, HAS_INPUT_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz xhat of each channel over one chunk."""
    n, c, chunk, start, end = place(C, L, chunk_rows, chunks, BLOCK_C, False)
    shift, scale, b, rstd = channel_constants(
        stats_ptr, weight_ptr, bias_ptr, input_bias_ptr, n, c, C, CG, eps, HAS_INPUT_BIAS
    )
    x_ptr += n.to(tl.int64) * x_sn + c.to(tl.int64)[None, :] * x_sc
    dy_ptr += n.to(tl.int64) * dy_sn + c.to(tl.int64)[None, :] * dy_sc
    sum_dz = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_dz_x = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)  # times rstd: sum of dz xhat
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        keep = (s < L)[:, None] & (c < C)[None, :]
        # dy first: x first costs a spill on sm_100
        dy = tl.load(dy_ptr + s.to(tl.int64)[:, None] * dy_ss, mask=keep, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + s.to(tl.int64)[:, None] * x_ss, mask=keep, other=0.0).to(tl.float32)
        centred = x - shift
        dz = grad_of_z(dy, centred, scale, b, SILU)  # 0 where masked
        sum_dz += dz
        sum_dz_x += dz * centred
    out = partial_ptr + (n.to(tl.int64) * chunks + chunk) * (2 * C) + c
    tl.store(out, tl.sum(sum_dz, 0), mask=c < C)
    tl.store(out + C, tl.sum(sum_dz_x * rstd, 0), mask=c < C)


@triton.jit(do_not_specialize=["chunks"])
def _merge_grads_kernel(
    partial_ptr, weight_ptr, sums_ptr, coefficients_ptr, C, L, chunks, CG, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Per sample: sums [N, 2, C] of dz and dz xhat over all rows; c1 and c2 of one group, in coefficients [N, G, 2]."""
    pid = tl.program_id(0)
    groups = C // CG
    n = (pid // groups).to(tl.int64)
    first = (pid % groups) * CG
    c1 = tl.zeros([BLOCK_C], tl.float32)
    c2 = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, CG, BLOCK_C):
        i = c0 + tl.arange(0, BLOCK_C)
        c = first + i
        dz = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        dz_xhat = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        for k0 in range(0, chunks, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            keep = (k < chunks)[:, None] & (i < CG)[None, :]
            part = partial_ptr + (n * chunks + k.to(tl.int64)[:, None]) * (2 * C) + c[None, :]
            dz += tl.load(part, mask=keep, other=0.0)
            dz_xhat += tl.load(part + C, mask=keep, other=0.0)
        sum_dz, sum_dz_xhat = tl.sum(dz, 0), tl.sum(dz_xhat, 0)
        tl.store(sums_ptr + n * (2 * C) + c, sum_dz, mask=i < CG)
        tl.store(sums_ptr + n * (2 * C) + C + c, sum_dz_xhat, mask=i < CG)
        w = tl.load(weight_ptr + c, mask=i < CG, other=0.0).to(tl.float32)
        c1 += w * sum_dz
        c2 += w * sum_dz_xhat
    size = tl.cast(L, tl.float32) * tl.cast(CG, tl.float32)
    tl.store(coefficients_ptr + pid.to(tl.int64) * 2, tl.sum(c1, 0) / size)
    tl.store(coefficients_ptr + pid.to(tl.int64) * 2 + 1, tl.sum(c2, 0) / size)


@triton.jit(do_not_specialize=["chunks"])
def _grad_input_kernel(
    x_ptr, dy_ptr, stats_ptr, weight_ptr, bias_ptr, input_bias_ptr, coefficients_ptr, dx_ptr, partial_ptr,
    x_sn, x_sc, x_ss, dy_sn, dy_sc, dy_ss, dx_sn, dx_sc, dx_ss, C, L, chunk_rows, chunks, CG, eps,
    SILU: tl.constexpr, HAS_INPUT_BIAS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of one chunk, and its sum over the chunk's rows in partial [N, chunks, C] where x has an input bias."""
    n, c, chunk, start, end = place(C, L, chunk_rows, chunks, BLOCK_C, REVERSE)
    shift, scale, b, rstd = channel_constants(
        stats_ptr, weight_ptr, bias_ptr, input_bias_ptr, n, c, C, CG, eps, HAS_INPUT_BIAS
    )
    coefficients_ptr += (n.to(tl.int64) * (C // CG) + c // CG) * 2
    # dx = rstd (w dz - c1 - xhat c2), with what does not depend on the row multiplied once
    k1 = rstd * tl.load(coefficients_ptr, mask=c < C, other=0.0)[None, :]
    k2 = rstd * rstd * tl.load(coefficients_ptr + 1, mask=c < C, other=0.0)[None, :]
    x_ptr += n.to(tl.int64) * x_sn + c.to(tl.int64)[None, :] * x_sc
    dy_ptr += n.to(tl.int64) * dy_sn + c.to(tl.int64)[None, :] * dy_sc
    dx_ptr += n.to(tl.int64) * dx_sn + c.to(tl.int64)[None, :] * dx_sc
    sum_dx = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        keep = (s < L)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + s.to(tl.int64)[:, None] * x_ss, mask=keep, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + s.to(tl.int64)[:, None] * dy_ss, mask=keep, other=0.0).to(tl.float32)
        centred = x - shift
        dx = scale * grad_of_z(dy, centred, scale, b, SILU) - k1 - centred * k2
        tl.store(dx_ptr + s.to(tl.int64)[:, None] * dx_ss, dx.to(dx_ptr.dtype.element_ty), mask=keep)
        if HAS_INPUT_BIAS:
            sum_dx += tl.where(keep, dx, 0.0)
    if HAS_INPUT_BIAS:
        out = partial_ptr + (n.to(tl.int64) * chunks + chunk) * C + c
        tl.store(out, tl.sum(sum_dx, 0), mask=c < C)


# --- launchers -----------------------------------------------------------------------------------------------------


def triton_apply(
    x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, stats: Tensor, eps: float, silu: bool, y: Tensor
) -> None:
    """Writes y, whose strides may differ from x's. Walks backwards: the end of x was read last."""
    p = plan(x)
    y_strides = walk(y)
    assert y_strides is not None
    launch(
        _apply_kernel, p.programs, x, stats, weight, bias, input_bias, y, *p.strides, *y_strides,
        p.channels, p.rows, p.chunk_rows, p.chunks, p.channels // stats.shape[1], eps, SILU=silu,
        HAS_INPUT_BIAS=input_bias is not None, REVERSE=True, BLOCK_S=p.tiles.rows_apply,
        BLOCK_C=p.tiles.block_c,
        num_warps=p.tiles.num_warps,
    )  # fmt: skip


def triton_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_bias: Tensor | None,
    stats: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the statistics [N, G, 2]: those given, or computed."""
    y = torch.empty_like(x)
    if stats is not None:
        triton_apply(x, weight, bias, input_bias, stats, eps, silu, y)
        return y, stats
    stats = stats_like(x, num_groups)
    step = samples_per_pass(x, tensors=1)
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        triton_stats(x[part], input_bias, stats[part], num_groups)
        triton_apply(x[part], weight, bias, input_bias, stats[part], eps, silu, y[part])
    return y, stats


def triton_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, stats: Tensor, eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias, dinput_bias ([0] without input_bias)."""
    n, channels = x.shape[:2]
    num_groups = stats.shape[1]
    dx = torch.empty_like(x)
    dx_strides, dy_strides, x_strides = walk(dx), walk(dy), walk(x)
    assert dx_strides is not None and x_strides is not None
    if dy_strides is None or (dy_strides.c < dy_strides.s) != (x_strides.c < x_strides.s):
        dy = torch.empty_like(x).copy_(dy)  # walked against its layout, it would cost more than this copy
        dy_strides = walk(dy)
        assert dy_strides is not None
    sums = torch.empty(n, 2, channels, dtype=torch.float32, device=x.device)
    chunks = plan(x).chunks
    sum_dx = sums.new_empty(n, chunks, channels) if input_bias is not None else None
    step = samples_per_pass(x, tensors=2)
    for first in range(0, n, step):
        part = slice(first, first + step)
        p = plan(x[part])
        t = p.tiles
        partial = torch.empty(p.n, chunks, 2, channels, dtype=torch.float32, device=x.device)
        coefficients = torch.empty(p.n, num_groups, 2, dtype=torch.float32, device=x.device)
        shape = (channels, p.rows, p.chunk_rows, chunks, channels // num_groups, eps)
        flags = {"SILU": silu, "HAS_INPUT_BIAS": input_bias is not None}
        tile = {"BLOCK_S": t.rows_grad, "BLOCK_C": t.block_c, "num_warps": t.num_warps}
        launch(
            _partial_grads_kernel, p.programs, x[part], dy[part], stats[part], weight, bias, input_bias, partial,
            *x_strides, *dy_strides, *shape, **flags, **tile,
        )  # fmt: skip
        launch(
            _merge_grads_kernel, p.n * num_groups, partial, weight, sums[part], coefficients, channels, p.rows, chunks,
            channels // num_groups, BLOCK_K=64, BLOCK_C=16, num_warps=4,
        )  # fmt: skip
        launch(
            _grad_input_kernel, p.programs, x[part], dy[part], stats[part], weight, bias, input_bias, coefficients,
            dx[part], None if sum_dx is None else sum_dx[part], *x_strides, *dy_strides, *dx_strides, *shape,
            REVERSE=True, **flags, **tile,
        )  # fmt: skip
    dinput_bias = x.new_empty(0)
    if input_bias is not None:
        assert sum_dx is not None
        dinput_bias = sum_dx.sum((0, 1)).to(input_bias.dtype)
    return dx, sums[:, 1].sum(0).to(weight.dtype), sums[:, 0].sum(0).to(bias.dtype), dinput_bias


# --- op and autograd -----------------------------------------------------------------------------------------------


def stats_like(x: Tensor, num_groups: int) -> Tensor:
    """Room for statistics of x: [N, G, 2], fp32, or fp64 for fp64 x."""
    return x.new_empty(x.shape[0], num_groups, 2, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op(f"{NAMESPACE}::group_norm", mutates_args=())
def group_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, stats: Tensor | None, num_groups: int,
    eps: float, silu: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the statistics [N, G, 2] where none were given, else an empty tensor."""
    forward = triton_forward if backend == "triton" and x.numel() else aten_forward
    y, computed = forward(x, weight, bias, input_bias, stats, num_groups, eps, silu)
    return y, computed if stats is None else x.new_empty(0)


@group_norm_op.register_fake
def _(x, weight, bias, input_bias, stats, num_groups, eps, silu, backend):
    return torch.empty_like(x), stats_like(x, num_groups) if stats is None else x.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::group_norm_backward", mutates_args=())
def group_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, stats: Tensor, eps: float,
    silu: bool, given: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias, dinput_bias ([0] without input_bias)."""
    if backend == "triton" and x.numel():
        return triton_backward(dy, x, weight, bias, input_bias, stats, eps, silu)
    return aten_backward(dy, x, weight, bias, input_bias, stats, eps, silu, given)


@group_norm_backward_op.register_fake
def _(dy, x, weight, bias, input_bias, stats, eps, silu, given, backend):
    dinput_bias = x.new_empty(0) if input_bias is None else torch.empty_like(input_bias)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), dinput_bias


def _setup_context(ctx, inputs, output):
    x, weight, bias, input_bias, stats, _, ctx.eps, ctx.silu, ctx.backend = inputs
    ctx.given = stats is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, input_bias, stats if ctx.given else output[1])


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    x, weight, bias, input_bias, stats = ctx.saved_tensors
    grads = group_norm_backward_op(dy, x, weight, bias, input_bias, stats, ctx.eps, ctx.silu, ctx.given, ctx.backend)
    return *grads[:3], None if input_bias is None else grads[3], None, None, None, None, None


group_norm_op.register_autograd(_backward, setup_context=_setup_context)


# --- public --------------------------------------------------------------------------------------------------------


def check_norm(
    op_name: str, x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, num_groups: int,
    stats: Tensor | None, prefix: str = "",
) -> None:  # fmt: skip
    """ValueError naming expected and got; prefix: how weight and bias are called, before their own names."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"{op_name}: x: expected floating-point [N, C, *S], got {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups or channels == 0:
        raise ValueError(f"{op_name}: num_groups: expected a divisor of the {channels} channels, got {num_groups}")
    parameters = ((f"{prefix}weight", weight), (f"{prefix}bias", bias), ("input_bias", input_bias))
    for name, p in parameters:
        if p is None and name != "input_bias":
            raise ValueError(f"{op_name}: {name}: expected floating-point [{channels}] for x {list(x.shape)}, got None")
        if p is not None and (p.shape != (channels,) or not p.is_floating_point()):
            raise ValueError(
                f"{op_name}: {name}: expected floating-point [{channels}] for x {list(x.shape)}, "
                f"got {p.dtype} {list(p.shape)}"
            )
    expected, dtype = (x.shape[0], num_groups, 2), torch.promote_types(x.dtype, torch.float32)
    if stats is not None and (stats.shape != expected or stats.dtype != dtype):
        raise ValueError(
            f"{op_name}: stats: expected {dtype} {list(expected)} for x {list(x.shape)} in {num_groups} groups, "
            f"got {stats.dtype} {list(stats.shape)}"
        )
    for name, p in (*parameters, ("stats", stats)):
        if p is not None and p.device != x.device:
            raise ValueError(f"{op_name}: {name}: expected a tensor on {x.device} like x, got one on {p.device}")


def dense(p: Tensor | None) -> Tensor | None:
    """A parameter [C] as kernels read it."""
    return None if p is None else p.contiguous()


def detached(stats: Tensor | None) -> Tensor | None:
    """Statistics as kernels read them; they have no gradient."""
    return None if stats is None else stats.detach().contiguous()


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int = 32,
    eps: float = 1e-6,
    stats: Tensor | None = None,
    input_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """GroupNorm of x + input_bias. x [N, C, *S], NCHW or channels_last, of any spatial rank -> same shape and layout.

    weight, bias, input_bias: [C], of any floating dtype (fp32 with bf16 x is usual); all four have gradients, once
    differentiable. stats: fp32 [N, G, 2], mean and biased variance of x + input_bias, as `add_bias_group_stats`
    returns; computed if not given. They are not differentiated: x's gradient is the full one of GroupNorm either way.
    eps is added to the variance; nn.GroupNorm's own default is 1e-5. Reverse mode only: forward-mode AD, as in
    torch.func.jvp, gives no tangent, a limit of torch.library.custom_op.

    backend: "triton" takes fp32, bf16 and fp16 whose spatial dimensions can be walked as one, channels inside or
    outside of them, nothing expanded; "torch" is aten, with its statistics (`group_norm_aten`); both save x and the
    statistics only. "auto" is Triton on a GPU where it can run, else torch. Autocast changes nothing: y has x's dtype.
    The gradient of y may have any strides; where they differ in order from x's, it is copied.

    ValueError, naming expected and got, for wrong shapes, dtypes and devices, and where the backend cannot run.
    """
    return _group_norm("group_norm", x, weight, bias, num_groups, eps, stats, input_bias, backend, silu=False)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int = 32,
    eps: float = 1e-6,
    stats: Tensor | None = None,
    input_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """silu(group_norm(x + input_bias)), silu(z) = z sigmoid(z) (arXiv:1702.03118); all else as `group_norm`."""
    return _group_norm("group_norm_silu", x, weight, bias, num_groups, eps, stats, input_bias, backend, silu=True)


def _group_norm(op_name, x, weight, bias, num_groups, eps, stats, input_bias, backend, silu):
    check_norm(op_name, x, weight, bias, input_bias, num_groups, stats)
    backend = resolve(op_name, backend, x, unsupported=unsupported)
    weight, bias, input_bias, stats = weight.contiguous(), bias.contiguous(), dense(input_bias), detached(stats)
    y, _ = call(group_norm_op, x, weight, bias, input_bias, stats, num_groups, eps, silu, backend)
    return y
