"""sample_timesteps and flow_match_inputs: the definition and the real kernels draw the same numbers, of these laws."""

import math

import pytest
import torch
from gradients import DEVICE, DTYPES, LAYOUTS, randn, same_layout

from kernels import flow_match_inputs, sample_timesteps, timesteps
from kernels.philox import normal, uniform
from kernels.timesteps import (
    LAWS,
    STREAM_NOISE,
    STREAM_TIME,
    flow_match_inputs_op,
    normal_quantile,
    plateau,
    sample_timesteps_op,
)

BACKENDS = ("torch", "triton")
SHAPES = [(3, 5, 6, 7), (2, 16, 8, 8), (1, 3, 33), (4, 10), (2, 4, 3, 5, 2), (2, 1, 37, 31)]


def icdf(law, u, shift, mu, sigma):
    """Independent of ours: fp64, torch.special.ndtri, bisection for the mode"""
    m = mu + math.log(shift)
    if law == "uniform":
        return shift * u / (1 + (shift - 1) * u)
    if law == "logit_normal":
        return torch.sigmoid(m + sigma * torch.special.ndtri(u))
    low, high = m - sigma**2, m + sigma**2
    for _ in range(200):
        y = (low + high) / 2
        low, high = (y, high) if y < m + sigma**2 * math.tanh(y / 2) else (low, y)
    knee, z = 1 / (1 + math.exp(-y)), (y - m) / sigma
    density = math.exp(-z * z / 2) / (sigma * math.sqrt(2 * math.pi) * knee * (1 - knee))
    mass = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    w = u * (mass + (1 - knee) * density)
    return torch.where(w < mass, torch.sigmoid(m + sigma * torch.special.ndtri(w)), knee + (w - mass) / density)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shift", "mu", "sigma"), [(1.0, 0.0, 1.0), (6.93, 0.0, 1.0), (2.0, -0.8, 0.5)])
@pytest.mark.parametrize("law", LAWS)
def test_times_are_the_quantiles_of_the_uniform_draws(law, shift, mu, sigma, backend):
    where = {"seed": 2**63 + 12345, "step": 2**31 + 7, "first_index": 2**31 - 100}
    t = sample_timesteps(700, law, shift, mu, sigma, **where, device=DEVICE, backend=backend)
    u = uniform(where["seed"], where["step"], where["first_index"], 700, 1, STREAM_TIME, DEVICE)[:, 0].double()
    assert t.dtype == torch.float32 and t.device.type == DEVICE and t.min() > 0 and t.max() < 1
    torch.testing.assert_close(t.double(), icdf(law, u, shift, mu, sigma), rtol=0, atol=1e-6)


