"""GB/s of each operation against its size, on this GPU or CPU: the pictures of docs/ops.

    python benchmarks/bandwidth.py                      # all operations; again to go on
    python benchmarks/bandwidth.py --only repa_loss     # some
    python benchmarks/bandwidth.py --draw               # docs/ops/*.png from what was measured

Bytes by the formulas of cases.py, caches cold, contestants in turn, medians. `copy` moves the same bytes: what the
memory can do. Results go to benchmarks/results/bandwidth-DEVICE.json, operation by operation; one with the same
processor, versions and sources is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]
from cases import OPS, REFERENCE, Case, check, contest  # noqa: E402 - after the path
from gpu_report import sources  # noqa: E402
from measure import DEVICE, environment, interleaved, slug  # noqa: E402

from flux2.tensor_files import save_json  # noqa: E402
from train.figures import panels  # noqa: E402

RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "ops"
SIDES = {"cuda": (32, 64, 128, 256, 512, 1024), "cpu": (16, 32, 64, 128, 256)}
MAPS = {s: (1, 128, s, s) for s in (*SIDES["cuda"], *SIDES["cpu"])}
SHAPES: dict[str, dict[str, list[tuple[int, ...]]]] = {  # operation -> shapes of x
    kind: {
        **{op: [MAPS[s] for s in SIDES[kind]] for op in ("group_norm", "group_norm_silu", "add_bias_group_stats")},
        **{op: [MAPS[s] for s in SIDES[kind][:-1]] for op in ("norm_silu_conv2d", "upsample_conv2d")},
        "attention": [(1, t, 512) for t in ((256, 1024, 4096, 16384) if kind == "cuda" else (64, 256, 1024, 2048))],
        "repa_loss": [(n, 256, 768) for n in ((2, 8, 32, 128, 512) if kind == "cuda" else (1, 4, 16, 32))],
        "flow_match_inputs": [(n, 128, 16, 16) for n in ((8, 64, 512, 2048) if kind == "cuda" else (1, 8, 64, 256))],
        "sample_timesteps": [(n, 1) for n in (256, 4096, 65536, 2**20, *((2**24,) if kind == "cuda" else ()))],
    }
    for kind in SIDES
}  # fmt: skip
COLOURS = {"copy": "0.6", "ours": "C3", "eager NCHW": "C7", REFERENCE: "C0", "compiled channels_last": "C2"}
KIND = "cpu" if DEVICE.type == "cpu" else "cuda"
ENTRANTS = ("ours", "eager NCHW", REFERENCE, *(("compiled channels_last",) if KIND == "cuda" else ()), "copy")


def points(op: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A row a shape and direction: bytes and {contestant: GB/s}."""
    rows = []
    for shape in SHAPES[KIND][op]:
        for direction in OPS[op].directions:
            case = Case(op, shape, dtype, direction)
            made = contest(case, DEVICE, only=ENTRANTS)
            check(made, case)
            samples = interleaved(made.calls, DEVICE, rounds=rounds, head_start=True)
            moved = case.bytes_moved(DEVICE)
            speeds = {n: float(f"{moved / statistics.median(t) / 1e6:.4g}") for n, t in samples.items()}
            rows.append({"shape": list(shape), "direction": direction, "bytes": moved, "gb_per_s": speeds})
    return rows


def draw(results: dict[str, Any], op: str, path: Path) -> None:
    """One panel a direction: GB/s over megabytes moved, a line a contestant."""
    rows, directions = results["ops"][op], OPS[op].directions
    figure, axes = panels(1, len(directions), (4.6 * len(directions), 3.2))
    for axis, direction in zip(axes[0], directions, strict=True):
        found = [row for row in rows if row["direction"] == direction]
        for name in found[0]["gb_per_s"]:
            at = [(row["bytes"] / 1e6, row["gb_per_s"][name]) for row in found if name in row["gb_per_s"]]
            style = {"linewidth": 2.5} if name == "ours" else {"linestyle": "--"} if name == "copy" else {}
            axis.plot(*zip(*at, strict=True), marker="o", markersize=4, label=name, color=COLOURS[name], **style)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("MB moved")
        axis.set_title(direction, fontsize=10)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("GB/s")
    axes[0][0].legend(fontsize=8)
    about = (
        f"{results['environment']['device']}, {results['dtype']}, torch {results['environment']['packages']['torch']}"
    )
    figure.suptitle(f"{op}: {about}", fontsize=10)
    figure.savefig(path, dpi=90)


def drawn() -> Path:
    """The results that are drawn: a GPU's before a CPU's."""
    paths = sorted(RESULTS.glob("bandwidth-*.json"))
    gpu = [path for path in paths if json.loads(path.read_text())["environment"]["driver"] != "none"]
    if not paths:
        raise FileNotFoundError(f"expected {RESULTS}/bandwidth-*.json, got none: python benchmarks/bandwidth.py first")
    return (gpu or paths)[-1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES[KIND]), default=list(SHAPES[KIND]), metavar="OP")
    parser.add_argument("--rounds", type=int, default=50 if KIND == "cuda" else 11)
    parser.add_argument("--out", type=Path, default=RESULTS / f"bandwidth-{slug(DEVICE)}.json")
    parser.add_argument("--draw", action="store_true", help="draw what was measured, and measure nothing")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected one or more, got {args.rounds}")
    if args.draw:
        results = json.loads(drawn().read_text())
        PICTURES.mkdir(exist_ok=True)
        for op in results["ops"]:
            draw(results, op, PICTURES / f"{op}.png")
        print(f"{PICTURES}: {len(results['ops'])} pictures of {drawn().relative_to(ROOT)}")
        return 0
    about = {"environment": environment(DEVICE), "sources": sources(), "dtype": "bf16" if KIND == "cuda" else "fp32"}
    results: dict[str, Any] = {**about, "ops": {}}
    if args.out.is_file():
        before = json.loads(args.out.read_text())
        same = all(before.get(key) == about[key] for key in ("sources", "dtype"))
        same &= all(
            before["environment"][key] == about["environment"][key] for key in ("device", "threads", "packages")
        )
        results["ops"] = before["ops"] if same else {}
    for op in (bar := tqdm([op for op in args.only if op not in results["ops"]], unit="op")):
        bar.set_description(op)
        results["ops"][op] = points(op, results["dtype"], args.rounds)
        save_json(args.out, results)
    print(f"{args.out}: {len(results['ops'])} of {len(SHAPES[KIND])} operations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
