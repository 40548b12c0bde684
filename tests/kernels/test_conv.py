"""Convolutions by other ways than aten's where a CPU lacks what those need: the same function.

With fp32 inside, kept in 16 bits, where it has no products of 16 bits; gradients of weights as products of matrices.
"""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from flux2.autoencoder import AutoEncoder, AutoencoderConfig
from kernels import conv as conv_module
from kernels import dispatch, norm_silu_conv2d, upsample_conv2d
from kernels.conv import by_products, conv2d, conv2d_backward, in_fp32, weight_gradient

NARROW = (torch.bfloat16, torch.float16)
SMALL = AutoencoderConfig(z_channels=4, ch=32, ch_mult=(1, 2), num_res_blocks=1)


@pytest.fixture
def lacking(monkeypatch):
    """A CPU that multiplies neither bf16 nor fp16."""
    monkeypatch.setattr(dispatch, "_LACKING", frozenset(NARROW))


@pytest.fixture
def able(monkeypatch):
    """A CPU that multiplies everything."""
    monkeypatch.setattr(dispatch, "_LACKING", frozenset())


@pytest.fixture
def narrow_vectors(monkeypatch):
    """A CPU with AVX2 alone, and products for tensors of any width."""
    monkeypatch.setattr(dispatch, "_VECTORS", "AVX2")
    monkeypatch.setattr(conv_module, "WIDE", 1)


def inputs(dtype, bias=True, c=5, k=6, layout=torch.channels_last):
    x, weight = torch.randn(2, c, 7, 9).to(memory_format=layout), torch.randn(k, c, 3, 3) / (9 * c) ** 0.5
    return [None if t is None else t.to(dtype) for t in (x, weight, torch.randn(k) if bias else None)]


def run(f, given, grad):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y))]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), ((2, 1), (0, 1))], ids=str)
def test_values_and_gradients(lacking, stride, padding, dtype, bias, layout):
    given = inputs(dtype, bias, layout=layout)
    grad = torch.randn_like(F.conv2d(*given, stride, padding)).float()
    stock = lambda *t: F.conv2d(*t, stride=stride, padding=padding)  # noqa: E731
    found = run(lambda *t: conv2d(*t, stride=stride, padding=padding), given, grad)
    base, truth = run(stock, given, grad), run(stock, [None if t is None else t.double() for t in given], grad)
    for got, b, t in zip(found, base, truth, strict=True):
        assert got.dtype == dtype and got.stride() == b.stride()
        assert_no_worse(got, b, t)


def test_without_gradients_it_is_the_sum_in_fp32_rounded_once(lacking):
    x, weight, bias = inputs(torch.bfloat16)
    expected = F.conv2d(x.float(), weight.float(), bias.float(), padding=1).bfloat16()
    assert torch.equal(conv2d(x, weight, bias, padding=1), expected)


