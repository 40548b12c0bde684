"""What a comparison is: autoencoders, laws, shifts, REPA and seeds, how models are trained and judged; presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from flux2.features import FEATURES
from flux2.teachers import TEACHERS
from flux2.tensor_files import nearest
from flux2.transformer import TRANSFORMERS, TransformerConfig
from train.cell import Judging, key_of
from train.cell_data import Crops
from train.compare_rows import NO_REPA, cell_id
from train.configs import parse
from train.flow_config import FlowConfig

LAWS = ("uniform", "logit_normal", "plateau_logit_normal")
SHIFTS = (1.0, 1.78, 2.95, 4.63, 6.93)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of the grid."""

    autoencoder: str
    law: str
    train_shift: float
    repa: str
    seed: int

    @property
    def id(self) -> str:
        """The name of its files."""
        return cell_id(self.autoencoder, self.law, self.train_shift, self.repa, self.seed)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Everything that decides the figures of a comparison; saved with it and compared when it is gone on with."""

    preset: str
    """Row of the preset table the rest starts from."""
    autoencoders: tuple[str, ...]
    """Names of the rows."""
    weights: tuple[str, ...] = ()
    """NAME=PATH of autoencoders not trained here: a run of train.vae, a .safetensors file or a diffusers folder."""
    training: dict[str, str] = field(default_factory=dict)
    """Options of train.vae by name, for autoencoders that are trained here; data and device are added."""
    laws: tuple[str, ...] = LAWS
    """Laws of the training timestep."""
    train_shifts: tuple[float, ...] = SHIFTS
    """Training shifts."""
    sampling_shifts: tuple[float, ...] = SHIFTS
    """Each model is sampled with each."""
    repa: tuple[str, ...] = ("none", "hog")
    """Teachers of REPA, one at most beside none."""
    repa_weights: str = ""
    """File of that teacher's weights; by default timm's, from its cache or the hub."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the flow models."""
    crops: Crops = field(default_factory=Crops)
    """Pictures that flow models are trained and judged on, and autoencoders that are trained here, too."""
    flow: FlowConfig
    """How each flow model is trained; law, shift, REPA, seed and pictures come from the grid."""
    every: int
    """Images between judgements of a model; the end is always judged."""
    samples: int
    """Samples a Frechet distance."""
    sample_steps: int = 50
    """Euler steps a sample."""
    sample_batch: int = 256
    """Samples computed at once."""
    held_out: int = 256
    """Held-out crops: of the velocity loss, and of the autoencoders' figures."""
    reference: str = ""
    """What samples are measured against: training crops that training never draws, or an ADM .npz file."""
    reference_crops: int = 1024
    """Their number."""
    features: str = "hog"
    """Features of the Frechet distance: hog (no weights), inception (FID), dinov2-b, ..."""
    feature_weights: str = ""
    """File of their weights."""
    tflops: float = 0.05
    """Assumed for the estimate: sustained TFLOP/s of one worker's device."""
    step_ms: float = 1.0
    """Assumed for the estimate: milliseconds that one pass through a network takes at least."""

    def __post_init__(self) -> None:
        axes = ("autoencoders", "laws", "train_shifts", "sampling_shifts", "repa", "seeds")
        for name in axes:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected different values, one or more, got {values}")
        for name, known in (("laws", LAWS), ("repa", (NO_REPA, *TEACHERS)), ("features", FEATURES)):
            given = getattr(self, name)
            for value in (given,) if isinstance(given, str) else given:
                if value not in known:
                    hint = nearest(value, known)
                    raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}{hint}")
        if len([r for r in self.repa if r != NO_REPA]) > 1:
            raise ValueError(f"repa: expected one teacher at most, got {', '.join(self.repa)}")
        if any(s <= 0 for s in (*self.train_shifts, *self.sampling_shifts)):
            raise ValueError(f"shifts: expected numbers above 0, got {(*self.train_shifts, *self.sampling_shifts)}")
        if len({key_of(s) for s in self.train_shifts}) < len(self.train_shifts):
            raise ValueError(f"train_shifts: expected numbers that differ to two places, got {self.train_shifts}")
        for name in ("every", "held_out", "reference_crops", "tflops", "step_ms"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in self.autoencoders:
            if not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"autoencoders: expected plain names, got {name!r}")
        for entry in self.weights:
            name, sign, path = entry.partition("=")
            if not sign or not path or name not in self.autoencoders:
                raise ValueError(f"weights: expected NAME=PATH of {', '.join(self.autoencoders)}, got {entry!r}")
        _ = self.judging  # checks its own values

    @property
    def paths(self) -> dict[str, str]:
        """Where the autoencoders that are not trained here come from."""
        return dict(entry.split("=", 1) for entry in self.weights)

    @property
    def teacher(self) -> str:
        """The teacher of REPA, or none."""
        return next((r for r in self.repa if r != NO_REPA), NO_REPA)

    @property
    def judging(self) -> Judging:
        """When and how a model is judged."""
        return Judging(
            every=max(1, round(self.every / self.flow.batch)), sampling_shifts=self.sampling_shifts,
            samples=self.samples, sample_steps=self.sample_steps, sample_batch=self.sample_batch,
        )  # fmt: skip

    def cells(self) -> list[Cell]:
        """The grid: seeds outermost, so that a comparison that is cut short is one of fewer seeds."""
        axes = product(self.seeds, self.autoencoders, self.laws, self.train_shifts, self.repa)
        return [Cell(autoencoder=a, law=law, train_shift=s, repa=r, seed=seed) for seed, a, law, s, r in axes]

    def flow_of(self, cell: Cell) -> FlowConfig:
        """How a cell's model is trained."""
        return dataclasses.replace(
            self.flow, law=cell.law, shift=cell.train_shift, repa=cell.repa, seed=cell.seed,
            data=self.crops.data, held_out=self.crops.held_out, resolution=self.crops.resolution,
        )  # fmt: skip

    def flags_of(self, name: str) -> list[str]:
        """Options of train.vae for an autoencoder that is trained here. ValueError where there are none."""
        if name not in self.training:
            raise ValueError(
                f"autoencoder {name}: preset {self.preset!r} does not train it; give it with --weights {name}=PATH"
            )
        held_out = ["--held-out", self.crops.held_out] if self.crops.held_out else []
        return [*self.training[name].split(), "--data", self.crops.data, *held_out]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Where and how a comparison happens; may differ between one call and the next."""

    out: Path = Path("runs")
    """Folder of all runs; shared by all machines that work on the comparison."""
    name: str = ""
    """Folder of this comparison inside --out; by default compare- and the preset's name."""
    jobs: int = 0
    """Worker processes of this machine; 0 is one a core of a CPU (of one thread each), or --per-gpu a GPU."""
    per_gpu: int = 0
    """Workers that share a GPU, where --jobs is 0; 0 is 4 for narrow flow models, which leave a GPU idle, else 1."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""
    compile: bool = False
    """Compile the flow models and the autoencoders trained here."""
    stale: float = 600.0
    """Seconds without a sign of life after which another worker takes over what a lost one worked on."""
    retry_failed: bool = False
    """Try again what failed."""
    keep_weights: bool = False
    """Keep the checkpoints of finished models."""
    report: bool = False
    """Only write the page and the tables again, from the files that are there."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        for name, least in (("jobs", 0), ("per_gpu", 0), ("stale", 10)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.name and (Path(self.name).name != self.name or self.name in (".", "..")):
            raise ValueError(f"name: expected a plain folder name, got {self.name!r}; --out chooses where runs go")

    def folder(self, config: CompareConfig) -> Path:
        """Of the comparison."""
        return self.out / (self.name or f"compare-{config.preset}")


