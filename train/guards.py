"""Updates that a broken loss cannot reach: an optimiser that skips where a term or a gradient is not a finite number.

Whether to skip is decided on the device, so that a GPU does not wait; what broke is read when the log is written.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flux2.ema import EMA
from kernels.adamw import adamw_

LEAST_UPDATES = 3  # without a gradient, before a parameter is called dead


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One update that did not happen: its step, and the terms, else the parameters, that were not finite.

    ranks: the processes whose terms were not; none where that is not known, or there is one process.
    """

    step: int
    broke: tuple[str, ...]
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"step {self.step}: {', '.join(self.broke)}"


class Spike(Exception):
    """What the run should go back from; the text says why."""


class SpikeWatch:
    """Raises Spike where a loss is above `factor` times the median of what came before it. factor 0: never.

    It looks back on at most KEPT values and says nothing before LEAST.
    """

    KEPT, LEAST = 20, 5

    def __init__(self, factor: float) -> None:
        self.factor, self._seen = factor, deque[float](maxlen=self.KEPT)

    def observe(self, loss: float) -> None:
        """Takes the next value; NaN where no step of the window had a finite one."""
        if self.factor and len(self._seen) >= self.LEAST:
            median = statistics.median(self._seen)
            if not loss <= self.factor * median:
                raise Spike(f"the loss is {loss:.4g}, more than {self.factor:g} times its median {median:.4g}")
        if loss == loss:
            self._seen.append(loss)

    def forget(self) -> None:
        """After going back."""
        self._seen.clear()


def _own(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that is spread over several."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _of_all_shards(norms: Tensor, spread: list[bool]) -> Tensor:
    """Norms of whole gradients, from those of this process's parts where they are spread."""
    if not any(spread):
        return norms
    squares = norms.square()
    torch.distributed.all_reduce(squares)
    return torch.where(torch.tensor(spread, device=norms.device), squares.sqrt(), norms)


class GuardedOptimiser:
    """Clips gradients and updates, unless a loss term or a gradient is NaN or infinite: then nothing changes.

    A skipped update leaves weights, moments and step counts bit for bit as they were. `optimiser` is a fused one, which
    reads on the device whether to skip, or any other, for which the host waits. A fused AdamW clips, updates and takes
    averages along in one pass over memory (`kernels.adamw`). named: the parameters it updates. clip: largest norm of
    all gradients together.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], optimiser: torch.optim.Optimizer, *, clip: float
    ) -> None:
        self.named, self.optimiser, self.clip = dict(named), optimiser, clip
        # as of the last `read`: skipped in a row at its end, most in a row since the read before, all, last step
        self.in_a_row = self.longest = self.skipped = self.last_step = 0
        # step, names, terms and norm, norm of each gradient, which processes broke
        self._window: list[tuple[int, list[str], Tensor, Tensor, Tensor | None]] = []
        self._fused = bool(optimiser.defaults.get("fused"))
        plain = not optimiser.defaults.get("amsgrad") and not optimiser.defaults.get("maximize")
        self._one_pass = self._fused and plain and isinstance(optimiser, torch.optim.AdamW)
        self.averaged: set[Tensor] = set()  # parameters whose averages the last update took along

    @torch.no_grad()
    def update(
        self, step: int, terms: Mapping[str, Tensor], ranks: Tensor | None = None, averages: Sequence[EMA] = ()
    ) -> Tensor:
        """One update from the gradients that lie in the parameters, which it then frees. Returns their norm, a scalar.

        terms: scalars by name; a broken one skips the update and is named. Gradients and terms are those of all
        processes, so that all do the same; ranks: of `dist.mean_terms`. averages: take in, skipped or not, what is then
        there, if the update can take them along: of the parameters in `averaged`.
        """
        with_gradient = [p for p in self.named.values() if p.grad is not None]
        gradients: list[Tensor] = [_own(p.grad) for p in with_gradient if p.grad is not None]
        if not gradients:
            raise ValueError(f"no gradient reached any of {len(self.named)} parameters: nothing is trained")
        found = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
        found = _of_all_shards(found, [isinstance(p.grad, DTensor) for p in with_gradient])
        norms = found
        if len(gradients) < len(self.named):
            places = [i for i, p in enumerate(self.named.values()) if p.grad is not None]
            norms = found.new_zeros(len(self.named)).index_copy(0, torch.tensor(places, device=found.device), found)
        norm = found.norm()
        values = torch.stack([*(t.detach().float().reshape(()) for t in terms.values()), norm])
        broken = ~torch.isfinite(values).all()
        factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        self.averaged = set()
        if self._one_pass:
            self._adamw(step, factor, broken, averages)
        else:
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
            if self._fused:
                self.optimiser.grad_scale, self.optimiser.found_inf = None, broken.float()  # type: ignore[attr-defined]
            if self._fused or not broken.item():
                self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._window.append((step, list(terms), values, norms, ranks))
        return norm

    def _adamw(self, step: int, factor: Tensor, broken: Tensor, averages: Sequence[EMA]) -> None:
        """optimiser.step() with gradients times `factor`, unless `broken`, and the averages of what it updates."""
        assert isinstance(self.optimiser, torch.optim.AdamW)
        for group in self.optimiser.param_groups:
            rows: list[list[Tensor]] = [[], [], [], [], [], []]
            self.optimiser._init_group(group, *rows)
            params, gradients, first, second, _, counts = rows
            adamw_(
                params, gradients, first, second, counts, [[ema.of(p) for p in params] for ema in averages],
                lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                weights=[ema.weight(step) for ema in averages], factor=factor, skip=broken,
            )  # fmt: skip
            self.averaged.update(params if averages else ())

    def forget(self) -> None:
        """After going back to an older state: what was skipped since then is no longer in a row."""
        self._window, self.in_a_row, self.longest = [], 0, 0

    def read(self) -> tuple[list[Skipped], list[str]]:
        """(updates skipped since the last call, parameters whose gradient was zero at each update since then).

        Biases are not listed: in front of a norm, or behind a hinge within its margin, they have none. Neither is
        anything after fewer than LEAST_UPDATES: what follows a layer that starts from zero waits for that layer.
        Waits for the device. The counts are then up to date.
        """
        skipped: list[Skipped] = []
        self.longest = self.in_a_row
        dead = [True] * len(self.named)
        for step, names, values, norms, ranks in self._window:
            *losses, norm = values.tolist()
            terms = [n for n, v in zip(names, losses, strict=True) if not abs(v) < math.inf]
            sizes = norms.tolist()
            gradients = [n for n, v in zip(self.named, sizes, strict=True) if not abs(v) < math.inf]
            if terms or not norm < math.inf:
                more = [f"{len(gradients) - 3} more gradients"] if len(gradients) > 3 else []
                why = terms or [f"gradient of {n}" for n in gradients[:3]] + more or ["norm of all gradients"]
                which = () if ranks is None else tuple(ranks.nonzero().flatten().tolist())
                skipped.append(Skipped(step=step, broke=tuple(why), ranks=which))
                self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
                self.longest = max(self.longest, self.in_a_row)
            else:
                self.in_a_row = 0
            dead = [d and v == 0 for d, v in zip(dead, sizes, strict=True)]
        watched = len(self._window) >= LEAST_UPDATES
        if self._window:
            self.last_step = self._window[-1][0]
        self._window = []
        listed = [n for n, d in zip(self.named, dead, strict=True) if d and not n.endswith("bias")]
        return skipped, listed if watched else []
