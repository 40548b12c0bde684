"""sample_timesteps and flow_match_inputs against torch's own generator, eager and compiled, and a copy of the bytes."""

import pytest
from cases import cases
from measure import DEVICE


@pytest.mark.parametrize("case", cases("flow_match_inputs", DEVICE) + cases("sample_timesteps", DEVICE), ids=str)
def bench_timesteps(compete, case):
    compete(case)
