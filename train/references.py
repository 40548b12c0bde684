"""Features of sets of pictures, and references: statistics of the pictures that others are judged by, kept on disk."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from flux2.distances import Moments
from flux2.features import Features
from flux2.tensor_files import file_hash, load_json, load_tensors, save_json, save_tensors
from train.loop import Progress
from train.picture_sets import NpzPictures, PictureSet, read_npz

FORMAT, VERSION = "flux2-tokenizer reference", 1
KEPT_ROWS = 10_000  # feature vectors of a reference that are kept, as many as ADM's reference batches hold pictures

T = TypeVar("T")


def default_cache() -> Path:
    """Where references are kept: flux2-tokenizer/reference in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux2-tokenizer" / "reference"


def note(text: str) -> None:
    """One line to whoever runs the program, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Collected:
    """What a set's features leave: moments, up to `keep` vectors (spread evenly over `count`), and logits."""

    def __init__(self, count: int, keep: int) -> None:
        self.count, self.seen = count, 0
        kept = min(count, keep)
        self._wanted = {i * count // kept for i in range(kept)} if kept else set[int]()
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self._rows: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, found: dict[str, Tensor]) -> None:
        """Takes in what `Features` returns of the next pictures."""
        pool = found["pool"]
        self.pool = self.pool or Moments(pool.shape[1])
        self.pool.add(pool)
        if "spatial" in found:
            self.spatial = self.spatial or Moments(found["spatial"].shape[1])
            self.spatial.add(found["spatial"])
        if "logits" in found:
            self._logits.append(found["logits"].float().cpu())
        wanted = [i for i in range(len(pool)) if self.seen + i in self._wanted]
        self._rows.append(pool[wanted].float().cpu())
        self.seen += len(pool)

    def rows(self) -> Tensor:
        """fp32 [K, D]"""
        return torch.cat(self._rows)

    def logits(self) -> Tensor | None:
        """fp32 [N, classes], of features that have them."""
        return torch.cat(self._logits) if self._logits else None


def watched(
    batches: Iterable[T],
    count: int,
    device: torch.device,
    size: Callable[[T], int] = len,  # type: ignore[assignment]
) -> Iterator[T]:
    """The batches, with a progress line over their `count` pictures; size: pictures of a batch."""
    progress, done = Progress(start=0, steps=count, batch=1, device=device), 0
    try:
        for batch in batches:
            yield batch
            done += size(batch)
            progress.update(done, {})
    finally:
        progress.close()


