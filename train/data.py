"""Training pictures: skimage's bundled photographs or a folder, and crops drawn from them.

The crop of sample i at step s is a pure function of (seed, s, i): one Philox draw decides picture, place, scale, flip,
rotation and colour, so that any number of workers and any resume give the same batches.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flux2.images import find_images, from_uint8, load_image
from kernels.philox import uniform
from train.loop import SIGNALS

TRAINING_PHOTOGRAPHS = (
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
)
HELD_OUT_PHOTOGRAPHS = ("coffee.png", "chelsea.png")
HELD_OUT_EVERY = 20  # of a folder without its own held-out folder, each 20th picture is held out
# Philox streams of the training loop
STREAM_CROPS, STREAM_POSTERIOR, STREAM_HELD_OUT = 100, 101, 102
STREAM_AUGMENT, STREAM_EQUIVARIANCE, STREAM_NOISE_LEVEL = 103, 104, 105
DRAWS = 12  # uniforms a crop uses, see crop_of and _colours


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """crop_scale: source pixels per output pixel, drawn log-uniformly (upper end cut to what the picture holds).

    flip: mirror with probability 1/2. rotate: by a multiple of 90 degrees. colour: strength of brightness, contrast,
    saturation and channel-order changes; 0 is none.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = True
    rotate: bool = False
    colour: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"crop_scale: expected 0 < low <= high, got {self.crop_scale}")


class Pictures:
    """A list of pictures, read when asked for. Embedded photographs stay in memory, a folder's files do not."""

    def __init__(self, paths: Sequence[Path], *, in_memory: bool) -> None:
        self.paths = list(paths)
        self._read = lru_cache(maxsize=None)(load_image) if in_memory else load_image

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]"""
        return self._read(self.paths[index])

    def __getstate__(self) -> dict:  # caches do not travel to worker processes
        return {"paths": self.paths, "in_memory": self._read is not load_image}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def embedded_photographs() -> tuple[Pictures, Pictures]:
    """(training, held-out) photographs bundled with the scikit-image wheel, as files; nothing is downloaded."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = TRAINING_PHOTOGRAPHS + HELD_OUT_PHOTOGRAPHS
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"scikit-image's bundled photographs are missing from {folder}: {', '.join(missing)}")
    train, held_out = ([folder / n for n in group] for group in (TRAINING_PHOTOGRAPHS, HELD_OUT_PHOTOGRAPHS))
    return Pictures(train, in_memory=True), Pictures(held_out, in_memory=True)


def open_pictures(data: str, held_out: str = "") -> tuple[Pictures, Pictures]:
    """(training, held-out) pictures: `data` is "photographs" (embedded) or a folder searched recursively.

    held_out: a folder of its own; without it each 20th picture of `data` (at least one) is held out.
    """
    if data == "photographs":
        train, held = embedded_photographs()
        return (train, Pictures(find_images(held_out), in_memory=False)) if held_out else (train, held)
    paths = find_images(data)
    if held_out:
        return Pictures(paths, in_memory=False), Pictures(find_images(held_out), in_memory=False)
    if len(paths) < 2:
        raise ValueError(
            f"{data}: expected at least 2 pictures (one is held out), got {len(paths)}; or give --held-out"
        )
    held = paths[::HELD_OUT_EVERY]
    kept = [p for i, p in enumerate(paths) if i % HELD_OUT_EVERY]
    return Pictures(kept, in_memory=False), Pictures(held, in_memory=False)


def class_names(pictures: Pictures, data: str) -> list[str]:
    """The class of each picture: its first folder below `data`, "" for one that lies in `data` itself; of an embedded
    photograph its own name."""
    if data == "photographs":
        return [path.stem for path in pictures.paths]
    parts = [p.relative_to(data).parts if p.is_relative_to(data) else p.parts[-2:] for p in pictures.paths]
    return [p[0] if len(p) > 1 else "" for p in parts]


class EpochOrder:
    """Which of `num` things sample `sample` of step `step` is: each epoch of `num` samples in a fresh random order."""

    def __init__(self, num: int, *, batch: int, seed: int) -> None:
        self.num, self.batch, self.seed = num, batch, seed
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def __getstate__(self) -> dict:  # caches do not travel to worker processes
        return {"num": self.num, "batch": self.batch, "seed": self.seed}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _permutation_of(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num)

    def index_of(self, step: int, sample: int) -> int:
        epoch, position = divmod(step * self.batch + sample, self.num)
        return int(self._permutation(epoch)[position])


class CropBatches(Dataset):
    """Item `step` is the batch of that step: uint8 [batch, 3, R, R].

    Pictures are visited in a fresh random order each epoch, an epoch being len(pictures) samples.
    """

    def __init__(
        self, pictures: Pictures, *, resolution: int, batch: int, augmentation: Augmentation, seed: int
    ) -> None:
        self.pictures, self.resolution, self.batch = pictures, resolution, batch
        self.augmentation, self.seed = augmentation, seed
        self._order = EpochOrder(len(pictures), batch=batch, seed=seed)

    def picture_of(self, step: int, sample: int) -> int:
        """Index of the picture that sample `sample` of step `step` is cut from."""
        return self._order.index_of(step, sample)

    def names(self, step: int) -> list[str]:
        """File names of the pictures that the samples of a step are cut from."""
        return [self.pictures.paths[self.picture_of(step, i)].name for i in range(self.batch)]

    def __getitem__(self, step: int) -> Tensor:
        draws = uniform(self.seed, step, 0, self.batch, DRAWS, stream=STREAM_CROPS)
        crops = [
            crop_of(self.pictures[self.picture_of(step, i)], self.resolution, u, self.augmentation)
            for i, u in enumerate(draws.tolist())
        ]
        batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)  # uint8 [n, 3, R, R]
        return _colours(batch, draws, self.augmentation.colour) if self.augmentation.colour else batch


