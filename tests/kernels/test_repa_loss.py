"""repa_loss, plain torch and the real kernels, against F.cosine_similarity in fp64: values, gradients, zero rows."""

import pytest
import torch
import torch.nn.functional as F
from gradients import DEVICE, DTYPES, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse

from kernels import repa_loss
from kernels.repa_loss import BLOCK_D, repa_loss_backward_op, repa_loss_op, repa_loss_reference

BACKENDS = ("torch", "triton")
# Widths of teachers, none of them special: below and above one block, not powers of two, one, many rows
SHAPES = [(2, 7, 384), (3, 768), (1, 5, 1024), (4, 1536), (2, 3, 100), (5, 1), (37, 12), (2, 2, 3, 65)]


def run(f, p, y):
    """Loss and both gradients"""
    leaves = [t.detach().clone().requires_grad_() for t in (p, y)]
    loss = f(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.7))]


def eager(p, y):
    acc = torch.promote_types(p.dtype, torch.float32)
    return -F.cosine_similarity(p.to(acc), y.to(acc), dim=-1, eps=1e-8).mean()


def ours(backend):
    return lambda p, y: repa_loss(p, y, backend=backend)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, backend):
    p, y = randn(shape, DTYPES[dtype]) * 3 + 0.5, randn(shape, DTYPES[dtype])
    truth = run(eager, p.double(), y.double())
    for got, base, true in zip(run(ours(backend), p, y), run(eager, p, y), truth, strict=True):
        # One number, and rows of width 1 whose gradient is rounding only, are a matter of luck.
        if true.numel() == 1 or shape[-1] == 1:
            torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-6)
        else:
            assert_no_worse(got, base, true)


def test_the_reference_is_the_definition():
    p, y = randn((4, 9)), randn((4, 9))
    torch.testing.assert_close(repa_loss_reference(p, y), -F.cosine_similarity(p, y, dim=-1).mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_have_no_gradient_and_hurt_no_other(backend):
    p, y = randn((4, 6, 48)), randn((4, 6, 48))
    p[0, 1], y[2, 3], p[3, 3], y[3, 3] = 0, 0, 0, 0
    loss, dp, dy = run(ours(backend), p, y)
    assert loss.isfinite() and dp.isfinite().all() and dy.isfinite().all()
    torch.testing.assert_close(loss, eager(p, y))
    zero = (p.norm(dim=-1) == 0) | (y.norm(dim=-1) == 0)
    assert zero.sum() == 3 and not dp[zero].any() and not dy[zero].any()
    _, ep, ey = run(eager, p, y)
    torch.testing.assert_close(dp[~zero], ep[~zero])
    torch.testing.assert_close(dy[~zero], ey[~zero])


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_below_eps_are_eps(backend):
    """The derivative of what forward computes. F.cosine_similarity lets a clamped norm move in backward."""

    def clamped(p, y):
        norms = (t.norm(dim=-1).clamp(min=1e-8) for t in (p, y))
        return -((p * y).sum(-1) / next(norms) / next(norms)).mean()

    p, y = randn((3, 20)), randn((3, 20))
    p[1] *= 1e-10
    torch.testing.assert_close(repa_loss(p, y, backend=backend), eager(p, y))
    for a, b in zip(run(ours(backend), p, y), run(clamped, p.double(), y.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_is_computed(backend):
    p, y = randn((3, 40)).requires_grad_(), randn((3, 40))
    repa_loss(p, y, backend=backend).backward()
    assert p.grad is not None and y.grad is None
    target_only = repa_loss(p.detach(), y.requires_grad_(), backend=backend)
    (dy,) = torch.autograd.grad(target_only, y)
    torch.testing.assert_close(dy, run(eager, p, y)[2] / 0.7)
    _, saved = repa_loss_op(p.detach(), y.detach(), backend)
    one = torch.ones((), device=DEVICE)
    dp, dy = repa_loss_backward_op(one, p.detach(), y.detach(), saved, True, False, backend)
    assert dp.shape == p.shape and dy.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_three_numbers_a_row(backend):
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    p, y = randn((5, 4, 30), torch.bfloat16).requires_grad_(), randn((5, 4, 30), torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        repa_loss(p, y, backend=backend)
    assert sum(kept.values()) == 2 * p.numel() + 3 * 20


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(BACKENDS))
def test_any_view_of_any_dtypes_is_right(data, backend):
    rank, width = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([2, 3, 17, 64, BLOCK_D + 3]))
    shape = [*(data.draw(st.integers(1, 4)) for _ in range(rank)), width]
    tensors = []
    for _ in range(2):
        order = data.draw(st.permutations(range(len(shape))))
        step = data.draw(st.sampled_from([1, 1, 2]))
        dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
        x = randn([shape[i] * (step if i == len(shape) - 1 else 1) for i in order], dtype)
        x = x.permute([order.index(i) for i in range(len(shape))])[..., ::step]
        tensors.append(x[:1].expand_as(x) if data.draw(st.booleans()) and rank else x)
    p, y = tensors
    for got, true in zip(run(ours(backend), p, y), run(eager, p.double(), y.double()), strict=True):
        ulp = 1e-6 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
        assert (got.double() - true).abs().max() <= 4 * ulp * max(true.abs().max(), 0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    p, y = randn((50, 96)), randn((50, 96))
    assert all(torch.equal(a, b) for a, b in zip(run(ours(backend), p, y), run(ours(backend), p, y), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_target", [False, True])
def test_opcheck(of_target, backend):
    p = randn((2, 3, 10), torch.bfloat16).requires_grad_()
    torch.library.opcheck(repa_loss_op, (p, randn((2, 3, 10)).requires_grad_(of_target), backend))
    torch.library.opcheck(repa_loss_op, (p.detach().transpose(0, 1).requires_grad_(), randn((3, 2, 10)), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend):
    p, y = randn((6, 20)), randn((6, 20))
    compiled = torch.compile(ours(backend), backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, p, y), run(ours(backend), p, y), strict=True):
        assert torch.equal(a, b)


def test_fake_cuda_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        p = torch.empty(2, 3, 768, device="cuda", dtype=torch.bfloat16)
        loss = repa_loss(p, p)
        dp, dy = repa_loss_backward_op(loss, p, p, torch.empty(3, 6, device="cuda"), True, True, "triton")
    assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
    assert dp.shape == dy.shape == p.shape and dp.dtype == torch.bfloat16


def test_fp64_and_its_derivative():
    p, y = (torch.randn(3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(repa_loss, (p, y)) and repa_loss(p, y).dtype == torch.float64


def test_errors_name_expected_and_got():
    p = randn((2, 3, 8))
    for bad, message in [
        (
            lambda: repa_loss(p, p[:1]),
            r"target: expected floating-point \[2, 3, 8\] on .*\[1, 3, 8\]",
        ),
        (lambda: repa_loss(p.long(), p), r"pred: expected floating-point \[\.\.\., D\], not empty, got torch.int64"),
        (lambda: repa_loss(p[:0], p[:0]), r"not empty, got torch.float32 \[0, 3, 8\]"),
        (lambda: repa_loss(p, p.to("meta")), "target: expected .* got torch.float32 .* on meta"),
        (lambda: repa_loss(p.double(), p.double(), backend="triton"), "cannot run: pred has dtype torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
