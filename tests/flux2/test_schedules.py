"""Laws of the timestep against the table of the comparison, closed forms and their own samples; shifts and times."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

from flux2 import schedules
from flux2.schedules import (
    AUTO_SHIFTS,
    LogitNormal,
    PlateauLogitNormal,
    UniformLaw,
    auto_shifts,
    check_shifts,
    flux1_mu,
    flux2_mu,
    sampling_times,
    shift_for,
    time_shift,
)

# shift: t*, p*, P*, Z, height of the plateau, means of plateau, logit-normal and uniform; quantiles of the plateau law
TABLE = {
    1.00: (0.500000, 1.595769, 0.500000, 1.297885, 1.2295, 0.58633, 0.50000, 0.50000),
    1.78: (0.743307, 1.857414, 0.686734, 1.163519, 1.5964, 0.66268, 0.61718, 0.59505),
    2.95: (0.857843, 2.532273, 0.762908, 1.122887, 2.2551, 0.73918, 0.71111, 0.67355),
    4.63: (0.913727, 3.593691, 0.796010, 1.106050, 3.2491, 0.80221, 0.78332, 0.73698),
    6.93: (0.943946, 5.083551, 0.812701, 1.097654, 4.6313, 0.85035, 0.83698, 0.78713),
}
QUANTILES = {
    1.00: (0.24464, 0.38812, 0.59334, 0.79667, 0.91867),
    1.78: (0.35051, 0.50645, 0.68633, 0.84340, 0.93736),
    2.95: (0.46689, 0.62272, 0.77494, 0.88914, 0.95566),
    4.63: (0.57670, 0.71896, 0.84102, 0.92306, 0.96922),
    6.93: (0.66998, 0.79189, 0.88681, 0.94602, 0.97841),
}
LAWS = [
    UniformLaw(shift=1.0), UniformLaw(shift=4.63), LogitNormal(), LogitNormal(shift=4.63), PlateauLogitNormal(),
    PlateauLogitNormal(shift=6.93), PlateauLogitNormal(shift=2.0, mu=-0.7, sigma=0.6),
    PlateauLogitNormal(mu=0.5, sigma=1.6), PlateauLogitNormal(mu=-3.0, sigma=1.3), LogitNormal(mu=-1.0, sigma=0.4),
]  # fmt: skip


def named(law):
    return f"{type(law).__name__}-{'-'.join(str(v) for v in vars(law).values())}"


@pytest.mark.parametrize("shift", TABLE)
def test_laws_are_those_of_the_comparison(shift):
    knee, density, mass, normaliser, height, mean, mean_ln, mean_ts = TABLE[shift]
    law, p = PlateauLogitNormal(shift=shift), PlateauLogitNormal(shift=shift)._plateau
    assert (law.mode, p.density, p.mass, law.normaliser) == pytest.approx((knee, density, mass, normaliser), abs=1e-6)
    for t in (knee + 1e-6, 0.97, 1.0):
        assert law.log_prob(torch.tensor(t, dtype=torch.float64)).exp().item() == pytest.approx(height, abs=5.1e-5)
    means = (law.mean, LogitNormal(shift=shift).mean, UniformLaw(shift=shift).mean)
    assert means == pytest.approx((mean, mean_ln, mean_ts), abs=5.1e-6)
    u = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert law.icdf(u).tolist() == pytest.approx(QUANTILES[shift], abs=5.1e-6)


@pytest.mark.parametrize("law", LAWS, ids=named)
def test_density_cdf_inverse_and_mean_agree(law):
    u = torch.linspace(0, 1, 40003, dtype=torch.float64)[1:-1]
    t = law.icdf(u)
    assert t.dtype == torch.float64 and (t.diff() > 0).all() and t.min() > 0 and t.max() < 1
    torch.testing.assert_close(law.cdf(t), u, rtol=0, atol=1e-12)
    edges = torch.linspace(1e-9, 1 - 1e-9, 2_000_001, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    density = law.log_prob(middle).exp()
    width = edges[1] - edges[0]
    assert (density.sum() * width).item() == pytest.approx(1, abs=1e-6)
    assert ((density * middle).sum() * width).item() == pytest.approx(law.mean, abs=1e-6)
    torch.testing.assert_close(law.cdf(edges)[1:].diff(), (density * width)[1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("law", LAWS, ids=named)
def test_samples_follow_the_law(law):
    n = 200_000
    t = law.sample(n, seed=3, step=7)
    assert t.shape == (n,) and t.dtype == torch.float32
    order = law.cdf(t.double()).sort().values
    ks = (order - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)
    assert ks < 1.95  # Kolmogorov-Smirnov, p = 0.001
    assert torch.equal(torch.cat([law.sample(n // 2, seed=3, step=7, first_index=i) for i in (0, n // 2)]), t)


@pytest.mark.parametrize("mu", [-2.0, -0.3, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.41, 1.5, 2.5])
def test_the_knee_is_the_highest_point_of_the_density(mu, sigma):
    t = torch.linspace(1e-6, 1 - 1e-6, 1_000_001, dtype=torch.float64)
    density = LogitNormal(mu=mu, sigma=sigma).log_prob(t)
    law = PlateauLogitNormal(mu=mu, sigma=sigma)
    at_knee = LogitNormal(mu=mu, sigma=sigma).log_prob(torch.tensor(law.mode, dtype=torch.float64))
    assert at_knee >= density.max() - 1e-9
    assert (law.log_prob(t[t > law.mode]).diff().abs() < 1e-12).all()


def test_the_knee_is_not_the_median():
    law = PlateauLogitNormal(shift=4.63)
    assert law.mode - 4.63 / 5.63 > 0.09  # the median of the logit-normal law is s(4.63, 1/2)


def test_shift_first_then_the_plateau():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted_afterwards = time_shift(PlateauLogitNormal().icdf(u), 4.63)
    assert (PlateauLogitNormal(shift=4.63).icdf(u) - shifted_afterwards).abs().max() > 0.02
    torch.testing.assert_close(LogitNormal(shift=4.63).icdf(u), time_shift(LogitNormal().icdf(u), 4.63))


@pytest.mark.parametrize("a", [0.3, 1.0, 1.78, 6.93])
def test_shift_inverts(a):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(time_shift(time_shift(t, a), 1 / a), t, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.logit(time_shift(t[1:-1], a)), torch.logit(t[1:-1]) + math.log(a))


def test_sampling_times():
    times = sampling_times(50, 6.93)
    assert times.shape == (51,) and times.dtype == torch.float64 and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all() and times[25].item() == pytest.approx(6.93 / 7.93)
    torch.testing.assert_close(sampling_times(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))


def test_shifts_of_widths():
    assert [shift_for(c) for c in (16, 64, 256)] == [1, 2, 4] and shift_for(768) == pytest.approx(6.93, abs=2e-3)
    for channels, shifts in AUTO_SHIFTS.items():
        assert auto_shifts(channels) == shifts
    assert auto_shifts(8) == AUTO_SHIFTS[16] and auto_shifts(2048) == AUTO_SHIFTS[768]
    train, sample = auto_shifts(32)
    assert (train, sample) == pytest.approx((math.sqrt(1.78), 2.95))
    assert all(a <= b for a, b in AUTO_SHIFTS.values())


def test_mu_of_flux():
    assert (math.exp(flux1_mu(256)), math.exp(flux1_mu(4096))) == pytest.approx((1.65, 3.16), abs=5e-3)
    table = {(256, 4): 7.14, (256, 50): 5.06, (1024, 4): 7.62, (1024, 50): 5.49, (4096, 4): 9.89, (4096, 50): 7.56}
    for (tokens, steps), shift in table.items():
        assert math.exp(flux2_mu(tokens, steps)) == pytest.approx(shift, abs=6e-3)
    assert flux2_mu(4301, 4) == flux2_mu(4301, 200)


def test_uniform_warns_once_that_it_is_the_baseline():
    code = """