def narrow(steps: int, resolution: int = 64) -> dict[str, str]:
    """Training of the five autoencoders of the small presets: one narrow network, same crops and steps; what differs is
    the latent's width and the weight of alignment. resolution: of the comparison, which only an RAE has to know."""
    alone = "--align-weight 0"
    flags = {
        "sd": f"--autoencoder.z-channels 4 {alone}",
        "flux.1": f"--autoencoder.z-channels 16 {alone}",
        "flux.2": "--autoencoder.z-channels 32 --align-weight 0.1",
        "flux.2-nosem": f"--autoencoder.z-channels 32 {alone}",
        "rae": f"--preset rae-tiny --autoencoder.resolution {resolution} --resolution {resolution}",
    }
    return {name: f"{own} --steps {steps} --save-every {steps}" for name, own in flags.items()}


_ROWS = ("sd", "flux.1", "flux.2", "flux.2-nosem", "rae")
_TOY = CompareConfig(
    preset="toy",
    autoencoders=_ROWS,
    training=narrow(150),
    laws=LAWS[:2],
    train_shifts=(1.0, 2.95, 6.93),
    sampling_shifts=(1.0, 2.95, 6.93),
    flow=FlowConfig(
        preset="toy",
        transformer=TransformerConfig(width=128, depth=4, heads=2, repa_depth=2, time_scale=1000.0),
        batch=32,
        steps=160,
        lr=2e-3,
        warmup=8,
        final_lr=0.02,
        betas=(0.9, 0.99),
        ema_decays=(0.98,),
        repa_hidden=256,
        label_dropout=1.0,
    ),
    every=80 * 32,
    samples=160,
    sample_steps=10,
    held_out=192,
)

