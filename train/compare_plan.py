"""What a comparison will take: cells, images, arithmetic and device-hours, counted before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from flux2.autoencoder import AUTOENCODERS, AutoEncoder, AutoencoderConfig
from flux2.checkpoints import load_autoencoder
from flux2.rae import RAE, RAEConfig
from flux2.teachers import TEACHERS, HOGConfig
from flux2.transformer import SiT
from train.compare_config import CompareConfig
from train.compare_rows import NO_REPA
from train.estimate import step_cost
from train.vae_config import VaeConfig, parse_vae


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one task on one device: passes through its largest network, floating-point operations, and seconds at the
    config's assumed speed: whichever takes longer, the operations or the passes."""

    passes: int
    flops: float
    seconds: float


def _cost(config: CompareConfig, passes: int, flops: float) -> Cost:
    return Cost(passes=passes, flops=flops, seconds=max(flops / config.tflops / 1e12, passes * config.step_ms / 1e3))


def _shape(config: CompareConfig, name: str) -> tuple[AutoencoderConfig | RAEConfig | None, VaeConfig | None]:
    """(shape, how it is trained) of a row; None where it comes from a file, or is not known without one."""
    if path := config.paths.get(name):
        return load_autoencoder(path).cfg, None
    if name in config.training:
        trained, _ = parse_vae(config.training[name].split())
        return trained.autoencoder, trained
    return AUTOENCODERS.get(name), None


def _flops(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def cell_cost(config: CompareConfig, shape: AutoencoderConfig | RAEConfig) -> Cost:
    """Of one model: training at three times a forward pass, validation, and samples with their decoding."""
    grid = config.crops.resolution // shape.multiple
    with torch.device("meta"):
        model = SiT(config.flow.transformer, shape.latent_channels, 0)
        z = torch.empty(1, shape.latent_channels, grid, grid)
        labels = torch.zeros(1, dtype=torch.int64)
        forward = _flops(model, z, torch.empty(1), labels)
        ae = RAE(shape, None) if isinstance(shape, RAEConfig) else AutoEncoder(shape)
        decoding = _flops(_Decoder(ae), z)
    judging, flow = config.judging, config.flow
    points = len(judging.judged(flow.steps))
    sampled = points * len(config.sampling_shifts) * config.samples
    batches = points * len(config.sampling_shifts) * -(-config.samples // config.sample_batch)
    passes = 3 * flow.steps + batches * config.sample_steps
    flops = 3.0 * forward * flow.steps * flow.batch
    flops += sampled * (config.sample_steps * forward + decoding) + 10.0 * points * config.held_out * forward
    return _cost(config, passes, flops)


def cached_bytes(config: CompareConfig, shape: AutoencoderConfig | RAEConfig) -> int:
    """Of one crop in the latent cache of an autoencoder: mean, log-variance but of an RAE, the teacher's tokens."""
    positions = (config.crops.resolution // shape.multiple) ** 2
    numbers = positions * shape.latent_channels * (1 if isinstance(shape, RAEConfig) else 2)
    if config.teacher != NO_REPA:
        teacher = TEACHERS[config.teacher]
        if isinstance(teacher, HOGConfig):
            numbers += positions * 3 * teacher.bins * (shape.multiple // teacher.cell) ** 2
        else:
            numbers += positions * teacher.channels
    return torch.finfo(torch.float16).bits // 8 * numbers * (2 if config.crops.flip else 1)


def _disk(config: CompareConfig, crop_bytes: int) -> str:
    """crop_bytes: of one crop in the caches of all autoencoders."""
    text = f"latent caches: {crop_bytes / 2**20:,.3g} MiB a crop in all"
    if not config.crops.data:
        return f"{text}, {crop_bytes * 10**6 / 2**40:,.2g} TiB for a million pictures"
    crops = len(config.crops.pictures()[0]) * config.crops.share()
    return f"{text}, {crop_bytes * crops / 2**30:,.3g} GiB for {crops:,} crops"


class _Decoder(torch.nn.Module):
    def __init__(self, ae: AutoEncoder | RAE) -> None:
        super().__init__()
        self.ae = ae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.ae.decode(z)


def plan(config: CompareConfig, done: int, failed: int, workers: int) -> str:
    """The lines that are printed first. ValueError where an autoencoder has neither weights nor training."""
    lines, total, flops, missing, cached = [], 0.0, 0.0, [], 0
    models = len(config.cells()) // len(config.autoencoders)
    for name in config.autoencoders:
        shape, trained = _shape(config, name)
        if shape is None or (trained is None and name not in config.paths):
            missing.append(name)
        if shape is None:
            lines.append(f"  {name:<14} needs --weights {name}=PATH")
            continue
        if trained:
            step = step_cost(trained)
            cost = _cost(config, 3 * trained.steps, float(step.flops) * trained.batch * trained.steps)
            total, flops = total + cost.seconds, flops + cost.flops
            how = f"trained here: {trained.steps:,} steps of {trained.batch}, about {_hours(cost.seconds)}"
        else:
            how = f"from {config.paths.get(name, f'--weights {name}=PATH (not given yet)')}"
        cached += cached_bytes(config, shape)
        cell = cell_cost(config, shape)
        total, flops = total + models * cell.seconds, flops + models * cell.flops
        lines.append(
            f"  {name:<14} {shape.latent_channels:>4} channels a token, {how}; {models} models, each"
            f" {cell.flops / 1e15:,.3g} PFLOP, about {_hours(cell.seconds)}"
        )
    flow, shifts = config.flow, len(config.sampling_shifts)
    points = len(config.judging.judged(flow.steps))
    images = flow.steps * flow.batch
    sampled = len(config.cells()) * points * shifts * config.samples
    grid = (
        f"{len(config.autoencoders)} autoencoders x {len(config.laws)} laws x {len(config.train_shifts)} train shifts x"
        f" {len(config.repa)} REPA x {len(config.seeds)} seeds = {len(config.cells())} models,"
    )
    head = [
        f"comparison {config.preset}: {grid}",
        f"each trained on {images:,} images and sampled with {shifts} shifts at {points} points:"
        f" {len(config.cells()) * images:,} images trained on, {sampled:,} samples of {config.sample_steps} steps",
        f"  laws {', '.join(config.laws)}; train shifts {_numbers(config.train_shifts)}; sampling shifts"
        f" {_numbers(config.sampling_shifts)}; REPA {', '.join(config.repa)}; seeds {_numbers(config.seeds)}",
        *lines,
        f"in all {flops / 1e15:,.3g} PFLOP, about {_hours(total)} of one worker: estimated, not measured, at"
        f" {config.tflops:g} TFLOP/s and {config.step_ms:g} ms a pass; about {_hours(total / workers)} with"
        f" {workers} workers, where each is as fast",
        _disk(config, cached),
        f"done so far: {done} of {len(config.cells())}" + (f", of which {failed} failed" if failed else ""),
    ]
    if missing:
        head.append(f"weights missing: {', '.join(missing)}")
    return "\n".join(head)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} device-hours"
