"""The autoencoders of a comparison: trained by train.vae where no weights are given, measured, their latents cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import load_autoencoder
from flux2.distances import Moments, frechet_distance
from flux2.features import Features
from flux2.images import from_uint8, save_png, tile, to_array
from flux2.metrics import psnr, ssim
from flux2.probes import effective_rank, linear_probe_r2
from flux2.rae import RAE
from flux2.teachers import build_teacher
from train.cell_data import PROBE_STEP, Crops, encode, fixed_crops, make_latents
from train.compare_config import CompareConfig
from train.compare_rows import NO_REPA
from train.latent_report import compression
from train.loop import Interrupted
from train.vae import reconstruct_uint8

PROBE_CROPS = 512  # training crops that the probe is fitted on, at most
SHOWN = 8  # pictures of a strip


def weights_of(config: CompareConfig, name: str, folder: Path) -> str:
    """Where an autoencoder's weights are, or will be."""
    return config.paths.get(name) or str(folder / "autoencoders" / name)


def train_autoencoder(config: CompareConfig, name: str, folder: Path, device: torch.device, compile: bool) -> None:
    """Trains it, or goes on. Interrupted by a signal; ValueError where train.vae failed: what it said is on stderr."""
    from train import vae

    flags = config.flags_of(name)
    if "--precision" not in flags:
        flags += ["--precision", config.flow.precision]
    flags += ["--out", str(folder / "autoencoders"), "--name", name, "--resume", "auto", "--device", str(device)]
    if code := vae.main([*flags, *(["--compile"] if compile and "--compile" not in flags else [])]):
        if code >= 128:
            raise Interrupted(code - 128)
        raise ValueError(f"python -m train.vae {' '.join(flags)} ended with exit code {code}")


@torch.no_grad()
def measure_autoencoder(
    config: CompareConfig, name: str, ae: AutoEncoder | RAE, features: Features, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor]:
    """(figures, pictures uint8 [2 SHOWN, 3, R, R]: held-out crops, then their reconstructions).

    psnr, ssim: means over held-out crops; rfd: Frechet distance of their reconstructions to themselves; probe_r2: of
    REPA's teacher, else HOG, from one latent position; effective_rank: of the normalised held-out latents.
    """
    crops = config.crops
    train, held_out = crops.pictures()
    x = _pixels(crops, held_out, config.held_out)
    recon = reconstruct_uint8(ae, x)
    moments = [Moments(features.channels), Moments(features.channels)]
    for of, images in zip(moments, (x, recon), strict=True):
        for part in images.split(64):
            of.add(features(part.to(device))["pool"])
    teacher = build_teacher(
        config.teacher if config.teacher != NO_REPA else "hog", ae.cfg.multiple, config.repa_weights, device
    )
    fitted = _pixels(crops, train, PROBE_CROPS, PROBE_STEP)
    z, z_test = encode(ae, fitted), encode(ae, x)
    tokens, tokens_test = (
        torch.cat([teacher(from_uint8(part.to(device))).cpu() for part in images.split(64)]) for images in (fitted, x)
    )
    figures = {
        "name": name,
        **compression(ae),
        "tokens": (crops.resolution // ae.cfg.multiple) ** 2,
        "psnr": psnr(x, recon).mean().item(),
        "ssim": float(ssim(x, recon).mean()),
        "rfd": frechet_distance(*moments),
        "rfd_count": len(x),
        "probe_r2": linear_probe_r2(z, tokens, z_test, tokens_test),
        "effective_rank": effective_rank(z_test),
        "lpips": None,
    }
    chosen = torch.linspace(0, len(x) - 1, min(SHOWN, len(x))).round().long()
    return figures, torch.cat((x[chosen], recon[chosen]))


def _pixels(crops: Crops, pictures: Any, num: int, first_step: int | None = None) -> torch.Tensor:
    steps = {} if first_step is None else {"first_step": first_step}
    return torch.cat([pixels for pixels, _ in fixed_crops(crops, pictures, [], num, **steps)])


def prepare_autoencoder(
    config: CompareConfig, name: str, folder: Path, features: Features, device: torch.device, compile: bool
) -> dict[str, Any]:
    """Trains, measures and caches; the figures, with `source`. Writes autoencoders/NAME.png and latents/NAME/."""
    trained = name not in config.paths
    if trained:
        train_autoencoder(config, name, folder, device, compile)
    path = weights_of(config, name, folder)
    ae = load_autoencoder(path, device=device).requires_grad_(False)
    if config.crops.resolution % ae.cfg.multiple:
        raise ValueError(f"crops.resolution: expected a multiple of {ae.cfg.multiple}, got {config.crops.resolution}")
    figures, shown = measure_autoencoder(config, name, ae, features, device)
    save_png(folder / "autoencoders" / f"{name}.png", tile([to_array(x) for x in shown], columns=len(shown) // 2))
    make_latents(
        path, folder / "latents" / name, config.crops, held_out=config.held_out, device=device, teacher=config.teacher,
        teacher_weights=config.repa_weights,
    )  # fmt: skip
    return {**figures, "source": f"train.vae {config.training[name]}" if trained else f"weights {Path(path).name}"}
