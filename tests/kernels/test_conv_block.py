"""norm_silu_conv2d and add_bias_group_stats, aten and the real kernels, against fp64; what is saved, what is moved."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from gradients import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    check,
    eager_norm,
    randn,
    run,
    same_layout,
)
from hypothesis import assume, given, settings
from tolerance import assert_no_worse
from views import REFUSALS, settled, views

from kernels import add_bias_group_stats, group_norm, group_norm_silu, norm_silu_conv2d
from kernels.conv_block import (
    add_bias_group_stats_op,
    add_bias_group_stats_reference,
    norm_silu_conv2d_backward_op,
    norm_silu_conv2d_op,
    norm_silu_conv2d_reference,
)

BACKENDS = ("torch", "triton")
# kernel size, stride, padding
CONVS = [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (3, 1, 0)]


def inputs(shape, c_out, dtype, layout="nchw", kernel=3, input_bias=True):
    """x, norm_weight, norm_bias, weight, bias, input_bias"""
    x = randn(shape, dtype, layout)
    weight = (randn((c_out, shape[1], kernel, kernel), layout=layout) / (kernel * kernel * shape[1]) ** 0.5).to(dtype)
    norm_weight, norm_bias, shift = (randn(shape[1]) for _ in range(3))
    return [x, norm_weight, norm_bias, weight, randn(c_out, dtype), shift if input_bias else None]


def op(num_groups, backend, stride=1, padding=1, **options):
    def call(x, nw, nb, w, b, i=None):
        return norm_silu_conv2d(
            x, nw, nb, w, b, num_groups, stride=stride, padding=padding, input_bias=i, backend=backend, **options
        )

    return call


def eager(num_groups, stride=1, padding=1):
    norm = eager_norm(num_groups)
    return lambda x, nw, nb, w, b, i=None: F.conv2d(norm(x, nw, nb, i), w, b, stride, padding)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize(("shape", "num_groups", "c_out"), [((2, 96, 7, 9), 32, 64), ((1, 64, 8, 8), 4, 64)], ids=str)
def test_values_and_gradients(shape, num_groups, c_out, conv, dtype, layout, backend):
    kernel, stride, padding = conv
    tensors = inputs(shape, c_out, DTYPES[dtype], layout, kernel)
    reference = eager(num_groups, stride, padding)
    dy = torch.randn_like(reference(*tensors))
    check(op(num_groups, backend, stride, padding), reference, tensors, dy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(4,), (5,), (4, 5)], ids=["no bias", "no input_bias", "neither"])
def test_without_a_bias(absent, backend):
    tensors = [None if i in absent else t for i, t in enumerate(inputs((2, 24, 5, 5), 12, torch.float32))]
    check(op(2, backend), eager(2), tensors, randn((2, 12, 5, 5)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_given_statistics(backend):
    tensors = inputs((2, 24, 7, 9), 12, torch.float32, "channels_last", input_bias=False)
    _, stats = add_bias_group_stats(tensors[0], None, None, 2, backend=backend)
    check(op(2, backend, stats=stats), eager(2), tensors, randn((2, 12, 7, 9)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_and_gradients_lie_in_memory_as_eager_s_do(layout, of_weight, backend):
    tensors = inputs((2, 24, 7, 9), 12, torch.float32, layout, input_bias=False)
    tensors[3] = tensors[3].contiguous(
        memory_format=torch.channels_last if of_weight == "channels_last" else torch.contiguous_format
    )
    y, dx, _, _, dw, _ = run(op(2, backend), tensors, randn((2, 12, 7, 9)))
    assert same_layout(y, eager(2)(*tensors)) and same_layout(dx, tensors[0]) and same_layout(dw, tensors[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_x_and_the_convolution_to_its_dtype(backend):
    tensors = inputs((2, 24, 7, 9), 12, torch.float32, "channels_last")
    with torch.autocast(DEVICE, torch.bfloat16):
        y = op(2, backend)(*[t.requires_grad_() for t in tensors])
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in grads)
    cut = [t.detach() if i in (1, 2, 5) else t.detach().bfloat16() for i, t in enumerate(tensors)]
    assert torch.equal(y, op(2, backend)(*cut))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_add_and_the_statistics_of_what_is_stored(shape, num_groups, dtype, layout, backend):
    x, residual = randn(shape, DTYPES[dtype], layout), randn(shape, DTYPES[dtype], layout)
    bias, dy = randn(shape[1]), randn(shape, DTYPES[dtype], layout)

    def add(x, residual, bias):
        return add_bias_group_stats(x, residual, bias, num_groups, backend=backend)[0]

    def plain(x, residual, bias):
        return x + residual + bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))

    check(add, plain, [x, residual, bias], dy)
    y, stats = add_bias_group_stats(x, residual, bias, num_groups, backend=backend)
    assert same_layout(y, x) and stats.dtype == torch.float32 and not stats.requires_grad
    values = y.double().reshape(shape[0], num_groups, -1)
    torch.testing.assert_close(stats[..., 0].double(), values.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[..., 1].double(), values.var(2, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_without_residual_or_bias(backend):
    x, residual, bias = randn((2, 12, 5, 7)), randn((2, 12, 5, 7)), randn(12)
    for r, b, expected in [
        (residual, None, x + residual),
        (None, bias, x + bias.view(-1, 1, 1)),
        (None, None, x),
        (residual.transpose(2, 3).contiguous().transpose(2, 3), None, x + residual),  # cannot be walked: copied
    ]:
        y, stats = add_bias_group_stats(x, r, b, 4, backend=backend)
        assert torch.equal(y, expected) and y.data_ptr() != x.data_ptr()
        torch.testing.assert_close(stats, add_bias_group_stats_reference(expected, None, None, 4)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_at_a_mean_3000_times_the_deviation(backend):
    x = (randn((2, 12, 17, 19)) * 0.1).to(memory_format=torch.channels_last)
    y, stats = add_bias_group_stats(x, None, torch.full((12,), 300.0, device=DEVICE), 4, backend=backend)
    truth = y.double().reshape(2, 4, -1).var(2, correction=0)
    assert ((stats[..., 1] - truth) / truth).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_norm_takes_the_statistics(backend):
    x, residual, w, b = randn((2, 12, 6, 6)), randn((2, 12, 6, 6)), randn(12), randn(12)

    def with_stats(x, residual, w, b):
        y, stats = add_bias_group_stats(x, residual, None, 4, backend=backend)
        return group_norm_silu(y, w, b, 4, stats=stats, backend=backend)

    check(with_stats, lambda x, r, w, b: eager_norm(4)(x + r, w, b), [x, residual, w, b], randn((2, 12, 6, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, given, backend):
    leaves = [t.requires_grad_() for t in inputs((2, 12, 6, 7), 8, torch.bfloat16, layout)]
    stats = torch.rand(2, 4, 2, device=DEVICE) + 0.5 if given else None
    torch.library.opcheck(norm_silu_conv2d_op, (*leaves, stats, 4, 1e-6, 2, 1, backend))
    torch.library.opcheck(add_bias_group_stats_op, (leaves[0], leaves[0].detach(), leaves[5], 4, backend))
    empty = [leaves[0].detach()[:0].requires_grad_(), *leaves[1:]]
    torch.library.opcheck(norm_silu_conv2d_op, (*empty, None, 4, 1e-6, 1, 1, backend))
    torch.library.opcheck(add_bias_group_stats_op, (empty[0], None, leaves[5], 4, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_get_no_gradient_and_the_others_the_same(backend):
    tensors = inputs((2, 12, 6, 7), 8, torch.float32)
    dy = randn((2, 8, 6, 7))
    every = run(op(4, backend), tensors, dy)[1:]
    leaves = [t.detach().clone().requires_grad_(i not in (3, 4)) for i, t in enumerate(tensors)]
    grads = torch.autograd.grad(op(4, backend)(*leaves), [t for t in leaves if t.requires_grad], dy)
    for a, b in zip(grads, [*every[:3], every[5]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_added(backend):
    y, stats = add_bias_group_stats(randn((0, 12, 4, 4)), None, randn(12), 4, backend=backend)
    assert y.shape == (0, 12, 4, 4) and stats.shape == (0, 4, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    tensors = inputs((2, 24, 9, 9), 12, torch.float32, "channels_last")
    dy = randn((2, 12, 9, 9))
    first, second = run(op(2, backend), tensors, dy), run(op(2, backend), tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_cuda_tensors(layout):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 64, 9, 8, device="cuda", dtype=torch.bfloat16).to(memory_format=fmt)
        w = torch.empty(32, 64, 3, 3, device="cuda", dtype=torch.bfloat16).to(memory_format=fmt)
        p = torch.empty(64, device="cuda")
        y = norm_silu_conv2d(x, p, p, w, None, input_bias=p, stride=2)
        stats = torch.empty(2, 32, 2, device="cuda")
        dx, dnw, _, dw, _, di = norm_silu_conv2d_backward_op(
            y, x, p, p, w, p, stats, 1e-6, 2, 1, True, False, False, "triton"
        )
        s, of_s = add_bias_group_stats(x, x, p)
    assert y.shape == (2, 32, 5, 4) and y.is_contiguous(memory_format=fmt) and y.device.type == "cuda"
    for t, like in ((dx, x), (dw, w), (dnw, p), (di, p), (s, x), (of_s, stats)):
        assert t.shape == like.shape and t.stride() == like.stride() and t.dtype == like.dtype


@settings(max_examples=60, deadline=None, derandomize=True)
@given(views(), st.sampled_from(["none", "dense", "reversed in memory"]), st.booleans(), st.sampled_from(BACKENDS))
def test_any_view_is_added_right_or_refused(view, of_residual, with_bias, backend):
    x, groups = view
    residual, bias = None, randn(x.shape[1]) if with_bias else None
    if of_residual != "none":
        residual = (
            randn(x.shape, x.dtype)
            if of_residual == "dense"
            else randn(x.shape[::-1], x.dtype).permute(*reversed(range(x.ndim)))
        )
    try:
        y, stats = add_bias_group_stats(x, residual, bias, groups, backend=backend)
    except ValueError as error:
        assert backend == "triton" and any(why in str(error) for why in REFUSALS), error
        return
    truth, _ = add_bias_group_stats_reference(
        x.double(), None if residual is None else residual.double(), None if bias is None else bias.double(), groups
    )
    assert (y.double() - truth).abs().max() <= torch.finfo(x.dtype).eps * truth.abs().max() and y.dtype == x.dtype
    values = y.double().reshape(len(x), groups, -1)
    torch.testing.assert_close(stats[..., 0].double(), values.mean(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[..., 1].double(), values.var(2, correction=0), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(views(min_rank=2, max_rank=2), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.sampled_from(BACKENDS))
def test_any_view_is_convolved_right_or_refused(view, kernel, stride, backend):
    x, groups = view
    assume(settled(x, groups) and min(x.shape[2:]) >= 2)
    channels, padding = x.shape[1], kernel // 2
    weight = (randn((5, channels, kernel, kernel)) / (kernel * kernel * channels) ** 0.5).to(x.dtype)
    tensors = [x, randn(channels), randn(channels), weight, randn(5, x.dtype)]
    try:
        op(groups, backend, stride, padding)(*tensors)
    except ValueError as error:
        assert backend == "triton" and any(why in str(error) for why in REFUSALS), error
        return
    reference = eager(groups, stride, padding)
    got, base = (f(*tensors) for f in (op(groups, backend, stride, padding), reference))
    doubles = [t.double() for t in tensors]
    truth = norm_silu_conv2d_reference(*doubles, groups, 1e-6, stride, padding)
    assert_no_worse(got, base, truth)


def test_errors_name_expected_and_got():
    x, nw, nb, w, b, _ = inputs((2, 12, 4, 4), 8, torch.float32)
    for bad, message in [
        (lambda: norm_silu_conv2d(x[0], nw[:4], nb[:4], w, b, 2), r"norm_silu_conv2d: x: expected \[N, C, H, W\]"),
        (lambda: norm_silu_conv2d(x, nw, nb, w[:, :6], b, 4), r"weight: expected .*\[C_out, 12, kh, kw\].*\[8, 6, 3"),
        (lambda: norm_silu_conv2d(x, nw[:6], nb, w, b, 4), r"norm_weight: expected floating-point \[12\]"),
        (lambda: norm_silu_conv2d(x, nw, nb, w.to("meta"), b, 4), r"weight: expected a tensor on .*, got one on meta"),
        (lambda: norm_silu_conv2d(x, nw, nb, w, b.to("meta"), 4), r"bias: expected a tensor on .*, got one on meta"),
        (lambda: add_bias_group_stats(x[:, :, :0], None, None, 4), r"spatial dimensions that are not empty, got"),
        (lambda: norm_silu_conv2d(x, nw, nb, w.half(), b, 4), r"weight: expected torch.float32 .*got torch.float16"),
        (lambda: norm_silu_conv2d(x, nw, nb, w, b[:4], 4), r"bias: expected torch.float32 \[8\], got .*\[4\]"),
        (lambda: norm_silu_conv2d(x, nw, nb, w, b, 5), r"num_groups: expected a divisor of the 12 channels, got 5"),
        (lambda: norm_silu_conv2d(x, nw, nb, w, b, 4, padding=-1), r"padding: expected 0 or more, got -1"),
        (lambda: norm_silu_conv2d(x, nw, nb, w, b, 4, stride=0), r"stride: expected 1 or more, got 0"),
        (lambda: norm_silu_conv2d(x[:, :, :1], nw, nb, w, b, 4, padding=0), r"x: expected sides of at least 3x3"),
        (lambda: add_bias_group_stats(x, x[:1], None, 4), r"residual: expected torch.float32 \[2, 12, 4, 4\].*\[1, 12"),
        (lambda: add_bias_group_stats(x, x.half(), None, 4), r"residual: expected .*got torch.float16"),
        (lambda: add_bias_group_stats(x, None, nb[:3], 4), r"bias: expected floating-point \[12\], got .*\[3\]"),
        (lambda: add_bias_group_stats(x, None, None, 7), r"num_groups: expected a divisor of the 12 channels, got 7"),
        (lambda: add_bias_group_stats(x.long(), None, None, 4), r"x: expected floating-point"),
        (lambda: add_bias_group_stats(x.double(), None, None, 4, backend="triton"), r"cannot run: x has dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_no_norm_of_the_wrong_statistics():
    x, w, b = randn((2, 12, 4, 4)), randn(12), randn(12)
    _, stats = add_bias_group_stats(x, None, None, 4)
    for groups in (2, 6):
        with pytest.raises(ValueError, match="stats: expected"):
            group_norm(x, w, b, groups, stats=stats)
    assert_no_worse(
        group_norm(x, w, b, 4, stats=stats),
        eager_norm(4, silu=False)(x, w, b),
        eager_norm(4, silu=False)(x.double(), w.double(), b.double()),
    )
