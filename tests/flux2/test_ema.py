"""The average against its closed form."""

import pytest
import torch
from torch import nn

from flux2.ema import EMA


def test_average_follows_the_recursion():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone().double()
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_only_averages_of_its_own_parameters_are_passed_over():
    """A parameter that was replaced has no average that anybody else could have brought up to date"""
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    model.bias = nn.Parameter(torch.full((2,), 3.0))
    before = ema.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert ema.of(model.weight) is ema.model.weight and ema.of(model.bias) is None
    ema.update(model, 100, but={model.weight, model.bias})
    assert torch.equal(ema.model.weight, before) and ema.model.bias.max() > 1


def test_average_is_frozen_and_copies_buffers():
    model = nn.BatchNorm1d(3)
    ema = EMA(model, decay=0.5)
    model.running_mean.fill_(4.0)
    ema.update(model, 0)
    assert ema.model.running_mean.tolist() == [4.0] * 3
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training


def test_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        EMA(nn.Linear(1, 1), decay=1)
