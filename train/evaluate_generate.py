"""How samples of a flow model, or pictures from elsewhere, compare with references: `train.evaluate generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flux2.checkpoint_folders import Checkpoints
from flux2.features import Features, build_features
from flux2.images import find_images, save_png
from flux2.samplers import Velocity, classifier_free
from train.data import Augmentation
from train.evaluation import PHOTOGRAPHS, CommonConfig, distances, finish
from train.loop import choose_device, choose_precision
from train.picture_sets import FolderPictures, NpzPictures, PictureSet, TrainingCrops
from train.references import Collected, Reference, adm_reference, load_reference, reference_of, watched
from train.sample import FlowModel, chosen_labels, decode_uint8, generate, grid_of, load_flow, random_labels

SHEET = 64  # pictures of a sheet of samples

DESCRIPTION = """Measure samples against reference pictures: gFID, sFID, KID, inception score, precision and recall.

  python -m train.evaluate generate --run runs/flow
  python -m train.evaluate generate --run runs/xl --num 50000 --reference VIRTUAL_imagenet256_labeled.npz \\
      --features inception
  python -m train.evaluate generate --images samples.npz --reference TRAIN --features dinov2-l

Writes OUT/evaluation.json and OUT/samples.png.
"""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommonConfig):
    """What `python -m train.evaluate generate` does."""

    run: str = ""
    """Run of train.flow to draw samples of."""
    images: str = ""
    """Instead: samples, in a folder or in an .npz file (arr_0, uint8 [N, H, W, 3])."""
    reference: str = PHOTOGRAPHS
    """Pictures to compare with: a folder; photographs: random crops of the bundled ones; an ADM reference batch (.npz);
    or a saved reference (.safetensors) of --cache."""
    num: int = 0
    """Samples; 0 is 1000 of a run, or all pictures of --images. Published figures are of 50000."""
    reference_num: int = 0
    """Crops of the reference photographs; 0 is as many as samples."""
    crop_scale: tuple[float, float] | None = None
    """Their source pixels per pixel; by default what the run was trained on, else 1 to 4."""
    metrics: tuple[Literal["fd", "sfd", "kd", "is", "pr"], ...] = ("fd", "sfd", "kd", "is", "pr")
    """Frechet distance (FID), that of spatial features (sFID), kernel distance (KID), inception score, precision and
    recall; spatial features and scores are Inception's alone."""
    balanced: bool = False
    """Draw classes in equal shares, in turn; by default at random."""
    steps: int = 50
    """Steps of the sampler."""
    sampler: Literal["euler", "heun", "euler_maruyama"] = "euler"
    """Deterministic of order 1 or 2, or stochastic."""
    shift: float | Literal["auto"] = "auto"
    """Sampling shift; auto goes by the training shift and the latent's channels a token."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance is on; 0 is data."""
    ema: float | None = None
    """Which of the run's averages, by its decay; by default the first."""
    autoencoder: str = ""
    """Another autoencoder than the run's own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type of sampling; auto is bf16 where the processor or GPU computes in it, else fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.run) == bool(self.images):
            raise ValueError(f"expected either --run or --images, got {'both' if self.run else 'neither'}")
        if self.num < 0 or self.num == 1 or self.reference_num < 0 or self.reference_num == 1:
            raise ValueError(f"num: expected 0, or 2 or more, got {self.num} and {self.reference_num}")
        if self.steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {self.steps}")


class Samples(PictureSet):
    """Samples of a flow model, drawn as they are read; sample i depends on (seed, i) alone, but for euler_maruyama."""

    def __init__(self, flow: FlowModel, config: GenerateConfig, device: torch.device) -> None:
        self.flow, self.config, self.device = flow, config, device
        self.name, self.count, self.chunk = f"{config.run} at step {flow.step}", config.num or 1000, config.batch
        self.crop = "samples"
        self.shift = flow.sample_shift(config.shift)
        self.precision = choose_precision(config.precision, device)
        num = len(flow.classes)
        if config.balanced:
            self.labels = chosen_labels(flow.classes, (), self.count)
        else:
            self.labels = random_labels(num, self.count, seed=config.seed)
        self.labels = self.labels.to(device)

    def side(self) -> int:
        return self.flow.grid * self.flow.ae.cfg.multiple

    def __str__(self) -> str:
        c = self.config
        guidance = f"guidance {c.guidance:g}" + (f" in t {c.interval}" if c.interval != (0.0, 1.0) else "")
        labels = "equal shares of classes" if c.balanced else "random classes"
        drawn = f"{c.sampler}, {c.steps} steps, shift {self.shift:.3g}, {guidance}"
        return f"{drawn}, {labels}, {self.precision}, seed {c.seed}"

    def __getitem__(self, index: int) -> Tensor:
        flow, config = self.flow, self.config

        def velocity_of(y: Tensor) -> Velocity:
            return classifier_free(flow.model, y, len(flow.classes), config.guidance, config.interval)

        z = generate(
            velocity_of,
            self.labels[index * self.chunk : (index + 1) * self.chunk],
            (flow.model.in_channels, flow.grid, flow.grid),
            sampler=config.sampler,
            steps=config.steps,
            shift=self.shift,
            seed=config.seed,
            batch=self.chunk,
            precision=self.precision,
            first_index=index * self.chunk,
        )
        return decode_uint8(flow.ae, z)


def generation(config: GenerateConfig) -> int:
    """Prints the figures and writes them; the exit code."""
    device = choose_device(config.device)
    features = build_features(config.features, config.feature_weights, device)
    if config.run:
        samples: PictureSet = Samples(
            load_flow(config.run, ema=config.ema, autoencoder=config.autoencoder, device=device), config, device
        )
        notes = str(samples)
    else:
        samples, notes = _pictures(config.images, config.resolution, config.num), "samples as stored"
    reference = _reference(config, features, device, samples)
    config.out.mkdir(parents=True, exist_ok=True)
    print(f"samples: {samples.name}", flush=True)
    rows = any(m in config.metrics for m in ("kd", "pr"))
    found, sheet = Collected(samples.count, samples.count if rows else 0), []
    for images in watched(samples.batches(config.workers), samples.count, device):
        sheet += list(images[: max(0, SHEET - found.seen)])
        found.add(features(images.to(device)))
    figures = distances(
        found, reference, features, device, prefix="g", metrics=config.metrics, kernel=config.kernel, seed=config.seed
    )
    save_png(config.out / "samples.png", grid_of(torch.stack(sheet), columns=8))
    return finish(config, "generate", samples.name, found, reference, features, figures, notes, "samples.png", device)


def _pictures(path: str, resolution: int, num: int = 0) -> PictureSet:
    if not path.endswith(".npz"):
        return FolderPictures(path, resolution=resolution, num=num)
    pictures = NpzPictures(path)
    if resolution not in (0, *pictures.shape[1:3]) or num not in (0, pictures.count):
        got = f"{pictures.count} of {list(pictures.shape[1:3])} pixels"
        raise ValueError(f"{path}: is read whole and as stored, {got}; drop --resolution and --num, or use a folder")
    return pictures


def _reference(config: GenerateConfig, features: Features, device: torch.device, samples: PictureSet) -> Reference:
    """What the samples are compared with."""
    path, cache, workers = config.reference, config.cache, config.workers
    if path.endswith(".safetensors"):
        reference = load_reference(Path(path))
        if reference.features != features.identity:
            raise ValueError(f"{path}: expected features {features.identity}, got {reference.features}")
        return reference
    if path.endswith(".npz"):
        return adm_reference(Path(path), features, device, cache=cache, workers=workers)
    if path != PHOTOGRAPHS:
        find_images(path)  # a ValueError before samples are looked at
        pictures = FolderPictures(path, resolution=config.resolution or samples.side())
        return reference_of(pictures, features, device, cache=cache, workers=workers)
    augmentation = Augmentation(crop_scale=(1.0, 4.0))
    if config.run:
        checkpoints = Checkpoints(Path(config.run) / "checkpoints")
        newest = checkpoints.newest(optimisers=False)
        assert newest is not None  # it was loaded
        trained = checkpoints.config(newest)["train"]
        saved = trained["augmentation"]
        augmentation = Augmentation(**{**saved, "crop_scale": tuple(saved["crop_scale"])})
    if config.crop_scale:
        augmentation = Augmentation(crop_scale=config.crop_scale, flip=augmentation.flip)
    num = config.reference_num or samples.count
    crops = TrainingCrops(resolution=samples.side(), num=num, augmentation=augmentation)
    return reference_of(crops, features, device, cache=cache, workers=workers)


def main(argv: list[str]) -> int:
    """`python -m train.evaluate generate`: the exit code. ValueError or OSError on bad input."""
    import tyro

    prog = "python -m train.evaluate generate"
    return generation(tyro.cli(GenerateConfig, prog=prog, description=DESCRIPTION, args=argv))
