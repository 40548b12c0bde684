"""What each part of the recipe buys: the default preset with losses added one by one, on the bundled photographs.

    python benchmarks/recipe.py                  # about 20 minutes on 2 CPU cores; goes on where it was stopped
    python benchmarks/recipe.py --steps 20       # the same in small, to see that it runs
    python benchmarks/recipe.py --docs           # the tables of docs/recipe.md from benchmarks/results/recipe.json

Each row is one run of `python -m train.vae`, kept under --out, with the flags that ROWS shows. Of its averaged weights:
PSNR and SSIM on the 256 held-out crops; R^2 of a linear probe from one latent position to the teacher's tokens (HOG),
fitted on training crops and judged on the held-out ones; the slope of the raw latent's spectrum on held-out crops of
256 pixels. Then one step of the whole recipe is timed phase by phase, and docs/recipe.png drawn: curves of all rows,
and the latent of one held-out photograph as colours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]

from flux2.checkpoints import load_autoencoder  # noqa: E402 - after the path
from flux2.images import from_uint8  # noqa: E402
from flux2.metrics import psnr, ssim  # noqa: E402
from flux2.probes import linear_probe_r2, spectrum_slope  # noqa: E402
from flux2.teachers import build_teacher  # noqa: E402
from flux2.tensor_files import save_json  # noqa: E402
from train.data import CropBatches, embedded_photographs, held_out_crops, training_pixels  # noqa: E402
from train.loop import choose_device, environment, peak_memory_bytes, read_log  # noqa: E402
from train.report import latent_rgb  # noqa: E402
from train.vae import plain_crops, reconstruct_uint8  # noqa: E402
from train.vae_config import parse_vae  # noqa: E402
from train.vae_trainer import VaeTrainer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "recipe.json"
PAGE = ROOT / "docs" / "recipe.md"
PROBE_CROPS = 1024  # training crops that the probe is fitted on
SPECTRUM_SIDE, SPECTRUM_CROPS = 256, 32

PIXEL = ["--laplacian-weight", "0", "--align-weight", "0"]
PERCEPTUAL = ["--align-weight", "0"]
GAN = ["--gan.weight", "0.05", "--gan.width", "32", "--gan.augment", "1", "--gan.start.step", "50",
       "--gan.start.warmup", "50"]  # fmt: skip
ALIGNED = ["--align-weight", "0.05"]
EQ = ["--eq-probability", "0.25", "--eq-scales", "0.5", "1"]
ROWS: dict[str, list[str]] = {
    "pixel": PIXEL,
    "+ perceptual": PERCEPTUAL,
    "+ GAN": [*PERCEPTUAL, *GAN],
    "+ alignment": [*GAN, *ALIGNED],
    "+ EQ": [*GAN, *ALIGNED, *EQ],
}


def run_row(label: str, flags: list[str], out: Path, steps: int) -> Path:
    """Trains a row unless it is there, showing its progress. Returns the run's folder."""
    name = re.sub(r"\W+", "-", label).strip("-").lower()
    command = [sys.executable, "-m", "train.vae", *flags, "--steps", str(steps)]
    command += ["--out", str(out), "--name", name]
    print(f"\n{label}: {' '.join(command[1:])}", flush=True)
    finished = subprocess.run([*command, "--resume", "auto"], cwd=ROOT).returncode
    if finished:
        sys.exit(f"{label}: training ended with exit code {finished}; run this again to go on")
    return out / name


