"""attention: chunks and sdpa against fp64 in values and gradients, memory, dispatch, layouts of peers by stand-ins."""

import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from gradients import DEVICE, DTYPES, check, randn, run
from tolerance import assert_no_worse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention
from kernels.attention import attention_op, attention_reference

PEERS = {"flash": ("flash_attn", "flash_attn_func"), "xformers": ("xformers.ops", "memory_efficient_attention")}
MODULE = importlib.import_module("kernels.attention")
# [B, H, T_q, D], T_k: odd lengths, the autoencoder's head dimension, SiT-XL's, few keys, one query
SHAPES = [((2, 3, 37, 24), 37), ((1, 1, 29, 512), 29), ((1, 2, 16, 72), 16), ((2, 1, 7, 5), 3), ((1, 2, 1, 8), 19)]


def inputs(shape, keys, dtype=torch.float32):
    return [randn(shape, dtype), *(randn((*shape[:2], keys, shape[3]), dtype) for _ in range(2))]


def ours(backend, **options):
    return lambda q, k, v: attention(q, k, v, backend=backend, **options)


def written_out(q, k, v):
    """In the dtype of q throughout."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.fixture(params=[1, 5, None], ids=["a row at once", "several", "one chunk"])
def chunked(request, monkeypatch):
    """Rows in a chunk, for the shape that a test then has; 37 and 29 are no multiples of 5."""

    def of(shape, keys):
        if request.param:
            monkeypatch.setattr(MODULE, "CHUNK_SCORES", request.param * shape[0] * shape[1] * keys)

    return of


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "keys"), SHAPES)
def test_chunks_are_no_worse_than_sdpa_or_written_out(shape, keys, dtype, chunked):
    chunked(shape, keys)
    given, grad = inputs(shape, keys, DTYPES[dtype]), randn(shape)
    for eager in (F.scaled_dot_product_attention, written_out):
        check(ours("torch"), eager, given, grad)


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_the_definition_row_by_row(backend):
    q, k, v = inputs((2, 2, 5, 3), 4, torch.float64)
    for scale in (None, 0.3):
        got, reference = attention(q, k, v, scale, backend), attention_reference(q, k, v, scale)
        for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(5)).tolist():
            s = [(scale or 3**-0.5) * sum((q[b, h, i] * k[b, h, j]).tolist()) for j in range(4)]
            p = torch.tensor(s, dtype=torch.float64).exp()
            row = sum(p[j] / p.sum() * v[b, h, j].cpu() for j in range(4))
            for y in (got, reference):
                torch.testing.assert_close(y[b, h, i].cpu(), row, rtol=1e-12, atol=1e-12)


def test_derivative_of_chunks(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_SCORES", 2 * 2 * 3)
    leaves = [t.requires_grad_() for t in inputs((1, 2, 5, 3), 3, torch.float64)]
    assert torch.autograd.gradcheck(ours("torch", scale=0.9), leaves)


def test_chunks_are_summed_before_they_are_rounded(monkeypatch):
    """512 chunks add 1/512 to a gradient of 1, of which a sum in bf16 would miss half."""
    monkeypatch.setattr(MODULE, "CHUNK_SCORES", 512)
    zero = torch.zeros(1, 1, 512, 4, dtype=torch.bfloat16, device=DEVICE)
    *_, dv = run(ours("torch"), (zero, zero, randn(zero.shape, torch.bfloat16)), torch.ones_like(zero))
    assert torch.equal(dv, torch.ones_like(dv))


def test_large_scores_do_not_overflow():
    q, k, v = inputs((1, 1, 9, 16), 9)
    check(ours("torch"), written_out, (100 * q, 100 * k, v), randn(q.shape))


def test_one_key_gives_its_value():
    q, k, v = inputs((1, 2, 5, 8), 1)
    y, dq, dk, dv = run(ours("torch"), (q, k, v), randn(q.shape))
    assert torch.equal(y, v.expand_as(y)) and dv.abs().max() > 0.1
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


class Largest(TorchDispatchMode):
    """The most values that a tensor made inside had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_never_holds_all_scores(monkeypatch):
    """Forward and backward, of 256 x 256 scores for inputs of 256 x 8."""
    q, k, v = inputs((1, 1, 256, 8), 256)
    scores, inside, kept = 16 * 256, {}, []
    monkeypatch.setattr(MODULE, "CHUNK_SCORES", scores)
    for backend in ("torch", "written out"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = (written_out if backend == "written out" else ours(backend))(*leaves)
            if backend == "torch":
                assert sum(t.numel() for t in kept) == 3 * q.numel()
            torch.autograd.grad(y.sum(), leaves)
        inside[backend] = largest.numel
    assert inside["torch"] <= scores < inside["written out"]


def test_same_bits_twice(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_SCORES", 3 * 2 * 37)
    given, grad = inputs((1, 2, 37, 16), 37), randn((1, 2, 37, 16))
    first, second = run(ours("torch"), given, grad), run(ours("torch"), given, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_views_and_empty_batches(backend):
    qkv = randn((2, 9, 3, 4, 8))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # as a fused projection leaves them
    truth = attention_reference(*(t.double() for t in (q, k, v)))
    assert_no_worse(attention(q, k, v, backend=backend), attention_reference(q, k, v), truth)
    sliced = attention(q[..., ::2], k[..., ::2], v[..., ::2], backend=backend)
    torch.testing.assert_close(sliced, attention_reference(q[..., ::2], k[..., ::2], v[..., ::2]))
    expanded = k[:1, :1].expand_as(k)
    torch.testing.assert_close(
        attention(q, expanded, v, backend=backend), attention_reference(q, expanded.contiguous(), v)
    )
    assert attention(q[:0], k[:0], v[:0], backend=backend).shape == (0, 4, 9, 8)


def test_the_op_keeps_its_contract():
    qkv = randn((2, 9, 3, 4, 8)).permute(2, 0, 3, 1, 4)
    for q, k, v in (inputs((1, 2, 7, 4), 5), qkv):
        torch.library.opcheck(attention_op, (*(t.detach().requires_grad_() for t in (q, k, v)), 0.5))


@pytest.mark.parametrize("backend", ["torch", "sdpa", "auto"])
def test_compiles_to_one_graph(backend):
    given, grad = inputs((1, 2, 13, 8), 13), randn((1, 2, 13, 8))
    compiled = torch.compile(ours(backend), backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, given, grad), run(ours(backend), given, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_autocast_rounds_inputs_and_nothing_inside(backend):
    q, k, v = inputs((1, 2, 21, 16), 21)
    low, grad = [t.bfloat16() for t in (q, k, v)], randn(q.shape)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = attention(q, low[1], v, backend=backend)  # rotary positions leave q in fp32
        grads = run(ours(backend), (q, k, v), grad)  # backward too runs under autocast
    assert got.dtype == torch.bfloat16 and torch.equal(got, attention(*low, backend=backend))
    for g, expected in zip(grads[1:], run(ours(backend), low, grad)[1:], strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, expected.float())


def fake(dtype, d, device):
    with FakeTensorMode():
        return torch.empty(1, 1, 4, d, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("dtype", "d", "device", "expected"),
    [
        (torch.bfloat16, 64, "cuda", "sdpa"),
        (torch.bfloat16, 512, "cuda", "sdpa"),  # the memory-efficient kernel takes it
        (torch.bfloat16, 516, "cuda", "torch"),
        (torch.bfloat16, 250, "cuda", "sdpa"),
        (torch.float32, 516, "cuda", "sdpa"),
        (torch.float32, 510, "cuda", "torch"),
        (torch.float64, 64, "cuda", "torch"),
        (torch.float64, 64, "cpu", "sdpa"),
        (torch.bfloat16, 516, "cpu", "sdpa"),
    ],
)
def test_auto_is_sdpa_where_it_is_fused(dtype, d, device, expected):
    assert MODULE._auto(fake(dtype, d, device)) == expected


def test_auto_runs_what_it_chose(monkeypatch):
    q, k, v = inputs((1, 1, 4, 8), 4)
    called = []
    monkeypatch.setattr(MODULE, "attention_op", lambda *a: called.append("torch") or attention_op(*a))
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: called.append("sdpa") or sdpa(*a, **o))
    attention(q, k, v)
    monkeypatch.setattr(MODULE, "_auto", lambda q: "torch")
    attention(q, k, v)
    attention(q, k, v, backend="sdpa")
    assert called == ["sdpa", "torch", "sdpa"]


def stand_in(backend, seen):
    """A module as flash-attn's or xformers', which note what they are given and compute it head by head."""
    module, name = PEERS[backend]

    def call(q, k, v, **options):
        seen.append((q.shape, k.shape, options))
        (scale,) = options.values()
        heads = [attention_reference(q[:, :, h], k[:, :, h], v[:, :, h], scale) for h in range(q.shape[2])]
        return torch.stack(heads, 2)

    made = types.ModuleType(module)
    setattr(made, name, call)
    return {module: made, module.split(".")[0]: made}


@pytest.mark.parametrize(("backend", "option"), [("flash", "softmax_scale"), ("xformers", "scale")])
def test_peers_get_their_layout_and_scale(monkeypatch, backend, option):
    seen = []
    for name, module in stand_in(backend, seen).items():
        monkeypatch.setitem(sys.modules, name, module)
    q, k, v = inputs((2, 3, 5, 8), 7)
    for scale in (None, 0.2):
        expected = attention(q, k, v, scale, "torch")
        torch.testing.assert_close(attention(q, k, v, scale, backend), expected)
    shapes = ((2, 5, 3, 8), (2, 7, 3, 8))
    assert seen == [(*shapes, {option: 8**-0.5}), (*shapes, {option: 0.2})]
    compiled = torch.compile(ours(backend), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("backend", PEERS)
def test_a_peer_that_is_not_installed_is_named(monkeypatch, backend):
    package = PEERS[backend][0].split(".")[0]
    for name in (package, PEERS[backend][0]):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"'{backend}' cannot run: it cannot be imported .*{package}.*; the extra"):
        attention(*inputs((1, 1, 4, 8), 4), backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", PEERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 257, 72), (1, 8, 1024, 128)])
def test_peers_are_no_worse_than_sdpa(shape, dtype, backend):
    pytest.importorskip(PEERS[backend][0])
    check(ours(backend), F.scaled_dot_product_attention, inputs(shape, shape[2], dtype), randn(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_autoencoder_s_attention_on_a_gpu(backend):
    shape = (1, 1, 4096, 512)
    check(ours(backend), written_out, inputs(shape, 4096, torch.bfloat16), randn(shape))


def test_errors_name_expected_and_got():
    q, k, v = inputs((1, 2, 4, 8), 5)
    for call, message in [
        (lambda: attention(q, k, v, backend="fast"), "expected one of auto, torch, triton, sdpa, flash, xformers, got"),
        (lambda: attention(q, k, v, backend="triton"), "'triton' cannot run: this op has no Triton kernel"),
        (lambda: attention(q[0], k, v), r"q: expected floating-point \[B, H, T, D\], got torch.float32 \[2, 4, 8\]"),
        (lambda: attention(q.int(), k, v), "q: expected floating-point .*, got torch.int32"),
        (lambda: attention(q, k[:, :1], v), r"k: expected \[1, 2, T_k, 8\] for q \[1, 2, 4, 8\], got \[1, 1, 5, 8\]"),
        (lambda: attention(q, k[:, :, :0], v[:, :, :0]), r"k: expected .*, got \[1, 2, 0, 8\]"),
        (lambda: attention(q, k, v[..., :4]), r"v: expected \[1, 2, 5, 8\] like k, got \[1, 2, 5, 4\]"),
        (lambda: attention(q, k.half(), v), "k: expected torch.float32 like q, got torch.float16"),
        (lambda: attention(q, k, v.double()), "v: expected torch.float32 like q, got torch.float64"),
    ]:
        with pytest.raises(ValueError, match=f"attention: .*{message}"):
            call()
