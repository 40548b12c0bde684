"""Pictures and the page a run ends with: reconstruction grid, loss curves, latent PCA as RGB, report.html."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flux2.autoencoder import AutoEncoder
from flux2.images import error_image, from_uint8, save_png, tile, to_array, to_uint8
from flux2.linear_code import LinearCode
from flux2.metrics import psnr, ssim
from flux2.rae import RAE
from flux2.tensor_files import save_json
from train.data import Pictures
from train.figures import panels
from train.loop import read_log
from train.page import page, picture, table

GRID_CROPS = 8
WHOLE_PICTURES, WHOLE_SIDE = 2, 512  # held-out pictures shown whole, and the longest side shown


def bicubic(x: Tensor, side: int) -> Tensor:
    """uint8 [N, C, R, R] -> shrunk to side x side and enlarged again, bicubic with antialiasing, uint8 [N, C, R, R]."""
    small = F.interpolate(x.float(), size=(side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
    large = F.interpolate(small, size=tuple(x.shape[-2:]), mode="bicubic", antialias=True)
    return large.round().clamp(0, 255).to(torch.uint8)


def yardsticks(ae: AutoEncoder | RAE, crops: Tensor, code: LinearCode) -> dict[str, tuple[float, Tensor]]:
    """{label: (numbers of the code per crop, reconstruction uint8 [N, 3, R, R])} of codes anyone can compute.

    Without those that keep as many numbers as the crop has, as beside an RAE: they lose nothing.
    """
    side, f, z = crops.shape[-1], ae.cfg.downsample, ae.cfg.z_channels
    c = crops.shape[1]
    equal = max(1, round(side * (z / c) ** 0.5 / f))  # c side'^2 numbers, as near as whole pixels allow
    equal = min(equal, side)
    rows = {
        f"bicubic, {f}x down and up": (c * (side // f) ** 2, bicubic(crops, side // f)),
        "bicubic at equal code size": (c * equal**2, bicubic(crops, equal)),
        f"PCA of {f}x{f} blocks, {len(code.components)} components": (
            len(code.components) * (side // f) ** 2,
            to_uint8(code.reconstruct(from_uint8(crops))),
        ),
    }
    return {label: row for label, row in rows.items() if row[0] < c * side**2}


def reconstruction_grid(crops: Tensor, ours: Tensor, linear: Tensor) -> np.ndarray:
    """Rows: original, ours, 5x error, PCA, 5x error; columns: crops spread over the set. uint8 [H, W, C], 2x size."""
    chosen = torch.linspace(0, len(crops) - 1, min(GRID_CROPS, len(crops))).round().long().tolist()
    a, b, c = ([to_array(t[i]) for i in chosen] for t in (crops, ours, linear))
    rows = [a, b, [error_image(x, y) for x, y in zip(a, b, strict=True)]]
    rows += [c, [error_image(x, y) for x, y in zip(a, c, strict=True)]]
    grid = tile([image for row in rows for image in row], columns=len(chosen))
    return grid.repeat(2, 0).repeat(2, 1)


def latent_rgb(z: Tensor) -> np.ndarray:
    """First three principal components of a latent [C, h, w] as colours, each scaled to its 1st..99th percentile."""
    c, h, w = z.shape
    flat = z.reshape(c, -1).double()
    flat = flat - flat.mean(1, keepdim=True)
    _, vectors = torch.linalg.eigh(flat @ flat.T)
    top = vectors[:, -3:].flip(1).T @ flat  # [3, h w]
    low, high = torch.quantile(top, 0.01, dim=1, keepdim=True), torch.quantile(top, 0.99, dim=1, keepdim=True)
    scaled = ((top - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).reshape(3, h, w).permute(1, 2, 0).numpy()


@torch.no_grad()
def whole_pictures(ae: AutoEncoder | RAE, pictures: Pictures, code: LinearCode) -> list[dict[str, np.ndarray]]:
    """For the first held-out pictures: original, ours, PCA, 5x error of ours, and raw and normalised latents as RGB."""
    device = next(ae.parameters()).device
    shown = []
    for index in range(min(WHOLE_PICTURES, len(pictures))):
        image = torch.from_numpy(pictures[index].copy()).permute(2, 0, 1)[None]
        m = ae.cfg.multiple
        height, width = (min(side, WHOLE_SIDE) // m * m for side in image.shape[-2:])
        if not height or not width:
            continue
        image = image[:, :, :height, :width]
        x = from_uint8(image)
        raw = ae.posterior(x.to(device)).mode()
        ours, linear = (to_array(to_uint8(y)[0].cpu()) for y in (ae.decode_raw(raw), code.reconstruct(x)))
        original = to_array(image[0])
        latents = {"raw latent": raw}
        if isinstance(ae, AutoEncoder):  # an RAE normalises pictures of one size alone
            latents["normalised latent"] = ae.normalise(raw)
        drawn = {name: latent_rgb(z[0].float().cpu()) for name, z in latents.items()}
        enlarged = {k: r.repeat(height // r.shape[0], 0).repeat(width // r.shape[1], 1) for k, r in drawn.items()}
        shown.append(
            {"original": original, "ours": ours, "PCA": linear, "5x error": error_image(original, ours), **enlarged}
        )
    return shown


def plot_curves(records: list[dict[str, Any]], path: Path, levels: dict[str, float]) -> None:
    """Losses by name and held-out PSNR against images, PNG; `levels`: yardsticks in dB drawn as lines."""
    steps = [r for r in records if "loss" in r]
    held = [r for r in records if "held_out_psnr" in r]
    skip = {"step", "nimg", "lr", "images_per_second", "peak_memory_bytes"}
    numbers = {k for r in steps for k, v in r.items() if isinstance(v, (int, float))} - skip
    names = sorted(numbers, key=lambda k: (k.startswith(("d_", "gan")), k))  # the discriminator's last
    rows = -(-(1 + len(names)) // 4)
    figure, axes = panels(rows, 4, (15, 3.1 * rows))
    flat = list(axes.flat)
    for axis, name in zip(flat[1:], names, strict=False):
        having = [r for r in steps if name in r]
        axis.plot([r["nimg"] for r in having], [r[name] for r in having], lw=1.2)
        axis.set_title(name)
        if min(r[name] for r in having) > 0 and "accuracy" not in name:
            axis.set_yscale("log")
    flat[0].plot([r["nimg"] for r in held], [r["held_out_psnr"] for r in held], "o-", label="ours (EMA)")
    for style, (label, level) in zip(("--", "-.", ":"), levels.items(), strict=False):
        flat[0].axhline(level, ls=style, c="grey", label=label)
    flat[0].legend(fontsize=7)
    flat[0].set_title("held-out PSNR, dB")
    for axis in flat[1 + len(names) :]:
        axis.axis("off")
    for axis in flat[: 1 + len(names)]:
        axis.set_xlabel("images")
    figure.savefig(path, dpi=100)


def _mean(values: Tensor) -> float:
    return float(torch.as_tensor(values, dtype=torch.float64).nanmean())


def write_report(
    folder: Path,
    *,
    config: str,
    ae: AutoEncoder | RAE,
    crops: Tensor,
    ours: Tensor,
    code: LinearCode,
    held_out: Pictures,
) -> float:
    """Writes folder/samples/*.png, folder/results.json and folder/report.html; returns the held-out PSNR in dB.

    crops, ours: held-out crops and their reconstructions, uint8 [N, 3, R, R].
    """
    samples = folder / "samples"
    others = yardsticks(ae, crops, code)
    size = ae.cfg.z_channels * (crops.shape[-1] // ae.cfg.downsample) ** 2
    rows = {"ours (EMA)": (size, ours), **others}
    results = {
        label: {"numbers_per_crop": n, "psnr_db": _mean(psnr(crops, y)), "ssim": _mean(ssim(crops, y))}
        for label, (n, y) in rows.items()
    }
    records = read_log(folder / "log.jsonl")
    linear = to_uint8(code.reconstruct(from_uint8(crops)))
    save_png(samples / "reconstructions.png", reconstruction_grid(crops, ours, linear))
    for index, images in enumerate(whole_pictures(ae, held_out, code)):
        for label, image in images.items():
            save_png(samples / f"held_out_{index}_{label.replace(' ', '_')}.png", image)
    plot_curves(records, samples / "losses.png", {k: v["psnr_db"] for k, v in list(results.items())[1:]})
    last = next((r for r in reversed(records) if "loss" in r), {})
    save_json(folder / "results.json", {"held_out": results, "crops": len(crops), "last": last})
    (folder / "report.html").write_text(_page(folder, config, results, crops, last))
    return results["ours (EMA)"]["psnr_db"]


def _page(folder: Path, config: str, results: dict, crops: Tensor, last: dict) -> str:
    num_crops, channels, _, side = crops.shape
    cells = [[k, str(r["numbers_per_crop"]), f"{r['psnr_db']:.2f}", f"{r['ssim']:.4f}"] for k, r in results.items()]
    samples = folder / "samples"
    whole = ""
    for index in range(WHOLE_PICTURES):
        paths = sorted(samples.glob(f"held_out_{index}_*.png"), key=lambda p: _ORDER.index(p.stem.split("_", 3)[3]))
        whole += "".join(picture(p, p.stem.split("_", 3)[3].replace("_", " "), "32%") for p in paths)
    facts = ", ".join(f"{k} {v}" if isinstance(v, str) else f"{k} {v:.4g}" for k, v in last.items())
    body = f"""<h2>Held-out reconstruction</h2>
<p>{num_crops} crops of {side} pixels from pictures that training never sees; means of per-crop figures on 8-bit values.
A code's size is the count of numbers it keeps of a crop's {channels * side * side}.
PCA is fitted on the training pictures.</p>
{table(["code", "numbers a crop", "PSNR, dB", "SSIM"], cells)}
{picture(samples / "reconstructions.png", "rows: original, ours, 5x error of ours, PCA, 5x error of PCA")}
<h2>Held-out pictures, and the latent's three main components as colours</h2>
{whole}
<h2>Training</h2>
{picture(samples / "losses.png", "each loss term by name, unweighted, and held-out PSNR against images seen")}
<p>Last logged: {html.escape(facts)}</p>"""
    return page(folder.name, body, config)


_ORDER = ["original", "ours", "PCA", "5x_error", "raw_latent", "normalised_latent"]
