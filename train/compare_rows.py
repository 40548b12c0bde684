"""What the files of a comparison hold, as plain rows, and what the article published beside it.

A *model* is one network that was trained: autoencoder, law, train shift, REPA, seed. A *row* is a model at one
checkpoint, sampled with one shift.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flux2.tensor_files import load_json

ORDER = ("sd", "flux.1", "flux.2", "flux.2-nosem", "rae")
LAWS = {"uniform": "uniform", "logit_normal": "logit-normal", "plateau_logit_normal": "plateau"}  # as they are shown
NO_REPA = "none"

SOURCE = "bfl.ai/research/representation-comparison"
# The article: ImageNet 256, DiT-XL, gFID of 50k samples, 50 Euler steps, random classes, no guidance. Its state of
# training and of REPA for the gFID is not stated. psim: its column "LPIPS", on CompVis's PSIM scale.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd": {
        "gfid": 7.7271, "law": "logit-normal or plateau", "train_shift": 1.00, "sampling_shift": 2.95,
        "psnr": 25.0520, "ssim": 0.6976, "rfid": 0.6451, "psim": 0.9519, "channels": 16,
        "sensitivity": {"law": 19.8, "train_shift": 75.7, "sampling_shift": 4.5},
    },
    "flux.1": {
        "gfid": 10.1279, "law": "logit-normal or plateau", "train_shift": 1.78, "sampling_shift": None,
        "psnr": 31.1312, "ssim": 0.8893, "rfid": 0.1761, "psim": 0.3380, "channels": 64,
        "sensitivity": {"law": 36.76, "train_shift": 86.42, "sampling_shift": 6.8},
    },
    "flux.2": {
        "gfid": 3.7017, "law": "logit-normal", "train_shift": 4.63, "sampling_shift": 6.93,
        "psnr": 31.4632, "ssim": 0.9038, "rfid": 0.1124, "psim": 0.2668, "channels": 128,
        "sensitivity": {"law": 32.2, "train_shift": 73.3, "sampling_shift": 31.4},
    },
    "rae": {
        "gfid": 3.1040, "law": "plateau", "train_shift": 6.93, "sampling_shift": 6.93,
        "psnr": 18.8272, "ssim": 0.4962, "rfid": 0.6107, "psim": 1.6737, "channels": 768,
        "sensitivity": {"law": 6.8, "train_shift": 61.5, "sampling_shift": 38.7},
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model at one checkpoint, sampled with one shift; `velocity` does not depend on the sampling shift."""

    autoencoder: str
    channels: int
    """A token's; 0: not known."""
    law: str
    train_shift: float
    repa: str
    """A teacher, or `none`."""
    seed: int
    nimg: int
    """Images trained on."""
    sampling_shift: float
    fd: float
    velocity: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The files of a comparison's folder, read."""

    header: dict[str, Any]
    """comparison.json"""
    autoencoders: dict[str, dict[str, Any]]
    """autoencoders/NAME.json by name, in the order that they are shown in."""
    rows: list[Row]
    done: int
    """Models with a result."""
    failures: dict[str, str]
    """Error by cell."""
    planned: int
    """Models that the config asks for; 0 where it does not say."""
    not_finite: int
    """Rows left out because their FD or velocity loss is not a finite number."""


def in_order(names: Iterable[str]) -> list[str]:
    """Autoencoders' names, each once, in the order that every table and figure keeps: `ORDER`, then the rest."""
    return sorted(set(names), key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))


def cell_id(autoencoder: str, law: str, train_shift: float, repa: str, seed: int) -> str:
    """The name of a model's files."""
    return f"{autoencoder}-{law}-{train_shift:.2f}-{repa}-{seed}".replace("/", "_")


