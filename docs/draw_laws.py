"""Redraws docs/timestep_laws.png: density and samples of the timestep laws at the shifts of narrow and wide latents.

python docs/draw_laws.py
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from flux2.schedules import LogitNormal, PlateauLogitNormal, UniformLaw  # noqa: E402 - after the path

SHIFTS = {1.0: "16 channels a token", 1.78: "64", 4.63: "128", 6.93: "768"}
LAWS = {"uniform": UniformLaw, "logit-normal": LogitNormal, "plateau logit-normal": PlateauLogitNormal}
SAMPLES = 200_000


def draw(path: Path) -> None:
    """A panel a shift: lines are densities, steps are histograms of what `law.sample` draws."""
    figure, axes = plt.subplots(1, len(SHIFTS), figsize=(15, 3.4), constrained_layout=True)
    t = torch.linspace(1e-4, 1 - 1e-4, 2000, dtype=torch.float64)
    for axis, (shift, width) in zip(axes, SHIFTS.items(), strict=True):
        for colour, (name, law_type) in zip(("0.5", "tab:blue", "tab:red"), LAWS.items(), strict=True):
            law = law_type(shift=shift)
            axis.hist(law.sample(SAMPLES).numpy(), bins=100, range=(0, 1), density=True, histtype="stepfilled",
                      color=colour, alpha=0.25)  # fmt: skip
            axis.plot(t, law.log_prob(t).exp(), color=colour, lw=1.5, label=f"{name}, mean {law.mean:.2f}")
        axis.set_title(f"shift {shift:g} ({width})")
        axis.set_xlabel("t (0 data, 1 noise)")
        axis.set_ylim(0, 1.4 * LogitNormal(shift=shift).log_prob(t).exp().max().item())
        axis.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the uniform law says that it is the baseline
    draw(ROOT / "docs" / "timestep_laws.png")
