"""Copies a comparison's figures into the repository and writes the tables of docs/compare.md from them.

    python docs/make_comparison.py runs/toy      # a finished comparison's folder: its figures, pictures, tables
    python docs/make_comparison.py NAME=runs/toy # the same, under another name than its preset's
    python docs/make_comparison.py learnability  # or the folder of a probe, `train.evaluate learnability`
    python docs/make_comparison.py               # the tables alone, from benchmarks/results

benchmarks/results/comparison-PRESET.json is the comparison's summary.json, comparison-PRESET.csv beside it its
cells.csv; the pictures are docs/comparison-PRESET-*; learnability-PRESET.json is the probe's. In the page, what stands
between `<!-- PRESET TABLE -->` and `<!-- /PRESET TABLE -->` is written from these, TABLE being one of `TABLES`,
`SENTENCES`, `pictures` or `learnability`.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from flux2.images import load_image
from flux2.tensor_files import load_json, save_json
from train import compare_tables as tables
from train import learnability
from train.compare_report import write_comparison_report
from train.compare_rows import in_order

ROOT = Path(__file__).parent.parent
TABLES = {
    "triangle": tables.triangle_table,
    "quality": tables.quality_table,
    "best": tables.best_table,
    "sensitivity": tables.sensitivity_table,
    "verdicts": tables.verdicts_table,
    "findings": tables.findings_table,
    "shifts": tables.shifts_table,
    "protocol": tables.protocol,
}
SENTENCES = {"state": tables.state, "orders": tables.orders, "quality_gap": tables.equal_quality}
PICTURES = {
    "triangle.png": "Learnability, quality and compression of each autoencoder on a triangle, and in pairs",
    "heat_maps.png": "Frechet distance by train and sampling shift, a panel an autoencoder, without and with REPA",
    "findings.png": "Differences of the article's findings (a), (d), (e) and their margins",
    "samples.jpg": "Held-out pictures and reconstructions of each autoencoder, and samples of its best model",
}
MARKED = re.compile(
    r"<!-- (?P<preset>[\w.-]+) (?P<what>\w+) -->\n(?P<body>.*?)<!-- /(?P=preset) (?P=what) -->", re.DOTALL
)
NOT_YET = "Not run yet.\n"


def results_path(preset: str, root: Path = ROOT, kind: str = "comparison") -> Path:
    """The committed figures of a preset's comparison, or of its learnability probe."""
    return root / "benchmarks" / "results" / f"{kind}-{preset}.json"


