"""Results of evaluations: figures by what they may be called, and the protocol that says what they compare with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flux2.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from flux2.features import Features
from flux2.tensor_files import load_json, save_json
from train.loop import environment
from train.references import Collected, Reference, default_cache, note

FORMAT, VERSION = "flux2-tokenizer evaluation", 1
NEIGHBOUR = 3  # k of precision and recall
SPLITS = 10  # of the inception score
COMPARED = ("task", "count", "crop", "features", "reference")  # of a protocol: figures compare where these are equal
PHOTOGRAPHS = "photographs"
UNITS = {"PSNR": " dB"}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How the kernel distance is taken."""

    subsets: int = 100
    """Random subsets of both sets."""
    subset_size: int = 1000
    """Pictures in each; fewer where a set has fewer."""

    def __post_init__(self) -> None:
        if self.subsets < 1 or self.subset_size < 2:
            got = f"{self.subsets} and {self.subset_size}"
            raise ValueError(f"kernel distance: expected at least 1 subset of 2, got {got}")

    def __str__(self) -> str:
        return f"kernel distance over {self.subsets} subsets of up to {self.subset_size}"


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What both evaluations of pictures share."""

    resolution: int = 0
    """Side of ADM's centre crop of pictures from a folder. 0: reconstruct takes 256 (of photographs 64); generate takes
    samples as they are, and crops the reference to their side."""
    features: str = "hog"
    """What sets of pictures are compared by: hog (no weights), inception (FID), or a ViT such as dinov2-l."""
    feature_weights: str = ""
    """File of their weights; by default from their library's cache or hub."""
    kernel: Kernel = field(default_factory=Kernel)
    """How the kernel distance (KID) is taken."""
    cache: Path = field(default_factory=default_cache)
    """Folder where statistics of reference pictures are kept."""
    out: Path = Path("evaluation")
    """Folder for evaluation.json and pictures."""
    seed: int = 0
    """Decides subsets, and what is drawn."""
    batch: int = 32
    """Pictures computed at once."""
    workers: int = 0
    """Processes that read pictures ahead."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("resolution", 0), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")


Figures = dict[str, tuple[float, float | None]]  # name -> (value, its standard error or deviation, or None)


def distances(
    found: Collected, reference: Reference, features: Features, device: torch.device, *,
    prefix: str, metrics: Sequence[str], kernel: Kernel, seed: int = 0,
) -> Figures:  # fmt: skip
    """Distances of a set to its reference, by what they are called: `metrics` of fd, sfd, kd, is, pr.

    Those that the features or the reference cannot give are left out, with a line that says why. prefix: r for
    reconstructions, g for samples. Only a distance on the published Inception is called FID.
    """
    assert found.pool
    published, figures = features.label == "FID", Figures()
    suffix = "" if published else f"-{features.label.removeprefix('FD-')}"
    if "fd" in metrics:
        if (fewest := min(found.count, reference.count or found.count)) <= features.channels:
            note(
                f"{fewest} pictures for {features.channels} numbers of {features.name}: {prefix}{features.label} says"
                " little, and compares with nothing but the same number of them"
            )
        figures[prefix + features.label] = (frechet_distance(found.pool, reference.pool), None)
    if "sfd" in metrics and found.spatial and reference.spatial:
        figures["sFID" if published else f"sFD{suffix}"] = (frechet_distance(found.spatial, reference.spatial), None)
    elif "sfd" in metrics and found.spatial:
        note(f"no spatial distance: {reference.name} has neither mu_s and sigma_s nor pictures")
    place = device if device.type == "cuda" else torch.device("cpu")  # both take fp64, which not every device has
    rows, others = found.rows().to(place), reference.rows.to(place)

    def enough(metric: str, least: int) -> bool:
        if metric in metrics and min(len(rows), len(others)) < least:
            note(f"no {metric}: expected at least {least} pictures of each set, got {len(rows)} and {len(others)}")
            return False
        return metric in metrics

    if enough("kd", 2):
        size = min(kernel.subset_size, len(rows), len(others))
        subsets = 1 if size == len(rows) == len(others) else kernel.subsets  # whole sets have one
        mean, std = kernel_distance(others, rows, subsets=subsets, subset_size=size, seed=seed)
        figures["KID" if published else f"KD{suffix}"] = (mean, std if subsets > 1 else None)
    if enough("pr", NEIGHBOUR + 1):
        precision, recall = precision_recall(others, rows, k=NEIGHBOUR)
        figures |= {f"precision{suffix}": (precision, None), f"recall{suffix}": (recall, None)}
    logits = found.logits()
    if "is" in metrics and logits is not None:
        figures[f"IS{suffix}"] = inception_score(logits, min(SPLITS, len(logits)), seed)
    return figures


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What decides whether two results compare."""

    task: str
    """reconstruct or generate."""
    count: int
    """Pictures judged."""
    crop: str
    """Of the reference pictures, in words."""
    features: str
    """Their identity: name and hash of weights."""
    reference: str
    """SHA-256 of the reference pictures and their crop."""
    reference_count: int
    """Reference pictures; 0 where only their statistics are known."""
    notes: str
    """What else there is to know, in words; not compared."""

    def __str__(self) -> str:
        known = f"{self.reference_count} pictures" if self.reference_count else "statistics as stored"
        return (
            f"{self.count} pictures, 8-bit values; reference {self.reference[:12]} ({known}, {self.crop}); features"
            f" {self.features}; {self.notes}"
        )


