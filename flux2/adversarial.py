"""The adversarial game beside its networks: losses, R1, LeCAM, adaptive weight, when it starts, how it is going.

D is the discriminator, G the autoencoder. Logits are positive for real; every loss is a mean over all of them, fp32
also under autocast, so that its weight means the same at any resolution, batch and number of patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

GAN_LOSSES = ("hinge", "vanilla", "non-saturating")
ADAPTIVE_MAX = 1e4  # LDM, RAE

D_HAS_WON = 0.95  # accuracy on real and on fake from which D leaves G nothing to learn from
D_IS_GUESSING = 0.55  # mean of the two accuracies up to which D is no better than a coin
G_IS_IGNORED = 0.01  # share of the reconstruction's gradient under which the GAN changes nothing


def _check_kind(kind: str) -> None:
    if kind not in GAN_LOSSES:
        raise ValueError(f"GAN loss: expected one of {', '.join(GAN_LOSSES)}, got {kind!r}")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """What D minimises: logits of any shapes -> fp32 scalar, the mean of a term on real and one on fake.

    hinge: relu(1 - real) and relu(1 + fake). vanilla and non-saturating: the cross-entropy, softplus(-real) and
    softplus(fake). ValueError for other kinds.
    """
    _check_kind(kind)
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """What G minimises: D's logits on the reconstruction -> fp32 scalar.

    hinge and vanilla: -mean (LDM, RAE). non-saturating: mean softplus(-fake) (Goodfellow et al. 2014).
    """
    _check_kind(kind)
    fake = fake.float()
    return F.softplus(-fake).mean() if kind == "non-saturating" else -fake.mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Half the squared gradient of D at real pixels [N, C, H, W] (Mescheder et al. 2018), fp32 scalar; times gamma.

    Per picture, P/2 * |d(mean of its logits) / d(pixels)|^2 with P = C H W; then the mean over pictures. The factor P
    makes it independent of resolution: twice the sides, and each pixel has a quarter of the gradient. For a D of one
    logit it is P times the usual R1, so that gamma here is the usual gamma / P (StyleGAN2 raises its own with the
    area for this reason); for a D of L logits whose sum is differentiated elsewhere, it is gamma * L^2 / P.

    Run it eagerly, on the module itself rather than a compiled or DDP one: it differentiates twice, which compiled
    code and fused attention cannot; attention takes its plain path here.
    """
    with torch.autocast(real.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        pixels = real.detach().to(torch.promote_types(real.dtype, torch.float32)).requires_grad_()
        logits = discriminator(pixels).reshape(len(pixels), -1).mean(1)
        (gradient,) = torch.autograd.grad(logits.sum(), pixels, create_graph=True)
    return 0.5 * pixels[0].numel() * gradient.square().flatten(1).sum(1).mean()


class LeCAM(nn.Module):
    """Regulariser for little data (Tseng et al. 2021, arXiv:2104.03310): D's logits may not run past an anchor.

    The anchors are running means of D's logits on real and on fake; the penalty is mean relu(real - fake anchor)^2 +
    mean relu(real anchor - fake)^2, one-sided as in the authors' code. The first update sets the anchors, which are
    buffers, saved with the module. `decay` is the authors'.
    """

    real_anchor: Tensor
    fake_anchor: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"LeCAM decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("real_anchor", torch.zeros(()))
        self.register_buffer("fake_anchor", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Takes in logits of any shapes, or their means over all processes. Not finite: the anchors stay."""
        real, fake = real.detach().float().mean(), fake.detach().float().mean()
        usable = torch.isfinite(real) & torch.isfinite(fake)
        weight = torch.where(self.updates == 0, 1.0, 1.0 - self.decay)
        for anchor, mean in ((self.real_anchor, real), (self.fake_anchor, fake)):
            anchor.copy_(torch.where(usable, torch.lerp(anchor, mean, weight), anchor))
        self.updates += usable

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits of any shapes -> fp32 scalar, to be added to D's loss; 0 before the first update."""
        over = F.relu(real.float() - self.fake_anchor).square().mean()
        under = F.relu(self.real_anchor - fake.float()).square().mean()
        return (self.updates > 0) * (over + under)


def adaptive_weight(
    reference_norm: Tensor, other_norm: Tensor, *, eps: float = 1e-4, max: float = ADAPTIVE_MAX
) -> Tensor:
    """Weight that makes another loss's gradient as long as the reference's: fp32 scalar without gradient.

    |g_reference| / (|g_other| + eps), at most `max`, from norms (0-d tensors) at one layer, in LDM and RAE the
    decoder's last (eps 1e-4 and 1e-6). LDM's maximum of 1e4 is of losses summed over pixels. 0 where the reference has
    no gradient. NaN where a norm is not finite, although a clamp would give a number: the loss it multiplies then says
    so, and the step is not taken.
    """
    reference, other = reference_norm.detach().float(), other_norm.detach().float()
    weight = (reference / (other + eps)).clamp(0.0, max)
    return torch.where(torch.isfinite(reference) & torch.isfinite(other), weight, torch.nan)


@dataclass(frozen=True, kw_only=True)
class AdversarialStart:
    """When D begins to train, and how G comes to hear of it. Steps are optimiser updates, counted from 0.

    when: "step", D trains from `step` on; "plateau", from the end of the first window of `window` steps whose mean
    reconstruction loss is less than `threshold` (a share) below the window's before, and not before `step`.
    warmup: steps D trains before G's weight leaves 0. ramp: steps over which it then rises linearly to 1.
    """

    when: Literal["step", "plateau"] = "step"
    step: int = 0
    window: int = 500
    threshold: float = 0.01
    warmup: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        if self.when not in ("step", "plateau"):
            raise ValueError(f"when: expected step or plateau, got {self.when!r}")
        for name, least in (("step", 0), ("window", 1), ("warmup", 0), ("ramp", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected a share in (0, 1), got {self.threshold}")


class StartState:
    """Follows the reconstruction loss and says whether D trains; a pure function of the losses it was shown.

    `state_dict` is tensors; with it a resumed run starts D at the same step.
    """

    def __init__(self, cfg: AdversarialStart) -> None:
        self.cfg = cfg
        self.started_at = cfg.step if cfg.when == "step" else None
        self._sum = torch.zeros((), dtype=torch.float64)  # of the losses of this window, on their device
        self._count = torch.zeros((), dtype=torch.int64)
        self._previous = math.nan  # mean of the window before

    def observe(self, step: int, loss: Tensor) -> None:
        """Takes in the reconstruction loss of `step` (0-d, the mean over all processes); each step once, in order.

        Reads a value, for which a GPU has to wait, once a window. Losses that are not finite are left out.
        """
        if self.started_at is not None:
            return
        loss = loss.detach().double()
        finite = torch.isfinite(loss)
        self._sum = self._sum.to(loss.device) + torch.where(finite, loss, 0.0)
        self._count = self._count.to(loss.device) + finite
        if (step + 1) % self.cfg.window:
            return
        mean = (self._sum / self._count).item()  # NaN after a window without one finite loss: no decision
        if self._previous - mean < self.cfg.threshold * abs(self._previous) and step + 1 >= self.cfg.step:
            self.started_at = step + 1
        self._previous = mean
        self._sum, self._count = torch.zeros_like(self._sum), torch.zeros_like(self._count)

    def trains_discriminator(self, step: int) -> bool:
        return self.started_at is not None and step >= self.started_at

    def generator_factor(self, step: int) -> float:
        """Factor of G's adversarial weight at `step`: 0 before D is warm, then the ramp, then 1."""
        if self.started_at is None or step < self.started_at + self.cfg.warmup:
            return 0.0
        return min(1.0, (step - self.started_at - self.cfg.warmup + 1) / (self.cfg.ramp + 1))

    def state_dict(self) -> dict[str, Tensor]:
        started = -1 if self.started_at is None else self.started_at
        return {
            "started_at": torch.tensor(started),
            "sum": self._sum,
            "count": self._count,
            "previous": torch.tensor(self._previous, dtype=torch.float64),
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        started = int(tensors["started_at"].item())
        self.started_at = None if started < 0 else started
        self._sum, self._count = tensors["sum"].clone(), tensors["count"].clone()
        self._previous = tensors["previous"].item()


def logit_statistics(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """D's logits of any shapes -> fp32 scalars without gradient, for the log: accuracies and means on real and fake.

    Accuracy is the share of logits above 0 on real, below 0 on fake; a logit of 0 is right on neither. NaN where the
    logits are not finite: a broken D is not one that guesses.
    """
    real, fake = real.detach().float(), fake.detach().float()
    means = {"d_real_mean": real.mean(), "d_fake_mean": fake.mean()}
    right = {"d_real_accuracy": (real > 0).float().mean(), "d_fake_accuracy": (fake < 0).float().mean()}
    sound = torch.isfinite(means["d_real_mean"]) & torch.isfinite(means["d_fake_mean"])
    return {name: torch.where(sound, value, torch.nan) for name, value in right.items()} | means


def diagnose(
    *,
    real_accuracy: float,
    fake_accuracy: float,
    weight: float | None = None,
    gan_share: float | None = None,
    max_weight: float = ADAPTIVE_MAX,
) -> str:
    """How the game goes, in one line for the log. All values are means over a window of steps.

    "D has won": both accuracies at least D_HAS_WON. "D is guessing": their mean at most D_IS_GUESSING, which also
    takes in a D that calls everything real. Else "D is learning". Then, where it applies, "G is ignored": the adaptive
    weight is 0 or at its maximum, or the GAN's weighted gradient at the last layer is under G_IS_IGNORED of the
    reconstruction's. weight, gan_share: None where there is no such weight or G does not see D yet.
    """
    values = {"real accuracy": real_accuracy, "fake accuracy": fake_accuracy, "weight": weight, "GAN share": gan_share}
    broken = [f"{name} {value}" for name, value in values.items() if value is not None and not math.isfinite(value)]
    if broken:
        return f"GAN is broken ({', '.join(broken)})"
    if min(real_accuracy, fake_accuracy) >= D_HAS_WON:
        state = "D has won"
    elif (real_accuracy + fake_accuracy) / 2 <= D_IS_GUESSING:
        state = "D is guessing"
    else:
        state = "D is learning"
    line = f"{state} ({real_accuracy:.0%} of real, {fake_accuracy:.0%} of fake)"
    if weight is not None and (weight <= 0 or weight >= max_weight):
        return f"{line}; G is ignored (adaptive weight {weight:.3g})"
    if gan_share is not None and gan_share < G_IS_IGNORED:
        return f"{line}; G is ignored ({gan_share:.1%} of the reconstruction's gradient)"
    return line
