"""Mean and biased variance of the groups of an activation, split over chunks: the statistics half of GroupNorm.

A program reads one chunk and keeps, per channel, a running mean and a sum of squares about it (Welford 1962) in each of
BLOCK_S slots; the slots, then the chunks and channels of a group, are merged by Chan, Golub & LeVeque (1983). All of it
about a pivot, a value of the chunk: at a mean of 3000 standard deviations fp32 keeps the variance to 1e-6, where
E[x^2] - E[x]^2 has no digit left.

Names as in group_norm.py. `partial` is [N, chunks, 3, C]: pivot, mean less the pivot, sum of squares about the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import tl, triton
from .tiles import launch, place, plan


@triton.jit
def welford(x, keep, step, mean, m2):
    """Adds one tile to the running mean and sum of squares about it; `step` tiles with this one (Welford 1962)."""
    delta = tl.where(keep, x - mean, 0.0)
    mean += delta * (1.0 / step)
    m2 += tl.where(keep, delta * (x - mean), 0.0)
    return mean, m2


@triton.jit
def store_partial_stats(partial_ptr, pivot, mean, m2, n, c, chunk, chunks, start, end, C, BLOCK_S: tl.constexpr):
    """Merges the BLOCK_S running statistics of a channel into one (Chan et al. 1983), and stores them."""
    r = tl.arange(0, BLOCK_S)
    count = tl.maximum(end - start - r + BLOCK_S - 1, 0) // BLOCK_S
    count = count.to(tl.float32)[:, None]  # tiles that reached slot r
    mean_c = tl.sum(count * mean, 0) / tl.cast(end - start, tl.float32)
    gap = mean - mean_c[None, :]
    out = partial_ptr + (n.to(tl.int64) * chunks + chunk) * (3 * C) + c
    tl.store(out, pivot, mask=c < C)
    tl.store(out + C, mean_c, mask=c < C)
    tl.store(out + 2 * C, tl.sum(m2 + count * gap * gap, 0), mask=c < C)


@triton.jit(do_not_specialize=["chunks"])
def _partial_stats_kernel(
    x_ptr,
    partial_ptr,
    x_sn,
    x_sc,
    x_ss,
    C,
    L,
    chunk_rows,
    chunks,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pivot, mean and centred sum of squares of each channel over one chunk."""
    n, c, chunk, start, end = place(C, L, chunk_rows, chunks, BLOCK_C, False)
    x_ptr += n.to(tl.int64) * x_sn + c.to(tl.int64)[None, :] * x_sc
    pivot = tl.load(x_ptr + start.to(tl.int64) * x_ss, mask=(c < C)[None, :], other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    step = 0.0
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        keep = (s < L)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + s.to(tl.int64)[:, None] * x_ss, mask=keep, other=0.0).to(tl.float32)
        step += 1.0
        mean, m2 = welford(x - pivot, keep, step, mean, m2)
    store_partial_stats(partial_ptr, tl.sum(pivot, 0), mean, m2, n, c, chunk, chunks, start, end, C, BLOCK_S)


@triton.jit
def merge_load(partial_ptr, input_bias_ptr, base, base_bias, first, j, C, L, chunk_rows, chunks, CG, HAS_INPUT_BIAS):
    """Of the j-th channel and chunk of a group: how many rows, their mean less the base, their sum of squares."""
    keep = j < chunks * CG
    chunk, c = j // CG, j % CG
    count = tl.where(keep, tl.minimum(L - chunk * chunk_rows, chunk_rows), 0).to(tl.float32)
    partial_ptr += chunk.to(tl.int64) * (3 * C) + c
    mean = (tl.load(partial_ptr, mask=keep, other=0.0) - base) + tl.load(partial_ptr + C, mask=keep, other=0.0)
    if HAS_INPUT_BIAS:
        mean += tl.load(input_bias_ptr + first + c, mask=keep, other=0.0).to(tl.float32) - base_bias
    return count, mean, tl.load(partial_ptr + 2 * C, mask=keep, other=0.0)


@triton.jit(do_not_specialize=["chunks"])
def _merge_stats_kernel(
    partial_ptr, input_bias_ptr, stats_ptr, C, L, chunk_rows, chunks, CG, HAS_INPUT_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of one group of one sample, from the partials of its channels and chunks.

    Means stay relative to the first pivot until the end: at a mean of 3000 deviations fp32 would lose them.
    """
    pid = tl.program_id(0)
    groups = C // CG
    first = (pid % groups) * CG
    partial_ptr += (pid // groups).to(tl.int64) * chunks * (3 * C) + first
    size = tl.cast(L, tl.float32) * tl.cast(CG, tl.float32)
    base = tl.load(partial_ptr)
    base_bias = 0.0
    if HAS_INPUT_BIAS:
        base_bias = tl.load(input_bias_ptr + first).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for j0 in range(0, chunks * CG, BLOCK):
        count, mean, _ = merge_load(
            partial_ptr, input_bias_ptr, base, base_bias, first, j0 + tl.arange(0, BLOCK), C, L, chunk_rows, chunks,
            CG, HAS_INPUT_BIAS,
        )  # fmt: skip
        total += count * mean
    mean_g = tl.sum(total, 0) / size
    total = tl.zeros([BLOCK], tl.float32)
    for j0 in range(0, chunks * CG, BLOCK):
        count, mean, m2 = merge_load(
            partial_ptr, input_bias_ptr, base, base_bias, first, j0 + tl.arange(0, BLOCK), C, L, chunk_rows, chunks,
            CG, HAS_INPUT_BIAS,
        )  # fmt: skip
        total += m2 + count * (mean - mean_g) * (mean - mean_g)
    tl.store(stats_ptr + pid.to(tl.int64) * 2, base + (base_bias + mean_g))
    tl.store(stats_ptr + pid.to(tl.int64) * 2 + 1, tl.sum(total, 0) / size)


def merge_stats(
    partial: Tensor, input_bias: Tensor | None, stats: Tensor, rows: int, chunk_rows: int, num_groups: int
) -> None:
    """partial [N, chunks, 3, C] -> stats [N, G, 2] (mean, biased variance), in place."""
    n, chunks, _, channels = partial.shape
    launch(
        _merge_stats_kernel, n * num_groups, partial, input_bias, stats, channels, rows, chunk_rows, chunks,
        channels // num_groups, HAS_INPUT_BIAS=input_bias is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip


def triton_stats(x: Tensor, input_bias: Tensor | None, stats: Tensor, num_groups: int) -> None:
    """Writes mean and biased variance of x + input_bias to stats [N, G, 2]."""
    p = plan(x)
    partial = torch.empty(p.n, p.chunks, 3, p.channels, dtype=torch.float32, device=x.device)
    launch(
        _partial_stats_kernel, p.programs, x, partial, *p.strides, p.channels, p.rows, p.chunk_rows, p.chunks,
        BLOCK_S=p.tiles.rows_stats, BLOCK_C=p.tiles.block_c, num_warps=p.tiles.num_warps,
    )  # fmt: skip
    merge_stats(partial, input_bias, stats, p.rows, p.chunk_rows, num_groups)
