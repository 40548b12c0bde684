"""Other people's blocks on the fused operations: what each kind demands of its parts, and what it does with them.

A fused block is the same object with another class, a subclass of its own, as torch.nn.utils.parametrize does it:
parameters, hooks, modes, isinstance and state-dict keys stay. Each call looks at the parts again, so that a LoRA, a
hook or a padding mode that comes later is not passed over: the block then runs its own forward.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flux2.blocks import AttnBlock, Block, ResBlock
from kernels import attention, group_norm, upsample_conv2d

TRIAL_SIDE = 4  # pixels of a trial's input


# Parts


def _touched(name: str, part: Any, kind: type) -> str | None:
    """Why `part` is not a plain module of that class, which does what its parameters say; None if it is."""
    if type(part) is not kind:
        return f"{name}: expected a torch.nn.{kind.__name__}, got {type(part).__module__}.{type(part).__name__}"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"{name} has hooks"
    if "forward" in part.__dict__ or "_conv_forward" in part.__dict__:
        return f"{name}: its forward was replaced"
    return None


def _not_norm(name: str, norm: Any) -> str | None:
    return _touched(name, norm, nn.GroupNorm) or (None if norm.affine else f"{name} has no weight")


def _not_conv(name: str, conv: Any, side: int) -> str | None:
    """Why `conv` is not a plain convolution side x side that keeps the sides of its input; None if it is."""
    if why := _touched(name, conv, nn.Conv2d):
        return why
    got = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    expected = ((side, side), (1, 1), (side // 2, side // 2), (1, 1), 1, "zeros")
    if got == expected:
        return None
    return f"{name}: expected kernel, stride, padding, dilation, groups, padding mode {expected}, got {got}"


def _not_idle(name: str, part: Any) -> str | None:
    """Why a part beside norms and convolutions is neither SiLU nor a dropout of nothing; None if it is."""
    if isinstance(part, nn.Dropout):
        return _touched(name, part, nn.Dropout) or (None if part.p == 0 else f"{name}: dropout of {part.p}")
    return _touched(name, part, nn.SiLU)


# Kinds of blocks


class Fused(Block):
    """Comes before a block's own class, `stock`; `why_not` says what a kind demands, `fused_forward` what it does."""

    kind: ClassVar[str]
    stock: ClassVar[type[nn.Module]]

    def why_not(self) -> str | None:
        """Why the block is left alone, as its parts are now; None if it is fused."""
        raise NotImplementedError

    def fused_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Any, **options: Any) -> Any:
        extra = (*args[1:], *options.values())
        if not args or any(a is not None for a in extra) or self.why_not() is not None:
            return self.stock.forward(self, *args, **options)
        return self.fused_forward(args[0])

    def trial(self) -> tuple[Tensor, Tensor]:
        """(what the block's own forward gives, what the fused one gives) for a block on random weights."""
        channels = next(p for p in self.parameters() if p.ndim == 1).shape[0]  # the first norm's
        x = random((2, channels, TRIAL_SIDE, TRIAL_SIDE), seed=1)
        return self.stock.forward(self, x, *_nones(self.stock)), self.fused_forward(x)

    def extra_repr(self) -> str:
        return f"fused, backend={self.backend}"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """deepcopy and pickle: the class is made, not found by name."""
        return _blank, (type(self).__bases__[0], self.stock, self.backend), self.__getstate__()


class Residual(Fused):
    """ResnetBlock of the original code."""

    norm2: Any

    kind, shortcut = "residual", "nin_shortcut"

    @property
    def same_width(self) -> bool:
        return self._modules.get(self.shortcut) is None

    @property
    def num_groups(self) -> int:
        return self.norm2.num_groups

    def why_not(self) -> str | None:
        parts = self._modules
        why = (
            _not_norm("norm1", parts.get("norm1"))
            or _not_conv("conv1", parts.get("conv1"), 3)
            or _not_norm("norm2", parts.get("norm2"))
            or _not_conv("conv2", parts.get("conv2"), 3)
            or (None if self.same_width else _not_conv(self.shortcut, parts[self.shortcut], 1))
        )
        for name, part in parts.items():
            if why is None and part is not None and name not in ("norm1", "conv1", "norm2", "conv2", self.shortcut):
                why = _not_idle(name, part)
        return why

    def fused_forward(self, x: Tensor) -> Tensor:
        return ResBlock.forward(self, x)[0]  # pyright: ignore[reportArgumentType]


class DiffusersResidual(Residual):
    """ResnetBlock2D of diffusers."""

    shortcut = "conv_shortcut"

    @property
    def nin_shortcut(self) -> Any:
        return self._modules[self.shortcut]


class Upsampling(Fused):
    """Upsample of the original code and Upsample2D of diffusers."""

    kind = "upsample"

    @property
    def convolution(self) -> Any:
        return self._modules.get("conv", self._modules.get("Conv2d_0"))

    def why_not(self) -> str | None:
        if len(self._modules) != 1:
            return f"expected one part, the convolution, got {', '.join(self._modules) or 'none'}"
        return _not_conv("conv", self.convolution, 3)

    def fused_forward(self, x: Tensor) -> Tensor:
        conv = self.convolution
        return upsample_conv2d(x, conv.weight, conv.bias)

    def trial(self) -> tuple[Tensor, Tensor]:
        x = random((2, self.convolution.in_channels, TRIAL_SIDE, TRIAL_SIDE), seed=1)
        return self.stock.forward(self, x), self.fused_forward(x)


