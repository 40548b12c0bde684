"""Draws docs/high-resolution.png: a photograph decoded plainly, in bands and in diffusers' tiles, by one model.

    python -m train.vae --name untiled --autoencoder.shortcut none --warm-start none --align-weight 0 --lr 3e-3 \\
        --batch 8 --steps 400
    python docs/make_high_resolution.py runs/untiled     # without a run: only the tables of docs/high-resolution.md

The model is FLUX.2's topology at an eighth of its width and with one block a level less, so that diffusers loads it and
a CPU trains it in minutes. The photograph is scikit-image's retina, 1408 pixels; diffusers' tiles have the size that
`enable_tiling` gives them. Differences are those of 8-bit pictures to one decoded in fp64, and benchmarks/results
keeps what the caption says.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import high_resolution  # noqa: E402 - after the path
from high_resolution import NAMES, measured, tiled  # noqa: E402

from flux2 import load_autoencoder  # noqa: E402
from flux2.images import to_pixels  # noqa: E402
from flux2.tensor_files import save_json  # noqa: E402

SIDE, TIMES = 1408, 8
PAGE = ROOT / "docs" / "high-resolution.md"
PICTURE, RESULTS = (
    ROOT / "docs" / "high-resolution.png",
    ROOT / "benchmarks" / "results" / "high-resolution-picture.json",
)


@torch.no_grad()
def decoded(run: str, way: str, latents: str) -> tuple[np.ndarray, int]:
    """(float pixels [H, W, 3] in 8-bit levels, bytes held at most), in a process of its own."""
    torch.set_num_threads(1)
    ae, z = load_autoencoder(run), torch.load(latents, weights_only=True)
    if way == "exact":
        ae.double()
        z = z.double()
    memory = "normal" if way == "plain" else "low"
    decode = tiled(ae, torch.float32, SIDE) if way == "tiled" else lambda z: ae.decode_raw(z, memory)
    decode(z[:, :, :16, :16])
    x, held, _ = measured(lambda: decode(z))
    return ((x[0].permute(1, 2, 0).clamp(-1, 1).double() + 1) * 127.5).numpy(), held


def draw(run: str) -> None:
    """The picture, and its figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from skimage import data

    ae = load_autoencoder(run)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        z = ae.posterior(to_pixels(data.retina()[:SIDE, :SIDE])[None], "low").mode()
        torch.save(z, f"{folder}/z.pt")
        made: dict[str, tuple[np.ndarray, int]] = {}
        for way in ("exact", "plain", "low", "tiled"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                made[way] = pool.apply(decoded, (run, way, f"{folder}/z.pt"))
    truth = made.pop("exact")[0]
    figure, axes = plt.subplots(2, 3, figsize=(12, 8.6), constrained_layout=True)
    rows: dict[str, Any] = {}
    for column, (way, (picture, held)) in enumerate(made.items()):
        error = np.abs(picture - truth)
        rows[way] = {"largest_error_levels": error.max(), "held_bytes": held}
        top, bottom = axes[:, column]
        top.imshow(picture.round().astype(np.uint8))
        top.set_title(f"{NAMES[way].strip('`')}: {held / 2**20:,.0f} MiB")
        bottom.imshow((TIMES * error).clip(0, 255).round().astype(np.uint8))
        bottom.set_title(f"error x {TIMES}; largest {error.max():.3g} of 255 levels")
        for axis in (top, bottom):
            axis.set_axis_off()
    figure.savefig(PICTURE, dpi=100)
    environment = json.loads((Path(run) / "env.json").read_text())
    environment.pop("command")  # may name folders of the machine
    save_json(RESULTS, {"side": SIDE, "environment": environment, "rows": rows})


def filled(text: str) -> str:
    """The page with the tables of the results between its marks."""
    rows = json.loads(RESULTS.read_text())["rows"]
    lines = [f"| {SIDE} x {SIDE}, fp32 | largest error, 8-bit levels | peak, MiB |", "|---|---|---|"]
    for way, row in rows.items():
        lines.append(f"| {NAMES[way]} | {row['largest_error_levels']:.2g} | {row['held_bytes'] / 2**20:,.0f} |")
    measured_rows = high_resolution.table(json.loads(high_resolution.RESULTS.read_text()))
    for name, table in (("picture", "\n".join(lines) + "\n"), ("rows", measured_rows)):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = text[: text.index(start) + len(start)] + table + text[text.index(end) :]
    return text


def main() -> int:
    if len(sys.argv) > 1:
        draw(sys.argv[1])
    PAGE.write_text(filled(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
