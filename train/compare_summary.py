"""Every number of a comparison's report: best cells, curves, heat maps, sensitivity to each choice, findings.

All figures are of the last checkpoint but the curves. A *setting* is law, train shift, sampling shift and REPA of one
autoencoder; its FD is the mean over the seeds that are done.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from train.compare_findings import findings, verdicts
from train.compare_rows import (
    LAWS,
    NO_REPA,
    PUBLISHED,
    SOURCE,
    Row,
    cell_id,
    in_order,
    last_rows,
    pairs_alike,
    read_comparison,
    slope,
)

CUTOFF = 5.0
"""Sensitivity leaves out settings whose FD is above so many times the autoencoder's best."""
FACTORS = {"law": "law", "train_shift": "train shift", "sampling_shift": "sampling shift"}
DIGITS = 6  # significant, of every number in summary.json

Setting = tuple[str, float, float, str]  # law, train shift, sampling shift, REPA


def by_setting(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """Rows by law, train shift, sampling shift and REPA: a row a seed."""
    settings: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        settings[row.law, row.train_shift, row.sampling_shift, row.repa].append(row)
    return settings


def best_setting(rows: Iterable[Row]) -> dict[str, Any] | None:
    """The setting of one autoencoder's rows with the lowest FD, mean over its seeds; None without rows.

    `fd_error` is the standard error over seeds (None for one), `cell` the model of the best seed, `edge` the shifts
    that are the least or greatest of several tried: the optimum may lie beyond.
    """
    rows = list(rows)
    if not rows:
        return None
    settings = by_setting(rows)
    law, train, sampling, repa = key = min(settings, key=lambda k: float(np.mean([r.fd for r in settings[k]])))
    chosen = settings[key]
    fd = [r.fd for r in chosen]
    lucky = min(chosen, key=lambda r: r.fd)
    edge = []
    for label, value, tried in (
        ("train", train, {r.train_shift for r in rows}),
        ("sampling", sampling, {r.sampling_shift for r in rows}),
    ):
        if len(tried) > 1 and value in (min(tried), max(tried)):
            edge.append(label)
    return {
        "law": law,
        "train_shift": train,
        "sampling_shift": sampling,
        "repa": repa,
        "fd": float(np.mean(fd)),
        "fd_error": float(np.std(fd, ddof=1) / math.sqrt(len(fd))) if len(fd) > 1 else None,
        "velocity": float(np.mean([r.velocity for r in chosen])),
        "seeds": len(fd),
        "edge": edge,
        "cell": cell_id(lucky.autoencoder, law, train, repa, lucky.seed),
    }


def _is(law: str | None = None, repa: bool | None = None, unshifted: bool = False) -> Callable[[Row], bool]:
    def holds(row: Row) -> bool:
        return (
            (law is None or row.law == law)
            and (repa is None or (row.repa != NO_REPA) == repa)
            and (not unshifted or (row.train_shift == 1 and row.sampling_shift == 1))
        )

    return holds


CHOICES: dict[str, Callable[[Row], bool]] = {
    "best": _is(),
    "best without REPA": _is(repa=False),
    "best with REPA": _is(repa=True),
    "best uniform without REPA": _is(law="uniform", repa=False),
    "uniform, both shifts 1": _is(law="uniform", repa=False, unshifted=True),
}
"""Whose best setting is shown, of the rows that each admits."""
CURVES = list(CHOICES)[1:]


def curve(rows: Iterable[Row], setting: dict[str, Any]) -> list[list[float]]:
    """[images, mean FD, least, greatest] over seeds, at each checkpoint of one autoencoder's setting."""
    key = (setting["law"], setting["train_shift"], setting["sampling_shift"], setting["repa"])
    at: dict[int, list[float]] = defaultdict(list)
    for row in by_setting(rows).get(key, []):
        at[row.nimg].append(row.fd)
    return [[nimg, float(np.mean(fd)), min(fd), max(fd)] for nimg, fd in sorted(at.items())]


def heat_map(rows: Iterable[Row], law: str) -> dict[str, Any]:
    """FD of one law by sampling shift (outer list) and train shift (inner): means over seeds, None if none is done."""
    rows = list(rows)
    train, sampling = (sorted({getattr(r, f) for r in rows}) for f in ("train_shift", "sampling_shift"))
    cells: dict[tuple[float, float], list[float]] = defaultdict(list)
    for row in rows:
        if row.law == law:
            cells[row.sampling_shift, row.train_shift].append(row.fd)
    fd = [[float(np.mean(cells[s, t])) if (s, t) in cells else None for t in train] for s in sampling]
    return {"law": law, "train_shifts": train, "sampling_shifts": sampling, "fd": fd}


def sensitivity(rows: Iterable[Row], factor: str, cutoff: float = CUTOFF) -> dict[str, Any]:
    """How much FD depends on one factor of `FACTORS`: rows of one autoencoder, one checkpoint, one REPA.

    FD is averaged over seeds. Settings above `cutoff` times the lowest are dropped. For each setting of the other two
    factors that two levels or more are left of: 100 (worst - best) / best over those levels. The mean over these is
    `percent`, how many there are `settings`; `dropped` of `of` settings fell to the cut-off. None without any.
    """
    fd = {key: float(np.mean([r.fd for r in group])) for key, group in by_setting(rows).items()}
    limit = cutoff * min(fd.values(), default=math.inf)
    at = list(FACTORS).index(factor)
    groups: dict[tuple, list[float]] = defaultdict(list)
    for key, value in fd.items():
        if value <= limit:
            groups[(*key[:at], *key[at + 1 :])].append(value)
    changes = [100 * (max(g) - min(g)) / min(g) for g in groups.values() if len(g) > 1]
    return {
        "percent": float(np.mean(changes)) if changes else None,
        "settings": len(changes),
        "dropped": sum(value > limit for value in fd.values()),
        "of": len(fd),
    }


def tables(rows: Iterable[Row]) -> dict[str, Any]:
    """What rows alone tell: `best` settings, `curves`, `heat_maps`, `sensitivity`, `findings`, `verdicts`, `order`."""
    rows = list(rows)
    last = last_rows(rows)
    names = in_order(row.autoencoder for row in rows)
    best: dict[str, Any] = {name: {} for name in names}
    curves: dict[str, Any] = {name: {} for name in names}
    heat_maps: dict[str, Any] = {name: {} for name in names}
    sensitivities: dict[str, Any] = {}
    for name in names:
        mine, mine_last = ([r for r in some if r.autoencoder == name] for some in (rows, last))
        for label, admits in CHOICES.items():
            if chosen := best_setting([r for r in mine_last if admits(r)]):
                best[name][label] = chosen
                if label in CURVES:
                    curves[name][label] = curve(mine, chosen)
        for repa in sorted({r.repa for r in mine_last}, key=lambda r: (r != NO_REPA, r)):
            some = [r for r in mine_last if r.repa == repa]
            chosen = best_setting(some)
            assert chosen is not None
            heat_maps[name][repa] = heat_map(some, chosen["law"])
        plain = [r for r in mine_last if r.repa == NO_REPA]
        sensitivities[name] = {factor: sensitivity(plain, factor) for factor in FACTORS}
    tests = findings(rows)
    order = sorted((n for n in names if best[n]), key=lambda n: best[n]["best"]["fd"])
    return {
        "last_nimg": max((row.nimg for row in rows), default=0),
        "best": best,
        "order": order,
        "curves": curves,
        "heat_maps": heat_maps,
        "sensitivity_cutoff": CUTOFF,
        "sensitivity": sensitivities,
        "findings": tests,
        "verdicts": verdicts(tests),
    }


def published_tables(order: list[str]) -> dict[str, Any]:
    """The article's figures, and how many pairs of autoencoders stand in its order in `order`, best first."""
    theirs = sorted(PUBLISHED, key=lambda n: PUBLISHED[n]["gfid"])
    alike, pairs = pairs_alike(order, theirs)
    channels, shifts = zip(*((row["channels"], row["train_shift"]) for row in PUBLISHED.values()), strict=True)
    return {
        "source": SOURCE,
        "autoencoders": PUBLISHED,
        "order": theirs,
        "pairs_alike": alike,
        "pairs": pairs,
        "train_shift_slope": slope(channels, shifts),
    }


def summarise(folder: Path) -> dict[str, Any]:
    """Every number that the report of a comparison's folder shows, as plain JSON; numbers to six significant digits."""
    comparison = read_comparison(folder)
    header, rows = comparison.header, comparison.rows
    found = tables(rows)
    grid = {axis: sorted({getattr(r, axis) for r in rows}) for axis in ("train_shift", "sampling_shift", "seed")}
    grid["law"] = [law for law in LAWS if any(r.law == law for r in rows)]
    grid["repa"] = sorted({r.repa for r in rows}, key=lambda r: (r != NO_REPA, r))
    failed, planned = len(comparison.failures), comparison.planned
    counts = {"planned": planned, "done": comparison.done, "failed": failed}
    counts |= {"missing": max(0, planned - comparison.done - failed), "not_finite": comparison.not_finite}
    return _plain(
        {
            "preset": header.get("preset", ""),
            "features": header.get("features", {}),
            "samples": header.get("samples"),
            "environment": header.get("environment", {}),
            "config": header.get("config", {}),
            "models": counts,
            "failures": comparison.failures,
            "grid": grid,
            "autoencoders": comparison.autoencoders,
            "published": published_tables(found["order"]),
            **found,
        }
    )


def _plain(value: Any) -> Any:
    """The same with floats at `DIGITS` significant digits and None for what is not finite, as JSON has it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
