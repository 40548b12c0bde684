"""group_norm and group_norm_silu, aten and the real kernels, against fp64: values, every gradient, layouts, errors."""

import hypothesis.strategies as st
import pytest
import torch
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

from kernels import add_bias_group_stats, group_norm, group_norm_silu, tiles
from kernels.group_norm import (
    group_norm_backward_op,
    group_norm_op,
    group_norm_reference,
    group_norm_silu_reference,
)
from kernels.group_stats import triton_stats
from kernels.tiles import plan, samples_per_pass

BACKENDS = ("torch", "triton")
OPS = {"group_norm": (group_norm, False), "group_norm_silu": (group_norm_silu, True)}


def inputs(shape, dtype, layout="nchw", input_bias=True):
    """x, weight, bias, input_bias and the gradient of y"""
    x, dy = randn(shape, dtype, layout) * 2 + 1, randn(shape, dtype, layout)
    weight, bias, shift = (randn(shape[1]) for _ in range(3))
    return [x, weight, bias, shift if input_bias else None], dy


def op(name, num_groups, backend, **options):
    return lambda x, w, b, i=None: OPS[name][0](x, w, b, num_groups, input_bias=i, backend=backend, **options)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "input_bias"), [("group_norm", False), ("group_norm_silu", False), ("group_norm_silu", True)]
)
@pytest.mark.parametrize(
    ("shape", "num_groups"), SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else None
)
def test_values_and_gradients(shape, num_groups, name, input_bias, dtype, layout, backend):
    tensors, dy = inputs(shape, DTYPES[dtype], layout, input_bias)
    check(op(name, num_groups, backend), eager_norm(num_groups, silu=OPS[name][1]), tensors, dy)


