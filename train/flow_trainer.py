"""What a step of flow-matching training is, and the validation loss that compares models whatever they trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flux2.autoencoder import AutoEncoder
from flux2.checkpoint_folders import read_tensors
from flux2.ema import EMA
from flux2.flow import NormalisedVelocityLoss, by_time_bin, velocity_mse
from flux2.images import from_uint8
from flux2.rae import RAE
from flux2.teachers import build_teacher
from flux2.transformer import RepaProjector, SiT
from kernels import flow_match_inputs, repa_loss
from kernels.philox import normal, uniform
from train import dist
from train.flow_config import FlowConfig, FlowOptions
from train.guards import GuardedOptimiser
from train.loop import load_optimiser_tensors, optimiser_tensors
from train.schedules import cosine_lr

STREAM_LABELS, STREAM_LATENTS, STREAM_TIMES, STREAM_NOISE = 111, 112, 113, 114  # Philox, beside those of train.data
BINS = 10


class FlowTrainer:
    """Transformer, averages, frozen autoencoder, teacher and optimisers of one run; `step` is one update.

    token_channels: channels of a cache's tokens, where the teacher's features come from there.
    """

    watched = "velocity"

    def __init__(
        self,
        config: FlowConfig,
        ae: AutoEncoder | RAE,
        num_classes: int,
        device: torch.device,
        *,
        options: FlowOptions | None = None,
        token_channels: int = 0,
    ) -> None:
        options = options or FlowOptions()
        self.config, self.device = config, device
        self.ae = ae.to(device).eval().requires_grad_(False)
        self.shift = config.train_shift(ae.cfg.latent_channels)
        torch.manual_seed(config.seed)
        self.model = SiT(
            config.transformer, ae.cfg.latent_channels, num_classes,
            backend=options.attention, checkpoint=options.checkpoint_activations,
        ).to(device)  # fmt: skip
        self.emas = {decay: EMA(self.model, decay) for decay in config.ema_decays}
        self.teacher = self.projector = None
        if config.repa != "none":
            if not token_channels:
                self.teacher = build_teacher(config.repa, ae.cfg.multiple, options.repa_weights, device)
                token_channels = self.teacher.channels
            width = config.transformer.width
            self.projector = RepaProjector(width, token_channels, config.repa_hidden).to(device)
        self.sharded = options.parallel == "fsdp" and dist.size() > 1
        if self.sharded:
            self._shard(options)
        self.guards, self.lr = self._optimisers(), config.lr  # lr: of the last step
        self.seen: list[tuple[Tensor, Tensor]] = []  # velocity error and time of each sample since the last `bins`
        self.share = dist.Share(batch=config.batch, parts=config.accumulate)
        self._losses = self.losses
        if options.compile and options.compile_scope == "model":
            self._losses = torch.compile(self.losses, fullgraph=True, dynamic=False)
        elif options.compile:
            for block in self.model.blocks:
                block.compile(fullgraph=True, dynamic=False)
        if not self.sharded:
            self._losses = dist.replicated(self._losses, self.model, *([self.projector] if self.projector else []))

    def _shard(self, options: FlowOptions) -> None:
        """Spreads the model and its averages over all processes."""
        if self.config.optimiser == "muon":
            raise ValueError("optimiser: expected adamw with --parallel fsdp, got muon, which needs whole matrices")
        if options.compile and options.compile_scope == "model":
            raise ValueError("compile_scope: expected blocks with --parallel fsdp, got model")
        from train.sharding import shard

        self.copy_from_main()
        for model in (self.model, *(ema.model for ema in self.emas.values())):
            shard(model, model.blocks, precision=self.config.precision)

    def _optimisers(self) -> dict[str, GuardedOptimiser]:
        """AdamW over everything; with --optimiser muon, Muon over the matrices that map tokens to tokens in blocks."""
        config = self.config
        named = [(f"model.{n}", p) for n, p in self.model.named_parameters()]
        if self.projector:
            named += [(f"projector.{n}", p) for n, p in self.projector.named_parameters()]
        matrices = []
        if config.optimiser == "muon":
            matrices = [(n, p) for n, p in named if ".blocks." in n and p.ndim == 2 and "adaLN" not in n]
        of_muon = {n for n, _ in matrices}
        rest = [(n, p) for n, p in named if n not in of_muon]
        adamw = torch.optim.AdamW(
            [p for _, p in rest], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay,
            fused=not self.sharded,
        )  # fmt: skip
        guards = {"model": GuardedOptimiser(rest, adamw, clip=config.clip)}
        if matrices:
            muon = torch.optim.Muon(
                [p for _, p in matrices], lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            guards["matrices"] = GuardedOptimiser(matrices, muon, clip=config.clip)
        return guards

    @property
    def ema(self) -> SiT:
        """The first of the averages: what is sampled and validated."""
        return self.emas[self.config.ema_decays[0]].model

    @torch.no_grad()
    def inputs(
        self, step: int, batch: Mapping[str, Tensor], first: int = 0, tokens: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """(normalised latents fp32 [N, C, h, w], teacher's tokens [N, h w, D] or None) of a batch, from sample `first`.

        batch: pixels uint8 [N, 3, R, R], or mean, logvar and tokens of a cache. tokens=False: only the latents.
        """
        features = batch.get("tokens")
        if "pixels" in batch:
            x = from_uint8(batch["pixels"].to(self.device, non_blocking=True))
            posterior = self.ae.posterior(x)
            mean, logvar = posterior.mean, getattr(posterior, "logvar", None)
            features = self.teacher(x) if self.teacher and tokens else None
        else:
            mean, logvar = batch["mean"].to(self.device), batch.get("logvar")
        if self.config.sample_posterior and logvar is not None:
            noise = normal(self.config.seed, step, first, tuple(mean.shape), STREAM_LATENTS, self.device)
            mean = mean + torch.exp(0.5 * logvar.to(self.device)) * noise
        if features is not None:
            features = features.to(self.device).flatten(2).transpose(1, 2)
        return self.ae.normalise(mean.float()), features if self.projector else None

    def losses(
        self, z: Tensor, v: Tensor, t: Tensor, y: Tensor, drop: Tensor, tokens: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(terms, velocity error of each sample): "loss" is the weighted sum of "velocity" and "repa"."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            pred, features = self.model(z, t, y, return_features=True, drop=drop)
            projected = self.projector(features) if self.projector else None
        errors = velocity_mse(pred, v)
        terms = {"velocity": errors.mean()}
        terms["loss"] = terms["velocity"]
        if projected is not None and tokens is not None:
            terms["repa"] = repa_loss(projected, tokens)
            terms["loss"] = terms["velocity"] + self.config.repa_weight * terms["repa"]
        return terms, errors.detach()

    def step(self, step: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update on this process's share of a batch of `LabelledCrops` or `CachedLatents`: detached scalars of the
        whole batch by name, and "grad_norm"."""
        config = self.config
        self.lr = config.lr * cosine_lr(step, steps=config.steps, warmup=config.warmup, final=config.final_lr)
        for guard in self.guards.values():
            for group in guard.optimiser.param_groups:
                group["lr"] = self.lr
        own: dict[str, Tensor] = {}
        share, piece, firsts = 1 / config.accumulate, self.share.piece, self.share.firsts()
        for i, first in enumerate(firsts):
            part = {k: value[i * piece : (i + 1) * piece] for k, value in batch.items()}
            y = part["labels"].to(self.device, non_blocking=True)
            drop = uniform(config.seed, step, first, piece, 1, STREAM_LABELS, self.device)[:, 0] < config.label_dropout
            x, tokens = self.inputs(step, part, first)
            z, v, t = flow_match_inputs(
                x, law=config.law, shift=self.shift, mu=config.mu, sigma=config.sigma,
                seed=config.seed, step=step, first_index=first,
            )  # fmt: skip
            if self.sharded:
                self.model.set_requires_gradient_sync(i + 1 == len(firsts))  # type: ignore[operator]
            with dist.accumulating(self._losses, last=i + 1 == len(firsts)):
                terms, errors = self._losses(z, v, t, y, drop, tokens)
                (terms["loss"] * share).backward()
            for name, term in terms.items():
                own[name] = own.get(name, 0) + share * term.detach()
            self.seen.append((errors, t))
        if self.sharded and self.projector:  # it is small, and whole everywhere
            dist.average(p.grad for p in self.projector.parameters() if p.grad is not None)
        sums, ranks = dist.mean_terms(own)
        judged = dict(sums)
        if len(self.guards) > 1:  # what breaks the gradients of one breaks the update of all
            found = [p.grad for g in self.guards.values() for p in g.named.values() if p.grad is not None]
            judged["gradients"] = torch.stack(torch._foreach_norm(found)).norm()  # pyright: ignore
        emas = list(self.emas.values())
        norms = [g.update(step, judged, ranks, emas) for g in self.guards.values()]
        done = set().union(*(g.averaged for g in self.guards.values()))
        for ema in emas:
            ema.update(self.model, step, but=done)
        return {**sums, "grad_norm": torch.stack(norms).norm()}

    def bins(self) -> list[float]:
        """Mean velocity error of each time bin over the samples of all processes since the last call; nan where none
        were."""
        if not self.seen:
            return [float("nan")] * BINS
        errors, t = (dist.gathered(torch.cat(column)) for column in zip(*self.seen, strict=True))
        self.seen = []
        return by_time_bin(errors, t, BINS)[0].tolist()

    def remarks(self, means: Mapping[str, float]) -> dict[str, str]:
        """Nothing to say beside the numbers."""
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs, by checkpoint file."""
        groups: dict[str, dict[str, Tensor]] = {"model": self.model.state_dict()}
        groups |= {f"ema_{decay}": ema.model.state_dict() for decay, ema in self.emas.items()}
        groups |= {f"optimiser_{name}": optimiser_tensors(g.optimiser) for name, g in self.guards.items()}
        return groups | ({"projector": self.projector.state_dict()} if self.projector else {})

    def copy_from_main(self) -> None:
        """Takes over process 0's weights, as they are before the first step."""
        if isinstance(next(self.model.parameters()), DTensor):  # done before they were spread
            return
        parts = [self.model, *(ema.model for ema in self.emas.values()), *([self.projector] if self.projector else [])]
        dist.copy_from_main(t for part in parts for t in part.state_dict().values())

    def restore(self, folder: Path) -> None:
        """Takes over what `tensors` gave, from a checkpoint's folder; of a spread model each process its own part."""
        if not self.sharded:
            self.load(read_tensors(folder))
            return
        from train.sharding import load_into, load_optimiser

        for name, group in self.tensors().items():
            if not name.startswith("optimiser_"):
                load_into(folder / f"{name}.safetensors", group)
        for name, guard in self.guards.items():
            load_optimiser(folder / f"optimiser_{name}.safetensors", guard.optimiser)

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of `tensors`."""
        self.model.load_state_dict(tensors["model"])
        for decay, ema in self.emas.items():
            ema.model.load_state_dict(tensors[f"ema_{decay}"])
        for name, guard in self.guards.items():
            load_optimiser_tensors(guard.optimiser, tensors[f"optimiser_{name}"])
        if self.projector:
            self.projector.load_state_dict(tensors["projector"])


@torch.no_grad()
def validate(
    model: SiT, x: Tensor, y: Tensor, *, precision: str = "fp32", bins: int = BINS, batch: int = 64
) -> NormalisedVelocityLoss:
    """Normalised velocity loss of latents x [N, C, h, w], labels y [N]: each sample once in each time bin.

    Times and noise are the same for every model and every step: of sample i in bin b, functions of (b, i).
    """
    loss = NormalisedVelocityLoss(bins)
    for b in range(bins):
        u = uniform(0, b, 0, len(x), 1, STREAM_TIMES, x.device)[:, 0]
        eps = normal(0, b, 0, tuple(x.shape), STREAM_NOISE, x.device)
        z, v, t = flow_match_inputs(x, noise=eps, t=(b + u) / bins)
        for part in torch.arange(len(x), device=x.device).split(batch):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss.add(model(z[part], t[part], y[part]), v[part], t[part])
    return loss
