"""upsample_conv2d against its definition (interpolate, then conv3x3), channels_last, forward and forward + backward.

`pytest benchmarks/bench_upsample_conv.py --benchmark-only`. Multiplications for a pixel of the output and a pair of
channels: 9 in the definition, 4 in ours.
"""

import pytest
import torch

from kernels import upsample_conv2d
from kernels.upsample_conv import upsample_conv2d_reference

OPS = {"reference": upsample_conv2d_reference, "ours": upsample_conv2d}
CASES = [
    pytest.param(shape, dtype, id=f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}")
    for shape in ((16, 64, 32, 32), (1, 512, 32, 32))
    for dtype in (torch.float32, torch.bfloat16)
]


def tensors(shape, dtype):
    n, c, h, w = shape
    x, weight, grad = (
        torch.randn(s).to(dtype).contiguous(memory_format=torch.channels_last)
        for s in (shape, (c, c, 3, 3), (n, c, 2 * h, 2 * w))
    )
    return (x, weight / (9 * c) ** 0.5, torch.randn(c).to(dtype)), grad


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def bench_forward(benchmark, shape, dtype, op):
    benchmark.group = f"upsample_conv2d forward {list(shape)} {dtype}"
    given, _ = tensors(shape, dtype)
    assert torch.isfinite(benchmark.pedantic(OPS[op], given, rounds=5, warmup_rounds=1)).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def bench_forward_backward(benchmark, shape, dtype, op):
    benchmark.group = f"upsample_conv2d forward + backward {list(shape)} {dtype}"
    given, grad = tensors(shape, dtype)
    leaves = [v.requires_grad_() for v in given]
    grads = benchmark.pedantic(lambda: torch.autograd.grad(OPS[op](*leaves), leaves, grad), rounds=3, warmup_rounds=1)
    assert all(torch.isfinite(g).all() for g in grads)