@torch.no_grad()
def measure_row(folder: Path) -> dict[str, float]:
    """The figures of one run."""
    ae = load_autoencoder(folder)
    config, _ = parse_vae([])
    train, held_out = embedded_photographs()
    crops = held_out_crops(held_out)
    recon = reconstruct_uint8(ae, crops)
    teacher = build_teacher("hog", ae.cfg.multiple)
    x, x_test = training_pixels(plain_crops(config, train), PROBE_CROPS), from_uint8(crops)
    z, z_test = (torch.cat([ae.encode(part) for part in pixels.split(64)]) for pixels in (x, x_test))
    large = from_uint8(held_out_crops(held_out, num_crops=SPECTRUM_CROPS, resolution=SPECTRUM_SIDE))
    raw = torch.cat([ae.posterior(part).mode() for part in large.split(8)])
    records = [r for r in read_log(folder / "log.jsonl") if "images_per_second" in r]
    return {
        "psnr_db": psnr(crops, recon).mean().item(),
        "ssim": float(ssim(crops, recon).mean()),
        "probe_r2": linear_probe_r2(z, teacher(x), z_test, teacher(x_test)),
        "spectrum_slope": spectrum_slope(raw),
        "images_per_second": median(r["images_per_second"] for r in records[len(records) // 2 :]),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in records),
    }


class Stopwatch:
    """Stands in for VaeTrainer.phase: seconds of each phase by itself, those nested in it taken off."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self._open: list[float] = []  # seconds of nested phases, one for each phase that is open

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._open.append(0.0)
        began = self._now()
        yield
        took = self._now() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + took - self._open.pop()
        if self._open:
            self._open[-1] += took

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def time_phases(flags: list[str], *, steps: int, warmup: int = 2) -> dict[str, Any]:
    """Milliseconds of each phase of one step, medians over `steps`, and the most memory held."""
    device = choose_device("auto")
    config, _ = parse_vae([*flags, "--gan.start.step", "0", "--gan.start.warmup", "0"])
    trainer = VaeTrainer(config, device, compiled=False)
    batches = CropBatches(
        embedded_photographs()[0], resolution=config.resolution, batch=config.batch,
        augmentation=config.augmentation, seed=0,
    )  # fmt: skip
    found: list[dict[str, float]] = []
    for step in range(warmup + steps):
        batch = batches[step]
        watch = Stopwatch(device)
        trainer.phase = watch  # type: ignore[assignment]
        with watch("the rest"):
            trainer.step(step, batch)
        if step >= warmup:
            found.append(watch.seconds)
    names = list(dict.fromkeys(n for seconds in found for n in seconds))
    phases = {n: 1e3 * median(s.get(n, 0.0) for s in found) for n in names}
    return {"ms": phases, "peak_memory_bytes": peak_memory_bytes(device), "steps": steps}


def rows_table(results: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| losses | PSNR, dB | SSIM | probe R² | spectrum slope | images/s | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, r in results["rows"].items():
        lines.append(
            f"| {label} | {r['psnr_db']:.2f} | {r['ssim']:.4f} | {r['probe_r2']:.3f} | {r['spectrum_slope']:.2f} |"
            f" {r['images_per_second']:.0f} | {r['peak_memory_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def phases_table(results: dict[str, Any]) -> str:
    """The phases in Markdown, longest first."""
    phases = results["phases"]["ms"]
    total = sum(phases.values())
    lines = ["| phase | ms | share |", "|---|---|---|"]
    for name, ms in sorted(phases.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {ms:.0f} | {ms / total:.0%} |")
    return "\n".join([*lines, f"| a step of 16 crops | {total:.0f} | |"]) + "\n"


@torch.no_grad()
def draw(folders: dict[str, Path], path: Path) -> None:
    """Curves of all rows, and below them the raw latent of a held-out photograph, three main components as colours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = {label: read_log(folder / "log.jsonl") for label, folder in folders.items()}
    figure = plt.figure(figsize=(15, 7.6), constrained_layout=True)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = top.subplots(1, 4)
    panels = (
        (("held_out_psnr",), "held-out PSNR, dB"),
        (("align",), "alignment loss, 1 - cosine"),
        (
            ("d_real_accuracy", "d_fake_accuracy"),
            "accuracy of the discriminator on photographs,\nand on reconstructions (dashed)",
        ),
        (("grad_norm",), "gradient norm before clipping"),
    )
    for axis, (keys, title) in zip(axes, panels, strict=True):
        for colour, (label, records) in enumerate(logs.items()):
            for key, style in zip(keys, ("-", "--"), strict=False):
                points = [(r["nimg"], r[key]) for r in records if key in r]
                if points:
                    axis.plot(*zip(*points, strict=True), style, c=f"C{colour}", label=label if style == "-" else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("images")
        axis.legend(fontsize=7)
    axes[3].set_yscale("log")
    image = torch.from_numpy(embedded_photographs()[1][1][:288, :448].copy()).permute(2, 0, 1)[None]
    pictures = {"held-out photograph": image[0].permute(1, 2, 0).numpy()}
    for label, folder in folders.items():
        pictures[label] = latent_rgb(load_autoencoder(folder).posterior(from_uint8(image)).mode()[0])
    for axis, (label, picture) in zip(bottom.subplots(1, len(pictures)), pictures.items(), strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(label, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def machine(results: dict[str, Any]) -> str:
    env = results["environment"]
    gpu = "" if env["gpu"] == "none" else f", {env['gpu']}"
    threads = f"{env['threads']} thread" + ("s" if env["threads"] > 1 else "")
    return f"{env['processor']}{gpu}, {threads}, torch {env['packages']['torch']}, commit {env['commit']}.\n"


def write_docs() -> None:
    """Puts the committed figures between the marks of docs/recipe.md."""
    results, text = json.loads(RESULTS.read_text()), PAGE.read_text()
    for name, table in (("rows", rows_table(results)), ("phases", phases_table(results))):
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = f"{table}\n{machine(results)}"
        text, count = marked.subn(lambda m, body=body: m[1] + body + m[2], text)
        assert count == 1, name
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "recipe", help="folder of the runs")
    parser.add_argument("--steps", type=int, default=300, help="updates a row; the committed figures have 300")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/recipe.md and stop")
    args = parser.parse_args()
    if args.docs:
        return write_docs()
    folders = {label: run_row(label, flags, args.out, args.steps) for label, flags in ROWS.items()}
    env = environment(choose_device("auto"))
    env.pop("command")  # may name folders of the machine
    results = {
        "environment": env,
        "steps": args.steps,
        "flags": {label: " ".join(flags) for label, flags in ROWS.items()},
        "rows": {label: measure_row(folder) for label, folder in folders.items()},
        "phases": time_phases(ROWS["+ alignment"], steps=min(20, args.steps)),
    }
    save_json(args.results, results)
    draw(folders, PAGE.with_suffix(".png") if args.results == RESULTS else args.results.with_suffix(".png"))
    print("\n" + rows_table(results) + "\n" + phases_table(results) + "\n" + machine(results) + f"{args.results}")


if __name__ == "__main__":
    main()
