"""Timestep law, shift and REPA on narrow (16) and wide (128) latents at toy size: does the article's ordering show?

    python benchmarks/flow_evidence.py                    # 72 cells, about 25 CPU-minutes; goes on where it was stopped
    python benchmarks/flow_evidence.py --seeds 1          # a third of it

Two autoencoders of the preset `photos`, equal but for their 4 and 32 latent channels (16 and 128 a token), trained
alike; a latent cache of each; then one small transformer a cell (law x shift x REPA x seed), all of one size, with the
same crops and steps, without classes. The FLUX.2 representation comparison says: logit-normal and plateau beat uniform,
a wide latent wants a larger shift than a narrow one, and REPA helps every latent.

The metric is the normalised velocity loss on photographs that neither network saw, the plain mean over ten bins of t
(`flux2.flow`), which knows no training law. Beside it stands the Frechet distance of 256 samples to crops of the
training photographs, on the means and deviations of colours and of four octaves of detail. A cell is written to the
JSON when it is done. The table and the picture show means over seeds. A claim is judged by the mean of the differences
between cells that are alike in all else: below twice its standard error there is none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]
from flux2 import TransformerConfig, load_autoencoder  # noqa: E402 - after the path
from flux2.checkpoints import save_json  # noqa: E402
from flux2.distances import Moments, frechet_distance  # noqa: E402
from flux2.images import from_uint8  # noqa: E402
from flux2.losses import laplacian_pyramid  # noqa: E402
from flux2.samplers import classifier_free  # noqa: E402
from flux2.schedules import auto_shifts  # noqa: E402
from train import data, vae  # noqa: E402
from train.cache import LatentCache, fingerprint  # noqa: E402
from train.data import Augmentation, CropBatches, open_pictures  # noqa: E402
from train.flow_config import FlowConfig  # noqa: E402
from train.flow_data import CachedLatents  # noqa: E402
from train.flow_trainer import FlowTrainer, validate  # noqa: E402
from train.loop import environment  # noqa: E402
from train.sample import decode_uint8, generate  # noqa: E402

CPU = torch.device("cpu")
LAWS, SHIFTS, TEACHERS = ("uniform", "logit_normal", "plateau_logit_normal"), (1.0, 2.95), ("none", "hog")
SHOWN = {"uniform": "uniform", "logit_normal": "logit-normal", "plateau_logit_normal": "plateau"}
CROPS = Augmentation(crop_scale=(0.7, 1.6))
SAMPLES, SAMPLE_STEPS, SAMPLE_SHIFT = 256, 20, 2.95
FIXED_STEP = 2**31  # crops that training never reaches


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every cell gets; a JSON of another budget is not gone on with."""

    steps: int = 250
    batch: int = 32
    lr: float = 2e-3
    width: int = 128
    depth: int = 4
    resolution: int = 64
    crops: int = 128
    held_out: int = 128
    autoencoder_steps: int = 100

    def config(self, law: str, shift: float, repa: str, seed: int) -> FlowConfig:
        shape = TransformerConfig(
            width=self.width,
            depth=self.depth,
            heads=self.width // 64 or 1,
            repa_depth=self.depth // 2,
            time_scale=1000.0,
        )
        return FlowConfig(
            preset="evidence", transformer=shape, resolution=self.resolution, batch=self.batch, steps=self.steps,
            lr=self.lr, warmup=self.steps // 20, final_lr=0.02, betas=(0.9, 0.99), ema_decays=(0.98,),
            law=law, shift=shift,  # type: ignore[arg-type]
            repa=repa, repa_hidden=256, seed=seed, precision="fp32", label_dropout=1.0,
        )  # fmt: skip


def features(images: Tensor) -> np.ndarray:
    """uint8 [N, 3, R, R] -> fp64 [N, 18]: mean, deviation and deviation of four octaves, of each colour."""
    x = from_uint8(images)
    bands = [b.flatten(2).std(2) for b in laplacian_pyramid(x, 5)[:4]]
    return torch.cat((x.flatten(2).mean(2), x.flatten(2).std(2), *bands), 1).double().numpy()


def moments(images: Tensor) -> Moments:
    """Of the features of uint8 [N, 3, R, R]."""
    found = Moments(18)
    found.add(torch.from_numpy(features(images)))
    return found


class Latents:
    """One autoencoder, its cache, held-out latents, and the features of training crops."""

    def __init__(self, path: str, work: Path, budget: Budget) -> None:
        self.ae = load_autoencoder(path).requires_grad_(False)
        self.channels = self.ae.cfg.latent_channels
        folder = work / f"latents-{self.channels}-{fingerprint(self.ae)[:8]}"
        sizes = ["--crops", str(budget.crops), "--resolution", str(budget.resolution)]
        scale = ["--crop-scale", *map(str, CROPS.crop_scale)]
        if data.main(["cache", "--autoencoder", path, "--out", str(folder), "--teacher", "hog", *sizes, *scale]):
            raise SystemExit("the latent cache was not made")
        self.cache = LatentCache(folder, self.ae)
        train, held_out = open_pictures("photographs")
        size = {"resolution": budget.resolution, "batch": budget.held_out, "augmentation": CROPS, "seed": 0}
        with torch.no_grad():
            parts = CropBatches(held_out, **size)[FIXED_STEP].split(32)
            self.held_out = torch.cat([self.ae.encode(from_uint8(p)) for p in parts])
        self.real = moments(CropBatches(train, **{**size, "batch": SAMPLES})[FIXED_STEP])


