"""Trains a flow-matching transformer on latents: `python -m train.flow`. `--help` lists options and examples."""

from __future__ import annotations

import dataclasses
import sys
import time
from functools import partial

import torch
from torch import Tensor

from flux2.checkpoints import load_autoencoder, save_autoencoder
from flux2.images import save_png
from flux2.samplers import classifier_free
from flux2.teachers import build_teacher
from train import dist
from train.cache import CacheConfig, LatentCache, make_cache
from train.configs import describe, in_short, to_dict
from train.data import Augmentation, Pictures, batches, class_names, open_pictures
from train.flow_config import FLOW_PRESETS, FlowConfig, FlowOptions, parse_flow, sampling_shift
from train.flow_data import CachedLatents, LabelledCrops, find_autoencoder, newest_autoencoder
from train.flow_report import judge, make_law, plot_bins, plot_losses, write_flow_report
from train.flow_trainer import BINS, FlowTrainer, validate
from train.loop import choose_precision, read_log
from train.run import Run, exit_code
from train.sample import FLOW_FORMAT, decode_uint8, generate, grid_of
from train.vae import usable_compiler

VALIDATION_CROPS = 64  # of training pictures and of held-out ones, each at a time of every bin
FIXED_STEP = 2**31  # first step of crops that training never reaches
SHOWN_CLASSES, SHOWN_EACH = 8, 8  # rows and columns of the sheets of samples
AUTOENCODER = "autoencoder.safetensors"  # the run's own copy
WHOLE = 1e6  # crop scale at which a crop is the largest square of any picture


