"""Latent caches: each picture encoded once, for as many flow-model runs as like. `python -m train.data cache --help`.

A cache is a folder of shards, `shard-00000.safetensors` and on, each with

    mean     [n, V, z, h, w]  of the posterior over raw latents; V = 2 with the mirror image, else 1
    logvar   [n, V, z, h, w]  its log-variance, of autoencoders that have one
    labels   [n] int64        classes: folders of the data, or the photographs themselves
    tokens   [n, V, D, h, w]  features of a teacher, if one was asked for

and of manifest.json: what decided the content (hashes of the autoencoder's weights, of the teacher's and of the list of
pictures, and the preprocessing), and each shard's size and SHA-256. Shards and manifest are written whole or not at
all, the manifest after each shard; a killed command goes on at the first shard that is not in it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from flux2.autoencoder import AutoEncoder, Posterior
from flux2.checkpoints import load_autoencoder, save_json, save_tensors
from flux2.images import from_uint8
from flux2.rae import RAE
from flux2.teachers import build_teacher
from flux2.tensor_files import file_hash
from kernels.philox import uniform
from train.bad_samples import MOST_IN_A_ROW, Bad, BadSamples
from train.crops import DRAWS, Augmentation, centre_square, crop_of
from train.data import Pictures, Unreadable, class_names, open_pictures
from train.loop import Interrupt, Progress, choose_device

VERSION = 1
FORMAT = "flux2-tokenizer latent cache"
STREAM_CACHE = 109  # Philox stream of the crops
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What `python -m train.data cache` does."""

    autoencoder: str
    """A run of train.vae, a .safetensors file or a diffusers folder."""
    out: Path
    """Folder of the cache; an unfinished one of the same content is gone on with."""
    data: str = "photographs"
    """"photographs" (bundled with scikit-image), a folder of pictures, whose sub-folders are the classes, tar files,
    a zip, parquet files or hf:USER/NAME; docs/data.md has examples."""
    held_out: str = ""
    """Held-out pictures, as in training: those of --data that are held out are not cached."""
    max_bad: float = 0.01
    """Share of the pictures that may be unreadable; the next one stands in for each, and OUT/bad_samples.jsonl lists
    them."""
    resolution: int = 64
    """Side of the crops, pixels."""
    crops: int = 1
    """Crops of a picture: 1 is its centre square, shrunk; more are drawn at random."""
    crop_scale: tuple[float, float] = (1.0, 4.0)
    """Source pixels per pixel of random crops, drawn log-uniformly."""
    flip: bool = True
    """Also encode mirror images."""
    teacher: str = "none"
    """Also keep this teacher's tokens, for REPA; a name of flux2.teachers."""
    teacher_weights: str = ""
    """File of the teacher's weights; by default timm's, from its cache or the hub."""
    seed: int = 0
    """Decides random crops."""
    shard: int = 4096
    """Crops a file."""
    batch: int = 32
    """Crops encoded at once."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Type that moments and tokens are kept in."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""

    def __post_init__(self) -> None:
        for name in ("resolution", "crops", "shard", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")


def fingerprint(module: nn.Module) -> str:
    """SHA-256, 64 hexadecimal digits, of the names, types, shapes and bits of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_cache(config: CacheConfig) -> int:
    """Encodes what is missing; the exit code: 0, or 128 + signal after an interruption.

    ValueError if the folder holds a cache of other content, naming what differs.
    """
    device = choose_device(config.device)
    ae = load_autoencoder(config.autoencoder, device=device)
    if config.resolution % ae.cfg.multiple:
        raise ValueError(f"resolution: expected a multiple of {ae.cfg.multiple}, got {config.resolution}")
    teacher = None
    if config.teacher != "none":
        teacher = build_teacher(config.teacher, ae.cfg.multiple, config.teacher_weights, device)
    pictures, _ = open_pictures(config.data, config.held_out, channels=ae.cfg.channels)
    names = class_names(pictures, config.data)
    classes = sorted(set(names))
    content = _content(config, ae, teacher, pictures)
    total = len(pictures) * config.crops
    manifest = {"content": content, "classes": classes, "crops": total, "shard": config.shard, "shards": []}
    config.out.mkdir(parents=True, exist_ok=True)
    bad = BadSamples(config.out / "bad_samples.jsonl", total=len(pictures), most=config.max_bad)
    if (config.out / "manifest.json").is_file():
        manifest["shards"] = _finished(config.out, manifest)
    shards = -(-total // config.shard)
    print(
        f"{config.out}: {total} crops of {len(pictures)} pictures in {shards} shards, {len(classes)} classes; {device}"
    )
    if manifest["shards"]:
        print(f"{len(manifest['shards'])} shards are there and whole")
    labels = torch.tensor([classes.index(n) for n in names])
    start = min(len(manifest["shards"]) * config.shard, total)
    with Interrupt() as interrupt:
        progress = Progress(start=start, steps=total, batch=1, device=device)
        for index in range(len(manifest["shards"]), shards):
            parts: list[dict[str, Tensor]] = []
            end = min(total, (index + 1) * config.shard)
            for first in range(index * config.shard, end, config.batch):
                items = range(first, min(end, first + config.batch))
                read = [_readable(pictures, i // config.crops, bad, item=i) for i in items]
                pixels = torch.stack([_pixels(config, image, i) for i, (_, image) in zip(items, read, strict=True)])
                part = _encode(ae, teacher, pixels.to(device), config)
                parts.append({**part, "labels": labels[[picture for picture, _ in read]]})
                progress.update(items[-1] + 1, {})
                if interrupt.signal:
                    progress.close()
                    print(
                        f"{len(manifest['shards'])} of {shards} shards are saved; the same command goes on from there"
                    )
                    return 128 + interrupt.signal
            path = config.out / f"shard-{index:05d}.safetensors"
            save_tensors(path, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})
            row = {"file": path.name, "crops": end - index * config.shard, "bytes": path.stat().st_size}
            manifest["shards"].append({**row, "sha256": file_hash(path)})
            save_json(config.out / "manifest.json", manifest)
        progress.close()
    size = sum(s["bytes"] for s in manifest["shards"])
    print(f"{config.out}: {total} crops, {size / 2**20:,.1f} MiB, complete")
    return 0


def hash_of_pictures(pictures: Pictures) -> str:
    """SHA-256 of the names below the data, sizes and times of change of these pictures, in order."""
    files = hashlib.sha256()
    for index in range(len(pictures)):
        files.update(f"{pictures.stamp(index)}\n".encode())
    return files.hexdigest()


def _content(
    config: CacheConfig, ae: AutoEncoder | RAE, teacher: nn.Module | None, pictures: Pictures
) -> dict[str, Any]:
    """All that the shards are a function of."""
    preprocessing = {"resolution": config.resolution, "crops_per_picture": config.crops, "flip": config.flip}
    if config.crops > 1:
        preprocessing |= {"crop_scale": list(config.crop_scale), "seed": config.seed}
    return {
        "format": FORMAT,
        "version": VERSION,
        "autoencoder": fingerprint(ae),
        "autoencoder_config": json.loads(json.dumps(asdict(ae.cfg))),
        "teacher": config.teacher,
        "teacher_weights": fingerprint(teacher) if teacher else "none",
        "pictures": hash_of_pictures(pictures),
        "dtype": config.dtype,
        "preprocessing": preprocessing,
    }


def _finished(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of shards that are there and whole, up to the first that is not. ValueError on other content."""
    from train.configs import differences

    there = _read_manifest(folder)
    keys = ("content", "classes", "crops", "shard")
    if changed := differences({k: there[k] for k in keys}, {k: manifest[k] for k in keys}):
        raise ValueError(f"{folder} holds a cache of other content: {'; '.join(changed)}; choose another --out")
    whole = []
    for row in there["shards"]:
        if _damage(folder, row) or file_hash(folder / row["file"]) != row["sha256"]:
            print(f"{folder / row['file']} is damaged or missing: it and what follows are encoded again")
            break
        whole.append(row)
    return whole


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a latent cache (manifest.json), which python -m train.data makes")
    try:
        manifest = json.loads(path.read_text())
        if manifest["content"]["format"] == FORMAT and manifest["content"]["version"] == VERSION:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: expected the manifest of a latent cache of version {VERSION}, got something else")


def _damage(folder: Path, row: dict[str, Any]) -> str | None:
    """What is wrong with a shard's file as the file system sees it, or None."""
    path = folder / row["file"]
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != row["bytes"]:
        return f"{path}: expected {row['bytes']} bytes, got {path.stat().st_size}"
    return None


def _readable(pictures: Pictures, index: int, bad: BadSamples, *, item: int) -> tuple[int, np.ndarray]:
    """(index, picture), or those of the next that can be read; what cannot is listed in `bad`. ValueError without."""
    found: list[Bad] = []
    for i in range(index, index + min(len(pictures), MOST_IN_A_ROW)):
        place = i % len(pictures)
        try:
            return place, pictures[place]
        except ValueError as error:
            name = str(pictures.path(place))
            found.append(Bad(name, str(error).removeprefix(f"{name}: ")))
            bad.note(item, found)
    raise Unreadable(found)


def _pixels(config: CacheConfig, picture: np.ndarray, item: int) -> Tensor:
    """Crop `item`, uint8 [C, R, R]: a function of the picture, the seed and the number of the crop."""
    place, crop = divmod(item, config.crops)
    if config.crops == 1:
        image = centre_square(picture, config.resolution)
    else:
        draws = uniform(config.seed, crop, place, 1, DRAWS, stream=STREAM_CACHE)[0].tolist()
        augmentation = Augmentation(crop_scale=config.crop_scale, flip=False)
        image = crop_of(picture, config.resolution, draws, augmentation)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def _encode(ae: AutoEncoder | RAE, teacher: nn.Module | None, pixels: Tensor, config: CacheConfig) -> dict[str, Tensor]:
    x = from_uint8(pixels)
    variants = [x, x.flip(3)] if config.flip else [x]
    posteriors = [ae.posterior(v) for v in variants]
    results = {"mean": torch.stack([p.mean for p in posteriors], 1)}
    logvars = [p.logvar for p in posteriors if isinstance(p, Posterior)]  # an RAE's latent is a point
    if logvars:
        results["logvar"] = torch.stack(logvars, 1)
    if teacher:
        results["tokens"] = torch.stack([teacher(v) for v in variants], 1)
    kept = {k: v.to("cpu", DTYPES[config.dtype]).contiguous() for k, v in results.items()}
    for name, value in kept.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{name}: a value that {config.dtype} cannot hold; use --dtype fp32, or look at the weights"
            )
    return kept


class LatentCache:
    """A complete cache, read at random. Each shard is checked against its SHA-256 when it is first read.

    ValueError, naming the cache, if it is unfinished, a shard is missing, short or damaged, or `ae` is not the
    autoencoder it was made with.
    """

    def __init__(self, folder: str | Path, ae: AutoEncoder | RAE | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.classes: list[str] = self.manifest["classes"]
        made_with = self.manifest["content"]["autoencoder"]
        if ae is not None and (got := fingerprint(ae)) != made_with:
            raise ValueError(
                f"{self.folder} is stale: it was made with an autoencoder of hash {made_with[:12]}, this one has "
                f"{got[:12]}; make another with python -m train.data cache"
            )
        rows = self.manifest["shards"]
        if (done := sum(r["crops"] for r in rows)) != len(self):
            raise ValueError(
                f"{self.folder} is unfinished: {done} of {len(self)} crops; run the command it was made with"
            )
        for row in rows:
            if reason := _damage(self.folder, row):
                raise ValueError(f"{self.folder} is corrupt: {reason}")
        self._shard = lru_cache(maxsize=None)(self._open)

    def __len__(self) -> int:
        return self.manifest["crops"]

    @property
    def flip(self) -> bool:
        """Whether mirror images are there."""
        return self.manifest["content"]["preprocessing"]["flip"]

    @property
    def has_logvar(self) -> bool:
        """Whether the posterior can be drawn from."""
        return "logvar" in self._shard(0).keys()  # noqa: SIM118

    @property
    def crop_scale(self) -> tuple[float, float] | None:
        """Source pixels per pixel of its random crops; None where it holds centre squares."""
        scale = self.manifest["content"]["preprocessing"].get("crop_scale")
        return (scale[0], scale[1]) if scale else None

    def token_channels(self, teacher: str, resolution: int) -> int:
        """Channels of the tokens of `teacher`, 0 for "none". ValueError if it has not those, or another resolution."""
        content = self.manifest["content"]
        if (got := content["preprocessing"]["resolution"]) != resolution:
            raise ValueError(f"{self.folder}: expected crops of --resolution {resolution} pixels, got {got}")
        if teacher == "none":
            return 0
        if content["teacher"] != teacher:
            raise ValueError(f"{self.folder}: expected tokens of {teacher} for --repa, got {content['teacher']}")
        return self._shard(0).get_slice("tokens").get_shape()[2]

    def check_pictures(self, pictures: Pictures, data: str) -> None:
        """ValueError unless it was made of exactly these training pictures of `data`."""
        if self.manifest["content"]["pictures"] != hash_of_pictures(pictures):
            raise ValueError(
                f"{self.folder} is of other pictures than the {len(pictures)} that --data {data} and --held-out"
                " leave for training, or they changed since"
            )

    def check_teacher(self, teacher: nn.Module) -> None:
        """ValueError unless its tokens are of a teacher with these weights."""
        if self.manifest["content"]["teacher_weights"] != fingerprint(teacher):
            raise ValueError(f"{self.folder}: its tokens are of a teacher with other weights than --repa-weights")

    def __getstate__(self) -> dict[str, Any]:  # open files do not travel to worker processes
        return {k: v for k, v in self.__dict__.items() if k != "_shard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shard = lru_cache(maxsize=None)(self._open)

    def _open(self, index: int):
        row = self.manifest["shards"][index]
        path = self.folder / row["file"]
        if (got := file_hash(path)) != row["sha256"]:
            raise ValueError(f"{self.folder} is corrupt: {path}: expected SHA-256 {row['sha256'][:12]}, got {got[:12]}")
        return safe_open(str(path), framework="pt")

    def get(self, items: list[int], flipped: list[bool]) -> dict[str, Tensor]:
        """mean fp32 [N, z, h, w] and labels int64 [N]; logvar like mean and tokens fp32 [N, D, h, w] if there are any.

        ValueError if mirror images are asked for that are not there.
        """
        if any(flipped) and not self.flip:
            raise ValueError(f"{self.folder}: has no mirror images; it was made with --no-flip")
        rows: dict[str, list[Tensor]] = {}
        for item, mirror in zip(items, flipped, strict=True):
            shard, position = divmod(item, self.manifest["shard"])
            file = self._shard(shard)
            for name in file.keys():  # noqa: SIM118
                values = file.get_slice(name)
                rows.setdefault(name, []).append(
                    values[position] if name == "labels" else values[position, int(mirror)]
                )
        return {k: torch.stack(v) if k == "labels" else torch.stack(v).float() for k, v in rows.items()}


_DESCRIPTION = """Encode pictures into a latent cache, which `python -m train.flow --cache FOLDER` trains on.

  python -m train.data cache --autoencoder runs/photos --crops 500 --out latents
  python -m train.data cache --autoencoder ae.safetensors --data PICTURES --resolution 256 --out latents

Ctrl-C, a kill or a reboot cost the shard in progress: the same command goes on.
"""


def main(argv: list[str]) -> int:
    """`python -m train.data cache`: exit code 0; 2 on bad input; 130 or 143 after an interruption."""
    import tyro

    try:
        config = tyro.cli(CacheConfig, prog="python -m train.data cache", description=_DESCRIPTION, args=argv)
        return make_cache(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
