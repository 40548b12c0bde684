"""What an autoencoder's latent is like for the model that trains on it: `python -m train.evaluate latents`.

Channels, rank and probe are of normalised latents, as `encode` returns them; spectrum and equivariance error are of raw
ones, in which neighbours in the picture are neighbours in the latent.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import load_autoencoder
from flux2.equivariance import Transform
from flux2.images import adm_center_crop, from_uint8, save_png, tile
from flux2.probes import (
    covariance_eigenvalues,
    effective_rank,
    equivariance_error,
    linear_probe_r2,
    radial_spectrum,
    spectrum_slope,
)
from flux2.rae import RAE
from flux2.teachers import Teacher, build_teacher
from flux2.tensor_files import save_json
from train.cache import hash_of_pictures
from train.crops import Augmentation, centre_square
from train.data import Pictures, held_out_crops, open_pictures
from train.evaluation import PHOTOGRAPHS, figure_text, padded
from train.figures import panels
from train.loop import choose_device, environment
from train.page import page, picture, table
from train.picture_sets import TrainingCrops
from train.references import note, watched
from train.report import latent_rgb

FORMAT, VERSION = "flux2-tokenizer latents", 1
LATENT_BITS = 16  # of a number of the latent, as latents are kept and sent: bf16
SHOWN, SHOWN_SIDE = 4, 256  # held-out pictures shown, and their side
SMALLEST_SPECTRUM = 8  # positions along a side
TRANSFORMS = {
    "turned 90°": Transform(turns=1),
    "turned 180°": Transform(turns=2),
    "scaled by 3/4": Transform(scale=0.75),
    "scaled by 1/2": Transform(scale=0.5),
}
SCALED = 4  # sides must be this many times a latent position, for what is scaled to be whole positions


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """What `python -m train.evaluate latents` does."""

    autoencoder: tuple[str, ...]
    """Runs of train.vae, .safetensors files or diffusers folders; several are set side by side."""
    preset: str | None = None
    """Shape of the weights, where a file fits several (sd, sdxl)."""
    data: str = PHOTOGRAPHS
    """"photographs" (bundled with scikit-image) or a folder of pictures."""
    held_out: str = ""
    """Folder of held-out pictures; by default coffee and chelsea, or each 20th picture of --data."""
    resolution: int = 128
    """Side of the crops, pixels; that of an RAE is its own."""
    num: int = 256
    """Crops of training pictures that the linear probe is fitted on; half as many of held-out ones judge everything."""
    teacher: str = "hog"
    """Whose tokens the probe predicts; a name of flux2.teachers."""
    teacher_weights: str = ""
    """File of the teacher's weights; by default timm's, from its cache or the hub."""
    out: Path = Path("latent-report")
    """Folder for latents.json, report.html and pictures."""
    batch: int = 16
    """Crops computed at once."""
    workers: int = 0
    """Processes that read crops ahead."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("num", 4), ("batch", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not self.autoencoder:
            raise ValueError("autoencoder: expected at least one, got none")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """An autoencoder's figures by name, and what its pictures are drawn from.

    mean, std: fp64 [C], of each channel. eigenvalues: fp64 [C], of the channels' covariance. spectrum: frequencies in
    cycles a pixel, and power; None of latents of fewer than 8 positions a side.
    """

    figures: dict[str, float | None]
    mean: Tensor
    std: Tensor
    eigenvalues: Tensor
    spectrum: tuple[Tensor, Tensor] | None


Encoder = AutoEncoder | RAE


def compression(ae: Encoder) -> dict[str, float]:
    """Channels of a token, pixels it covers, and bits a pixel of a latent kept in bf16."""
    channels, pixels = ae.cfg.latent_channels, ae.cfg.multiple**2
    return {
        "channels": channels,
        "pixels_per_token": pixels,
        "bits_per_pixel": channels * LATENT_BITS / pixels,
    }


