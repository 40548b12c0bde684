"""AdamW, the clipping before it and the averages after it, in one pass over the parameters of a model.

Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2; of every element, with t the count of updates:

    g <- factor g
    m <- m + (1 - beta1) (g - m)                v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    e <- e + w (p - e)                          of each average e, w = 1 - its own decay

Bytes a parameter in fp32, with one average: 36 (p, g, m, v and e are read, p, m, v and e written). torch's calls for
the same: 8 to scale gradients, 28 for a fused AdamW, 12 for a foreach lerp, which is 48. One launch, over a table of
addresses, instead of one for every few tensors, three times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .dispatch import resolve, tl, triton
from .tiles import launch

BLOCK = 1024  # elements of a program: with twice as many, registers spill
AVERAGES = 4  # that the kernel takes along; more are a foreach lerp each

# --- kernel --------------------------------------------------------------------------------------------------------


@triton.jit
def _address(table_ptr, row, tensors, t, ALIGNED: tl.constexpr):
    """The float pointer in the table's row for tensor t."""
    pointer = tl.load(table_ptr + row * tensors + t).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _one_minus_power(log_beta, t):
    """1 - beta^t; 1 - exp would lose its digits while t log beta is small."""
    x = t * log_beta
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7)))))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _average(table_ptr, row, tensors, t, at, keep, p, weight, ALIGNED: tl.constexpr):
    e_ptr = _address(table_ptr, row, tensors, t, ALIGNED)
    if e_ptr.to(tl.int64) != 0:
        e = tl.load(e_ptr + at, mask=keep)
        # Of two forms the one that is exact at its own end, as in torch.lerp.
        e = tl.where(weight < 0.5, e + weight * (p - e), p - (p - e) * (1.0 - weight))
        tl.store(e_ptr + at, e, mask=keep)