def test_uniform_draws_are_equal_bit_for_bit():
    a, b = (sample_timesteps(3000, "uniform", seed=9, step=4, device=DEVICE, backend=k) for k in BACKENDS)
    assert torch.equal(a, b) and torch.equal(a, uniform(9, 4, 0, 3000, 1, STREAM_TIME, DEVICE)[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_of_a_batch_draws_the_same(backend):
    whole = sample_timesteps(300, seed=5, step=2, device=DEVICE, backend=backend)
    parts = [
        sample_timesteps(100, seed=5, step=2, first_index=i, device=DEVICE, backend=backend) for i in (0, 100, 200)
    ]
    assert torch.equal(torch.cat(parts), whole)
    x = randn((4, 3, 5, 5))
    whole = flow_match_inputs(x, seed=5, step=2, first_index=7, backend=backend)
    parts = [flow_match_inputs(x[i : i + 1], seed=5, step=2, first_index=7 + i, backend=backend) for i in range(4)]
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [{"seed": 6}, {"step": 3}, {"first_index": 1000}, {"seed": 5 + 2**32}])
def test_every_coordinate_matters(change, backend):
    base = {"seed": 5, "step": 2, "first_index": 0}
    a, b = (sample_timesteps(200, **c, device=DEVICE, backend=backend) for c in (base, base | change))
    assert (a != b).float().mean() > 0.99


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_of_the_flow(shape, dtype, layout, backend):
    x = randn(shape, DTYPES[dtype], layout)
    z, v, t = flow_match_inputs(x, shift=4.63, seed=11, step=3, first_index=2**32 - 10, backend=backend)
    assert same_layout(z, x) and same_layout(v, x) and z.dtype == v.dtype == x.dtype and t.dtype == torch.float32
    expected = sample_timesteps(shape[0], shift=4.63, seed=11, step=3, first_index=2**32 - 10, device=DEVICE)
    torch.testing.assert_close(t, expected, rtol=0, atol=1e-6)
    noise = normal(11, 3, 2**32 - 10, shape, STREAM_NOISE, DEVICE).double()
    mix = t.double().view(-1, *[1] * (x.ndim - 1))
    # 1e-6 of the noise, and one rounding: the interpreter cuts bf16 instead
    ulp = torch.finfo(x.dtype).eps
    for got, truth in ((z, (1 - mix) * x.double() + mix * noise), (v, noise - x.double())):
        assert ((got.double() - truth).abs() <= 2e-6 * (1 + noise.abs()) + ulp * truth.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_noise_and_times_are_used(layout, backend):
    x, noise = randn((3, 6, 5, 7), layout=layout), randn((3, 6, 5, 7))
    t = torch.tensor([0.0, 0.25, 1.0], device=DEVICE)
    z, v, same = flow_match_inputs(x, noise=noise, t=t, backend=backend)
    torch.testing.assert_close(z, torch.lerp(x, noise, t.view(-1, 1, 1, 1)))
    torch.testing.assert_close(v, noise - x)
    assert torch.equal(same, t) and same.data_ptr() != t.data_ptr()
    _, v, drawn = flow_match_inputs(x, noise=noise, seed=4, backend=backend)
    assert torch.equal(v, noise - x)
    torch.testing.assert_close(drawn, sample_timesteps(3, seed=4, device=DEVICE), rtol=0, atol=1e-6)
    z, v, _ = flow_match_inputs(x, t=t, seed=4, backend=backend)
    torch.testing.assert_close(v + x, normal(4, 0, 0, (3, 6, 5, 7), STREAM_NOISE, DEVICE), rtol=0, atol=1e-5)
    assert torch.equal(z[0], x[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_data(backend):
    x = randn((2, 3, 4, 4)).requires_grad_()
    a, b = torch.randn(2, 2, 3, 4, 4, device=DEVICE)
    z, v, t = flow_match_inputs(x, seed=1, backend=backend)
    (dx,) = torch.autograd.grad((z * a).sum() + (v * b).sum(), x)
    torch.testing.assert_close(dx, (1 - t.view(-1, 1, 1, 1)) * a - b)
    (dx,) = torch.autograd.grad(flow_match_inputs(x, seed=1, backend=backend)[1].sum(), x)
    assert torch.equal(dx, -torch.ones_like(x)) and not t.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_standard_normal(backend):
    n = 40_000 if backend == "triton" else 1_000_000
    _, v, _ = flow_match_inputs(torch.zeros(1, n, device=DEVICE), seed=8, backend=backend)
    z = v[0].double().sort().values
    order = torch.special.ndtr(z)
    ks = (order - (torch.arange(n, device=DEVICE) + 0.5) / n).abs().max() * math.sqrt(n)
    assert ks < 1.95  # Kolmogorov-Smirnov, p = 0.001
    a, b = v[0, 0::2].double(), v[0, 1::2].double()  # the two of a pair
    assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 4 / math.sqrt(n / 2)
    assert abs(torch.corrcoef(torch.stack((a**2, b**2)))[0, 1]) < 4 / math.sqrt(n / 2)


def test_normal_quantile_is_that_of_as_241():
    u = torch.linspace(2.0**-24, 1 - 2.0**-24, 400_001, dtype=torch.float64)
    torch.testing.assert_close(normal_quantile(u), torch.special.ndtri(u), rtol=1e-14, atol=1e-15)
    single = u.float()
    torch.testing.assert_close(
        normal_quantile(single).double(), torch.special.ndtri(single.double()), rtol=2e-6, atol=1e-6
    )


def test_extreme_draws_stay_inside():
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24, 0.5], dtype=torch.float32)
    for law in LAWS:
        for shift in (1e-6, 1.0, 1e6):
            t = timesteps._icdf(ends, law, shift, 0.0, 1.0)
            assert t.min() > 0 and t.max() < 1 and t.isfinite().all(), (law, shift)


def test_the_mirrored_law_has_the_lowest_mode():
    assert plateau(-1.2, 0.9).knee == pytest.approx(1 - plateau(1.2, 0.9).knee, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["drawn", "given", "channels_last"])
def test_opcheck(kind, backend):
    x = randn((2, 4, 3, 5), torch.bfloat16, "channels_last" if kind == "channels_last" else "nchw").requires_grad_()
    noise, t = (randn(x.shape, x.dtype), torch.rand(2, device=DEVICE)) if kind == "given" else (None, None)
    arguments = ("plateau_logit_normal", 2.0, 0.0, 1.0, 7, 3, 0)
    torch.library.opcheck(flow_match_inputs_op, (x, noise, t, *arguments, backend))
    torch.library.opcheck(sample_timesteps_op, (5, *arguments, torch.device(DEVICE), backend))
    torch.library.opcheck(sample_timesteps_op, (0, *arguments, torch.device(DEVICE), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend):
    def f(x, step):
        z, v, t = flow_match_inputs(x, shift=2.0, seed=1, step=step, backend=backend)
        return z + v, t, sample_timesteps(4, seed=2, step=step, device=DEVICE, backend=backend)

    x = randn((2, 4, 3, 5))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for step in range(3):
        for a, b in zip(compiled(x, step), f(x, step), strict=True):
            assert torch.equal(a, b)


def test_fake_cuda_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        z, v, t = flow_match_inputs(x)
        drawn = sample_timesteps(7, device="cuda")
    assert z.stride() == v.stride() == x.stride() and z.dtype == torch.bfloat16 and z.device.type == "cuda"
    assert t.shape == (2,) and drawn.shape == (7,) and t.dtype == drawn.dtype == torch.float32


def test_fp64_runs_in_torch_and_keeps_its_precision():
    x, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.1, 0.7])
    z, v, _ = flow_match_inputs(x, noise=noise, t=t)
    mix = t.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(z, (1 - mix) * x + mix * noise)
    assert torch.equal(v, noise - x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend):
    assert sample_timesteps(0, device=DEVICE, backend=backend).shape == (0,)
    z, v, t = flow_match_inputs(randn((0, 3, 4, 4)), backend=backend)
    assert z.shape == v.shape == (0, 3, 4, 4) and t.shape == (0,)


def test_errors_name_expected_and_got():
    x = randn((2, 3, 4, 4))
    for bad, message in [
        (lambda: sample_timesteps(3, "cosine"), "law: expected one of uniform, logit_normal, plateau.*, got 'cosine'"),
        (lambda: sample_timesteps(-1), "n: expected 0 or more, got -1"),
        (lambda: sample_timesteps(3, shift=0), "shift: expected a positive number, got 0"),
        (lambda: sample_timesteps(3, sigma=-1), "sigma: expected a positive number, got -1"),
        (lambda: sample_timesteps(3, mu=math.nan), "mu: expected a finite number, got nan"),
        (lambda: sample_timesteps(3, seed=2**64), r"seed: expected a number in \[0, 2\^64\), got"),
        (lambda: sample_timesteps(3, step=-1), r"step: expected a number in \[0, 2\^32\), got -1"),
        (lambda: sample_timesteps(3, first_index=2**32 - 2), r"first_index: expected indices in \[0, 2\^32\)"),
        (lambda: flow_match_inputs(x.long()), r"x: expected floating-point \[N, C, \*S\], got torch.int64"),
        (lambda: flow_match_inputs(x[0, 0, 0]), r"x: expected floating-point \[N, C, \*S\], got torch.float32 \[4\]"),
        (
            lambda: flow_match_inputs(x, noise=x[:1]),
            r"noise: expected .*\[2, 3, 4, 4\].*got .*\[1, 3, 4, 4\]",
        ),
        (lambda: flow_match_inputs(x, t=x), r"t: expected floating-point \[2\] on"),
        (lambda: flow_match_inputs(x.double(), backend="triton"), "flow_match_inputs: backend 'triton' cannot run"),
        (lambda: flow_match_inputs(x[:, :, ::2, ::2], backend="triton"), "cannot be walked as one dimension"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
