"""The page of a comparison: triangle, curves, heat maps, sensitivity, best models, findings, pictures, protocol.

Reads the files of `train.compare` and nothing else, finished or not; every number is in summary.json beside the page.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux2.tensor_files import save_json
from train.compare_findings import MEASURES
from train.compare_plots import draw_curves, draw_findings, draw_heat_maps, draw_triangle, number
from train.compare_rows import SOURCE, in_order
from train.compare_summary import CUTOFF, summarise
from train.compare_tables import (
    best_table,
    equal_quality,
    findings_table,
    fixed,
    label_of,
    orders,
    protocol,
    quality_table,
    sensitivity_table,
    setting_words,
    shifts_table,
    state,
    triangle_table,
    verdicts_table,
)
from train.page import page, picture, table

FIGURES: dict[str, tuple[Callable[..., bool], str]] = {
    "triangle": (
        draw_triangle,
        "Left: outwards is better on each axis; each runs from the worst to the best of these autoencoders, "
        "FD and channels on logarithmic scales. Right: the same in pairs; up and to the right is better.",
    ),
    "curves": (
        draw_curves,
        "A line is one setting, the best of its kind at the last checkpoint (law, train / sampling shift); "
        "means over seeds, bands from the least to the greatest.",
    ),
    "heat_maps": (
        draw_heat_maps,
        "FD with the law of the best model of each panel. Dashed: sampling shift = train shift. "
        "Framed: the best. One colour scale an autoencoder, light is better.",
    ),
    "findings": (
        draw_findings,
        "Right of 0 the claim holds. Bars are margins, over pairs alike in all else; hollow: 0 is within. "
        "Bars of few pairs may end outside.",
    ),
}


def write_comparison_report(folder: Path) -> Path:
    """Writes report.html, summary.json and figures/*.png into a comparison's folder; returns the page's path.

    What is missing or failed is counted and left out. ValueError if `folder` holds no comparison; OSError if it cannot
    be written.
    """
    folder = Path(folder)
    summary = summarise(folder)
    save_json(folder / "summary.json", summary)
    figures = {}
    for name, (draw, caption) in FIGURES.items():
        path = folder / "figures" / f"{name}.png"
        if draw(summary, path):
            figures[name] = picture(path, caption)
        else:
            path.unlink(missing_ok=True)
            figures[name] = "<p>Nothing to draw yet.</p>"
    sections = (_triangle, _curves, _heat_maps, _sensitivity, _best, _findings)
    body = _head(summary) + "\n".join(section(summary, figures) for section in sections)
    body += f"\n<h2>Reconstructions</h2>{_strips(folder, summary)}"
    body += f"\n<h2>Samples of the best models</h2>{_samples(folder, summary)}"
    body += f"\n<h2>Protocol</h2>{table(*protocol(summary), left=[1])}"
    path = folder / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several workers may write it at once
    temporary.write_text(
        page(f"Comparison of autoencoders: {summary['preset'] or folder.name}", body, _yaml(summary["config"]))
    )
    temporary.replace(path)
    return path


def _head(summary: dict[str, Any]) -> str:
    samples = "samples" if summary["samples"] is None else f"{summary['samples']:,} samples"
    failures = ""
    if summary["failures"]:
        rows = [[cell, (error.strip().splitlines() or [""])[-1][:200]] for cell, error in summary["failures"].items()]
        failures = f"<details><summary>Failed models</summary>{table(['model', 'error'], rows, left=[1])}</details>"
    return f"""<p>{html.escape(state(summary))} A model is one autoencoder, law, train shift, REPA and seed. All figures
but the curves are of the last checkpoint, {summary["last_nimg"]:,} images. {html.escape(label_of(summary))} is the
Fréchet distance of {samples} to the reference; lower is better, and it compares within this page only.</p>
{failures}
"""


def _triangle(summary: dict[str, Any], figures: dict[str, str]) -> str:
    label = html.escape(label_of(summary))
    return f"""<h2>Learnability, quality, compression</h2>
{figures["triangle"]}
{table(*triangle_table(summary))}
<p>Learnability is the best {label} over the grid of laws, shifts and REPA: a minimum over many, of the same grid for
all. Beside it the normalised velocity loss of that model on held-out pictures (0 is perfect, 1 no better than the
mean). It depends on the latent too: between latents of different shape only {label} compares.</p>
<details><summary>Reconstruction, beside the article's</summary>
{table(*quality_table(summary))}
<p>Published: {SOURCE}, ImageNet validation. What it calls LPIPS is on the PSIM scale.</p></details>"""


def _curves(summary: dict[str, Any], figures: dict[str, str]) -> str:
    return f"<h2>{html.escape(label_of(summary))} against images trained</h2>\n{figures['curves']}"


def _heat_maps(summary: dict[str, Any], figures: dict[str, str]) -> str:
    return f"<h2>Train shift and sampling shift</h2>\n{figures['heat_maps']}"


def _sensitivity(summary: dict[str, Any], figures: dict[str, str]) -> str:
    return f"""<h2>Sensitivity</h2>
{table(*sensitivity_table(summary))}
<p>Change of {html.escape(label_of(summary))} from best to worst, without REPA: (worst - best) / best over the levels of
the factor, for each setting of the other two, means over seeds; then the mean over these settings, whose number stands
in brackets. Settings above {CUTOFF:g} times the autoencoder's best are left out, as the article leaves out FID above
50. Noise alone gives a change above 0. Published: {SOURCE}, at 300k steps; how it averages is not stated.</p>"""


def _best(summary: dict[str, Any], figures: dict[str, str]) -> str:
    return f"""<h2>Best models</h2>
{table(*best_table(summary), left=[1, 2])}
<p>Shifts are train / sampling; a star marks an end of those that were tried: the best may lie beyond.
{html.escape(orders(summary))}
Published: {SOURCE}, gFID on ImageNet 256, not the same measure as {html.escape(label_of(summary))}; its FLUX.1 wants
train shift 1.78 without REPA, 1.00 with it.</p>"""


def _findings(summary: dict[str, Any], figures: dict[str, str]) -> str:
    quality = equal_quality(summary)
    seeds = len(summary["grid"]["seed"])
    which = "its error covers seeds and settings" if seeds > 1 else "of one seed: another's noise is not in the error"
    return f"""<h2>The article's findings</h2>
{table(*verdicts_table(summary), left=[1, 2, 3])}
<p>{quality + "." if quality else ""} (d) shows for an autoencoder if one of the two laws does.</p>
{figures["findings"]}
<p>Differences are 100 ln(other / this), about per cent, over pairs of models that are alike in all else ({which}).
<i>{MEASURES["fd"]}</i>: each pair's mean over the sampling shifts. <i>{MEASURES["fd_tuned"]}</i>: the best over train
and sampling shifts of each, a pair for each setting of the rest. A claim shows where the mean is above its margin:
twice its standard error or, for few pairs, Student's 97.5% point times it. About one such verdict in twenty comes by
chance. Numbers in brackets count pairs.</p>
<details><summary>Every test of (a), (d), (e)</summary>{table(*findings_table(summary))}</details>
<details><summary>Every test of (b), (c)</summary>{table(*shifts_table(summary))}
<p>(b) is the slope of ln best train shift on ln channels: 0.5 is the square-root rule, the article's best shifts have
{summary["published"]["train_shift_slope"]:.2f}. (c) is ln(best sampling shift / best train shift); it also shows where
no difference is below 0.</p></details>"""


def _strips(folder: Path, summary: dict[str, Any]) -> str:
    parts = []
    for name in in_order(summary["autoencoders"]):
        path = folder / "autoencoders" / f"{name.replace('/', '_')}.png"
        psnr = fixed(summary["autoencoders"][name].get("psnr"), 2)
        caption = f"{name}: held-out pictures above, reconstructions below, {psnr} dB"
        parts.append(_picture(path, caption, "100%"))
    return "\n".join(parts) or "<p>No autoencoder yet.</p>"


def _samples(folder: Path, summary: dict[str, Any]) -> str:
    parts = []
    for name in in_order(summary["best"]):
        best = summary["best"][name].get("best")
        if best:
            law, shifts, repa = setting_words({**best, "edge": []})
            caption = f"{name}: {law}, shifts {shifts}, REPA {repa}, {label_of(summary)} {number(best['fd'])}"
            parts.append(_picture(folder / "cells" / best["cell"] / "samples.png", caption, "49%"))
    return "\n".join(parts) or "<p>No model yet.</p>"


def _picture(path: Path, caption: str, width: str) -> str:
    return picture(path, caption, width) if path.is_file() else f"<p>{html.escape(caption)}: no picture.</p>"


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=False)
