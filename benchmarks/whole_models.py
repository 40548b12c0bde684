"""The whole FLUX.2 autoencoder, ours and others' of the same weights: decode, encode and a training step.

`plain` is our network on stock modules, which is the original code's; `diffusers` is `AutoencoderKLFlux2`, where it is
installed. Encode gives moments and decode takes raw latents, in bf16; a training step is L1 + 1e-6 KL under bf16
autocast with fp32 weights, backward, and a fused AdamW.

    python benchmarks/whole_models.py decode --side 256 --rounds 3     # prints the row; on a GPU or a CPU

benchmarks/gpu_report.py runs all sizes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]
from measure import DEVICE, interleaved  # noqa: E402

from flux2.autoencoder import AUTOENCODERS, AutoEncoder, AutoencoderConfig  # noqa: E402 - after the path
from flux2.checkpoints import save_autoencoder  # noqa: E402

GRAPHED_SIDE = 512  # pixels, up to which one picture is also timed as a CUDA graph


@dataclass(frozen=True)
class Task:
    """One comparison; compiled: of the compiled contestants, after minutes of compiling, beside two that are not."""

    kind: str
    side: int
    batch: int
    compiled: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.side}x{self.side} batch {self.batch}" + (", compiled" if self.compiled else "")


@dataclass
class Entrant:
    """encode: pixels -> moments; decode: raw latents -> pixels; module: what is trained."""

    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    last: bool  # channels_last


def _native(ae: AutoEncoder, backend: str, last: bool) -> Entrant:
    ae.set_backend(backend)
    ae.to(memory_format=torch.channels_last if last else torch.contiguous_format)  # pyright: ignore
    return Entrant(ae, ae.encoder, ae.decoder, last)


def _diffusers(ae: AutoEncoder) -> nn.Module | str:
    """AutoencoderKLFlux2 of the same weights, or why there is none."""
    try:
        from flux2.compat import ensure_torchvision

        ensure_torchvision()
        from diffusers import AutoencoderKLFlux2
        from diffusers.utils import logging

        logging.set_verbosity_error()
    except Exception as error:  # an import of many packages fails in many ways
        return f"diffusers cannot be imported ({str(error).splitlines()[0]})"
    with tempfile.TemporaryDirectory() as folder:
        save_autoencoder(ae, folder, layout="diffusers")
        return AutoencoderKLFlux2.from_pretrained(folder)


def entrants(
    cfg: AutoencoderConfig, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """({name: entrant}, {name: why it is missing}), all of one set of random weights."""
    torch.manual_seed(0)
    ae = AutoEncoder(cfg)
    made, missing = {}, {}
    for name, backend, last in (
        ("ours", "auto", True), ("plain NCHW", "torch", False), ("plain channels_last", "torch", True)
    ):  # fmt: skip
        made[name] = _native(copy.deepcopy(ae).to(device, dtype), backend, last)
    theirs = _diffusers(ae)
    for name, last in (("diffusers NCHW", False), ("diffusers channels_last", True)):
        if isinstance(theirs, str):
            missing[name] = theirs
            continue
        vae: Any = copy.deepcopy(theirs).to(device, dtype)
        vae.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        made[name] = Entrant(
            vae, lambda x, v=vae: v.encode(x).latent_dist.parameters, lambda z, v=vae: v.decode(z).sample, last
        )
    return made, missing


def _compiled(entrant: Entrant) -> Entrant:
    encode, decode = (torch.compile(f, dynamic=False) for f in (entrant.encode, entrant.decode))
    return Entrant(entrant.module, encode, decode, entrant.last)


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` as a CUDA graph, captured when it is first called: for small batches, of which launching is the time."""
    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def replay() -> Tensor:
        if not captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = call()
            captured.append((graph, out))
        captured[0][0].replay()
        return captured[0][1]

    return replay


def _train_step(entrant: Entrant, x: Tensor) -> Callable[[], Tensor]:
    optimiser = torch.optim.AdamW(entrant.module.parameters(), lr=1e-6, fused=True)

    def call():
        with torch.autocast(x.device.type, torch.bfloat16):
            mean, logvar = entrant.encode(x).chunk(2, dim=1)
            recon = entrant.decode(mean)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = (recon - x).abs().mean() + 1e-6 * kl
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return recon.detach()

    return call