def read_comparison(folder: Path) -> Comparison:
    """The files of a comparison, finished or not. A result that cannot be read counts as a failure.

    ValueError if `folder` holds no comparison.json, or one that is no JSON object.
    """
    path = folder / "comparison.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected the folder of a comparison, with comparison.json; got none")
    header = load_json(path)
    found = {p.stem: load_json(p) for p in sorted((folder / "autoencoders").glob("*.json"))}
    found = {info.get("name", stem): info for stem, info in found.items()}
    rows: list[Row] = []
    failures, done, not_finite = {}, 0, 0
    for path in sorted((folder / "results").glob("*.json")):
        try:
            result = load_json(path)
            if result["status"] != "done":
                failures[path.stem] = str(result.get("error", "no reason given"))
                continue
            there = _rows(result, found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            failures[path.stem] = f"its result cannot be read: {type(error).__name__}: {error}"
            continue
        done += 1
        kept = [row for row in there if math.isfinite(row.fd) and math.isfinite(row.velocity)]
        not_finite += len(there) - len(kept)
        rows += kept
    names = in_order([*found, *(row.autoencoder for row in rows)])
    return Comparison(
        header=header,
        autoencoders={name: found.get(name, {"name": name}) for name in names},
        rows=rows,
        done=done,
        failures=failures,
        planned=planned_models(header.get("config", {})),
        not_finite=not_finite,
    )


def _rows(result: dict[str, Any], autoencoders: dict[str, dict[str, Any]]) -> list[Row]:
    cell, rows = result["cell"], []
    for checkpoint in result["checkpoints"]:
        for shift, fd in checkpoint["fd"].items():
            row = Row(
                autoencoder=cell["autoencoder"],
                channels=int(autoencoders.get(cell["autoencoder"], {}).get("channels", 0)),
                law=cell["law"],
                train_shift=float(cell["train_shift"]),
                repa=cell["repa"],
                seed=int(cell["seed"]),
                nimg=int(checkpoint["nimg"]),
                sampling_shift=float(shift),
                fd=_number(fd),
                velocity=_number(checkpoint["velocity"]),
            )
            rows.append(row)
    return rows


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def planned_models(config: dict[str, Any]) -> int:
    """Models that a config's grid has: the product of its axes, each a count, a list or a table; 0 if one is absent."""
    count = 1
    for axis in ("autoencoders", "laws", "train_shifts", "repa", "seeds"):
        values = config.get(axis, 0)
        count *= values if isinstance(values, int) else len(values)
    return count


def rows_from_csv(path: Path) -> list[Row]:
    """Rows of a cells.csv whose model is done and whose figures are finite. ValueError names a missing column."""
    kinds: dict[str, Callable[[str], Any]] = {"channels": int, "seed": int, "nimg": int}
    kinds |= dict.fromkeys(("train_shift", "sampling_shift", "fd", "velocity"), lambda text: float(text or "nan"))
    names = list(Row.__dataclass_fields__)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := [n for n in (*names, "status") if n not in (reader.fieldnames or [])]:
            raise ValueError(f"{path}: expected columns {', '.join(names)}, status; missing: {', '.join(missing)}")
        done = [line for line in reader if line["status"] == "done"]
    rows = [Row(**{n: kinds.get(n, str)(line[n]) for n in names}) for line in done]
    return [row for row in rows if math.isfinite(row.fd) and math.isfinite(row.velocity)]


def last_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of the last checkpoint: those with the most images trained on."""
    rows = list(rows)
    last = max((row.nimg for row in rows), default=0)
    return [row for row in rows if row.nimg == last]


def slope(channels: Iterable[float], shifts: Iterable[float]) -> float:
    """Least-squares slope of ln shift on ln channels: 0.5 is the square-root rule. NaN with fewer than two widths."""
    x, y = (np.log(np.array(list(values), dtype=float)) for values in (channels, shifts))
    x = x - x.mean() if len(x) else x
    spread = float((x * x).sum())
    return float((x * y).sum()) / spread if spread > 1e-12 else math.nan


def pairs_alike(a: list[str], b: list[str]) -> tuple[int, int]:
    """(pairs in the same order in both lists, pairs), of the names that both have."""
    common = [name for name in a if name in b]
    pairs = [(x, y) for i, x in enumerate(common) for y in common[i + 1 :]]
    return sum(b.index(x) < b.index(y) for x, y in pairs), len(pairs)
