"""The discriminator's side of training an autoencoder: its network, optimiser, regularisers, and when it plays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flux2.adversarial import (
    ADAPTIVE_MAX,
    LeCAM,
    StartState,
    diagnose,
    discriminator_loss,
    generator_loss,
    logit_statistics,
    r1_penalty,
)
from flux2.augment import DIFFAUG_DRAWS, DiffAug
from flux2.discriminator import PatchDiscriminator, ViTDiscriminator, load_backbone
from flux2.images import as_rgb, from_uint8, to_uint8
from kernels.philox import uniform
from train import dist
from train.data import STREAM_AUGMENT
from train.guards import GuardedOptimiser
from train.loop import load_optimiser_tensors, optimiser_tensors
from train.vae_config import GanConfig, VaeConfig


def build_discriminator(gan: GanConfig, channels: int = 3) -> nn.Module:
    """The network of `gan`, weights random but for a frozen backbone's; vit sees RGB, by `flux2.images.as_rgb`."""
    if gan.discriminator == "vit":
        return ViTDiscriminator(load_backbone(gan.backbone, gan.backbone_weights))
    return PatchDiscriminator(channels, width=gan.width, n_layers=gan.n_layers, norm=gan.norm)


class Adversary:
    """Discriminator of one run. `gradient` is what it tells the autoencoder; `judge` and `update` train it.

    Photographs and reconstructions are pixels [N, 3, H, W] without a graph; first: index of their first sample in the
    step's batch, which decides the augmentation.
    """

    def __init__(
        self, config: VaeConfig, device: torch.device, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.config, self.gan, self.device = config, config.gan, device
        network = build_discriminator(self.gan, config.autoencoder.channels)
        if dist.size() > 1 and any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
            if device.type != "cuda":
                raise ValueError("gan.norm: expected group between several processes on CPUs, got batch")
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.discriminator = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.lecam = LeCAM().to(device)
        self.start = StartState(self.gan.start)
        self.augment = DiffAug(probability=self.gan.augment)
        self.optimiser = torch.optim.AdamW(
            self.discriminator.parameters(), lr=self.gan.lr, betas=self.gan.betas, weight_decay=0.0, fused=True
        )
        self.guard = GuardedOptimiser(self.discriminator.named_parameters(), self.optimiser, clip=config.clip)
        self._fool, self._judge = wrap(self.fool), dist.replicated(wrap(self.judge_logits), self.discriminator)

    def logits(self, x: Tensor, draws: Tensor) -> Tensor:
        """What the discriminator says of augmented pixels."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            x = as_rgb(x) if self.gan.discriminator == "vit" else x
            return self.discriminator(self.augment(x, draws) if self.gan.augment else x)

    def fool(self, recon: Tensor, draws: Tensor) -> Tensor:
        """The autoencoder's loss, fp32 scalar."""
        return generator_loss(self.logits(recon, draws), self.gan.loss)

    def judge_logits(self, x: Tensor, recon: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The discriminator's loss, and its logits on photographs and reconstructions."""
        real, fake = self.logits(x, draws), self.logits(recon, draws)
        return discriminator_loss(real, fake, self.gan.loss), real, fake

    def gradient(self, step: int, first: int, recon: Tensor) -> tuple[Tensor, Tensor]:
        """(the autoencoder's loss, its gradient on the reconstruction); the discriminator is in eval and unchanged."""
        leaf = recon.detach().requires_grad_()
        with self._frozen():
            loss = self._fool(leaf, self._draws(step, first, len(leaf)))
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        self.discriminator.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.discriminator.train().requires_grad_(True)

    def judge(
        self, step: int, first: int, x: Tensor, recon: Tensor, share: float, *, last: bool = True
    ) -> dict[str, Tensor]:
        """Adds `share` times the gradients of this part of the batch to the discriminator's; its terms, detached.

        last: whether it is the last part of the batch, after which processes average their gradients.
        """
        if self.gan.quantise:
            recon = from_uint8(to_uint8(recon))
        with dist.accumulating(self._judge, last=last):
            loss, real, fake = self._judge(x, recon, self._draws(step, first, len(x)))
        terms = {"d_loss": loss.detach(), **logit_statistics(real, fake)}
        if self.gan.lecam:
            penalty = self.lecam(real, fake)
            terms["lecam"] = penalty.detach()
            loss = loss + self.gan.lecam * penalty
        if self.gan.r1 and step % self.gan.r1_every == 0:
            penalty = r1_penalty(self.discriminator, x)
            terms["r1"] = penalty.detach()
            loss = loss + self.gan.r1 * self.gan.r1_every * penalty
        (loss * share).backward()
        return terms

    def _draws(self, step: int, first: int, num: int) -> Tensor:
        if not self.gan.augment:  # nobody reads them
            return torch.zeros(num, DIFFAUG_DRAWS, device=self.device)
        return uniform(self.config.seed, step, first, num, DIFFAUG_DRAWS, stream=STREAM_AUGMENT, device=self.device)

    def update(self, step: int, terms: Mapping[str, Tensor], rate: float, ranks: Tensor | None = None) -> Tensor:
        """One update from the gradients there are; `rate` multiplies the peak learning rate. Returns their norm.

        terms, ranks: of `dist.mean_terms`.
        """
        self.optimiser.param_groups[0]["lr"] = self.gan.lr * rate
        if self.gan.lecam:
            self.lecam.update(terms["d_real_mean"], terms["d_fake_mean"])
        return self.guard.update(step, terms, ranks)

    def remark(self, means: Mapping[str, float]) -> str:
        """How the game goes, in one line; empty before it has begun."""
        if self.start.started_at is None:
            return ""
        if "d_real_accuracy" not in means:  # means leave out what is not finite
            return "GAN is broken (no finite value)" if means.get("step", 0) > self.start.started_at else ""
        return diagnose(
            real_accuracy=means["d_real_accuracy"],
            fake_accuracy=means["d_fake_accuracy"],
            weight=means.get("gan_adaptive"),
            gan_share=means.get("gan_share"),
            max_weight=0.99 * ADAPTIVE_MAX,  # a mean of clamped weights, rounded
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs, by checkpoint file."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimiser": optimiser_tensors(self.optimiser),
            "discriminator_state": {**self.lecam.state_dict(), **self.start.state_dict()},
        }

    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Inverse of `tensors`."""
        self.discriminator.load_state_dict(tensors["discriminator"])
        load_optimiser_tensors(self.optimiser, tensors["discriminator_optimiser"])
        state = tensors["discriminator_state"]
        self.lecam.load_state_dict({k: state[k] for k in self.lecam.state_dict()})
        self.start.load_state_dict(state)
