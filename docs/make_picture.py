"""Redraws the README's picture and table and copies runs' figures into the repository: `make picture`.

    python docs/make_picture.py runs/photos runs/photos-long

The picture is of the last run: cuts of the two held-out photographs, original, bicubic and PCA at the same number of
values, ours, and each one's error times five. benchmarks/results/NAME.json holds a run's results.json, environment and
config; the README's table is written from all of these.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from flux2 import load_autoencoder
from flux2.images import error_image, to_array
from flux2.metrics import psnr
from flux2.tensor_files import save_json
from train.data import embedded_photographs
from train.report import yardsticks
from train.vae import fit_pca, plain_crops, reconstruct_uint8
from train.vae_config import VAE_PRESETS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = ("photos", "photos-long")
CUTS = ((0, 96, 330, 128), (1, 60, 160, 128))  # picture, top, left, side
MARKED = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)


def copy_figures(run: Path) -> None:
    """benchmarks/results/NAME.json from a finished run."""
    environment = json.loads((run / "env.json").read_text())
    environment.pop("command")  # may name folders of the machine
    config = yaml.safe_load((run / "config.yaml").read_text())
    results = json.loads((run / "results.json").read_text())
    save_json(RESULTS / f"{config['preset']}.json", {"environment": environment, "config": config, **results})


def table() -> str:
    """The README's table in Markdown, from benchmarks/results."""
    runs = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in PRESETS}
    lines = ["| code | numbers a crop | PSNR, dB | SSIM |", "|---|---|---|---|"]
    rows = {label: row for label, row in runs["photos"]["held_out"].items() if not label.startswith("ours")}
    for name, run in runs.items():
        label = f"`{name}`: {run['last']['nimg']:,} crops at {run['last']['images_per_second']:.0f} a second"
        rows[label] = run["held_out"]["ours (EMA)"]
    for label, row in rows.items():
        lines.append(f"| {label} | {row['numbers_per_crop']:,} | {row['psnr_db']:.2f} | {row['ssim']:.4f} |")
    env = runs["photos-long"]["environment"]
    commits = " and ".join(dict.fromkeys(run["environment"]["commit"] for run in runs.values()))
    machine = f"{env['processor']}, {env['threads']} threads, torch {env['packages']['torch']}, commit {commits}."
    return "\n".join([*lines, "", machine]) + "\n"


def draw(run: Path, picture: Path) -> None:
    """The picture, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ae = load_autoencoder(run)
    pictures, held_out = embedded_photographs()
    pca, _ = fit_pca(VAE_PRESETS["photos"], plain_crops(VAE_PRESETS["photos"], pictures))
    code = pca.first(VAE_PRESETS["photos"].autoencoder.z_channels)
    figure, axes = plt.subplots(2 * len(CUTS), 4, figsize=(11, 11 * len(CUTS) / 2 * 1.04), constrained_layout=True)
    for row, (index, top, left, side) in enumerate(CUTS):
        image = held_out[index][top : top + side, left : left + side]
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        others = list(yardsticks(ae, x, code).values())
        decoded = {"bicubic": others[1], "PCA": others[2]}
        ours = ("ours", ae.cfg.z_channels * (side // ae.cfg.downsample) ** 2, reconstruct_uint8(ae, x))
        shown = [("original", 3 * side * side, x), *((k, *v) for k, v in decoded.items()), ours]
        for column, (label, numbers, y) in enumerate(shown):
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            above.imshow(to_array(y[0]), interpolation="nearest")
            quality = "" if label == "original" else f", {psnr(x, y).item():.1f} dB"
            above.set_title(f"{label}: {numbers:,} numbers{quality}", fontsize=9)
            if column:
                below.imshow(error_image(image, to_array(y[0])), interpolation="nearest")
                below.set_xlabel("error x 5", fontsize=8)
            for axis in (above, below):
                axis.set_xticks([])
                axis.set_yticks([])
            if not column:
                below.axis("off")
    figure.savefig(picture, dpi=80)


def main(runs: list[Path]) -> None:
    for run in runs:
        if not (run / "results.json").is_file():
            sys.exit(f"error: {run}: expected a finished run of train.vae, with results.json")
        copy_figures(run)
    draw(runs[-1], ROOT / "docs" / "reconstruction.png")
    readme = ROOT / "README.md"
    readme.write_text(MARKED.sub(lambda m: m[1] + table() + m[2], readme.read_text()))
    print(f"wrote {RESULTS}, {ROOT / 'docs' / 'reconstruction.png'} and the table of {readme}")


if __name__ == "__main__":
    main([Path(p) for p in sys.argv[1:]] or [ROOT / "runs" / name for name in PRESETS])