def test_keeps_what_it_was_given(lacking):
    """Nothing wide is kept for backward."""
    leaves = [t.requires_grad_() for t in inputs(torch.bfloat16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv2d(*leaves, padding=1)
    assert {t.dtype for t in kept} == {torch.bfloat16} and len(kept) == 2


def test_second_derivatives(lacking):
    def penalty(f):
        x, weight, bias = (t.requires_grad_() for t in inputs(torch.bfloat16))
        (dx,) = torch.autograd.grad(f(x, weight, bias, padding=1).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, weight])

    torch.manual_seed(1)
    found = penalty(conv2d)
    torch.manual_seed(1)
    for got, expected in zip(found, penalty(F.conv2d), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_only_16_bits_on_such_a_cpu(lacking):
    assert in_fp32(torch.zeros(1, dtype=torch.bfloat16)) and in_fp32(torch.zeros(1, dtype=torch.float16))
    assert not in_fp32(torch.zeros(1)) and not in_fp32(torch.zeros(1, dtype=torch.float64))
    assert not in_fp32(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_other_cpus_use_atens(able):
    given = inputs(torch.bfloat16)
    assert torch.equal(conv2d(*given, padding=1), F.conv2d(*given, padding=1))
    leaves = [t.requires_grad_() for t in given]
    assert conv2d(*leaves, padding=1).grad_fn.name() == "ConvolutionBackward0"


def test_what_a_cpu_says_of_itself(monkeypatch):
    def lacks(**has):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
        return dispatch._lacking()

    assert lacks(architecture="x86_64", avx512_f=True) == set(NARROW)
    assert lacks(architecture="x86_64", avx512_bf16=True) == {torch.float16}
    assert lacks(architecture="x86_64", amx_bf16=True, amx_fp16=True) == lacks(architecture="aarch64") == set()


@pytest.mark.parametrize("learns", [True, False])
def test_autocast(lacking, learns):
    x, weight, bias = (t.requires_grad_(learns) for t in inputs(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(x, weight, bias, padding=1)
    assert y.dtype == torch.bfloat16
    rounded = [t.detach().bfloat16().float() for t in (x, weight, bias)]
    assert torch.equal(y, F.conv2d(*rounded, padding=1).bfloat16())
    if learns:
        y.sum().backward()
        assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_autocast_leaves_fp64_alone(lacking):
    x, weight, bias = inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv2d(x, weight, bias, padding=1), F.conv2d(x, weight, bias, padding=1))
        assert conv2d(x, weight, bias, padding=1).dtype == torch.float64


def test_vmap(lacking):
    x, weight, _ = inputs(torch.bfloat16)
    many = torch.stack((x, 2 * x))
    found = torch.vmap(lambda one: conv2d(one, weight, padding=1))(many)
    torch.testing.assert_close(found, torch.stack([conv2d(one, weight, padding=1) for one in many]))
    each = torch.vmap(torch.func.grad(lambda one: conv2d(one, weight, padding=1).float().sum()))(many)
    one = x.clone().requires_grad_()
    conv2d(one, weight, padding=1).float().sum().backward()
    torch.testing.assert_close(each[0], one.grad)


@pytest.mark.parametrize("learns", [True, False])
def test_compiles_to_one_graph(lacking, learns):
    x, weight, bias = (t.requires_grad_(learns) for t in inputs(torch.bfloat16, c=4, k=4))

    def f(x):
        return upsample_conv2d(conv2d(x, weight, bias, padding=1), weight, bias)

    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, f(x))
    if learns:
        (found,) = torch.autograd.grad(y.float().sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(f(x).float().sum(), x)[0], rtol=0.05, atol=0.05)


def test_an_exported_program_is_not_this_machines(lacking):
    x, weight, bias = inputs(torch.bfloat16)

    class Net(torch.nn.Module):
        def forward(self, x):
            return conv2d(x, weight, bias, padding=1)

    program = torch.export.export(Net(), (x,))
    assert not [n for n in program.graph.nodes if n.op == "call_function" and n.meta["val"].dtype == torch.float32]


def test_winograd_too(lacking, monkeypatch):
    from kernels import conv_block, winograd

    for name in ("LEAST_IN", "LEAST_OUT", "LEAST_PIXELS"):
        monkeypatch.setattr(winograd, name, 1)
    calls, plain = [], conv_block.winograd_conv2d
    monkeypatch.setattr(conv_block, "winograd_conv2d", lambda *tensors: calls.append(1) or plain(*tensors))
    c = 8
    given = [torch.randn(2, c, 6, 6), torch.randn(c), torch.randn(c), torch.randn(c, c, 3, 3) / 9, torch.randn(c)]
    x, norm_weight, norm_bias, weight, bias = given
    narrow = (x.bfloat16(), norm_weight, norm_bias, weight.bfloat16(), bias.bfloat16())
    y = norm_silu_conv2d(*narrow, num_groups=4)
    wide = [t.double() for t in narrow]
    truth = F.conv2d(F.silu(F.group_norm(wide[0], 4, *wide[1:3], 1e-6)), *wide[3:], padding=1)
    assert calls and y.dtype == torch.bfloat16
    assert ((y.double() - truth).norm() / truth.norm()).item() < 5e-3


def test_all_convolutions_of_an_autoencoder(lacking, monkeypatch):
    """With "torch" they are aten's in bf16, with "auto" none is."""
    narrow, stock = [], F.conv2d

    def watched(x, *more):
        if x.dtype in NARROW:
            narrow.append(x.shape)
        return stock(x, *more)

    monkeypatch.setattr(F, "conv2d", watched)
    ae = AutoEncoder(SMALL).bfloat16().requires_grad_(False)
    x = torch.rand(1, 3, 16, 16).bfloat16() * 2 - 1
    plain = ae.set_backend("torch").reconstruct(x)
    many = len(narrow)
    narrow.clear()
    y = ae.set_backend("auto").reconstruct(x)
    assert many > 10 and not narrow
    assert ((y - plain).float().norm() / plain.float().norm()).item() < 0.05


# Gradients of weights as products


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (1, 4), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (3, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, (2, 0)], ids=str)
def test_gradient_of_the_weights(padding, stride, kernel, layout):
    x, weight = torch.randn(2, 4, 11, 12).to(memory_format=layout), torch.randn(6, 4, *kernel, dtype=torch.float64)
    dy = torch.randn_like(F.conv2d(x.double(), weight, None, stride, padding))
    _, truth, _ = conv2d_backward(dy, x.double(), weight, stride, padding, [False, True, False])
    torch.testing.assert_close(weight_gradient(dy, x.double(), weight, stride, padding), truth)
    single = weight_gradient(dy.float(), x, weight.float(), stride, padding)
    assert ((single.double() - truth).norm() / truth.norm()).item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, True)])
