"""What is measured: each operation at each shape, who it is held against, and the bytes it has to move.

A case's contestants compute the same: `ours`, the stock modules in eager NCHW, in eager channels_last and compiled in
channels_last, Liger's GroupNorm where it applies. `copy` moves the case's bytes and computes nothing: what the memory
can do. n: elements of x; e: bytes of one. Convolutions count their input and output once, weights not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from measure import ratio
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

import kernels
from flux2.blocks import ResBlock
from kernels.tiles import L2_BYTES, samples_per_pass

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHIFT = 4.63
REFERENCE = "eager channels_last"  # whom ratios are against


@dataclass(frozen=True)
class Op:
    """tensors(shape, dtype, device): x, dense, then parameters. ours and eager take them. traffic: (forward, backward)
    in multiples of n e, where a second pass reads main memory and where it finds a sample in L2."""

    tensors: Callable[[tuple[int, ...], torch.dtype, torch.device], list[Tensor]]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    traffic: tuple[float, float]
    traffic_in_l2: tuple[float, float]
    liger: bool = False
    directions: tuple[str, ...] = ("forward", "backward")
    random: bool = False  # contestants draw numbers of their own, and cannot be compared


def _features(shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(2)]


def _qkv(shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(3)]


def _heads(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """q, k, v [N, T, D], N sequences times heads, as [1, N, T, D]."""
    return lambda *tensors: attend(*(t if t.ndim == 4 else t[None] for t in tensors)).view_as(tensors[0])


def _data(shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype)]


def _eager_times(x):
    return torch.sigmoid(torch.randn(x.shape[0], device=x.device) + math.log(SHIFT))


def _eager_flow(x):
    t = _eager_times(x).view(-1, *[1] * (x.ndim - 1))
    noise = torch.randn_like(x)
    return ((1 - t) * x + t * noise).to(x.dtype), noise - x


def _groups(channels: int) -> int:
    return 32 if channels % 32 == 0 else 4


def _norm_tensors(shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype), *(torch.randn(shape[1], device=device) for _ in range(2))]


def _conv_tensors(shape, dtype, device):
    c = shape[1]
    weight = torch.randn(c, c, 3, 3, device=device) / (9 * c) ** 0.5
    return [*_norm_tensors(shape, dtype, device), weight.to(dtype), torch.randn(c, device=device).to(dtype)]


def _add_tensors(shape, dtype, device):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return [x, residual, torch.randn(shape[1], device=device)]


def _upsample_tensors(shape, dtype, device):
    x, _, _, weight, bias = _conv_tensors(shape, dtype, device)
    return [x, weight, bias]


_BLOCKS: dict[tuple[str, int], ResBlock] = {}  # without storage: their parameters are handed over at each call


def _block_tensors(shape, dtype, device):
    c = shape[1]
    for backend in ("auto", "torch"):
        with torch.device("meta"):
            _BLOCKS[backend, c] = ResBlock(c, c, _groups(c))
        _BLOCKS[backend, c].backend = backend
    parameters = ResBlock(c, c, _groups(c)).parameters()
    return [torch.randn(shape, device=device).to(dtype), *(p.detach().to(device, dtype) for p in parameters)]


def _eager_norm(x, w, b):
    # On a GPU aten wants parameters of x's dtype, as a model in bf16 has them.
    return F.group_norm(x, _groups(x.shape[1]), w.to(x.dtype), b.to(x.dtype), 1e-6)


def _eager_add(x, residual, bias):
    """The sum and its statistics, which are the first thing that the next norm computes."""
    y = x + bias.to(x.dtype).view(-1, 1, 1) + residual
    grouped = y.detach().reshape(y.shape[0], _groups(y.shape[1]), -1)
    return y, *torch.var_mean(grouped, dim=2, correction=0)


def _block(backend: str):
    def call(x, *parameters):
        block = _BLOCKS[backend, x.shape[1]]
        names = [name for name, _ in block.named_parameters()]
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))[0]

    return call


def _ours_norm(name: str):
    return lambda x, w, b: getattr(kernels, name)(x, w, b, _groups(x.shape[1]))


OPS: dict[str, Op] = {
    "group_norm": Op(_norm_tensors, _ours_norm("group_norm"), _eager_norm, (3, 5), (2, 3), liger=True),
    "group_norm_silu": Op(
        _norm_tensors,
        _ours_norm("group_norm_silu"),
        lambda x, w, b: F.silu(_eager_norm(x, w, b)),
        (3, 5),
        (2, 3),
        liger=True,
    ),
    # norm, convolution 2; backward: norm again 2, both gradients of the convolution 4, norm 5
    "norm_silu_conv2d": Op(
        _conv_tensors,
        lambda x, nw, nb, w, b: kernels.norm_silu_conv2d(x, nw, nb, w, b, _groups(x.shape[1])),
        lambda x, nw, nb, w, b: F.conv2d(F.silu(_eager_norm(x, nw, nb)), w, b, padding=1),
        (5, 11),
        (4, 9),
    ),
    "add_bias_group_stats": Op(
        _add_tensors,
        lambda x, residual, bias: kernels.add_bias_group_stats(x, residual, bias, _groups(x.shape[1])),
        _eager_add,
        (3, 1),
        (3, 1),
    ),
    # x in, 4 out; backward: 4 + 1 for the gradient of x, 4 + 1 for that of the weight
    "upsample_conv2d": Op(
        _upsample_tensors,
        kernels.upsample_conv2d,
        lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, padding=1),
        (5, 10),
        (5, 10),
    ),
    # q, k, v in, o out; backward: those and the gradient of o, and three gradients. Multiplications bound it
    "attention": Op(_qkv, _heads(kernels.attention), _heads(F.scaled_dot_product_attention), (4, 8), (4, 8)),
    "repa_loss": Op(
        _features,
        kernels.repa_loss,
        lambda p, y: -F.cosine_similarity(p.float(), y.float(), dim=-1).mean(),
        (2, 4),
        (2, 4),
    ),
    "flow_match_inputs": Op(
        _data,
        lambda x: kernels.flow_match_inputs(x, law="logit_normal", shift=SHIFT)[:2],
        _eager_flow,
        (3, 0),
        (3, 0),
        directions=("forward",),
        random=True,
    ),
    "sample_timesteps": Op(
        _data,
        lambda x: kernels.sample_timesteps(x.shape[0], law="logit_normal", shift=SHIFT, device=x.device),
        _eager_times,
        (1, 0),
        (1, 0),
        directions=("forward",),
        random=True,
    ),
    # 8 besides its convolutions (docs/kernels.md), which move 4; backward: two of norm_silu_conv2d's and the bias's 1
    "residual_block": Op(_block_tensors, _block("auto"), _block("torch"), (12, 23), (10, 19)),
}


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: str
    direction: str  # "forward" or "backward"

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype} {self.direction}"

    def bytes_moved(self, device: torch.device) -> int:
        """By the op's formula; a sample, and its gradient in backward, may stay in a GPU's L2 between two passes."""
        op, element = OPS[self.op], DTYPES[self.dtype].itemsize
        backward = self.direction == "backward"
        x = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")
        part = samples_per_pass(x, tensors=1 + backward) * (x.nbytes // self.shape[0]) * (1 + backward)
        fits = device.type != "cpu" and part <= L2_BYTES
        return int((op.traffic_in_l2 if fits else op.traffic)[backward] * math.prod(self.shape) * element)


def _cases(op: str, shapes: dict[tuple[int, ...], tuple[str, ...]]) -> list[Case]:
    return [Case(op, s, dtype, d) for s, dtypes in shapes.items() for dtype in dtypes for d in OPS[op].directions]


_BOTH, _BF16 = ("bf16", "fp32"), ("bf16",)
# FLUX.2's activations at 1024 pixels, its decoder's bottom at 256, the small decoder's widths, a training batch
_GPU_NORMS = {
    (1, 128, 1024, 1024): _BOTH, (1, 256, 512, 512): _BF16, (1, 512, 256, 256): _BF16, (1, 512, 32, 32): _BF16,
    (1, 96, 1024, 1024): _BF16, (1, 384, 256, 256): _BF16, (16, 128, 256, 256): _BF16, (16, 512, 64, 64): _BF16,
}  # fmt: skip
_GPU_CONVS = {(1, 128, 1024, 1024): _BF16, (1, 512, 256, 256): _BF16, (16, 128, 256, 256): _BF16}
_CPU = {(1, 128, 96, 96): _BOTH}
SHAPES: dict[str, dict[str, dict[tuple[int, ...], tuple[str, ...]]]] = {
    "cuda": {
        "group_norm": {(1, 512, 128, 128): _BF16},
        "group_norm_silu": _GPU_NORMS,
        "norm_silu_conv2d": _GPU_CONVS,
        "add_bias_group_stats": _GPU_NORMS,
        "upsample_conv2d": {(1, 512, 128, 128): _BF16, (1, 256, 512, 512): _BF16, (16, 512, 32, 32): _BF16},
        "attention": {(1, 4096, 512): _BF16, (1, 16384, 512): _BF16, (1024, 256, 72): _BF16},
        "repa_loss": {(64, 256, 768): _BOTH, (64, 256, 1024): _BF16},
        "flow_match_inputs": {(256, 128, 16, 16): _BOTH, (256, 768, 16, 16): _BF16},
        "sample_timesteps": {(4096, 1): ("fp32",)},
        "residual_block": _GPU_CONVS,
    },
    "cpu": {
        "group_norm": {(2, 96, 48, 48): _BF16},
        "group_norm_silu": _CPU,
        "norm_silu_conv2d": _CPU,
        "add_bias_group_stats": {(1, 128, 96, 96): _BF16},
        "upsample_conv2d": {(1, 128, 48, 48): _BOTH},
        "attention": {(1, 1024, 512): _BF16, (24, 256, 64): _BF16},
        "repa_loss": {(4, 256, 768): _BOTH},
        "flow_match_inputs": {(8, 128, 16, 16): ("fp32",)},
        "sample_timesteps": {(4096, 1): ("fp32",)},
        "residual_block": {(1, 128, 48, 48): _BF16},
    },
}


def cases(op: str, device: torch.device) -> list[Case]:
    """Those of one op for a kind of device; cases that take minutes on a GPU's memory are not for a CPU."""
    return _cases(op, SHAPES["cpu" if device.type == "cpu" else "cuda"][op])


