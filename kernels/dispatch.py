"""Which implementation of an op runs: the one place that asks what machine this is."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

triton: Any  # to type checkers a kernel is the function that it is written as
if TYPE_CHECKING:
    import triton.language as tl
try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows

    class _Missing:
        """Lets kernel files be imported; `resolve` keeps their kernels from running."""

        def jit(self, fn=None, **_):
            return fn if fn is not None else self.jit

    triton = tl = _Missing()
    _HAS_TRITON = False
else:
    _HAS_TRITON = True

# Triton reads it when a kernel is defined, so a later change of the environment changes nothing.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# What an x86 CPU needs to multiply 16-bit numbers. oneDNN does without, by unpacking them in its inner loops.
_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx_ne_convert"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx_ne_convert"),
}


def _lacking() -> frozenset[torch.dtype]:
    has = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.12
    if has.get("architecture") != "x86_64":
        return frozenset()
    return frozenset(dtype for dtype, names in _PRODUCTS.items() if not any(has.get(name) for name in names))


_LACKING = _lacking()
_VECTORS = torch.backends.cpu.get_cpu_capability()

GPU_TYPES = ("cuda", "xpu")  # HIP devices call themselves cuda
BACKENDS = ("torch", "triton")


def has_triton() -> bool:
    """Whether triton can be imported."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 was set when this module was imported: kernels then run on CPU tensors."""
    return _INTERPRETING


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions that multiply numbers of that dtype; True where nothing is known."""
    return dtype not in _LACKING


def vectors() -> str:
    """The CPU's instructions that aten's kernels are made of: AVX2, AVX512, DEFAULT and others."""
    return _VECTORS


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast takes x's device to, or None where it is off or, as for meta tensors, there is none."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Turns autocast off for x's device, inside a with statement."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _watched(arguments: tuple[Any, ...]) -> bool:
    """Whether somebody has to see the operation these are for: autograd, a compiler, a tracer, a mode, a wrapper."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or _get_current_dispatch_mode() is not None:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return True
    learns = torch.is_grad_enabled()
    return any(
        type(a) not in (Tensor, torch.nn.Parameter) or a.is_meta or (learns and a.requires_grad)
        for a in arguments
        if isinstance(a, Tensor)
    )


def call(op: Any, *arguments: Any) -> Any:
    """op(*arguments), of torch.library.custom_op; where nobody watches its function alone, 0.1 ms of Python less."""
    return (op if _watched(arguments) else getattr(op, "_init_fn", op))(*arguments)


def _why_not_triton(x: Tensor, supported: tuple[str, ...], unsupported: Callable[[Tensor], str | None]) -> str | None:
    """The reason why a Triton kernel cannot run on x, or None."""
    if "triton" not in supported:
        return "this op has no Triton kernel"
    if not has_triton():
        return "triton is not installed"
    if x.device.type in GPU_TYPES or (x.device.type == "cpu" and interpreting()):
        return unsupported(x)
    if x.device.type == "cpu":
        return "CPU tensors need TRITON_INTERPRET=1 in the environment before the import"
    return f"there is no Triton for {x.device.type} tensors"


def resolve(
    op_name: str,
    backend: str,
    x: Tensor,
    supported: tuple[str, ...] = BACKENDS,
    unsupported: Callable[[Tensor], str | None] = lambda x: None,
) -> str:
    """The backend that runs `op_name` on x: an entry of `supported`. A pure function of x's device, dtype and strides.

    "auto" is Triton where the op has a kernel that takes x and x is on a CUDA, HIP or XPU device, else torch: also in
    the interpreter, which is for tests. `unsupported` gives the op's own reason against a kernel on x, or None.
    ValueError names why an explicit backend cannot run, or the names there are.
    """
    allowed = ("auto", *dict.fromkeys((*BACKENDS, *supported)))
    if backend not in allowed:
        raise ValueError(f"{op_name}: backend: expected one of {', '.join(allowed)}, got {backend!r}")
    if backend == "auto":
        on_gpu = x.device.type in GPU_TYPES
        return "triton" if on_gpu and _why_not_triton(x, supported, unsupported) is None else "torch"
    why = _why_not_triton(x, supported, unsupported) if backend == "triton" else None
    if why is None and backend not in supported:
        why = "this op does not have it"
    if why:
        raise ValueError(f"{op_name}: backend {backend!r} cannot run: {why}")
    return backend
