"""Decoding large pictures on a CPU: peak memory and seconds of the plain decoder, of bands, and of diffusers' tiles.

Each decode runs in a process of its own, whose largest resident set is read before and after. Pictures of the same
latents are compared with one in fp64, decoded in bands. Weights are random: neither memory nor time depends on them.
diffusers' tiles are as large as it makes them, 1024 pixels, or half the picture's side where that is less. `narrow` is
FLUX.2's decoder with an eighth of its width, for sides that take hours at full width.

    python benchmarks/high_resolution.py --model flux.2 --side 1024 --dtype fp32    # four rows, minutes
    python benchmarks/high_resolution.py --table                                    # what was measured so far

Rows go to benchmarks/results/high-resolution.json, one by one; those that are there of the same packages and threads
are kept, each with its processor, and --again measures them anew. docs/high-resolution.md shows them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]
from measure import environment  # noqa: E402 - after the path

from flux2.autoencoder import AUTOENCODERS, AutoEncoder  # noqa: E402
from flux2.banded import most_bytes  # noqa: E402
from flux2.checkpoints import save_autoencoder, save_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "high-resolution.json"
WAYS = ("exact", "plain", "low", "tiled")
NAMES = {"exact": "fp64 in bands", "plain": "plain", "low": '`memory="low"`', "tiled": "diffusers, tiled"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
FULL = AUTOENCODERS["flux.2"]
MODELS = {"flux.2": FULL, "narrow": dataclasses.replace(FULL, ch=32, decoder_ch=16, num_groups=16)}


def resident_bytes() -> tuple[int, int]:
    """(now, the most since `forget_peak`), of this process. Linux."""
    status = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured(call: Any) -> tuple[Any, int, float]:
    """(result, the most bytes resident above those before the call, seconds)"""
    forget_peak()
    before, _ = resident_bytes()
    began = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began
    return result, resident_bytes()[1] - before, seconds


@torch.no_grad()
def decode_once(model: str, way: str, side: int, dtype: str, picture: Path) -> dict[str, Any]:
    """One decode in this process, the picture [3, H, W] to a file."""
    torch.manual_seed(0)
    ae = AutoEncoder(MODELS[model]).eval()
    z = torch.randn(1, ae.cfg.z_channels, side // ae.cfg.downsample, side // ae.cfg.downsample)
    small = z[:, :, :16, :16]
    if way == "tiled":
        decode = tiled(ae, DTYPES[dtype], side)
    else:
        ae.to(DTYPES[dtype])
        memory = "normal" if way == "plain" else "low"
        decode = lambda z: ae.decode_raw(z, memory)  # noqa: E731
    z, small = z.to(DTYPES[dtype]), small.to(DTYPES[dtype])
    decode(small)  # what is made once
    x, peak_bytes, seconds = measured(lambda: decode(z))
    torch.save(x[0].double(), picture)
    return {"peak_bytes": peak_bytes, "seconds": round(seconds, 2)}


def tiled(ae: AutoEncoder, dtype: torch.dtype, side: int) -> Any:
    """diffusers' decode of raw latents, tiled, of the same weights."""
    from flux2.compat import ensure_torchvision

    ensure_torchvision()
    from diffusers import AutoencoderKLFlux2

    with tempfile.TemporaryDirectory() as folder:
        save_autoencoder(ae, folder, layout="diffusers")
        vae = AutoencoderKLFlux2.from_pretrained(folder)
    vae.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae.enable_tiling()
    vae.tile_sample_min_size = min(vae.tile_sample_min_size, side // 2)
    vae.tile_latent_min_size = vae.tile_sample_min_size // ae.cfg.downsample
    return lambda z: vae.decode(z.contiguous(memory_format=torch.channels_last)).sample


def rows_of(model: str, side: int, dtype: str, ways: tuple[str, ...], threads: int) -> dict[str, dict[str, Any]]:
    """A row a way, with its error relative to the exact picture where that is made with it."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = {}
        for way in ways:
            picture = Path(folder) / f"{way}.pt"
            kind = "fp64" if way == "exact" else dtype
            command = [sys.executable, __file__, "--model", model, "--side", str(side), "--dtype", kind]
            command += ["--way", way, "--picture", str(picture), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{model} {way} {side} {dtype}: {done.stderr.strip().splitlines()[-1:]}")
            row = {
                "commit": environment(torch.device("cpu"))["commit"],
                "device": environment(torch.device("cpu"))["device"],
                "model": model,
                "way": way,
                "side": side,
                "dtype": kind,
                **json.loads(done.stdout.splitlines()[-1]),
            }
            pictures[way] = torch.load(picture, weights_only=True)
            if "exact" in pictures and way != "exact":
                error = pictures[way] - pictures["exact"]
                row["error"] = (error.norm() / pictures["exact"].norm()).item()
                row["max_error"] = error.abs().max().item()
            if way in ("low", "exact"):
                raw = side // MODELS[model].downsample
                with torch.device("meta"):
                    decoder = AutoEncoder(MODELS[model]).decoder
                row["bound_bytes"] = most_bytes(decoder, raw, raw, DTYPES[kind], torch.device("cpu"))
            rows[f"{model} {side} {dtype} {way}"] = row
            print(json.dumps(row), flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a decode"""
    out = ["| decoder | picture, dtype | way | peak, MiB | bound, MiB | seconds | relative error |", "|---" * 7 + "|"]
    device_of = [row.get("device", results["environment"]["device"]) for row in results["rows"].values()]
    devices = sorted(set(device_of))
    for row, device in zip(results["rows"].values(), device_of, strict=True):
        bound = f"{row['bound_bytes'] / 2**20:,.0f}" if "bound_bytes" in row else ""
        error = f"{row['error']:.1e}" if "error" in row else ""
        picture = f"{row['side']} x {row['side']}, {row['dtype']}"
        peak = f"{row['peak_bytes'] / 2**20:,.0f}"
        seconds = f"{row['seconds']:.{0 if row['seconds'] >= 100 else 1}f}" + "*" * devices.index(device)
        out.append(f"| {row['model']} | {picture} | {NAMES[row['way']]} | {peak} | {bound} | {seconds} | {error} |")
    env = results["environment"]
    commits = " and ".join(sorted({row["commit"] for row in results["rows"].values()}))
    packages = f"torch {env['packages']['torch']}, diffusers {env['packages']['diffusers']}"
    machines = ", ".join(f"{'*' * i}{name}" for i, name in enumerate(devices))
    return "\n".join(out) + f"\n\n{machines}; threads {env['threads']}, {packages}, commit {commits}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="flux.2")
    parser.add_argument("--side", type=int, default=1024, help="pixels, a multiple of 16")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--way", choices=WAYS, action="append", help="several may be given; all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)  # this is the process that decodes
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.picture:
        print(json.dumps(decode_once(args.model, args.way[0], args.side, args.dtype, args.picture)))
        return 0
    if args.side % FULL.multiple or args.side < 1:
        parser.error(f"--side: expected a positive multiple of {FULL.multiple}, got {args.side}")
    env = environment(torch.device("cpu"))
    results: dict[str, Any] = {"environment": env, "rows": {}}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        same = all(before["environment"][k] == env[k] for k in ("threads", "packages"))
        for row in before["rows"].values():
            row.setdefault("device", before["environment"]["device"])
        results = {"environment": env, "rows": before["rows"]} if same or args.table else results
        if args.table:
            print(table(before))
            return 0
    ways = tuple(args.way or WAYS)
    if args.again or any(f"{args.model} {args.side} {args.dtype} {way}" not in results["rows"] for way in ways):
        results["rows"] |= rows_of(args.model, args.side, args.dtype, ways, args.threads)
        save_json(args.out, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
