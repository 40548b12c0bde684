"""Trains an image autoencoder: `python -m train.vae --compile`. `--help` lists presets' options and examples."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings

import torch
from torch import Tensor, nn

from flux2.alignment import TEACHERS, AlignmentHead
from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import save_json
from flux2.ema import EMA
from flux2.images import from_uint8, to_uint8
from flux2.latents import fit_latent_statistics, patchify
from flux2.linear_code import LinearCode, fit_context_decoder, fit_linear_code, warm_start
from flux2.losses import cosine_alignment, l1, laplacian_loss
from flux2.metrics import psnr
from kernels.dispatch import resolve
from kernels.philox import normal
from train.configs import RunOptions, VaeConfig, differences, parse_vae, to_dict
from train.data import (
    STREAM_POSTERIOR,
    Augmentation,
    CropBatches,
    Pictures,
    batches,
    held_out_crops,
    open_pictures,
    training_pixels,
)
from train.loop import (
    Checkpoints,
    Interrupt,
    Log,
    Progress,
    choose_device,
    choose_precision,
    cosine_lr,
    cpp_compiler,
    environment,
    latest_run_folder,
    load_optimiser_tensors,
    new_run_folder,
    optimiser_tensors,
    parameters_by_rate,
    peak_memory_bytes,
)
from train.report import write_report

HELD_OUT_CROPS, HELD_OUT_SIDE = 256, 64
FITTED_PIXELS = 4096 * 64 * 64  # pixels that closed-form fits (PCA, latent statistics) look at, whatever the crop size
LOG_EVERY = 10  # steps a line of log.jsonl is the mean of: reading a loss makes a GPU wait


class VaeTrainer:
    """Model, averaged model, teacher and optimiser of one run; `step` is one update."""

    def __init__(self, config: VaeConfig, device: torch.device, *, compiled: bool, backend: str = "auto") -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.ae = AutoEncoder(config.autoencoder, backend).to(device)
        self.teacher = self.head = None
        if config.align_weight:
            self.teacher = TEACHERS[config.teacher](patch=config.autoencoder.multiple).to(device)
            self.head = AlignmentHead(config.autoencoder.latent_channels, self.teacher.channels).to(device)
        self.trained = nn.ModuleList([self.ae] + ([self.head] if self.head else []))
        self.optimiser = self._optimiser()
        self.ema = EMA(self.ae, config.ema_decay)
        self._losses = torch.compile(self.losses, fullgraph=True, dynamic=False) if compiled else self.losses

    def _optimiser(self) -> torch.optim.AdamW:
        groups = [
            {"params": group, "rate": self.config.linear_lr if slow else 1.0}
            for slow, group in parameters_by_rate(self.trained, "linear")
        ]
        decay = self.config.weight_decay
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, weight_decay=decay, fused=True)

    def start_from(self, code: LinearCode, x: Tensor) -> None:
        """Warm start of model and average from a code fitted on pixels x; before the first step."""
        warm_start(self.ae, code, fit_context_decoder(code, x))
        self.ema = EMA(self.ae, self.config.ema_decay)

    def losses(self, x: Tensor, tokens: Tensor | None, noise: Tensor | None) -> dict[str, Tensor]:
        """Pixels [N, 3, R, R], tokens [N, D, R/m, R/m], posterior noise -> each term; "loss" is their weighted sum."""
        config = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            posterior = self.ae.posterior(x)
            z = posterior.mode() if noise is None else posterior.sample(noise)
            recon = self.ae.decode_raw(z)
            predicted = self.head(patchify(z, config.autoencoder.patch)) if self.head else None
        terms = {"l1": l1(recon, x), "laplacian": laplacian_loss(recon, x), "kl": posterior.kl().mean()}
        if predicted is not None and tokens is not None:
            terms["align"] = cosine_alignment(predicted, tokens)
        weighted = [getattr(config, f"{name}_weight") * term for name, term in terms.items()]
        return {"loss": torch.stack(weighted).sum(), **terms}

    def noise(self, step: int, num: int) -> Tensor | None:
        """Posterior noise of a step, fp32 [num, z, R/f, R/f]; None where the mode is decoded."""
        if not self.config.sample_posterior:
            return None
        side = self.config.resolution // self.config.autoencoder.downsample
        shape = (num, self.config.autoencoder.z_channels, side, side)
        return normal(self.config.seed, step, 0, shape, stream=STREAM_POSTERIOR, device=self.device)

    def step(self, step: int, batch: Tensor) -> dict[str, Tensor]:
        """One update on uint8 [N, 3, R, R]: detached scalars, each term by name, "loss" and "grad_norm"."""
        config = self.config
        x = from_uint8(batch.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        factor = cosine_lr(step, steps=config.steps, warmup=config.warmup, final=config.final_lr)
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr * factor * group["rate"]
        terms = self._losses(x, self.teacher(x) if self.teacher else None, self.noise(step, len(x)))
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(self.ae, step)
        return {**{k: v.detach() for k, v in terms.items()}, "grad_norm": norm}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs, by checkpoint file."""
        head = {"head": self.head.state_dict()} if self.head else {}
        model = {"model": self.ae.state_dict(), "ema": self.ema.model.state_dict()}
        return {**model, **head, "optimiser": optimiser_tensors(self.optimiser)}

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of `tensors`."""
        self.ae.load_state_dict(tensors["model"])
        self.ema.model.load_state_dict(tensors["ema"])
        if self.head:
            self.head.load_state_dict(tensors["head"])
        load_optimiser_tensors(self.optimiser, tensors["optimiser"])


@torch.no_grad()
def reconstruct_uint8(ae: AutoEncoder, images: Tensor, *, batch: int = 32) -> Tensor:
    """uint8 [N, 3, H, W] of any size -> reconstructions, uint8 of the same shape, on the CPU; in the weights' dtype."""
    device = next(ae.parameters()).device
    parts = [to_uint8(ae.reconstruct(from_uint8(part.to(device)))).cpu() for part in images.split(batch)]
    return torch.cat(parts)


