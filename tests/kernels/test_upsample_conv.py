"""upsample_conv2d against its definition in fp64: values, every gradient, layouts, compile, errors."""

import hypothesis.strategies as st
import pytest
import torch
from gradients import randn
from hypothesis import given, settings
from tolerance import assert_no_worse
from views import views

from kernels import upsample_conv2d
from kernels.upsample_conv import upsample_conv2d_reference

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# [N, C_in, H, W], C_out: odd sides, one pixel, one row, more channels out than in and the other way round
SHAPES = [((2, 5, 7, 9), 6), ((1, 16, 8, 8), 16), ((3, 4, 1, 1), 7), ((2, 9, 1, 5), 3), ((1, 33, 5, 4), 8)]


def inputs(shape, c_out, dtype, memory_format=torch.contiguous_format, bias=True):
    """x, weight, bias and the gradient of y: rounded to dtype, so that the fp64 copies are the same numbers"""
    n, c, h, w = shape
    values = [
        torch.randn(n, c, h, w).contiguous(memory_format=memory_format),
        (torch.randn(c_out, c, 3, 3) / (9 * c) ** 0.5).contiguous(memory_format=memory_format),
        torch.randn(c_out) if bias else None,
        torch.randn(n, c_out, 2 * h, 2 * w).contiguous(memory_format=memory_format),
    ]
    return [None if v is None else v.to(dtype) for v in values]


def run(op, x, weight, bias, grad):
    """y and the gradients of all inputs"""
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias) if v is not None]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "c_out"), SHAPES)
def test_values_and_gradients(shape, c_out, dtype, memory_format, bias):
    given = inputs(shape, c_out, dtype, FORMATS[memory_format], bias)
    got, base = run(upsample_conv2d, *given), run(upsample_conv2d_reference, *given)
    truth = run(upsample_conv2d_reference, *[None if v is None else v.double() for v in given])
    for g, b, t in zip(got, base, truth, strict=True):
        assert_no_worse(g, b, t)


def test_equals_the_definition_in_fp64():
    given = inputs((2, 5, 7, 9), 6, torch.float64)
    for got, expected in zip(run(upsample_conv2d, *given), run(upsample_conv2d_reference, *given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives():
    leaves = [v.requires_grad_() for v in inputs((1, 2, 3, 2), 2, torch.float64)[:3]]
    assert torch.autograd.gradcheck(upsample_conv2d, leaves)
    assert torch.autograd.gradgradcheck(upsample_conv2d, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("of_weight", FORMATS)
def test_keeps_the_memory_format_of_x(memory_format, of_weight, dtype):
    x, weight, bias, grad = inputs((2, 5, 7, 9), 6, dtype, FORMATS[memory_format])
    weight = weight.contiguous(memory_format=FORMATS[of_weight])
    y, grad_x, *_ = run(upsample_conv2d, x, weight, bias, grad)
    assert y.is_contiguous(memory_format=FORMATS[memory_format])
    assert grad_x.is_contiguous(memory_format=FORMATS[memory_format])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_sliced_and_empty(memory_format):
    x, weight, bias, _ = inputs((2, 10, 7, 18), 6, torch.float32, FORMATS[memory_format])
    x, weight = x[:, ::2, :, ::2], weight[:, ::2]
    torch.testing.assert_close(upsample_conv2d(x, weight, bias), upsample_conv2d_reference(x, weight, bias))
    assert upsample_conv2d(x[:0], weight, bias).shape == (0, 6, 14, 18)


def test_same_bits_twice():
    given = inputs((2, 16, 9, 9), 8, torch.float32)
    first, second = run(upsample_conv2d, *given), run(upsample_conv2d, *given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_compiles_to_one_graph(memory_format):
    given = inputs((2, 5, 7, 9), 6, torch.float32, FORMATS[memory_format])
    compiled = torch.compile(upsample_conv2d, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, *given), run(upsample_conv2d, *given), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_sums_weights_before_it_rounds_them(compiled):
    """1 + 2^-8 is 1 in bf16: two of it and two of -1 sum to 2^-7, or to nothing if they are rounded before."""
    weight = torch.zeros(1, 2, 3, 3)
    weight[:, 0, :2, 0], weight[:, 0, :2, 1] = 1 + 2**-8, -1
    op = torch.compile(upsample_conv2d, backend="aot_eager", fullgraph=True) if compiled else upsample_conv2d
    with torch.autocast("cpu", torch.bfloat16):
        y = op(torch.ones(1, 2, 4, 4), weight)
    assert y.dtype == torch.bfloat16
    assert y[0, 0, 3, 3] == 2**-7  # odd row, odd column: those four taps fall on one pixel


def test_saves_no_doubled_tensor():
    x, weight, bias, _ = inputs((4, 8, 16, 16), 8, torch.float32)
    sizes = {}

    def note(t):
        sizes[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        upsample_conv2d(x.requires_grad_(), weight.requires_grad_(), bias)
    assert sum(sizes.values()) < 2 * x.numel()  # the doubled one alone is 4


def test_errors_name_expected_and_got():
    x, weight, bias, _ = inputs((1, 4, 3, 3), 5, torch.float32)
    with pytest.raises(ValueError, match=r"upsample_conv2d: backend 'triton' cannot run: this op has no Triton kernel"):
        upsample_conv2d(x, weight, bias, backend="triton")
    with pytest.raises(ValueError, match=r"backend: expected one of auto, torch, triton, got 'fast'"):
        upsample_conv2d(x, weight, bias, backend="fast")
    with pytest.raises(ValueError, match=r"x: expected \[N, C_in, H, W\], got \[4, 3, 3\]"):
        upsample_conv2d(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight: expected \[C_out, 4, 3, 3\] .*, got \[5, 4, 2, 3\]"):
        upsample_conv2d(x, weight[:, :, :2], bias)
    with pytest.raises(ValueError, match=r"weight: expected \[C_out, 4, 3, 3\] .*, got \[5, 3, 3, 3\]"):
        upsample_conv2d(x, weight[:, :3], bias)
    with pytest.raises(ValueError, match=r"bias: expected \[5\], got \[4\]"):
        upsample_conv2d(x, weight, bias[:4])
    assert torch.equal(upsample_conv2d(x, weight, bias, backend="torch"), upsample_conv2d(x, weight, bias))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(views(min_rank=2, max_rank=2), st.booleans())
def test_any_view_is_right(view, with_bias):
    x, _ = view
    weight = (randn((5, x.shape[1], 3, 3)) / (9 * x.shape[1]) ** 0.5).to(x.dtype)
    bias = randn(5, x.dtype) if with_bias else None
    base = upsample_conv2d_reference(x, weight, bias)
    truth = upsample_conv2d_reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert_no_worse(upsample_conv2d(x, weight, bias), base, truth)


def test_types_are_named():
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(4, 4, 3, 3)
    for bad, message in [
        (lambda: upsample_conv2d(x.bfloat16(), weight), "weight: expected torch.bfloat16 like x, got torch.float32"),
        (lambda: upsample_conv2d(x, weight, weight[0, :, 0, 0].half()), "bias: expected torch.float32 like x"),
        (lambda: upsample_conv2d(x.int(), weight.int()), "x: expected floating-point with sides, got torch.int32"),
        (lambda: upsample_conv2d(x[:, :, :0], weight), r"x: expected floating-point with sides, got .*\[1, 4, 0, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
