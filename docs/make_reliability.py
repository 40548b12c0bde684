"""Fills docs/reliability.md from benchmarks/results/soak.json, which `make soak` writes."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "soak.json", ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- soak -->\n", "<!-- /soak -->"


def table(results: dict) -> str:
    """A row a promise: what the tests of it counted, and which they are."""
    lines = ["| promise | counted | test |", "|---|---|---|"]
    for row in results["rows"]:
        assert row["passed"], row["test"]
        figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row["figures"].items())
        file, name = row["test"].removeprefix("tests/reliability/").split("::", 1)
        lines.append(f"| {row['promise']} | {figures} | `{file}`: {name.split('[')[0].removeprefix('test_')} |")
    machine = results["environment"]
    seconds = sum(row["seconds"] for row in results["rows"])
    about = f"{machine['processor']}, {machine['threads']} thread, torch {machine['packages']['torch']}"
    about += f", commit {machine['commit']}; {seconds / 60:.0f} minutes in all."
    return "\n".join(lines) + f"\n\n{about}\n"


def fill(page: str, results: dict) -> str:
    """The page with the table of the results."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), json.loads(RESULTS.read_text())))
    print(PAGE)
