"""`python -m flux2 info | convert | reconstruct | encode | decode`: autoencoders on files, from the command line."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from flux2.autoencoder import AUTOENCODERS, AutoEncoder, AutoencoderConfig
from flux2.checkpoints import load_autoencoder, save_autoencoder
from flux2.images import error_image, find_images, load_image, save_png, tile, to_array, to_pixels, to_uint8
from flux2.metrics import psnr, ssim
from flux2.rae import RAE, RAES, RAEConfig
from flux2.tensor_files import load_tensors, save_tensors


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which autoencoder to use, and how."""

    weights: Path
    """A .safetensors file, a diffusers folder, or a run or checkpoint folder of train.vae."""
    preset: str | None = None
    """Shape of the weights, where the file fits several (sd, sdxl)."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations."""
    memory: Literal["normal", "low"] = "normal"
    """low works in bands of rows, for large pictures: the same result up to rounding (docs/high-resolution.md)."""

    def load(self) -> AutoEncoder | RAE:
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]
        try:
            ae = load_autoencoder(self.weights, preset=self.preset, device=device, dtype=dtype)
        except (RuntimeError, AssertionError) as error:  # what torch raises on a device that is not there
            raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
        if self.memory == "low" and isinstance(ae, RAE):
            raise ValueError("--memory low: expected a convolutional autoencoder, got an RAE")
        return ae

    @property
    def options(self) -> dict[str, Any]:
        """Of encode, decode and reconstruct; an RAE has none."""
        return {} if self.memory == "normal" else {"memory": self.memory}


WeightsFlags = Annotated[Weights, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Source:
    """A picture file, and where under the output folder its result goes (without suffix)."""

    path: Path
    stem: Path


def sources(paths: Sequence[Path], suffixes: tuple[str, ...] = ()) -> list[Source]:
    """Files of `paths` (pictures, or files with one of `suffixes`), folders searched; stems made unique."""
    if not paths:
        raise ValueError("expected at least one file or folder, got none")
    found: list[Source] = []
    taken: set[str] = set()
    for path in paths:
        if suffixes and path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in suffixes)
            if not files:
                raise ValueError(f"{path}: expected {', '.join(suffixes)} files in this folder or below, got none")
        elif suffixes:
            files = [path]
        else:
            files = find_images(path)
        for file in files:
            stem = file.relative_to(path).with_suffix("") if path.is_dir() else Path(file.stem)
            unique, number = stem, 1
            while str(unique).lower() in taken:  # lower: some file systems do not tell cases apart
                number += 1
                unique = stem.with_name(f"{stem.name}-{number}")
            taken.add(str(unique).lower())
            found.append(Source(file, unique))
    return found


class Failures:
    """Runs work on each source, with progress; a bad file is reported by name, counted and passed over."""

    def __init__(self, files: Sequence[Source]) -> None:
        self.files, self.count = files, 0

    def __iter__(self) -> Iterator[Source]:
        from tqdm import tqdm

        yield from tqdm(self.files, unit="file", disable=len(self.files) < 2 or not sys.stderr.isatty())

    def report(self, error: Exception) -> None:
        self.count += 1
        print(f"skipped: {error}", file=sys.stderr)

    def exit_code(self) -> int:
        if self.count:
            print(f"{self.count} of {len(self.files)} files could not be read", file=sys.stderr)
        return 1 if self.count else 0


