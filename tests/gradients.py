"""Runs an op and its gradients on the device that the suite has, beside eager torch and fp64."""

import torch
import torch.nn.functional as F
from tolerance import assert_no_worse
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("nchw", "channels_last")

# x, groups. Channels a group: 3, 4, 12, 16, 1, 2; spatial rank 0 to 3; odd sides; one row, one chunk, many, cut ones
SHAPES = [
    ((2, 12, 5, 7), 4),
    ((1, 96, 9, 9), 32),
    ((2, 16, 4, 4), 4),
    ((1, 192, 6, 6), 16),
    ((3, 32, 40), 2),
    ((2, 6, 3, 3, 3), 3),
    ((4, 8), 4),
    ((1, 128, 13, 11), 8),  # three chunks in channels_last
    ((1, 8, 80, 80), 2),  # two in NCHW, long rows
]


def randn(shape, dtype=torch.float32, layout: str = "nchw") -> Tensor:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def same_layout(y: Tensor, x: Tensor) -> bool:
    """Whether y's dimensions of more than one element have x's strides."""
    wide = [i for i, size in enumerate(x.shape) if size > 1]
    return all(y.stride(i) == x.stride(i) for i in wide)


def run(op, tensors, dy) -> list[Tensor]:
    """y and the gradients of all tensors that are not None"""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(y.dtype))]


def check(op, eager, tensors, dy) -> None:
    """op against `eager` in the same dtypes, and both against `eager` in fp64: y and all gradients."""
    got, base = run(op, tensors, dy), run(eager, tensors, dy)
    truth = run(eager, [None if t is None else t.double() for t in tensors], dy.double())
    for g, b, t in zip(got, base, truth, strict=True):
        assert_no_worse(g, b.to(g.dtype), t)


def eager_norm(num_groups: int, eps: float = 1e-6, silu: bool = True):
    """The modules that the op stands for. On a GPU aten wants parameters of x's dtype."""

    def norm(x, weight, bias, input_bias=None):
        if x.device.type != "cpu":
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if input_bias is not None:
            x = x + input_bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        y = F.group_norm(x, num_groups, weight, bias, eps)
        return F.silu(y) if silu else y

    return norm
