"""What changes over a run by a plan: the learning rate, and the weights of losses."""

from __future__ import annotations

import math


def cosine_lr(step: int, *, steps: int, warmup: int, final: float) -> float:
    """Multiple of the peak learning rate at `step`: linear from 1/warmup to 1, then half a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class WeightSchedule:
    """Factor on one loss's weight over a run, linear between points. Text: `align=0:1,0.5:1,1:0`.

    That is the term's name, then points `share of the run:factor`, ascending; before the first and after the last the
    factor stays. ValueError, naming the text, if it reads otherwise.
    """

    def __init__(self, text: str) -> None:
        self.term, _, points = text.partition("=")
        try:
            self.points = [(float(a), float(b)) for a, b in (p.split(":") for p in points.split(","))]
        except ValueError:
            self.points = []
        shares = [share for share, _ in self.points]
        if not self.points or shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
            raise ValueError(f"schedule: expected TERM=SHARE:FACTOR,... with shares ascending in [0, 1], got {text!r}")
        if any(factor < 0 or not math.isfinite(factor) for _, factor in self.points):
            raise ValueError(f"schedule: expected factors of 0 or more, got {text!r}")

    def __call__(self, step: int, steps: int) -> float:
        """Factor at `step` of `steps`."""
        share = step / max(1, steps)
        before = [p for p in self.points if p[0] <= share]
        after = [p for p in self.points if p[0] > share]
        if not before or not after:
            return (before or after)[-1 if before else 0][1]
        (a, x), (b, y) = before[-1], after[0]
        return x + (y - x) * (share - a) / (b - a)