COMPARE_PRESETS: dict[str, CompareConfig] = {
    "toy": _TOY,
    "cpu-hour": dataclasses.replace(
        _TOY, preset="cpu-hour", training=narrow(300), laws=LAWS, seeds=(0, 1, 2), every=120 * 32, samples=256,
        sample_steps=20, held_out=256,
        flow=dataclasses.replace(_TOY.flow, steps=240, warmup=12),
    ),
    "h200-10min": dataclasses.replace(
        _TOY, preset="h200-10min", training=narrow(300, 128), laws=LAWS,
        crops=Crops(resolution=128),
        flow=dataclasses.replace(
            _TOY.flow, transformer=TransformerConfig(width=256, depth=6, heads=4, repa_depth=2, time_scale=1000.0),
            batch=128, steps=300, warmup=15,
        ),
        every=150 * 128, samples=1024, sample_steps=25, sample_batch=1024, held_out=512, reference_crops=4096,
        tflops=40.0, step_ms=5.0,
    ),
    "article": CompareConfig(
        preset="article",
        autoencoders=_ROWS,
        training={
            "flux.2": "--preset flux.2 --compile",
            "flux.2-nosem": "--preset flux.2 --vf-weight 0 --compile",
            "rae": "--preset rae --compile",
        },
        repa=("none", "dinov2-b"),
        crops=Crops(data="", resolution=256, cached_crops=0),
        flow=FlowConfig(
            preset="article", transformer=TRANSFORMERS["sit-xl"], batch=256, steps=400_000, lr=1e-4, workers=8,
            accumulate=4,  # for a GPU of 80 GB
        ),
        every=100_000 * 256,
        samples=50_000,
        held_out=2048,
        reference_crops=10**9,
        features="inception",
        tflops=400.0,
        step_ms=10.0,
    ),
}  # fmt: skip

_DESCRIPTION = """Compare autoencoders by what flow models make of their latents.

  python -m train.compare --preset toy                 2 CPU cores, bundled photographs, nothing to download
  python -m train.compare --preset article --crops.data IMAGENET --weights sd=sd.safetensors flux.1=ae.safetensors
  python -m train.compare --autoencoders mine other --weights mine=runs/mine other=ae.safetensors --crops.data PICTURES
  sbatch --array=0-63 --gpus=1 --wrap "python -m train.compare --preset article --out /shared/runs ..."

The same command goes on where it was stopped, and works beside others of the same --out, on any number of machines.
Presets: toy, cpu-hour, h200-10min, article. Writes OUT/NAME/: report.html, summary.json, cells.csv, and the files of
every autoencoder and model. Exit code 1 where models failed; Ctrl-C, SIGTERM, SIGUSR1 save and leave (130, 143, 138).
"""


def parse_compare(argv: list[str]) -> tuple[CompareConfig, CompareOptions]:
    """As `train.configs.parse`, for train.compare. ValueError where the preset has no pictures of its own."""
    config, options = parse(
        argv, COMPARE_PRESETS, options=CompareOptions(), default="toy", prog="python -m train.compare",  # type: ignore[type-var]
        description=_DESCRIPTION,
    )  # fmt: skip
    if not config.crops.data and not options.report and not options.dry_run:
        raise ValueError(f"preset {config.preset}: give a folder of pictures with --crops.data")
    return config, options
