"""Writes the README's speed tables from benchmarks/results/autoencoder-PROCESSOR.json, one a processor.

python benchmarks/compare_autoencoder.py && python docs/make_speed.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
MARKED = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.DOTALL)


def table(results: dict[str, Any]) -> str:
    """A row a task and type: both times, their ratio, and the bytes kept for backward."""
    lines = ["| FLUX.2's autoencoder, 256 pixels | diffusers | ours | times as fast | bytes for backward |"]
    lines.append("|---" * 5 + "|")
    for row in results["rows"].values():
        if row["kind"] == "attention":
            continue
        kept = f"{row['kept_ratio']:.2f} of diffusers'" if "kept_ratio" in row else ""
        theirs, ours = (row["ms"][name] / 1e3 for name in (row["peer"], "ours"))
        lines.append(f"| {row['kind']}, {row['dtype']} | {theirs:.2f} s | {ours:.2f} s | {row['ratio']:.2f} | {kept} |")
    env = results["environment"]
    versions = f"torch {env['packages']['torch']}, diffusers {env['packages']['diffusers']}"
    about = f"{env['device']}, {env['threads']} threads, {versions} in its faster memory format, commit {env['commit']}"
    without = "" if env.get("bf16_products", True) else " This processor has no instructions that multiply bf16."
    return "\n".join([*lines, "", f"{about}.{without}"]) + "\n"


def filled(page: str) -> str:
    """The page with the tables of the committed results."""
    tables = [table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("autoencoder-*.json"))]
    return MARKED.sub(lambda m: m[1] + "\n".join(tables) + m[2], page)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    print(README)
