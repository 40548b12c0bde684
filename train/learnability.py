"""How well a flow model learns an autoencoder's latents, before a cluster is spent: `train.evaluate learnability`.

A fixed small transformer is trained for a fixed number of images, with the law and the shifts for the latent's width,
over a few seeds. What it reaches, on held-out pictures and in samples, is compared between autoencoders.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2.checkpoints import load_autoencoder
from flux2.distances import Moments
from flux2.features import Features, build_features
from flux2.schedules import auto_shifts
from flux2.tensor_files import load_json, save_json
from flux2.transformer import TRANSFORMERS, TransformerConfig
from train.cache import hash_of_pictures
from train.cell import Judging, key_of, train_cell
from train.cell_data import Crops, load_latents, make_latents, reference_moments
from train.configs import differences, parse, to_dict
from train.figures import panels
from train.flow_config import FlowConfig, FlowOptions
from train.loop import Interrupted, choose_device, choose_precision, environment

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What the probe does; results of two configs are never put side by side."""

    preset: str
    """Row of the preset table the rest starts from."""
    seeds: int = 3
    """Models an autoencoder."""
    crops: Crops = field(default_factory=Crops)
    """Pictures that models are trained and judged on."""
    flow: FlowConfig
    """How each model is trained; its shift is the one for the latent's width."""
    every: int
    """Images between judgements; the end is always judged."""
    samples: int
    """Samples a Frechet distance, at the sampling shift for the latent's width."""
    sample_steps: int = 25
    """Euler steps a sample."""
    held_out: int = 256
    """Held-out crops the velocity loss is measured on."""
    reference_crops: int = 1024
    """Crops that samples are measured against, of training pictures, that training does not draw."""
    features: str = "hog"
    """Features of the Frechet distance: hog (no weights), inception (FID), dinov2-b, ..."""
    feature_weights: str = ""
    """File of their weights."""

    def __post_init__(self) -> None:
        for name in ("seeds", "every", "samples", "held_out", "reference_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Where and how the probe happens."""

    autoencoder: tuple[str, ...] = ()
    """Runs of train.vae, .safetensors files or diffusers folders; or NAME=PATH."""
    comparison: str = ""
    """Folder of train.compare: its autoencoders, where none are given, and the rank correlation with its results."""
    out: Path = Path("learnability")
    """Folder of learnability.json and .png, and of the models; the same command goes on in it."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""
    compile: bool = False
    """Compile the flow models."""


_SMALL = TransformerConfig(width=128, depth=4, heads=2, repa_depth=2, time_scale=1000.0)
PROBE_PRESETS: dict[str, ProbeConfig] = {
    "toy": ProbeConfig(
        preset="toy",
        flow=FlowConfig(
            preset="learnability", transformer=_SMALL, batch=32, steps=180, lr=2e-3, warmup=9, final_lr=0.02,
            betas=(0.9, 0.99), ema_decays=(0.98,), label_dropout=1.0,
        ),
        every=90 * 32, samples=192, sample_steps=12, held_out=192,
    ),
    "probe": ProbeConfig(
        preset="probe",
        crops=Crops(resolution=256, cached_crops=0),
        flow=FlowConfig(
            preset="learnability", transformer=TRANSFORMERS["sit-s"], batch=256, steps=8000, lr=4e-4, warmup=400,
            final_lr=0.02, ema_decays=(0.999,), label_dropout=1.0, resolution=256,
        ),
        every=2000 * 256, samples=10_000, held_out=2048, reference_crops=10_000,
    ),
}  # fmt: skip

_DESCRIPTION = """How well a flow model learns an autoencoder's latents.

  python -m train.evaluate learnability --autoencoder runs/mine runs/other          2 CPU cores, bundled photographs
  python -m train.evaluate learnability --preset probe --crops.data PICTURES --autoencoder runs/mine sd=ae.safetensors
  python -m train.evaluate learnability --comparison runs/compare-toy               and its rank correlation with it

Presets: toy, probe (SiT-S at 256 pixels, for a GPU). Lower is better in both measures; differences within the
intervals are none. The same command goes on where it was stopped.
"""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % confidence interval by Student's t); NaN for the width of one value."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(x.mean()), math.nan
    from scipy.stats import t

    return float(x.mean()), float(t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


def rank_correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Spearman's, over the names that both have; NaN for fewer than three, or where one has no order."""
    names = [n for n in a if n in b]
    if len(names) < 3:
        return math.nan
    from scipy.stats import spearmanr

    x, y = ([values[n] for n in names] for values in (a, b))
    if len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    found: Any = spearmanr(x, y)  # has no types
    return float(found.statistic)


def named_paths(options: ProbeOptions) -> dict[str, str]:
    """Path by name. ValueError for a name given twice, or none at all."""
    given = list(options.autoencoder)
    if not given and options.comparison:
        given = comparison_paths(Path(options.comparison))
    if not given:
        raise ValueError("learnability: expected --autoencoder PATH ..., or --comparison FOLDER; got neither")
    found: dict[str, str] = {}
    for entry in given:
        name, sign, path = entry.partition("=")
        if not sign:
            path = entry
            name = Path(path).name.removesuffix(".safetensors")
        if not name or Path(name).name != name:
            raise ValueError(f"autoencoder: expected PATH or NAME=PATH, got {entry!r}")
        if name in found:
            raise ValueError(f"autoencoder: {name!r} is given twice ({found[name]}, {path}); use NAME=PATH")
        found[name] = path
    return found


def comparison_paths(folder: Path) -> list[str]:
    """NAME=PATH of a comparison's autoencoders. ValueError if there are none."""
    config = load_json(folder / "comparison.json")["config"] if (folder / "comparison.json").is_file() else {}
    own = dict(entry.split("=", 1) for entry in config.get("weights", []))
    names = config.get("autoencoders", [])
    paths = {n: Path(own.get(n, folder / "autoencoders" / n)) for n in names}
    if not (found := [f"{n}={p}" for n, p in paths.items() if p.exists()]):
        raise ValueError(f"{folder}: expected the folder of a comparison with trained autoencoders, got none")
    return found


def probe_autoencoder(
    config: ProbeConfig,
    name: str,
    path: str,
    out: Path,
    *,
    features: Features,
    reference: Moments,
    device: torch.device,
    compile: bool = False,
) -> dict[str, Any]:
    """Trains the models of one autoencoder, or goes on: channels, shifts, `seeds`: checkpoints by seed as `train_cell`.

    Interrupted by a signal, with all saved.
    """
    make_latents(path, out / "latents" / name, config.crops, held_out=config.held_out, device=device)
    latents = load_latents(path, out / "latents" / name, reference, device)
    train_shift, sample_shift = auto_shifts(latents.channels)
    judging = Judging(
        every=max(1, round(config.every / config.flow.batch)), sampling_shifts=(sample_shift,), samples=config.samples,
        sample_steps=config.sample_steps,
    )  # fmt: skip
    found = []
    for seed in range(config.seeds):
        flow = dataclasses.replace(
            config.flow, seed=seed, shift=train_shift, precision=choose_precision(config.flow.precision, device),
            data=config.crops.data, held_out=config.crops.held_out, resolution=config.crops.resolution,
        )  # fmt: skip
        print(f"{name}, seed {seed}", flush=True)
        checkpoints = train_cell(
            flow, latents, judging, features, folder=out / "models" / f"{name}-{seed}", device=device,
            options=FlowOptions(compile=compile, device=str(device)),
        )  # fmt: skip
        key = key_of(sample_shift)
        found.append([{**{k: c[k] for k in ("nimg", "velocity", "bins")}, "fd": c["fd"][key]} for c in checkpoints])
    return {
        "channels": latents.channels, "train_shift": train_shift, "sampling_shift": sample_shift, "seeds": found,
        "points": summary(found),
    }  # fmt: skip


def summary(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each checkpoint: images, and mean and half width of the interval of velocity loss and FD over the seeds."""
    points = []
    for there in zip(*seeds, strict=True):
        point: dict[str, Any] = {"nimg": there[0]["nimg"]}
        for measure in ("velocity", "fd"):
            mean, half = interval([c[measure] for c in there])
            point[measure] = {"mean": mean, "half_width": None if math.isnan(half) else half}
        point["bins"] = np.mean([c["bins"] for c in there], axis=0).tolist()
        points.append(point)
    return points


def shown(measure: Mapping[str, float | None], digits: int = 4) -> str:
    """Mean and interval as text."""
    half = measure["half_width"]
    return f"{measure['mean']:.{digits}f}" + ("" if half is None else f" +- {half:.{digits}f}")


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, a row an autoencoder, the best velocity loss first)."""
    header = ["autoencoder", "channels", "train / sampling shift", "velocity loss", result["features"]["label"]]
    rows, found = [], result["autoencoders"]
    for name in sorted(found, key=lambda n: found[n]["points"][-1]["velocity"]["mean"]):
        entry, last = found[name], found[name]["points"][-1]
        shifts = f"{entry['train_shift']:.2f} / {entry['sampling_shift']:.2f}"
        rows.append([name, str(entry["channels"]), shifts, shown(last["velocity"]), shown(last["fd"], 3)])
    return header, rows


def protocol(result: Mapping[str, Any]) -> str:
    """What was done, in one sentence."""
    config = result["config"]
    flow = config["flow"]
    return (
        f"{flow['steps'] * flow['batch']:,} images, {flow['law']}, {config['seeds']} seeds, 95 % intervals;"
        f" {config['samples']} samples of {config['sample_steps']} steps against {config['reference_crops']} crops;"
        f" features {result['features']['identity']}"
    )


def correlation_words(result: Mapping[str, Any]) -> str:
    """The rank correlation with a comparison, in one sentence; "" without one."""
    if not (of := result.get("comparison")):
        return ""
    said = ", ".join(
        f"{words} {'none' if of[m] is None else format(of[m], '.2f')}"
        for m, words in (("velocity", "velocity loss"), ("fd", result["features"]["label"]))
    )
    return f"rank correlation with the comparison's best FD over {of['autoencoders']} autoencoders: {said}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Both measures against images trained on, with their intervals; PNG."""
    titles = {
        "velocity": "normalised velocity loss, held-out pictures",
        "fd": f"{result['features']['label']} of samples",
    }
    figure, (axes,) = panels(1, 2, (10, 3.6))
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for name, entry in result["autoencoders"].items():
            x = [p["nimg"] for p in entry["points"]]
            mean = np.array([p[measure]["mean"] for p in entry["points"]])
            half = np.array([p[measure]["half_width"] or 0.0 for p in entry["points"]])
            (line,) = axis.plot(x, mean, "o-", ms=3, label=f"{name}, {entry['channels']} channels")
            axis.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.2, lw=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("images")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def correlations(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Spearman's rank correlation of both measures with the best FD of each autoencoder in a comparison's folder."""
    file = folder / "summary.json"
    if not file.is_file():
        raise ValueError(f"{folder}: expected a comparison with results (summary.json), got none")
    best = {n: b["best"]["fd"] for n, b in load_json(file)["best"].items() if b.get("best")}
    last = {n: e["points"][-1] for n, e in result["autoencoders"].items()}
    own = {m: {n: p[m]["mean"] for n, p in last.items()} for m in ("velocity", "fd")}
    found = {m: rank_correlation(values, best) for m, values in own.items()}
    count = len(set(best) & set(last))
    return {"autoencoders": count, **{m: None if math.isnan(v) else v for m, v in found.items()}}


def behind_config(config: ProbeConfig, features: Features, device: torch.device) -> dict[str, Any]:
    """What figures depend on and a config only names: features, pictures, precision. They too must be the same in all
    rows of a table."""
    training, held_out = (hash_of_pictures(p) for p in config.crops.pictures())
    return {
        "features": {"name": features.name, "label": features.label, "identity": features.identity},
        "pictures": {"training": training, "held_out": held_out},
        "precision": choose_precision(config.flow.precision, device),
    }


def learnability(config: ProbeConfig, options: ProbeOptions) -> int:
    """Runs the probe; the exit code."""
    device = choose_device(options.device)
    paths = named_paths(options)
    for path in paths.values():
        load_autoencoder(path)  # an error before anything is trained
    features = build_features(config.features, config.feature_weights, device)
    file = options.out / "learnability.json"
    before = load_json(file) if file.is_file() else None
    if before and (changed := differences(before["config"], to_dict(config))):
        raise ValueError(f"{options.out} was made with another config; " + "; ".join(changed))
    made_with = behind_config(config, features, device)
    known = before or {}
    there = [k for k in made_with if k in known]  # results of older versions have the features only
    if changed := differences({k: known[k] for k in there}, {k: made_with[k] for k in there}):
        raise ValueError(f"{options.out} was made with other things of the same names; " + "; ".join(changed))
    machine = environment(device)
    machine.pop("command", None)  # may name folders of the machine
    result: dict[str, Any] = {
        "config": to_dict(config),
        **made_with,
        "environment": machine,
        "autoencoders": dict(before["autoencoders"]) if before else {},
    }
    reference = reference_moments(config.crops, features, config.reference_crops, device)
    try:
        for name, path in paths.items():
            result["autoencoders"][name] = probe_autoencoder(
                config, name, path, options.out, features=features, reference=reference, device=device,
                compile=options.compile,
            )  # fmt: skip
            save_json(file, result)
    except Interrupted as interrupted:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + interrupted.signal
    plot(result, options.out / "learnability.png")
    if options.comparison:
        result["comparison"] = correlations(result, Path(options.comparison))
        save_json(file, result)
    header, rows = table(result)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print("\n".join(filter(None, (protocol(result), correlation_words(result)))))
    print(f"{file}\n{options.out / 'learnability.png'}")
    return 0


def main(argv: list[str]) -> int:
    """`python -m train.evaluate learnability`."""
    config, options = parse(
        argv, PROBE_PRESETS, options=ProbeOptions(), default="toy",  # type: ignore[type-var]
        prog="python -m train.evaluate learnability", description=_DESCRIPTION,
    )  # fmt: skip
    return learnability(config, options)
