"""Samplers on Gaussian data, whose velocity, flow and marginals are known; guidance against its formula."""

import math
from itertools import pairwise

import pytest
import torch

from flux2.samplers import SAMPLERS, autoguidance, classifier_free, euler, euler_maruyama, heun
from flux2.schedules import sampling_times

MEAN = torch.tensor([0.8, -1.5, 0.1], dtype=torch.float64).view(1, 3, 1)
STD = torch.tensor([0.3, 1.2, 0.7], dtype=torch.float64).view(1, 3, 1)


def gaussian_velocity(z, t):
    """E[eps - x | z_t = z] for x ~ N(MEAN, STD^2): regression of eps - x on z_t = (1 - t) x + t eps."""
    t = t.view(-1, 1, 1)
    mean, std = MEAN.to(z), STD.to(z)
    covariance, variance = t - (1 - t) * std**2, (1 - t) ** 2 * std**2 + t**2
    return -mean + covariance / variance * (z - (1 - t) * mean)


def start(n=4):
    return torch.randn(n, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exact(z):
    """Where the flow takes z from t = 1 to 0: quantiles of N(0, 1) to those of N(MEAN, STD^2)."""
    return MEAN + STD * z


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(sampler, order, shift):
    z = start()
    errors = []
    for n in (64, 128, 256):
        ts = sampling_times(n, shift)
        errors.append((sampler(gaussian_velocity, z, ts) - exact(z)).abs().max().item())
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(order - 0.15 < rate < order + 0.35 for rate in rates), (errors, rates)


def test_euler_is_the_sum_of_its_steps():
    """An odd grid, by hand; the callback sees each step's end"""
    z, ts, seen = start(), torch.tensor([0.9, 0.5, 0.15, 0.1], dtype=torch.float64), []
    got = euler(gaussian_velocity, z, ts, callback=lambda i, t, z: seen.append((i, t, z)))
    by_hand = z
    for t, s in ((0.9, 0.5), (0.5, 0.15), (0.15, 0.1)):
        by_hand = by_hand + (s - t) * gaussian_velocity(by_hand, torch.full((4,), t, dtype=torch.float64))
    torch.testing.assert_close(got, by_hand, rtol=1e-12, atol=1e-12)
    assert [(i, t) for i, t, _ in seen] == [(1, 0.5), (2, 0.15), (3, 0.1)] and torch.equal(seen[-1][2], got)


@pytest.mark.parametrize(("sampler", "calls"), [(euler, 5), (heun, 9), (euler_maruyama, 5)])
def test_calls_times_and_dtypes(sampler, calls):
    times = []

    def velocity(z, t):
        assert z.dtype == torch.float32 and t.shape == (2,) and t.dtype == torch.float32
        times.append(t[0].item())
        return z.to(torch.bfloat16)

    out = sampler(velocity, torch.ones(2, 3, dtype=torch.bfloat16), sampling_times(5))
    assert out.dtype == torch.float32 and len(times) == calls
    assert min(times) == pytest.approx(0.2)  # nothing is asked at t = 0


def test_heun_on_a_slope_in_t_alone_is_the_trapezoid():
    """v = 3 t^2 on [1, 0.5]: one step of the trapezoid gives -0.5 (3 + 0.75) / 2"""
    ts = torch.tensor([1.0, 0.5], dtype=torch.float64)
    z = heun(lambda z, t: (3 * t**2).view(-1, 1).expand_as(z), torch.zeros(1, 1, dtype=torch.float64), ts)
    assert z.item() == pytest.approx(-0.5 * (3 + 0.75) / 2, abs=1e-12)


def test_euler_maruyama_has_the_distribution_of_its_recursion():
    """On Gaussian data each step is affine, so that mean and variance follow in closed form; the last adds no noise.

    The recursion is written with the score of the marginal, which the sampler has only through the velocity.
    """
    n, ts = 400_000, sampling_times(12, 2.0)
    z = torch.randn(n, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = euler_maruyama(gaussian_velocity, z, ts, generator=torch.Generator().manual_seed(2))
    times = ts.tolist()
    for channel in range(3):
        m, s = MEAN[0, channel, 0].item(), STD[0, channel, 0].item()
        mean, variance = 0.0, 1.0
        for i, (t, u) in enumerate(pairwise(times)):
            marginal, var_t = (1 - t) * m, (1 - t) ** 2 * s * s + t * t
            slope = (t - (1 - t) * s * s) / var_t + t / var_t  # of the drift v - t score in z
            noise = 2 * t * (t - u)
            if i == len(times) - 2:  # the last step is Euler's: the drift is v
                slope, noise = (t - (1 - t) * s * s) / var_t, 0
            drift = -m + slope * (mean - marginal)
            gain = 1 + (u - t) * slope
            mean += (u - t) * drift
            variance = gain * gain * variance + noise
        sample = got[:, channel, 0]
        assert sample.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
        assert sample.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_euler_maruyama_approaches_the_data():
    z = torch.randn(20_000, 3, 1, generator=torch.Generator().manual_seed(1))
    got = euler_maruyama(gaussian_velocity, z, sampling_times(200), generator=torch.Generator().manual_seed(2))
    assert got.mean((0, 2)).tolist() == pytest.approx(MEAN.flatten().tolist(), abs=0.03)
    assert got.std((0, 2)).tolist() == pytest.approx(STD.flatten().tolist(), rel=0.03)


@pytest.mark.parametrize("std", [0.0, 0.2])
def test_euler_maruyama_leaves_no_noise_of_the_last_time(std):
    """A shifted grid ends at t = 0.12, whose noise a last step of the stochastic drift would leave in the picture"""

    def velocity(z, t):
        t = t.view(-1, 1)
        return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * z

    z = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = euler_maruyama(velocity, z, sampling_times(50, 6.93), generator=torch.Generator().manual_seed(2))
    assert got.std().item() == pytest.approx(std, abs=0.03)


def test_the_generator_alone_decides():
    z, ts = start(), sampling_times(4)
    a, b, c = (euler_maruyama(gaussian_velocity, z, ts, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    for sampler in (euler, heun):
        before = torch.get_rng_state()
        assert torch.equal(sampler(gaussian_velocity, z, ts), sampler(gaussian_velocity, z, ts))
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", SAMPLERS)
def test_errors_name_what_was_expected(name):
    sampler, z = SAMPLERS[name], start()
    for ts in (torch.tensor([0.0, 1.0]), torch.tensor([1.0]), torch.tensor([[1.0, 0.0]]), torch.tensor([1.5, 0.0])):
        with pytest.raises(ValueError, match=f"{name}: ts: expected two or more times, strictly falling"):
            sampler(gaussian_velocity, z, ts)
    with pytest.raises(ValueError, match=f"{name}: z: expected floating-point"):
        sampler(gaussian_velocity, z.long(), sampling_times(2))


def class_model(z, t, y):
    """v depends on z, t and the class, so that a mix-up of any of them shows."""
    return z * (1 + y.view(-1, 1, 1)) + t.view(-1, 1, 1)


def test_classifier_free_guidance_inside_its_interval():
    z, y, t = start(), torch.tensor([0, 1, 2, 5]), torch.tensor([0.1, 0.2, 0.6, 0.7], dtype=torch.float64)
    got = classifier_free(class_model, y, 7, 3.0, (0.2, 0.6))(z, t)
    conditional, null = class_model(z, t, y), class_model(z, t, torch.full_like(y, 7))
    guided = null + 3 * (conditional - null)
    expected = torch.stack((conditional[0], guided[1], guided[2], conditional[3]))
    torch.testing.assert_close(got, expected)
    as_tensor = classifier_free(class_model, y, torch.full_like(y, 7), 3.0, (0.2, 0.6))(z, t)
    assert torch.equal(got, as_tensor)


@pytest.mark.parametrize(
    ("scale", "interval", "batch"), [(1.0, (0.0, 1.0), 4), (3.0, (0.0, 0.4), 4), (3.0, (0.0, 1.0), 8)]
)
def test_guidance_is_paid_for_only_where_it_is_on(scale, interval, batch):
    sizes = []

    def model(z, t, y):
        sizes.append(len(z))
        return class_model(z, t, y)

    classifier_free(model, torch.arange(4), 7, scale, interval)(start(), torch.full((4,), 0.5, dtype=torch.float64))
    assert sizes == [batch]


def test_classifier_free_refuses_a_wrong_interval():
    with pytest.raises(ValueError, match="interval: expected 0 <= low <= high <= 1, got"):
        classifier_free(class_model, torch.arange(4), 7, 2.0, (0.7, 0.2))


def test_autoguidance():
    z, t = start(), torch.full((4,), 0.5, dtype=torch.float64)
    got = autoguidance(lambda z, t: 2 * z, lambda z, t: z - 1, 1.5)(z, t)
    torch.testing.assert_close(got, (z - 1) + 1.5 * (2 * z - (z - 1)))
    strong = lambda z, t: 2 * z  # noqa: E731
    assert autoguidance(strong, None, 1.0) is strong
