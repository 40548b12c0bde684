"""Sets of pictures that an evaluation reads: a folder, crops of the bundled photographs, or an array in an ADM .npz.

Each gives uint8 [n, 3, H, W] in order, all of one size, and says in `crop` and `digest` what they are: figures compare
only where these are equal.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flux2.images import adm_center_crop, find_images, load_image
from flux2.tensor_files import LISTED
from train.data import Augmentation, CropBatches, Pictures, batches, embedded_photographs, held_out_crops

REFERENCE_STEP = 2**31 + 2**20  # first step of crops that neither training nor its validation draws
CROPS_AT_ONCE = 64  # of the training photographs: the crops depend on it
HELD_OUT = 256  # crops of the held-out photographs


class PictureSet(Dataset):
    """Pictures of one size, in order. name: what a user calls them; count; crop: how they were cut, in words."""

    name: str
    count: int
    crop: str
    chunk = 32
    """Pictures an item of the data set holds."""

    def __len__(self) -> int:
        return -(-self.count // self.chunk)

    def __getitem__(self, index: int) -> Tensor:
        """Item `index`: uint8 [n, 3, H, W], the pictures from `index * chunk` on."""
        raise NotImplementedError

    def batches(self, workers: int = 0) -> Iterator[Tensor]:
        """uint8 [n, 3, H, W] each; `workers` processes read ahead."""
        return batches(self, 0, len(self), workers=workers)

    def side(self) -> int:
        """Side of the pictures, pixels. ValueError if they are not square."""
        height, width = next(self.batches()).shape[2:]
        if height != width:
            raise ValueError(
                f"{self.name}: expected square pictures, got {width}x{height}; crop them with --resolution"
            )
        return height

    def files(self) -> list[tuple[str, Path]]:
        """Names and paths of the files that the pictures come from."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256, 64 hexadecimal digits, of names and bytes of the files, and of the crop."""
        total = hashlib.sha256(f"{self.crop}; {self.count}\n".encode())
        for name, path in self.files():
            with path.open("rb") as file:
                total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


