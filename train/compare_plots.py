"""Figures of a comparison, from the numbers of `train.compare_summary`; an autoencoder looks alike in all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.compare_findings import MEASURES
from train.compare_rows import LAWS, NO_REPA, in_order

# Okabe and Ito's palette, told apart with every common colour blindness; markers repeat it in grey print.
LOOKS = {
    "sd": ("#E69F00", "o"),
    "flux.1": ("#009E73", "s"),
    "flux.2": ("#0072B2", "D"),
    "flux.2-nosem": ("#56B4E9", "v"),
    "rae": ("#D55E00", "^"),
}
OTHERS = (("#CC79A7", "P"), ("#000000", "X"), ("#999999", "*"))
WIDTH, DPI = 11.0, 130  # inches; a page is 1100 CSS pixels wide
FONT: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def looks(name: str) -> tuple[str, str]:
    """(colour, marker) of an autoencoder; names of our table have their own."""
    return LOOKS.get(name) or OTHERS[sum(name.encode()) % len(OTHERS)]


def number(value: float | None) -> str:
    """Three significant digits, never with an exponent below a million; `-` for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(digits, 8))}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _figure(height: float, **options: Any) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", **options)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=DPI, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _style(draw: Callable[..., bool]) -> Callable[..., bool]:
    """Runs a drawing function under `FONT`, and leaves matplotlib's settings as they were."""

    def styled(*args: Any, **kwargs: Any) -> bool:
        import matplotlib

        with matplotlib.rc_context(FONT):
            return draw(*args, **kwargs)

    return styled


class _Axis:
    """One of the triangle's measures: its values by autoencoder, and where they lie from 0 (worst) to 1 (best)."""

    def __init__(self, values: dict[str, float | None], label: str, *, log: bool, lower: bool) -> None:
        self.values = {n: v for n, v in values.items() if v is not None and (v > 0 or not log)}
        self.label, self.log, self.lower = label, log, lower
        scaled = [self._scale(v) for v in self.values.values()]
        self.least, self.most = min(scaled, default=0.0), max(scaled, default=1.0)

    def _scale(self, value: float) -> float:
        return math.log(value) if self.log else value

    def place(self, value: float) -> float:
        """0 for the worst of the values, 1 for the best; 1 where all are alike."""
        if self.most - self.least < 1e-12:
            return 1.0
        part = (self._scale(value) - self.least) / (self.most - self.least)
        return 1 - part if self.lower else part

    def ticks(self) -> list[float]:
        """All values if they are counts, else the least, the middle and the greatest."""
        if all(isinstance(v, int) for v in self.values.values()):
            return sorted(set(self.values.values()))
        ends = [self.least, (self.least + self.most) / 2, self.most] if self.most > self.least else [self.most]
        return [math.exp(v) if self.log else v for v in ends]


def triangle_axes(summary: dict[str, Any]) -> dict[str, _Axis]:
    """The four measures: FD of samples, PSNR, FD of reconstructions, channels a token."""
    info, label = summary["autoencoders"], summary["features"].get("label", "FD")
    best = {name: (found.get("best") or {}).get("fd") for name, found in summary["best"].items()}

    def of(key: str) -> dict[str, float | None]:
        return {name: row.get(key) for name, row in info.items()}

    return {
        "learnability": _Axis(best, f"best {label} of samples, lower is better", log=True, lower=True),
        "quality": _Axis(of("psnr"), "PSNR of reconstructions, dB, higher is better", log=False, lower=False),
        "rfd": _Axis(of("rfd"), f"{label} of reconstructions, lower is better", log=True, lower=True),
        "compression": _Axis(of("channels"), "channels a token, fewer is better", log=True, lower=True),
    }


@_style
def draw_triangle(summary: dict[str, Any], path: Path) -> bool:
    """The three measures on one triangle, and in pairs with their units. False, and no file, if nothing is measured."""
    axes = triangle_axes(summary)
    names = in_order(n for axis in axes.values() for n in axis.values)
    if not names:
        return False
    figure = _figure(5.6)
    mosaic = figure.subplot_mosaic(
        [["triangle", "psnr", "rfd"], ["triangle", "channels", "both"]], width_ratios=(2, 1, 1)
    )
    _triangle(mosaic["triangle"], axes, names, summary["features"].get("label", "FD"))
    panels = {
        "psnr": ("quality", "learnability"),
        "rfd": ("rfd", "learnability"),
        "channels": ("compression", "learnability"),
        "both": ("compression", "quality"),
    }
    for panel, (x, y) in panels.items():
        _scatter(mosaic[panel], axes[x], axes[y], names)
    handles = [_handle(name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), frameon=False, fontsize=10)
    _save(figure, path)
    return True


