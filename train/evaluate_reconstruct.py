"""How well an autoencoder's reconstructions, or a folder of them, hold: `python -m train.evaluate reconstruct`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flux2.checkpoints import load_autoencoder
from flux2.features import build_features
from flux2.images import error_image, save_png, tile, to_array
from flux2.metrics import lpips_distance, psnr, ssim
from flux2.perceptual import LEAST_SIDE, LPIPS
from train.evaluation import PHOTOGRAPHS, CommonConfig, Figures, distances, finish
from train.loop import choose_device
from train.picture_sets import FolderPictures, HeldOutPhotographs, PictureSet, check_pairs
from train.references import Collected, note, reference_of, watched

STRIP = 8  # pictures of a strip of reconstructions

DESCRIPTION = """Measure an autoencoder's reconstructions, or a folder of them: PSNR, SSIM, LPIPS, rFID and the like.

  python -m train.evaluate reconstruct --autoencoder runs/photos
  python -m train.evaluate reconstruct --autoencoder ae.safetensors --data VAL --features inception --workers 8
  python -m train.evaluate reconstruct --reference ORIGINALS --images RECONSTRUCTIONS

The posterior's mean is decoded and rounded to 8 bits before anything is measured. Writes OUT/evaluation.json and
OUT/strip.png (originals, reconstructions, 5x error).
"""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(CommonConfig):
    """What `python -m train.evaluate reconstruct` does."""

    autoencoder: str = ""
    """A run of train.vae, a .safetensors file or a diffusers folder."""
    preset: str | None = None
    """Shape of the weights, where the file fits several (sd, sdxl)."""
    data: str = PHOTOGRAPHS
    """Pictures to reconstruct: a folder, ADM-cropped to --resolution (256), or photographs: crops (of 64 pixels) of
    those that are held out."""
    reference: str = ""
    """Instead of --autoencoder and --data: a folder of originals,"""
    images: str = ""
    """and a folder of their reconstructions, of the same names."""
    num: int = 0
    """Pictures, spread evenly over the folder; 0 is all, or 256 crops of the photographs."""
    kid: bool = False
    """Also take the kernel distance."""
    lpips: Literal["vgg", "alex", "none"] = "vgg"
    """Network of LPIPS."""
    lpips_weights: str = ""
    """File of its weights; by default torchvision's, from its cache or the net; without them there is no LPIPS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.reference) != bool(self.images) or bool(self.autoencoder) == bool(self.images):
            given = [f"--{n}" for n in ("autoencoder", "reference", "images") if getattr(self, n)]
            got = ", ".join(given) or "neither"
            raise ValueError(f"expected --autoencoder, or --reference and --images, got {got}")
        if self.num < 0 or self.num == 1:
            raise ValueError(f"num: expected 0, or 2 or more, got {self.num}")


def reconstruct(config: ReconstructConfig) -> int:
    """Prints the figures and writes them; the exit code."""
    device = choose_device(config.device)
    features = build_features(config.features, config.feature_weights, device)
    name, originals, pairs, notes = _pairs(config, device)
    network = _lpips(config, device)
    reference = reference_of(originals, features, device, cache=config.cache, workers=config.workers)
    config.out.mkdir(parents=True, exist_ok=True)
    print(f"reconstructions of {name}", flush=True)
    found, values, strip = Collected(originals.count, originals.count if config.kid else 0), {}, []
    shown = {i * originals.count // STRIP for i in range(STRIP)}
    for a, b in watched(pairs, originals.count, device, size=lambda pair: len(pair[0])):
        if a.shape != b.shape:
            expected, got = list(a.shape[2:]), list(b.shape[2:])
            raise ValueError(f"{config.images}: expected pictures of {expected} pixels, got {got}")
        if network and min(a.shape[2:]) < LEAST_SIDE:
            note(f"no LPIPS: expected sides of at least {LEAST_SIDE} pixels, got {list(a.shape[2:])}")
            network = None
        strip += [(a[i], b[i]) for i in range(len(a)) if found.seen + i in shown]
        measured = {"PSNR": psnr(a, b), "SSIM": ssim(a, b)}
        if network:
            measured[f"LPIPS-{config.lpips}"] = lpips_distance(a.to(device), b.to(device), network).cpu()
        for key, value in measured.items():
            values.setdefault(key, []).append(value)
        found.add(features(b.to(device)))
    figures: Figures = {key: _mean(torch.cat(parts)) for key, parts in values.items()}
    metrics = ("fd", "kd") if config.kid else ("fd",)
    figures |= distances(
        found, reference, features, device, prefix="r", metrics=metrics, kernel=config.kernel, seed=config.seed
    )
    save_png(config.out / "strip.png", strip_of(strip))
    return finish(config, "reconstruct", name, found, reference, features, figures, notes, "strip.png", device)


Pairs = Iterator[tuple[Tensor, Tensor]]


def _pairs(config: ReconstructConfig, device: torch.device) -> tuple[str, PictureSet, Pairs, str]:
    """(what is judged, its originals, batches of both, notes on the protocol)"""
    if config.images:
        a, b = (
            FolderPictures(p, resolution=config.resolution, num=config.num) for p in (config.reference, config.images)
        )
        check_pairs(a, b)
        a.chunk = b.chunk = config.batch
        return config.images, a, zip(a.batches(config.workers), b.batches(config.workers), strict=True), "as stored"
    ae = load_autoencoder(config.autoencoder, preset=config.preset, device=device)
    if config.data == PHOTOGRAPHS:
        a: PictureSet = HeldOutPhotographs(resolution=config.resolution or 64, num=config.num)
    else:
        a = FolderPictures(config.data, resolution=config.resolution or 256, num=config.num)
    a.chunk = config.batch

    def both() -> Pairs:
        from train.vae import reconstruct_uint8

        for images in a.batches(config.workers):
            yield images, reconstruct_uint8(ae, images, batch=config.batch)

    return config.autoencoder, a, both(), "posterior mean, fp32"


def _lpips(config: ReconstructConfig, device: torch.device) -> LPIPS | None:
    """The network, or None, with a line on why. FileNotFoundError or ValueError where a given file is not its own."""
    if config.lpips == "none":
        return None
    try:
        return LPIPS(config.lpips, config.lpips_weights).to(device)
    except FileNotFoundError as error:
        if config.lpips_weights:
            raise
        note(f"no LPIPS: {error}")
        return None


def _mean(values: Tensor) -> tuple[float, float]:
    """(mean, its standard error)"""
    return values.double().mean().item(), values.double().std().item() / len(values) ** 0.5


def strip_of(pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Rows: originals, reconstructions, 5x error; uint8 [H, W, 3], small pictures twice as large."""
    a, b = ([to_array(pair[k]) for pair in pairs] for k in (0, 1))
    rows = [*a, *b, *(error_image(x, y) for x, y in zip(a, b, strict=True))]
    sheet = tile(rows, columns=len(pairs))
    return sheet.repeat(2, 0).repeat(2, 1) if a[0].shape[0] <= 128 else sheet


def main(argv: list[str]) -> int:
    """`python -m train.evaluate reconstruct`: the exit code. ValueError or OSError on bad input."""
    import tyro

    prog = "python -m train.evaluate reconstruct"
    return reconstruct(tyro.cli(ReconstructConfig, prog=prog, description=DESCRIPTION, args=argv))