def plain_crops(config: VaeConfig, pictures: Pictures) -> CropBatches:
    """Training crops as they are in the photographs: native scale, no augmentation. What yardsticks are fitted on."""
    return CropBatches(
        pictures, resolution=config.resolution, batch=16, augmentation=Augmentation(flip=False), seed=config.seed
    )


def fit_code(config: VaeConfig, crops: CropBatches) -> tuple[LinearCode, Tensor]:
    """The best linear code of the autoencoder's size, and the pixels of `crops` it was fitted on."""
    x = training_pixels(crops, FITTED_PIXELS // config.resolution**2)
    shape = config.autoencoder
    components = min(shape.z_channels, 3 * shape.downsample**2)
    return fit_linear_code(x, num_components=components, block=shape.downsample), x


def usable_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build kernels here; warns once where it cannot."""
    if device.type == "cpu" and cpp_compiler() is None:
        warnings.warn(
            "--compile: no C++ compiler found (set CXX, or install g++ or clang++): running eager", stacklevel=2
        )
        return False
    return True


def describe(config: VaeConfig) -> str:
    """The resolved config as YAML, as it is printed and saved."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def train(config: VaeConfig, run: RunOptions) -> int:
    """Runs `config`; returns the exit code (0, or 128 + signal after an interruption that was saved)."""
    device = choose_device(run.device)
    resolve("--backend", run.backend, torch.empty(1, device=device))  # a ValueError before anything is written
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device))
    if run.dry_run:
        from train.estimate import estimate

        print(describe(config) + estimate(config, run.backend))
        return 0
    resuming = run.resume == "auto"
    folder = (latest_run_folder if resuming else new_run_folder)(run.out, run.name, config.preset)
    checkpoints = Checkpoints(folder / "checkpoints", keep=run.keep)
    saved_steps = checkpoints.steps()
    start, tensors = 0, None
    if saved_steps:
        start = saved_steps[-1]
        tensors, saved = checkpoints.load(start)
        if changed := differences(saved["train"], to_dict(config)):
            raise ValueError(f"{folder} was started with another config; " + "; ".join(changed))
    pictures, held_out = open_pictures(config.data, config.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    text = describe(config)
    (folder / "config.yaml").write_text(text)
    save_json(folder / "env.json", environment(device))
    print(text + f"{len(pictures)} training pictures, {len(held_out)} held out; {device}, {config.precision}")
    print(f"run folder: {folder}" + (f", resumed at step {start}" if start else ""), flush=True)

    trainer = VaeTrainer(config, device, compiled=run.compile and usable_compiler(device), backend=run.backend)
    dataset = CropBatches(
        pictures,
        resolution=config.resolution,
        batch=config.batch,
        augmentation=config.augmentation,
        seed=config.seed,
    )
    if tensors:
        trainer.load(tensors)
    elif config.warm_start == "pca":
        trainer.start_from(*fit_code(config, dataset))
    parameters = sum(p.numel() for p in trainer.ae.parameters())
    print(f"{parameters:,} parameters; " + ("compiling, then training" if run.compile else "training"), flush=True)

    crops = held_out_crops(held_out, num_crops=HELD_OUT_CROPS, resolution=_held_out_side(config))
    stop = min(config.steps, run.stop_after or config.steps)
    save_every = run.save_every or min(1000, -(-config.steps // 4))
    log = Log(folder / "log.jsonl", start=start)

    def evaluate(step: int) -> None:
        quality = psnr(crops, reconstruct_uint8(trainer.ema.model, crops)).mean().item()
        log.write({"step": step, "nimg": step * config.batch, "held_out_psnr": quality})

    def save(step: int) -> None:
        fit_latent_statistics_of(trainer.ema.model, dataset)
        evaluate(step)
        plain = {"format": "flux2-tokenizer", "autoencoder": to_dict(config)["autoencoder"]}
        checkpoints.save(step, trainer.tensors(), {**plain, "train": to_dict(config), "step": step})

    if not start:
        evaluate(0)
    began, done = time.monotonic(), start
    with Interrupt() as interrupt:
        progress = Progress(start=start, steps=config.steps, batch=config.batch, device=device)
        window: list[dict[str, Tensor]] = []
        for step, batch in enumerate(batches(dataset, start, stop, workers=config.workers), start):
            window.append(trainer.step(step, batch))
            done = step + 1
            if done % LOG_EVERY == 0 or done == stop:
                means = {k: torch.stack([w[k] for w in window]).mean().item() for k in window[0]}
                window = []
                check_finite(means, step)
                progress.update(done, means)
                lr = trainer.optimiser.param_groups[0]["lr"]
                memory = peak_memory_bytes(device)
                rate = {"lr": lr, "images_per_second": progress.images_per_second(), "peak_memory_bytes": memory}
                log.write({"step": done, "nimg": done * config.batch, **means, **rate})
            if done % save_every == 0 or done == stop or interrupt.signal:
                save(done)
            if interrupt.signal:
                break
        progress.close()
    if done < config.steps:
        where, how = checkpoints.path(done), f"--resume auto --name {folder.name}"
        print(f"saved {where} after {done} of {config.steps} steps; go on with {how}")
        return 128 + interrupt.signal if interrupt.signal else 0

    print(f"trained {done - start} steps in {time.monotonic() - began:.0f} s; writing the report", flush=True)
    ours = reconstruct_uint8(trainer.ema.model, crops)
    code, _ = fit_code(config, plain_crops(config, pictures))
    quality = write_report(
        folder, config=text, ae=trainer.ema.model, crops=crops, ours=ours, code=code, held_out=held_out
    )
    print(f"report: {folder / 'report.html'}")
    print(f"held-out PSNR {quality:.2f} dB (EMA, {len(crops)} crops)")
    return 0


def _held_out_side(config: VaeConfig) -> int:
    multiple = config.autoencoder.multiple
    return max(multiple, HELD_OUT_SIDE // multiple * multiple)


def fit_latent_statistics_of(ae: AutoEncoder, dataset: CropBatches) -> None:
    """Fits the latent statistics, where the shape has them, on training crops of at most FITTED_PIXELS / 8 pixels."""
    if ae.cfg.latent_norm == "affine":
        return
    device = next(ae.parameters()).device
    x = training_pixels(dataset, max(2, FITTED_PIXELS // 8 // dataset.resolution**2))
    fit_latent_statistics(ae, (part.to(device) for part in x.split(32)))


def check_finite(means: dict[str, float], step: int) -> None:
    """FloatingPointError naming the terms that are not finite numbers."""
    broken = {k: v for k, v in means.items() if not (abs(v) < float("inf"))}
    if broken:
        terms = ", ".join(f"{k} = {v}" for k, v in broken.items())
        raise FloatingPointError(
            f"step {step}: {terms}; the checkpoints are of before. Try a lower --lr or --precision fp32"
        )


def main(argv: list[str] | None = None) -> int:
    """The program: exit code 0; 2 on bad input; 130 or 143 after an interruption that was saved."""
    try:
        config, run = parse_vae(sys.argv[1:] if argv is None else argv)
        return train(config, run)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the last checkpoint (continue with --resume auto)", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
