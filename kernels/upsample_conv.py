"""conv3x3 of the nearest-neighbour doubling of x, without the doubled tensor.

Doubling repeats each pixel, so the nine taps of an output pixel fall on four input pixels only, with summed weights.
Which ones depends on the phase (row and column of the output, modulo two): in one dimension the kernel is (w0, w1 + w2)
on pixels m - 1, m for output 2m, and (w0 + w1, w2) on pixels m, m + 1 for output 2m + 1. Four 2x2 convolutions, 4/9 of
the multiplications, and autograd keeps the padded x instead of a tensor four times its size.

The same function is one transposed convolution with a 4x4 kernel and stride 2. Its gradient with respect to x adds 16 C
terms in one chain, which in fp32 missed the tolerance of tests/tolerance.py; docs/log.md has the timings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import conv2d
from .dispatch import autocast_dtype, resolve, without_autocast


def upsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition; arguments as `upsample_conv2d`. Computes in the dtype that it is given."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def phase_kernels(weight: Tensor) -> Tensor:
    """[C_out, C_in, 3, 3] -> [4, C_out, C_in, 2, 2], phase 2p + q; summed in at least fp32, then in weight's dtype.

    A product with a constant of zeros and ones, made on the device: a copy from the host would wait for it.
    """
    acc = torch.promote_types(weight.dtype, torch.float32)
    phase = torch.arange(2, device=weight.device).view(2, 1, 1)
    tap, t = torch.arange(2, device=weight.device).view(2, 1), torch.arange(3, device=weight.device)
    falls_on = ((phase + t + 1) // 2 - phase == tap).to(acc)  # [phase, tap, t]: whether w_t is part of the phase's tap
    both_axes = (falls_on.view(2, 1, 2, 1, 3, 1) * falls_on.view(1, 2, 1, 2, 1, 3)).view(16, 9)
    # Autocast would round weights, and the terms of their gradient, before they are summed.
    with without_autocast(weight):
        taps = weight.to(acc).permute(0, 2, 3, 1).flatten(1, 2)  # [C_out, 9, C_in]
        summed = both_axes @ taps  # [C_out, 16, C_in]
    return summed.unflatten(1, (4, 2, 2)).permute(1, 0, 4, 2, 3).to(weight.dtype)


def _interleave(phases: list[Tensor], channels_last: bool) -> Tensor:
    """Four [N, C, H, W], phase 2p + q -> [N, C, 2H, 2W] in the memory format that is asked for."""
    if channels_last and phases[0].device.type == "cpu" and not any(y.requires_grad for y in phases):
        n, c, h, w = phases[0].shape  # one pass over memory instead of two; autograd would need four
        y = phases[0].new_empty(n, h, 2, w, 2, c)
        for phase, part in enumerate(phases):
            y.select(2, phase // 2).select(3, phase % 2).copy_(part.permute(0, 2, 3, 1))
        return y.view(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
    if channels_last:
        a, b, c, d = (y.permute(0, 2, 3, 1) for y in phases)
        y = torch.stack((torch.stack((a, b), 3), torch.stack((c, d), 3)), 2)  # [N, H, 2, W, 2, C]
        return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    a, b, c, d = phases
    y = torch.stack((torch.stack((a, b), 4), torch.stack((c, d), 4)), 3)  # [N, C, H, 2, W, 2]
    return y.flatten(4, 5).flatten(2, 3)


def upsample_padded(padded: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """[N, C_in, H + 2, W + 2], with the pixels around it -> [N, C_out, 2H, 2W]; kernels: of `phase_kernels`."""
    height, width = (side - 2 for side in padded.shape[2:])
    channels_last = not padded.is_contiguous()
    if channels_last:
        padded = padded.permute(0, 2, 3, 1)  # a slice's gradient is contiguous in the order of dimensions it was cut in
    rows = 1 if channels_last else 2
    phases = []
    for phase, kernel in enumerate(kernels.unbind()):
        p, q = divmod(phase, 2)
        window = padded.narrow(rows, p, height + 1).narrow(rows + 1, q, width + 1)
        window = window.permute(0, 3, 1, 2) if channels_last else window
        phases.append(conv2d(window, kernel, bias))
    return _interleave(phases, channels_last)


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """y = conv3x3(nearest_x2(x)) with padding 1.

    x [N, C_in, H, W], NCHW or channels_last; weight [C_out, C_in, 3, 3]; bias [C_out] or None; all of one floating
    dtype, or as autocast makes them. y [N, C_out, 2H, 2W] and x's gradient are in x's memory format. Differentiable any
    number of times. Summed weights are rounded to weight's dtype once more than in the definition: this is the same
    function up to rounding.

    backend: "torch" is the four convolutions; "triton" is a ValueError, for this op has no Triton kernel. ValueError
    also for other shapes, naming expected and got.
    """
    resolve("upsample_conv2d", backend, x, supported=("torch",))
    if x.ndim != 4:
        raise ValueError(f"upsample_conv2d: x: expected [N, C_in, H, W], got {list(x.shape)}")
    if not x.is_floating_point() or 0 in x.shape[2:]:
        raise ValueError(f"upsample_conv2d: x: expected floating-point with sides, got {x.dtype} {list(x.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and autocast_dtype(x) is None and p.dtype != x.dtype:
            raise ValueError(f"upsample_conv2d: {name}: expected {x.dtype} like x, got {p.dtype}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"upsample_conv2d: weight: expected [C_out, {x.shape[1]}, 3, 3] for x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"upsample_conv2d: bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    padded = F.pad(x, (1, 1, 1, 1))  # dense, in the memory format that x's strides suggest
    return upsample_padded(padded, phase_kernels(weight), bias)
