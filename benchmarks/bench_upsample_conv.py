"""upsample_conv2d against its definition, interpolation and then conv3x3. Multiplications: 4 against 9."""

import pytest
from cases import cases
from measure import DEVICE


@pytest.mark.parametrize("case", cases("upsample_conv2d", DEVICE), ids=str)
def bench_upsample_conv(compete, case):
    compete(case)
