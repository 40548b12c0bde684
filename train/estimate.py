"""What a training step will cost, counted on tensors without storage: arithmetic, and bytes saved for backward."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flux2.autoencoder import AutoEncoder, AutoencoderConfig
from flux2.losses import l1, laplacian_loss
from flux2.perceptual import LPIPS
from flux2.rae import RAE
from flux2.teachers import TEACHERS, HOGConfig, build_teacher
from train.adversary import build_discriminator
from train.vae_config import VaeConfig


def _network(config: VaeConfig, backend: str) -> AutoEncoder | RAE:
    if isinstance(config.autoencoder, AutoencoderConfig):
        return AutoEncoder(config.autoencoder, "torch" if backend == "torch" else "auto")
    return RAE(config.autoencoder, None)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What the autoencoder alone costs a crop: parameters, those that are trained, operations, bytes saved.

    Operations are two per multiply-add of convolutions and matrix products, of forward and backward. Bytes are those
    of the eager autograd graph, each storage once, parameters left out, all of it in the run's precision.
    """

    parameters: int
    trained: int
    flops: int
    saved_bytes: int


def step_cost(config: VaeConfig, backend: str = "auto") -> StepCost:
    """Counted on tensors without storage."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with torch.device("meta"):
        ae = _network(config, backend).to(dtype)
        x = torch.empty(1, config.autoencoder.channels, config.resolution, config.resolution, dtype=dtype)
    ae.encoder.requires_grad_(config.train != "decoder")
    ae.decoder.requires_grad_(config.train != "encoder")
    own = {p.untyped_storage()._cdata for p in ae.parameters()}
    saved: dict[int, Tensor] = {}  # one tensor a storage, kept so that no two share an address

    def pack(t: Tensor) -> Tensor:
        if (storage := t.untyped_storage()._cdata) not in own:
            saved[storage] = t
        return t

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            recon, posterior = ae(x, sample=True)
            loss = l1(recon, x) + laplacian_loss(recon, x) + posterior.kl().mean()
        loss.backward()
    return StepCost(
        parameters=sum(p.numel() for p in ae.parameters()),
        trained=sum(p.numel() for p in ae.parameters() if p.requires_grad),
        flops=counter.get_total_flops(),
        saved_bytes=sum(t.untyped_storage().nbytes() for t in saved.values()),
    )


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def networks_beside(config: VaeConfig) -> dict[str, tuple[int, int]]:
    """{name: (parameters, operations a crop and step)} of the networks that only the losses use."""
    found: dict[str, tuple[int, int]] = {}

    def add(name: str, network: nn.Module, run: Callable[[], Any]) -> None:
        found[name] = sum(p.numel() for p in network.parameters()), _flops(run)

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # that the weights are random
        x = torch.empty(1, 3, config.resolution, config.resolution)
        y = torch.empty_like(x).requires_grad_()
        if config.aligned and not isinstance(TEACHERS.get(config.teacher), HOGConfig):
            teacher = build_teacher(config.teacher, config.autoencoder.multiple, "random", "meta")
            add(f"teacher {config.teacher}", teacher, lambda: teacher(x))
        if config.lpips_weight:
            lpips = LPIPS(config.lpips_net, "random").to("meta")
            add(f"LPIPS {config.lpips_net}", lpips, lambda: lpips(y, x).backward())
        if config.gan.weight:
            judge = build_discriminator(dataclasses.replace(config.gan, backbone_weights="random"))
            fool, see = (lambda: judge(y).sum().backward()), (lambda: (judge(x) + judge(x)).sum().backward())
            add(f"discriminator {config.gan.discriminator}", judge, lambda: (fool(), see()))
    return found


def estimate(config: VaeConfig, backend: str = "auto") -> str:
    """The lines `--dry-run` prints after the config."""
    cost, beside = step_cost(config, backend), networks_beside(config)
    averages, part = len(config.ema_decays), config.batch // config.accumulate
    fixed = 4 * (cost.parameters * (1 + averages) + 3 * cost.trained + sum(p for p, _ in beside.values()))
    activations, crops = cost.saved_bytes * part, config.steps * config.batch
    lines = [f"parameters           {cost.parameters:,}, of which {cost.trained:,} are trained"]
    lines += [f"  {name:<20} {p:,} parameters, {f / 1e9:,.1f} GFLOP a crop" for name, (p, f) in beside.items()]
    flops = cost.flops + sum(f for _, f in beside.values())
    lines += [
        f"arithmetic           {flops / 1e9:,.1f} GFLOP a crop, {flops * config.batch / 1e12:,.2f} TFLOP a step,"
        f" {flops * crops / 1e15:,.3g} PFLOP in all ({crops:,} crops)",
        f"memory, fixed        {fixed / 2**30:,.2f} GiB (fp32 weights, gradients, two moments, averages: {averages};"
        " weights of the losses' networks)",
        f"memory, activations  {activations / 2**30:,.2f} GiB saved for backward by {part} crops of the autoencoder in"
        f" {config.precision}; where autocast keeps norms in fp32, up to a half more",
        f"memory, sum          {(fixed + activations) / 2**30:,.2f} GiB, plus the largest temporaries and what the"
        " losses' networks save",
    ]
    return "\n".join(lines)
