"""Distances between two sets of feature vectors: Frechet, kernel (MMD), precision and recall; and the inception score.

A Frechet distance falls with the number of pictures even where nothing else changes: two of them compare only at equal
numbers and equal features.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1024  # rows of a matrix of distances that are held at a time


class Moments:
    """Mean and covariance of rows seen in batches, in fp64: Chan's merge of centred sums, so nothing cancels.

    dim: D. device: where the sums lie; it needs fp64. count: rows so far; mean: fp64 [D]; cov: fp64 [D, D], unbiased.
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"moments: expected a positive width, got {dim}")
        self.dim, self.count = dim, 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean) (x - mean)^T

    @property
    def cov(self) -> Tensor:
        """fp64 [D, D], divided by count - 1. ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"covariance: expected at least 2 rows, got {self.count}")
        return self.scatter / (self.count - 1)

    def add(self, x: Tensor) -> None:
        """Takes rows [N, D] in, N >= 0. ValueError on another width, or where one is not finite."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"moments: expected rows [N, {self.dim}], got {list(x.shape)}")
        if not len(x):
            return
        x = x.detach().to(self.mean.device, torch.float64)
        if bad := int((~torch.isfinite(x)).any(1).sum()):
            raise ValueError(f"moments: expected finite features, got {bad} of {len(x)} rows with NaN or infinity")
        mean = x.mean(0)
        centred = x - mean
        self._merge(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Takes in what `other` has seen. ValueError on another width."""
        if other.dim != self.dim:
            raise ValueError(f"moments: expected width {self.dim}, got {other.dim}")
        self._merge(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not total:
            return
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * (count / total))
        self.count = total

    def all_reduce(self) -> None:
        """Gives every process of torch.distributed the moments of all; does nothing where it is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        home = self.mean.device
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else home
        count = torch.tensor([self.count], dtype=torch.int64, device=device)
        dist.all_reduce(count)
        total = int(count)
        if not total:
            return
        mean = self.mean.to(device) * (self.count / total)
        dist.all_reduce(mean)
        delta = self.mean.to(device) - mean
        scatter = self.scatter.to(device) + self.count * torch.outer(delta, delta)
        dist.all_reduce(scatter)
        self.count, self.mean, self.scatter = total, mean.to(home), scatter.to(home)

    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` takes, for a file: count (int64), mean, scatter."""
        return {"count": torch.tensor(self.count), "mean": self.mean.cpu(), "scatter": self.scatter.cpu()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """From `tensors()`. ValueError on missing names, wrong shapes or values that are not finite."""
        if missing := {"count", "mean", "scatter"} - tensors.keys():
            raise ValueError(f"moments: expected count, mean and scatter, missing {', '.join(sorted(missing))}")
        count, mean, scatter = tensors["count"], tensors["mean"], tensors["scatter"]
        if count.numel() != 1 or count.is_floating_point() or int(count) < 0:
            raise ValueError(f"moments: expected a count of at least 0, got {count.tolist()} ({count.dtype})")
        return cls._of(mean, scatter, int(count), "scatter")

    @classmethod
    def from_mean_cov(cls, mean: Tensor, cov: Tensor, count: int) -> Moments:
        """From a mean [D] and an unbiased covariance [D, D] of `count` rows. ValueError as `from_tensors`."""
        if count < 2:
            raise ValueError(f"moments: a covariance needs a count of at least 2 rows, got {count}")
        return cls._of(mean, cov.double() * (count - 1), count, "covariance")

    @classmethod
    def _of(cls, mean: Tensor, scatter: Tensor, count: int, what: str) -> Moments:
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
            shapes = f"{list(mean.shape)} and {list(scatter.shape)}"
            raise ValueError(f"moments: expected a mean [D] and a {what} [D, D], got {shapes}")
        if not (torch.isfinite(mean).all() and torch.isfinite(scatter).all()):
            raise ValueError(f"moments: expected a finite mean and {what}, got NaN or infinity")
        moments = cls(len(mean))
        moments.count = count
        moments.mean, moments.scatter = mean.detach().double().cpu(), scatter.detach().double().cpu()
        return moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), at least 0.

    With cov = L L^T the last trace is the sum of the singular values of L_a^T L_b: no root of a product is taken, and
    a singular covariance, which fewer rows than D always give, needs no care. ValueError if widths differ, below two
    rows, or where a value is not finite.
    """
    if a.dim != b.dim:
        raise ValueError(f"Frechet distance: expected equal widths, got {a.dim} and {b.dim}")
    for name, moments in (("first", a), ("second", b)):
        if moments.count < 2:
            raise ValueError(f"Frechet distance: expected at least 2 rows, got {moments.count} in the {name} set")
        if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.scatter).all()):
            raise ValueError(f"Frechet distance: the {name} set's moments hold NaN or infinity")
    mean = (a.mean - b.mean.to(a.mean.device)).square().sum()
    cov_a, cov_b = a.cov, b.cov.to(a.mean.device)
    cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    return max(0.0, float(mean + cov_a.trace() + cov_b.trace() - 2 * cross))


def _factor(cov: Tensor) -> Tensor:
    """L [D, r] with L L^T = cov; r drops what rounding alone makes of eigenvalues that are 0."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)  # ascending
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def kernel_distance(x: Tensor, y: Tensor, *, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and standard deviation, over random subsets, of the unbiased squared MMD.

    x, y: features [N, D], [M, D]. The kernel is (x.y / D + 1)^3, in fp64. Subsets are drawn without replacement by
    NumPy's RandomState(seed), x's then y's, as torch-fidelity draws them. May be below 0 for sets that are alike.
    ValueError on other shapes, NaN, or where a set has fewer rows than a subset.
    """
    _check_rows("kernel distance", x, y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"kernel distance: expected a subset size from 2 to the smaller set's rows, got {subset_size} of {len(x)}"
            f" and {len(y)}"
        )
    if subsets < 1:
        raise ValueError(f"kernel distance: expected at least 1 subset, got {subsets}")
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        rows_x, rows_y = (rng.choice(len(z), subset_size, replace=False) for z in (x, y))
        values.append(_squared_mmd(x[torch.from_numpy(rows_x)].double(), y[torch.from_numpy(rows_y)].double()))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased, of two sets of m rows each."""
    m, width = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (m * (m - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def inception_score(logits: Tensor, splits: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over `splits` parts of exp(E KL(p(class | picture) || p(class))), in fp64.

    logits: [N, classes], without the classifier's bias, as the published scores have it. Rows are shuffled by NumPy's
    RandomState(seed) first, as in torch-fidelity. ValueError on another shape, fewer rows than parts, or NaN.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(
            f"inception score: expected logits [N, classes] of at least {max(splits, 1)} rows and 1 part, got"
            f" {list(logits.shape)} and {splits} parts"
        )
    if not torch.isfinite(logits).all():
        raise ValueError("inception score: expected finite logits, got NaN or infinity")
    order = np.random.RandomState(seed).permutation(len(logits))
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        log_mean = part.logsumexp(0) - np.log(len(part))
        scores.append(float((part.exp() * (part - log_mean)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): (share of `fake` among `real`, share of `real` among
    `fake`).

    A vector is among a set if it lies within the ball of one of its vectors, whose radius is the distance to that one's
    k-th nearest neighbour. real, fake: features [N, D], [M, D]. Distances in fp64, CHUNK rows at a time. ValueError on
    other shapes, NaN, or where a set has no k-th neighbour.
    """
    _check_rows("precision and recall", real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"precision and recall: expected k from 1 to one less than the smaller set's rows, got k = {k} of"
            f" {len(real)} and {len(fake)}"
        )
    real, fake = real.double(), fake.double()
    return _share_within(fake, real, k), _share_within(real, fake, k)


def _share_within(x: Tensor, centres: Tensor, k: int) -> float:
    radius = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(CHUNK)])
    within = [(torch.cdist(part, centres) <= radius).any(1) for part in x.split(CHUNK)]
    return float(torch.cat(within).double().mean())


def _check_rows(what: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{what}: expected features [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    for x in (a, b):
        if not torch.isfinite(x).all():
            raise ValueError(f"{what}: expected finite features, got NaN or infinity")
