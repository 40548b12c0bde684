"""adamw_: torch's AdamW, clipping and averages, in one launch; the kernel against both in fp64."""

import math

import pytest
import torch
from torch import nn

from kernels import adamw
from kernels.adamw import BLOCK, adamw_

# In the interpreter what a block's mask leaves out is computed with, too.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
SHAPES = [(3,), (BLOCK,), (2 * BLOCK + 5,), (4, 3, 3, 3), (0,), (1,), (70, 70)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class State:
    """Parameters, one of them channels_last, with moments, counts and two averages, one of which one parameter lacks"""

    def __init__(self, dtype=torch.float32, averages=2):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in SHAPES]
        self.params[3] = self.params[3].to(memory_format=torch.channels_last)
        self.first, self.second = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.steps = [torch.zeros((), device=DEVICE) for _ in SHAPES]
        self.averages = [[p.clone() for p in self.params] for _ in range(averages)]
        if averages:
            self.averages[-1][2] = None

    def all(self):
        return [
            t for row in (self.params, self.first, self.second, *self.averages) for t in row if t is not None
        ] + self.steps

    def update(self, grads, backend, weights=(0.9, 0.01), **options):
        adamw_(
            self.params, [g.to(self.params[0].dtype) for g in grads], self.first, self.second, self.steps,
            self.averages, **(SETTINGS | options), weights=weights, backend=backend,
        )  # fmt: skip


def gradients(n, like):
    generator = torch.Generator().manual_seed(n)
    return [torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator)) for p in like]


def definition(state, grads, lr, betas, eps, weight_decay, weights, factor):
    """Loshchilov & Hutter's algorithm 2, written down once more"""
    for i, (p, g, m, v, count) in enumerate(
        zip(state.params, grads, state.first, state.second, state.steps, strict=True)
    ):
        g = g.double() * factor
        count += 1
        m.copy_(betas[0] * m + (1 - betas[0]) * g)
        v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
        m_hat, v_hat = m / (1 - betas[0] ** count.item()), v / (1 - betas[1] ** count.item())
        p.copy_(p - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p))
        for row, w in zip(state.averages, weights, strict=True):
            if row[i] is not None:
                row[i].copy_((1 - w) * row[i] + w * p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_follows_the_definition(backend):
    state, truth = State(), State(torch.float64)
    factor = torch.tensor(0.3, device=DEVICE)
    for n in range(12):
        weights = (max(0.01, 1 - n / 10), 0.01)
        grads = gradients(n, state.params)
        definition(truth, grads, **SETTINGS, weights=weights, factor=factor.item())
        state.update(grads, backend, weights, factor=factor)
        for got, expected in zip(state.all(), truth.all(), strict=True):
            torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 10, 1000, 200_000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.5, 0.0), (0.999, 0.99999)])
