"""Pictures and the page a run of train.flow ends with: loss curves, velocity loss by time bin, samples, report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux2.checkpoints import save_json
from flux2.schedules import Law, LogitNormal, PlateauLogitNormal, UniformLaw
from train.figures import panels
from train.flow_config import FlowConfig
from train.flow_trainer import BINS, FlowTrainer, validate
from train.loop import read_log
from train.page import page, picture, table

NAMES = {"fresh": "fresh crops of training pictures", "held_out": "held-out pictures"}


def make_law(config: FlowConfig, shift: float) -> Law:
    """The law that `config` draws timesteps from."""
    if config.law == "uniform":
        return UniformLaw(shift=shift)
    kind = {"logit_normal": LogitNormal, "plateau_logit_normal": PlateauLogitNormal}[config.law]
    return kind(shift=shift, mu=config.mu, sigma=config.sigma)


def plot_losses(records: list[dict[str, Any]], path: Path) -> None:
    """Each training term and the two validation losses against images, PNG."""
    steps, validated = [r for r in records if "loss" in r], [r for r in records if "fresh_velocity" in r]
    names = [n for n in ("velocity", "repa", "grad_norm") if any(n in r for r in steps)]
    figure, (axes,) = panels(1, 1 + len(names), (4 * (1 + len(names)), 3.2))
    for key, label in NAMES.items():
        axes[0].plot([r["nimg"] for r in validated], [r[f"{key}_velocity"] for r in validated], "o-", ms=3, label=label)
    axes[0].set_title("normalised velocity loss (EMA)")
    axes[0].legend(fontsize=8)
    for axis, name in zip(axes[1:], names, strict=True):
        having = [r for r in steps if name in r]
        axis.plot([r["nimg"] for r in having], [r[name] for r in having], lw=1)
        axis.set_title(name)
    for axis in axes:
        axis.set_xlabel("images")
    figure.savefig(path, dpi=100)


def plot_bins(records: list[dict[str, Any]], law: Law, path: Path) -> None:
    """Velocity losses by time bin, now and at the start, and the density that training draws times from; PNG."""
    from matplotlib import colormaps

    validated = [r for r in records if "fresh_bins" in r]
    centres = (np.arange(BINS) + 0.5) / BINS
    figure, ((left, middle, right),) = panels(1, 3, (14, 3.4))
    for key, label in NAMES.items():
        (line,) = left.plot(centres, validated[-1][f"{key}_bins"], "o-", ms=3, label=label)
        left.plot(centres, validated[0][f"{key}_bins"], "--", lw=0.8, c=line.get_color())
    left.set_title("normalised velocity loss (dashed: at the start)")
    left.legend(fontsize=8)
    trained = [r for r in validated if not all(v != v for v in r["training_bins"])]
    for i, record in enumerate(trained):
        part = (i + 1) / len(trained)
        middle.plot(centres, record["training_bins"], lw=1, c=colormaps["viridis"](1 - part), label=record["step"])
    middle.set_title("mean squared velocity error in training, by step")
    middle.legend(fontsize=7)
    t = torch.linspace(1e-4, 1 - 1e-4, 1000, dtype=torch.float64)
    right.fill_between(t.numpy(), law.log_prob(t).exp().numpy(), alpha=0.4)  # type: ignore[attr-defined]
    right.set_title(f"density of t: {law.name}, shift {law.shift:.3g}", fontsize=10)
    for axis in (left, middle, right):
        axis.set_xlabel("t (0 data, 1 noise)")
    figure.savefig(path, dpi=100)


def judge(trainer: FlowTrainer, validation: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Normalised velocity loss by average and set, in all and by time bin; validation: latents and labels by set."""
    results: dict[str, Any] = {}
    for decay, ema in trainer.emas.items():
        losses = {k: validate(ema.model, x, y, precision=trainer.config.precision) for k, (x, y) in validation.items()}
        results[str(decay)] = {k: {"mean": v.mean(), "bins": v.per_bin().tolist()} for k, v in losses.items()}
    return results


def write_flow_report(
    folder: Path,
    *,
    config: str,
    trainer: FlowTrainer,
    results: dict[str, Any],
    classes: list[str],
    sampled: str,
) -> dict[str, float]:
    """Writes plots, folder/results.json and folder/report.html; returns the validation losses of the first average.

    results: what `judge` returned. sampled: how samples/samples.png, which is there, was drawn, beside
    samples/training_crops.png.
    """
    samples = folder / "samples"
    records = read_log(folder / "log.jsonl")
    last = next((r for r in reversed(records) if "loss" in r), {})
    save_json(folder / "results.json", {"normalised_velocity_loss": results, "last": last})
    plot_losses(records, samples / "losses.png")
    plot_bins(records, make_law(trainer.config, trainer.shift), samples / "time_bins.png")
    rows = [[f"{decay}", *(f"{result[k]['mean']:.4f}" for k in NAMES)] for decay, result in results.items()]
    first = results[str(trainer.config.ema_decays[0])]
    by_bin = [
        [f"{b / BINS:.1f} to {(b + 1) / BINS:.1f}", *(f"{first[k]['bins'][b]:.4f}" for k in NAMES)] for b in range(BINS)
    ]
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    body = f"""<h2>Samples</h2>
<p>A class a row: {shown}. {sampled}</p>
{picture(samples / "samples.png", "samples of the averaged weights", "49%")}
{picture(samples / "training_crops.png", "crops that training could have drawn, the same classes", "49%")}
<h2>Normalised velocity loss</h2>
<p>The share of the velocity's variance that the model leaves unexplained: 0 is perfect, 1 no better than the mean.
Means over {BINS} equal bins of t, whatever law training draws t from; the same times and noise for every model.
Held-out pictures have no class where training has not theirs; what the first set has over the second is learnt by
heart.</p>
{table(["EMA decay", *NAMES.values()], rows)}
{picture(samples / "time_bins.png", "velocity loss by time bin, and where training draws its times")}
{table(["t", *NAMES.values()], by_bin)}
<h2>Training</h2>
{picture(samples / "losses.png", "validation losses and each training term by name against images seen")}"""
    (folder / "report.html").write_text(page(folder.name, body, config))
    return {k: first[k]["mean"] for k in NAMES}