def _calls(task: Task, every: dict[str, Entrant], cfg: AutoencoderConfig, dtype, device) -> dict[str, Callable]:
    pixels = torch.rand(task.batch, 3, task.side, task.side, device=device) * 2 - 1
    latents = torch.randn(task.batch, cfg.z_channels, *[task.side // cfg.downsample] * 2, device=device)
    given = (latents if task.kind == "decode" else pixels).to(dtype)
    calls = {}
    for name, entrant in every.items():
        x = given.contiguous(memory_format=torch.channels_last if entrant.last else torch.contiguous_format)
        if task.kind == "train step":
            calls[name] = _train_step(entrant, x)
        else:
            f = entrant.encode if task.kind == "encode" else entrant.decode
            calls[name] = torch.no_grad()(lambda f=f, x=x: f(x))
    if device.type == "cuda" and task.kind != "train step" and task.batch == 1 and task.side <= GRAPHED_SIDE:
        calls |= {f"{n}, CUDA graph": graphed(calls[n]) for n in ("ours", "plain channels_last") if n in calls}
    return calls


def compare(task: Task, cfg: AutoencoderConfig, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """One row: per contestant the median in ms, the memory a call needs above weights and optimiser, the error of its
    output against `plain NCHW`, seconds of the first call. A contestant that runs out of memory is missing, with that
    as the reason. AssertionError if one computes something else.
    """
    torch.compiler.reset()  # Dynamo keeps at most eight compilations of one function, and would run eager
    functorch_config.donated_buffer = True  # torch's default; the micro-benchmarks turn it off
    dtype = torch.float32 if task.kind == "train step" else torch.bfloat16
    every, missing = entrants(cfg, dtype, device)
    if task.compiled:
        best = [name for name in ("ours", "plain channels_last", "diffusers channels_last") if name in every]
        kept = {name: every[name] for name in ("ours", "plain NCHW")}
        every = kept | {f"{name}, compiled": _compiled(every[name]) for name in best}
    calls = _calls(task, every, cfg, dtype, device)
    first, memory, outputs = {}, {}, {}
    for name in list(calls):
        began = time.perf_counter()
        try:
            outputs[name] = calls[name]().float().cpu()
            first[name] = time.perf_counter() - began
            memory[name] = _memory_of(calls[name], device)
        except Exception as error:  # Triton's and Inductor's errors have no common base
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if name == "ours" and not out_of_memory:
                raise
            missing[name] = "out of memory" if out_of_memory else f"fails: {type(error).__name__}"
            del calls[name]
            outputs.pop(name, None)
    errors = {}
    if (truth := outputs.get("plain NCHW")) is not None:
        for name, y in outputs.items():
            errors[name] = ((y - truth).norm() / truth.norm()).item()
            assert errors[name] <= 0.05, f"{task}: {name} is off by {errors[name]:.1e} (relative)"
    samples = interleaved(calls, device, rounds=rounds, warmup=1)
    return {
        "task": str(task), "kind": task.kind, "side": task.side, "batch": task.batch, "rounds": rounds,
        "contestants": {
            name: {
                "ms": sorted(times)[len(times) // 2], "memory_bytes": memory[name], "error": errors.get(name),
                "first_call_s": first[name],
            }
            for name, times in samples.items()
        },
        "missing": missing,
    }  # fmt: skip


def _memory_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most that one call allocates above what is there before it; None on a CPU."""
    if device.type == "cpu":
        return None
    gpu = torch.get_device_module(device)
    gpu.synchronize(device)
    gpu.reset_peak_memory_stats(device)
    before = gpu.memory_allocated(device)
    call()
    gpu.synchronize(device)
    return gpu.max_memory_allocated(device) - before


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table: per contestant ms and GiB; then ours over the best of the others."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["contestants"], *row["missing"])))
    out = [f"| task | {' | '.join(names)} | best other / best ours |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = []
        for name in names:
            if (c := row["contestants"].get(name)) is None:
                cells.append(row["missing"].get(name, "-"))
                continue
            memory = "" if c["memory_bytes"] is None else f", {c['memory_bytes'] / 2**30:.2f} GiB"
            cells.append(f"{c['ms']:.4g} ms{memory}")
        ours = [c["ms"] for n, c in row["contestants"].items() if n.startswith("ours")]
        others = [c["ms"] for n, c in row["contestants"].items() if not n.startswith("ours")]
        gain = f"{min(others) / min(ours):.2f}" if ours and others else "-"
        out.append(f"| {row['task']} | {' | '.join(cells)} | {gain} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("decode", "encode", "train step"))
    parser.add_argument("--preset", choices=[k for k, c in AUTOENCODERS.items() if c.latent_norm == "batchnorm"],
                        default="flux.2")  # fmt: skip
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    task = Task(args.kind, args.side, args.batch, args.compiled)
    print("\n".join(lines([compare(task, AUTOENCODERS[args.preset], DEVICE, rounds=args.rounds)])))


if __name__ == "__main__":
    main()
