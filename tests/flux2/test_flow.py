"""Velocity losses against loops over samples and elements."""

import math

import pytest
import torch

from flux2.flow import NormalisedVelocityLoss, by_time_bin, time_bin, velocity_mse


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_velocity_mse_is_the_mean_of_each_sample():
    pred, v = draw(3, 4, 2, 2).requires_grad_(), draw(3, 4, 2, 2, seed=1)
    got = velocity_mse(pred, v)
    for i in range(3):
        values = [(a - b) ** 2 for a, b in zip(pred[i].flatten().tolist(), v[i].flatten().tolist(), strict=True)]
        assert got[i].item() == pytest.approx(sum(values) / 16, rel=1e-5)
    got[1].backward()
    expected = torch.zeros_like(pred)
    expected[1] = 2 * (pred.detach() - v)[1] / 16
    torch.testing.assert_close(pred.grad, expected)


def test_velocity_mse_computes_in_fp32():
    pred, v = torch.full((1, 1000), 1.0, dtype=torch.bfloat16), torch.full((1, 1000), 1.0078125, dtype=torch.bfloat16)
    got = velocity_mse(pred, v)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(0.0078125**2, rel=1e-6)
    with pytest.raises(ValueError, match=r"shapes must be equal, got \[1, 1000\] and \[1000\]"):
        velocity_mse(pred, v[0])


def test_bins_of_time():
    t = torch.tensor([0.0, 0.0999, 0.1001, 0.55, 0.999, 1.0])
    assert time_bin(t, 10).tolist() == [0, 0, 1, 5, 9, 9]
    mean, count = by_time_bin(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 12.0]), t)
    assert count.tolist() == [2, 1, 0, 0, 0, 1, 0, 0, 0, 2]
    assert mean[0] == 2 and mean[1] == 5 and mean[5] == 7 and mean[9] == 10.5
    assert mean.isnan().tolist() == [c == 0 for c in count.tolist()]
    with pytest.raises(ValueError, match=r"expected \[N\] twice"):
        by_time_bin(torch.ones(3), torch.ones(2))


def test_normalised_loss_is_the_unexplained_share():
    """By loops over the elements of each bin and channel; batches add up"""
    n, channels = 40, 3
    offset = torch.tensor([5.0, 0.0, -2.0]).view(1, 3, 1, 1)  # a mean that has to be taken off by channel
    v, t = draw(n, channels, 2, 2) + offset, torch.rand(n, generator=torch.Generator().manual_seed(3))
    pred = v + 0.5 * draw(n, channels, 2, 2, seed=4)
    loss = NormalisedVelocityLoss(bins=4)
    for part in (slice(0, 7), slice(7, 30), slice(30, n)):
        loss.add(pred[part], v[part], t[part])
    for b in range(4):
        chosen = [i for i in range(n) if b / 4 <= t[i].item() < (b + 1) / 4]
        error = sum((pred[i] - v[i]).double().square().sum().item() for i in chosen)
        spread = 0.0
        for c in range(channels):
            values = [x for i in chosen for x in v[i, c].flatten().tolist()]
            mean = sum(values) / len(values)
            spread += sum((x - mean) ** 2 for x in values)
        assert loss.per_bin()[b].item() == pytest.approx(error / spread, rel=1e-6)
        assert loss.count[b].item() == len(chosen)
    assert loss.mean() == pytest.approx(loss.per_bin().sum().item() / 4)


def test_normalised_loss_of_perfect_and_of_the_mean():
    v, t = draw(50, 2, 4, 4), torch.linspace(0, 1, 50)
    perfect, mean = NormalisedVelocityLoss(2), NormalisedVelocityLoss(2)
    perfect.add(v, v, t)
    mean.add(torch.zeros_like(v), v - v.mean((0, 2, 3), keepdim=True), t)
    assert perfect.mean() == 0 and mean.mean() == pytest.approx(1, abs=0.01)


def test_a_bin_without_samples_has_no_mean():
    loss = NormalisedVelocityLoss()
    assert math.isnan(loss.per_bin()[0].item())
    loss.add(draw(2, 3), draw(2, 3, seed=1), torch.tensor([0.05, 0.06]))
    assert loss.per_bin().isnan().tolist() == [False] + [True] * 9
    with pytest.raises(ValueError, match=r"bins without samples, counts are \[2, 0"):
        loss.mean()
    with pytest.raises(ValueError, match="shapes must be equal"):
        loss.add(draw(2, 3), draw(3, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="expected v"):
        loss.add(draw(2, 3), draw(2, 3), torch.zeros(3))
