"""The article's five findings, judged from the cells of a comparison at its last checkpoint.

A comparison of two levels of a factor (two laws, REPA or none, two autoencoders) is a list of differences, one for each
pair of models that are alike in all else, 100 ln(other / this): about the per cent by which the other is worse. Three
measures are compared:

- `fd`: each pair's mean over the sampling shifts that both were sampled with;
- `fd_tuned`: the best FD over train and sampling shifts of each, a pair for each setting of the rest;
- `velocity`: the normalised velocity loss.

A claim shows where the mean is above its margin: twice its standard error, deviation / sqrt(n) over the n pairs, or,
for few pairs, Student's 97.5% point times it (12.7 for two, 2.6 for six). With one seed the pairs differ in law, shift
or REPA: the error then says how even the difference is over settings, not over seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from train.compare_rows import LAWS, NO_REPA, Row, in_order, last_rows, slope

MEASURES = {"fd": "FD", "fd_tuned": "FD at the best shifts", "velocity": "velocity loss"}
CLAIMS = {
    "a": "wide and semantic beats wide alone on learnability, at equal quality",
    "b": "the best train shift rises with channels",
    "c": "the best sampling shift is at least the best train shift",
    "d": "logit-normal or plateau beats uniform",
    "e": "REPA helps every autoencoder",
}
_ROUNDING = 1e-9  # of a mean that is zero but for the order of additions

Key = tuple[str, str, float, str, int]  # autoencoder, law, train shift, REPA, seed
_FIELDS = ("autoencoder", "law", "train_shift", "repa", "seed")


def judge(differences: Iterable[float], *, at_least: bool = False) -> dict[str, Any]:
    """Mean, standard error, margin, n and verdict of differences that a claim says are positive.

    The verdict is "shows" for a mean above its margin, "the opposite shows" below minus that, else "does not show"; "no
    data" for fewer than two. at_least: the claim is ">= 0", which also shows where no difference is negative.
    """
    from scipy.special import stdtrit

    values = np.array(list(differences), dtype=float)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    margin = max(2.0, float(stdtrit(n - 1, 0.975))) * error if n > 1 else math.nan
    if n < 2:
        verdict = "no data"
    elif (at_least and values.min() >= 0) or mean > max(margin, _ROUNDING):
        verdict = "shows"
    else:
        verdict = "the opposite shows" if mean < -max(margin, _ROUNDING) else "does not show"
    found = {"mean": mean, "standard_error": error, "margin": margin, "n": n, "verdict": verdict}
    return found | {"differences": values.tolist()}


class Models:
    """The models of a comparison at its last checkpoint."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.fd: dict[Key, dict[float, float]] = defaultdict(dict)
        self.velocity: dict[Key, float] = {}
        self.channels: dict[str, int] = {}
        for row in last_rows(rows):
            key = (row.autoencoder, row.law, row.train_shift, row.repa, row.seed)
            self.fd[key][row.sampling_shift] = row.fd
            self.velocity[key] = row.velocity
            self.channels[row.autoencoder] = row.channels
        self.names = in_order(self.channels)
        self.train_shifts = sorted({key[2] for key in self.fd})
        self.sampling_shifts = sorted({shift for fd in self.fd.values() for shift in fd})

    def pairs(self, factor: str, this: str, other: str, autoencoder: str | None = None) -> dict[str, list[float]]:
        """100 ln(other / this) by measure, over pairs alike in all but `factor`; of one autoencoder's models or all."""
        at = _FIELDS.index(factor)
        fd, velocity = [], []
        tuned: dict[tuple, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for key in sorted(self.fd):
            if key[at] != this or (autoencoder is not None and key[0] != autoencoder):
                continue
            twin: Any = (*key[:at], other, *key[at + 1 :])
            if twin not in self.fd:
                continue
            common = sorted(self.fd[key].keys() & self.fd[twin].keys())
            if common:
                fd.append(float(np.mean([_percent(self.fd[twin][s], self.fd[key][s]) for s in common])))
                setting = (*key[:2], *key[3:])
                for best, cell in zip(tuned[setting], (key, twin), strict=True):
                    best += [self.fd[cell][s] for s in common]
            velocity.append(_percent(self.velocity[twin], self.velocity[key]))
        return {
            "fd": fd,
            "fd_tuned": [_percent(min(b), min(a)) for a, b in tuned.values()],
            "velocity": velocity,
        }

    def blocks(self) -> dict[tuple[str, str, int], dict[str, dict[float, Key]]]:
        """{(law, repa, seed): {autoencoder: {train shift: model}}}, of autoencoders that have every train shift."""
        found: dict[tuple[str, str, int], dict[str, dict[float, Key]]] = defaultdict(lambda: defaultdict(dict))
        for key in sorted(self.fd):
            found[key[1], key[3], key[4]][key[0]][key[2]] = key
        whole = {}
        for block, by_name in found.items():
            kept = {name: cells for name, cells in by_name.items() if len(cells) == len(self.train_shifts)}
            if kept:
                whole[block] = kept
        return whole


def _percent(other: float, this: float) -> float:
    """100 ln(other / this); figures of 0 or less, which no FD above rounding has, count as 1e-12."""
    return 100 * (math.log(max(other, 1e-12)) - math.log(max(this, 1e-12)))


def _tests(models: Models, finding: str, factor: str, this: str, other: str, name: str | None) -> list[dict[str, Any]]:
    """A test for each measure of "`this` is better than `other`", of autoencoder `name`, or of all."""
    words = f"{LAWS.get(this, this)} beats {LAWS.get(other, other)}"
    if factor == "repa":
        words = f"REPA with {this} helps"
    claim = f"{name}: {words}" if name else words
    return [
        {"finding": finding, "claim": claim, "autoencoder": name, "factor": this, "measure": measure, "unit": "%"}
        | judge(differences)
        for measure, differences in models.pairs(factor, this, other, name).items()
    ]


def _width_tests(models: Models) -> list[dict[str, Any]]:
    """(b): the slope of ln best train shift on ln channels, one a block, by FD and by velocity loss."""
    tests = []
    for measure in ("fd", "velocity"):
        slopes = []
        for cells_of in models.blocks().values():
            known = {name: cells for name, cells in cells_of.items() if models.channels[name] > 0}
            best = [_best_train_shift(models, cells, measure) for cells in known.values()]
            value = slope([models.channels[name] for name in known], best)
            if math.isfinite(value) and len(models.train_shifts) > 1:
                slopes.append(value)
        claim = "ln best train shift over ln channels rises (square-root rule: 0.5)"
        row = {"finding": "b", "claim": claim, "autoencoder": None, "factor": "channels", "measure": measure}
        tests.append(row | {"unit": "slope"} | judge(slopes))
    return tests


def _best_train_shift(models: Models, cells: Mapping[float, Key], measure: str) -> float:
    of = models.velocity if measure == "velocity" else {key: min(models.fd[key].values()) for key in cells.values()}
    return min(cells, key=lambda shift: of[cells[shift]])


def _shift_tests(models: Models) -> list[dict[str, Any]]:
    """(c): ln(best sampling shift / best train shift) of each block, by autoencoder; and with FD averaged over laws."""
    grid = [(t, s) for t in models.train_shifts for s in models.sampling_shifts]
    by_name: dict[str, list[float]] = defaultdict(list)
    averaged: dict[tuple[str, str, int], dict[tuple[float, float], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for (_, repa, seed), cells_of in models.blocks().items():
        for name, cells in cells_of.items():
            fd = {(t, s): value for t, key in cells.items() for s, value in models.fd[key].items()}
            if len(fd) != len(grid):
                continue
            train, sampling = min(grid, key=fd.__getitem__)
            by_name[name].append(math.log(sampling / train))
            for at, value in fd.items():
                averaged[name, repa, seed][at].append(value)
    rows: list[tuple[str, str | None, list[float]]] = [
        (f"{name}: sampling shift >= train shift", name, by_name[name]) for name in models.names
    ]
    over_laws = []
    for values in averaged.values():
        train, sampling = min(values, key=lambda at, values=values: float(np.mean(values[at])))
        over_laws.append(math.log(sampling / train))
    rows.append(("all autoencoders, FD averaged over laws: sampling shift >= train shift", None, over_laws))
    return [
        {"finding": "c", "claim": claim, "autoencoder": name, "factor": "shift", "measure": "fd", "unit": "ln ratio"}
        | judge(values, at_least=True)
        for claim, name, values in rows
    ]


def findings(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every test of the five findings at the last checkpoint.

    Each is a dict of `finding` (a letter of `CLAIMS`), `claim`, `autoencoder` (None: all), `factor`, `measure` (a key
    of `MEASURES`), `unit`, and `judge`'s `differences`, `mean`, `standard_error`, `margin`, `n`, `verdict`.
    """
    models = Models(rows)
    tests = _tests(models, "a", "autoencoder", "flux.2", "flux.2-nosem", None)
    tests += _width_tests(models) + _shift_tests(models)
    for name in models.names:
        for law in list(LAWS)[1:]:
            tests += _tests(models, "d", "law", law, "uniform", name)
    teachers = sorted({key[3] for key in models.fd} - {NO_REPA})
    for name in models.names:
        for teacher in teachers:
            tests += _tests(models, "e", "repa", teacher, NO_REPA, name)
    return tests


def verdicts(tests: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What shows, in words, by finding and by measure, of those it was judged by."""
    tests = list(tests)
    found: dict[str, dict[str, str]] = {}
    for letter in CLAIMS:
        of = {m: [t for t in tests if (t["finding"], t["measure"]) == (letter, m)] for m in MEASURES}
        found[letter] = {measure: _sentence(letter, some) for measure, some in of.items() if some}
    return found


def _sentence(letter: str, tests: list[Mapping[str, Any]]) -> str:
    judged = [t for t in tests if t["verdict"] != "no data"]
    by_name: dict[str, list[str]] = defaultdict(list)
    for t in judged:
        if t["autoencoder"] is not None:
            by_name[t["autoencoder"]].append(t["verdict"])
    parts = []
    if by_name:  # of two laws, or two teachers, one is enough
        shows = in_order(n for n, given in by_name.items() if "shows" in given)
        opposite = in_order(n for n, given in by_name.items() if set(given) == {"the opposite shows"})
        text = f"shows for {len(shows)} of {len(by_name)} autoencoders"
        if shows and len(shows) < len(by_name):
            text += f" ({', '.join(shows)})"
        parts.append(text + (f", the opposite for {', '.join(opposite)}" if opposite else ""))
    for t in judged:
        if t["autoencoder"] is None:
            form, before = {"a": ("{:+.1f} ± {:.1f}%", ""), "b": ("slope {:+.2f} ± {:.2f}", "")}.get(
                letter, ("ln ratio {:+.2f} ± {:.2f}", "all, FD averaged over laws: ")
            )
            parts.append(f"{before}{t['verdict']} ({form.format(t['mean'], t['standard_error'])})")
    return "; ".join(parts) or "no data"
