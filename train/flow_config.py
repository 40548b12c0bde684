"""What a run of train.flow is: config, options that do not decide its weights, presets, command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flux2.schedules import auto_shifts, check_shifts
from flux2.transformer import TRANSFORMERS, TransformerConfig
from train.configs import RunOptions, parse
from train.data import Augmentation


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Everything that decides the weights a run ends with; saved with it and compared on resume."""

    preset: str
    """Row of the preset table the rest starts from."""
    transformer: TransformerConfig
    """Shape of the network."""
    autoencoder: str = ""
    """Run of train.vae, .safetensors file or diffusers folder; by default the newest run in --out, else one is made."""
    data: str = "photographs"
    """"photographs" (bundled with scikit-image, each a class), a folder of pictures, whose sub-folders are classes, tar
    files, a zip, parquet files or hf:USER/NAME; docs/data.md has examples."""
    held_out: str = ""
    """Held-out pictures, likewise; by default coffee and chelsea, or each 20th picture of --data."""
    cache: str = ""
    """Latent cache (python -m train.data cache) to train on, instead of crops of --data encoded as they come; auto
    makes one in the run's folder."""
    cached_crops: int = 1024
    """Crops that a cache made by auto holds at least, an equal share of each picture; one each is its centre square."""
    resolution: int = 64
    """Side of the training crops, pixels."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How crops are drawn; of a cache, whether mirror images are used."""
    batch: int = 64
    """Crops a step."""
    accumulate: int = 1
    """Parts a step is computed in, one after the other: less memory, the same gradient."""
    steps: int = 1000
    """Optimiser updates."""
    optimiser: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices inside the blocks, with AdamW for the rest."""
    lr: float = 1e-3
    """Peak learning rate; Muon's updates are scaled to AdamW's size."""
    warmup: int = 0
    """Steps of linear warm-up."""
    final_lr: float = 1.0
    """Learning rate at the end of the cosine after it, as a multiple of --lr; 1 keeps it constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moments."""
    weight_decay: float = 0.0
    """Weight decay of both optimisers."""
    clip: float = 1.0
    """Gradient norm is clipped to this."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decays of the averaged weights, a step; samples and losses are of the first."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; auto is bf16 where the processor or GPU computes in it, else fp32."""
    seed: int = 0
    """Decides weights, data order, crops, timesteps, noise and dropped labels."""
    law: Literal["uniform", "logit_normal", "plateau_logit_normal"] = "plateau_logit_normal"
    """Law of the training timestep."""
    shift: float | Literal["auto"] = "auto"
    """Training shift; auto goes by the latent's channels a token (`flux2.schedules.AUTO_SHIFTS`)."""
    mu: float = 0.0
    """Location of the law's logit before the shift."""
    sigma: float = 1.0
    """Scale of the law's logit."""
    label_dropout: float = 0.1
    """Part of the samples trained without their class, for classifier-free guidance."""
    sample_posterior: bool = False
    """Train on draws of the autoencoder's posterior, not on its mode."""
    repa: str = "none"
    """Teacher the features are aligned to (REPA), or none."""
    repa_weight: float = 0.5
    """Weight of the alignment."""
    repa_hidden: int = 2048
    """Width of the projector between features and teacher."""
    workers: int = 0
    """Processes that read crops ahead; the crops do not depend on it."""

    def __post_init__(self) -> None:
        for name in (
            "batch",
            "accumulate",
            "cached_crops",
            "steps",
            "lr",
            "clip",
            "resolution",
            "sigma",
            "repa_hidden",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("warmup", "seed", "workers", "weight_decay", "final_lr", "repa_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch={self.batch}, got {self.accumulate}")
        decays = self.ema_decays
        if not decays or len(set(decays)) < len(decays) or not all(0 <= d < 1 for d in decays):
            raise ValueError(f"ema_decays: expected different numbers in [0, 1), at least one, got {decays}")
        if self.cache and (self.augmentation.rotate or self.augmentation.colour):
            raise ValueError("cache: it holds no rotated or recoloured crops; got an augmentation with these")
        if self.transformer.patch != 1:
            got = self.transformer.patch
            raise ValueError(f"transformer.patch: normalised latents are patchified already, expected 1, got {got}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout: expected a number in [0, 1], got {self.label_dropout}")
        if self.shift != "auto" and self.shift <= 0:
            raise ValueError(f"shift: expected auto or more than 0, got {self.shift}")

    def train_shift(self, latent_channels: int) -> float:
        """The shift timesteps are drawn with, on latents of so many channels a position."""
        return auto_shifts(latent_channels)[0] if self.shift == "auto" else self.shift


def sampling_shift(shift: float | Literal["auto"], train_shift: float, channels_per_token: int) -> float:
    """`shift`, with a warning if it is below the training shift; auto is the training shift times the ratio of the two
    in `flux2.schedules.AUTO_SHIFTS`."""
    if shift == "auto":
        train, sample = auto_shifts(channels_per_token)
        return train_shift * sample / train
    check_shifts(train_shift, shift)
    return shift


@dataclass(frozen=True, kw_only=True)
class FlowOptions(RunOptions):
    """Where and how a run happens; may differ between a run and its resumption."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Between several processes: each has the whole model (ddp), or a share of it (fsdp; --compile-scope blocks)."""
    compile_scope: Literal["model", "blocks"] = "model"
    """What --compile compiles: model and losses as one graph, or each block by itself, which starts sooner."""
    checkpoint_activations: bool = False
    """Keep only the blocks' inputs for backward and compute the rest again: less memory, a third more arithmetic."""
    attention: Literal["auto", "torch", "sdpa", "flash", "xformers"] = "auto"
    """Backend of attention."""
    repa_weights: str = ""
    """File of the teacher's weights; by default timm's, from its cache or the hub."""
    sample_steps: int = 25
    """Euler steps of the pictures a run draws of its samples."""
    sample_shift: float | Literal["auto"] = "auto"
    """Their shift; auto goes by the training shift and the latent's channels a token."""
    guidance: float = 1.5
    """Their classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps: expected 1 or more, got {self.sample_steps}")
        if self.sample_shift != "auto" and self.sample_shift <= 0:
            raise ValueError(f"sample_shift: expected auto or more than 0, got {self.sample_shift}")


FLOW_PRESETS: dict[str, FlowConfig] = {
    "flow": FlowConfig(
        preset="flow",
        transformer=TransformerConfig(width=256, depth=4, heads=4, repa_depth=2, time_scale=1000.0),
        cache="auto",
        augmentation=Augmentation(crop_scale=(7.0, 22.0), flip=False),  # nearly whole photographs
        batch=32,
        steps=1600,
        lr=3e-3,
        warmup=100,
        final_lr=0.02,
        betas=(0.9, 0.99),
        ema_decays=(0.99, 0.998),
        shift=2.0,  # auto is for 256 tokens; a sixteenth of them shows a picture a quarter as long
        repa="hog",
        repa_hidden=256,
        precision="fp32",  # as fast as bf16 where matrices are this small
    ),
    "sit-xl": FlowConfig(
        preset="sit-xl",
        transformer=TRANSFORMERS["sit-xl"],
        resolution=256,
        augmentation=Augmentation(crop_scale=(1.0, 4.0)),
        batch=256,
        steps=400_000,
        lr=1e-4,
        ema_decays=(0.9999, 0.999),
        repa="dinov2-b",
        workers=8,
    ),
}

_DESCRIPTION = """Train a flow-matching transformer on an autoencoder's latents.

  python -m train.flow                                minutes on a laptop: bundled photographs, no download
  python -m train.flow --preset sit-xl --autoencoder runs/flux.2 --data PICTURES --compile       for a GPU
  python -m train.flow --autoencoder ae.safetensors --data PICTURES --law logit_normal --shift 4.63 --repa dinov2-b
  python -m train.flow --name mine --resume auto      go on after an interruption

Writes OUT/NAME/: config.yaml, env.json, log.jsonl, autoencoder.safetensors, checkpoints/, samples/, report.html.
Ctrl-C, SIGTERM and SIGUSR1 save and leave (exit code 130, 143, 138); a second one leaves at once.
"""


def parse_flow(argv: list[str]) -> tuple[FlowConfig, FlowOptions]:
    """As `train.configs.parse`, for train.flow."""
    return parse(
        argv, FLOW_PRESETS, options=FlowOptions(), default="flow", prog="python -m train.flow", description=_DESCRIPTION
    )
