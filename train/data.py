"""Training pictures: skimage's bundled photographs or those of a source, and crops drawn from them.

The crop of sample i at step s is a pure function of (seed, s, i): one Philox draw decides picture, place, scale, flip,
rotation and colour, so that any number of workers and any resume give the same batches.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flux2.images import MODES, decode_image, from_uint8, image_size
from kernels.philox import uniform
from train.bad_samples import MOST_IN_A_ROW, Bad, BadSamples
from train.buckets import BucketOrder, nearest_bucket, read_sizes
from train.crops import DRAWS, Augmentation, colours, crop_of
from train.dist import Share
from train.loop import SIGNALS
from train.sources import Files, Source, open_source

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


class Pictures:
    """Pictures of a source, or some of them, read when asked for; in_memory: kept then. channels: 1, 3 or 4."""

    def __init__(
        self, source: Source, indices: Sequence[int] | None = None, *, in_memory: bool = False, channels: int = 3
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"channels: expected 1, 3 or 4, got {channels}")
        self.source, self.in_memory, self.channels = source, in_memory, channels
        self.indices = range(len(source.paths)) if indices is None else indices
        self._kept = lru_cache(maxsize=None)(self._read) if in_memory else self._read

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 [H, W, channels]. ValueError, with its name and the reason, if it cannot be read."""
        return self._kept(index)

    def _read(self, index: int) -> np.ndarray:
        place = self.indices[index]
        return decode_image(self.source.open(place), self.source.paths[place], self.channels)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width), from its header. ValueError as for the picture."""
        place = self.indices[index]
        return image_size(self.source.open(place), self.source.paths[place])

    @property
    def paths(self) -> list[Path]:
        """What each is called: its file, or ARCHIVE/MEMBER."""
        return [self.source.paths[i] for i in self.indices]

    @property
    def labels(self) -> list[str]:
        """The class of each: its first folder below the data, or what its archive or table says; "" for none."""
        return [self.source.labels[i] for i in self.indices]

    def path(self, index: int) -> Path:
        return self.source.paths[self.indices[index]]

    def stamp(self, index: int) -> str:
        """Changes when the picture does."""
        return self.source.stamp(self.indices[index])

    def subset(self, positions: Iterable[int]) -> Pictures:
        """Those at `positions`."""
        chosen = [self.indices[p] for p in positions]
        return Pictures(self.source, chosen, in_memory=self.in_memory, channels=self.channels)

    def __getstate__(self) -> dict:  # caches do not travel to worker processes
        names = ("source", "indices", "in_memory", "channels")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def embedded_photographs(channels: int = 3) -> tuple[Pictures, Pictures]:
    """(training, held-out) photographs bundled with the scikit-image wheel, as files; nothing is downloaded."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = TRAINING_PHOTOGRAPHS + HELD_OUT_PHOTOGRAPHS
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"scikit-image's bundled photographs are missing from {folder}: {', '.join(missing)}")
    groups = [[folder / n for n in group] for group in (TRAINING_PHOTOGRAPHS, HELD_OUT_PHOTOGRAPHS)]
    train, held_out = (Pictures(Files(paths), in_memory=True, channels=channels) for paths in groups)
    return train, held_out


def open_pictures(data: str, held_out: str = "", *, channels: int = 3) -> tuple[Pictures, Pictures]:
    """(training, held-out) pictures: `data` is "photographs" (embedded) or what `train.sources.open_source` takes.

    held_out: a source of its own; without it each 20th picture of `data` (at least one) is held out.
    """
    apart = Pictures(open_source(held_out), channels=channels) if held_out else None
    if data == "photographs":
        train, held = embedded_photographs(channels)
        return train, apart or held
    pictures = Pictures(open_source(data), channels=channels)
    if apart:
        return pictures, apart
    if len(pictures) < 2:
        raise ValueError(
            f"{data}: expected at least 2 pictures (one is held out), got {len(pictures)}; or give --held-out"
        )
    held = range(0, len(pictures), HELD_OUT_EVERY)
    kept = [i for i in range(len(pictures)) if i % HELD_OUT_EVERY]
    return pictures.subset(kept), pictures.subset(held)


def class_names(pictures: Pictures, data: str) -> list[str]:
    """The class of each picture, as `Pictures.labels`; of an embedded photograph its own name."""
    if data == "photographs":
        return [path.stem for path in pictures.paths]
    return pictures.labels


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

    def index_of(self, step: int, sample: int, after: int = 0) -> int:
        """The thing; with `after`, the one so many places later in that epoch's order, the end followed by the
        beginning."""
        epoch, position = divmod(step * self.batch + sample, self.num)
        return int(self._permutation(epoch)[(position + after) % self.num])

    def length_of(self, step: int) -> int:
        """Things that a step's samples are out of."""
        return self.num


class Samples(NamedTuple):
    """A step's crops uint8 [n, C, H, W], the pictures they were cut from, and those that could not be read."""

    crops: Tensor
    pictures: list[int]
    bad: list[Bad]


