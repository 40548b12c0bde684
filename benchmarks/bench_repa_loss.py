"""repa_loss against F.cosine_similarity, eager and compiled, and a copy of the bytes."""

import pytest
from cases import cases
from measure import DEVICE


@pytest.mark.parametrize("case", cases("repa_loss", DEVICE), ids=str)
def bench_repa_loss(compete, case):
    compete(case)
