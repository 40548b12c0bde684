"""group_norm and group_norm_silu against eager, compiled and Liger's: `pytest benchmarks --benchmark-only`."""

import pytest
from cases import cases
from measure import DEVICE


@pytest.mark.parametrize("case", cases("group_norm", DEVICE) + cases("group_norm_silu", DEVICE), ids=str)
def bench_group_norm(compete, case):
    compete(case)
