"""Trains an image autoencoder: `python -m train.vae --compile`. `--help` lists presets' options and examples."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from functools import partial

import torch
from torch import Tensor

from flux2.autoencoder import AUTOENCODERS, AutoEncoder, AutoencoderConfig
from flux2.checkpoints import FORMAT, load_autoencoder
from flux2.images import from_uint8, to_uint8
from flux2.latents import fit_latent_statistics
from flux2.linear_code import LinearCode, fit_context_decoder, fit_linear_code, warm_start, warm_start_energies
from flux2.metrics import psnr
from flux2.rae import RAE, RAEConfig
from kernels.dispatch import resolve
from train import dist
from train.configs import RunOptions, describe, differences, in_short, to_dict
from train.data import (
    Augmentation,
    CropBatches,
    Pictures,
    batches,
    held_out_crops,
    open_pictures,
    training_pixels,
)
from train.loop import choose_precision, cpp_compiler
from train.report import write_report
from train.run import Run, exit_code
from train.vae_config import VAE_PRESETS, VaeConfig, parse_vae
from train.vae_trainer import VaeTrainer

HELD_OUT_CROPS, HELD_OUT_SIDE = 256, 64
FITTED_PIXELS = 4096 * 64 * 64  # that PCA, in closed form, looks at, whatever the crop size
STATISTICS_CROPS = 1024  # that latent statistics are fitted on


@torch.no_grad()
def reconstruct_uint8(ae: AutoEncoder | RAE, images: Tensor, *, batch: int = 32) -> Tensor:
    """uint8 [N, C, H, W] of any size -> reconstructions, uint8 of the same shape, on the CPU; in the weights' dtype."""
    device = next(ae.parameters()).device
    parts = [to_uint8(ae.reconstruct(from_uint8(part.to(device)))).cpu() for part in images.split(batch)]
    return torch.cat(parts)


def plain_crops(config: VaeConfig, pictures: Pictures) -> CropBatches:
    """Training crops as they are in the photographs: native scale, no augmentation. What yardsticks are fitted on."""
    return CropBatches(
        pictures, resolution=config.resolution, batch=16, augmentation=Augmentation(flip=False), seed=config.seed
    )


