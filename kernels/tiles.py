"""How the kernels walk an activation [N, C, *S]: strides, tiles from a table, and the split into chunks.

Spatial dimensions are walked as one of length L. A program takes BLOCK_C channels of one sample over one chunk of
rows (a row: one spatial position), tile by tile. Everything follows from C, L, the layout and the element size: never
from the batch, the GPU or a search, so the same sample gives the same bits in any batch, and every run repeats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import tl, triton

# Elements of a chunk: so many that its partial sums (8 bytes a channel) are < 4% of what it reads; fewer, down to one
# tile, where a sample would not be MIN_PROGRAMS programs, two a multiprocessor. Past MAX_PROGRAMS chunks grow instead.
CHUNK_ELEMENTS = 8192
MIN_PROGRAMS = 256
MAX_PROGRAMS = 2048
# What a second pass may find in L2: H100, H200 and A100 have 40 to 50 MB, of which a stream holds about two thirds.
L2_BYTES = 32 * 2**20
MAX_PASSES = 4
# Offsets are 64-bit, row numbers 32-bit.
MAX_ROWS = 2**31 - 2**16


class Strides(NamedTuple):
    """Elements between samples, channels and rows."""

    n: int
    c: int
    s: int


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One row of the table. rows_*: rows of a tile, powers of two, by kernel: statistics, apply, or backward."""

    block_c: int
    rows_stats: int
    rows_apply: int
    rows_grad: int
    num_warps: int = 4


# fmt: off
TILES: dict[str, Tiles] = {
    # channels_last: the channels of a row are contiguous. Width: the largest power of two that divides C, 16 to 128.
    "last-128": Tiles(block_c=128, rows_stats=16,  rows_apply=32,  rows_grad=16),
    "last-64":  Tiles(block_c=64,  rows_stats=32,  rows_apply=64,  rows_grad=32),
    "last-32":  Tiles(block_c=32,  rows_stats=64,  rows_apply=128, rows_grad=64),
    "last-16":  Tiles(block_c=16,  rows_stats=128, rows_apply=256, rows_grad=128),
    "last-ragged": Tiles(block_c=16, rows_stats=64, rows_apply=64, rows_grad=64),  # 16 does not divide C
    # NCHW: the rows of a channel are contiguous.
    "first-long": Tiles(block_c=4, rows_stats=512, rows_apply=1024, rows_grad=512),
    "first-short": Tiles(block_c=16, rows_stats=128, rows_apply=128, rows_grad=128),
    "first-ragged": Tiles(block_c=8, rows_stats=64, rows_apply=64, rows_grad=64),  # 16 does not divide L
}
# fmt: on
LONG_ROWS = 1024  # NCHW with fewer takes more channels a tile


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The launch of every kernel over one tensor."""

    n: int
    channels: int
    rows: int
    strides: Strides
    tiles: Tiles
    chunk_rows: int
    chunks: int
    c_blocks: int

    @property
    def programs(self) -> int:
        return self.n * self.chunks * self.c_blocks


def walk(x: Tensor) -> Strides | None:
    """Strides of x [N, C, *S] if its spatial dimensions can be walked as one, else None."""
    sizes, strides = x.shape[2:], x.stride()[2:]
    row = None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if row is None:
            row, expected = stride, stride
        if stride != expected:
            return None
        expected = stride * size
    return Strides(x.stride(0), x.stride(1), 1 if row is None else row)


def unsupported(x: Tensor) -> str | None:
    """Why kernels cannot walk x [N, C, *S], or None. Reads dtype, shape and strides only."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x has dtype {x.dtype}, kernels take float32, bfloat16 and float16"
    strides = walk(x)
    if strides is None:
        return f"the spatial strides {tuple(x.stride()[2:])} of x {list(x.shape)} cannot be walked as one dimension"
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        return f"x {list(x.shape)} is expanded: strides {tuple(x.stride())}"
    rows = x.numel() // max(1, x.shape[0] * x.shape[1])
    # y keeps the order of x's dimensions, so that it can be walked too where channels are innermost or outermost.
    if rows > 1 and x.shape[1] > 1 and strides.s < strides.c < strides.s * rows:
        return f"the channels of x {list(x.shape)} lie between its spatial dimensions: strides {tuple(x.stride())}"
    if rows > MAX_ROWS:
        return f"x has {rows} spatial positions, kernels count at most {MAX_ROWS}"
    return None


def plan(x: Tensor) -> Plan:
    """The launch for x [N, C, *S], which `unsupported` has no objection to and which is not empty."""
    strides = walk(x)
    assert strides is not None
    n, channels = x.shape[:2]
    return _plan(n, channels, x.numel() // (n * channels), strides)


@lru_cache(maxsize=4096)
def _plan(n: int, channels: int, rows: int, strides: Strides) -> Plan:
    if strides.c <= strides.s or rows == 1:
        width = next((w for w in (128, 64, 32, 16) if channels % w == 0), "ragged")
        tiles = TILES[f"last-{width}"]
    else:
        tiles = TILES["first-ragged" if rows % 16 else "first-long" if rows >= LONG_ROWS else "first-short"]
    c_blocks = -(-channels // tiles.block_c)
    most_chunks = max(1, MAX_PROGRAMS // c_blocks)
    # A multiple of every tile's rows: only the last tile of a sample is cut, so that one mask, s < L, does.
    unit = max(tiles.rows_stats, tiles.rows_apply, tiles.rows_grad)
    tiles_a_chunk = max(1, min(CHUNK_ELEMENTS // tiles.block_c, rows * c_blocks // MIN_PROGRAMS) // unit)
    chunk_rows = unit * max(tiles_a_chunk, -(-rows // (most_chunks * unit)))
    return Plan(
        n=n,
        channels=channels,
        rows=rows,
        strides=strides,
        tiles=tiles,
        chunk_rows=chunk_rows,
        chunks=-(-rows // chunk_rows),
        c_blocks=c_blocks,
    )


def samples_per_pass(x: Tensor, tensors: int) -> int:
    """Samples to take through both passes before the next ones, so that the second pass finds them in L2.

    All of them where one sample alone does not fit, or where the launches would cost more than the reads they save;
    the second pass then walks backwards and finds the end of x.
    """
    samples = L2_BYTES // (tensors * x.element_size() * (x.numel() // x.shape[0]))
    return samples if samples * MAX_PASSES >= x.shape[0] else x.shape[0]


def launch(kernel, programs: int, x: Tensor, *args, **options) -> None:
    """Runs a kernel on x's device in `programs` programs; options are its constexprs and num_warps."""
    if x.device.type == "cpu":
        kernel[(programs,)](x, *args, **options)
        return
    with torch.get_device_module(x.device).device(x.device):  # Triton launches on the current device
        kernel[(programs,)](x, *args, **options)


@triton.jit
def place(C, L, chunk_rows, chunks, BLOCK_C: tl.constexpr, REVERSE: tl.constexpr):
    """This program's sample, channels [BLOCK_C], chunk, and first and last + 1 row of it; a chunk is whole tiles."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    c_blocks = tl.cdiv(C, BLOCK_C)
    c = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = (pid // c_blocks) % chunks
    n = pid // c_blocks // chunks
    start = chunk * chunk_rows
    return n, c, chunk, start, start + tl.minimum(chunk_rows, L - start)
