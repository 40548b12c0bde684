"""GroupNorm and GroupNorm + SiLU by aten: what `backend="torch"` runs, with the interface of the Triton launchers.

Statistics are aten's: exact to 1e-6 where values lie around their mean, but in channels_last from squared sums, which
lose the variance where the mean is hundreds of deviations away from zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _aten_input(x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x + input_bias dense as aten wants it, weight and bias: fp32 parameters go with bf16 x on a CPU only."""
    if input_bias is not None:
        x = x + input_bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
    acc = torch.promote_types(x.dtype, torch.float32)
    x = x if x.device.type == "cpu" else x.to(acc)
    # On a GPU aten's norm takes NCHW only, and its backward reads anything else as that.
    last = x.device.type == "cpu" and x.ndim in (4, 5) and not x.is_contiguous() and x.stride(1) == 1
    last_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    x = x.contiguous(memory_format=last_format if last else torch.contiguous_format)
    if last and 1 in x.shape:  # aten reads the layout off all strides, those of sides of one pixel too
        x = x.as_strided(x.shape, torch.empty_like(x, device="meta", memory_format=last_format).stride())
    return x, weight.to(acc), bias.to(acc)


def as_laid_out(y: Tensor, x: Tensor) -> Tensor:
    """y with the dtype of x and the strides of empty_like(x); a copy only where they differ."""
    if y.dtype == x.dtype and y.stride() == x.stride():
        return y
    out = torch.empty_like(x)
    return y if y.dtype == out.dtype and y.stride() == out.stride() else out.copy_(y)


def aten_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_bias: Tensor | None,
    stats: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """As triton_forward; stats in fp64 for fp64 x."""
    h, w, b = _aten_input(x, weight, bias, input_bias)
    n, channels = x.shape[:2]
    if stats is None:
        rows = x.numel() // max(1, n * channels)
        y, mean, rstd = torch.native_group_norm(h, w, b, n, channels, rows, num_groups, eps)
        stats = torch.stack((mean, rstd.square().reciprocal() - eps), dim=-1)
    else:
        mean, var = stats.repeat_interleave(channels // num_groups, 1).unbind(-1)  # [N, C] each
        scale = (var + eps).rsqrt() * w
        shape = [n, channels, *[1] * (x.ndim - 2)]
        y = torch.addcmul((b - mean * scale).view(shape), h, scale.view(shape))
    return as_laid_out(F.silu(y, inplace=True) if silu else y, x), stats


def aten_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, stats: Tensor, eps: float,
    silu: bool, given: bool, z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As triton_backward. given: whether forward was given the statistics; z: aten_forward's with silu=False."""
    h, w, _ = _aten_input(x, weight, bias, input_bias)
    n, channels = x.shape[:2]
    num_groups = stats.shape[1]
    if silu:
        if z is None:
            z, _ = aten_forward(x, weight, bias, input_bias, stats if given else None, num_groups, eps, silu=False)
        dy = torch.ops.aten.silu_backward(dy, z)
    if dy.stride() != h.stride() or dy.dtype != h.dtype:
        dy = torch.empty_like(h).copy_(dy)
    if x.device.type == "cpu" and channels <= (32 if h.dtype == torch.float32 else 96):
        h, dy = h.contiguous(), dy.contiguous()  # aten's channels_last backward is up to 8x slower: docs/log.md
    mean, rstd = stats[..., 0].contiguous(), (stats[..., 1] + eps).rsqrt()
    dx, dw, db = torch.ops.aten.native_group_norm_backward(
        dy, h, mean, rstd, w, n, channels, x.numel() // max(1, n * channels), num_groups, [True] * 3
    )
    dinput_bias = x.new_empty(0)
    if input_bias is not None:
        acc = torch.promote_types(x.dtype, torch.float32)
        dinput_bias = dx.sum([0, *range(2, x.ndim)], dtype=acc).to(input_bias.dtype)
    return as_laid_out(dx, x), dw.to(weight.dtype), db.to(bias.dtype), dinput_bias
