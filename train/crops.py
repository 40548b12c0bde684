"""How a crop is cut from a picture, and its colours changed: functions of the picture and a sample's uniforms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DRAWS = 12  # uniforms a crop uses, see crop_of and colours


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


def crop_of(image: np.ndarray, shape: int | tuple[int, int], u: list[float], augmentation: Augmentation) -> np.ndarray:
    """uint8 [H, W, C] cut to `shape`, a side or (height, width); u: uniforms, of which 0..4 are used here."""
    height, width = image.shape[:2]
    rows, columns = (shape, shape) if isinstance(shape, int) else shape
    low, high = (rows * s for s in augmentation.crop_scale)
    most = min(height, width * rows / columns)
    high = max(low, min(high, most))
    tall = min(low * (high / low) ** u[0], most)  # source pixels; a small picture is enlarged
    wide = tall if rows == columns else min(tall * columns / rows, width)
    top, left = u[1] * (height - tall), u[2] * (width - wide)
    if (tall, wide) == (rows, columns):  # native scale: whole pixels, no resampling
        top, left = (
            min(int(u[1] * (height - rows + 1)), height - rows),
            min(int(u[2] * (width - columns + 1)), width - columns),
        )
        crop = image[top : top + rows, left : left + columns]
    else:
        y0, x0 = int(top), int(left)
        y1, x1 = min(height, math.ceil(top + tall)), min(width, math.ceil(left + wide))
        box = (left - x0, top - y0, left - x0 + wide, top - y0 + tall)
        box = (box[0], box[1], min(box[2], x1 - x0), min(box[3], y1 - y0))
        crop = resized(image[y0:y1, x0:x1], (rows, columns), box)
    if augmentation.flip and u[3] < 0.5:
        crop = crop[:, ::-1]
    if augmentation.rotate:
        crop = np.rot90(crop, int(u[4] * 4) if rows == columns else 2 * int(u[4] * 2))
    return np.ascontiguousarray(crop)


def resized(
    image: np.ndarray, shape: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """uint8 [H, W, C] or its `box` (left, top, right, bottom) resampled (PIL's bicubic, antialiased) to `shape`."""
    from PIL import Image

    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    array = np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=box))
    return array[:, :, None] if image.shape[2] == 1 else array


def centre_square(image: np.ndarray, resolution: int) -> np.ndarray:
    """The largest centred square of uint8 [H, W, C], resampled to uint8 [R, R, C]."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resized(image[top : top + side, left : left + side], (resolution, resolution))


def colours(batch: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Contrast, saturation, brightness and channel order, per sample; uniforms 5..10 of `draws` [n, DRAWS].

    Transparency stays as it is; of grey the saturation and the order of channels are nothing.
    """
    signed = (2 * draws[:, 5:8, None, None] - 1) * strength  # [n, 3, 1, 1]
    contrast, saturation, brightness = signed[:, 0:1], signed[:, 1:2], signed[:, 2:3]
    x = batch[:, :3].float()
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + saturation)
    x = (x - 127.5) * (1 + contrast) + 127.5 * (1 + 0.5 * brightness)
    if x.shape[1] == 3:
        order = torch.argsort(draws[:, 8:11], dim=1)  # a random permutation of the channels,
        keep = (draws[:, 11] >= strength)[:, None]  # applied with probability `strength`
        order = torch.where(keep, torch.arange(3).expand_as(order), order)
        x = torch.gather(x, 1, order[:, :, None, None].expand_as(x))
    x = x.round().clamp(0, 255).to(torch.uint8)
    return torch.cat((x, batch[:, 3:]), 1) if batch.shape[1] == 4 else x
