"""Representation alignment: minus the mean cosine of predicted and teacher features (Yu et al. 2024, arXiv:2410.06940).

Over R rows p, y of D values, as torch.nn.functional.cosine_similarity with eps = 1e-8:

    cos = a b <p, y>         a = 1 / max(|p|, eps), b = 1 / max(|y|, eps)
    loss = -mean of cos over rows
    dp = -g/R (b y - cos a p) a, without its second term where |p| < eps; dy with the roles changed

and dp = dy = 0 where either row is zeros. fp32 inside. Bytes an element in bf16: forward reads p and y, 4; backward
reads both and writes dp, 6, or dp and dy, 8. Saved for backward: p, y and three fp32 numbers a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import call, resolve, tl, triton
from .group_norm import NAMESPACE
from .tiles import launch

EPS = 1e-8
BLOCK_D = 512  # columns a program reads at once; longer rows take several turns

# --- reference -----------------------------------------------------------------------------------------------------


def repa_loss_reference(pred: Tensor, target: Tensor) -> Tensor:
    """The definition: pred, target [..., D] -> scalar, in fp32 (fp64 if given fp64)."""
    acc = torch.promote_types(pred.dtype, torch.float32)
    return -torch.nn.functional.cosine_similarity(pred.to(acc), target.to(acc), dim=-1, eps=EPS).mean()


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _reciprocal_norm(squares):
    """1 / max(norm, eps), and 0 for a row of zeros: all its gradients are 0 then."""
    return tl.where(squares > 0.0, 1.0 / tl.maximum(tl.sqrt(squares), 1e-8), 0.0)


@triton.jit(do_not_specialize=["rows"])
def _repa_fwd_kernel(p_ptr, y_ptr, saved_ptr, p_sr, y_sr, rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos, 1 / max(|p|, eps) and 1 / max(|y|, eps) of BLOCK_R rows, in saved [3, rows]."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_ptr += r.to(tl.int64)[:, None] * p_sr
    y_ptr += r.to(tl.int64)[:, None] * y_sr
    py = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    pp = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    yy = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        keep = (r < rows)[:, None] & (d < D)[None, :]
        p = tl.load(p_ptr + d[None, :], mask=keep, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + d[None, :], mask=keep, other=0.0).to(tl.float32)
        py += p * y
        pp += p * p
        yy += y * y
    a = _reciprocal_norm(tl.sum(pp, 1))
    b = _reciprocal_norm(tl.sum(yy, 1))
    saved_ptr += r
    tl.store(saved_ptr, tl.sum(py, 1) * a * b, mask=r < rows)
    tl.store(saved_ptr + rows, a, mask=r < rows)
    tl.store(saved_ptr + 2 * rows.to(tl.int64), b, mask=r < rows)


@triton.jit
def _grad_row(mine, other, cos, a, b, scale):
    """d loss / d mine; a and b are 1 / max(norm, eps) of mine and other. Below eps the norm does not move."""
    pull = tl.where(a < 1e8, cos * a, 0.0)
    return scale * a * (b * other - pull * mine)


@triton.jit(do_not_specialize=["rows"])
def _repa_bwd_kernel(
    p_ptr, y_ptr, saved_ptr, grad_ptr, dp_ptr, dy_ptr, p_sr, y_sr, rows, D, HAS_DP: tl.constexpr, HAS_DY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dp and dy, dense, of BLOCK_R rows."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    saved_ptr += r
    cos = tl.load(saved_ptr, mask=r < rows, other=0.0)[:, None]
    a = tl.load(saved_ptr + rows, mask=r < rows, other=0.0)[:, None]
    b = tl.load(saved_ptr + 2 * rows.to(tl.int64), mask=r < rows, other=0.0)[:, None]
    scale = -tl.load(grad_ptr).to(tl.float32) / rows.to(tl.float32)
    row = r.to(tl.int64)[:, None]
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        keep = (r < rows)[:, None] & (d < D)
        p = tl.load(p_ptr + row * p_sr + d, mask=keep, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_sr + d, mask=keep, other=0.0).to(tl.float32)
        if HAS_DP:
            dp = _grad_row(p, y, cos, a, b, scale)
            tl.store(dp_ptr + row * D + d, dp.to(dp_ptr.dtype.element_ty), mask=keep)
        if HAS_DY:
            dy = _grad_row(y, p, cos, b, a, scale)
            tl.store(dy_ptr + row * D + d, dy.to(dy_ptr.dtype.element_ty), mask=keep)


# --- launchers -----------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [R, D] whose rows are contiguous, without a copy where x's layout allows it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _triton_forward(pred: Tensor, target: Tensor) -> Tensor:
    p, y = _rows(pred), _rows(target)
    rows, width = p.shape
    saved = torch.empty(3, rows, dtype=torch.float32, device=p.device)
    launch(
        _repa_fwd_kernel, -(-rows // 4), p, y, saved, p.stride(0), y.stride(0), rows, width, BLOCK_R=4, BLOCK_D=BLOCK_D,
        num_warps=4,
    )  # fmt: skip
    return saved


def _triton_backward(
    grad: Tensor, pred: Tensor, target: Tensor, saved: Tensor, of_pred: bool, of_target: bool
) -> tuple[Tensor, Tensor]:
    p, y = _rows(pred), _rows(target)
    rows, width = p.shape
    dp, dy = (
        torch.empty(t.shape if wanted else 0, dtype=t.dtype, device=t.device)
        for t, wanted in ((pred, of_pred), (target, of_target))
    )
    launch(
        _repa_bwd_kernel, -(-rows // 4), p, y, saved, grad, dp, dy, p.stride(0), y.stride(0), rows, width,
        HAS_DP=of_pred, HAS_DY=of_target, BLOCK_R=4, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return dp, dy


# --- op and autograd -----------------------------------------------------------------------------------------------


def _torch_forward(pred: Tensor, target: Tensor) -> Tensor:
    """As _triton_forward; fp64 for fp64."""
    acc = torch.promote_types(pred.dtype, torch.float32)
    p, y = _rows(pred).to(acc), _rows(target).to(acc)
    norms = (torch.linalg.vector_norm(t, dim=1) for t in (p, y))
    a, b = (torch.where(norm > 0, 1 / norm.clamp(min=EPS), 0.0) for norm in norms)  # 0: so are a zero row's gradients
    return torch.stack(((p * y).sum(1) * a * b, a, b))


def _torch_backward(grad, pred, target, saved, of_pred, of_target) -> tuple[Tensor, Tensor]:
    p, y = (_rows(t).to(saved.dtype) for t in (pred, target))
    cos, a, b = saved.unsqueeze(-1)
    scale = -grad.to(saved.dtype) / len(p)

    def one(mine, other, a, b, like):
        pull = torch.where(a < 1 / EPS, cos * a, 0.0)
        return (scale * a * (b * other - pull * mine)).to(like.dtype).view(like.shape)

    none = pred.new_empty(0)
    dp = one(p, y, a, b, pred) if of_pred else none
    return dp, one(y, p, b, a, target) if of_target else target.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::repa_loss", mutates_args=())
def repa_loss_op(pred: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The loss, a scalar of fp32 (fp64 for fp64), and what backward needs: cos and reciprocal norms [3, R]."""
    saved = (_triton_forward if backend == "triton" else _torch_forward)(pred, target)
    return -saved[0].mean(), saved