@triton.jit
def _update(
    table_ptr, factor_ptr, skip_ptr, tensors, t, at, keep, lr, b1, b2, log_b1, log_b2, eps, decay, w0, w1, w2, w3,
    HAS_FACTOR: tl.constexpr, HAS_SKIP: tl.constexpr, N_AVERAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Elements `at` of tensor t, of which `keep` are there; None: all."""
    p_ptr = _address(table_ptr, 0, tensors, t, ALIGNED) + at
    m_ptr = _address(table_ptr, 2, tensors, t, ALIGNED) + at
    v_ptr = _address(table_ptr, 3, tensors, t, ALIGNED) + at
    count = tl.load(_address(table_ptr, 4, tensors, t, False)) + 1.0
    p, m, v = tl.load(p_ptr, mask=keep), tl.load(m_ptr, mask=keep), tl.load(v_ptr, mask=keep)
    g = tl.load(_address(table_ptr, 1, tensors, t, ALIGNED) + at, mask=keep)
    if HAS_FACTOR:
        g *= tl.load(factor_ptr)
    m_new = m + (1.0 - b1) * (g - m)
    v_new = b2 * v + (1.0 - b2) * g * g
    denominator = tl.sqrt_rn(v_new) / tl.sqrt_rn(_one_minus_power(log_b2, count)) + eps
    p_new = p * (1.0 - lr * decay) - lr / _one_minus_power(log_b1, count) * (m_new / denominator)
    if HAS_SKIP:  # what was there is written again: no update may depend on what broke
        there = tl.load(skip_ptr) == 0
        p_new, m_new, v_new = tl.where(there, p_new, p), tl.where(there, m_new, m), tl.where(there, v_new, v)
    tl.store(p_ptr, p_new, mask=keep)
    tl.store(m_ptr, m_new, mask=keep)
    tl.store(v_ptr, v_new, mask=keep)
    if N_AVERAGES > 0:
        _average(table_ptr, 5, tensors, t, at, keep, p_new, w0, ALIGNED)
    if N_AVERAGES > 1:
        _average(table_ptr, 6, tensors, t, at, keep, p_new, w1, ALIGNED)
    if N_AVERAGES > 2:
        _average(table_ptr, 7, tensors, t, at, keep, p_new, w2, ALIGNED)
    if N_AVERAGES > 3:
        _average(table_ptr, 8, tensors, t, at, keep, p_new, w3, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "lr", "b1", "b2", "log_b1", "log_b2", "eps", "decay", "w0", "w1", "w2", "w3"])
def _adamw_kernel(
    sizes_ptr, first_ptr, tensor_ptr, table_ptr, factor_ptr, skip_ptr, tensors, lr, b1, b2, log_b1, log_b2, eps, decay,
    w0, w1, w2, w3, HAS_FACTOR: tl.constexpr, HAS_SKIP: tl.constexpr, N_AVERAGES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor. table: addresses [5 + averages, tensors]; sizes: elements of each tensor; first: its
    first program; tensor: that of each program."""
    # Casts: callers may hand numbers over as fp64, and fp64 arithmetic would follow.
    lr, eps, decay = tl.cast(lr, tl.float32), tl.cast(eps, tl.float32), tl.cast(decay, tl.float32)
    b1, log_b1 = tl.cast(b1, tl.float32), tl.cast(log_b1, tl.float32)
    b2, log_b2 = tl.cast(b2, tl.float32), tl.cast(log_b2, tl.float32)
    w0, w1, w2, w3 = tl.cast(w0, tl.float32), tl.cast(w1, tl.float32), tl.cast(w2, tl.float32), tl.cast(w3, tl.float32)
    pid = tl.program_id(0)
    t = tl.load(tensor_ptr + pid)
    size = tl.load(sizes_ptr + t)
    start = (pid - tl.load(first_ptr + t)).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # a mask of unknown alignment would keep loads from being wide
        _update(
            table_ptr, factor_ptr, skip_ptr, tensors, t, at, None, lr, b1, b2, log_b1, log_b2, eps, decay,
            w0, w1, w2, w3, HAS_FACTOR, HAS_SKIP, N_AVERAGES, ALIGNED,
        )  # fmt: skip
    else:
        _update(
            table_ptr, factor_ptr, skip_ptr, tensors, t, at, at < size, lr, b1, b2, log_b1, log_b2, eps, decay,
            w0, w1, w2, w3, HAS_FACTOR, HAS_SKIP, N_AVERAGES, ALIGNED,
        )  # fmt: skip


# --- launcher ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """int64 sizes, int32 first program of each tensor, int32 tensor of each program."""
    counts = torch.tensor([-(-size // BLOCK) for size in sizes])
    first = counts.cumsum(0) - counts
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    return torch.tensor(sizes).to(device), first.int().to(device), tensor.int().to(device)


def _triton(params, grads, exp_avgs, exp_avg_sqs, steps, averages, lr, betas, eps, weight_decay, weights, factor, skip):
    device = params[0].device
    rows = [[t.data_ptr() for t in row] for row in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    rows += [[0 if t is None else t.data_ptr() for t in row] for row in averages]
    aligned = all(address % 16 == 0 for row in (*rows[:4], *rows[5:]) for address in row)
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    sizes, first, tensor = _programs(tuple(p.numel() for p in params), device)
    if not len(tensor):
        return
    logs = (math.log(beta) if beta else -math.inf for beta in betas)
    launch(
        _adamw_kernel, len(tensor), sizes, first, tensor, table, factor, skip, len(params), lr, *betas, *logs, eps,
        weight_decay, *weights, *[0.0] * (AVERAGES - len(weights)), HAS_FACTOR=factor is not None,
        HAS_SKIP=skip is not None, N_AVERAGES=len(averages), ALIGNED=aligned, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    done = 1.0 if skip is None else 1.0 - skip.float()
    torch._foreach_add_(steps, done)  # pyright: ignore[reportPrivateImportUsage]


def _torch(params, grads, exp_avgs, exp_avg_sqs, steps, averages, lr, betas, eps, weight_decay, weights, factor, skip):
    if factor is not None:
        torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, grad_scale=None,
        found_inf=None if skip is None else skip.float(), amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
        weight_decay=weight_decay, eps=eps, maximize=False,
    )  # fmt: skip
    _lerp(params, averages, weights)


def _lerp(params, averages, weights):
    for row, weight in zip(averages, weights, strict=True):
        pairs = [(e, p) for e, p in zip(row, params, strict=True) if e is not None]
        if pairs:
            torch._foreach_lerp_(*(list(column) for column in zip(*pairs, strict=True)), weight)  # pyright: ignore


# --- public --------------------------------------------------------------------------------------------------------


def _order(t: Tensor) -> list[int]:
    """Strides of sides that are longer than one: those of others say nothing."""
    return [stride for stride, side in zip(t.stride(), t.shape, strict=True) if side > 1]


def _laid_out(t: Tensor, p: Tensor) -> bool:
    """Whether t lies in memory as p does, without gaps: both backends walk memory, torch's on a CPU without a look."""
    return _order(t) == _order(p) and (t.is_contiguous() or _order(t) == _order(torch.empty_like(t, device="meta")))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor | None]] = (),
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    weights: Sequence[float] = (),
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One update of AdamW of all `params` in place, and of their averages: e <- e + weights[k] (p - e).

    params, grads, exp_avgs, exp_avg_sqs: tensors of one shape in each place, on one device, dense and of one layout;
    gradients of another one are copied. steps: how many updates each had, fp32 scalars, counted on. averages: for each
    of `weights`, a tensor or None for each parameter. factor: fp32 scalar that gradients are multiplied by first, as
    for clipping; whether `grads` then hold the product is not said. skip: scalar, not 0 where nothing but the averages
    is to change. Both are read on the device.

    backend: "triton" takes fp32; "torch" is torch's fused AdamW; "auto" is Triton on a GPU where it can run.
    ValueError, naming expected and got, for lengths, shapes, layouts and devices, and where the backend cannot run.
    """
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", *(f"averages[{k}]" for k in range(len(averages))))
    rows = (params, grads, exp_avgs, exp_avg_sqs, steps, *averages)
    if len(weights) != len(averages):
        raise ValueError(f"adamw_: weights: expected one for each of {len(averages)} averages, got {len(weights)}")
    for name, row in zip(names, rows, strict=True):
        if len(row) != len(params):
            raise ValueError(f"adamw_: {name}: expected {len(params)} tensors like params, got {len(row)}")
        for i, (t, p) in enumerate(zip(row, params, strict=True)):
            shape = torch.Size() if name == "steps" else p.shape
            if t is not None and (t.shape != shape or t.device != params[0].device):
                raise ValueError(
                    f"adamw_: {name}[{i}]: expected {list(shape)} on {params[0].device}, "
                    f"got {list(t.shape)} on {t.device}"
                )
    if not params:
        return
    grads = [g if _laid_out(g, p) else torch.empty_like(p).copy_(g) for g, p in zip(grads, params, strict=True)]
    for name, row in zip(names[2:], (exp_avgs, exp_avg_sqs, None, *averages), strict=True):
        for i, (t, p) in enumerate(zip(row or (), params, strict=row is not None)):
            if t is not None and not (_laid_out(p, p) and _laid_out(t, p)):
                raise ValueError(
                    f"adamw_: {name}[{i}]: expected the strides of a dense params[{i}], "
                    f"got {t.stride()} beside {p.stride()} of {list(p.shape)}"
                )
    dtypes = {t.dtype for row in (params, grads, exp_avgs, exp_avg_sqs, *averages) for t in row if t is not None}
    why = None if dtypes == {torch.float32} else f"expected float32, got {', '.join(sorted(map(str, dtypes)))}"
    backend = resolve("adamw_", backend, params[0], unsupported=lambda _: why)
    params, exp_avgs, exp_avg_sqs, steps = map(list, (params, exp_avgs, exp_avg_sqs, steps))
    run = _triton if backend == "triton" else _torch
    taken = AVERAGES if backend == "triton" else len(averages)
    run(params, grads, exp_avgs, exp_avg_sqs, steps, averages[:taken], lr, betas, eps, weight_decay, weights[:taken],
        factor, skip)  # fmt: skip
    _lerp(params, averages[taken:], weights[taken:])