def run_cell(latents: Latents, budget: Budget, law: str, shift: float, repa: str, seed: int) -> dict:
    """Trains one model and measures it."""
    config = budget.config(law, shift, repa, seed)
    began = time.process_time()
    token_channels = latents.cache.token_channels(repa, budget.resolution)
    trainer = FlowTrainer(config, latents.ae, 0, CPU, token_channels=token_channels)
    crops = CachedLatents(latents.cache, batch=config.batch, mirror=True, seed=seed)
    for step in range(config.steps):
        batch = crops[step]
        trainer.step(step, {**batch, "labels": torch.zeros_like(batch["labels"])})
        if step % 50 == 49 and any(g.read()[0] for g in trainer.guards.values()):
            raise FloatingPointError(f"{law}, shift {shift}, {repa}, seed {seed}: an update was not finite")
        trainer.seen = []
    x = latents.held_out
    loss = validate(trainer.ema, x, torch.zeros(len(x), dtype=torch.int64))
    z = generate(
        lambda y: classifier_free(trainer.ema, y, 0, 1.0),
        torch.zeros(SAMPLES, dtype=torch.int64),
        (x.shape[1], x.shape[2], x.shape[3]),
        steps=SAMPLE_STEPS,
        shift=SAMPLE_SHIFT,
        seed=seed,
    )
    distance = frechet_distance(moments(decode_uint8(latents.ae, z)), latents.real)
    seconds = time.process_time() - began
    return {"held_out": loss.mean(), "bins": loss.per_bin().tolist(), "frechet": distance, "cpu_seconds": seconds}


def name_of(channels: int, law: str, shift: float, repa: str, seed: int) -> str:
    return f"{channels}/{law}/{shift:g}/{repa}/{seed}"


class Table:
    """Means over seeds, and what they say."""

    def __init__(self, cells: dict[str, dict], metric: str) -> None:
        self.metric, self.values = metric, {}
        for name, cell in cells.items():
            channels, law, shift, repa, seed = name.split("/")
            self.values[int(channels), law, float(shift), repa, int(seed)] = cell[metric]
        self.widths = sorted({k[0] for k in self.values})

    def of(self, channels: int, law: str, shift: float, repa: str) -> list[float]:
        """Values by seed."""
        return [v for k, v in sorted(self.values.items()) if k[:4] == (channels, law, shift, repa)]

    def rows(self) -> list[str]:
        """The table, a line a cell."""
        lines = [f"{'channels':>8} {'law':<13}{'shift':>6}  {'without REPA':<18}{'with REPA':<18}"]
        for channels, law, shift in product(self.widths, LAWS, SHIFTS):
            cells = [self.of(channels, law, shift, r) for r in TEACHERS]
            shown = [f"{np.mean(c):.4f} +- {np.std(c):.4f}" if c else "-" for c in cells]
            lines.append(f"{channels:>8} {SHOWN[law]:<13}{shift:>6g}  {shown[0]:<18}{shown[1]:<18}")
        return lines

    def compare(self, channels: int, better: dict, worse: dict) -> tuple[float, float]:
        """Mean and standard error, over all cells of that width that are alike in all else, of worse minus better."""
        names = ("law", "shift", "repa")
        differences = []
        for key, value in self.values.items():
            given = dict(zip(names, key[1:4], strict=True))
            if key[0] == channels and all(given[k] == v for k, v in better.items()):
                other = {**given, **worse}
                twin = (channels, other["law"], other["shift"], other["repa"], key[4])
                if twin in self.values:
                    differences.append(self.values[twin] - value)
        if not differences:
            return math.nan, math.nan
        return float(np.mean(differences)), float(np.std(differences) / math.sqrt(len(differences)))

    def claims(self) -> list[str]:
        """Each claim of the article and whether it shows here."""
        asked: list[tuple[int, str, dict, dict]] = [
            (width, f"{width} channels: {SHOWN[law]} beats uniform", {"law": law}, {"law": "uniform"})
            for width in self.widths
            for law in LAWS[1:]
        ]
        low, high = SHIFTS
        for width in self.widths:
            want, other = (low, high) if auto_shifts(width)[0] < math.sqrt(low * high) else (high, low)
            asked.append(
                (width, f"{width} channels: shift {want:g} beats {other:g}", {"shift": want}, {"shift": other})
            )
        asked += [(w, f"{w} channels: REPA helps", {"repa": "hog"}, {"repa": "none"}) for w in self.widths]
        found = [(claim, *self.compare(width, better, worse)) for width, claim, better, worse in asked]
        if len(self.widths) == 2:
            (a, ea), (b, eb) = (self.compare(w, {"shift": high}, {"shift": low}) for w in self.widths)
            claim = f"shift {high:g} suits {self.widths[1]} channels better than {self.widths[0]}"
            found.append((claim, b - a, math.hypot(ea, eb)))
        lines = []
        for claim, gain, error in found:
            verdict = "no data" if gain != gain else "shows" if gain > 2 * error else "no difference"
            verdict = "the opposite shows" if gain < -2 * error else verdict
            lines.append(f"{claim:<45} {verdict:<20} {gain:+.4f} +- {error:.4f}")
        return lines