class FolderPictures(PictureSet):
    """The picture files in a folder and below, in the order of their names.

    resolution: side of ADM's centre crop; 0 takes pictures as they are, which must be of one size. num: so many, spread
    evenly over the folder; 0 is all. names: the files' paths below the folder. FileNotFoundError without the folder;
    ValueError if it has no pictures, or fewer than `num`, or not of one size.
    """

    def __init__(self, folder: str | Path, *, resolution: int = 0, num: int = 0) -> None:
        paths, self.folder = find_images(folder), Path(folder)
        if num > len(paths):
            raise ValueError(f"{folder}: expected {num} pictures or more, got {len(paths)}")
        num = num or len(paths)
        self.paths = [paths[i * len(paths) // num] for i in range(num)]
        self.name, self.count, self.resolution = str(folder), num, resolution
        self.crop = f"ADM centre crop to {resolution} pixels" if resolution else "as stored"
        self._size = self._read(0).shape

    def names(self) -> list[str]:
        """Paths below the folder, without suffix: what two folders of pictures are matched by."""
        folder = self.folder if self.folder.is_dir() else self.folder.parent
        return [p.relative_to(folder).with_suffix("").as_posix() for p in self.paths]

    def files(self) -> list[tuple[str, Path]]:
        return list(zip(self.names(), self.paths, strict=True))

    def _read(self, index: int) -> np.ndarray:
        image = load_image(self.paths[index])
        return adm_center_crop(image, self.resolution) if self.resolution else image

    def __getitem__(self, index: int) -> Tensor:
        first, images = index * self.chunk, []
        for i in range(first, min(self.count, first + self.chunk)):
            images.append(self._read(i))
            if images[-1].shape != self._size:
                size, own = (f"{s[1]}x{s[0]}" for s in (self._size, images[-1].shape))
                raise ValueError(
                    f"{self.paths[i]}: expected {size} pixels, as {self.paths[0].name} has, got {own}; or crop them"
                    " with --resolution"
                )
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def check_pairs(reference: FolderPictures, images: FolderPictures) -> None:
    """ValueError unless two folders hold pictures of the same names, whatever their suffixes."""
    a, b = reference.names(), images.names()
    for folder, names in ((reference.folder, a), (images.folder, b)):
        if twice := [n for n, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{folder}: expected one picture of each name, got several of {twice[0]}")
    if a != b:
        parts = [("missing", sorted(set(a) - set(b))), ("others", sorted(set(b) - set(a)))]
        got = "; ".join(f"{len(n)} {what}, as {', '.join(n[:LISTED])}" for what, n in parts if n)
        raise ValueError(f"{images.folder}: expected the {len(a)} names of {reference.folder}, got {got}")


class HeldOutPhotographs(PictureSet):
    """Fixed crops, at native scale, of the bundled photographs that training never sees (`train.data`)."""

    def __init__(self, *, resolution: int, num: int = 0) -> None:
        self.pictures = embedded_photographs()[1]
        self.name, self.count, self.resolution = "held-out photographs", num or HELD_OUT, resolution
        self.crop = f"crops of {resolution} pixels of the held-out photographs, native scale, seed 0"
        self._crops: Tensor | None = None

    def files(self) -> list[tuple[str, Path]]:
        return [(p.name, p) for p in self.pictures.paths]

    def __getitem__(self, index: int) -> Tensor:
        if self._crops is None:
            self._crops = held_out_crops(self.pictures, num_crops=self.count, resolution=self.resolution)
        return self._crops[index * self.chunk : (index + 1) * self.chunk]


class TrainingCrops(PictureSet):
    """Random crops of training pictures, drawn as in training but at steps that it never reaches."""

    chunk = CROPS_AT_ONCE

    def __init__(
        self,
        pictures: Pictures | None = None,
        *,
        resolution: int,
        num: int,
        augmentation: Augmentation,
        name: str = "photographs",
    ) -> None:
        self.crops = CropBatches(
            embedded_photographs()[0] if pictures is None else pictures,
            resolution=resolution,
            batch=self.chunk,
            augmentation=augmentation,
            seed=0,
        )
        self.name, self.count = name, num
        low, high = augmentation.crop_scale
        options = ", mirrored" * augmentation.flip + ", rotated" * augmentation.rotate
        options += f", colour {augmentation.colour:g}" if augmentation.colour else ""
        scale = "native scale" if low == high == 1 else f"{low:g} to {high:g} source pixels a pixel"
        self.crop = f"random crops of {resolution} pixels of the training pictures, {scale}{options}, seed 0"

    def files(self) -> list[tuple[str, Path]]:
        return [(p.name, p) for p in self.crops.pictures.paths]

    def __getitem__(self, index: int) -> Tensor:
        return self.crops[REFERENCE_STEP + index][: self.count - index * self.chunk]


class NpzPictures(PictureSet):
    """arr_0, uint8 [N, H, W, 3], of an .npz file as ADM's evaluator reads it; streamed, never unpickled.

    ValueError, in one sentence, if the file is damaged or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name, self.crop = str(path), "as stored"
        with _open_npz(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{path}: expected arr_0, got {_listed(archive)}")
            with archive.open("arr_0.npy") as file:
                self.shape = _header(file, self.path)
        self.count = self.shape[0]

    def files(self) -> list[tuple[str, Path]]:
        return [("", self.path)]

    def batches(self, workers: int = 0) -> Iterator[Tensor]:
        """As of any set, but read by this process: the file is one compressed stream."""
        size = int(np.prod(self.shape[1:]))
        with _open_npz(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file, self.path)
            for first in range(0, self.count, self.chunk):
                n = min(self.chunk, self.count - first)
                try:
                    data = file.read(n * size)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ValueError(f"{self.path}: damaged .npz file ({error})") from None
                if len(data) < n * size:
                    raise ValueError(f"{self.path}: arr_0 is cut short: expected {self.count} pictures")
                images = np.frombuffer(data, np.uint8).reshape(n, *self.shape[1:])
                yield torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the arrays `names` that an .npz file holds, as fp64. ValueError if it is damaged or holds objects."""
    with _open_npz(path) as archive:
        there = [n for n in names if f"{n}.npy" in archive.namelist()]
    found: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in there:
                found[name] = np.asarray(arrays[name], dtype=np.float64)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected arrays of numbers, got something else ({error})") from None
    return found


def _open_npz(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: expected an .npz file, got something else ({error})") from None


def _header(file: Any, path: Path) -> tuple[int, ...]:
    """Shape of the array whose .npy stream begins here. ValueError unless it is uint8 [N, H, W, 3]."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: arr_0 is damaged ({error})") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not shape[0]:
        order = " by columns" if fortran else ""
        raise ValueError(f"{path}: expected arr_0 uint8 [N, H, W, 3], got {dtype} {list(shape)}{order}")
    return shape


def _listed(archive: zipfile.ZipFile) -> str:
    return ", ".join(n.removesuffix(".npy") for n in archive.namelist()[:LISTED]) or "nothing"
