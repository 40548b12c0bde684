"""What a run of train.vae is: its frozen config and the table of presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from flux2.adversarial import AdversarialStart
from flux2.autoencoder import AUTOENCODERS, AutoencoderConfig
from flux2.losses import kl_weight_from_ldm
from flux2.perceptual import LEAST_SIDE
from flux2.rae import RAES, RAEConfig
from train.buckets import bucket_shapes
from train.configs import RunOptions, parse
from train.data import Augmentation
from train.schedules import WeightSchedule

PIXEL_TERMS = ("l1", "l2", "charbonnier", "laplacian", "lpips")  # of reconstruction; each has a field NAME_weight
LATENT_TERMS = ("kl", "align", "vf")


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """The adversarial part. Weight 0: no discriminator at all."""

    weight: float = 0.0
    """Weight of the generator's loss; with --gan.adaptive, as a multiple of reconstruction's gradient."""
    discriminator: Literal["patch", "vit"] = "patch"
    """patch: PatchGAN of 70x70 pixels. vit: heads on a frozen vision transformer (RAE)."""
    loss: Literal["hinge", "vanilla", "non-saturating"] = "hinge"
    """Loss of both sides."""
    adaptive: bool = True
    """Scale so that the gradient at the decoder's last layer is as long as reconstruction's (VQGAN)."""
    adaptive_eps: float = 1e-4
    """Added to the discriminator's gradient norm there; LDM 1e-4, RAE 1e-6."""
    start: AdversarialStart = field(default_factory=AdversarialStart)
    """When the discriminator begins to train, and the generator to hear of it."""
    lr: float = 1e-4
    """Peak learning rate of the discriminator; follows the same curve as --lr."""
    betas: tuple[float, float] = (0.5, 0.9)
    """AdamW moments of the discriminator."""
    augment: float = 0.0
    """Probability of each differentiable augmentation of what the discriminator sees."""
    quantise: bool = False
    """Show the discriminator reconstructions clamped and rounded to 8 bits, as the photographs are (RAE)."""
    r1: float = 0.0
    """Weight of the gradient penalty on photographs; per pixel count, see flux2.adversarial.r1_penalty."""
    r1_every: int = 16
    """Steps between gradient penalties, each weighted by as much."""
    lecam: float = 0.0
    """Weight of the LeCAM regulariser, for little data."""
    norm: Literal["group", "batch"] = "group"
    """Norm of the patch discriminator."""
    width: int = 64
    """Channels of the patch discriminator's first layer."""
    n_layers: int = 3
    """Layers of the patch discriminator that halve the sides."""
    backbone: str = "dino-s/8"
    """Frozen transformer of the vit discriminator; random-tiny for tests."""
    backbone_weights: str = ""
    """Local file of its weights, or "random" for tests; by default timm's cache or the net."""

    def __post_init__(self) -> None:
        for name in ("weight", "r1", "lecam", "adaptive_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"gan.{name}: expected a number of 0 or more, got {getattr(self, name)}")
        for name, least in (("r1_every", 1), ("width", 1), ("n_layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"gan.{name}: expected {least} or more, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"gan.lr: expected more than 0, got {self.lr}")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"gan.augment: expected a probability in [0, 1], got {self.augment}")

    @property
    def least_side(self) -> int:
        """Pixels along a side from which there is a logit."""
        return 3 * 2**self.n_layers if self.discriminator == "patch" else 1


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Everything that decides the weights a run ends with; saved with it and compared on resume."""

    preset: str
    """Row of the preset table the rest starts from."""
    autoencoder: AutoencoderConfig
    """Shape of the network."""
    data: str = "photographs"
    """"photographs" (bundled with scikit-image, no download), a folder of pictures, searched recursively, tar files, a
    zip, parquet files or hf:USER/NAME; docs/data.md has examples."""
    held_out: str = ""
    """Held-out pictures, likewise; by default coffee and chelsea, or each 20th picture of --data."""
    init: str = ""
    """Weights to start from: a run, a .safetensors file or a diffusers folder of this shape (fine-tuning)."""
    train: Literal["all", "decoder", "encoder"] = "all"
    """What is trained; the rest stays as it is. decoder keeps the latents, and their statistics, of --init."""
    resolution: int = 64
    """Side of the training crops, pixels."""
    buckets: int = 0
    """Shapes of crops of about --resolution squared pixels, tall to wide, a batch of one each; 0 is squares alone."""
    batch: int = 16
    """Crops a step."""
    accumulate: int = 1
    """Parts a step's batch is worked through in, gradients added up: the same update in less memory."""
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
    ema_decays: tuple[float, ...] = (0.99,)
    """Decays of the averaged weights, a step; the first is what is judged and loaded."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type (weights stay fp32); auto is bf16 where the processor or GPU computes in it, else fp32."""
    seed: int = 0
    """Decides weights, data order, augmentation and posterior noise."""
    warm_start: Literal["pca", "none"] = "none"
    """pca: the shortcut starts as the best linear code of the training crops (needs shortcut "patch"; --init wins)."""
    sample_posterior: bool = True
    """Decode a draw of the posterior while training, not its mode; for RAE, add noise to the latent."""
    l1_weight: float = 1.0
    """Weight of mean |error|."""
    l2_weight: float = 0.0
    """Weight of mean error squared."""
    charbonnier_weight: float = 0.0
    """Weight of the smoothed |error|."""
    laplacian_weight: float = 0.0
    """Weight of the Laplacian-pyramid loss: the perceptual term that needs no weights."""
    lpips_weight: float = 0.0
    """Weight of LPIPS; needs the backbone's weights."""
    lpips_net: Literal["vgg", "alex"] = "vgg"
    """Backbone of LPIPS."""
    lpips_weights: str = ""
    """Local file of that backbone's weights, or "random" for tests; by default torchvision's cache or the net."""
    learn_logvar: bool = False
    """Learn the scale of the reconstruction terms together, as LDM's logvar."""
    kl_weight: float = 0.0
    """Weight of the KL divergence, mean per latent element; flux2.losses.kl_weight_from_ldm converts LDM's."""
    free_bits: float = 0.0
    """Bits an element of each latent channel costs for nothing in the KL term."""
    align_weight: float = 0.0
    """Weight of the cosine alignment of the projected latent to the teacher's tokens (REPA)."""
    vf_weight: float = 0.0
    """Weight of VA-VAE's alignment, with margins; as a share of the other gradient if --vf-adaptive."""
    vf_adaptive: bool = True
    """Scale so that its gradient at the encoder's last layer is as long as that of everything that looks at the
    picture. VA-VAE leaves out the adversary there, at the cost of a second backward pass."""
    vf_margins: tuple[float, float] = (0.5, 0.25)
    """Margins of its cosines and of its similarity matrix."""
    teacher: str = "hog"
    """Teacher of both alignments: hog (no weights), dinov2-b, dinov3-b, clip-b/16, siglip2-b/16, mae-b/16, ..."""
    teacher_weights: str = ""
    """Local file of the teacher's weights (of an RAE: its encoder's), or "random" for tests; else timm's cache."""
    eq_probability: float = 0.0
    """Share of steps that decode a scaled and turned latent against the picture changed alike (EQ-VAE)."""
    eq_scales: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Scales it draws from."""
    schedules: tuple[str, ...] = ()
    """Factors on weights over the run: TERM=SHARE:FACTOR,... with TERM a loss, gan or eq."""
    gan: GanConfig = field(default_factory=GanConfig)
    """The adversarial part."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How crops are drawn."""
    workers: int = 0
    """Processes that read crops ahead; the crops do not depend on it."""

    def __post_init__(self) -> None:
        multiple = self.autoencoder.multiple
        if self.resolution % multiple or self.resolution <= 0:
            raise ValueError(f"resolution: expected a positive multiple of {multiple}, got {self.resolution}")
        for name in ("batch", "accumulate", "steps", "lr", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if bad := [n for n, v in numbers.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise ValueError(f"{bad[0]}: expected a finite number, got {numbers[bad[0]]}")
        weights = tuple(f"{t}_weight" for t in PIXEL_TERMS + LATENT_TERMS)
        counts = ("warmup", "seed", "workers", "buckets")
        for name in (*counts, "free_bits", "linear_lr", "final_lr", "weight_decay", *weights):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch={self.batch}, got {self.accumulate}")
        if not self.ema_decays or not all(0 <= d < 1 for d in self.ema_decays):
            raise ValueError(f"ema_decays: expected one or more numbers in [0, 1), got {self.ema_decays}")
        if not any(self.weight(t) for t in PIXEL_TERMS):
            raise ValueError(f"no reconstruction term: one of {', '.join(PIXEL_TERMS)} needs a weight above 0")
        if not 0 <= self.eq_probability <= 1 or not all(0 < s <= 1 for s in self.eq_scales) or not self.eq_scales:
            raise ValueError(
                f"eq: expected a probability in [0, 1] and scales in (0, 1], got {self.eq_probability} and"
                f" {self.eq_scales}"
            )
        narrowest = min((s for shape in self.bucket_shapes() for s in shape), default=self.resolution)
        smallest = narrowest * (min(self.eq_scales) if self.eq_probability else 1.0)
        needs = (("laplacian", self.laplacian_weight, 16), ("lpips", self.lpips_weight, LEAST_SIDE))
        for name, weight, side in (*needs, ("gan", self.gan.weight, self.gan.least_side)):
            if weight and smallest < side:
                raise ValueError(f"{name} needs sides of {side} pixels, the smallest here have {smallest:g}")
        terms = (*PIXEL_TERMS, *LATENT_TERMS, "gan", "eq")
        for schedule in map(WeightSchedule, self.schedules):
            if schedule.term not in terms:
                raise ValueError(f"schedule: expected a term of {', '.join(terms)}, got {schedule.term!r}")
            fixed = {"gan": self.gan.weight, "eq": self.eq_probability}
            if not (fixed[schedule.term] if schedule.term in fixed else self.weight(schedule.term)):
                raise ValueError(f"schedule: {schedule.term} has weight 0, there is nothing to change over the run")
        self._check_shape()

    def _check_shape(self) -> None:
        """What only convolutional autoencoders have."""
        if self.warm_start == "pca" and getattr(self.autoencoder, "shortcut", "") != "patch":
            raise ValueError("warm_start: 'pca' needs --autoencoder.shortcut patch")
        if self.aligned and self.teacher == "hog" and self.autoencoder.multiple % 8:
            raise ValueError(
                f"teacher 'hog' needs latent positions of a multiple of 8 pixels, got {self.autoencoder.multiple}"
            )
        if self.train == "decoder" and (on := [t for t in LATENT_TERMS if self.weight(t)]):
            flags = ", ".join(f"--{t}-weight 0" for t in on)
            raise ValueError(f"train 'decoder' leaves the latent as it is, so that it needs {flags}")

    def bucket_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each aspect bucket; none where crops are squares alone."""
        if not self.buckets:
            return []
        return bucket_shapes(self.buckets, resolution=self.resolution, multiple=self.autoencoder.multiple)

    def weight(self, term: str) -> float:
        """Weight of a pixel or latent term."""
        return getattr(self, f"{term}_weight")

    @property
    def aligned(self) -> bool:
        """Whether the latent is aligned to a teacher."""
        return bool(self.align_weight or self.vf_weight)


@dataclass(frozen=True, kw_only=True)
class RaeTrainingConfig(VaeConfig):
    """The same, of an autoencoder on a frozen representation."""

    autoencoder: RAEConfig  # type: ignore[assignment]
    """Frozen encoder, decoder and noise."""
    train: Literal["decoder"] = "decoder"  # type: ignore[assignment]
    """The encoder is frozen."""

    def _check_shape(self) -> None:
        super()._check_shape()
        if self.buckets:
            raise ValueError(f"buckets: an RAE's decoder is of one square grid, expected 0, got {self.buckets}")
        if self.resolution != self.autoencoder.resolution and not self.init:
            raise ValueError(
                f"resolution: the latent statistics are of --autoencoder.resolution {self.autoencoder.resolution},"
                f" position by position, got {self.resolution}"
            )


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
    laplacian_weight=1.0,
    kl_weight=1e-6,
    align_weight=0.05,
)
# Loss terms and their weights are the published recipes'; docs/recipe.md says what differs.
_LDM = VaeConfig(
    preset="sd",
    autoencoder=AUTOENCODERS["sd"],
    augmentation=Augmentation(crop_scale=(1.0, 4.0)),
    resolution=256,
    batch=24,
    accumulate=2,
    steps=250_000,
    lr=4.5e-6 * 24,
    warmup=1000,
    final_lr=1.0,
    betas=(0.5, 0.9),
    ema_decays=(0.9999, 0.999),
    lpips_weight=1.0,
    kl_weight=kl_weight_from_ldm(1e-6, z_channels=4, downsample=8),
    gan=GanConfig(weight=0.5, norm="batch", lr=4.5e-6 * 24, start=AdversarialStart(step=50_001)),
    workers=8,
)
_FLUX_2 = dataclasses.replace(
    _LDM,
    preset="flux.2",
    autoencoder=AUTOENCODERS["flux.2"],
    batch=32,
    accumulate=2,
    lr=1e-4,
    kl_weight=kl_weight_from_ldm(1e-7, z_channels=32, downsample=8),
    vf_weight=0.1,
    teacher="dinov2-l",
    gan=GanConfig(weight=0.5, start=AdversarialStart(when="plateau", step=20_000, warmup=1000, ramp=5000)),
)
_RAE = RaeTrainingConfig(
    preset="rae",
    autoencoder=RAES["rae"],
    augmentation=Augmentation(crop_scale=(1.0, 1.5), flip=False),
    resolution=256,
    batch=512,
    accumulate=16,
    steps=40_000,  # 16 epochs of ImageNet
    lr=2e-4,
    warmup=2500,
    final_lr=0.1,
    betas=(0.9, 0.95),
    clip=1e6,
    ema_decays=(0.9978,),
    l1_weight=0.5,  # RAE's is on pixels in [0, 1]
    lpips_weight=1.0,
    gan=GanConfig(
        weight=0.75, adaptive_eps=1e-6, discriminator="vit", lr=2e-4, betas=(0.9, 0.95), augment=1.0, quantise=True,
        start=AdversarialStart(step=15_000, warmup=5000),
    ),
    workers=8,
)  # fmt: skip

VAE_PRESETS: dict[str, VaeConfig] = {
    "photos": _PHOTOS,
    "photos-long": dataclasses.replace(_PHOTOS, preset="photos-long", steps=2500, warmup=100, ema_decays=(0.995,)),
    "sd": _LDM,
    "flux.1": dataclasses.replace(
        _LDM, preset="flux.1", autoencoder=AUTOENCODERS["flux.1"],
        kl_weight=kl_weight_from_ldm(1e-7, z_channels=16, downsample=8),
    ),
    "flux.2": _FLUX_2,
    "flux.2-finetune": dataclasses.replace(
        _FLUX_2, preset="flux.2-finetune", train="decoder", init="", steps=50_000, lr=2e-5,
        kl_weight=0.0, vf_weight=0.0, teacher="hog", gan=GanConfig(),
    ),
    "va-vae": dataclasses.replace(
        _LDM, preset="va-vae", autoencoder=AUTOENCODERS["va-vae"], batch=256, accumulate=8, steps=250_000, lr=1e-4,
        kl_weight=kl_weight_from_ldm(1e-6, z_channels=32, downsample=16), vf_weight=0.1, teacher="dinov2-l",
        gan=GanConfig(weight=0.5, norm="batch", start=AdversarialStart(step=5001)),
    ),
    "rae": _RAE,
    "rae-tiny": dataclasses.replace(
        _RAE, preset="rae-tiny", autoencoder=RAES["rae-tiny"], resolution=64, batch=16, accumulate=1, steps=300,
        lr=1e-3, warmup=50, final_lr=0.02, ema_decays=(0.99,), l1_weight=1.0, lpips_weight=0.0,
        laplacian_weight=1.0, gan=GanConfig(), workers=0, augmentation=_PHOTOS.augmentation,
    ),
}  # fmt: skip

_DESCRIPTION = """Train an image autoencoder.

  python -m train.vae --compile                       minutes on a laptop: bundled photographs, no download
  python -m train.vae --preset flux.2 --data PICTURES --compile      the full-size recipe, for a GPU
  python -m train.vae --preset flux.2-finetune --init ae.safetensors --data PICTURES      its decoder alone
  python -m train.vae --name mine --data PICTURES --steps 5000 --resume auto      go on after an interruption

Presets: photos, photos-long, sd, flux.1, flux.2, flux.2-finetune, va-vae, rae, rae-tiny. --preset NAME --help
shows one's values.
Writes OUT/NAME/: config.yaml, env.json, log.jsonl, checkpoints/, samples/, report.html.
Ctrl-C, SIGTERM and SIGUSR1 save and leave (exit code 130, 143, 138); a second one leaves at once.
"""


def parse_vae(argv: list[str]) -> tuple[VaeConfig, RunOptions]:
    """Config and options from the command line, as `train.configs.parse`."""
    return parse(
        argv, VAE_PRESETS, options=RunOptions(), default="photos", prog="python -m train.vae", description=_DESCRIPTION
    )