def result_of(name: str, protocol: Protocol, figures: Figures, **about: Any) -> dict[str, Any]:
    """A result as it is written: figures and their spreads by name, and the protocol."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "protocol": {k: getattr(protocol, k) for k in protocol.__dataclass_fields__},
        "figures": {k: v for k, (v, _) in figures.items()},
        "spread": {k: s for k, (_, s) in figures.items() if s is not None},
        **about,
    }


def load_result(path: str | Path) -> dict[str, Any]:
    """A result's file, or the one in a folder. FileNotFoundError or ValueError, in one sentence, if it is none."""
    path = Path(path)
    path = path / "evaluation.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such result; train.evaluate reconstruct and generate write evaluation.json"
        )
    result = load_json(path)
    sound = all(isinstance(result.get(k), dict) for k in ("protocol", "figures", "spread"))
    if result.get("format") != FORMAT or result.get("version") != VERSION or not sound:
        raise ValueError(f"{path}: expected a result of train.evaluate, version {VERSION}, got something else")
    return {**result, "path": str(path)}


def compatible(a: dict[str, Any], b: dict[str, Any]) -> None:
    """ValueError, naming both, unless two results were taken the same way: task, number, crop, features, reference."""
    names = [r.get("path", r["name"]) for r in (a, b)]
    differing = []
    for key in COMPARED:
        x, y = (r["protocol"].get(key) for r in (a, b))
        if x != y:
            shown = (v[:12] if key == "reference" and isinstance(v, str) else v for v in (x, y))
            differing.append(f"{key} {' and '.join(json.dumps(v) for v in shown)}")
    if differing:
        raise ValueError(f"{names[0]} and {names[1]} do not compare: {'; '.join(differing)}")


def comparison_table(results: Sequence[dict[str, Any]]) -> str:
    """Results side by side, a row each, columns padded. ValueError where two do not compare."""
    for other in results[1:]:
        compatible(results[0], other)
    columns = list(dict.fromkeys(name for r in results for name in r["figures"]))
    rows = [["", *columns]]
    rows += [[r["name"], *(figure_text(r["figures"].get(c), r["spread"].get(c)) for c in columns)] for r in results]
    return padded(rows)


def figure_text(value: float | None, spread: float | None = None) -> str:
    """Four digits, with the spread where there is one; - where there is no figure."""
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" ±{spread:.2g}" if spread is not None else "")


def padded(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table: first column to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def finish(
    config: CommonConfig, task: str, name: str, found: Collected, reference: Reference,
    features: Features, figures: Figures, notes: str, shown: str, device: torch.device,
) -> int:  # fmt: skip
    """Prints the table and the protocol, writes OUT/evaluation.json."""
    notes += f"; {config.kernel}" * any(key.startswith(("KID", "KD")) for key in figures)
    protocol = Protocol(
        task=task, count=found.count, crop=reference.crop, features=features.identity, reference=reference.digest,
        reference_count=reference.count, notes=notes,
    )  # fmt: skip
    result = result_of(name, protocol, figures, environment=environment(device))
    rows = [[f"  {key}", figure_text(v, s) + UNITS.get(key, "")] for key, (v, s) in figures.items()]
    print(f"{name}\n{padded(rows)}\nprotocol: {protocol}")
    save_json(config.out / "evaluation.json", result)
    print(f"{config.out / 'evaluation.json'}\n{config.out / shown}")
    return 0