def crop_of(image: np.ndarray, resolution: int, u: list[float], augmentation: Augmentation) -> np.ndarray:
    """uint8 [R, R, 3] cut from uint8 [H, W, 3]; u: uniforms, of which 0..4 are used here."""
    from PIL import Image

    height, width = image.shape[:2]
    low, high = (resolution * s for s in augmentation.crop_scale)
    high = max(low, min(high, height, width))
    side = min(low * (high / low) ** u[0], height, width)  # source pixels; a small picture is enlarged
    top, left = u[1] * (height - side), u[2] * (width - side)
    if side == resolution:  # native scale: whole pixels, no resampling
        top, left = (min(int(o * (n - side + 1)), n - resolution) for o, n in ((u[1], height), (u[2], width)))
        crop = image[top : top + resolution, left : left + resolution]
    else:
        y0, x0 = int(top), int(left)
        y1, x1 = min(height, math.ceil(top + side)), min(width, math.ceil(left + side))
        box = (left - x0, top - y0, left - x0 + side, top - y0 + side)
        box = (box[0], box[1], min(box[2], x1 - x0), min(box[3], y1 - y0))
        part = Image.fromarray(image[y0:y1, x0:x1])
        crop = np.asarray(part.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))
    if augmentation.flip and u[3] < 0.5:
        crop = crop[:, ::-1]
    if augmentation.rotate:
        crop = np.rot90(crop, int(u[4] * 4))
    return np.ascontiguousarray(crop)


def centre_square(image: np.ndarray, resolution: int) -> np.ndarray:
    """The largest centred square of uint8 [H, W, 3], resampled (PIL's bicubic, antialiased) to uint8 [R, R, 3]."""
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((resolution, resolution), Image.Resampling.BICUBIC))


def _colours(batch: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Contrast, saturation, brightness and channel order, per sample; uniforms 5..10 of `draws` [n, DRAWS]."""
    signed = (2 * draws[:, 5:8, None, None] - 1) * strength  # [n, 3, 1, 1]
    contrast, saturation, brightness = signed[:, 0:1], signed[:, 1:2], signed[:, 2:3]
    x = batch.float()
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + saturation)
    x = (x - 127.5) * (1 + contrast) + 127.5 * (1 + 0.5 * brightness)
    order = torch.argsort(draws[:, 8:11], dim=1)  # a random permutation of the channels,
    keep = (draws[:, 11] >= strength)[:, None]  # applied with probability `strength`
    order = torch.where(keep, torch.arange(3).expand_as(order), order)
    x = torch.gather(x, 1, order[:, :, None, None].expand_as(x))
    return x.round().clamp(0, 255).to(torch.uint8)


def _ignore_signals(_: int) -> None:
    """Terminals and schedulers send signals to worker processes, too; when to stop is the main process's to say."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batches(dataset: Dataset, start: int, stop: int, *, workers: int) -> Iterator[Any]:
    """Items start .. stop - 1 of `dataset`, a batch each, in order; `workers` processes read ahead (0: none)."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def held_out_crops(pictures: Pictures, *, num_crops: int = 256, resolution: int = 64) -> Tensor:
    """Fixed crops at native scale, uint8 [num_crops, 3, R, R]: an equal share of each picture, places from seed 0."""
    draws = uniform(0, 0, 0, num_crops, 5, stream=STREAM_HELD_OUT).tolist()
    plain = Augmentation(flip=False)
    share = math.ceil(num_crops / len(pictures))
    crops = [crop_of(pictures[i // share], resolution, u, plain) for i, u in enumerate(draws)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def training_pixels(dataset: CropBatches, num_images: int) -> Tensor:
    """About num_images training crops as pixels [N, 3, R, R] in [-1, 1], the same for the same config.

    They are those of steps 2^31 and on, which training never reaches: fitting on them costs no training sample.
    """
    steps = range(2**31, 2**31 + math.ceil(num_images / dataset.batch))
    return from_uint8(torch.cat([dataset[s] for s in steps]))


_USAGE = """usage: python -m train.data COMMAND ...

  cache    encode pictures once, for training flow models on (python -m train.data cache --help)"""


def main(argv: list[str] | None = None) -> int:
    """`python -m train.data`: runs one command; exit code 2 where there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["cache"]:
        from train import cache

        return cache.main(argv[1:])
    asked = bool(argv) and argv[0] in ("-h", "--help")
    print(_USAGE if asked else f"error: expected the command cache, got {' '.join(argv[:1]) or 'none'}\n{_USAGE}")
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
