"""The reliability tests: faults that are injected, a few in `make test`, many in `make soak`.

`soak.rounds(short, long)` is how often a test injects its fault; `soak.found(...)` keeps the figures of the table that
`make soak` ends with and writes.
"""

import json
import time
from pathlib import Path

import programs
import pytest
import torch

from train.loop import environment

FOUND = pytest.StashKey[list]()
FAILED = pytest.StashKey[bool]()


class Soak:
    """What one test asks of the kind of run it is in."""

    def __init__(self, *, long: bool, test: str) -> None:
        self.long, self.test, self.promise, self.figures = long, test, "", {}

    def rounds(self, short: int, long: int) -> int:
        """How often to inject a fault."""
        return long if self.long else short

    def found(self, promise: str, **figures: float | int | str) -> None:
        """What the test promises, in a sentence, and what it counted or measured."""
        self.promise, self.figures = promise, figures


@pytest.fixture(autouse=True)
def nothing_stays_running():
    yield
    programs.stop_all()


@pytest.fixture
def soak(request):
    began = time.monotonic()
    soak = Soak(long=bool(request.config.getoption("--soak")), test=request.node.nodeid)
    yield soak
    failed = request.node.stash.get(FAILED, True)
    rows = request.config.stash.setdefault(FOUND, [])
    row = {"test": soak.test, "promise": soak.promise, "passed": not failed, "figures": soak.figures}
    rows.append({**row, "seconds": round(time.monotonic() - began, 1)})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[FAILED] = report.failed
    return report


def pytest_terminal_summary(terminalreporter, config):
    path, rows = config.getoption("--soak"), config.stash.get(FOUND, [])
    if not path or not rows:
        return
    machine = environment(torch.device("cpu"))
    machine.pop("command")  # names folders of the machine
    Path(path).write_text(json.dumps({"environment": machine, "rows": rows}, indent=1) + "\n")
    terminalreporter.section("soak")
    for row in rows:
        figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row["figures"].items())
        verdict = "held" if row["passed"] else "BROKEN"
        terminalreporter.write_line(f"{verdict:7}{row['seconds']:7.1f} s  {row['promise'] or row['test']}: {figures}")
    terminalreporter.write_line(f"written to {path}")
