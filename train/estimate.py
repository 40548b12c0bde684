"""What a training step will cost, counted on tensors without storage: arithmetic, and bytes saved for backward."""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from flux2.autoencoder import AutoEncoder
from flux2.losses import l1, laplacian_loss
from train.configs import VaeConfig


def step_cost(config: VaeConfig) -> tuple[int, int, int]:
    """(parameters, floating-point operations of one crop's forward and backward, bytes it saves for backward).

    Operations are two per multiply-add of convolutions and matrix products, fp32 or bf16 alike; bytes are those of the
    autograd graph in eager mode, each storage once, parameters left out.
    """
    with torch.device("meta"):
        ae = AutoEncoder(config.autoencoder)
        x = torch.empty(1, 3, config.resolution, config.resolution)
    own = {p.untyped_storage()._cdata for p in ae.parameters()}
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return t

    bf16 = config.precision == "bf16"
    kept = []  # keeps storages alive, so that no two share an address

    def pack_and_keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return pack(t)

    with FlopCounterMode(display=False) as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack_and_keep, lambda t: t),
            torch.autocast("cuda" if bf16 else "cpu", torch.bfloat16, enabled=False),
        ):
            recon, posterior = (ae.bfloat16() if bf16 else ae)(x.bfloat16() if bf16 else x, sample=True)
            loss = l1(recon, x) + laplacian_loss(recon, x) + posterior.kl().mean()
        loss.backward()
    return sum(p.numel() for p in ae.parameters()), counter.get_total_flops(), sum(saved.values())


def estimate(config: VaeConfig) -> str:
    """The lines `--dry-run` prints after the config."""
    parameters, flops, saved = step_cost(dataclasses.replace(config, batch=1))
    fixed = parameters * 4 * 5  # fp32 weights, gradients, two AdamW moments, EMA
    run_flops = flops * config.batch * config.steps
    return "\n".join(
        (
            f"parameters           {parameters:,}",
            f"arithmetic           {flops / 1e9:,.1f} GFLOP a crop, {flops * config.batch / 1e12:,.2f} TFLOP a step,"
            f" {run_flops / 1e15:,.3g} PFLOP in all ({config.steps * config.batch:,} crops)",
            f"memory, fixed        {fixed / 2**30:,.2f} GiB (fp32 weights, gradients, two moments, EMA)",
            f"memory, activations  {saved * config.batch / 2**30:,.2f} GiB saved for backward by {config.batch} crops",
            f"memory, sum          {(fixed + saved * config.batch) / 2**30:,.2f} GiB, plus the largest temporaries",
        )
    )
