"""Pictures in and out: files of every common kind to uint8 RGB, pixels to and from [-1, 1], PNG sheets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def find_images(path: str | Path) -> list[Path]:
    """The picture files at `path`: the file itself, or those in the folder and below, sorted; hidden ones passed over.

    FileNotFoundError if there is no such path, ValueError if there are no jpg, png or webp files in it.
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


def load_image(path: str | Path) -> np.ndarray:
    """A picture file as uint8 [H, W, 3] RGB, upright.

    EXIF orientation is applied; transparency is laid on white; grey, palette and CMYK pictures become RGB; 16-bit grey
    is scaled to 8 bits by value / 257; of an animation the first frame is taken. FileNotFoundError if there is no file;
    ValueError naming the file and the reason if it is damaged, no picture, too large to be one, or floating-point.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as opened:
            opened.load()  # before the mode is looked at: PNG transparency is read with the pixels
            image = ImageOps.exif_transpose(opened)
            return _to_rgb(image, path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: refused, too many pixels ({error})") from None
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise ValueError(f"{path}: not a picture" + (" (the file is empty)" if not size else "")) from None
    except (OSError, SyntaxError, EOFError) as error:  # what PIL's decoders raise on damaged files
        raise ValueError(f"{path}: damaged picture ({error})") from None


def _to_rgb(image, path: Path) -> np.ndarray:
    from PIL import Image

    if image.mode == "F":
        raise ValueError(f"{path}: floating-point pictures have no agreed range; expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{path}: expected grey values of 16 bits, got {values.min()} to {values.max()}")
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def to_pixels(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] or [N, H, W, 3] -> fp32 [3, H, W] or [N, 3, H, W] in [-1, 1]: x / 127.5 - 1."""
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"expected uint8 [H, W, 3] or [N, H, W, 3], got {image.dtype} {list(image.shape)}")
    return from_uint8(torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3))


def from_uint8(x: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> fp32 pixels of the same shape in [-1, 1]: x / 127.5 - 1."""
    return x.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Pixels [..., 3, H, W] in [-1, 1] -> uint8 of the same shape: round(127.5 (x + 1)), clamped."""
    return ((x.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_array(x: Tensor) -> np.ndarray:
    """uint8 tensor [3, H, W] -> uint8 array [H, W, 3]."""
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
    """Writes uint8 [H, W, 3] as PNG, atomically, making the folder. OSError if the place cannot be written."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Equally sized uint8 [H, W, 3] pictures in rows of `columns`, white between them."""
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"tile: expected pictures of one size, got {sorted(shapes)}")
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def error_image(a: np.ndarray, b: np.ndarray, gain: int = 5) -> np.ndarray:
    """gain times |a - b| of uint8 pictures, clipped to uint8; black is no error."""
    return np.clip(gain * np.abs(a.astype(np.int16) - b.astype(np.int16)), 0, 255).astype(np.uint8)