import warnings
from flux2.schedules import UniformLaw
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    UniformLaw(), UniformLaw(shift=2.0)
print([str(w.message)[:38] for w in caught], caught[0].filename)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert out.stdout.startswith("['uniform timesteps are the baseline: Lo'] <string>"), out.stderr


def test_a_sampling_shift_below_training_s_warns():
    with pytest.warns(UserWarning, match=r"sampling shift 1 is below the training shift 4\.63"):
        check_shifts(4.63, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_shifts(4.63, 4.63)
        check_shifts(*auto_shifts(128))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_shift(torch.ones(1), 0), "shift: expected a positive number, got 0"),
        (lambda: LogitNormal(sigma=-1.0), "sigma: expected a positive number, got -1"),
        (lambda: PlateauLogitNormal(shift=math.inf), "shift: expected a positive number, got inf"),
        (lambda: UniformLaw(shift=math.nan), "shift: expected a positive number, got nan"),
        (lambda: sampling_times(0), "num_steps: expected 1 or more, got 0"),
        (lambda: shift_for(0), "channels_per_token: expected a positive number, got 0"),
        (lambda: schedules.LogitNormal().sample(3, seed=-1), r"seed: expected a number in \[0, 2\^64\), got -1"),
    ],
)
def test_errors_name_expected_and_got(call, message):
    with pytest.raises(ValueError, match=message):
        call()
