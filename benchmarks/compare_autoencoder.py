"""FLUX.2's autoencoder, ours against diffusers' `AutoencoderKLFlux2`, on this CPU: decode, encode, training step.

    python benchmarks/compare_autoencoder.py                             # all rows at 256 pixels; again to go on
    python benchmarks/compare_autoencoder.py --only decode --size 128 --rounds 3 --out /tmp/some.json
    python benchmarks/compare_autoencoder.py --table                     # what was measured so far

Same weights, same pictures, fp32 and bf16 (a training step: bf16 autocast, fp32 weights; L1 + 1e-6 KL, backward, fused
AdamW). diffusers runs in both memory formats, and its better one counts; one whose convolutions take over ten times
the other's is left out. Contestants take turns in every round; a row holds their medians, and the median over rounds of
diffusers' time over ours. `kept` are the bytes that autograd keeps for backward, weights not counted. The breakdown is
the profiler's, of one call. Attention is the middle block's: one head of 512 channels over all positions, by each
backend that a CPU has (flash-attn and xformers need a GPU).

Each row is written to benchmarks/results/autoencoder-PROCESSOR.json when it is measured. A run with the same processor,
threads, versions and sources goes on where the last one stopped; any other starts anew. Exit code 1: a ratio is below
its floor.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")) if p not in sys.path]
from gpu_report import sources  # noqa: E402 - after the path
from high_resolution import measured  # noqa: E402
from measure import environment, interleaved, slug  # noqa: E402
from whole_models import Entrant, entrants  # noqa: E402

from flux2.autoencoder import AUTOENCODERS  # noqa: E402
from flux2.checkpoints import save_json  # noqa: E402
from kernels import attention  # noqa: E402
from kernels.dispatch import multiplies  # noqa: E402

CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks" / "results" / f"autoencoder-{slug(CPU)}.json"
KINDS = ("decode", "encode", "train step", "attention")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTESTANTS = ("ours", "diffusers NCHW", "diffusers channels_last")
FLOORS, AIMS = {"decode": 1.15, "encode": 1.05, "train step": 1.05}, {"decode": 1.4, "encode": 1.2, "train step": 1.3}
KEPT_AT_MOST = 0.45
HEAD_DIM = 512
PARTS = {  # first match counts
    "convolutions": (
        "mkldnn_convolution",
        "slow_conv2d",
        "convolution_backward",
        "convolution_overrideable",
        "bmm",  # Winograd's
    ),
    "attention": ("scaled_dot_product", "softmax"),
    "norms": ("group_norm",),
    "SiLU": ("silu",),
    "upsampling, copies": ("upsample", "cat", "copy_", "pad", "fill_", "stack", "clone"),
    "sums": ("aten::add", "aten::sub", "aten::div", "aten::sum"),
    "matrix products": ("mm",),
    "optimiser": ("adamw",),
}


def train_step(entrant: Entrant, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    optimiser = torch.optim.AdamW(entrant.module.parameters(), lr=1e-6, fused=True)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            mean, logvar = entrant.encode(x).chunk(2, dim=1)
            recon = entrant.decode(mean)
        mean, logvar = mean.float(), logvar.float()
        loss = (recon - x).abs().mean() + 0.5e-6 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return recon.detach()

    return call


def kept_bytes(call: Callable[[], Any], entrant: Entrant) -> int:
    """Of the tensors that autograd keeps from forward to backward, each storage once, parameters not."""
    own = {p.untyped_storage().data_ptr() for p in entrant.module.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), storage  # held, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        call()
    return sum(size for size, _ in kept.values())


def breakdown(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one call by kind of operation; what no name in PARTS has is the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        call()
    found = dict.fromkeys((*PARTS, "rest"), 0.0)
    for event in events.key_averages():
        name = event.key.lower()
        ours = "::" in name and not name.startswith(("aten::", "mkldnn::"))  # the Python around a fused operation
        part = next((part for part, words in PARTS.items() if not ours and any(w in name for w in words)), "rest")
        found[part] += event.self_cpu_time_total / 1e3
    return {part: round(ms, 2) for part, ms in found.items()}


def hopeless(dtype: torch.dtype) -> dict[str, str]:
    """diffusers in a memory format whose convolutions take over ten times the other's, and by how much they do.

    On processors without products of bf16 that is NCHW; a decode would take the better part of an hour.
    """
    formats = {"diffusers NCHW": torch.contiguous_format, "diffusers channels_last": torch.channels_last}
    conv, x = torch.nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 32, 32)

    def call(layout: torch.memory_format) -> Callable[[], Tensor]:
        module, t = copy.deepcopy(conv).to(dtype, memory_format=layout), x.to(dtype, memory_format=layout)  # pyright: ignore
        return torch.no_grad()(lambda: module(t))

    samples = interleaved({name: call(layout) for name, layout in formats.items()}, CPU, rounds=1, warmup=1)
    least = min(times[0] for times in samples.values())
    slower = {name: times[0] / least for name, times in samples.items() if times[0] > 10 * least}
    return {name: f"convolutions take {by:.0f} times the other format's" for name, by in slower.items()}


def compare(kind: str, dtype: str, size: int, rounds: int) -> dict[str, Any]:
    """One row. AssertionError if the contestants do not compute the same."""
    cfg, torch_dtype = AUTOENCODERS["flux.2"], DTYPES[dtype]
    made, missing = entrants(cfg, torch.float32 if kind == "train step" else torch_dtype, CPU)
    missing = missing | hopeless(torch_dtype)
    made = {name: made[name] for name in CONTESTANTS if name in made and name not in missing}
    torch.manual_seed(1)
    pixels = torch.rand(1, 3, size, size) * 2 - 1
    given = torch.randn(1, cfg.z_channels, *[size // cfg.downsample] * 2) if kind == "decode" else pixels
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, entrant in made.items():
        x = given.contiguous(memory_format=torch.channels_last if entrant.last else torch.contiguous_format)
        if kind == "train step":
            calls[name] = train_step(entrant, x, torch_dtype)
        else:
            f, x = entrant.decode if kind == "decode" else entrant.encode, x.to(torch_dtype)
            calls[name] = torch.no_grad()(lambda f=f, x=x: f(x))
    row: dict[str, Any] = {"kind": kind, "dtype": dtype, "size": size, "rounds": rounds, "missing": missing}
    kept = {}
    if kind == "train step":  # first, and so on the same weights
        kept = {name: kept_bytes(call, made[name]) for name, call in calls.items()}
    else:
        outputs = {name: call().float() for name, call in calls.items()}
        truth = next((outputs[name] for name in CONTESTANTS[1:] if name in outputs), outputs["ours"])
        row["difference"] = ((outputs["ours"] - truth).norm() / truth.norm()).item()
        assert row["difference"] <= {"fp32": 1e-3, "bf16": 0.05}[dtype], row["difference"]
    samples = interleaved(calls, CPU, rounds=rounds, warmup=1)
    row["ms"] = {name: round(statistics.median(times), 2) for name, times in samples.items()}
    row["kept_bytes"] = kept
    if peers := [name for name in made if name != "ours"]:
        best = min(peers, key=row["ms"].__getitem__)
        ratios = [theirs / ours for theirs, ours in zip(samples[best], samples["ours"], strict=True)]
        row |= {"peer": best, "ratio": round(statistics.median(ratios), 3)}
        if kept:
            row["kept_ratio"] = round(kept["ours"] / min(kept[name] for name in peers), 3)
    row["parts_ms"] = {name: breakdown(calls[name]) for name in ("ours", row.get("peer")) if name in calls}
    return row


# --- attention -----------------------------------------------------------------------------------------------------


def attention_calls(dtype: str, size: int) -> dict[str, Callable[[], Tensor]]:
    q, k, v = torch.randn(3, 1, 1, (size // 8) ** 2, HEAD_DIM).to(DTYPES[dtype])

    def at_once() -> Tensor:
        return ((q @ k.transpose(-2, -1)) * HEAD_DIM**-0.5).softmax(-1) @ v

    return {
        "sdpa": lambda: attention(q, k, v, backend="sdpa"),
        "torch, in chunks": lambda: attention(q, k, v, backend="torch"),
        "all scores at once": at_once,
    }


def attention_row(dtype: str, size: int, rounds: int) -> dict[str, Any]:
    """Medians; and what one call holds above what was there, in a fresh process, from the least to the most."""
    with torch.no_grad():
        calls = attention_calls(dtype, size)
        truth = calls["all scores at once"]().float()
        errors = {name: ((call().float() - truth).norm() / truth.norm()).item() for name, call in calls.items()}
        samples = interleaved(calls, CPU, rounds=rounds, warmup=1)
    command = [sys.executable, __file__, "--size", str(size), "--holds", dtype]
    held = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "kind": "attention", "dtype": dtype, "size": size, "rounds": rounds, "tokens": (size // 8) ** 2,
        "ms": {name: round(statistics.median(times), 2) for name, times in samples.items()},
        "held_bytes": held, "difference": errors,
    }  # fmt: skip


# --- tables --------------------------------------------------------------------------------------------------------


def below(row: dict[str, Any]) -> list[str]:
    """What the row falls short of."""
    out = []
    if row.get("ratio", 9) < FLOORS.get(row["kind"], 0):
        out.append(f"{row['kind']} {row['dtype']}: {row['ratio']:.2f} is below {FLOORS[row['kind']]}")
    if row.get("kept_ratio", 0) > KEPT_AT_MOST:
        out.append(
            f"{row['kind']} {row['dtype']}: {row['kept_ratio']:.2f} of diffusers' bytes kept, above {KEPT_AT_MOST}"
        )
    return out


def table(report: dict[str, Any]) -> str:
    rows = [row for row in report["rows"].values() if row["kind"] != "attention"]
    out = [f"| {' | '.join(('task', *(f'{name}, ms' for name in CONTESTANTS), 'ratio', 'floor, aim', 'kept'))} |"]
    out.append("|---" * 7 + "|")
    for row in rows:
        times = " | ".join(f"{row['ms'][name]:,.0f}" if name in row["ms"] else "-" for name in CONTESTANTS)
        kept = f"{row['kept_ratio']:.3f}" if "kept_ratio" in row else ""
        goal = f"{FLOORS[row['kind']]}, {AIMS[row['kind']]}"
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else "-"
        out.append(f"| {row['kind']} {row['size']}, {row['dtype']} | {times} | {ratio} | {goal} | {kept} |")
    out += ["", f"| ms of one call | {' | '.join((*PARTS, 'rest'))} |", "|---" * (len(PARTS) + 2) + "|"]
    for row in rows:
        for name, parts in row["parts_ms"].items():
            cells = " | ".join(f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}" for ms in parts.values())
            out.append(f"| {row['kind']} {row['dtype']}, {name} | {cells} |")
    attends = [row for row in report["rows"].values() if row["kind"] == "attention"]
    if attends:
        out += ["", "| attention, 512 channels | backend | ms | MiB held | relative difference |", "|---" * 5 + "|"]
        for row in attends:
            for name, ms in row["ms"].items():
                held = f"{row['held_bytes'][name] / 2**20:,.0f}"
                what = f"{row['tokens']:,} tokens, {row['dtype']}"
                out.append(f"| {what} | {name} | {ms:,.1f} | {held} | {row['difference'][name]:.1e} |")
    env = report["environment"]
    packages = f"torch {env['packages']['torch']}, diffusers {env['packages']['diffusers']}"
    return "\n".join([*out, "", f"{env['device']}, threads {env['threads']}, {packages}, commit {env['commit']}.", ""])


# --- program -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, action="append", help="several may be given")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="both by default")
    parser.add_argument("--size", type=int, default=256, help="pixels, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    parser.add_argument("--holds", help=argparse.SUPPRESS)  # this is the process whose memory is read
    args = parser.parse_args(argv)
    if args.size < 16 or args.size % 16 or args.rounds < 1:
        parser.error(
            f"expected a positive multiple of 16 and a round or more, got --size {args.size} --rounds {args.rounds}"
        )
    if args.holds:
        with torch.no_grad():
            calls = attention_calls(args.holds, args.size)
            print(json.dumps({name: measured(call)[1] for name, call in calls.items()}))
        return 0
    has = {"sources": sources(), "bf16_products": multiplies(torch.bfloat16)}
    report: dict[str, Any] = {"environment": environment(CPU) | has, "rows": {}}
    if args.out.exists():
        try:
            before = json.loads(args.out.read_text())
            same = all(
                before["environment"][k] == report["environment"][k]
                for k in ("device", "threads", "packages", "sources")
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--out {args.out}: expected a report of this program or no file ({error!r})")
        report = before if same or args.table else report
    if args.table:
        print(table(report))
        return 0
    for kind in args.only or KINDS:
        for dtype in args.dtype or DTYPES:
            name = f"{kind} {args.size} {dtype}"
            if name in report["rows"] and report["rows"][name]["rounds"] >= args.rounds:
                print(f"{name}: is there", flush=True)
                continue
            print(f"{name}: {args.rounds} rounds", flush=True)
            how = attention_row if kind == "attention" else lambda *a, kind=kind: compare(kind, *a)
            report["rows"][name] = how(dtype, args.size, args.rounds)
            save_json(args.out, report)
    print(table(report))
    short = [line for row in report["rows"].values() for line in below(row)]
    print("\n".join(short) if short else "every ratio is at its floor or above")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
