"""One update of all parameters of a model: clipping, AdamW and an average, by one launch and by torch's calls.

    python benchmarks/updates.py sit-b --rounds 5     # prints the row; on a GPU or a CPU

Bytes a parameter: 36 in one pass; 8 to scale gradients, 28 for a fused AdamW and 12 for a foreach lerp by torch, 48.
`copy` moves 36. The norm of the gradients, 4 more, is the same for all and not timed. On a CPU both are torch's calls.
benchmarks/gpu_report.py runs the section on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]
from measure import DEVICE, interleaved  # noqa: E402 - after the path

from flux2.autoencoder import AUTOENCODERS, AutoEncoder  # noqa: E402
from flux2.transformer import TRANSFORMERS, SiT  # noqa: E402
from kernels.adamw import adamw_  # noqa: E402

BYTES = {"ours": 36, "torch": 48, "copy": 36}
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "weights": [1e-4]}
MODELS = ("flux.2", *TRANSFORMERS)


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """Shapes of all parameters of an autoencoder or a transformer on FLUX.2's latents."""
    with torch.device("meta"):
        made = SiT(TRANSFORMERS[model], 128, 1000) if model in TRANSFORMERS else AutoEncoder(AUTOENCODERS[model])
    return [tuple(p.shape) for p in made.parameters()]


def state(shapes: list[tuple[int, ...]], device: torch.device) -> list[list[Tensor]]:
    """[params, grads, exp_avgs, exp_avg_sqs, steps, average], the same in every call."""
    torch.manual_seed(0)
    rows = [[torch.randn(s, device=device) for s in shapes] for _ in range(3)]
    squares = [torch.rand(s, device=device) for s in shapes]
    return [*rows, squares, [torch.full((), 9.0, device=device) for _ in shapes], [p.clone() for p in rows[0]]]


def update(rows: list[list[Tensor]], factor: Tensor, skip: Tensor, backend: str) -> None:
    adamw_(*rows[:5], [rows[5]], **SETTINGS, factor=factor, skip=skip, backend=backend)  # pyright: ignore


def check(device: torch.device, backend: str) -> dict[str, Any]:
    """The kernel against torch's calls in fp64, an ordinary update and a skipped one; then the same bits again."""
    shapes = [(3,), (4096,), (5001,), (64, 3, 3, 3), (1,), (70, 71)]
    factor = torch.tensor(0.5, device=device)
    for skip in (torch.tensor(broken, device=device) for broken in (False, True)):
        found, again = state(shapes, device), state(shapes, device)
        truth = [
            [t.double() if row is not rows[4] else t for t in row] for rows in [state(shapes, device)] for row in rows
        ]
        update(found, factor, skip, backend)
        update(again, factor, skip, backend)
        update(truth, factor.double(), skip, "torch")
        for i in (0, 2, 3, 4, 5):
            for a, b, t in zip(found[i], again[i], truth[i], strict=True):
                assert torch.equal(a, b), "two runs gave different bits"
                torch.testing.assert_close(a.double(), t.double(), rtol=1e-5, atol=1e-6)
    return {"backend": backend}


def compare(
    model: str, device: torch.device, *, rounds: int, shapes: list[tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """One row: per contestant the median in ms and GB/s of its own bytes."""
    rows = state(shapes or shapes_of(model), device)
    count = sum(p.numel() for p in rows[0])
    factor, skip = torch.ones((), device=device), torch.zeros((), device=device, dtype=torch.bool)
    source = torch.empty(count * BYTES["copy"] // 8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: update(rows, factor, skip, "auto"),
        "torch": lambda: update(rows, factor, skip, "torch"),
        "copy": lambda: target.copy_(source),
    }
    samples = interleaved(calls, device, rounds=rounds)
    ms = {name: statistics.median(times) for name, times in samples.items()}
    return {
        "model": model, "parameters": count, "tensors": len(rows[0]), "rounds": rounds, "ms": ms,
        "gb_per_s": {name: BYTES[name] * count / ms[name] / 1e6 for name in ms},
    }  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table."""
    out = ["| update of | parameters, tensors | ours | torch | copy | torch / ours |", "|---" * 6 + "|"]
    for row in rows:
        cells = " | ".join(f"{row['ms'][name]:.3g} ms, {row['gb_per_s'][name]:,.0f} GB/s" for name in BYTES)
        gain = row["ms"]["torch"] / row["ms"]["ours"]
        out.append(f"| {row['model']} | {row['parameters'] / 1e6:.1f}M, {row['tensors']} | {cells} | {gain:.2f} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print("\n".join(lines([compare(args.model, DEVICE, rounds=args.rounds)])))


if __name__ == "__main__":
    main()
