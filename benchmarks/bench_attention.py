"""attention as `auto` runs it against PyTorch's: an autoencoder's head of 512 channels, and a transformer's heads."""

import pytest
from cases import cases
from measure import DEVICE


@pytest.mark.parametrize("case", cases("attention", DEVICE), ids=str)
def bench_attention(compete, case):
    compete(case)
