"""Redraws the README's picture and copies a run's figures into the repository: `make picture`.

    python docs/make_picture.py runs/photos-long [docs/reconstruction.png] [benchmarks/results/photos-long.json]

Cuts of the two held-out photographs, from the run's averaged weights: original, bicubic and PCA at the same number of
values, ours, and each one's error times five. The JSON holds results.json, the environment and the config of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from flux2 import load_autoencoder
from flux2.checkpoints import save_json
from flux2.images import error_image, to_array
from flux2.metrics import psnr
from train.configs import VAE_PRESETS
from train.data import embedded_photographs
from train.report import yardsticks
from train.vae import fit_code, plain_crops, reconstruct_uint8

CUTS = ((0, 96, 330, 128), (1, 60, 160, 128))  # picture, top, left, side


def main(run: Path, picture: Path, figures: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ae = load_autoencoder(run)
    pictures, held_out = embedded_photographs()
    code, _ = fit_code(VAE_PRESETS["photos"], plain_crops(VAE_PRESETS["photos"], pictures))
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
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=80)
    environment = json.loads((run / "env.json").read_text())
    environment.pop("command")
    config = yaml.safe_load((run / "config.yaml").read_text())
    results = json.loads((run / "results.json").read_text())
    save_json(figures, {"environment": environment, "config": config, **results})
    print(f"wrote {picture} and {figures}")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/photos-long")
    if not (folder / "results.json").is_file():
        sys.exit(f"error: {folder}: expected a finished run of train.vae, with results.json")
    where = [Path(p) for p in sys.argv[2:]]
    main(
        folder,
        *(where + [Path("docs/reconstruction.png"), Path(f"benchmarks/results/{folder.name}.json")][len(where) :]),
    )
