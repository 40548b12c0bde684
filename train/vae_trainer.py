"""One update of an autoencoder and its discriminator, in phases that hand each other detached tensors.

    encode      x -> moments -> z                              compiled; z is cut from its graph
    decode      z (scaled and turned, in EQ-VAE's steps) -> recon      compiled; recon is cut from its graph
    recon       pixel and perceptual terms, the discriminator's word -> one gradient on recon
    backward    through the decoder, to a gradient on z
    latent      KL and alignment to the teacher's tokens -> gradients on z and moments
    backward    through the encoder
    judge       the discriminator on photographs and detached reconstructions, its own backward

Because every loss ends at a cut, each network is run forward and backward once: adaptive weights compare gradients that
are there already (at the cuts, through one layer), and no gradient of one side can reach the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2.adversarial import adaptive_weight
from flux2.alignment import AlignmentHead, cosine_alignment, vf_loss
from flux2.autoencoder import AutoEncoder, AutoencoderConfig, Posterior
from flux2.checkpoint_folders import read_tensors
from flux2.ema import EMA
from flux2.equivariance import Transform, draw
from flux2.images import as_rgb, from_uint8
from flux2.latents import patchify
from flux2.losses import LogVariance, charbonnier, kl, l1, l2, laplacian_loss
from flux2.perceptual import LPIPS
from flux2.rae import RAE, NoisedLatent
from flux2.teachers import Teacher, build_teacher
from kernels.philox import normal, uniform
from train import dist
from train.adversary import Adversary
from train.data import STREAM_EQUIVARIANCE, STREAM_NOISE_LEVEL, STREAM_POSTERIOR
from train.guards import GuardedOptimiser
from train.loop import load_optimiser_tensors, optimiser_tensors, parameters_by_rate
from train.schedules import WeightSchedule, cosine_lr
from train.vae_config import VaeConfig

# of the scalars that `step` returns, those that follow from others
DERIVED = ("loss", "recon", "gan_weight", "gan_share", "gan_adaptive", "vf_weight")
PIXEL_LOSSES = {"l1": l1, "l2": l2, "charbonnier": charbonnier, "laplacian": laplacian_loss}


def build_autoencoder(config: VaeConfig, backend: str = "auto") -> AutoEncoder | RAE:
    """The network of `config`, weights random but for an RAE's encoder where --init does not bring it."""
    if isinstance(config.autoencoder, AutoencoderConfig):
        return AutoEncoder(config.autoencoder, backend)
    return RAE(config.autoencoder, None if config.init else config.teacher_weights, backend)


