"""The tolerance lets through what eager torch does, and nothing much worse."""

import pytest
import torch
from tolerance import assert_no_worse


def test_lets_through_eager_itself_and_its_last_place():
    truth = torch.randn(1000, dtype=torch.float64)
    base = truth.bfloat16()
    assert_no_worse(base, base, truth)
    assert_no_worse(base.nextafter(base.new_tensor(9.0)), base, truth)


@pytest.mark.parametrize(
    "spoil", [lambda y: y * 1.1, lambda y: y.index_fill(0, torch.tensor([3]), float("nan")), lambda y: y[1:]]
)
def test_stops_wrong_values_nan_and_shapes(spoil):
    truth = torch.randn(1000, dtype=torch.float64)
    base = truth.bfloat16()
    with pytest.raises(AssertionError):
        assert_no_worse(spoil(base), base, truth)


def test_stops_one_wrong_element_of_many():
    truth = torch.randn(100_000, dtype=torch.float64)
    base = truth.float()
    with pytest.raises(AssertionError, match="max error"):
        assert_no_worse(base.index_add(0, torch.tensor([7]), torch.tensor([1e-4])), base, truth)
