"""Runs other people's autoencoders on the fused operations: in place, the same parameters, undone by `unfuse`.

Blocks of diffusers' AutoencoderKL and AutoencoderKLFlux2 and of the original code (CompVis, Black Forest Labs) are
known by the name of their class or of a base, then by their parts: plain, without hooks, of the shapes that belong
there. Last comes a trial, with random weights on a small input: a block whose own forward gives something else is left
alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux2.blocks import Block
from flux2.fused_blocks import KINDS, Fused, Output, class_of, random
from kernels.dispatch import BACKENDS

TRIAL_ERROR = 1e-4  # relative to the largest value, fp32; another function is off by a tenth or more


@dataclass(frozen=True, kw_only=True)
class FuseReport:
    """What `fuse` did. fused: the kind of each block by its name ("" is the module itself); left: why, by name."""

    fused: dict[str, str]
    left: dict[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """Fused blocks of each kind: residual, upsample, attention, output."""
        return dict(Counter(self.fused.values()))

    def __str__(self) -> str:
        parts = ", ".join(f"{n} {kind}" for kind, n in self.counts.items())
        lines = [f"left {name or 'the module itself'}: {why}" for name, why in self.left.items()]
        return "\n".join((f"fused {len(self.fused)} blocks: {parts}", *lines))


def _stand_in(module: nn.Module) -> Any:
    """`module` with random fp32 parameters on the CPU, in eval; its own are not touched, nor are hooks called."""
    twin = copy.copy(module)
    parts = {name: part and _stand_in(part) for name, part in module._modules.items()}
    values: dict[str, Any] = dict(module._parameters)
    for i, (name, p) in enumerate(module._parameters.items()):
        if p is not None:
            noise = random(tuple(p.shape), seed=i)
            values[name] = nn.Parameter(noise / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3 * noise + (name == "weight"))
    object.__setattr__(twin, "__dict__", twin.__dict__ | {"_parameters": values, "_modules": parts, "training": False})
    return twin


def _objection(module: nn.Module, kind: type[Fused]) -> str | None:
    """Why `module` is not to be of that kind; None if its parts and a trial say that it may."""
    if isinstance(module, Fused):
        return module.why_not()
    if "forward" in module.__dict__:
        return "its forward was replaced"
    parts = module._modules
    if kind is Output:  # all but its end is not looked at
        parts = {k: v for k, v in parts.items() if k in ("conv_norm_out", "conv_act", "conv_out")}
    if any(type(p) not in (nn.Parameter, Tensor) for m in parts.values() if m for p in m.parameters()):
        return "a parameter is no plain one (it is quantised, or spread over devices)"
    view = copy.copy(module)
    view.__class__ = class_of(kind, type(module), "auto")
    if why := view.why_not():  # pyright: ignore[reportCallIssue]
        return why
    if kind is Output:
        view.__dict__ = view.__dict__ | {"_modules": dict.fromkeys(module._modules) | parts}
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            own, fused = _stand_in(view).trial()
    except Exception as error:  # other people's code: it may want anything
        return f"its forward could not be tried: {error!r}"
    if own.shape != fused.shape or not (own - fused).abs().max() <= TRIAL_ERROR * own.abs().max():
        return "its own forward gives something else"
    return None


def _kind_of(stock: type[nn.Module]) -> type[Fused] | None:
    """By the name of the class, or of the nearest base that has one of the names."""
    return next((KINDS[c.__name__] for c in stock.__mro__ if c.__name__ in KINDS), None)


def fuse(model: nn.Module, backend: str = "auto") -> FuseReport:
    """Runs an autoencoder's blocks on fused operations, in place: norm, SiLU and convolution; upsampling; attention.

    model: diffusers' AutoencoderKL or AutoencoderKLFlux2, the original code's modules, or a module that holds such
    blocks; on any device, of any dtype and memory format, in either mode. backend: as in `kernels`. Parameters,
    buffers, state-dict keys, hooks of blocks and modes stay; outputs and gradients are the same up to rounding. Fused
    blocks are once differentiable. Fusing twice is fusing once. `unfuse` gives back exactly what was there.

    Returns what was fused, and what was left with the reason: parts with hooks, LoRA, other norms, dropout, quantised
    weights. ValueError, naming expected and got, on an unknown backend or where nothing is fused.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    changes: list[tuple[nn.Module, type[Fused]]] = []
    for name, module in model.named_modules():
        stock = module.stock if isinstance(module, Fused) else type(module)
        kind = None if issubclass(stock, Block) else _kind_of(stock)
        if kind is None or (kind is Output and not {"norm_out", "conv_norm_out"} & module._modules.keys()):
            continue
        if kind is Output and "norm_out" in module._modules:
            left[name] = "its last norm and convolution: the SiLU between them is a call inside its forward"
        elif why := _objection(module, kind):
            left[name] = f"{stock.__name__}: {why}"
        else:
            fused[name] = kind.kind
            changes.append((module, class_of(kind, stock, backend)))
    if not fused:
        reasons = "".join(f"; {name or 'the module itself'}: {why}" for name, why in list(left.items())[:3])
        raise ValueError(
            "fuse: expected blocks of diffusers' AutoencoderKL or AutoencoderKLFlux2 or of the original code"
            f" ({', '.join(KINDS)}), got {type(model).__name__} without one that can be fused{reasons}"
        )
    for module, cls in changes:
        module.__class__ = cls
    return FuseReport(fused=fused, left=left)


def unfuse(model: nn.Module) -> None:
    """Gives each block that `fuse` changed its own class back. Does nothing to others."""
    for module in model.modules():
        if isinstance(module, Fused):
            module.__class__ = module.stock  # pyright: ignore[reportAttributeAccessIssue]