def triangle(ax: Any, summary: dict[str, Any]) -> None:
    """The triangle alone, on a figure's axes, with the autoencoders named beside it."""
    axes = triangle_axes(summary)
    names = in_order(n for axis in axes.values() for n in axis.values)
    _triangle(ax, axes, names, summary["features"].get("label", "FD"))
    ax.legend(handles=[_handle(name) for name in names], loc="upper left", frameon=False, fontsize=9)


def _handle(name: str) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = looks(name)
    return Line2D([], [], color=colour, marker=marker, ms=7, lw=1.6, label=name)


def _triangle(ax: Any, axes: dict[str, _Axis], names: list[str], label: str) -> None:
    inner = 0.14  # the worst value's distance from the centre, the best's is 1
    corners = {
        "learnability": (90, f"learnability\nbest {label} of samples"),
        "compression": (-30, "compression\nchannels a token"),
        "quality": (210, "quality\nPSNR, dB"),
    }
    at = {key: (math.cos(math.radians(a)), math.sin(math.radians(a))) for key, (a, _) in corners.items()}
    for r in (inner, (1 + inner) / 2, 1):
        x, y = zip(*((r * c, r * s) for c, s in (*at.values(), at["learnability"])), strict=True)
        ax.plot(x, y, color="#dddddd", lw=0.8, zorder=0)
    for key, (c, s) in at.items():
        ax.plot([0, c], [0, s], color="#aaaaaa", lw=1, zorder=0)
        ax.annotate(
            corners[key][1],
            (1.1 * c, 1.1 * s),
            ha="center",
            va="bottom" if s > 0 else "top",
            fontsize=10,
            weight="bold",
        )
        axis = axes[key]
        for tick in axis.ticks() if axis.values else []:
            r = inner + (1 - inner) * axis.place(tick)
            side = (-s * 0.05, c * 0.05) if key != "quality" else (s * 0.05, -c * 0.05)
            ax.annotate(
                f"{tick:.3g}",
                (r * c + side[0], r * s + side[1]),
                ha="left" if key == "compression" else "right",
                va="center" if key == "learnability" else "bottom",
                fontsize=8.5,
                color="#444444",
                bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.7},
                zorder=5,
            )
    for name in names:
        if any(name not in axes[key].values for key in corners):
            continue
        colour, marker = looks(name)
        radius = {key: inner + (1 - inner) * axes[key].place(axes[key].values[name]) for key in corners}
        points = [(radius[key] * at[key][0], radius[key] * at[key][1]) for key in corners]
        x, y = zip(*points, points[0], strict=True)
        ax.fill(x, y, color=colour, alpha=0.07, lw=0)
        ax.plot(x, y, color=colour, marker=marker, ms=6.5, lw=1.6, ls="--" if name.endswith("nosem") else "-")
    ax.set_xlim(-1.22, 1.22)
    ax.set_ylim(-0.86, 1.32)
    ax.set_aspect("equal")
    ax.axis("off")