@torch.no_grad()
def diagnose(ae: Encoder, fit: Tensor, judged: Tensor, teacher: Teacher, *, batch: int = 16) -> Diagnosis:
    """Figures of `ae`: the probe is fitted on crops `fit` and judged, as all else is, on `judged`.

    fit, judged: uint8 [N, 3, R, R], with R a multiple of 4 latent positions (`cfg.multiple`), an RAE's its own.
    teacher: for positions of `cfg.multiple` pixels. ValueError on other sides.
    """
    side, m = judged.shape[-1], ae.cfg.multiple
    if side % (SCALED * m) or judged.shape[-2] != side:
        raise ValueError(f"latent report: expected square crops of a multiple of {SCALED * m} pixels, got {side}")
    device = next(ae.parameters()).device

    def in_parts(f: Any, images: Tensor) -> Tensor:
        return torch.cat([f(from_uint8(part.to(device))).cpu() for part in images.split(batch)])

    def raw(x: Tensor) -> Tensor:
        return torch.cat([ae.posterior(part).mode() for part in x.split(batch)])

    z, z_fit = (in_parts(ae.encode, images) for images in (judged, fit))
    tokens, tokens_fit = (in_parts(teacher, images) for images in (judged, fit))
    rows = z.transpose(0, 1).flatten(1).double()  # [C, N h w]
    x = from_uint8(judged.to(device))
    spatial = raw(x)
    moved = {name: equivariance_error(raw, x, t, ae.cfg.downsample) for name, t in TRANSFORMS.items()}
    broad = spatial.shape[-1] >= SMALLEST_SPECTRUM
    figures: dict[str, float | None] = {
        **compression(ae),
        "effective_rank": effective_rank(z),
        "probe_r2": linear_probe_r2(z_fit, tokens_fit, z, tokens),
        "spectrum_slope": spectrum_slope(spatial) if broad else None,
        "equivariance_error": math.sqrt(sum(e * e for e in moved.values()) / len(moved)),
        **{f"equivariance_error, {name}": e for name, e in moved.items()},
        "largest_mean": rows.mean(1).abs().max().item(),
        "smallest_std": rows.std(1).min().item(),
        "largest_std": rows.std(1).max().item(),
    }
    spectrum = None
    if broad:
        frequency, power = radial_spectrum(spatial)
        spectrum = frequency.cpu() / ae.cfg.downsample, power.cpu()
    return Diagnosis(
        figures=figures,
        mean=rows.mean(1),
        std=rows.std(1),
        eigenvalues=covariance_eigenvalues(z),
        spectrum=spectrum,
    )


@torch.no_grad()
def pca_sheet(ae: Encoder, pictures: Pictures) -> np.ndarray:
    """Held-out pictures above, the three main components of their raw latents as colours below; uint8 [H, W, 3]."""
    device = next(ae.parameters()).device
    side = ae.cfg.resolution if isinstance(ae, RAE) else SHOWN_SIDE // ae.cfg.multiple * ae.cfg.multiple
    images = [adm_center_crop(pictures[i], side) for i in range(min(SHOWN, len(pictures)))]
    drawn = []
    for image in images:
        x = from_uint8(torch.from_numpy(image).permute(2, 0, 1)[None].to(device))
        small = latent_rgb(ae.posterior(x).mode()[0].float().cpu())
        factor = side // small.shape[0]
        drawn.append(small.repeat(factor, 0).repeat(factor, 1))
    return tile([*images, *drawn], columns=len(images))


def plot_channels(diagnoses: dict[str, Diagnosis], path: Path) -> None:
    """Mean and standard deviation of each channel, a row each autoencoder; PNG."""
    figure, axes = panels(len(diagnoses), 2, (12, 2.6 * len(diagnoses)))
    for row, (name, d) in zip(axes, diagnoses.items(), strict=True):
        for axis, values, title in zip(row, (d.mean, d.std), ("mean", "standard deviation"), strict=True):
            axis.bar(range(len(values)), values.numpy(), width=1.0)
            axis.set_title(f"{name}: {title} of each channel", fontsize=10)
            axis.set_xlabel("channel")
        row[1].axhline(1, lw=0.8, c="black")
    figure.savefig(path, dpi=100)


