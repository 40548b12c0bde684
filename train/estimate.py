"""What a training step will cost, counted on tensors without storage: arithmetic, and bytes saved for backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flux2.autoencoder import AutoEncoder
from flux2.losses import l1, laplacian_loss
from train.configs import VaeConfig


def step_cost(config: VaeConfig, backend: str = "auto") -> tuple[int, int, int]:
    """(parameters, floating-point operations of one crop's forward and backward, bytes it saves for backward).

    Operations are two per multiply-add of convolutions and matrix products. Bytes are those of the eager autograd
    graph, each storage once, parameters left out, all of it in the run's precision.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with torch.device("meta"):
        ae = AutoEncoder(config.autoencoder, "torch" if backend == "torch" else "auto").to(dtype)
        x = torch.empty(1, 3, config.resolution, config.resolution, dtype=dtype)
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
    saved_bytes = sum(t.untyped_storage().nbytes() for t in saved.values())
    return sum(p.numel() for p in ae.parameters()), counter.get_total_flops(), saved_bytes


def estimate(config: VaeConfig, backend: str = "auto") -> str:
    """The lines `--dry-run` prints after the config."""
    parameters, flops, saved = step_cost(config, backend)
    fixed, activations = parameters * 4 * 5, saved * config.batch  # weights, gradients, two moments, EMA: 4 bytes each
    crops = config.steps * config.batch
    return "\n".join(
        (
            f"parameters           {parameters:,}",
            f"arithmetic           {flops / 1e9:,.1f} GFLOP a crop, {flops * config.batch / 1e12:,.2f} TFLOP a step,"
            f" {flops * crops / 1e15:,.3g} PFLOP in all ({crops:,} crops)",
            f"memory, fixed        {fixed / 2**30:,.2f} GiB (fp32 weights, gradients, two moments, EMA)",
            f"memory, activations  {activations / 2**30:,.2f} GiB saved for backward by {config.batch} crops in"
            f" {config.precision}; where autocast keeps norms in fp32, up to a half more",
            f"memory, sum          {(fixed + activations) / 2**30:,.2f} GiB, plus the largest temporaries",
        )
    )