def _scatter(ax: Any, x: _Axis, y: _Axis, names: list[str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    for name in names:
        if name in x.values and name in y.values:
            colour, marker = looks(name)
            ax.plot(x.values[name], y.values[name], marker, color=colour, ms=8, mec="white", mew=0.6)
    for side, axis in ((ax.xaxis, x), (ax.yaxis, y)):
        if axis.log:
            getattr(ax, f"set_{side.axis_name}scale")("log")
            side.set_major_locator(FixedLocator(axis.ticks()))
            side.set_minor_locator(NullLocator())
            side.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        else:
            side.set_major_locator(MaxNLocator(4))
        if axis.lower:
            side.set_inverted(True)
    ax.margins(0.14)
    ax.set_xlabel(
        x.label.replace(", lower", ",\nlower").replace(", higher", ",\nhigher").replace(", fewer", ",\nfewer")
    )
    ax.set_ylabel(y.label.replace(", lower", ",\nlower").replace(", higher", ",\nhigher"))
    ax.set_title("better \u2197", loc="right", fontsize=8, color="#666666")
    ax.grid(color="#eeeeee", zorder=0)
    ax.set_axisbelow(True)


def shown_shifts(setting: dict[str, Any]) -> str:
    """A setting in short: law, train and sampling shift."""
    law = LAWS.get(setting["law"], setting["law"])
    return f"{law} {setting['train_shift']:g} / {setting['sampling_shift']:g}"


@_style
def draw_curves(summary: dict[str, Any], path: Path) -> bool:
    """FD against images trained, a panel an autoencoder. False, and no file, without a curve."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator

    names = [n for n in in_order(summary["curves"]) if any(summary["curves"][n].values())]
    if not names:
        return False
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(2.9 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    styles = {
        "best with REPA": ("-", "o", None, "REPA: "),
        "best without REPA": ("--", "o", None, "no REPA: "),
        "best uniform without REPA": ("-.", "s", "#555555", "no REPA: "),
        "uniform, both shifts 1": (":", "x", "#999999", ""),
    }
    for ax, name in zip(grid.flat, names, strict=False):
        settings = []
        for label, (line, marker, grey, short) in styles.items():
            points = np.array(summary["curves"][name].get(label, []), dtype=float).reshape(-1, 4)
            if not len(points):
                continue
            colour = grey or looks(name)[0]
            ax.plot(points[:, 0], points[:, 1], line, color=colour, marker=marker, ms=3.5, lw=1.5)
            ax.fill_between(points[:, 0], points[:, 2], points[:, 3], color=colour, alpha=0.13, lw=0)
            if short:
                settings.append(f"{short}{shown_shifts(summary['best'][name][label])}")
        ax.set_title(name, weight="bold", loc="left")
        ax.set_title("\n".join(settings), loc="right", fontsize=7, color="#555555")
        ax.grid(color="#eeeeee")
        ax.set_axisbelow(True)
    for ax in list(grid.flat)[len(names) :]:
        ax.axis("off")
    first = grid.flat[0]
    first.set_yscale("log")
    first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    first.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    first.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    for i, ax in enumerate(list(grid.flat)[: len(names)]):
        if i % columns == 0:
            ax.set_ylabel(f"{summary['features'].get('label', 'FD')} of samples")
        if i + columns >= len(names):
            ax.set_xlabel("images trained on")
            ax.tick_params(labelbottom=True)
    lines = [
        Line2D([], [], color=grey or "black", ls=line, marker=marker, ms=4, label=label)
        for label, (line, marker, grey, _) in styles.items()
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)
    _save(figure, path)
    return True


@_style
def draw_heat_maps(summary: dict[str, Any], path: Path) -> bool:
    """FD by train shift and sampling shift, a column an autoencoder, a row a REPA. False, and no file, without any."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    names = [n for n in in_order(summary["heat_maps"]) if summary["heat_maps"][n]]
    repas = sorted({r for n in names for r in summary["heat_maps"][n]}, key=lambda r: (r != NO_REPA, r))
    if not names:
        return False
    shades = colormaps["viridis_r"]
    figure = _figure(0.4 + 2.5 * len(repas))
    grid = figure.subplots(len(repas), max(len(names), 3), squeeze=False)
    for ax in grid.flat:
        ax.axis("off")
    for column, name in enumerate(names):
        maps = summary["heat_maps"][name]
        values = [v for m in maps.values() for line in m["fd"] for v in line if v is not None and v > 0]
        norm = LogNorm(min(values), max(*values, min(values) * 1.0001)) if values else None
        for row, repa in enumerate(repas):
            if repa not in maps or norm is None:
                continue
            ax, found = grid[row][column], maps[repa]
            fd = np.array(found["fd"], dtype=float)
            ax.axis("on")
            ax.imshow(fd, norm=norm, cmap=shades, origin="lower", aspect="equal")
            size = 8 if max(fd.shape) <= 3 else 6.5
            for (j, i), value in np.ndenumerate(fd):
                dark = math.isfinite(value) and norm(value) > 0.5
                face = shades(norm(value)) if math.isfinite(value) else "white"
                box = {"boxstyle": "square,pad=0.1", "fc": face, "ec": "none"}  # the dashed line stops at the number
                colour = "white" if dark else "black"
                ax.text(i, j, number(value), ha="center", va="center", fontsize=size, color=colour, bbox=box, zorder=5)
            if np.isfinite(fd).any():
                j, i = np.unravel_index(np.nanargmin(fd), fd.shape)
                frame = {"fill": False, "ec": "#D55E00", "lw": 2.4, "zorder": 4, "clip_on": False}
                ax.add_patch(Rectangle((float(i) - 0.5, float(j) - 0.5), 1, 1, **frame))
            _equal_line(ax, found["train_shifts"], found["sampling_shifts"])
            ax.set_xticks(range(fd.shape[1]), [f"{s:g}" for s in found["train_shifts"]])
            ax.set_yticks(range(fd.shape[0]), [f"{s:g}" for s in found["sampling_shifts"]])
            ax.tick_params(labelsize=8, length=2)
            for spine in ax.spines.values():
                spine.set_visible(False)
            kind = "no REPA" if repa == NO_REPA else f"REPA {repa}"
            ax.set_title(f"{name}, {kind}\n{LAWS.get(found['law'], found['law'])}", fontsize=9)
            if row == len(repas) - 1:
                ax.set_xlabel("train shift")
            if column == 0:
                ax.set_ylabel("sampling shift")
    _save(figure, path)
    return True


def _equal_line(ax: Any, train: list[float], sampling: list[float]) -> None:
    """The line sampling shift = train shift over a grid whose cells are not evenly spaced in shift."""
    low, high = max(min(train), min(sampling)), min(max(train), max(sampling))
    if high <= low:
        return
    shifts = np.geomspace(low, high, 50)
    x, y = (np.interp(np.log(shifts), np.log(s), np.arange(len(s))) for s in (train, sampling))
    ax.plot(x, y, color="white", lw=2.2, zorder=2, alpha=0.7)
    ax.plot(x, y, "--", color="black", lw=1, zorder=3)


@_style
def draw_findings(summary: dict[str, Any], path: Path) -> bool:
    """Differences of (a), (d) and (e) with their margins, a panel a measure. False without any."""
    tests = [t for t in summary["findings"] if t["finding"] in "ade" and t["n"] > 1]
    if not tests:
        return False
    claims = list(dict.fromkeys((t["finding"], t["claim"], t["autoencoder"] or "flux.2") for t in tests))
    figure = _figure(0.9 + 0.23 * len(claims))
    panels = figure.subplots(1, len(MEASURES), sharey=True, squeeze=False)[0]
    for ax, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for y, (finding, claim, name) in enumerate(claims):
            for t in tests:
                if (t["finding"], t["claim"], t["measure"]) == (finding, claim, measure):
                    colour, marker = looks(name)
                    error = t["margin"] or 0.0
                    full = "white" if t["verdict"] == "does not show" else colour
                    ax.errorbar(
                        t["mean"], y, xerr=error, color=colour, marker=marker, mfc=full, ms=5.5, lw=1.4, capsize=2
                    )
        for y in range(1, len(claims)):
            if claims[y][0] != claims[y - 1][0]:
                ax.axhline(y - 0.5, color="#cccccc", lw=0.8)
        means = [t["mean"] for t in tests if t["measure"] == measure]
        reach = max((abs(m) for m in means), default=1.0) or 1.0
        low, high = min([0.0, *means]), max([0.0, *means])  # not the bars': those of two pairs would set the scale
        ax.set_xlim(low - 0.6 * reach, high + 0.6 * reach)
        ax.axvline(0, color="#555555", lw=1)
        ax.set_title(title)
        ax.set_xlabel("better by, % (log)")
        ax.grid(axis="x", color="#eeeeee")
        ax.set_axisbelow(True)
    panels[0].set_yticks(range(len(claims)), [f"({f})  {claim}" for f, claim, _ in claims])
    panels[0].set_ylim(len(claims) - 0.4, -0.6)
    _save(figure, path)
    return True