def collect(pictures: PictureSet, features: Features, device: torch.device, *, keep: int, workers: int) -> Collected:
    """Features of a whole set."""
    found = Collected(pictures.count, keep)
    for images in watched(pictures.batches(workers), pictures.count, device):
        found.add(features(images.to(device)))
    return found


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of the pictures that others are judged by.

    digest: SHA-256 of these pictures and their crop. count: pictures. features: identity. spatial: of features that
    have it. rows: fp32 [K, D], some of the feature vectors, for distances that need them; K may be 0.
    """

    name: str
    digest: str
    crop: str
    count: int
    features: str
    pool: Moments
    spatial: Moments | None
    rows: Tensor


def reference_of(
    pictures: PictureSet, features: Features, device: torch.device, *, cache: Path, workers: int = 0
) -> Reference:
    """Statistics of a set, from `cache` or into it: KEY.safetensors and KEY.json, KEY a hash of `digest` and features.

    A damaged file is computed again; a cache that cannot be written is passed over. One line on stderr says so.
    """
    digest = pictures.digest()
    key = hashlib.sha256(f"{digest} {features.identity} {KEPT_ROWS}".encode()).hexdigest()[:32]
    path = cache / f"{key}.safetensors"
    if path.with_suffix(".json").is_file():
        try:
            reference = load_reference(path)
            if (reference.digest, reference.features) != (digest, features.identity):
                raise ValueError(f"{path}: expected the statistics of {pictures.name}, got those of {reference.name}")
            return reference
        except (ValueError, OSError) as error:
            note(f"{error}: computed again")
    print(f"{features.name} of {pictures.count} reference pictures ({pictures.name})", flush=True)
    found = collect(pictures, features, device, keep=KEPT_ROWS, workers=workers)
    assert found.pool
    reference = Reference(
        name=pictures.name, digest=digest, crop=pictures.crop, count=pictures.count, features=features.identity,
        pool=found.pool, spatial=found.spatial, rows=found.rows(),
    )  # fmt: skip
    try:
        save_reference(reference, path)
    except OSError as error:
        note(f"the reference is not kept: {error}")
    return reference


def save_reference(reference: Reference, path: Path) -> None:
    """Writes `path`, a .safetensors file, and the .json beside it. OSError if the place cannot be written."""
    parts = {"pool": reference.pool} | ({"spatial": reference.spatial} if reference.spatial else {})
    tensors = {f"{part}.{k}": v for part, moments in parts.items() for k, v in moments.tensors().items()}
    save_tensors(path, {**tensors, "rows": reference.rows})
    fields = {k: getattr(reference, k) for k in ("name", "digest", "crop", "count", "features")}
    about = {"format": FORMAT, "version": VERSION, **fields, "sha256": file_hash(path)}
    save_json(path.with_suffix(".json"), about)


def load_reference(path: Path) -> Reference:
    """What `save_reference` wrote. FileNotFoundError without either file; ValueError if one is damaged or another's."""
    about_path = path.with_suffix(".json")
    if not about_path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a saved reference, with {about_path.name} beside it, got no such file"
        )
    about = load_json(about_path)
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(f"{about_path}: expected a reference of version {VERSION}, got something else")
    tensors, _ = load_tensors(path)
    if (got := file_hash(path)) != about.get("sha256"):
        raise ValueError(f"{path}: expected SHA-256 {str(about.get('sha256'))[:12]}, got {got[:12]}")
    moments = {
        part: Moments.from_tensors({k.split(".")[1]: v for k, v in tensors.items() if k.startswith(f"{part}.")})
        for part in ("pool", "spatial")
        if f"{part}.count" in tensors
    }
    try:
        return Reference(
            pool=moments["pool"], spatial=moments.get("spatial"), rows=tensors["rows"],
            **{k: about[k] for k in ("name", "digest", "crop", "count", "features")},
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{path}: a reference without {error}") from None


def adm_reference(path: Path, features: Features, device: torch.device, *, cache: Path, workers: int = 0) -> Reference:
    """An ADM reference batch: mu and sigma (and mu_s and sigma_s) as stored, where there are any and the features are
    Inception's; all else from the pictures in arr_0.

    ValueError if the file has neither, or mu and sigma are of other features.
    """
    moments: dict[str, Moments] = {}
    if features.name == "inception":
        stored = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s"))
        for part, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            if mu in stored and sigma in stored:
                mean, cov = torch.from_numpy(stored[mu]), torch.from_numpy(stored[sigma])
                try:  # the number of pictures is not stored, and no distance needs it
                    moments[part] = Moments.from_mean_cov(mean, cov, KEPT_ROWS)
                except ValueError as error:
                    raise ValueError(f"{path}: {mu} and {sigma}: {error}") from None
    if "pool" in moments and moments["pool"].dim != features.channels:
        raise ValueError(f"{path}: expected mu [{features.channels}], got [{moments['pool'].dim}]")
    try:
        pictures = NpzPictures(path)
    except ValueError:
        if "pool" not in moments:
            raise
        digest, rows = file_hash(path), torch.empty(0, features.channels)
        return Reference(
            name=str(path), digest=digest, crop="as stored", count=0, features=features.identity,
            pool=moments["pool"], spatial=moments.get("spatial"), rows=rows,
        )  # fmt: skip
    own = reference_of(pictures, features, device, cache=cache, workers=workers)
    return Reference(
        name=own.name, digest=own.digest, crop=own.crop, count=0 if moments else own.count, features=own.features,
        pool=moments.get("pool", own.pool), spatial=moments.get("spatial", own.spatial), rows=own.rows,
    )  # fmt: skip
