"""What a training run is: frozen configs, the table of presets, and reading both from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from flux2.autoencoder import AUTOENCODERS, AutoencoderConfig
from train.data import Augmentation


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Everything that decides the weights a run ends with; saved with it and compared on resume."""

    preset: str
    """Row of the preset table the rest starts from."""
    autoencoder: AutoencoderConfig
    """Shape of the network."""
    data: str = "photographs"
    """"photographs" (bundled with scikit-image, no download) or a folder of jpg/png/webp, searched recursively."""
    held_out: str = ""
    """Folder of held-out pictures; by default coffee and chelsea, or each 20th picture of --data."""
    resolution: int = 64
    """Side of the training crops, pixels."""
    batch: int = 16
    """Crops a step."""
    steps: int = 300
    """Optimiser updates."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    linear_lr: float = 0.1
    """Learning rate of the shortcut's linear part, as a multiple of --lr."""
    warmup: int = 50
    """Steps of linear warm-up, before the cosine."""
    final_lr: float = 0.02
    """Learning rate at the end of the cosine, as a multiple of --lr."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW moments."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip: float = 1.0
    """Gradient norm is clipped to this."""
    ema_decay: float = 0.99
    """Decay of the averaged weights, a step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; auto is bf16 where the processor or GPU computes in it, else fp32."""
    seed: int = 0
    """Decides weights, data order, augmentation and posterior noise."""
    warm_start: Literal["pca", "none"] = "none"
    """pca: the shortcut starts as the best linear code of the training crops (needs shortcut "patch")."""
    sample_posterior: bool = True
    """Decode a draw of the posterior while training, not its mode."""
    l1_weight: float = 1.0
    """Weight of mean |error|."""
    laplacian_weight: float = 1.0
    """Weight of the Laplacian-pyramid (perceptual) loss."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, mean per latent element."""
    align_weight: float = 0.002
    """Weight of the semantic alignment of the latent to the teacher; 0 switches the teacher off."""
    teacher: Literal["hog"] = "hog"
    """Teacher of the semantic alignment."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How crops are drawn."""
    workers: int = 0
    """Processes that read crops ahead; the crops do not depend on it."""

    def __post_init__(self) -> None:
        multiple = self.autoencoder.multiple
        if self.resolution % multiple or self.resolution <= 0:
            raise ValueError(f"resolution: expected a positive multiple of {multiple}, got {self.resolution}")
        for name in ("batch", "steps", "lr", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("warmup", "seed", "workers", "l1_weight", "laplacian_weight", "kl_weight", "align_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        if self.warm_start == "pca" and self.autoencoder.shortcut != "patch":
            raise ValueError("warm_start: 'pca' needs --autoencoder.shortcut patch")
        if self.align_weight and multiple % 8:
            raise ValueError(f"teacher 'hog' needs latent positions of a multiple of 8 pixels, got {multiple}")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a run happens; may differ between a run and its resumption."""

    compile: bool = False
    """Compile the training step with torch.compile."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """What the networks run on: fused operations (auto), those in Triton or not at all, or stock modules (torch)."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""
    out: Path = Path("runs")
    """Folder of all runs."""
    name: str = ""
    """Folder of this run inside --out; by default the preset's name, with a number if that is taken."""
    resume: Literal["no", "auto"] = "no"
    """auto continues the named run from its newest checkpoint, or starts it."""
    save_every: int = 0
    """Steps between checkpoints; 0 is a quarter of the run, at most 1000."""
    keep: int = 2
    """Checkpoints kept."""
    stop_after: int = 0
    """Save and leave after this many steps (0: at the end)."""
    dry_run: bool = False
    """Print the resolved config, parameters, memory and arithmetic, and stop."""

    def __post_init__(self) -> None:
        for name, least in (("save_every", 0), ("keep", 1), ("stop_after", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.name and (Path(self.name).name != self.name or self.name in (".", "..")):
            raise ValueError(f"name: expected a plain folder name, got {self.name!r}; --out chooses where runs go")


_NARROW = AutoencoderConfig(
    z_channels=32,
    ch=16,
    decoder_ch=16,
    ch_mult=(1, 2, 4, 8),
    num_res_blocks=1,
    num_groups=8,
    latent_norm="batchnorm",
    shortcut="patch",
)
_PHOTOS = VaeConfig(
    preset="photos",
    autoencoder=_NARROW,
    augmentation=Augmentation(crop_scale=(0.7, 1.6), rotate=True, colour=0.2),
    warm_start="pca",
)

VAE_PRESETS: dict[str, VaeConfig] = {
    "photos": _PHOTOS,
    "photos-long": dataclasses.replace(_PHOTOS, preset="photos-long", steps=2500, warmup=100, ema_decay=0.995),
    "flux.2": VaeConfig(
        preset="flux.2",
        autoencoder=AUTOENCODERS["flux.2"],
        augmentation=Augmentation(crop_scale=(1.0, 4.0)),
        resolution=256,
        steps=200_000,
        lr=1e-4,
        warmup=1000,
        betas=(0.9, 0.95),
        ema_decay=0.9999,
        workers=8,
    ),
}

_DESCRIPTION = """Train an image autoencoder of the FLUX.2 shape.

  python -m train.vae --compile                       minutes on a laptop: bundled photographs, no download
  python -m train.vae --preset flux.2 --data PICTURES --compile      the full-size recipe, for a GPU
  python -m train.vae --name mine --data PICTURES --steps 5000 --resume auto      go on after an interruption

Writes OUT/NAME/: config.yaml, env.json, log.jsonl, checkpoints/, samples/, report.html.
Ctrl-C or SIGTERM saves and leaves (exit code 130 or 143); a second Ctrl-C leaves at once.
"""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_vae(argv: list[str]) -> tuple[VaeConfig, RunOptions]:
    """Config and options from the command line: the preset's row, then what is given over it.

    Prints and exits on --help (0) and on unknown or malformed options (2); ValueError on an unknown preset or on values
    that do not fit together.
    """
    import tyro

    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", default="photos")
    preset = chosen.parse_known_args(argv)[0].preset
    if preset not in VAE_PRESETS:
        raise ValueError(
            f"preset: expected one of {', '.join(VAE_PRESETS)}, got {preset!r}{nearest(preset, VAE_PRESETS)}"
        )
    return tyro.cli(
        tuple[Annotated[VaeConfig, tyro.conf.arg(name="")], Annotated[RunOptions, tyro.conf.arg(name="")]],  # type: ignore[arg-type]
        prog="python -m train.vae",
        description=_DESCRIPTION,
        default=(VAE_PRESETS[preset], RunOptions()),
        args=argv,
    )


def to_dict(config: VaeConfig) -> dict[str, Any]:
    """Plain dict of the config, tuples as lists: what config.yaml and the checkpoints hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """One line `key: saved A, now B` for each key in which two config dicts differ."""
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key, "absent"), now.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: saved {a}, now {b}")
    return lines
