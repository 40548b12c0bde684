"""Small tensors are split as large ones are: chunks of several tiles, so that running statistics and cuts are met."""

import pytest

from kernels import tiles


@pytest.fixture(autouse=True)
def chunks_of_several_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "MIN_PROGRAMS", 1)
    tiles._plan.cache_clear()
    yield
    tiles._plan.cache_clear()