@dataclass
class Contest:
    """calls: contestants that run here, "ours" first. missing: the others, and why. outputs: what forward gives."""

    calls: dict[str, Callable[[], Any]]
    missing: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def _compiled(f: Callable, **options) -> Callable:
    return torch.compile(f, fullgraph=True, dynamic=False, options=options or None)


def _liger(op_name: str) -> Callable[..., Tensor] | str:
    """Liger's GroupNorm, with SiLU behind it where the op has one; or why not."""
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction
    except ImportError as error:
        return f"not installed ({error})"

    def call(x, w, b):
        n, c = x.shape[:2]  # its backward takes three dimensions only (Liger-Kernel issue 1375)
        groups = _groups(c)
        y = LigerGroupNormFunction.apply(x.reshape(n, c, -1), w.to(x.dtype), b.to(x.dtype), c, groups, 1e-6)
        return F.silu(y).view(x.shape) if op_name == "group_norm_silu" else y.view(x.shape)

    return call


def contest(case: Case, device: torch.device, only: tuple[str, ...] | None = None) -> Contest:
    """The contestants of a case, ready to be called, on one set of random numbers; those in `only`, if given."""
    op = OPS[case.op]
    torch.compiler.reset()  # Dynamo keeps at most eight compilations of one function, and would give up
    functorch_config.donated_buffer = False  # backward is called again and again
    torch.manual_seed(0)
    tensors = op.tensors(case.shape, DTYPES[case.dtype], device)
    last = [_last(t) for t in tensors]
    entrants: dict[str, tuple[Callable | str, list[Tensor]]] = {
        "ours": (op.ours, last),
        "eager NCHW": (op.eager, tensors),
        "eager channels_last": (op.eager, last),
        "compiled channels_last": (_compiled(op.eager), last),
    }
    reindexes = hasattr(inductor_config, "loop_reindexing_after_fusion")
    if device.type == "cuda" and reindexes:
        # Inductor's reindexing makes upsample-norm-SiLU several times slower on some GPUs (pytorch issue 189488).
        plain = _compiled(op.eager, loop_reindexing_after_fusion=False)
        entrants["compiled channels_last, no reindexing"] = (plain, last)
    if device.type == "cuda":
        entrants["ours NCHW"] = (op.ours, tensors)
    if op.liger:
        runs = device.type == "cuda"
        entrants["Liger NCHW"] = (_liger(case.op) if runs else "its kernels need a GPU", tensors)
    made = Contest({})
    for name, (f, given) in entrants.items():
        if only and name not in only:
            continue
        if isinstance(f, str):
            made.missing[name] = f
            continue
        try:
            if case.direction == "forward":
                call = output = _forward(f, given)
            else:
                call, output = _backward(f, given)
            call()
        except Exception as error:  # Triton's and Inductor's errors have no common base
            if name == "ours":
                raise
            made.missing[name] = f"fails: {type(error).__name__}: {_line(error)}"
            continue
        made.calls[name], made.outputs[name] = call, output
    if only and "copy" not in only:
        return made
    source = torch.empty(case.bytes_moved(device) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    made.calls["copy"] = lambda: target.copy_(source)
    return made


def _forward(f: Callable, tensors: list[Tensor]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call():
        return _first(f(*tensors))

    return call


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _backward(f: Callable, tensors: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """Gradients of all tensors, of a graph that is kept, for a gradient that lies as the output does."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = _first(f(*leaves))
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), lambda: y.detach()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["?"])[0][:120]


def check(made: Contest, case: Case) -> None:
    """AssertionError if ours computes something else than eager NCHW; another contestant that does is missing then."""
    if OPS[case.op].random:
        return
    truth = made.outputs["eager NCHW"]().float()
    tolerance = 0.03 if case.dtype == "bf16" else 1e-4
    for name, output in list(made.outputs.items()):
        error = ((output().float() - truth).norm() / truth.norm()).item()
        if error <= tolerance:
            continue
        assert not name.startswith("ours"), f"{case}: {name} is off by {error:.1e} (relative)"
        made.missing[name] = f"off by {error:.1e} (relative)"
        del made.calls[name], made.outputs[name]


def summary(
    case: Case, samples: dict[str, list[float]], missing: dict[str, str], device: torch.device
) -> dict[str, Any]:
    """One row of results: medians in ms, GB/s by the formula, percent of what the copy reaches, ratios to eager."""

    moved = case.bytes_moved(device)
    middle = {name: sorted(times)[len(times) // 2] for name, times in samples.items()}
    contestants = {
        name: {
            "ms": ms,
            "gb_per_s": moved / ms / 1e6,
            "percent_of_copy": 100 * middle["copy"] / ms,
            "over_eager": ratio(samples[name], samples[REFERENCE])[0],
        }
        for name, ms in middle.items()
    }
    return {
        "case": str(case), "op": case.op, "shape": list(case.shape), "dtype": case.dtype, "direction": case.direction,
        "bytes": moved, "rounds": len(samples["copy"]), "contestants": contestants, "missing": missing,
    }  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of rows: per contestant ms (GB/s, % of the copy)."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["contestants"], *row["missing"])))
    out = [f"| case | {' | '.join(names)} | ours / {REFERENCE} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = []
        for name in names:
            if (c := row["contestants"].get(name)) is not None:
                cells.append(f"{c['ms']:.3g} ms, {c['gb_per_s']:.0f} GB/s, {c['percent_of_copy']:.0f}%")
            else:
                cells.append(row["missing"].get(name, "-"))
        out.append(f"| {row['case']} | {' | '.join(cells)} | {row['contestants']['ours']['over_eager']:.2f} |")
    return out
