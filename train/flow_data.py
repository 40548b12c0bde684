"""What train.flow reads: crops with their classes, latents of a cache, and the autoencoder that it finds or makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import FORMAT, load_autoencoder
from flux2.rae import RAE
from kernels.philox import uniform
from train.bad_samples import Bad
from train.cache import LatentCache
from train.data import Augmentation, CropBatches, EpochOrder, Pictures, class_names
from train.dist import Share, size

STREAM_MIRROR = 110  # Philox stream of which samples of a cache are mirrored


class LabelledCrops(Dataset):
    """Item `step`: pixels uint8 [n, C, R, R] and labels int64 [n], indices into `classes`; len(classes) for others."""

    def __init__(
        self,
        pictures: Pictures,
        data: str,
        classes: list[str],
        *,
        resolution: int,
        batch: int,
        augmentation: Augmentation,
        seed: int,
        skip_bad: bool = True,
        share: Share | None = None,
    ) -> None:
        self.crops = CropBatches(
            pictures,
            resolution=resolution,
            batch=batch,
            augmentation=augmentation,
            seed=seed,
            skip_bad=skip_bad,
            share=share,
        )
        index = {name: i for i, name in enumerate(classes)}
        self.labels = [index.get(name, len(classes)) for name in class_names(pictures, data)]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.reported(step)[0]

    def reported(self, step: int) -> tuple[dict[str, Tensor], list[Bad]]:
        """(item, pictures that could not be read)"""
        samples = self.crops.read(step)
        labels = torch.tensor([self.labels[i] for i in samples.pictures])
        return {"pixels": samples.crops, "labels": labels}, samples.bad

    def names(self, step: int, ranks: Sequence[int] = ()) -> list[str]:
        """Of the pictures of a step."""
        return self.crops.names(step, ranks)

    def of_class(self, label: int, step: int, num: int) -> list[Tensor]:
        """`num` crops uint8 [3, R, R] of that class's pictures in turn, by the draws of `step`."""
        own = [i for i, y in enumerate(self.labels) if y == label]
        if not own:
            raise ValueError(f"class {label}: has no picture")
        pictures = self.crops.pictures.subset(own[:num])
        crops = CropBatches(
            pictures, resolution=self.crops.resolution, batch=num, augmentation=self.crops.augmentation,
            seed=self.crops.seed,
        )  # fmt: skip
        return list(crops[step])


class CachedLatents(Dataset):
    """Item `step`: what `LatentCache.get` returns for the samples of that step, or for a share's."""

    def __init__(self, cache: LatentCache, *, batch: int, mirror: bool, seed: int, share: Share | None = None) -> None:
        self.cache, self.batch, self.mirror, self.seed, self.share = cache, batch, mirror, seed, share
        self.samples = share.samples() if share else list(range(batch))
        self.order = EpochOrder(len(cache), batch=batch, seed=seed)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        u = uniform(self.seed, step, 0, self.batch, 1, stream=STREAM_MIRROR)[self.samples, 0]
        items = [self.order.index_of(step, i) for i in self.samples]
        return self.cache.get(items, (u < (0.5 if self.mirror else 0)).tolist())

    def names(self, step: int, ranks: Sequence[int] = ()) -> list[str]:
        """Of the samples of a step; of some processes' alone."""
        samples = self.share.of_processes(ranks) if self.share else range(self.batch)
        return [f"item {self.order.index_of(step, i)}" for i in samples]


def newest_autoencoder(out: Path) -> tuple[Path, bool] | None:
    """(run, whether it is finished) of train.vae in `out` whose newest checkpoint is the newest of all, or None."""
    found = []
    for config in out.glob("*/checkpoints/step_*/config.json"):
        try:
            fields = json.loads(config.read_text())
        except (OSError, ValueError):
            continue
        if fields.get("format") == FORMAT and "autoencoder" in fields:
            finished = fields.get("step", 0) >= fields.get("train", {}).get("steps", 0)
            found.append((config.stat().st_mtime, config.parent.parent.parent, finished))
    return max(found)[1:] if found else None


def find_autoencoder(path: str, out: Path) -> AutoEncoder | RAE:
    """The autoencoder at `path`; without one the newest run of train.vae in `out`, which is made if there is none.

    KeyboardInterrupt if making it was interrupted; ValueError if it failed, or the newest run is unfinished.
    """
    if path:
        return load_autoencoder(path)
    newest = newest_autoencoder(out)
    if newest is None:
        if size() > 1:
            raise ValueError(f"no run of train.vae in {out}: several processes need one, or --autoencoder")
        from train import vae

        print(f"no run of train.vae in {out}: training the autoencoder `photos` first", flush=True)
        code = vae.main(["--out", str(out)])
        if code >= 128:
            raise KeyboardInterrupt
        newest = newest_autoencoder(out)
        if code or newest is None:
            raise ValueError(f"no autoencoder: training one ended with exit code {code}; or give --autoencoder")
    run, finished = newest
    if not finished:
        raise ValueError(
            f"{run} is not trained to its end: go on with python -m train.vae --out {out} --name {run.name} --resume"
            f" auto (and its own options), or take it as it is with --autoencoder {run}"
        )
    print(f"autoencoder: {run}")
    return load_autoencoder(run)
