"""One flow model of a comparison: trained on cached latents, judged at checkpoints by velocity loss and samples.

A cell is a run folder: config, log, the newest checkpoint, and evaluations/, one file a judged step. It goes on where
it was stopped, in training or between two evaluations of a checkpoint, to the same numbers. Data order, timesteps,
noise and the noise that samples start from depend on the seed alone: cells of one seed are compared in pairs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2.distances import Moments, frechet_distance
from flux2.features import Features
from flux2.images import save_png
from flux2.samplers import Velocity, classifier_free
from flux2.tensor_files import save_json
from train.cell_data import Latents
from train.configs import describe, to_dict
from train.data import batches
from train.flow_config import FlowConfig, FlowOptions
from train.flow_data import CachedLatents
from train.flow_trainer import FlowTrainer, validate
from train.loop import Interrupt, Interrupted
from train.run import Run
from train.sample import FLOW_FORMAT, decode_uint8, generate, grid_of, random_labels

SHEET = 64  # samples shown
UNSAVED = 2500  # steps between checkpoints, about


@dataclass(frozen=True, kw_only=True)
class Judging:
    """When and how a cell is judged: the averaged weights, by Euler samples without guidance."""

    every: int
    """Steps between judged checkpoints; the last step is always judged."""
    sampling_shifts: tuple[float, ...]
    """Each checkpoint is sampled at each of these."""
    samples: int
    """Samples a Frechet distance."""
    sample_steps: int = 50
    """Euler steps a sample."""
    sample_batch: int = 256
    """Samples computed at once."""

    def __post_init__(self) -> None:
        for name in ("every", "samples", "sample_steps", "sample_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        shifts = self.sampling_shifts
        if not shifts or not all(0 < s < math.inf for s in shifts) or len({key_of(s) for s in shifts}) < len(shifts):
            raise ValueError(f"sampling_shifts: expected different numbers above 0, got {shifts}")

    def judged(self, steps: int) -> list[int]:
        """The judged steps of a run."""
        return [*range(self.every, steps, self.every), steps]


def key_of(shift: float) -> str:
    """What a shift is called in files."""
    return f"{shift:.2f}"


class _Unlabelled(CachedLatents):
    """Samples of no class."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        batch = super().__getitem__(step)
        return {**batch, "labels": torch.zeros_like(batch["labels"])}


class _Cell:
    """A cell's trainer and evaluations."""

    def __init__(
        self, config: FlowConfig, latents: Latents, judging: Judging, features: Features, run: Run,
        device: torch.device, options: FlowOptions, check: Callable[[], None],
    ) -> None:  # fmt: skip
        self.config, self.latents, self.judging, self.features = config, latents, judging, features
        self.run, self.device, self.check = run, device, check
        cache = latents.cache
        self.classes = [] if config.label_dropout == 1 else cache.classes
        channels = cache.token_channels(config.repa, config.resolution)
        self.trainer = FlowTrainer(
            config, latents.ae, len(self.classes), device, options=options, token_channels=channels
        )
        data = CachedLatents if self.classes else _Unlabelled
        mirror = config.augmentation.flip and cache.flip
        self.data = data(cache, batch=config.batch, mirror=mirror, seed=config.seed)
        if run.start:
            self.trainer.restore(run.checkpoints.path(run.start))

    def file(self, step: int) -> Path:
        return self.run.folder / "evaluations" / f"step_{step:08d}.json"

    def save(self, step: int) -> None:
        """Writes the checkpoint and judges it, if its step is one of those."""
        self.check()
        self.trainer.bins()  # lets go of what it saw
        plain = {
            "format": FLOW_FORMAT,
            "transformer": to_dict(self.config)["transformer"],
            "in_channels": self.latents.channels,
            "classes": self.classes,
            "train_shift": self.trainer.shift,
            "grid": self.latents.held_out.shape[-1],
        }
        self.run.save(step, self.trainer.tensors(), plain)
        self.judge(step)

    def judge(self, step: int) -> None:
        """Writes the evaluation of the weights as they are, but for what is there already. Interrupted by a signal,
        even one that came when all was written: it would be lost."""
        if step not in self.judging.judged(self.config.steps):
            return
        file = self.file(step)
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        with Interrupt() as interrupt:
            if not found:
                labels = self.latents.labels if self.classes else torch.zeros_like(self.latents.labels)
                batch, precision = self.judging.sample_batch, self.config.precision
                loss = validate(self.trainer.ema, self.latents.held_out, labels, precision=precision, batch=batch)
                found = {"nimg": step * self.config.batch, "velocity": loss.mean(), "bins": loss.per_bin().tolist()}
                save_json(file, {**found, "fd": {}})
                found["fd"] = {}
            for shift in self.judging.sampling_shifts:
                if key_of(shift) not in found["fd"]:
                    found["fd"][key_of(shift)] = self._distance(shift, interrupt)
                    save_json(file, found)
            if interrupt.signal:
                raise Interrupted(interrupt.signal)

    def _distance(self, shift: float, interrupt: Interrupt) -> float:
        """Frechet distance of samples at a shift to the reference."""
        moments, judging = Moments(self.features.channels), self.judging
        for first in range(0, judging.samples, judging.sample_batch):
            if interrupt.signal:
                raise Interrupted(interrupt.signal)
            self.check()
            images = self.samples(shift, first, min(judging.sample_batch, judging.samples - first))
            moments.add(self.features(images.to(self.device))["pool"])
        return frechet_distance(moments, self.latents.reference)

    def samples(self, shift: float, first: int, num: int) -> Tensor:
        """Samples first .. first + num - 1 of the averaged weights, uint8 [num, 3, R, R]; their classes are random."""
        model, judging, config = self.trainer.ema, self.judging, self.config
        labels = torch.zeros(num, dtype=torch.int64, device=self.device)
        if self.classes:
            labels = random_labels(len(self.classes), num, seed=config.seed, first_index=first).to(self.device)
        grid = self.latents.held_out.shape[-1]

        def velocity_of(y: Tensor) -> Velocity:
            return classifier_free(model, y, len(self.classes), 1.0)

        z = generate(
            velocity_of, labels, (self.latents.channels, grid, grid), steps=judging.sample_steps, shift=shift,
            seed=config.seed, first_index=first, batch=judging.sample_batch, precision=config.precision,
        )  # fmt: skip
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return decode_uint8(self.latents.ae, z)

    def evaluations(self, end: int) -> list[dict[str, Any]]:
        """One for each judged step up to `end`; ValueError if a file of them is gone."""
        steps = [s for s in self.judging.judged(self.config.steps) if s <= end]
        if missing := [s for s in steps if not self.file(s).is_file()]:
            raise ValueError(f"{self.run.folder}: no evaluation of step {missing[0]}; remove the folder to train again")
        return [json.loads(self.file(s).read_text()) for s in steps]


