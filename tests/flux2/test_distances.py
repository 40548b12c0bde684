"""Moments against NumPy's of the whole, distances against closed forms and loops."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.linalg import sqrtm

from flux2 import distances
from flux2.distances import Moments, frechet_distance, inception_score, kernel_distance, precision_recall
from flux2.tensor_files import load_tensors, save_tensors


def moments_of(*parts):
    moments = Moments(parts[0].shape[1])
    for x in parts:
        moments.add(x)
    return moments


def gaussian(mean, cov):
    return Moments.from_mean_cov(torch.tensor(mean), torch.tensor(cov), 100)


def rows(num=97, dim=11, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mix + offset


# fp64 keeps the offset's 1e8 to 1e-8; sums of squares that cancel would leave nothing of a variance of 10.
@pytest.mark.parametrize(("offset", "atol"), [(0.0, 1e-12), (1e8, 1e-5)])
def test_moments_are_numpy_s_in_any_order(offset, atol):
    x = rows(offset=offset)
    parts = [x[:1], x[1:40], x[40:40], x[40:55], x[55:]]
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        one_by_one = moments_of(*(parts[i] for i in order))
        merged = Moments(11)
        for group in (order[:2], order[2:]):
            merged.merge(moments_of(*(parts[i] for i in group)))
        merged.merge(Moments(11))
        for got in (one_by_one, merged):
            assert got.count == 97 and got.mean.dtype == got.cov.dtype == torch.float64
            np.testing.assert_allclose(got.mean.numpy(), x.numpy().mean(0), rtol=1e-14, atol=1e-14)
            np.testing.assert_allclose(got.cov.numpy(), np.cov(x.numpy(), rowvar=False), rtol=0, atol=atol)


def test_fp32_and_bf16_rows_are_summed_in_fp64():
    x = rows().to(torch.bfloat16)
    np.testing.assert_allclose(moments_of(x).cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12, atol=1e-12)
    leaf = rows().float().requires_grad_()
    assert not moments_of(leaf).mean.requires_grad


def reduce_shares(rank, folder):
    """What each of two processes does; the second has a share of one row, none, and none again"""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, empty = rows(), rows()[:0]
    found = {}
    for i, shares in enumerate(((x[:60], x[60:]), (x, x[:0]), (empty, empty))):
        moments = moments_of(shares[rank])
        moments.all_reduce()
        found |= {f"{i}.{k}": v for k, v in moments.tensors().items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_moments_of_all(tmp_path):
    mp.start_processes(reduce_shares, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    expected = moments_of(rows())
    for i in (0, 1):
        assert first[f"{i}.count"] == 97
        torch.testing.assert_close(first[f"{i}.mean"], expected.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(first[f"{i}.scatter"], expected.scatter, rtol=1e-12, atol=1e-11)
    assert first["2.count"] == 0


def test_one_process_reduces_to_itself():
    moments = moments_of(rows())
    before = moments.tensors()
    moments.all_reduce()
    assert all(torch.equal(v, before[k]) for k, v in moments.tensors().items())


def test_moments_through_a_file(tmp_path):
    moments = moments_of(rows())
    save_tensors(tmp_path / "m.safetensors", moments.tensors())
    tensors = load_tensors(tmp_path / "m.safetensors")[0]
    loaded = Moments.from_tensors(tensors)
    assert loaded.count == 97 and torch.equal(loaded.mean, moments.mean) and torch.equal(loaded.cov, moments.cov)
    again = Moments.from_mean_cov(moments.mean, moments.cov, 97)
    torch.testing.assert_close(again.scatter, moments.scatter, rtol=1e-14, atol=0)
    for changed, message in (
        ({"count": torch.tensor(-1)}, "count of at least 0, got -1"),
        ({"count": torch.tensor(1.5)}, "got 1.5"),
        ({"mean": torch.zeros(3)}, r"a mean \[D\] and a scatter \[D, D\], got \[3\] and \[11, 11\]"),
        ({"mean": torch.full((11,), math.nan)}, "finite mean"),
        ({"scatter": torch.full((11, 11), math.inf)}, "finite mean and scatter"),
    ):
        with pytest.raises(ValueError, match=message):
            Moments.from_tensors(tensors | changed)
    with pytest.raises(ValueError, match="missing mean, scatter"):
        Moments.from_tensors({"count": tensors["count"]})
    with pytest.raises(ValueError, match="count of at least 2 rows, got 1"):
        Moments.from_mean_cov(moments.mean, moments.cov, 1)


def test_rows_that_are_refused():
    moments = Moments(4)
    for x, message in (
        (torch.zeros(3, 5), r"expected rows \[N, 4\], got \[3, 5\]"),
        (torch.zeros(4), r"got \[4\]"),
        (torch.tensor([[0, 0, 0, math.nan], [0, 0, 0, 0], [math.inf, 0, 0, 0]]), "got 2 of 3 rows with NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            moments.add(x)
    assert moments.count == 0
    with pytest.raises(ValueError, match="expected width 4, got 5"):
        moments.merge(Moments(5))
    with pytest.raises(ValueError, match="at least 2 rows, got 0"):
        _ = moments.cov
    with pytest.raises(ValueError, match="positive width, got 0"):
        Moments(0)


def test_frechet_of_gaussians_in_closed_form():
    """Diagonal: |m - n|^2 + sum (s_i - t_i)^2; with commuting covariances the same in their common basis."""
    a = gaussian([1.0, 2.0, 3.0], np.diag([4.0, 9.0, 0.25]))
    b = gaussian([1.0, 0.0, 3.5], np.diag([1.0, 16.0, 0.25]))
    expected = (4 + 0.25) + (1 + 1 + 0)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)
    turn = torch.linalg.qr(rows(3, 3))[0]
    turned = [Moments.from_mean_cov(turn @ m.mean, turn @ m.cov @ turn.T, 100) for m in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-12)
    one, other = gaussian([0.5], [[4.0]]), gaussian([-1.0], [[1.0]])
    assert frechet_distance(one, other) == pytest.approx(1.5**2 + 1, rel=1e-12)


def test_frechet_of_covariances_that_do_not_commute():
    a, b = moments_of(rows(seed=1)), moments_of(rows(seed=2, num=50))
    root = np.trace(sqrtm(a.cov.numpy() @ b.cov.numpy()).real)
    expected = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_of_singular_covariances():
    """Of rank 1, u u^T and w w^T: |u|^2 + |w|^2 - 2 |u.w|. A constant set has no covariance at all."""
    u, w = np.array([3.0, 0.0, 4.0, 0.0]), np.array([1.0, 2.0, -2.0, 0.0])
    a, b = gaussian([0.0] * 4, np.outer(u, u)), gaussian([0.0] * 4, np.outer(w, w))
    assert frechet_distance(a, b) == pytest.approx(25 + 9 - 2 * 5, rel=1e-12)
    constant = moments_of(torch.ones(5, 4))
    assert frechet_distance(constant, a) == pytest.approx(4 + 25, rel=1e-12)
    assert frechet_distance(constant, constant) == 0
    few, wide = rows(6, 40, seed=3), rows(9, 40, seed=4)  # fewer rows than columns
    got = frechet_distance(moments_of(few), moments_of(wide))
    cov = [np.cov(x.numpy(), rowvar=False) for x in (few, wide)]
    root = np.sqrt(np.linalg.eigvals(cov[0] @ cov[1]).astype(complex)).real.sum()
    mean = ((few.mean(0) - wide.mean(0)) ** 2).sum()
    assert got == pytest.approx(float(mean) + np.trace(cov[0]) + np.trace(cov[1]) - 2 * root, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_frechet_to_itself_is_nothing_and_never_less(scale):
    for num in (5, 30, 97):
        a = moments_of(rows(num, 20, seed=num) * scale)
        assert 0 <= frechet_distance(a, a) <= 1e-12 * float(a.cov.trace())


def test_frechet_refuses():
    good = moments_of(rows())
    with pytest.raises(ValueError, match="equal widths, got 11 and 3"):
        frechet_distance(good, Moments(3))
    with pytest.raises(ValueError, match="at least 2 rows, got 1 in the second set"):
        frechet_distance(good, moments_of(rows()[:1]))
    bad = moments_of(rows())
    bad.mean[3] = math.nan
    with pytest.raises(ValueError, match="the first set's moments hold NaN"):
        frechet_distance(bad, good)


def loop_mmd(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m = len(x)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / m**2


def test_kernel_distance_is_a_loop_over_pairs():
    x, y = rows(12, 5, seed=1), rows(12, 5, seed=2)
    mean, std = kernel_distance(x, y, subsets=3, subset_size=12, seed=0)  # all of both, in three orders
    assert mean == pytest.approx(loop_mmd(x, y), rel=1e-10) and std <= 1e-9 * mean
    mean, std = kernel_distance(x.float(), y.float(), subsets=20, subset_size=6, seed=0)
    assert std > 0 and (mean, std) == kernel_distance(x.float(), y.float(), subsets=20, subset_size=6, seed=0)
    assert mean != kernel_distance(x.float(), y.float(), subsets=20, subset_size=6, seed=1)[0]


def test_kernel_distance_is_unbiased():
    """Of two samples of one law it is 0 on average, below it half the time; a biased estimate never is."""
    values = [
        kernel_distance(torch.randn(40, 4), torch.randn(40, 4), subsets=1, subset_size=40, seed=0)[0] for _ in range(60)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 60**0.5 and min(values) < 0


def test_inception_score_in_closed_form():
    sure = 1e3 * torch.eye(7).repeat(6, 1)
    assert inception_score(sure, 1, 0) == pytest.approx((7, 0), rel=1e-9)
    assert inception_score(torch.randn(9).repeat(20, 1), 4, 0) == pytest.approx((1, 0), rel=1e-9)
    half = torch.tensor([[0.0, -1e3], [0.0, 0.0]])  # p = (1, 0), (1/2, 1/2); mean (3/4, 1/4)
    kl = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert inception_score(half, 1, 0)[0] == pytest.approx(math.exp(kl), rel=1e-12)
    one_row_a_part = inception_score(sure, 42, 0)
    assert one_row_a_part == pytest.approx((1, 0))
    logits = torch.randn(40, 10)
    by_seed = [inception_score(logits, 5, seed) for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2]


def loop_within(x, centres, k):
    radius = [sorted(float((a - b).norm()) for b in centres)[k] for a in centres]
    within = [any(float((a - b).norm()) <= r for b, r in zip(centres, radius, strict=True)) for a in x]
    return sum(within) / len(x)


def test_precision_and_recall_are_loops(monkeypatch):
    monkeypatch.setattr(distances, "CHUNK", 7)
    real, fake = torch.randn(41, 3, dtype=torch.float64), 0.4 + 0.7 * torch.randn(30, 3, dtype=torch.float64)
    for k in (1, 3):
        expected = loop_within(fake, real, k), loop_within(real, fake, k)
        assert 0 < expected[1] < expected[0] < 1
        assert precision_recall(real, fake, k) == pytest.approx(expected)


def test_precision_and_recall_say_which_way():
    real = torch.arange(20.0).view(-1, 1)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1e3) == (0, 0)
    narrow = torch.linspace(0, 4, 20).view(-1, 1)  # a quarter of what there is; radii of 0.63 at most
    assert precision_recall(real, narrow) == (1, 5 / 20)
    assert precision_recall(narrow, real) == (5 / 20, 1)


def test_precision_and_recall_far_from_the_origin():
    """In fp32, distances of 1 at an offset of 1e4 are lost in the squares."""
    real, fake = torch.randn(60, 8), torch.randn(60, 8)
    real, fake = (real * 64).round() / 64, (fake * 64).round() / 64  # exact in fp32 with the offset
    assert precision_recall(real + 1e4, fake + 1e4) == precision_recall(real, fake)


def test_what_sets_are_refused():
    x = torch.randn(10, 4)
    spoiled = x.clone()
    spoiled[0, 0] = math.nan
    for call in (
        lambda a, b: kernel_distance(a, b, subsets=1, subset_size=2, seed=0),
        lambda a, b: precision_recall(a, b),
    ):
        with pytest.raises(ValueError, match=r"expected features \[N, D\] and \[M, D\], got \[10, 4\] and \[10, 3\]"):
            call(x, x[:, :3])
        with pytest.raises(ValueError, match="finite features"):
            call(x, spoiled)
    with pytest.raises(ValueError, match="smaller set's rows, got 6 of 10 and 5"):
        kernel_distance(x, x[:5], subsets=1, subset_size=6, seed=0)
    with pytest.raises(ValueError, match="at least 1 subset, got 0"):
        kernel_distance(x, x, subsets=0, subset_size=4, seed=0)
    with pytest.raises(ValueError, match="got k = 3 of 10 and 3"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match=r"got \[10, 4\] and 11 parts"):
        inception_score(x, 11, 0)
    with pytest.raises(ValueError, match="expected finite"):
        inception_score(spoiled, 2, 0)