class FlowRun:
    """A run's data, trainer, validation and sheets of samples; `prepare` before the first step."""

    def __init__(self, config: FlowConfig, options: FlowOptions, run: Run, device: torch.device) -> None:
        self.config, self.options, self.run = config, options, run
        kept = run.folder / AUTOENCODER
        ae = load_autoencoder(kept) if run.start else find_autoencoder(config.autoencoder, options.out)
        if config.resolution % ae.cfg.multiple:
            raise ValueError(f"resolution: expected a multiple of {ae.cfg.multiple}, got {config.resolution}")
        self.ae, self.grid = ae.to(device), config.resolution // ae.cfg.multiple
        self.pictures, self.held_out = open_pictures(config.data, config.held_out, channels=ae.cfg.channels)
        self.cache = LatentCache(config.cache, ae) if config.cache not in ("", "auto") else None
        self.classes = sorted(set(class_names(self.pictures, config.data)))
        token_channels = 0
        if self.cache:
            self.cache.check_pictures(self.pictures, config.data)
            if options.repa_weights and config.repa != "none":
                self.cache.check_teacher(build_teacher(config.repa, ae.cfg.multiple, options.repa_weights))
            if config.sample_posterior and not self.cache.has_logvar:
                raise ValueError(f"{config.cache}: has no log-variance to draw from; drop --sample-posterior")
            self.classes = self.cache.classes
            token_channels = self.cache.token_channels(config.repa, config.resolution)
        self.trainer = FlowTrainer(
            config, ae, len(self.classes), device, options=options, token_channels=token_channels
        )
        self.law = make_law(config, self.trainer.shift)  # uniform warns
        self.sample_shift = sampling_shift(options.sample_shift, self.trainer.shift, ae.cfg.latent_channels)
        if run.start:
            self.trainer.restore(run.checkpoints.path(run.start))
        else:
            self.trainer.copy_from_main()

    @property
    def judges(self) -> bool:
        """Whether this process computes validation losses and samples."""
        return dist.is_main() or self.trainer.sharded  # a model that is spread computes on all

    def prepare(self) -> int:
        """Makes the cache where that is asked for, and encodes the validation crops; 0, or an interruption's exit code.

        The run's folder is there, and its copy of the autoencoder.
        """
        config, augmentation = self.config, self.config.augmentation
        if config.cache == "auto":
            folder = self.run.folder / "latents"
            share = -(-config.cached_crops // len(self.pictures))
            made = CacheConfig(
                autoencoder=str(self.run.folder / AUTOENCODER), out=folder, data=config.data, held_out=config.held_out,
                resolution=config.resolution, crops=share, crop_scale=augmentation.crop_scale, flip=augmentation.flip,
                teacher=config.repa, teacher_weights=self.options.repa_weights, seed=config.seed,
                device=self.options.device, max_bad=self.options.max_bad,
            )  # fmt: skip
            if code := dist.from_main(lambda: make_cache(made)):
                return code
            self.cache = LatentCache(folder, self.ae)
        if self.cache:
            augmentation = Augmentation(crop_scale=self.cache.crop_scale or (WHOLE, WHOLE), flip=self.cache.flip)
            mirror = config.augmentation.flip and self.cache.flip
            data = CachedLatents(
                self.cache, batch=config.batch, mirror=mirror, seed=config.seed, share=self.trainer.share
            )
        else:
            data = self._crops(self.pictures, augmentation, config.batch, self.trainer.share)
        self.data: LabelledCrops | CachedLatents = data
        self.crops = self._crops(self.pictures, augmentation, VALIDATION_CROPS)
        held_out = self._crops(self.held_out, augmentation, VALIDATION_CROPS, skip_bad=False)
        self.validation = {"fresh": self._latents(self.crops), "held_out": self._latents(held_out)}
        return 0

    def _crops(
        self,
        pictures: Pictures,
        augmentation: Augmentation,
        batch: int,
        share: dist.Share | None = None,
        *,
        skip_bad: bool = True,
    ) -> LabelledCrops:
        config = self.config
        return LabelledCrops(
            pictures, config.data, self.classes, resolution=config.resolution, batch=batch, augmentation=augmentation,
            seed=config.seed, share=share, skip_bad=skip_bad,
        )  # fmt: skip

    def _latents(self, crops: LabelledCrops) -> tuple[Tensor, Tensor]:
        """Normalised latents and labels of crops that training does not draw."""
        batch, size = crops[FIXED_STEP], 32
        parts = [
            self.trainer.inputs(FIXED_STEP, {"pixels": p}, first=i * size, tokens=False)[0]
            for i, p in enumerate(batch["pixels"].split(size))
        ]
        return torch.cat(parts), batch["labels"].to(parts[0].device)

    def validate(self, step: int) -> dict[str, float]:
        """Logs the normalised velocity loss of each set, in all and by time bin; the means by name."""
        record: dict = {"step": step, "nimg": step * self.config.batch, "training_bins": self.trainer.bins()}
        if not self.judges:
            return {}
        for name, (x, y) in self.validation.items():
            loss = validate(self.trainer.ema, x, y, precision=self.config.precision)
            record |= {f"{name}_velocity": loss.mean(), f"{name}_bins": loss.per_bin().tolist()}
        self.run.log.write(record)
        return {name: record[f"{name}_velocity"] for name in self.validation}

    def shown_labels(self) -> Tensor:
        """int64 [rows * SHOWN_EACH]: the labels of a sheet's rows."""
        rows = torch.arange(min(SHOWN_CLASSES, len(self.classes)), device=self.trainer.device)
        return rows.repeat_interleave(SHOWN_EACH)

    def draw(self, name: str) -> None:
        """Writes samples/NAME.png: a class a row, of the averaged weights, always from the same noise."""
        if not self.judges:
            return
        model = self.trainer.ema
        z = generate(
            lambda y: classifier_free(model, y, len(self.classes), self.options.guidance),
            self.shown_labels(),
            (model.in_channels, self.grid, self.grid),
            steps=self.options.sample_steps,
            shift=self.sample_shift,
            precision=self.config.precision,
        )
        if dist.is_main():
            save_png(self.run.folder / "samples" / f"{name}.png", grid_of(decode_uint8(self.ae, z), SHOWN_EACH))

    def draw_crops(self) -> None:
        """Writes samples/training_crops.png: crops of the same classes, that training could have drawn."""
        rows = len(self.shown_labels()) // SHOWN_EACH
        found = [crop for label in range(rows) for crop in self.crops.of_class(label, FIXED_STEP, SHOWN_EACH)]
        save_png(self.run.folder / "samples" / "training_crops.png", grid_of(torch.stack(found), SHOWN_EACH))

    def report(self, text: str) -> dict[str, float]:
        """Writes the report; the validation losses by set, {} on a process that does not write."""
        self.draw("samples")
        results = judge(self.trainer, self.validation) if self.judges else {}
        if not dist.is_main():
            return {}
        self.draw_crops()
        sampled = (
            f"{self.options.sample_steps} Euler steps, shift {self.sample_shift:.3g} (training: "
            f"{self.trainer.shift:.3g}), classifier-free guidance {self.options.guidance:g}."
        )
        return write_flow_report(
            self.run.folder, config=text, trainer=self.trainer, results=results, classes=self.classes,
            sampled=sampled,
        )  # fmt: skip

    def save(self, step: int) -> None:
        """Validates, draws samples, losses and losses by time bin, and writes the checkpoint."""
        self.validate(step)
        self.draw(f"step_{step:08d}")
        if dist.is_main():
            records, samples = read_log(self.run.folder / "log.jsonl"), self.run.folder / "samples"
            plot_losses(records, samples / "losses.png")
            plot_bins(records, self.law, samples / "time_bins.png")
        plain = {
            "format": FLOW_FORMAT,
            "transformer": to_dict(self.config)["transformer"],
            "in_channels": self.ae.cfg.latent_channels,
            "classes": self.classes,
            "train_shift": self.trainer.shift,
            "grid": self.grid,
        }
        self.run.save(step, self.trainer.tensors(), plain)


def train(config: FlowConfig, options: FlowOptions) -> int:
    """Runs `config`, under torchrun as one of its processes; as `train_on`."""
    with dist.joined(options.device, options.peer_timeout) as device:
        return train_on(device, config, options)


def train_on(device: torch.device, config: FlowConfig, options: FlowOptions) -> int:
    """Runs `config`; returns the exit code (0, or 128 + signal after an interruption that was saved)."""
    asked = in_short(config, FLOW_PRESETS)
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device))
    if options.compile and not usable_compiler(device):
        options = dataclasses.replace(options, compile=False)
    text = describe(config)
    if options.dry_run and not config.autoencoder and newest_autoencoder(options.out) is None:
        print(text + f"no run of train.vae in {options.out}: the autoencoder `photos` would be trained first")
        return 0
    run = Run(options, preset=config.preset, config=to_dict(config))
    flow = FlowRun(config, options, run, device)
    trainer = flow.trainer
    parameters = sum(p.numel() for p in trainer.model.parameters())
    counts = f"{len(flow.pictures)} training pictures in {len(flow.classes)} classes, {len(flow.held_out)} held out"
    print(text if options.dry_run else asked)
    print(f"{counts}; latents [{trainer.model.in_channels}, {flow.grid}, {flow.grid}]; {device}")
    print(f"{parameters:,} parameters, {config.precision}; {config.law}, shift {trainer.shift:.3g}, sampled at shift "
          f"{flow.sample_shift:.3g}")  # fmt: skip
    if options.dry_run:
        return 0
    run.open(text, device)
    dist.from_main(lambda: save_autoencoder(flow.ae, run.folder / AUTOENCODER))
    if code := flow.prepare():
        return code
    if not run.start:
        flow.validate(0)
    began = time.monotonic()
    data = partial(batches, flow.data, workers=config.workers, bad=run.bad_samples(len(flow.pictures)))
    code = run.loop(trainer, data, steps=config.steps, batch=config.batch, save=flow.save, samples=flow.data.names)
    if code is not None:
        return code
    print(
        f"trained {config.steps - run.start} steps in {time.monotonic() - began:.0f} s; writing the report", flush=True
    )
    means = flow.report(text)
    run.trackers.close()
    if not means:
        return 0
    print(f"samples: {run.folder / 'samples' / 'samples.png'}\nreport: {run.folder / 'report.html'}")
    print(
        f"normalised velocity loss {means['fresh']:.4f} on fresh crops of training pictures, "
        f"{means['held_out']:.4f} on held-out pictures (EMA, mean of {BINS} time bins)"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """The program: exit code 0; 2 on bad input; 130, 143 or 138 after an interruption that was saved."""
    return exit_code(lambda: train(*parse_flow(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