def plot_spectra(diagnoses: dict[str, Diagnosis], path: Path) -> None:
    """Radial power spectra, and the share of variance in the leading directions; PNG."""
    figure, ((left, right),) = panels(1, 2, (12, 4))
    for name, d in diagnoses.items():
        if d.spectrum:
            frequency, power = d.spectrum
            left.loglog(
                frequency, power / power[0], "o-", ms=3, label=f"{name}: slope {d.figures['spectrum_slope']:.2f}"
            )
        share = d.eigenvalues.cumsum(0) / d.eigenvalues.sum()
        rank = d.figures["effective_rank"]
        (line,) = right.plot(
            range(1, len(share) + 1), share, label=f"{name}: effective rank {rank:.1f} of {len(share)}"
        )
        right.axvline(rank, lw=0.8, ls="--", c=line.get_color())
    left.set(title="power of the raw latent by frequency, over that of the lowest", xlabel="cycles a pixel")
    right.set(title="share of the variance in the leading directions", xlabel="directions", ylim=(0, 1.02))
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


COLUMNS = {  # figure: its head in a table
    "channels": "channels a token",
    "bits_per_pixel": "bits a pixel",
    "effective_rank": "effective rank",
    "probe_r2": "probe R²",
    "spectrum_slope": "spectrum slope",
    "equivariance_error": "equivariance error",
    "largest_mean": "largest |mean|",
    "smallest_std": "least std",
    "largest_std": "largest std",
}


def rows_of(diagnoses: dict[str, Diagnosis]) -> list[list[str]]:
    """A table of the main figures, the head first."""
    rows = [["", *COLUMNS.values()]]
    rows += [[name, *(figure_text(d.figures[c]) for c in COLUMNS)] for name, d in diagnoses.items()]
    return rows


def unique_names(paths: Sequence[str]) -> list[str]:
    """Names of folders or files, without suffix, or of a run for its copy; numbered where two are the same."""
    names: list[str] = []
    for path in map(Path, paths):
        stem = path.parent.name if path.name == "autoencoder.safetensors" else path.name.removesuffix(".safetensors")
        stem = stem or "autoencoder"
        names.append(next(n for i in range(1, len(paths) + 1) if (n := stem if i == 1 else f"{stem}-{i}") not in names))
    return names


def report(config: LatentsConfig) -> int:
    """Prints the table, writes figures, pictures and the page; the exit code."""
    device = choose_device(config.device)
    names = unique_names(config.autoencoder)
    aes = [load_autoencoder(path, preset=config.preset, device=device) for path in config.autoencoder]
    for path, ae in zip(config.autoencoder, aes, strict=True):
        own, least = getattr(ae.cfg, "resolution", config.resolution), SCALED * ae.cfg.multiple
        if config.resolution != own or config.resolution % least:
            expected = f"{own}, the RAE's own" if own != config.resolution else f"a multiple of {least}"
            raise ValueError(f"resolution: {path}: expected {expected}, got {config.resolution}")
    pictures, held_out = open_pictures(config.data, config.held_out)
    fit, judged = _crops(config, pictures, held_out)
    config.out.mkdir(parents=True, exist_ok=True)
    diagnoses: dict[str, Diagnosis] = {}
    for name, ae in zip(names, aes, strict=True):
        print(f"{name}: {len(fit)} and {len(judged)} crops of {config.resolution} pixels", flush=True)
        teacher = build_teacher(config.teacher, ae.cfg.multiple, config.teacher_weights, device)
        diagnoses[name] = diagnose(ae, fit, judged, teacher, batch=config.batch)
        save_png(config.out / f"{name}-pca.png", pca_sheet(ae, held_out))
        if diagnoses[name].spectrum is None:
            note(f"{name}: no spectrum of fewer than {SMALLEST_SPECTRUM} positions a side; give a larger --resolution")
    protocol = {
        "resolution": config.resolution,
        "fitted_on": len(fit),
        "judged_on": len(judged),
        "teacher": config.teacher,
        "pictures": hash_of_pictures(pictures)[:16],
        "held_out": hash_of_pictures(held_out)[:16],
    }
    figures = {name: d.figures for name, d in diagnoses.items()}
    about = {"format": FORMAT, "version": VERSION, "protocol": protocol, "environment": environment(device)}
    save_json(config.out / "latents.json", {**about, "autoencoders": figures})
    plot_channels(diagnoses, config.out / "channels.png")
    plot_spectra(diagnoses, config.out / "spectra.png")
    (config.out / "report.html").write_text(_page(config, diagnoses, protocol))
    print(padded(rows_of(diagnoses)))
    print(f"{config.out / 'latents.json'}\n{config.out / 'report.html'}")
    return 0