def markdown(table: tables.Table) -> str:
    """A table in Markdown."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell or ' ' for cell in cells)} |" for cells in lines) + "\n"


def section(preset: str, what: str, root: Path = ROOT) -> str:
    """What stands between the marks of one table, sentence or the pictures. ValueError on an unknown name."""
    known = [*TABLES, *SENTENCES, "pictures", "learnability"]
    if what not in known:
        raise ValueError(f"docs/compare.md: expected one of {', '.join(known)} in the mark of {preset}, got {what!r}")
    path = results_path(preset, root, "learnability" if what == "learnability" else "comparison")
    if not path.is_file():
        return NOT_YET
    summary = load_json(path)
    if what == "learnability":
        said = "; ".join(filter(None, (learnability.protocol(summary), learnability.correlation_words(summary))))
        picture = f"![Velocity loss and distance of samples against images](learnability-{preset}.png)"
        return f"{markdown(learnability.table(summary))}\n*{said}.*\n\n{picture}\n"
    if what in TABLES:
        return markdown(TABLES[what](summary))
    if what in SENTENCES:
        return SENTENCES[what](summary) + "\n"
    names = {name: alt for name, alt in PICTURES.items() if (root / "docs" / f"comparison-{preset}-{name}").is_file()}
    lines = [f"![{alt}](comparison-{preset}-{name})" for name, alt in names.items()]
    link = f"[benchmarks/results/{path.name}](../benchmarks/results/{path.name})"
    commit = summary["environment"].get("commit", "unknown")
    return "\n\n".join([*lines, f"*{link}: {tables.machine(summary)}; commit {commit}.*"]) + "\n"


def fill(text: str, root: Path = ROOT) -> str:
    """The page with every marked section written anew."""

    def written(match: re.Match[str]) -> str:
        preset, what = match["preset"], match["what"]
        return f"<!-- {preset} {what} -->\n{section(preset, what, root)}<!-- /{preset} {what} -->"

    return MARKED.sub(written, text)


def copy_figures(folder: Path, root: Path = ROOT, preset: str = "") -> str:
    """A comparison's numbers and pictures into the repository, under `preset`, by default its own; that name.

    ValueError if there are none.
    """
    write_comparison_report(folder)
    summary = load_json(folder / "summary.json")
    preset = preset or summary["preset"]
    if not summary["order"] or not (folder / "cells.csv").is_file():
        raise ValueError(f"{folder}: expected a comparison with models that are done, and cells.csv; got none")
    summary["environment"].pop("command", None)  # may name folders of the machine, as weights do
    given = [entry.split("=", 1) for entry in summary["config"].get("weights", [])]
    summary["config"]["weights"] = [f"{name}={Path(path).name}" for name, path in given]
    save_json(results_path(preset, root), summary)
    shutil.copyfile(folder / "cells.csv", results_path(preset, root).with_suffix(".csv"))
    for name in PICTURES:
        to = root / "docs" / f"comparison-{preset}-{name}"
        if name == "samples.jpg":
            draw_samples(folder, summary, to)
        else:
            shrink(folder / "figures" / name, to)
    return preset


def copy_probe(folder: Path, root: Path = ROOT) -> str:
    """A learnability probe's numbers and picture into the repository; its preset."""
    result = load_json(folder / "learnability.json")
    preset = result["config"]["preset"]
    save_json(results_path(preset, root, "learnability"), result)
    shrink(folder / "learnability.png", root / "docs" / f"learnability-{preset}.png")
    return preset


def shrink(path: Path, to: Path) -> None:
    """A figure as PNG of 128 colours: a third of its size, and no difference to see."""
    from PIL import Image

    if path.is_file():
        image = Image.open(path).convert("RGB")
        image.quantize(128, dither=Image.Dither.NONE).save(to, optimize=True)
    else:
        to.unlink(missing_ok=True)


def draw_samples(folder: Path, summary: dict[str, Any], to: Path) -> None:
    """A row an autoencoder: its strip of reconstructions, and as much of its best model's samples."""
    from matplotlib.figure import Figure

    strips = {}
    for name in in_order(summary["best"]):
        strip = folder / "autoencoders" / f"{name.replace('/', '_')}.png"
        sheet = folder / "cells" / summary["best"][name]["best"]["cell"] / "samples.png"
        if strip.is_file() and sheet.is_file():
            left, right = load_image(strip), load_image(sheet)
            strips[name] = left, right[: max(1, right.shape[1] * left.shape[0] // left.shape[1])]
    to.unlink(missing_ok=True)
    if not strips:
        return
    ratio = max(left.shape[0] / left.shape[1] for left, _ in strips.values())
    figure = Figure(figsize=(11, len(strips) * (5.4 * ratio + 0.3)), layout="constrained")
    grid = figure.subplots(len(strips), 2, squeeze=False)
    for axes, (name, pair) in zip(grid, strips.items(), strict=True):
        for ax, image, title in zip(axes, pair, ("held-out, and reconstructed", "samples"), strict=True):
            ax.imshow(image, interpolation="lanczos")
            ax.set_title(f"{name}: {title}", fontsize=9)
            ax.axis("off")
    figure.savefig(to, dpi=110, pil_kwargs={"quality": 85})


def main(folders: list[str]) -> None:
    for given in folders:
        name, _, path = given.rpartition("=")
        folder = Path(path)
        probed = (folder / "learnability.json").is_file()
        try:
            preset = copy_probe(folder) if probed else copy_figures(folder, preset=name)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        kind = "learnability" if probed else "comparison"
        print(f"wrote {results_path(preset, kind=kind)} and docs/{kind}-{preset}*")
    page = ROOT / "docs" / "compare.md"
    page.write_text(fill(page.read_text()))
    print(f"wrote the tables of {page}")


if __name__ == "__main__":
    main(sys.argv[1:])