def save_every(every: int) -> int:
    """Steps between checkpoints: the divisor of `every` nearest UNSAVED, so that each judged step is one."""
    return min((d for d in range(1, every + 1) if every % d == 0), key=lambda d: abs(math.log(d / UNSAVED)))


def train_cell(
    config: FlowConfig,
    latents: Latents,
    judging: Judging,
    features: Features,
    *,
    folder: Path,
    device: torch.device,
    options: FlowOptions | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Trains, or goes on training, the model of `config` in `folder`; what was found at each judged step, in order:
    nimg, velocity, bins [10], fd {shift: distance}.

    config.precision is "fp32" or "bf16"; config.label_dropout 1 is a model without classes. check: called before each
    checkpoint and each batch of samples; what it raises passes through. samples.png shows the end at its best shift.
    The last checkpoint stays: `drop_checkpoints`. Interrupted by a signal, with all saved; FloatingPointError where too
    many updates in a row were not finite.
    """
    options = options or FlowOptions()
    options = dataclasses.replace(
        options, out=folder.parent, name=folder.name, resume="auto", save_every=save_every(judging.every), keep=1
    )
    made_with = latents.cache.manifest["content"]
    identity = {"autoencoder": made_with["autoencoder"], "pictures": made_with["pictures"]}
    whole = {**to_dict(config), "judging": to_dict(judging), "features": features.identity, "latents": identity}
    run = Run(options, preset=config.preset, config=whole)
    cell = _Cell(config, latents, judging, features, run, device, options, check)
    run.open(describe(config), device)
    if run.start:
        cell.judge(run.start)
        cell.evaluations(run.start)  # before more steps are spent
    else:
        shutil.rmtree(folder / "evaluations", ignore_errors=True)  # of weights that are gone
    data = partial(batches, cell.data, workers=config.workers)
    code = run.loop(cell.trainer, data, steps=config.steps, batch=config.batch, save=cell.save, samples=cell.data.names)
    if code is not None:
        raise Interrupted(code - 128)
    found = cell.evaluations(config.steps)
    best = min(judging.sampling_shifts, key=lambda s: found[-1]["fd"][key_of(s)])
    save_png(folder / "samples.png", grid_of(cell.samples(best, 0, min(SHEET, judging.samples)), 8))
    return found


def drop_checkpoints(folder: Path) -> None:
    """Frees what a cell's weights take up, once its result is kept elsewhere: without them it would start again."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
