"""norm_silu_conv2d, add_bias_group_stats and a residual block of both against stock modules."""

import pytest
from cases import cases
from measure import DEVICE

OPS = ("norm_silu_conv2d", "add_bias_group_stats", "residual_block")


@pytest.mark.parametrize("case", [c for op in OPS for c in cases(op, DEVICE)], ids=str)
def bench_conv_block(compete, case):
    compete(case)