def _crops(config: LatentsConfig, pictures: Pictures, held_out: Pictures) -> tuple[Tensor, Tensor]:
    """(fitted on, judged): uint8 [N, 3, R, R] each.

    Of the photographs random crops at native scale; of a folder the centre square of pictures spread evenly over it,
    and, where it has fewer than wanted, random crops, too.
    """
    half, side, device = config.num // 2, config.resolution, torch.device("cpu")
    if config.data != PHOTOGRAPHS and len(pictures) >= config.num and len(held_out) >= half:
        sets = [(pictures, config.num), (held_out, half)]
        chosen = [[p[i * len(p) // n] for i in range(n)] for p, n in sets]
        return _stacked(chosen[0], side), _stacked(chosen[1], side)
    crops = TrainingCrops(pictures, resolution=side, num=config.num, augmentation=Augmentation(flip=False))
    fit = torch.cat(list(watched(crops.batches(config.workers), config.num, device)))
    return fit, held_out_crops(held_out, num_crops=half, resolution=side)


def _stacked(images: list[np.ndarray], side: int) -> Tensor:
    """Centre squares, uint8 [N, 3, side, side]."""
    return torch.from_numpy(np.stack([centre_square(image, side) for image in images])).permute(0, 3, 1, 2)


def _page(config: LatentsConfig, diagnoses: dict[str, Diagnosis], protocol: dict[str, Any]) -> str:
    head, *rows = rows_of(diagnoses)
    moved = []
    for name, d in diagnoses.items():
        moved.append([name, *(figure_text(d.figures[f"equivariance_error, {t}"]) for t in TRANSFORMS)])
    caption = "held-out pictures, and their raw latents' main components as colours"
    pca = "".join(picture(config.out / f"{name}-pca.png", f"{name}: {caption}", "48%") for name in diagnoses)
    power = "power of raw latents by frequency, and variance of normalised ones in their leading directions"
    body = f"""<p>{html.escape(", ".join(f"{k} {v}" for k, v in protocol.items()))}</p>
{table(head, rows)}
<p>Bits a pixel count a latent kept in bf16; a picture has 24. The effective rank is the exponential of the entropy of
the covariance's eigenvalues: at most the channels of a token. The probe's R² is the share of the teacher's tokens that
a linear map of one position explains on held-out pictures. A spectrum of slope 0 is white, photographs have -2 to -3.
The equivariance error is 0 where a latent moves as its picture does, 1.41 where it knows nothing of it.</p>
<h2>Equivariance error</h2>
{table(["", *TRANSFORMS], moved)}
<h2>Spectra</h2>
{picture(config.out / "spectra.png", power)}
<h2>Channels</h2>
{picture(config.out / "channels.png", "normalised latents, over held-out crops: 0 and 1 where the statistics fit")}
<h2>Pictures</h2>
{pca}"""
    return page("Latents", body, "\n".join(f"{k}: {v}" for k, v in vars(config).items()))


DESCRIPTION = """Measure the latents of one or several autoencoders, and draw them.

  python -m train.evaluate latents --autoencoder runs/photos
  python -m train.evaluate latents --autoencoder sd.safetensors flux2.safetensors --data PICTURES --resolution 256

Channel statistics, spectrum, effective rank, linear probe to a teacher's tokens, equivariance error, compression.
Writes OUT/latents.json, OUT/report.html and pictures.
"""


def main(argv: list[str]) -> int:
    """`python -m train.evaluate latents`: the exit code. ValueError or OSError on bad input."""
    import tyro

    return report(tyro.cli(LatentsConfig, prog="python -m train.evaluate latents", description=DESCRIPTION, args=argv))
