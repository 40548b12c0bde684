"""Each fault is injected into a real update: nothing may change, and what broke must be named."""

import math

import pytest
import torch
from torch import nn

from flux2.ema import EMA
from train.guards import GuardedOptimiser


def setup(fused=True, clip=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
    return model, optimiser, GuardedOptimiser(model.named_parameters(), optimiser, clip=clip)


def backward(model, scale=1.0):
    loss = scale * model(torch.ones(5, 3)).square().mean()
    loss.backward()
    return loss


def everything(model, optimiser):
    moments = [v.clone() for s in optimiser.state_dict()["state"].values() for v in s.values()]
    return [p.detach().clone() for p in model.parameters()] + moments


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("fault", ["nan loss", "inf loss", "nan gradient", "overflowing norm"])
def test_a_broken_update_changes_nothing_and_is_named(fused, fault):
    model, optimiser, guard = setup(fused)
    ema = EMA(model, 0.5)
    guard.update(0, {"l1": backward(model)})
    before = everything(model, optimiser)
    loss = backward(model)
    bad = {"nan loss": math.nan, "inf loss": math.inf}.get(fault, 1.0)
    if fault == "nan gradient":
        model[1].bias.grad[0] = math.nan
    if fault == "overflowing norm":  # each gradient finite, fp32 cannot hold the norm of all
        for p in model.parameters():
            p.grad.fill_(1.5e19 / p.numel() ** 0.5)
    guard.update(7, {"l1": loss, "lpips": loss * bad})
    ema.update(model, 1)
    after = everything(model, optimiser)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in ema.model.parameters())
    (skipped,), dead = guard.read()
    expected = {
        "nan loss": "step 7: lpips",
        "inf loss": "step 7: lpips",
        "nan gradient": "step 7: gradient of 1.bias",
        "overflowing norm": "step 7: norm of all gradients",
    }
    assert str(skipped) == expected[fault] and guard.skipped == guard.in_a_row == 1 and dead == []
    guard.update(8, {"l1": backward(model)})  # and training goes on
    assert not torch.equal(model[0].weight, before[0])
    assert guard.read() == ([], []) and guard.in_a_row == 0 and guard.skipped == 1


def test_averages_are_taken_along():
    """The same as after the update, of what had a gradient; the rest is left to `EMA.update`, frozen or not"""
    model, _, guard = setup()
    other, _, apart = setup()
    both = [[EMA(m, decay) for decay in (0.5, 0.9)] for m in (model, other)]
    for step in range(4):
        for m, g, emas in ((model, guard, both[0]), (other, apart, both[1])):
            backward(m)
            if step == 2:  # the first layer's bias moves without a gradient
                m[0].bias.grad = None
                m[0].bias.data.add_(1)
            g.update(step, {"l1": torch.tensor(math.nan if step == 3 else 1.0)}, averages=emas if m is model else ())
            for ema in emas:
                ema.update(m, step, but=g.averaged)
        assert len(guard.averaged) == (3 if step == 2 else 4) and not apart.averaged
    for mine, theirs in zip(*both, strict=True):
        for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.equal(mine.model[0].bias, model[0].bias)


def test_an_unbroken_update_is_clip_grad_norm_and_the_optimiser():
    model, _, guard = setup(clip=0.01)
    other, optimiser, _ = setup()
    for step in range(3):
        norm = guard.update(step, {"l1": backward(model, 5.0)})
        backward(other, 5.0)
        expected = nn.utils.clip_grad_norm_(other.parameters(), 0.01)
        optimiser.step()
        optimiser.zero_grad()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_in_a_row_counts_across_reads():
    model, _, guard = setup()
    for step, value in enumerate((math.nan, 1.0, math.nan, math.nan)):
        guard.update(step, {"l1": backward(model) * value})
        if step == 2:
            guard.read()
            assert guard.in_a_row == 1
    guard.read()
    assert (guard.in_a_row, guard.skipped, guard.last_step) == (2, 3, 3)


def test_gradients_that_stay_zero_are_named():
    model, _, guard = setup()
    unused = nn.Parameter(torch.ones(2))
    guard.named["unused"] = unused

    def updates(num):
        for step in range(num):
            loss = backward(model)
            model[0].weight.grad.zero_()
            model[0].bias.grad.zero_()  # as in front of a norm: no reason to speak
            if step == 1:
                model[1].weight.grad.zero_()  # for one step: none either
            guard.update(step, {"l1": loss})

    updates(3)
    assert guard.read() == ([], ["0.weight", "unused"])
    assert guard.read() == ([], [])  # nothing happened since
    updates(2)
    assert guard.read() == ([], [])  # too few to say


def test_no_gradient_at_all_is_an_error():
    _, _, guard = setup()
    with pytest.raises(ValueError, match="no gradient reached any of 4 parameters"):
        guard.update(0, {"l1": torch.zeros(())})