@pytest.mark.usefixtures("poison")
def test_more_chunks_than_the_merge_takes_at_once():
    tensors, dy = inputs((1, 128, 66, 65), torch.float32, "channels_last")
    p = plan(tensors[0])
    assert p.chunks > 64 and p.chunks * 128 // 4 > 1024  # BLOCK_K of the one, BLOCK of the other
    check(op("group_norm_silu", 4, "triton"), eager_norm(4), tensors, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_mean_3000_times_the_deviation(layout):
    x = randn((2, 6, 37, 37), layout=layout) * 0.1 + 300
    stats = torch.empty(2, 2, 2, device=DEVICE)
    triton_stats(x, None, stats, 2)
    truth = torch.var_mean(x.double().reshape(2, 2, -1), dim=2, correction=0)
    assert ((stats[..., 1] - truth[0]) / truth[0]).abs().max() <= 1e-6
    assert ((stats[..., 0] - truth[1]) / truth[1]).abs().max() <= 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_statistics_are_used_and_the_gradient_is_the_full_one(layout, dtype, backend):
    (x, w, b, i), dy = inputs((2, 12, 5, 7), DTYPES[dtype], layout)
    shifted = (x.double() + i.double().view(-1, 1, 1)).reshape(2, 4, -1)
    stats = torch.stack((shifted.mean(2), shifted.var(2, correction=0)), -1).float()
    check(op("group_norm_silu", 4, backend, stats=stats), eager_norm(4), [x, w, b, i], dy)
    other = op("group_norm", 4, backend, stats=stats * torch.tensor([1.0, 4.0], device=DEVICE))(x, w, b, i)
    whole = group_norm_reference(x.double(), w.double(), b.double(), 4, 1e-6, i.double())
    half = (whole - b.double().view(-1, 1, 1)) / 2 + b.double().view(-1, 1, 1)
    torch.testing.assert_close(other.double(), half, rtol=0, atol=5e-6 if dtype == "fp32" else 6e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=str)
def test_y_and_its_gradient_lie_in_memory_as_x_does(shape, layout, backend):
    x = randn(shape, layout=layout).requires_grad_()
    y = group_norm_silu(x, torch.ones(shape[1]).to(x), torch.zeros(shape[1]).to(x), 2, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert same_layout(y, x) and same_layout(dx, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_y_in_any_layout(backend):
    tensors, dy = inputs((2, 12, 4, 6), torch.float32, "channels_last")
    expected = run(op("group_norm_silu", 4, backend), tensors, dy)
    turned = torch.empty(6, 4, 12, 2, device=DEVICE).permute(3, 2, 1, 0).copy_(dy)
    for other in (dy.contiguous(), turned):
        for a, b in zip(run(op("group_norm_silu", 4, backend), tensors, other), expected, strict=True):
            torch.testing.assert_close(a, b)
    ones = torch.ones_like(dy)
    for a, b in zip(
        run(op("group_norm_silu", 4, backend), tensors, ones[:1, :1, :1, :1].expand_as(dy)),
        run(op("group_norm_silu", 4, backend), tensors, ones),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice_and_in_any_batch(backend):
    tensors, dy = inputs((3, 12, 9, 11), torch.float32, "channels_last", input_bias=False)
    f = op("group_norm_silu", 4, backend)
    first, second = run(f, tensors, dy), run(f, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    y, dx, *_ = run(f, [tensors[0][1:2], *tensors[1:]], dy[1:2])
    assert torch.equal(y, first[0][1:2]) and torch.equal(dx, first[1][1:2])


def test_small_samples_are_split_finer_and_large_ones_are_not_split_to_dust(monkeypatch):
    """At least 256 programs a sample where there are tiles for them, at most 2048."""
    monkeypatch.undo()
    tiles._plan.cache_clear()

    def programs(*shape):
        p = plan(torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last))
        return p.chunks * p.c_blocks

    assert programs(1, 512, 32, 32) == 128  # tiles of 32 rows and 128 channels
    assert 256 <= programs(1, 512, 64, 64) <= 512
    assert programs(1, 128, 1024, 1024) == 2048
    (x, w, b, i), dy = inputs((1, 128, 13, 11), torch.float32, "channels_last")
    check(op("group_norm_silu", 8, "triton"), eager_norm(8), [x, w, b, i], dy)


def test_passes_over_parts_of_a_batch_change_nothing(monkeypatch):
    tensors, dy = inputs((5, 12, 6, 6), torch.float32, "channels_last")
    f = op("group_norm_silu", 4, "triton")
    whole = run(f, tensors, dy)
    monkeypatch.setattr("kernels.tiles.L2_BYTES", 4 * 2 * 12 * 36 * 2)
    assert samples_per_pass(tensors[0], 1) == 4 and samples_per_pass(tensors[0], 2) == 2
    assert all(torch.equal(a, b) for a, b in zip(run(f, tensors, dy), whole, strict=True))


def test_two_passes_a_sample_only_where_that_pays():
    assert samples_per_pass(torch.empty(4, 128, 256, 256, device="meta", dtype=torch.bfloat16), 1) == 2  # 16 MiB each
    assert samples_per_pass(torch.empty(64, 128, 256, 256, device="meta", dtype=torch.bfloat16), 1) == 64  # 32 passes
    assert samples_per_pass(torch.empty(1, 128, 1024, 1024, device="meta", dtype=torch.bfloat16), 1) == 1  # 256 MiB


# Of each dimension, strides below 2^31 whose products with an index are not
FAR = [
    ((3, 8, 4, 4), (2**30, 16, 4, 1)),
    ((1, 8, 3, 1), (8, 1, 2**30, 1)),
    ((1, 4, 2, 8), (8, 2**30, 8, 1)),
]


@pytest.mark.parametrize(("shape", "strides"), FAR, ids=["samples", "rows", "channels"])
def test_offsets_past_two_to_the_31(shape, strides):
    """Strided views: the pages between their values are never touched."""

    def far(values):
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        return torch.empty(size, dtype=torch.float16, device=DEVICE).as_strided(shape, strides).copy_(values)

    values, dy = randn(shape, torch.float16), randn(shape, torch.float16)
    x = far(values).requires_grad_()
    w, b = randn(shape[1]), randn(shape[1])
    y = group_norm_silu(x, w, b, 2, backend="triton")
    (dx,) = torch.autograd.grad(y, x, far(dy))
    base, truth = (v.requires_grad_() for v in (values.clone(), values.double()))
    y_base = eager_norm(2)(base, w, b)
    y_truth = group_norm_silu_reference(truth, w, b, 2, 1e-6)
    assert_no_worse(y.detach(), y_base.detach(), y_truth.detach())
    (dx_base,), (dx_truth,) = (
        torch.autograd.grad(y_base, base, dy), torch.autograd.grad(y_truth, truth, dy.double())
    )  # fmt: skip
    assert_no_worse(dx, dx_base, dx_truth)
    total, _ = add_bias_group_stats(x.detach(), far(dy), None, 2, backend="triton")
    assert torch.equal(total, values + dy)


def test_saves_x_and_the_statistics_only():
    saved = {}

    def note(t):
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    for backend in BACKENDS:
        saved.clear()
        (x, w, b, _), _ = inputs((2, 12, 8, 8), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            group_norm_silu(x.requires_grad_(), w, b, 4, backend=backend)
        assert sum(saved.values()) == x.numel() + 2 * 12 + 2 * 4 * 2, backend


def test_fp64_and_empty_batches_run_in_torch():
    tensors, dy = inputs((2, 12, 3, 3), torch.float64)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda x, w, b, i: group_norm_silu(x, w, b, 4, input_bias=i), leaves)
    for backend in BACKENDS:
        (x, w, b, i), dy = inputs((0, 12, 3, 3), torch.float32)
        y, dx, dw, *_ = run(op("group_norm_silu", 4, backend), (x, w, b, i), dy)
        assert y.shape == dx.shape == x.shape and not dw.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "permuted", "sliced", "empty", "stats"])
def test_opcheck(kind, backend):
    (x, w, b, i), _ = inputs((2, 12, 6, 8), torch.bfloat16, "channels_last" if kind == "permuted" else "nchw")
    x = {"sliced": x[:, :, ::2, :4], "empty": x[:0]}.get(kind, x)
    if kind == "sliced":
        x = x[:, :, :, :1]  # what is left can be walked as one dimension
    stats = torch.rand(2, 4, 2, device=DEVICE) + 0.5 if kind == "stats" else None
    leaves = [t.requires_grad_() for t in (x.detach(), w, b, i)]
    torch.library.opcheck(group_norm_op, (*leaves, stats, 4, 1e-6, True, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph(layout, backend):
    tensors, dy = inputs((2, 12, 6, 7), torch.float32, layout)
    f = op("group_norm_silu", 4, backend)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, tensors, dy), run(f, tensors, dy), strict=True):
        assert torch.equal(a, b) and same_layout(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_cuda_tensors(layout):
    """Shapes, strides and devices without a GPU; "auto" is Triton there. Autograd itself needs a CUDA build."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 64, 8, 8, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        w, stats = torch.empty(64, device="cuda"), torch.empty(2, 32, 2, device="cuda")
        y = group_norm_silu(x, w, w, 32)
        dx, dw, *_ = group_norm_backward_op(y, x, w, w, None, stats, 1e-6, True, False, "triton")
    for t in (y, dx):
        assert t.shape == x.shape and t.stride() == x.stride() and t.device.type == "cuda" and t.dtype == x.dtype
    assert dw.dtype == torch.float32 and dw.shape == (64,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_need_not_be_contiguous(backend):
    x, w, b = randn((2, 12, 4, 4)), randn(24), randn(1)
    y = group_norm_silu(x, w[::2], b.expand(12), 4, backend=backend)
    expected = group_norm_silu(x, w[::2].contiguous(), b.repeat(12), 4, backend=backend)
    assert torch.equal(y, expected)


def test_no_second_derivative():
    x = randn((1, 4, 3, 3)).requires_grad_()
    y = group_norm_silu(x, torch.ones(4).to(x), torch.zeros(4).to(x), 2)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


def test_errors_name_expected_and_got():
    x, w, b = randn((2, 12, 4, 4)), randn(12), randn(12)
    for bad, message in [
        (lambda: group_norm(x.long(), w, b, 4), r"group_norm: x: expected floating-point \[N, C, \*S\], got .*int64"),
        (lambda: group_norm(x[0, 0, 0], w, b, 4), r"x: expected floating-point .*got torch.float32 \[4\]"),
        (lambda: group_norm(x, w, b, 5), r"num_groups: expected a divisor of the 12 channels, got 5"),
        (lambda: group_norm(x, w, b, 0), r"num_groups: expected a divisor of the 12 channels, got 0"),
        (lambda: group_norm(x, w[:6], b, 4), r"weight: expected floating-point \[12\] .*got .*\[6\]"),
        (lambda: group_norm_silu(x, w, b[:, None], 4), r"group_norm_silu: bias: expected .*\[12\].*got .*\[12, 1\]"),
        (lambda: group_norm(x, w, None, 4), r"bias: expected floating-point \[12\] .*got None"),
        (
            lambda: group_norm(x, w, b, 4, stats=x.new_zeros(2, 3, 2)),
            r"stats: expected torch.float32 \[2, 4, 2\].*\[2, 3",
        ),
        (
            lambda: group_norm(x, w, b, 4, stats=x.new_zeros(2, 4, 2).double()),
            r"stats: expected torch.float32 .*float64",
        ),
        (lambda: group_norm(x, w.to("meta"), b, 4), r"weight: expected a tensor on .* like x, got one on meta"),
        (lambda: group_norm(x.double(), w, b, 4, backend="triton"), r"cannot run: x has dtype torch.float64"),
        (lambda: group_norm(x[:, :, ::2, ::2], w, b, 4, backend="triton"), r"cannot be walked as one dimension"),
        (lambda: group_norm(x[:, :, :1].expand_as(x), w, b, 4, backend="triton"), r"cannot be walked|is expanded"),
        (lambda: group_norm(x, w, b, 4, backend="fast"), r"backend: expected one of auto, torch, triton, got 'fast'"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(views(), st.booleans(), st.sampled_from(BACKENDS))
def test_any_view_is_right_or_refused(view, silu, backend):
    x, groups = view
    assume(settled(x, groups))
    w, b = randn(x.shape[1]), randn(x.shape[1])
    f = group_norm_silu if silu else group_norm
    leaf = x.detach().requires_grad_()
    try:
        y = f(leaf, w, b, groups, backend=backend)
    except ValueError as error:
        assert backend == "triton" and any(why in str(error) for why in REFUSALS), error
        return
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    eager = eager_norm(groups, silu=silu)
    base, truth = (t.requires_grad_() for t in (x.clone(), x.double()))
    y_base, y_truth = eager(base, w, b), eager(truth, w.double(), b.double())
    assert_no_worse(y.detach(), y_base.detach(), y_truth.detach())
    (dx_base,), (dx_truth,) = torch.autograd.grad(y_base, base, dy), torch.autograd.grad(y_truth, truth, dy.double())
    assert_no_worse(dx, dx_base, dx_truth)