@repa_loss_op.register_fake
def _(pred, target, backend):
    acc = torch.promote_types(pred.dtype, torch.float32)
    rows = pred.numel() // pred.shape[-1]
    return pred.new_empty((), dtype=acc), pred.new_empty(3, rows, dtype=acc)


@torch.library.custom_op(f"{NAMESPACE}::repa_loss_backward", mutates_args=())
def repa_loss_backward_op(
    grad: Tensor, pred: Tensor, target: Tensor, saved: Tensor, of_pred: bool, of_target: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """dpred and dtarget, contiguous; [0] where not wanted."""
    backward = _triton_backward if backend == "triton" else _torch_backward
    return backward(grad, pred, target, saved, of_pred, of_target)


@repa_loss_backward_op.register_fake
def _(grad, pred, target, saved, of_pred, of_target, backend):
    return pred.new_empty(pred.shape if of_pred else 0), target.new_empty(target.shape if of_target else 0)


def _setup_context(ctx, inputs, output):
    pred, target, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, target, output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None
    of_pred, of_target, _ = ctx.needs_input_grad
    dp, dy = repa_loss_backward_op(grad, *ctx.saved_tensors, of_pred, of_target, ctx.backend)
    return dp if of_pred else None, dy if of_target else None, None


repa_loss_op.register_autograd(_backward, setup_context=_setup_context)


# --- public --------------------------------------------------------------------------------------------------------


def _unsupported(x: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"pred has dtype {x.dtype}, kernels take float32, bfloat16 and float16"
    return None


def repa_loss(pred: Tensor, target: Tensor, backend: str = "auto") -> Tensor:
    """-mean over rows of cos(pred, target); pred, target [..., D] of one shape, any floating dtypes -> fp32 scalar.

    Equals -F.cosine_similarity(pred, target, dim=-1, eps=1e-8).mean() with fp32 inside (fp64 if pred is fp64).
    Gradients, once differentiable, of both where asked for; 0 for a row of zeros. Source: Yu et al. 2024,
    arXiv:2410.06940, eq. 8.

    backend: "triton" takes fp32, bf16 and fp16; "torch" is plain torch; "auto" is Triton on a GPU where it can run.
    Rows that are not contiguous are copied. ValueError, naming expected and got, for shapes, dtypes and devices.
    """
    if pred.ndim < 1 or not pred.is_floating_point() or pred.numel() == 0:
        raise ValueError(
            f"repa_loss: pred: expected floating-point [..., D], not empty, got {pred.dtype} {list(pred.shape)}"
        )
    if target.shape != pred.shape or not target.is_floating_point() or target.device != pred.device:
        raise ValueError(
            f"repa_loss: target: expected floating-point {list(pred.shape)} on {pred.device} like pred, got "
            f"{target.dtype} {list(target.shape)} on {target.device}"
        )
    backend = resolve("repa_loss", backend, pred, unsupported=_unsupported)
    loss, _ = call(repa_loss_op, pred, target, backend)
    return loss
