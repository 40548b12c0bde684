"""Pictures in and out: files of every common kind to uint8 RGB, pixels to and from [-1, 1], PNG sheets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")  # not all of Pillow's: EPS runs a program
LARGEST_PIXELS = 178_956_970  # of a picture: half a gigabyte of RGB; Pillow's own limit
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap the sides


def find_images(path: str | Path) -> list[Path]:
    """The picture files at `path`: the file itself, or those in the folder and below, sorted; hidden ones passed over.

    FileNotFoundError if there is no such path, ValueError if there are no files of IMAGE_SUFFIXES in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder of pictures")
    found = []
    for folder, folders, files in os.walk(path):  # does not follow links to folders: no loops
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(folder) / f for f in files if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")]
    if not found:
        raise ValueError(f"{path}: expected {', '.join(IMAGE_SUFFIXES)} files in this folder or below, got none")
    return sorted(found)


def load_image(path: str | Path, channels: int = 3) -> np.ndarray:
    """A picture file as uint8 [H, W, channels], upright; as `decode_image`. FileNotFoundError if there is no file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    return decode_image(path, path, channels)


def decode_image(file: Path | BinaryIO, name: str | Path, channels: int = 3) -> np.ndarray:
    """A picture as uint8 [H, W, channels], upright: 1 channel is grey, 3 are RGB, 4 are RGBA.

    EXIF orientation is applied; without a channel for it, transparency is laid on white; palette and CMYK pictures
    become RGB; 16-bit grey is scaled to 8 bits by value / 257; of an animation the first frame is taken. ValueError
    with `name` and the reason if it is damaged, none of FORMATS, of more than LARGEST_PIXELS, or floating-point.
    """
    from PIL import ImageOps

    try:
        with _opened(file, name) as image:
            image.load()  # before the mode is looked at: PNG transparency is read with the pixels
            ImageOps.exif_transpose(image, in_place=True)  # else it copies all pictures, the upright too
    except _Refused:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"{name}: damaged picture ({str(error) or type(error).__name__})") from None
    return _to_array(image, name, channels)


def image_size(file: Path | BinaryIO, name: str | Path) -> tuple[int, int]:
    """(height, width) of a picture as `decode_image` gives it, from its header. ValueError as there."""
    try:
        with _opened(file, name) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except _Refused:
        raise
    except Exception as error:  # as above
        raise ValueError(f"{name}: damaged picture ({str(error) or type(error).__name__})") from None
    return (width, height) if turned else (height, width)


class _Refused(ValueError):
    """No picture, or one too large to be decoded."""


def _opened(file: Path | BinaryIO, name: str | Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes below LARGEST_PIXELS, and of odd metadata
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _Refused(f"{name}: refused, too many pixels ({error})") from None
    except UnidentifiedImageError:
        size = file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
        raise _Refused(f"{name}: not a picture" + (" (the file is empty)" if not size else "")) from None
    if image.width * image.height > LARGEST_PIXELS:
        raise _Refused(f"{name}: refused, too many pixels ({image.width} x {image.height}, over {LARGEST_PIXELS:,})")
    return image


def _to_array(image: Image.Image, name: str | Path, channels: int) -> np.ndarray:
    from PIL import Image

    if image.mode == "F":
        raise ValueError(f"{name}: floating-point pictures have no agreed range; expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name}: expected grey values of 16 bits, got {values.min()} to {values.max()}")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    if channels == 4 and image.mode == "CMYK":  # which Pillow does not convert at once
        image = image.convert("RGB")
    array = np.array(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    return array[:, :, None] if channels == 1 else array


def to_pixels(image: np.ndarray) -> Tensor:
    """uint8 [H, W, C] or [N, H, W, C] -> fp32 [C, H, W] or [N, C, H, W] in [-1, 1]: x / 127.5 - 1; C is 1, 3 or 4."""
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] not in MODES:
        raise ValueError(f"expected uint8 [H, W, C] or [N, H, W, C], got {image.dtype} {list(image.shape)}")
    return from_uint8(torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3))


def from_uint8(x: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> fp32 pixels of the same shape in [-1, 1]: x / 127.5 - 1."""
    return x.float() / 127.5 - 1.0


def as_rgb(x: Tensor) -> Tensor:
    """Pixels [N, C, H, W] in [-1, 1] -> [N, 3, H, W], for networks that know RGB alone: grey three times; RGBA laid on
    mid grey, so that what cannot be seen does not count."""
    if x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    return x[:, :3] * (0.5 * (x[:, 3:] + 1.0)) if x.shape[1] == 4 else x


def to_uint8(x: Tensor) -> Tensor:
    """Pixels [..., 3, H, W] in [-1, 1] -> uint8 of the same shape: round(127.5 (x + 1)), clamped."""
    return ((x.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_array(x: Tensor) -> np.ndarray:
    """uint8 tensor [C, H, W] -> uint8 array [H, W, C]."""
    return x.permute(1, 2, 0).contiguous().cpu().numpy()


def adm_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3], cropped as ADM's training and evaluation do (guided-diffusion).

    Both sides are halved (box filter) while the shorter is at least twice `size`; the shorter side is brought to `size`
    bicubically, also from below, and the centre taken.
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 1 or size < 1:
        raise ValueError(
            f"centre crop: expected uint8 [H, W, 3] and a positive size, got {image.dtype} {list(image.shape)}, {size}"
        )
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(picture)[top : top + size, left : left + size]


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 1, 3 or 4] as PNG, atomically, making the folder. OSError if it cannot be written."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Equally sized uint8 [H, W, C] pictures in rows of `columns`, white between them."""
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"tile: expected pictures of one size, got {sorted(shapes)}")
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, images[0].shape[2]), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def error_image(a: np.ndarray, b: np.ndarray, gain: int = 5) -> np.ndarray:
    """gain times |a - b| of uint8 pictures, clipped to uint8; black is no error."""
    error = np.clip(gain * np.abs(a.astype(np.int16) - b.astype(np.int16)), 0, 255).astype(np.uint8)
    if error.shape[-1] == 4:  # opaque, that the colours' errors show; transparency's is its own picture
        error = np.concatenate((error[..., :3] | error[..., 3:], np.full_like(error[..., 3:], 255)), -1)
    return error