def writable(folder: Path) -> Path:
    """Makes `folder`, before anything long is done. OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: cannot be written")
    return folder


def read_pixels(path: Path, ae: AutoEncoder | RAE) -> tuple[np.ndarray, Tensor]:
    """(uint8 [H, W, C], pixels [1, C, H, W] on the device and in the type of `ae`), of the channels `ae` has."""
    image = load_image(path, ae.cfg.channels)
    return image, to_pixels(image)[None].to(next(ae.parameters()))


def info(target: tyro.conf.Positional[str] = "") -> int:
    """Shapes and sizes of all presets, or of one preset or file.

    Example: python -m flux2 info runs/photos

    Args:
        target: A preset's name, or anything --weights takes; nothing lists all presets.
    """
    presets = AUTOENCODERS | RAES
    if not target:
        print(f"{'preset':<22}{'channels x pixels':<20}{'numbers':<9}{'encoder':>12}{'decoder':>12}{'all':>12}")
        for name, cfg in presets.items():
            encoder, decoder = _parameters(cfg)
            token = f"{cfg.latent_channels} x {cfg.multiple}x{cfg.multiple}"
            ratio = f"1:{cfg.channels * cfg.multiple**2 / cfg.latent_channels:g}"
            print(f"{name:<22}{token:<20}{ratio:<9}{encoder:>12,}{decoder:>12,}{encoder + decoder:>12,}")
        print("channels a token x pixels it covers; numbers: of the latent to those of the picture; parameters")
        return 0
    if target in presets:
        cfg, fitted = presets[target], "no weights"
    else:
        ae = load_autoencoder(target)
        cfg = ae.cfg
        mean, std = ae.latent_affine()
        identity = bool((mean == 0).all() and ((std - 1).abs() < 1e-3).all())
        fitted = "constants" if cfg.latent_norm == "affine" else "not fitted" if identity else "fitted"
    encoder, decoder = _parameters(cfg)
    for field, value in dataclasses.asdict(cfg).items():
        print(f"{field:<22}{value}")
    print(f"{'token':<22}{cfg.latent_channels} channels for {cfg.multiple}x{cfg.multiple} pixels")
    print(f"{'parameters':<22}{encoder:,} encoder + {decoder:,} decoder = {encoder + decoder:,}")
    print(f"{'latent statistics':<22}{fitted}")
    return 0


def _parameters(cfg: AutoencoderConfig | RAEConfig) -> tuple[int, int]:
    with torch.device("meta"):
        ae = RAE(cfg, encoder_weights=None) if isinstance(cfg, RAEConfig) else AutoEncoder(cfg)
    encoder, decoder = (sum(p.numel() for p in m.parameters()) for m in (ae.encoder, ae.decoder))
    return encoder, decoder


def convert(source: Path, target: Path, /, layout: Literal["bfl", "diffusers"], preset: str | None = None) -> int:
    """Rewrites an autoencoder in another layout: one .safetensors file (bfl) or a diffusers folder.

    Example: python -m flux2 convert ae.safetensors vae/ --layout diffusers

    Args:
        source: Anything --weights takes elsewhere.
        target: File (bfl) or folder (diffusers) to write.
        layout: What to write.
        preset: Shape of the weights, where the file fits several (sd, sdxl).
    """
    save_autoencoder(load_autoencoder(source, preset=preset), target, layout=layout)
    print(f"wrote {target}")
    return 0


def reconstruct(images: tuple[Path, ...], /, weights: WeightsFlags, out: Path = Path("reconstructions")) -> int:
    """Encodes and decodes pictures; writes original | reconstruction | 5x error, PSNR and SSIM of each and the mean.

    Example: python -m flux2 reconstruct a.jpg pictures/ --weights runs/photos --out reconstructions

    Args:
        images: Picture files, and folders searched for jpg, png and webp.
        out: Folder for the PNG files and metrics.csv.
    """
    ae = weights.load()
    work = Failures(sources(images))
    rows: list[tuple[str, float, float]] = []
    writable(out)
    try:
        for source in work:
            try:
                image, x = read_pixels(source.path, ae)
            except (ValueError, OSError) as error:
                work.report(error)
                continue
            recon = to_uint8(ae.reconstruct(x, **weights.options)).cpu()
            original = torch.from_numpy(image).permute(2, 0, 1)[None]
            quality = psnr(original, recon).item(), ssim(original, recon).item()
            decoded = to_array(recon[0])
            save_png(out / f"{source.stem}.png", tile([image, decoded, error_image(image, decoded)], columns=3))
            rows.append((str(source.path), *quality))
            size = f"{image.shape[1]}x{image.shape[0]}"
            print(f"{source.path}  {size}  PSNR {quality[0]:.2f} dB  SSIM {quality[1]:.4f}", flush=True)
    finally:
        if rows:
            with (out / "metrics.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("file", "psnr_db", "ssim"), *rows])
            means = np.mean([r[1] for r in rows]), np.nanmean([r[2] for r in rows] + [np.nan])
            print(f"mean of {len(rows)}  PSNR {means[0]:.2f} dB  SSIM {means[1]:.4f}  in {out}")
    return work.exit_code()


def encode(images: tuple[Path, ...], /, weights: WeightsFlags, out: Path = Path("latents")) -> int:
    """Writes normalised latents [C, h, w] of pictures as .safetensors, sides padded by reflection where needed.

    Example: python -m flux2 encode pictures/ --weights runs/photos --out latents

    Args:
        images: Picture files, and folders searched for jpg, png and webp.
        out: Folder for the latents.
    """
    ae = weights.load()
    work = Failures(sources(images))
    writable(out)
    for source in work:
        try:
            image, x = read_pixels(source.path, ae)
            with torch.no_grad():
                z = ae.encode(ae.pad(x), **weights.options)[0].cpu()
        except (ValueError, OSError) as error:  # an RAE's statistics are of one size
            work.report(error)
            continue
        size = {"height": str(image.shape[0]), "width": str(image.shape[1]), "file": source.path.name}
        save_tensors(out / f"{source.stem}.safetensors", {"latents": z}, size)
        print(f"{source.path}  {list(z.shape)}", flush=True)
    return work.exit_code()


def decode(latents: tuple[Path, ...], /, weights: WeightsFlags, out: Path = Path("decoded")) -> int:
    """Decodes what `encode` wrote to PNG, cropped to the picture's size.

    Example: python -m flux2 decode latents/ --weights runs/photos --out decoded

    Args:
        latents: .safetensors files with a tensor "latents" [C, h, w], and folders of such.
        out: Folder for the PNG files.
    """
    ae = weights.load()
    work = Failures(sources(latents, (".safetensors",)))
    writable(out)
    for source in work:
        try:
            tensors, metadata = load_tensors(source.path)
            z = tensors.get("latents")
            if z is None or z.ndim != 3 or z.shape[0] != ae.cfg.latent_channels:
                got = f"latents {list(z.shape)}" if z is not None else f"tensors {', '.join(sorted(tensors)) or 'none'}"
                raise ValueError(f"{source.path}: expected latents [{ae.cfg.latent_channels}, h, w], got {got}")
            with torch.no_grad():
                x = ae.decode(z[None].to(next(ae.parameters())), **weights.options)[0]
        except (ValueError, OSError) as error:
            work.report(error)
            continue
        height, width = (int(metadata.get(k, n)) for k, n in (("height", x.shape[1]), ("width", x.shape[2])))
        save_png(out / f"{source.stem}.png", to_array(to_uint8(x[:, :height, :width])))
        print(f"{out / f'{source.stem}.png'}  {width}x{height}", flush=True)
    return work.exit_code()


def main(argv: list[str] | None = None) -> int:
    """The program: exit code 0; 1 if some files could not be read; 2 on bad input; 130 on Ctrl-C."""
    commands = {f.__name__: f for f in (info, convert, reconstruct, encode, decode)}
    try:
        return tyro.extras.subcommand_cli_from_dict(commands, prog="python -m flux2", args=argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was printed is written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
