"""What several GPUs cost: bytes exchanged a step, memory of each, how a step scales. A model, not a measurement.

    python -m train.scaling            the tables of docs/scale.md

Bytes are those a process receives (and sends) in ring collectives between W processes, of P parameters:

    DDP      all-reduce of fp32 gradients                       2 (W - 1) / W * 4 P
    FSDP2    weights gathered twice, gradients scattered        (W - 1) / W * (2 b + 4) P,  b = 2 in bf16, 4 in fp32

Both are checked against bytes counted between two hosts (tests/reliability/test_hosts.py), on gloo, which scatters sums
by an all-reduce: (W - 1) / W * 4 P more.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained. parameters: of all optimisers. flops: of one sample's step. largest: parameters of the largest
    block. averages: copies of averaged weights."""

    name: str
    parameters: int
    flops: float
    per_gpu: int
    largest: int
    averages: int = 2
    sharded: bool = True  # train.vae has DDP alone


MODELS = (
    Model(name="SiT-XL, 256 tokens", parameters=675_000_000, flops=0.7e12, per_gpu=32, largest=24_000_000),
    Model(name="FLUX.2 autoencoder, 256 pixels", parameters=84_046_115 + 2_765_633, flops=2.7e12, per_gpu=8,
          largest=14_000_000, sharded=False),
)  # fmt: skip
WORLDS = (8, 64, 512)
PEAK_FLOPS, UTILISATION = 989e12, 0.4  # bf16 of an H100, and the share of it that is assumed
LINK_INSIDE, LINK_BETWEEN = 450e9, 8 * 50e9  # bytes/s of rings: NVLink, and the eight 400 Gb/s cards of a host


def ddp_bytes(parameters: int, world: int) -> float:
    """Bytes a process receives a step."""
    return 2 * (world - 1) / world * 4 * parameters


def fsdp_bytes(parameters: int, world: int, *, bf16: bool = True) -> float:
    """Bytes a process receives a step."""
    return (world - 1) / world * (2 * (2 if bf16 else 4) + 4) * parameters


def memory_bytes(model: Model, world: int, *, fsdp: bool) -> float:
    """Of weights, gradients, AdamW's moments and averages, in fp32, without activations; FSDP2 beside its share also
    holds the two largest blocks whole, in bf16."""
    whole = 4 * model.parameters * (1 + 1 + 2 + model.averages)
    return whole / world + 2 * 2 * model.largest if fsdp else whole


def step_seconds(model: Model) -> float:
    """Of computing alone, at the assumed utilisation."""
    return model.per_gpu * model.flops / (PEAK_FLOPS * UTILISATION)


def efficiency(model: Model, world: int, *, fsdp: bool) -> tuple[float, float]:
    """Share of a GPU's time that it computes: (nothing overlaps, communication hides behind all of backward)."""
    count = fsdp_bytes(model.parameters, world) if fsdp else ddp_bytes(model.parameters, world)
    talks = count / (LINK_INSIDE if world <= 8 else LINK_BETWEEN)
    computes = step_seconds(model)
    hidden = max(0.0, talks - computes * 2 / 3)  # backward is two thirds
    return computes / (computes + talks), computes / (computes + hidden)


def tables() -> str:
    """Markdown."""
    lines = ["| model | GPUs | engine | GB a step | memory, GB | computing, no overlap | computing, overlapped |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for model in MODELS:
        for world in WORLDS:
            for fsdp in (False, True) if model.sharded else (False,):
                count = fsdp_bytes(model.parameters, world) if fsdp else ddp_bytes(model.parameters, world)
                low, high = efficiency(model, world, fsdp=fsdp)
                memory = memory_bytes(model, world, fsdp=fsdp)
                engine = "FSDP2" if fsdp else "DDP"
                figures = f"{count / 1e9:.2f} | {memory / 1e9:.2f} | {low:.0%} | {high:.0%}"
                lines.append(f"| {model.name} | {world} | {engine} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