class SpatialAttention(Fused):
    """AttnBlock of the original code."""

    norm: Any

    kind = "attention"

    @property
    def num_groups(self) -> int:
        return self.norm.num_groups

    def why_not(self) -> str | None:
        parts, names = self._modules, ("q", "k", "v", "proj_out")
        if extra := [name for name in parts if name not in ("norm", *names)]:
            return f"expected norm, {', '.join(names)}, got {', '.join(extra)} too"
        why = _not_norm("norm", parts.get("norm"))
        for name in names:
            why = why or _not_conv(name, parts.get(name), 1)
        return why

    def fused_forward(self, x: Tensor) -> Tensor:
        return AttnBlock.forward(self, x)[0]  # pyright: ignore[reportArgumentType]


class DiffusersAttention(Fused):
    """Attention of diffusers as autoencoders use it: over all positions, after a norm, with a residual connection."""

    group_norm: Any
    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any
    processor: Any
    heads: Any

    kind = "attention"

    def why_not(self) -> str | None:
        parts, names = self._modules, ("to_q", "to_k", "to_v")
        if extra := [
            name for name, p in parts.items() if p is not None and name not in ("group_norm", *names, "to_out")
        ]:
            return f"expected group_norm, {', '.join(names)} and to_out, got {', '.join(extra)} too"
        why = _not_norm("group_norm", parts.get("group_norm"))
        for name in names:
            why = why or _touched(name, parts.get(name), nn.Linear)
        if why is None and (len(self.to_out) != 2 or type(self.processor).__name__ != "AttnProcessor2_0"):
            why = f"expected the processor AttnProcessor2_0, got {type(self.processor).__name__}"
        return why or _touched("to_out.0", self.to_out[0], nn.Linear) or _not_idle("to_out.1", self.to_out[1])

    def fused_forward(self, x: Tensor) -> Tensor:
        norm, heads = self.group_norm, self.heads
        normed = group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, backend=self.backend)
        tokens = normed.flatten(2).transpose(1, 2)  # [N, hw, C]
        q, k, v = (m(tokens).unflatten(2, (heads, -1)).transpose(1, 2) for m in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).reshape(x.shape)


class Output(Fused):
    """Encoder and Decoder of diffusers: their last norm, SiLU and convolution; all else runs as it stands there."""

    conv_norm_out: Any
    conv_out: Any

    kind = "output"

    def why_not(self) -> str | None:
        return (
            _not_norm("conv_norm_out", self._modules.get("conv_norm_out"))
            or _touched("conv_act", self._modules.get("conv_act"), nn.SiLU)
            or _not_conv("conv_out", self._modules.get("conv_out"), 3)
        )

    def fused_forward(self, x: Tensor) -> Tensor:
        return self.stock.forward(_AtOnce(self), x)  # pyright: ignore[reportArgumentType]

    def trial(self) -> tuple[Tensor, Tensor]:
        """With nothing before the last norm."""
        self._modules["conv_in"] = self._modules["mid_block"] = _First()
        for blocks in {"down_blocks", "up_blocks"} & self._modules.keys():
            self._modules[blocks] = nn.ModuleList()
        x = random((2, self.conv_out.in_channels, TRIAL_SIDE, TRIAL_SIDE), seed=1)
        return self.stock.forward(self, x), self.fused_forward(x)


class _First(nn.Module):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class _AtOnce:
    """An `Output` as its own forward sees it: norm and SiLU do nothing, and the convolution does all three."""

    def __init__(self, module: Output) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def conv_norm_out(self, h: Tensor) -> Tensor:
        return h

    def conv_act(self, h: Tensor) -> Tensor:
        return h

    def conv_out(self, h: Tensor) -> Tensor:
        return self.module.norm_silu_conv(self.module.conv_norm_out, self.module.conv_out, h)


KINDS: dict[str, type[Fused]] = {
    "ResnetBlock": Residual,
    "ResnetBlock2D": DiffusersResidual,
    "Upsample": Upsampling,
    "Upsample2D": Upsampling,
    "AttnBlock": SpatialAttention,
    "Attention": DiffusersAttention,
    "Encoder": Output,
    "Decoder": Output,
}


# Classes


@cache
def class_of(kind: type[Fused], stock: type[nn.Module], backend: str) -> type[Fused]:
    """The class of a fused block. It has the name of its own class, by which others decide where to split a model."""
    own = {"stock": stock, "backend": backend, "__init__": stock.__init__, "__module__": stock.__module__}
    return type(stock.__name__, (kind, stock), own)  # pyright: ignore[reportReturnType]


def _blank(kind: type[Fused], stock: type[nn.Module], backend: str) -> nn.Module:
    cls = class_of(kind, stock, backend)
    return cls.__new__(cls)


def _nones(stock: type[nn.Module]) -> list[None]:
    """For each argument that stock.forward demands after the input, as CompVis' blocks demand an embedding of time."""
    parameters = list(inspect.signature(stock.forward).parameters.values())[2:]
    return [None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
