"""EQ-VAE's regularisation: the decoder must turn a scaled or rotated latent into the scaled or rotated picture.

Kouzelis et al. 2025, arXiv:2502.09509. A latent that transforms as its picture does is simpler for a flow model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Scaling of both sides by `scale`, after `turns` quarter turns counter-clockwise."""

    scale: float = 1.0
    turns: int = 0

    def __call__(self, x: Tensor, side: tuple[int, int]) -> Tensor:
        """[N, C, h, w] (latents or pixels) -> [N, C, *side]; bilinear, low-passed where it shrinks.

        side: what `sides` gave, times what one latent position covers for pixels. Differentiable.
        """
        x = x.rot90(self.turns, (2, 3)) if self.turns else x
        return x if tuple(x.shape[2:]) == side else F.interpolate(x, size=side, mode="bilinear", antialias=True)

    def sides(self, h: int, w: int) -> tuple[int, int]:
        """Sides of a transformed latent of sides h, w."""
        h, w = (w, h) if self.turns % 2 else (h, w)
        return max(1, round(h * self.scale)), max(1, round(w * self.scale))


def draw(u: Sequence[float], *, probability: float, scales: Sequence[float]) -> Transform | None:
    """A transform from two uniforms in (0, 1), or None with probability 1 - `probability`.

    scales: those it can take, all alike; each is a size of its own to torch.compile. Turns are 0 to 3, and never
    scale 1 with no turn: that is the plain autoencoder, which the remaining probability stands for.
    """
    if u[0] >= probability:
        return None
    choices = [Transform(scale=s, turns=k) for s in scales for k in range(4) if (s, k) != (1.0, 0)]
    return choices[min(int(u[1] * len(choices)), len(choices) - 1)]
