"""Samplers of a flow model, and guidance: functions with one signature and no state.

Time t in [0, 1]: 0 is data, 1 is noise; z_t = (1 - t) x + t eps, and a velocity is a function v(z, t) of z [N, ...] and
t [N] that estimates E[eps - x | z_t = z]. Every sampler walks z from `ts[0]` to `ts[-1]`, usually
`flux2.schedules.sampling_times(n, shift)`, from 1 down to 0:

    euler            dz = v dt                                          n calls, error of order 1
    heun             the mean slope of both ends of a step              2 n - 1 calls, error of order 2
    euler_maruyama   dz = (v - w s / 2) dt + sqrt(w) dW, w = 2 t        n calls, stochastic

s is the score, on this path -(z + (1 - t) v) / t, so that w s / 2 = -(z + (1 - t) v) needs no division. Sources: Lipman
et al. 2022 (arXiv:2210.02747); Ma et al. 2024 (SiT, arXiv:2401.08740), whose diffusion w this is.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(z [N, ...], t [N]) -> v like z."""
Callback = Callable[[int, float, Tensor], None]
"""(steps done, time reached, z there)."""


def euler(
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """z [N, ...] at time ts[0] -> z at ts[-1], of z's dtype, which is at least fp32.

    ts: fp64 [n + 1], strictly falling within [0, 1]. velocity gets z and t [N], both of z's dtype; what it returns is
    taken to that dtype, so that a model may compute in bf16. generator is not used: the path is deterministic. callback
    is called after each step. ValueError for other ts or z.
    """
    z, times = _checked("euler", z, ts)
    for i, (t, s) in enumerate(pairwise(times), 1):
        z = z + (s - t) * _at(velocity, z, t)
        if callback:
            callback(i, s, z)
    return z


def heun(
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """As `euler`, with the mean of the slopes at both ends; a step that ends at t = 0 is Euler's.

    A model is not trained at t = 0 itself, and one step of order 1 leaves the order of the whole at 2.
    """
    z, times = _checked("heun", z, ts)
    for i, (t, s) in enumerate(pairwise(times), 1):
        slope = _at(velocity, z, t)
        if s > 0:
            slope = 0.5 * (slope + _at(velocity, z + (s - t) * slope, s))
        z = z + (s - t) * slope
        if callback:
            callback(i, s, z)
    return z


def euler_maruyama(
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """As `euler`, of the stochastic equation with the same marginals; the last step is Euler's.

    The noise of a step is drawn from `generator`, on z's device, or from torch's own where none is given. SiT and REPA
    drop only the noise of the last step, which then overshoots the data by the noise of the time it starts at; they
    let it start at t = 0.04. A shifted grid's last time is several times that.
    """
    z, times = _checked("euler_maruyama", z, ts)
    for i, (t, s) in enumerate(pairwise(times), 1):
        v = _at(velocity, z, t)
        if i == len(times) - 1:
            z = z + (s - t) * v
        else:
            noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
            z = z + (s - t) * (v + (1 - t) * v + z) + (2 * t * (t - s)) ** 0.5 * noise  # drift: v - w score / 2
        if callback:
            callback(i, s, z)
    return z


SAMPLERS = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}


def classifier_free(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null: int | Tensor,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """The velocity v_null + scale (v_y - v_null) where t lies in `interval`, ends included, and v_y elsewhere.

    model(z, t, y) -> v, with labels y int64 [N]; null: the label of no class, or labels [N]. One call of twice the
    batch where guidance is on, and of the batch where it is off; scale 1 is off everywhere. Ho & Salimans 2022
    (arXiv:2207.12598); the interval, Kynkaanniemi et al. 2024 (arXiv:2404.07724). ValueError if the interval is not
    0 <= low <= high <= 1.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"classifier_free: interval: expected 0 <= low <= high <= 1, got {interval}")
    none = torch.full_like(y, null) if isinstance(null, int) else null.to(y)
    everywhere = low == 0 and high == 1

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        inside = (low <= t) & (t <= high)
        if scale == 1 or not (everywhere or inside.any()):  # any: the host waits for the device
            return model(z, t, y)
        with_class, without = model(torch.cat((z, z)), torch.cat((t, t)), torch.cat((y, none))).chunk(2)
        guided = without + scale * (with_class - without)
        return torch.where(inside.view(-1, *[1] * (z.ndim - 1)), guided, with_class)

    return velocity


def autoguidance(model: Velocity, weak: Velocity, scale: float) -> Velocity:
    """The velocity v_weak + scale (v - v_weak); weak: a smaller or less trained model of the same task.

    Karras et al. 2024 (arXiv:2406.02507). scale 1 is `model` itself, and `weak` is not called.
    """
    if scale == 1:
        return model

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        worse = weak(z, t)
        return worse + scale * (model(z, t) - worse)

    return velocity


def _at(velocity: Velocity, z: Tensor, t: float) -> Tensor:
    return velocity(z, torch.full((len(z),), t, dtype=z.dtype, device=z.device)).to(z.dtype)


def _checked(name: str, z: Tensor, ts: Tensor) -> tuple[Tensor, list[float]]:
    """z of at least fp32, and the times as numbers: steps are taken in the precision of ts, not of z."""
    if z.ndim < 1 or not z.is_floating_point():
        raise ValueError(f"{name}: z: expected floating-point [N, ...], got {z.dtype} {list(z.shape)}")
    times = ts.tolist() if ts.ndim == 1 else []
    if len(times) < 2 or not all(1 >= t > s >= 0 for t, s in pairwise(times)):
        raise ValueError(f"{name}: ts: expected two or more times, strictly falling within [0, 1], got {times or ts}")
    return z.to(torch.promote_types(z.dtype, torch.float32)), times