def test_products_where_they_are_faster(narrow_vectors, lacking, wanted, dtype, monkeypatch):
    calls, plain = [], conv_module.weight_gradient
    monkeypatch.setattr(conv_module, "weight_gradient", lambda *given: calls.append(1) or plain(*given))
    given = [t.requires_grad_(w) for t, w in zip(inputs(dtype), wanted, strict=True)]
    wide = [t.detach().double().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
    y, truth = conv2d(*given, padding=1), F.conv2d(*wide, padding=1)
    dy = torch.randn_like(y)
    found, expected = (
        torch.autograd.grad(out, [t for t in of if t.requires_grad], dy.to(out))
        for out, of in ((y, given), (truth, wide))
    )
    for got, t in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert ((got.double() - t).norm() / t.norm()).item() < (1e-6 if dtype == torch.float32 else 5e-3)
    assert len(calls) == wanted[1]


def test_with_products_onednn_is_asked_for_the_inputs_gradient_alone(narrow_vectors, able):
    """With the bias's it would compute the weights' as well"""
    masks = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(list(args[-1]))
            return func(*args, **(kwargs or {}))

    x, weight, _ = inputs(torch.float32)
    with Watch():
        conv2d_backward(torch.randn(2, 6, 7, 9), x, weight, 1, 1, [True, True, True])
    assert masks == [[True, False, False]]


def test_products_are_for_wide_fp32_in_channels_last_on_such_a_cpu(monkeypatch):
    x = torch.zeros(1, 128, 4, 4).to(memory_format=torch.channels_last)
    weight = torch.zeros(128, 128, 3, 3)
    monkeypatch.setattr(dispatch, "_LACKING", frozenset())
    monkeypatch.setattr(dispatch, "_VECTORS", "AVX2")
    assert by_products(x, weight)
    assert not by_products(x, weight[:64]) and not by_products(x, weight[..., :1, :1])
    assert not by_products(x.contiguous(), weight) and not by_products(x.bfloat16(), weight.bfloat16())
    assert not by_products(x.double(), weight.double()) and not by_products(x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(dispatch, "_LACKING", frozenset(NARROW))
    assert by_products(x.bfloat16(), weight.bfloat16())
    monkeypatch.setattr(dispatch, "_VECTORS", "AVX512")
    assert not by_products(x, weight)


def test_products_again_and_under_autocast(narrow_vectors, able):
    """Second derivatives, and backward inside autocast, which may not round what is multiplied"""
    x, weight, bias = (t.requires_grad_() for t in inputs(torch.float64))
    torch.autograd.gradgradcheck(
        lambda w: weight_gradient(conv2d(x, w, bias, padding=1), x, w, 1, 1).square().sum(), [weight]
    )
    x, weight, bias = (t.detach().float().requires_grad_() for t in (x, weight, bias))
    y = conv2d(x, weight, bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y.square().sum(), weight)
    stock = F.conv2d(x, weight, bias, padding=1)
    (expected,) = torch.autograd.grad(stock.square().sum(), weight)
    torch.testing.assert_close(found, expected)


def test_products_compile_and_map(narrow_vectors, able):
    x, weight, bias = (t.requires_grad_() for t in inputs(torch.float32, c=4, k=4))

    def f(x, weight):
        return upsample_conv2d(conv2d(x, weight, bias, padding=1), weight, bias).square().sum()

    stock = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).square().sum(), weight)[0]
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        found = torch.autograd.grad(g(x, weight), weight)[0]
        if g is f:
            first = found
        torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-4)
    one = torch.func.grad(lambda w, x: conv2d(x, w, bias, padding=1).square().sum())
    torch.testing.assert_close(one(weight, x), stock)
    each = torch.vmap(one, in_dims=(None, 0))(weight, torch.stack((x, x)))
    torch.testing.assert_close(each[1], stock)


def test_all_weights_of_an_autoencoder_get_their_gradients(narrow_vectors, able, monkeypatch):
    calls, plain = [], conv_module.weight_gradient
    monkeypatch.setattr(conv_module, "weight_gradient", lambda *given: calls.append(1) or plain(*given))
    ae, x = AutoEncoder(SMALL).to(memory_format=torch.channels_last), torch.rand(2, 3, 16, 16) * 2 - 1
    x = x.to(memory_format=torch.channels_last)
    found = {}
    for backend in ("torch", "auto"):
        recon, _ = ae.set_backend(backend)(x)
        grads = torch.autograd.grad(recon.square().mean(), list(ae.parameters()), allow_unused=True)
        found[backend] = [g for g in grads if g is not None]
        assert bool(calls) == (backend == "auto")
    for got, expected in zip(found["auto"], found["torch"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + 1e-7)
