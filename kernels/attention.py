"""softmax(scale q k^T) v under one signature: written out in chunks of queries, PyTorch's, flash-attn's or xformers'.

Chunks need memory for rows x T_k scores, whatever T_q is, in both directions: backward computes a chunk's weights anew
from q and k, and nothing else is kept.

    p = softmax(scale q k^T)   o = p v
    dv = p^T do   dp = do v^T   ds = p (dp - sum(p dp))   dq = scale ds k   dk = scale ds^T q

fp32 inside (fp64 for fp64). No Triton kernel: up to head dimension 256 PyTorch's are fused, and above it the
memory-efficient one takes rows that are multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import GPU_TYPES, autocast_dtype, call, resolve, without_autocast
from .group_norm import NAMESPACE

BACKENDS = ("torch", "sdpa", "flash", "xformers")
CHUNK_SCORES = 2**24  # scores held at once, 64 MiB in fp32


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The definition; arguments as `attention`. In fp32 (fp64 if given fp64), rounded to q's dtype once."""
    acc = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(acc) @ k.to(acc).transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v.to(acc)).to(q.dtype)


# Chunks of queries


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], rows):
        yield slice(start, start + rows)


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.transpose(-2, -1)).softmax(-1)


@torch.library.custom_op(f"{NAMESPACE}::attention_chunked", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """o, contiguous, in q's dtype."""
    acc = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(acc), v.to(acc)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with without_autocast(q):
        for rows in _chunks(q, k):
            out[:, :, rows] = _weights(q[:, :, rows].to(acc) * scale, keys) @ values
    return out


@attention_op.register_fake
def _(q, k, v, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op(f"{NAMESPACE}::attention_chunked_backward", mutates_args=())
def attention_backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous; dk and dv are summed over chunks before they are rounded."""
    acc = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(acc), v.to(acc)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=acc, device=t.device) for t in (k, v))
    with without_autocast(q):
        for rows in _chunks(q, k):
            queries, do = q[:, :, rows].to(acc) * scale, grad[:, :, rows].to(acc)
            weights = _weights(queries, keys)
            dv += weights.transpose(-2, -1) @ do
            ds = do @ values.transpose(-2, -1)
            ds.sub_((weights * ds).sum(-1, keepdim=True)).mul_(weights)
            dq[:, :, rows] = scale * (ds @ keys)
            dk += ds.transpose(-2, -1) @ queries
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@attention_backward_op.register_fake
def _(grad, q, k, v, scale):
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *attention_backward_op(grad, *ctx.saved_tensors, ctx.scale), None


attention_op.register_autograd(_backward, setup_context=_setup_context)


# Public


def _auto(q: Tensor) -> str:
    """sdpa, but chunks where a GPU has no fused kernel and sdpa would hold all scores: docstring of `attention`."""
    fused = q.dtype != torch.float64 and (q.shape[-1] <= 256 or q.shape[-1] * q.element_size() % 16 == 0)
    return "sdpa" if fused or q.device.type not in GPU_TYPES else "torch"


def _peer(backend: str) -> Callable[..., Tensor]:
    try:  # statements, which torch.compile traces
        if backend == "flash":
            from flash_attn import flash_attn_func as run  # pyright: ignore[reportMissingImports]
        else:
            from xformers.ops import memory_efficient_attention as run  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"attention: backend {backend!r} cannot run: it cannot be imported ({error}); the extra [attn] has it"
        ) from None
    return run


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(scale q k^T) v without mask or dropout; q [B, H, T_q, D], k and v [B, H, T_k, D] -> [B, H, T_q, D].

    All of one floating dtype, or as autocast makes them, with any strides. scale: 1/sqrt(D) if None. The output's
    strides are the backend's.

    backend: "torch" is exact in fp32 (fp64 for fp64), in chunks of queries, differentiable once; "sdpa" is PyTorch's
    scaled_dot_product_attention; "flash" (flash-attn: fp16 and bf16 on a GPU) and "xformers" are imported when they are
    asked for. "auto" is sdpa, but on a GPU "torch" for fp64 and for D > 256 in rows of no multiple of 16 bytes, which
    no fused kernel of PyTorch takes. ValueError, naming expected and got, for shapes, dtypes, and a backend that is
    unknown or not installed.
    """
    chosen = resolve("attention", _auto(q) if backend == "auto" else backend, q, supported=BACKENDS)
    if q.ndim != 4 or not q.is_floating_point() or q.shape[-1] == 0:
        raise ValueError(f"attention: q: expected floating-point [B, H, T, D], got {q.dtype} {list(q.shape)}")
    if k.ndim != 4 or k.shape[2] == 0 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        b, h, _, d = q.shape
        raise ValueError(f"attention: k: expected [{b}, {h}, T_k, {d}] for q {list(q.shape)}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v: expected {list(k.shape)} like k, got {list(v.shape)}")
    if (dtype := autocast_dtype(q)) is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"attention: {name}: expected {q.dtype} like q, got {t.dtype}")
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "torch":
        return call(attention_op, q, k, v, scale)
    run = _peer(chosen)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # both take [B, T, H, D]
    out = run(q, k, v, softmax_scale=scale) if chosen == "flash" else run(q, k, v, scale=scale)
    return out.transpose(1, 2)