def test_bias_corrections_at_any_count(betas, count):
    """lr 1, no decay, moments of ones: p is minus the corrected step"""
    p, ones = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    steps = torch.tensor(float(count), device=DEVICE)
    adamw_([p], [ones], [ones.clone()], [ones.clone()], [steps], lr=1.0, betas=betas, eps=0.0, weight_decay=0.0,
           backend="triton")  # fmt: skip
    correction = math.sqrt(1 - betas[1] ** (count + 1)) / (1 - betas[0] ** (count + 1))
    torch.testing.assert_close(p, torch.full_like(p, -correction), rtol=1e-5, atol=0)
    assert steps.item() == count + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_update_changes_averages_only(backend):
    state = State()
    state.update(gradients(0, state.params), backend)
    before = [t.clone() for t in state.all()]
    broken = gradients(1, state.params)
    broken[2][7] = math.nan
    expected = [(e, torch.lerp(e, p, 0.2)) for e, p in zip(state.averages[0], state.params, strict=True)]
    state.update(broken, backend, (0.2, 0.0), skip=torch.tensor(True, device=DEVICE))
    unchanged = len(before) - len(state.steps) - sum(t is not None for row in state.averages for t in row)
    for got, was in zip(state.all()[:unchanged], before[:unchanged], strict=True):
        assert torch.equal(got, was)
    assert all(count.item() == 1 for count in state.steps)
    for got, value in expected:
        torch.testing.assert_close(got, value)
    state.update(gradients(2, state.params), backend, skip=torch.tensor(False, device=DEVICE))
    assert all(count.item() == 2 for count in state.steps) and not torch.equal(state.params[0], before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_of_nothing_and_of_everything(backend):
    """Weight 1 takes the parameter itself, weight 0 leaves the average as it is, bit for bit"""
    state = State()
    was = [None if e is None else e.clone() for e in state.averages[1]]
    state.update(gradients(0, state.params), backend, (1.0, 0.0))
    assert all(torch.equal(e, p) for e, p in zip(state.averages[0], state.params, strict=True))
    assert all(e is None or torch.equal(e, w) for e, w in zip(state.averages[1], was, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_averages_than_the_kernel_takes(backend):
    state = State(averages=6)
    state.update(gradients(0, state.params), backend, [0.1 * k for k in range(6)])
    start = State().params
    for k, row in enumerate(state.averages):
        for e, p, s in zip(row, state.params, start, strict=True):
            if e is not None:
                torch.testing.assert_close(e, torch.lerp(s, p, 0.1 * k), rtol=1e-5, atol=1e-6)


def test_one_launch_for_all_tensors(monkeypatch):
    launches = []
    plain = adamw.launch
    monkeypatch.setattr(
        adamw, "launch", lambda kernel, programs, *a, **k: launches.append(programs) or plain(kernel, programs, *a, **k)
    )
    state = State()
    state.update(gradients(0, state.params), "triton")
    assert launches == [sum(-(-p.numel() // BLOCK) for p in state.params)]


def test_unaligned_memory():
    flat = [torch.randn(4099, device=DEVICE) for _ in range(5)]
    a, b = ([t.clone()[3:] for t in flat] for _ in range(2))
    for row, backend in ((a, "triton"), (b, "torch")):
        p, g, m, v, e = row
        adamw_([p], [g], [m], [v.square_()], [torch.zeros((), device=DEVICE)], [[e]], **SETTINGS, weights=[0.3],
               backend=backend)  # fmt: skip
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_layout_are_copied(backend):
    p, g = torch.randn(4, 6, device=DEVICE), torch.randn(6, 4, device=DEVICE).t()
    other = p.clone()
    for into, grad in ((p, g), (other, g.contiguous())):
        moments = [[torch.zeros_like(p)], [torch.zeros_like(p)]]
        adamw_([into], [grad], *moments, [torch.zeros((), device=DEVICE)], **SETTINGS, backend=backend)
    assert torch.equal(p, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_sides_of_one_do_not_matter(backend):
    """A 1x1 convolution's weight is channels_last and contiguous at once"""
    p = torch.randn(4, 6, 1, 1, device=DEVICE)
    last = p.as_strided(p.shape, (6, 1, 6, 6)).clone(memory_format=torch.preserve_format)
    e, zeros = p.clone(), [[torch.zeros_like(last)], [torch.zeros_like(p)]]
    assert last.stride() != p.stride()
    adamw_([last], [torch.ones_like(p)], *zeros, [torch.zeros((), device=DEVICE)], [[e]], **SETTINGS, weights=[1.0],
           backend=backend)  # fmt: skip
    torch.testing.assert_close(last, p * (1 - 1e-3) - 1e-2)
    assert torch.equal(e, last)


def test_fp64_is_torchs():
    wide = [[torch.zeros(2, dtype=torch.float64)] for _ in range(4)]
    with pytest.raises(ValueError, match=r"adamw_: backend 'triton' cannot run: expected float32, got torch.float64"):
        adamw_(*wide, [torch.zeros(())], **SETTINGS, backend="triton")
    adamw_(*wide, [torch.zeros(())], **SETTINGS)


def test_is_torch_optim_adamw():
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    mine = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), **SETTINGS)
    first, second = ([torch.zeros_like(p) for p in mine] for _ in range(2))
    steps = [torch.zeros(()) for _ in mine]
    for _ in range(4):
        optimiser.zero_grad()
        model(torch.randn(3, 7)).square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimiser.step()
        adamw_(mine, grads, first, second, steps, **SETTINGS, backend="triton" if DEVICE == "cpu" else "auto")
    for a, b in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, r"grads: expected 1 tensors like params, got 0"),
        ({"grads": [torch.zeros(3)]}, r"grads\[0\]: expected \[2\] on cpu, got \[3\] on cpu"),
        ({"steps": [torch.zeros(1)]}, r"steps\[0\]: expected \[\] on cpu, got \[1\] on cpu"),
        ({"averages": [[torch.zeros(2)]]}, r"weights: expected one for each of 1 averages, got 0"),
        ({"averages": [[torch.zeros(2, device="meta")]], "weights": [0.5]}, r"averages\[0\]\[0\]: expected .* on meta"),
        (
            {"exp_avgs": [torch.zeros(4)[::2]]},
            r"exp_avgs\[0\]: expected the strides of a dense params\[0\], got \(2,\)",
        ),
        ({"params": [torch.zeros(4)[::2]]}, r"exp_avgs\[0\]: expected .* beside \(2,\) of \[2\]"),
        ({"backend": "cuda"}, r"backend: expected one of auto, torch, triton, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {n: [torch.zeros(2)] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")} | {"steps": [torch.zeros(())]}
    with pytest.raises(ValueError, match="adamw_: " + message):
        adamw_(**(given | SETTINGS | change))


def test_no_parameters_are_no_update():
    adamw_([], [], [], [], [], **SETTINGS)