class CropBatches(Dataset):
    """Item `step` is the batch of that step: uint8 [batch, C, R, R], or [batch, C, H, W] of one of the `buckets`.

    With a share it is the share's samples of that batch.

    Pictures are visited in a fresh random order each epoch, an epoch being len(pictures) samples; BucketOrder says what
    it is with buckets. In the place of a picture that cannot be read comes the next of the epoch's order that can: the
    batches stay a function of files, seed and step. With skip_bad=False it is a ValueError instead.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        resolution: int,
        batch: int,
        augmentation: Augmentation,
        seed: int,
        skip_bad: bool = True,
        buckets: Sequence[tuple[int, int]] = (),
        share: Share | None = None,
    ) -> None:
        self.pictures, self.resolution, self.batch, self.share = pictures, resolution, batch, share
        self.samples = share.samples() if share else list(range(batch))
        self.augmentation, self.seed, self.skip_bad, self.buckets = augmentation, seed, skip_bad, list(buckets)
        self._order: EpochOrder | BucketOrder = EpochOrder(len(pictures), batch=batch, seed=seed)
        if buckets:
            nearest = [nearest_bucket(size, buckets) for size in read_sizes(pictures.size, len(pictures))]
            self._order = BucketOrder(nearest, batch=batch, seed=seed)

    def picture_of(self, step: int, sample: int) -> int:
        """Index of the picture that sample `sample` of step `step` is cut from, where that can be read."""
        return self._order.index_of(step, sample)

    def names(self, step: int, ranks: Sequence[int] = ()) -> list[str]:
        """File names of these pictures, of all samples of a step; of some processes' samples alone."""
        samples = self.share.of_processes(ranks) if self.share else range(self.batch)
        return [self.pictures.path(self.picture_of(step, i)).name for i in samples]

    def shape_of(self, step: int) -> tuple[int, int]:
        """(height, width) of a step's crops."""
        if isinstance(self._order, BucketOrder):
            return self.buckets[self._order.bucket_of(step)]
        return self.resolution, self.resolution

    def _readable(self, step: int, sample: int, bad: list[Bad]) -> tuple[int, np.ndarray]:
        """(index, picture) of a sample, or of the next after it that can be read; adds those that cannot to `bad`."""
        tried = min(self._order.length_of(step), MOST_IN_A_ROW) if self.skip_bad else 1
        for after in range(tried):
            index = self._order.index_of(step, sample, after)
            try:
                return index, self.pictures[index]
            except ValueError as error:
                if not self.skip_bad:
                    raise
                name = str(self.pictures.path(index))
                bad.append(Bad(name, str(error).removeprefix(f"{name}: ")))
        raise Unreadable(bad)

    def read(self, step: int) -> Samples:
        """The batch of a step, with what it is made of. Unreadable where nothing in its place can be read."""
        draws = uniform(self.seed, step, 0, self.batch, DRAWS, stream=STREAM_CROPS)[self.samples]
        shape = self.shape_of(step)
        crops: np.ndarray | None = None
        indices: list[int] = []
        bad: list[Bad] = []
        for i, (sample, u) in enumerate(zip(self.samples, draws.tolist(), strict=True)):
            index, image = self._readable(step, sample, bad)
            if crops is None:
                crops = np.empty((len(self.samples), *shape, image.shape[2]), np.uint8)
            crops[i] = crop_of(image, shape, u, self.augmentation)
            indices.append(index)
        assert crops is not None
        batch = torch.from_numpy(crops).permute(0, 3, 1, 2)  # uint8 [n, C, H, W]
        batch = colours(batch, draws, self.augmentation.colour) if self.augmentation.colour else batch
        return Samples(batch, indices, bad)

    def reported(self, step: int) -> tuple[Tensor, list[Bad]]:
        """(item, those that could not be read)"""
        samples = self.read(step)
        return samples.crops, samples.bad

    def __getitem__(self, step: int) -> Tensor:
        return self.read(step).crops


class Unreadable(ValueError):
    """Nothing in the place of a sample can be read; `bad` are those that were tried."""

    def __init__(self, bad: list[Bad]) -> None:
        super().__init__(f"{bad[-1].sample}: {bad[-1].reason}; nor can the {len(bad) - 1} tried before it")
        self.bad = bad

    def __reduce__(self):
        return Unreadable, (self.bad,)


def _ignore_signals(_: int) -> None:
    """Terminals and schedulers send signals to worker processes, too; when to stop is the main process's to say."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Reported(Dataset):
    """Items of a data set with the pictures that could not be read, which have to come back from worker processes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> tuple[Any, list[Bad]]:
        try:
            return self.dataset.reported(step)
        except Unreadable as error:
            return None, error.bad


def batches(dataset: Dataset, start: int, stop: int, *, workers: int, bad: BadSamples | None = None) -> Iterator[Any]:
    """Items start .. stop - 1 of `dataset`, a batch each, in order; `workers` processes read ahead (0: none).

    bad: takes the pictures that could not be read, of a data set that has `reported`.
    """
    listed = bad is not None and hasattr(dataset, "reported")
    loader = DataLoader(
        _Reported(dataset) if listed else dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return _noted(loader, start, bad) if listed and bad is not None else iter(loader)


def _noted(loader: Iterable[tuple[Any, list[Bad]]], start: int, bad: BadSamples) -> Iterator[Any]:
    for step, (item, found) in enumerate(loader, start):
        bad.note(step, [Bad(*b) for b in found])
        if item is None:
            raise ValueError(f"none of the pictures tried for step {step} can be read; they are listed in {bad.path}")
        yield item


def held_out_crops(pictures: Pictures, *, num_crops: int = 256, resolution: int = 64) -> Tensor:
    """Fixed crops at native scale, uint8 [num_crops, C, R, R]: an equal share of each picture, places from seed 0.

    ValueError, naming it, if a picture cannot be read: what quality is measured on is not to change unseen.
    """
    draws = uniform(0, 0, 0, num_crops, 5, stream=STREAM_HELD_OUT).tolist()
    plain = Augmentation(flip=False)
    share = math.ceil(num_crops / len(pictures))
    crops = [crop_of(pictures[i // share], resolution, u, plain) for i, u in enumerate(draws)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def training_pixels(dataset: CropBatches, num_images: int) -> Tensor:
    """About num_images training crops as pixels [N, C, R, R] in [-1, 1], the same for the same config.

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
