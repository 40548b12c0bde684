"""Guards throughput: `make bench-guard` fails when an operation got slower against eager torch than it was.

    python benchmarks/guard.py            # compare with benchmarks/results/guard-DEVICE.json; exit code 1 if worse
    python benchmarks/guard.py --update   # write that file, after a change that is meant

A ratio is ours / eager channels_last, the median over rounds in which the two take turns. It may exceed the committed
one by MARGIN and three errors of both; a case that does is measured twice more, on fresh tensors, and fails if it never
passes. Ratios differ more between sets of tensors than between rounds on one: what is committed is the median of three
sets, with half their range as its error. Ratios of one processor say nothing about another's: a file for each device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]
from cases import OPS, REFERENCE, Case, Contest, cases, check, contest  # noqa: E402 - after the path
from measure import DEVICE, device_name, environment, interleaved, ratio, slug  # noqa: E402

MARGIN = 0.15
ERRORS = 3  # how many standard errors are noise
ATTEMPTS = 3
ROUNDS = {"cuda": 50, "cpu": 25}


def results_file(device: torch.device) -> Path:
    """Where the ratios of this device stand."""
    return ROOT / "benchmarks" / "results" / f"guard-{slug(device)}.json"


def limit(committed: dict[str, float], now: dict[str, float]) -> float:
    """The largest ratio that passes."""
    return committed["ratio"] * (1 + MARGIN) + ERRORS * (committed["error"] ** 2 + now["error"] ** 2) ** 0.5


def measure(case: Case, device: torch.device, rounds: int, enter: Callable[..., Contest] = contest) -> dict[str, float]:
    """ours / eager channels_last of one case: {"ratio", "error"}."""
    made = enter(case, device, only=("ours", "eager NCHW", REFERENCE))
    check(made, case)
    samples = interleaved({n: made.calls[n] for n in ("ours", REFERENCE)}, device, rounds=rounds)
    middle, error = ratio(samples["ours"], samples[REFERENCE])
    return {"ratio": round(middle, 4), "error": round(error, 4)}


def settle(case: Case, device: torch.device, rounds: int) -> dict[str, float]:
    """The ratio to commit: the median of several sets of tensors, and half of their range where that is the error."""
    sets = sorted((measure(case, device, rounds) for _ in range(ATTEMPTS)), key=lambda m: m["ratio"])
    half_range = (sets[-1]["ratio"] - sets[0]["ratio"]) / 2
    middle = sets[len(sets) // 2]
    return {"ratio": middle["ratio"], "error": round(max(middle["error"], half_range), 4)}


def worse(
    committed: dict[str, dict[str, float]],
    every: Iterable[Case],
    device: torch.device,
    *,
    rounds: int,
    enter: Callable[..., Contest] = contest,
    show: Callable[[str], Any] = print,
) -> list[str]:
    """A line for each case whose ratio exceeds its limit in every attempt. KeyError if a case has none."""
    failed = []
    for case in every:
        before = committed[str(case)]
        for _ in range(ATTEMPTS):
            now = measure(case, device, rounds, enter)
            if not (bad := now["ratio"] > limit(before, now)):
                break
        line = f"{case}: {now['ratio']:.3f} of {REFERENCE}, was {before['ratio']:.3f}, limit {limit(before, now):.3f}"
        show(("WORSE " if bad else "ok    ") + line)
        failed += [line] * bad
    return failed


def table() -> str:
    """The committed ratios as Markdown, a table a device."""
    out = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("guard-*.json")):
        saved = json.loads(path.read_text())
        env = saved["environment"]
        out += [
            f"{env['device']}, {env['threads']} threads, torch {env['packages']['torch']}, commit {env['commit']}:",
            "",
        ]
        out += [f"| case | ours / {REFERENCE} |", "|---|---|"]
        out += [f"| {case} | {r['ratio']:.2f} ± {r['error']:.2f} |" for case, r in saved["ratios"].items()]
        out.append("")
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    """0: nothing got worse; 1: something did; 2: there is nothing to compare with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the ratios instead of comparing")
    args = parser.parse_args(argv)
    every = [case for op in OPS for case in cases(op, DEVICE)]
    path, rounds = results_file(DEVICE), ROUNDS[DEVICE.type]
    if args.update:
        ratios = {}
        for case in every:
            ratios[str(case)] = settle(case, DEVICE, rounds)
            print(f"{case}: {ratios[str(case)]['ratio']:.3f}", flush=True)
        path.write_text(json.dumps({"environment": environment(DEVICE), "ratios": ratios}, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
        return 0
    if not path.is_file():
        print(
            f"no ratios of {device_name(DEVICE)}: expected {path.relative_to(ROOT)}; --update writes it",
            file=sys.stderr,
        )
        return 2
    committed = json.loads(path.read_text())["ratios"]
    if unknown := [str(case) for case in every if str(case) not in committed]:
        print(f"{path.name} has no ratio of {', '.join(unknown)}; --update writes it", file=sys.stderr)
        return 2
    failed = worse(committed, every, DEVICE, rounds=rounds)
    print(f"{len(failed)} of {len(every)} got worse by more than {MARGIN:.0%} and the noise")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
