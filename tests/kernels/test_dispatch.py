"""Which backend runs: a function of device and op, and a sentence where it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import call, resolve

ROOT = Path(__file__).parents[2]
CPU = torch.zeros(1)


class On:
    """Stands in for a tensor on a device that this machine lacks: resolve reads the device only."""

    def __init__(self, kind):
        self.device = torch.device(kind)


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_INTERPRETING", False)


@pytest.mark.parametrize(
    ("kind", "expected"), [("cpu", "torch"), ("cuda", "triton"), ("xpu", "triton"), ("mps", "torch")]
)
def test_auto_by_device(kind, expected):
    assert resolve("op", "auto", On(kind)) == expected


def test_auto_is_torch_without_triton_or_kernel(monkeypatch):
    assert resolve("op", "auto", On("cuda"), supported=("torch",)) == "torch"
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    assert resolve("op", "auto", On("cuda")) == "torch"


def test_interpreter_runs_triton_on_cpu_only_when_asked(monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETING", True)
    assert resolve("op", "triton", CPU) == "triton"
    assert resolve("op", "auto", CPU) == "torch"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_explicit_backend_that_can_run(backend):
    assert resolve("op", backend, On("cuda")) == backend


def test_triton_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(ValueError, match="op: backend 'triton' cannot run: CPU tensors need TRITON_INTERPRET=1"):
        resolve("op", "triton", CPU)
    with pytest.raises(ValueError, match="cannot run: there is no Triton for mps tensors"):
        resolve("op", "triton", On("mps"))
    with pytest.raises(ValueError, match="cannot run: this op has no Triton kernel"):
        resolve("op", "triton", On("cuda"), supported=("torch",))
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="cannot run: triton is not installed"):
        resolve("op", "triton", On("cuda"))


def test_unknown_backend_names_those_there_are():
    with pytest.raises(ValueError, match="op: backend: expected one of auto, torch, triton, got 'cuda'"):
        resolve("op", "cuda", CPU)
    with pytest.raises(ValueError, match="expected one of auto, torch, triton, sdpa, got 'flash'"):
        resolve("op", "flash", CPU, supported=("torch", "sdpa"))
    assert resolve("op", "sdpa", CPU, supported=("torch", "sdpa")) == "sdpa"
    with pytest.raises(ValueError, match="backend 'torch' cannot run: this op does not have it"):
        resolve("op", "torch", CPU, supported=("triton",))


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), (None, "False")])
def test_interpreting_is_the_environment_at_import(value, expected, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    code = "from kernels import dispatch as d; import os; os.environ['TRITON_INTERPRET'] = '1'; print(d.interpreting())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert out.stdout.strip() == expected, out.stderr[-2000:]


class Operation:
    """Stands in for a registered operation: says by which way it was called."""

    def __call__(self, *arguments):
        return "registered"

    def _init_fn(self, *arguments):
        return "direct"


def way(*arguments):
    return call(Operation(), *arguments)


def test_operations_are_called_directly_where_nobody_watches():
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert way(CPU, None, 3, "auto") == "direct"
    with torch.no_grad():
        assert way(CPU, parameter) == "direct"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_operations_go_through_their_registration_where_somebody_does():
    """Autograd, transforms, modes, subclasses, meta tensors, tracers and compilers"""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    found = {"gradient": way(CPU, torch.zeros(2, requires_grad=True)), "meta": way(CPU.to("meta"))}
    with FakeTensorMode() as mode:
        found["mode"] = way(CPU)
        fake = mode.from_tensor(CPU)
    found["subclass"] = way(fake)
    with FlopCounterMode(display=False):
        found["flop counter"] = way(CPU)
    torch.vmap(lambda x: found.setdefault("vmap", way(CPU)) and x)(torch.zeros(2, 2))
    torch.jit.trace(lambda x: found.setdefault("tracer", way(x)) and x, torch.zeros(2))
    torch.compile(lambda x: found.setdefault("compiler", way(x)) and x, backend="eager", fullgraph=True)(CPU)
    assert len(found) == 8 and set(found.values()) == {"registered"}, found


def test_both_ways_give_the_same():
    from kernels import group_norm_silu, norm_silu_conv2d

    x, w, weight = torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(4, 8, 3, 3)
    for f in (
        lambda *t: group_norm_silu(*t, num_groups=4),
        lambda *t: norm_silu_conv2d(*t, weight, None, num_groups=4),
    ):
        direct = f(x, w, w)
        assert torch.equal(direct, f(x.clone().requires_grad_(), w, w).detach()) and not direct.requires_grad
