"""Draws docs/first.png, the README's first picture, from a finished comparison.

    python docs/make_first_picture.py runs/compare-toy

Left: a cut of a photograph that training never saw, and what each autoencoder of the comparison makes of it, with the
error times five. Right: learnability, quality and compression of each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from flux2 import load_autoencoder
from flux2.images import error_image, from_uint8, to_array, to_uint8
from flux2.metrics import psnr
from flux2.tensor_files import load_json
from train.compare_plots import triangle
from train.data import embedded_photographs

ROOT = Path(__file__).parent.parent
SHOWN = {"sd": "SD-shaped", "flux.1": "FLUX.1-shaped", "flux.2": "FLUX.2-shaped"}
PICTURE, TOP, LEFT, SIDE = 1, 60, 160, 128  # of the held-out photographs


def draw(folder: Path, path: Path) -> None:
    """The picture, as PNG. OSError or ValueError if the comparison is not there or not done."""
    from matplotlib.figure import Figure

    summary = load_json(folder / "summary.json")
    image = embedded_photographs()[1][PICTURE][TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    pictures, right = figure.subfigures(1, 2, width_ratios=(1.75, 1))
    axes = pictures.subplots(2, 1 + len(SHOWN))
    axes[0, 0].imshow(image, interpolation="nearest")
    axes[0, 0].set_title("original, held out", fontsize=11)
    for (above, below), (name, words) in zip(axes.T[1:], SHOWN.items(), strict=True):
        ae = load_autoencoder(folder / "autoencoders" / name)
        with torch.no_grad():
            y = to_uint8(ae.decode(ae.encode(from_uint8(x))))
        channels = summary["autoencoders"][name]["channels"]
        above.imshow(to_array(y[0]), interpolation="nearest")
        above.set_title(f"{words}, {channels} a token\n{psnr(x, y).item():.1f} dB", fontsize=11)
        below.imshow(error_image(image, to_array(y[0])), interpolation="nearest")
        below.set_xlabel("error x 5", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[1, 0].axis("off")
    triangle(right.subplots(), summary)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        draw(Path(sys.argv[1]), ROOT / "docs" / "first.png")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(ROOT / "docs" / "first.png")