def fit_pca(config: VaeConfig, crops: CropBatches) -> tuple[LinearCode, Tensor]:
    """All principal components of the autoencoder's blocks, and the pixels of `crops` they were fitted on."""
    x = training_pixels(crops, FITTED_PIXELS // config.resolution**2)
    shape = config.autoencoder
    return fit_linear_code(x, num_components=shape.channels * shape.downsample**2, block=shape.downsample), x


def usable_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build kernels here; warns once where it cannot."""
    if device.type == "cpu" and cpp_compiler() is None:
        warnings.warn(
            "--compile: no C++ compiler found (set CXX, or install g++ or clang++): running eager", stacklevel=2
        )
        return False
    return True


def start_from(config: VaeConfig, trainer: VaeTrainer, crops: CropBatches) -> None:
    """The first weights of a new run: those of --init, a warm start, or as they were drawn. ValueError if unfit."""
    if config.init:
        same_tensors = [name for name in ("sd", "sdxl") if AUTOENCODERS[name] == config.autoencoder]
        loaded = load_autoencoder(config.init, preset=same_tensors[0] if same_tensors else None)
        if changed := differences(to_dict(config.autoencoder), to_dict(loaded.cfg), words=("expected", "got")):
            raise ValueError(f"--init {config.init}: another shape than the preset's: {'; '.join(changed)}")
        trainer.ae.load_state_dict(loaded.state_dict())
        trainer.average()
    elif config.warm_start == "pca":
        assert isinstance(trainer.ae, AutoEncoder)  # others have no shortcut to start
        pca, x = fit_pca(config, crops)
        code = pca.first(config.autoencoder.z_channels)
        warm_start(trainer.ae, code, fit_context_decoder(code, x))
        warm_start_energies(trainer.ae, pca)
        trainer.average()


def train(config: VaeConfig, options: RunOptions) -> int:
    """Runs `config`, under torchrun as one of its processes; as `train_on`."""
    with dist.joined(options.device, options.peer_timeout) as device:
        return train_on(device, config, options)


def train_on(device: torch.device, config: VaeConfig, options: RunOptions) -> int:
    """Runs `config`; returns the exit code (0, or 128 + signal after an interruption that was saved)."""
    resolve("--backend", options.backend, torch.empty(1, device=device))  # a ValueError before anything is written
    asked = in_short(config, VAE_PRESETS)
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device))
    text = describe(config)
    if options.dry_run:
        from train.estimate import estimate

        print(text + estimate(config, options.backend))
        return 0
    if config.train == "decoder" and not config.init and isinstance(config.autoencoder, AutoencoderConfig):
        raise ValueError("--train decoder keeps an encoder that is trained already: give it with --init")
    run = Run(options, preset=config.preset, config=to_dict(config))
    pictures, held_out = open_pictures(config.data, config.held_out, channels=config.autoencoder.channels)
    compiled = options.compile and usable_compiler(device)
    trainer = VaeTrainer(config, device, compiled=compiled, backend=options.backend)
    crops_of = partial(
        CropBatches, pictures, resolution=config.resolution, batch=config.batch, augmentation=config.augmentation,
        seed=config.seed, buckets=config.bucket_shapes(),
    )  # fmt: skip
    dataset = crops_of(share=trainer.share)
    if run.start:
        trainer.restore(run.checkpoints.path(run.start))
    else:
        fitted = plain_crops(config, pictures) if config.buckets else crops_of()
        dist.from_main(lambda: start_from(config, trainer, fitted))
        trainer.copy_from_main()
    crops = held_out_crops(held_out, num_crops=HELD_OUT_CROPS, resolution=_held_out_side(config))
    print(asked)
    print(f"{len(pictures)} training pictures, {len(held_out)} held out; {device}, {config.precision}")
    run.open(text, device)
    parameters = sum(p.numel() for p in trainer.trained.parameters() if p.requires_grad)
    print(f"{parameters:,} parameters; " + ("compiling, then training" if compiled else "training"), flush=True)

    def evaluate(step: int) -> None:
        quality = {}
        for name, ema in zip(trainer.ema_names(), trainer.emas, strict=True):
            quality[name.replace("ema", "held_out_psnr")] = (
                psnr(crops, reconstruct_uint8(ema.model, crops)).mean().item()
            )
        run.log.write({"step": step, "nimg": step * config.batch, **quality})

    def save(step: int) -> None:
        fit_statistics([ema.model for ema in trainer.emas], pictures, config)
        if dist.is_main():
            evaluate(step)
        run.save(step, trainer.tensors(), {"format": FORMAT, "autoencoder": to_dict(config)["autoencoder"]})

    if not run.start and dist.is_main():
        evaluate(0)
    began = time.monotonic()
    data = partial(batches, dataset, workers=config.workers, bad=run.bad_samples(len(pictures)))
    code = run.loop(trainer, data, steps=config.steps, batch=config.batch, save=save, samples=dataset.names)
    if code is not None or not dist.is_main():
        return code or 0
    seconds = time.monotonic() - began
    print(f"trained {config.steps - run.start} steps in {seconds:.0f} s; writing the report", flush=True)
    ours = reconstruct_uint8(trainer.ema.model, crops)
    pca, _ = fit_pca(config, plain_crops(config, pictures))
    linear = pca.first(config.autoencoder.z_channels)
    quality = write_report(
        run.folder, config=text, ae=trainer.ema.model, crops=crops, ours=ours, code=linear, held_out=held_out
    )
    run.trackers.close()
    print(f"report: {run.folder / 'report.html'}")
    print(f"held-out PSNR {quality:.2f} dB (EMA, {len(crops)} crops)")
    return 0


def _held_out_side(config: VaeConfig) -> int:
    if isinstance(config.autoencoder, RAEConfig):  # a decoder of one grid of tokens
        return config.autoencoder.resolution
    multiple = config.autoencoder.multiple
    return max(multiple, HELD_OUT_SIDE // multiple * multiple)


def fit_statistics(models: list[AutoEncoder | RAE], pictures: Pictures, config: VaeConfig) -> None:
    """Fits the latent statistics, where the shape has them, on STATISTICS_CROPS training crops without augmentation.

    Those of a decoder trained behind a given encoder stay as they came: flow models were trained on them.
    """
    if config.autoencoder.latent_norm == "affine" or (config.train == "decoder" and config.init):
        return
    crops = plain_crops(config, pictures)
    steps = range(2**31, 2**31 + -(-STATISTICS_CROPS // crops.batch))  # which training never reaches
    batches = [crops[step] for step in steps[dist.rank() :: dist.size()]]  # read once, for all models
    for ae in models:
        device = next(ae.parameters()).device
        fit_latent_statistics(ae, (from_uint8(x.to(device)) for x in batches))


def main(argv: list[str] | None = None) -> int:
    """The program: exit code 0; 2 on bad input; 130, 143 or 138 after an interruption that was saved."""
    return exit_code(lambda: train(*parse_vae(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
