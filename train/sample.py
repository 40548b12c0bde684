"""Samples of a trained flow model: `python -m train.sample --run RUN`. `--help` lists options and examples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flux2.autoencoder import AutoEncoder
from flux2.checkpoint_folders import Checkpoints
from flux2.checkpoints import load_autoencoder
from flux2.images import save_png, tile, to_array, to_uint8
from flux2.rae import RAE
from flux2.samplers import SAMPLERS, Velocity, autoguidance, classifier_free
from flux2.schedules import sampling_times
from flux2.tensor_files import load_tensors
from flux2.transformer import SiT, TransformerConfig
from kernels.philox import normal, uniform
from train.flow_config import sampling_shift
from train.loop import choose_device, choose_precision

FLOW_FORMAT = "flux2-tokenizer flow"  # names the checkpoints of train.flow
STREAM_SAMPLES, STREAM_LABELS = 115, 116  # Philox streams of the noise that sampling starts from, and of classes


@dataclass(frozen=True, kw_only=True)
class FlowModel:
    """A trained model and what its samples need. classes: their names, in the order of the labels."""

    model: SiT
    ae: AutoEncoder | RAE
    classes: list[str]
    train_shift: float
    grid: int
    """Positions along a side of the latents it was trained on."""
    folder: Path
    step: int

    def sample_shift(self, shift: float | Literal["auto"] = "auto") -> float:
        """`train.flow_config.sampling_shift` of this model."""
        return sampling_shift(shift, self.train_shift, self.model.in_channels * self.model.cfg.patch**2)


def load_flow(
    run: str | Path, *, ema: float | None = None, autoencoder: str = "", device: str | torch.device = "cpu"
) -> FlowModel:
    """The newest checkpoint of a run of train.flow, averaged weights, in eval mode and without gradients.

    ema: which of the run's averages, by its decay; by default the first. autoencoder: another than the run's own copy.
    FileNotFoundError or ValueError, in one sentence, if there is none, or no such average.
    """
    run = Path(run)
    checkpoints = Checkpoints(run / "checkpoints")
    if (newest := checkpoints.newest(optimisers=False)) is None:
        raise FileNotFoundError(f"{run}: expected a run of train.flow (checkpoints/step_*), got none")
    folder = checkpoints.path(newest)
    config = checkpoints.config(newest)
    if config.get("format") != FLOW_FORMAT:
        raise ValueError(f"{folder}: expected a checkpoint of train.flow, got format {config.get('format')!r}")
    decays = config["train"]["ema_decays"]
    if ema is not None and ema not in decays:
        raise ValueError(f"ema: expected one of {', '.join(map(str, decays))}, got {ema}")
    file = folder / f"ema_{decays[0] if ema is None else ema}.safetensors"
    shape = TransformerConfig(**config["transformer"])
    model = SiT(shape, config["in_channels"], len(config["classes"]))
    model.load_state_dict(load_tensors(file)[0])
    return FlowModel(
        model=model.to(device).eval().requires_grad_(False),
        ae=load_autoencoder(autoencoder or run / "autoencoder.safetensors", device=device).requires_grad_(False),
        classes=config["classes"],
        train_shift=config["train_shift"],
        grid=config["grid"],
        folder=run,
        step=config["step"],
    )


@torch.no_grad()
def generate(
    velocity_of: Any,
    labels: Tensor,
    shape: tuple[int, int, int],
    *,
    sampler: str = "euler",
    steps: int = 50,
    shift: float = 1.0,
    seed: int = 0,
    batch: int = 64,
    precision: str = "fp32",
    first_index: int = 0,
) -> Tensor:
    """Normalised latents fp32 [N, C, h, w] for labels int64 [N], on their device; shape: (C, h, w).

    velocity_of(labels) is the velocity of a batch, such as `classifier_free` returns. Sample i starts from noise that
    depends on (seed, first_index + i) alone; what euler_maruyama adds depends on `batch`, too. precision: "bf16" is
    autocast.
    """
    ts = sampling_times(steps, shift)
    parts = []
    for first in range(0, len(labels), batch):
        y = labels[first : first + batch]
        index = first_index + first
        z = normal(seed, 0, index, (len(y), *shape), stream=STREAM_SAMPLES, device=y.device)
        generator = torch.Generator(y.device).manual_seed(((seed << 20) + index) % 2**63)
        with torch.autocast(y.device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(SAMPLERS[sampler](velocity_of(y), z, ts, generator=generator))
    return torch.cat(parts)


@torch.no_grad()
def decode_uint8(ae: AutoEncoder | RAE, z: Tensor, *, batch: int = 32) -> Tensor:
    """Normalised latents [N, C, h, w] -> uint8 [N, 3, H, W] on the CPU."""
    return torch.cat([to_uint8(ae.decode(part)).cpu() for part in z.split(batch)])


def grid_of(images: Tensor, columns: int) -> np.ndarray:
    """uint8 [N, 3, R, R] in rows -> uint8 [H, W, 3]; small pictures twice as large."""
    sheet = tile([to_array(image) for image in images], columns=columns)
    return sheet.repeat(2, 0).repeat(2, 1) if images.shape[-1] <= 128 else sheet


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What `python -m train.sample` does."""

    run: Path
    """Run of train.flow."""
    out: Path = Path("samples")
    """Writes OUT.png, a sheet, and OUT.npz: arr_0 uint8 [N, H, W, 3] as ADM's evaluator reads it, and labels."""
    num: int = 64
    """Samples, spread evenly over the classes."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes; by default all. "none" is the unconditional model."""
    columns: int = 8
    """Pictures a row of the sheet, of which the first 256 are shown."""
    sampler: Literal["euler", "heun", "euler_maruyama"] = "euler"
    """Deterministic of order 1 or 2, or stochastic."""
    steps: int = 50
    """Steps of the sampler."""
    shift: float | Literal["auto"] = "auto"
    """Sampling shift; auto goes by the training shift and the latent's channels a token."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance is on; 0 is data."""
    guide: str = ""
    """Run of a weaker model of the same task, for autoguidance."""
    guide_scale: float = 1.5
    """Scale of autoguidance; 1 is none."""
    ema: float | None = None
    """Which of the run's averages, by its decay; by default the first."""
    autoencoder: str = ""
    """Another autoencoder than the run's own."""
    seed: int = 0
    """Decides the noise."""
    batch: int = 64
    """Samples computed at once."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; auto is bf16 where the processor or GPU computes in it, else fp32."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""

    def __post_init__(self) -> None:
        for name in ("num", "columns", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")


def chosen_labels(classes: list[str], chosen: tuple[str, ...], num: int) -> Tensor:
    """int64 [num], `chosen` (all by default) in turn in equal shares; names or numbers, "none" is len(classes).

    Sorted, so that a sheet's rows are of one class where the shares allow. ValueError for what is no class.
    """
    labels = []
    for name in chosen or classes:
        if name in classes:
            labels.append(classes.index(name))
        elif name == "none":
            labels.append(len(classes))
        elif name.isdigit() and int(name) < len(classes):
            labels.append(int(name))
        else:
            shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
            raise ValueError(f"classes: expected {shown}, a number below {len(classes)}, or none, got {name!r}")
    return torch.tensor([labels[i * len(labels) // num] for i in range(num)])


def random_labels(num_classes: int, num: int, *, seed: int, first_index: int = 0) -> Tensor:
    """int64 [num] in [0, num_classes): classes at random, label i a function of (seed, first_index + i) alone."""
    u = uniform(seed, 0, first_index, num, 1, stream=STREAM_LABELS)[:, 0]
    return (u.double() * num_classes).long()


def sample(config: SampleConfig) -> int:
    """Draws, writes the sheet and the arrays; the exit code."""
    device = choose_device(config.device)
    flow = load_flow(config.run, ema=config.ema, autoencoder=config.autoencoder, device=device)
    shift = flow.sample_shift(config.shift)
    labels = chosen_labels(flow.classes, config.classes, config.num).to(device)
    weak = load_flow(config.guide, device=device) if config.guide else None
    if weak and (weak.model.in_channels, weak.classes) != (flow.model.in_channels, flow.classes):
        raise ValueError(f"guide: {config.guide} was trained on other latents or classes than {config.run}")

    def velocity_of(y: Tensor) -> Velocity:
        def guided(model: SiT) -> Velocity:
            return classifier_free(model, y, len(flow.classes), config.guidance, config.interval)

        return autoguidance(guided(flow.model), guided(weak.model), config.guide_scale) if weak else guided(flow.model)

    z = generate(
        velocity_of,
        labels,
        (flow.model.in_channels, flow.grid, flow.grid),
        sampler=config.sampler,
        steps=config.steps,
        shift=shift,
        seed=config.seed,
        batch=config.batch,
        precision=choose_precision(config.precision, device),
    )
    images = decode_uint8(flow.ae, z)
    png, npz = (config.out.with_name(f"{config.out.name}.{suffix}") for suffix in ("png", "npz"))
    save_png(png, grid_of(images[:256], config.columns))
    save_npz(npz, images, labels)
    print(
        f"{config.num} samples of {flow.folder} at step {flow.step}: {config.sampler}, {config.steps} steps, shift "
        f"{shift:.3g} (trained at {flow.train_shift:.3g}), guidance {config.guidance:g}\n{png}\n{npz}"
    )
    return 0


def save_npz(path: Path, images: Tensor, labels: Tensor) -> None:
    """arr_0 uint8 [N, H, W, 3] and labels int64 [N], written whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_DESCRIPTION = """Draw samples of a flow model.

  python -m train.sample --run runs/flow --guidance 1.5 --out samples
  python -m train.sample --run runs/flow --sampler heun --steps 25 --shift 4 --classes astronaut retina
  python -m train.sample --run runs/xl --guide runs/small --guide-scale 1.4 --num 50000 --out fid

Writes OUT.png and OUT.npz.
"""


def main(argv: list[str] | None = None) -> int:
    """The program: exit code 0; 2 on bad input."""
    import tyro

    try:
        argv = sys.argv[1:] if argv is None else argv
        return sample(tyro.cli(SampleConfig, prog="python -m train.sample", description=_DESCRIPTION, args=argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