class VaeTrainer:
    """Model, averaged models, teacher, discriminator and optimisers of one run; `step` is one update of each."""

    teacher: Teacher  # where the latent is aligned
    watched = "recon"
    phase = staticmethod(torch.profiler.record_function)  # what a profile calls each part of a step

    def __init__(self, config: VaeConfig, device: torch.device, *, compiled: bool, backend: str = "auto") -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.ae = build_autoencoder(config, backend).to(device)
        self.ae.decoder.requires_grad_(config.train != "encoder")
        self.ae.encoder.requires_grad_(config.train != "decoder")
        self.extra = nn.ModuleDict()  # trained beside the autoencoder, and not part of it
        self.lpips = self.head = self.logvar = self.adversary = None
        if config.aligned:
            self.teacher = build_teacher(config.teacher, config.autoencoder.multiple, config.teacher_weights, device)
            self.extra["head"] = self.head = AlignmentHead(
                config.autoencoder.latent_channels, self.teacher.channels
            ).to(device)
        if config.learn_logvar:
            self.extra["logvar"] = self.logvar = LogVariance().to(device)
        if config.lpips_weight:
            self.lpips = LPIPS(config.lpips_net, config.lpips_weights).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedules = [WeightSchedule(text) for text in config.schedules]
        self.trained = nn.ModuleList([self.ae, self.extra])
        self.optimiser = self._optimiser()
        named = [*self.ae.named_parameters(), *self.extra.named_parameters()]
        named = [(n, p) for n, p in named if p.requires_grad]
        self.guards = {"autoencoder": GuardedOptimiser(named, self.optimiser, clip=config.clip)}
        self.average()
        self.lr = 0.0
        # each phase that holds a network is a function of its own, without graph breaks where it is compiled
        wrap = (lambda f: torch.compile(f, fullgraph=True, dynamic=False)) if compiled else (lambda f: f)
        if compiled:  # one graph a bucket and size of EQ-VAE's, and a few for gradients switched on and off
            shapes = max(1, len(config.bucket_shapes()))
            torch._dynamo.config.recompile_limit = max(8, 2 * shapes * (len(config.eq_scales) + 2))
        self._encode, self._decode = wrap(self.encode), wrap(self.decode)
        self._pixels, self._tokens = wrap(self.pixel_terms), wrap(self.tokens)
        self._frozen_latent = wrap(self.frozen_latent)
        self._encode = dist.replicated(self._encode, self.ae.encoder)
        self._decode = dist.replicated(self._decode, self.ae.decoder)
        self.share = dist.Share(batch=config.batch, parts=config.accumulate)
        if config.gan.weight:
            self.adversary = Adversary(config, device, wrap)
            self.guards["discriminator"] = self.adversary.guard

    def _optimiser(self) -> torch.optim.AdamW:
        groups = [
            {"params": group, "rate": self.config.linear_lr if slow else 1.0}
            for slow, group in parameters_by_rate(self.trained, "linear")
        ]
        decay = self.config.weight_decay
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, weight_decay=decay, fused=True)

    def average(self) -> None:
        """Starts the averaged models from the weights as they are."""
        self.emas = [EMA(self.ae, decay) for decay in self.config.ema_decays]

    @property
    def ema(self) -> EMA[Any]:
        """The averaged model that is judged and loaded."""
        return self.emas[0]

    # What the phases compute

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.ae, AutoEncoder)  # an RAE's encoder is frozen, and runs in its posterior
        with self.autocast():
            return self.ae.encode_with_features(x)

    @torch.no_grad()
    def frozen_latent(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and, of a convolutional autoencoder, log-variance of a latent whose encoder is not trained."""
        with self.autocast():
            posterior = self.ae.posterior(x)
            return posterior.mean, posterior.logvar if isinstance(posterior, Posterior) else None

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            return self.ae.decode_with_features(z)

    def tokens(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.teacher(as_rgb(x))

    def pixel_terms(self, recon: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Pixels [N, C, H, W] both -> the reconstruction terms that have a weight, fp32 scalars, unweighted."""
        terms = {name: f(recon, x) for name, f in PIXEL_LOSSES.items() if self.config.weight(name)}
        if self.lpips is not None:
            with self.autocast():
                terms["lpips"] = self.lpips(as_rgb(recon), as_rgb(x))
        return terms

    # One update

    def factor(self, term: str, step: int) -> float:
        """What the schedules multiply a term's weight with."""
        factor = 1.0
        for schedule in self.schedules:
            if schedule.term == term:
                factor *= schedule(step, self.config.steps)
        return factor

    def noise(self, step: int, first: int, shape: tuple[int, ...]) -> Tensor | None:
        """Noise of samples first.. of a step, fp32 of `shape` [n, z, h, w]; None where the mode is decoded."""
        config = self.config
        if not config.sample_posterior:
            return None
        noise = normal(config.seed, step, first, tuple(shape), stream=STREAM_POSTERIOR, device=self.device)
        if isinstance(self.ae, RAE):  # its latent has no width of its own: tau U(0, 1) a sample
            level = uniform(config.seed, step, first, len(noise), 1, stream=STREAM_NOISE_LEVEL, device=self.device)
            noise = noise * (self.ae.cfg.noise_tau * level.view(-1, 1, 1, 1))
        return noise

    def transform(self, step: int) -> Transform | None:
        """What this step does to latent and picture, in EQ-VAE's regularisation."""
        config = self.config
        if not config.eq_probability:
            return None
        u = uniform(config.seed, step, 0, 1, 2, stream=STREAM_EQUIVARIANCE)[0].tolist()
        probability = config.eq_probability * self.factor("eq", step)
        return draw(u, probability=probability, scales=config.eq_scales)

    def step(self, step: int, batch: Tensor) -> dict[str, Tensor]:
        """One update on this process's share of a batch, uint8 [N, 3, R, R]: detached scalars of the whole, by name.

        Each term unweighted; "recon", the weighted sum of the pixel terms; "loss", that of all terms, with the learned
        scale of recon; "grad_norm".
        """
        config = self.config
        x = from_uint8(batch.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        rate = cosine_lr(step, steps=config.steps, warmup=config.warmup, final=config.final_lr)
        self.lr = config.lr * rate
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * group["rate"]
        judged: list[dict[str, Tensor]] = []
        terms: list[dict[str, Tensor]] = []
        transform, share, firsts = self.transform(step), 1 / config.accumulate, self.share.firsts()
        for first, x_part in zip(firsts, x.split(self.share.piece), strict=True):
            last = first == firsts[-1]
            with dist.accumulating(self._encode, self._decode, last=last):
                target, recon, found = self.generate(step, first, x_part, transform, share)
            terms.append(found)
            if self.adversary is not None and self.adversary.start.trains_discriminator(step):
                with self.phase("discriminator, for itself"):
                    judged.append(self.adversary.judge(step, first, target, recon.float(), share, last=last))
        with self.phase("updates and averages"):
            return self._update(step, _mean(terms), judged, rate)

    def _update(
        self, step: int, own: dict[str, Tensor], judged: list[dict[str, Tensor]], rate: float
    ) -> dict[str, Tensor]:
        """Both optimisers and the averages; all terms, averaged over all processes, with what the optimisers say."""
        terms, ranks = dist.mean_terms(own, DERIVED)
        watched = {n: t for n, t in terms.items() if n not in DERIVED}  # so that what broke is named, not what follows
        dist.average(p.grad for p in self.extra.parameters() if p.grad is not None)  # the rest: while it was computed
        guard = self.guards["autoencoder"]
        terms["grad_norm"] = guard.update(step, watched, ranks, self.emas)
        if self.adversary is not None:
            self.adversary.start.observe(step, terms["recon"])
            if judged:
                seen, ranks = dist.mean_terms(_mean(judged))
                terms |= seen | {"d_grad_norm": self.adversary.update(step, seen, rate, ranks)}
        for ema in self.emas:
            ema.update(self.ae, step, but=guard.averaged)
        return terms

    def generate(
        self, step: int, first: int, x: Tensor, transform: Transform | None, share: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The autoencoder's gradients of one part of a batch, times `share`: (target, reconstruction, terms).

        x: pixels of samples first.. of the batch. target is x, or x transformed as the latent was. Both are detached.
        """
        config, trains_encoder = self.config, self.config.train != "decoder"
        moments = leaf = features = None
        if trains_encoder:
            with self.phase("encoder forward"):
                moments, features = self._encode(x)
            leaf = moments.detach().float().requires_grad_()
            posterior = Posterior(leaf)
        else:
            with self.phase("encoder forward"):
                mean, posterior_logvar = self._frozen_latent(x)
                posterior = (
                    NoisedLatent(mean, 0.0)
                    if posterior_logvar is None
                    else Posterior(torch.cat((mean, posterior_logvar), 1))
                )
        noise = self.noise(step, first, posterior.mean.shape)
        z = (posterior.mode() if noise is None else posterior.sample(noise)).float()
        entry = z.detach().requires_grad_(trains_encoder)
        target, moved = x, entry
        if transform is not None:
            sides = transform.sides(*z.shape[2:])
            f = config.autoencoder.downsample
            target = transform(x, (sides[0] * f, sides[1] * f)).contiguous(memory_format=torch.channels_last)
            moved = transform(entry, sides).contiguous(memory_format=torch.channels_last)
        with self.phase("decoder forward"):
            recon, last = self._decode(moved)
        gradient, terms = self.reconstruction_gradient(step, first, recon.detach(), target, last.detach())
        with self.phase("decoder backward"):
            recon.backward((gradient * share).to(recon.dtype))
        if trains_encoder:
            assert moments is not None and leaf is not None and entry.grad is not None and features is not None
            of_recon = entry.grad / share
            with self.phase("latent terms"):
                outward = self.latent_gradient(step, x, posterior, z, leaf, features.detach(), of_recon, terms)
            with self.phase("encoder backward"):
                moments.backward((outward * share).to(moments.dtype))
        return target, recon.detach(), terms

    def reconstruction_gradient(
        self, step: int, first: int, recon: Tensor, target: Tensor, features: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of all terms that look at the picture, on the picture; fp32 [N, 3, H, W], and the terms."""
        config = self.config
        leaf = recon.float().requires_grad_()
        with self.phase("pixel and perceptual terms"):
            found = self._pixels(leaf, target)
            loss = torch.stack([config.weight(n) * self.factor(n, step) * t for n, t in found.items()]).sum()
            recon_loss = loss.detach()
            if self.logvar is not None:
                loss = self.logvar(loss)
                gradient, of_logvar = torch.autograd.grad(loss, (leaf, self.logvar.logvar))
                _accumulate(self.logvar.logvar, of_logvar / config.accumulate)
            else:
                (gradient,) = torch.autograd.grad(loss, leaf)
        terms = {"loss": loss.detach(), "recon": recon_loss, **{n: t.detach() for n, t in found.items()}}
        factor = 0.0
        if self.adversary is not None:
            factor = config.gan.weight * self.adversary.start.generator_factor(step) * self.factor("gan", step)
        if self.adversary is not None and factor:
            with self.phase("discriminator, for the autoencoder"):
                fooled, of_gan = self.adversary.gradient(step, first, recon.float())
            with self.phase("adaptive weight"):
                own = dist.mean(self.ae.last_layer_grad(features, gradient)).norm()
                other = dist.mean(self.ae.last_layer_grad(features, of_gan)).norm()
            adaptive = torch.ones_like(own)
            if config.gan.adaptive:
                adaptive = adaptive_weight(own, other, eps=config.gan.adaptive_eps)
                terms["gan_adaptive"] = adaptive
            weight = factor * adaptive
            gradient = gradient + weight * of_gan
            terms["loss"] = terms["loss"] + weight * fooled
            share = adaptive * config.gan.weight * other / own.clamp(min=1e-12)  # without ramp and schedule
            terms |= {"gan": fooled, "gan_weight": weight, "gan_share": share}
        return gradient, terms

    def latent_gradient(
        self,
        step: int,
        x: Tensor,
        posterior: Posterior | NoisedLatent,
        z: Tensor,
        leaf: Tensor,
        features: Tensor,
        of_recon: Tensor,
        terms: dict[str, Tensor],
    ) -> Tensor:
        """Gradient of everything on the moments `leaf`, fp32 [N, 2z, h, w]; adds the latent's terms to `terms`.

        z: the latent, a function of leaf. of_recon: gradient of the reconstruction terms on z.
        """
        config, on_z = self.config, of_recon
        if self.head is not None:
            parameters = list(self.head.parameters())
            with self.phase("teacher"):
                tokens = self._tokens(x)
            entry = z.detach().requires_grad_()
            with self.autocast():
                pred = self.head(patchify(entry, config.autoencoder.patch))
            losses = {}
            if config.align_weight:
                losses["align"] = cosine_alignment(pred, tokens)
            if config.vf_weight:
                cosine, distance = config.vf_margins
                losses["vf"] = vf_loss(pred, tokens, cosine_margin=cosine, distance_margin=distance)
            for i, (name, loss) in enumerate(losses.items()):
                of_z, *of_head = torch.autograd.grad(loss, (entry, *parameters), retain_graph=i + 1 < len(losses))
                weight = torch.full((), config.weight(name) * self.factor(name, step), device=self.device)
                if name == "vf" and config.vf_adaptive:
                    own, other = (self._encoder_norm(features, z, leaf, g) for g in (of_recon, of_z))
                    weight = weight * adaptive_weight(own, other)
                    terms["vf_weight"] = weight
                on_z = on_z + weight * of_z
                for parameter, gradient in zip(parameters, of_head, strict=True):
                    _accumulate(parameter, weight * gradient / config.accumulate)
                terms[name] = loss.detach()
                terms["loss"] = terms["loss"] + weight * loss.detach()
        assert isinstance(posterior, Posterior)
        divergence = kl(posterior, config.free_bits)
        of_kl = torch.full_like(divergence, config.kl_weight * self.factor("kl", step))
        terms["kl"] = divergence.detach()
        terms["loss"] = terms["loss"] + of_kl * terms["kl"]
        (outward,) = torch.autograd.grad((z, divergence), leaf, (on_z, of_kl))
        return outward

    def _encoder_norm(self, features: Tensor, z: Tensor, leaf: Tensor, on_z: Tensor) -> Tensor:
        (on_moments,) = torch.autograd.grad(z, leaf, on_z, retain_graph=True)
        assert isinstance(self.ae, AutoEncoder)
        return dist.mean(self.ae.encoder_grad(features, on_moments)).norm()

    # For the run

    def remarks(self, means: Mapping[str, float]) -> dict[str, str]:
        """How the adversarial game goes, once it has begun."""
        line = self.adversary.remark(means) if self.adversary is not None else ""
        return {"gan_diagnosis": line} if line else {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs, by checkpoint file."""
        groups = {"model": self.ae.state_dict(), "optimiser": optimiser_tensors(self.optimiser)}
        for name, ema in zip(self.ema_names(), self.emas, strict=True):
            groups[name] = ema.model.state_dict()
        if len(self.extra):
            groups["extra"] = self.extra.state_dict()
        if self.adversary is not None:
            groups |= self.adversary.tensors()
        return groups

    def ema_names(self) -> list[str]:
        """Checkpoint files of the averaged models; the first is the one that is loaded."""
        return ["ema", *(f"ema_{decay:g}" for decay in self.config.ema_decays[1:])]

    def restore(self, folder: Path) -> None:
        """Takes over what `tensors` gave, from a checkpoint's folder."""
        self.load(read_tensors(folder))

    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Inverse of `tensors`."""
        self.ae.load_state_dict(tensors["model"])
        load_optimiser_tensors(self.optimiser, tensors["optimiser"])
        for name, ema in zip(self.ema_names(), self.emas, strict=True):
            ema.model.load_state_dict(tensors[name])
        if len(self.extra):
            self.extra.load_state_dict(tensors["extra"])
        if self.adversary is not None:
            self.adversary.load(tensors)

    def copy_from_main(self) -> None:
        """Takes over process 0's weights, as they are before the first step."""
        parts: list[nn.Module] = [self.ae, self.extra, *(ema.model for ema in self.emas)]
        if self.adversary is not None:
            parts.append(self.adversary.discriminator)
        dist.copy_from_main(t for part in parts for t in part.state_dict().values())


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return parts[0] if len(parts) == 1 else {k: torch.stack([p[k] for p in parts]).mean() for k in parts[0]}


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
