"""What micro-benchmarks share: the contest of a case under pytest-benchmark, and its table at the end.

pytest-benchmark times `ours`; before each of its rounds the other contestants are timed, so that all take turns. The
table that follows pytest-benchmark's has every contestant: ms, GB/s by the op's formula, percent of a copy's speed.
"""

import pytest
from cases import check, contest, summary
from measure import DEVICE, Stopwatch

ROUNDS = {"cuda": 30, "cpu": 9}
ROWS = pytest.StashKey[list]()


@pytest.fixture
def compete(benchmark, request):
    """Runs a case."""

    def run(case):
        made = contest(case, DEVICE)
        check(made, case)
        watch = Stopwatch(DEVICE, head_start=True)
        samples = {name: [] for name in made.calls}
        for call in made.calls.values():
            call()

        def others():
            for name, call in made.calls.items():
                if name != "ours":
                    samples[name].append(watch.time(call))
            watch.cool()

        benchmark.group = f"{case.op} {case.direction}"
        benchmark.pedantic(
            lambda: samples["ours"].append(watch.warm_time(made.calls["ours"])),
            setup=others,
            rounds=ROUNDS[DEVICE.type],
        )
        rounds = min(map(len, samples.values()))  # where benchmarks are off, one call and no setup
        if rounds:
            row = summary(case, {name: times[:rounds] for name, times in samples.items()}, made.missing, DEVICE)
            benchmark.extra_info.update(row)
            request.config.stash.setdefault(ROWS, []).append(row)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("contestants: medians, interleaved, caches cold")
    for row in rows:
        terminalreporter.write_line(f"{row['case']}  ({row['bytes'] / 1e6:.1f} MB by the formula)")
        for name, c in row["contestants"].items():
            terminalreporter.write_line(
                f"    {name:<38} {c['ms']:9.3f} ms {c['gb_per_s']:8.1f} GB/s {c['percent_of_copy']:6.1f}% of copy"
                f"  {c['over_eager']:6.3f} x eager channels_last"
            )
        for name, why in row["missing"].items():
            terminalreporter.write_line(f"    {name:<38} missing: {why}")