def draw(cells: dict[str, dict], path: Path) -> None:
    """Bars of both metrics by law, shift and REPA, a row a width; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = {"held_out": "normalised velocity loss, held-out photographs", "frechet": "Frechet distance of samples"}
    widths = Table(cells, "held_out").widths
    figure, axes = plt.subplots(len(widths), 2, figsize=(12, 3.2 * len(widths)), constrained_layout=True, squeeze=False)
    for row, column in product(range(len(widths)), range(2)):
        metric, title = list(tables.items())[column]
        table, axis = Table(cells, metric), axes[row][column]
        lowest = min(v for k, v in table.values.items() if k[0] == widths[row])
        highest = max(v for k, v in table.values.items() if k[0] == widths[row])
        for i, (shift, repa) in enumerate(product(SHIFTS, TEACHERS)):
            runs = [table.of(widths[row], law, shift, repa) or [math.nan] for law in LAWS]
            label = f"shift {shift:g}, " + ("REPA" if repa != "none" else "no REPA")
            colour = ("tab:blue", "tab:cyan", "tab:red", "tab:orange")[i]
            at = np.arange(3) + 0.2 * (i - 1.5)
            axis.bar(at, [np.mean(r) for r in runs], 0.18, color=colour, label=label)
            for x, r in zip(at, runs, strict=True):
                axis.plot([x] * len(r), r, "k.", ms=3)
        axis.set_xticks(range(3), [SHOWN[law] for law in LAWS])
        axis.set_ylim(max(0.0, lowest - 0.3 * (highest - lowest)), highest + 0.1 * (highest - lowest))
        axis.set_title(f"{widths[row]} channels: {title}", fontsize=9)
    axes[0][0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def autoencoder(channels: int, work: Path, budget: Budget) -> str:
    """Path of the autoencoder of so many channels a token, trained if it is not there."""
    run = work / f"autoencoder-{channels}"
    if not (run / "report.html").is_file():
        flags = ["--autoencoder.z-channels", str(channels // 4), "--steps", str(budget.autoencoder_steps)]
        flags += ["--out", str(work), "--name", run.name, "--resume", "auto"]
        if vae.main(flags):
            raise SystemExit(f"the autoencoder of {channels} channels was not trained")
    return str(run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "flow-evidence.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "flow_evidence.png")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence", help="autoencoders and latent caches")
    parser.add_argument(
        "--autoencoders", nargs="+", default=[], help="instead of training those of 16 and 128 channels"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Budget.steps)
    parser.add_argument("--crops", type=int, default=Budget.crops)
    parser.add_argument("--held-out", type=int, default=Budget.held_out)
    parser.add_argument("--resolution", type=int, default=Budget.resolution)
    given = parser.parse_args(argv)
    budget = Budget(steps=given.steps, crops=given.crops, held_out=given.held_out, resolution=given.resolution)
    result: dict = {"budget": asdict(budget), "environment": environment(CPU), "cells": {}}
    result["environment"].pop("command")  # may name folders of the machine
    if given.out.is_file():
        there = json.loads(given.out.read_text())
        if there["budget"] != result["budget"]:
            raise SystemExit(f"{given.out} is of another budget, {there['budget']}: choose another --out")
        result["cells"] = there["cells"]
    paths = given.autoencoders or [autoencoder(c, given.work, budget) for c in (16, 128)]
    sets = [Latents(path, given.work, budget) for path in paths]
    wanted = list(product(range(given.seeds), sets, LAWS, SHIFTS, TEACHERS))
    for i, (seed, latents, law, shift, repa) in enumerate(wanted, 1):
        name = name_of(latents.channels, law, shift, repa, seed)
        if name in result["cells"]:
            continue
        cell = result["cells"][name] = run_cell(latents, budget, law, shift, repa, seed)
        save_json(given.out, result)
        figures = f"{cell['held_out']:.4f}, FD {cell['frechet']:.4f}, {cell['cpu_seconds']:.0f} s"
        print(f"{i}/{len(wanted)} {name}: {figures}", flush=True)
    for metric, title in (("held_out", "normalised velocity loss, held-out photographs"), ("frechet", "FD of samples")):
        table = Table(result["cells"], metric)
        print("\n".join(["", title, *table.rows(), "", *table.claims()]))
    draw(result["cells"], given.picture)
    print(f"\n{given.out}\n{given.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
