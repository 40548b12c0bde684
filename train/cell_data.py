"""What a cell reads: an autoencoder's cached latents, held-out latents, and the features its samples are measured by.

Crops that judge are fixed, and such that training never draws them, but for a cache of centre squares
(`Crops.cached_crops` 0), where the reference is the training pictures themselves, as is the custom on ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import load_autoencoder
from flux2.distances import Moments
from flux2.features import Features
from flux2.images import from_uint8
from flux2.rae import RAE
from flux2.tensor_files import load_tensors, save_tensors
from train.cache import CacheConfig, LatentCache, make_cache
from train.crops import Augmentation, centre_square
from train.data import Pictures, class_names, open_pictures
from train.flow_data import LabelledCrops
from train.loop import Interrupted

FIXED_STEP = 2**31  # first step of crops that training never reaches; the reference's
PROBE_STEP = FIXED_STEP + 2**20  # of training crops that a probe is fitted on
PART = 64  # crops at a time


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Which crops of which pictures flow models are trained and judged on."""

    data: str = "photographs"
    """"photographs" (bundled with scikit-image) or a folder of pictures; its sub-folders are the classes."""
    held_out: str = ""
    """Folder of held-out pictures; by default coffee and chelsea, or each 20th picture of data."""
    resolution: int = 64
    """Side, pixels."""
    cached_crops: int = 1024
    """Crops in the cache, at least, an equal share of each picture, 2 or more; 0 is the centre square of each."""
    crop_scale: tuple[float, float] = (0.7, 1.6)
    """Source pixels per pixel of random crops, drawn log-uniformly."""
    flip: bool = True
    """Also train on mirror images."""

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("cached_crops", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        _ = Augmentation(crop_scale=self.crop_scale)  # checks it

    def pictures(self) -> tuple[Pictures, Pictures]:
        """(training, held-out)"""
        return open_pictures(self.data, self.held_out)

    def share(self) -> int:
        """Crops of a picture in the cache: 1 is its centre square, so random crops are 2 or more."""
        return max(2, -(-self.cached_crops // len(self.pictures()[0]))) if self.cached_crops else 1


def fixed_crops(
    crops: Crops, pictures: Pictures, classes: list[str], num: int, *, first_step: int = FIXED_STEP
) -> Iterator[tuple[Tensor, Tensor]]:
    """`num` crops in parts: pixels uint8 [n, 3, R, R], and labels int64 [n], len(classes) for what is in none.

    Of centre squares there is one a picture, `num` of them spread evenly; fewer where there are fewer pictures.
    """
    if not crops.cached_crops:
        names = class_names(pictures, crops.data)
        index = {name: i for i, name in enumerate(classes)}
        chosen = np.linspace(0, len(pictures) - 1, min(num, len(pictures))).round().astype(int).tolist()
        for first in range(0, len(chosen), PART):
            part = chosen[first : first + PART]
            pixels = np.stack([centre_square(pictures[i], crops.resolution) for i in part])
            yield (
                torch.from_numpy(pixels).permute(0, 3, 1, 2),
                torch.tensor([index.get(names[i], len(classes)) for i in part]),
            )
        return
    source = LabelledCrops(
        pictures, crops.data, classes, resolution=crops.resolution, batch=PART,
        augmentation=Augmentation(crop_scale=crops.crop_scale, flip=crops.flip), seed=0,
    )  # fmt: skip
    for part in range(-(-num // PART)):
        batch = source[first_step + part]
        n = min(PART, num - part * PART)
        yield batch["pixels"][:n], batch["labels"][:n]


def reference_moments(
    crops: Crops,
    features: Features,
    num: int,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Moments:
    """Moments of `features` over `num` crops of the training pictures. check: called between parts; what it raises
    passes through."""
    moments = Moments(features.channels)
    for pixels, _ in fixed_crops(crops, crops.pictures()[0], [], num):
        check()
        moments.add(features(pixels.to(device))["pool"])
    return moments


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What flow models on one autoencoder are trained and judged with."""

    ae: AutoEncoder | RAE
    """Frozen, on the device of the cell."""
    cache: LatentCache
    """Training latents."""
    channels: int
    """Of a token."""
    held_out: Tensor
    """Normalised latents of held-out crops, fp32 [N, C, h, w], on the device."""
    labels: Tensor
    """Their classes, int64 [N]; len(cache.classes) for those of none."""
    reference: Moments
    """Of features that samples are measured against."""


def make_latents(
    path: str,
    folder: Path,
    crops: Crops,
    *,
    held_out: int,
    device: torch.device,
    teacher: str = "none",
    teacher_weights: str = "",
    dtype: str = "fp16",
) -> None:
    """Writes the cache of the autoencoder at `path` and the latents of `held_out` held-out crops into `folder`.

    What is there is kept. Interrupted where a signal asked to leave.
    """
    config = CacheConfig(
        autoencoder=path, out=folder, data=crops.data, held_out=crops.held_out, resolution=crops.resolution,
        crops=crops.share(), crop_scale=crops.crop_scale, flip=crops.flip, teacher=teacher,
        teacher_weights=teacher_weights, dtype=dtype, device=str(device),  # type: ignore[arg-type]
    )  # fmt: skip
    if code := make_cache(config):
        raise Interrupted(code - 128)
    file = folder / "held_out.safetensors"
    if not file.is_file():
        ae = load_autoencoder(path, device=device)
        classes = LatentCache(folder, ae).classes
        parts = [
            (encode(ae, pixels), labels)
            for pixels, labels in fixed_crops(crops, crops.pictures()[1], classes, held_out)
        ]
        save_tensors(file, dict(zip(("latents", "labels"), map(torch.cat, zip(*parts, strict=True)), strict=True)))


def load_latents(path: str, folder: Path, reference: Moments, device: torch.device) -> Latents:
    """What `make_latents` wrote, and the autoencoder. ValueError if they do not belong together."""
    ae = load_autoencoder(path, device=device).requires_grad_(False)
    tensors = load_tensors(folder / "held_out.safetensors")[0]
    return Latents(
        ae=ae,
        cache=LatentCache(folder, ae),
        channels=ae.cfg.latent_channels,
        held_out=tensors["latents"].to(device),
        labels=tensors["labels"].to(device),
        reference=reference,
    )


@torch.no_grad()
def encode(ae: AutoEncoder | RAE, pixels: Tensor) -> Tensor:
    """uint8 [N, 3, R, R] -> normalised latents, fp32, on the CPU."""
    device = next(ae.parameters()).device
    return torch.cat([ae.encode(from_uint8(part.to(device))).float().cpu() for part in pixels.split(32)])
