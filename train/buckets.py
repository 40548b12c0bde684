"""Aspect buckets: a few shapes of about one area and batches of one shape each, instead of squares alone."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

WIDEST = 2.0  # ratio of the sides of the outermost buckets


def bucket_shapes(num: int, *, resolution: int, multiple: int) -> list[tuple[int, int]]:
    """At most `num` shapes (height, width), tall to wide: about resolution^2 pixels, sides multiples of `multiple`.

    Their ratios are evenly spaced in logarithm from 1 : WIDEST to WIDEST : 1; shapes that round alike count once.
    """
    if num < 1 or resolution % multiple:
        raise ValueError(f"buckets: expected 1 or more, of a multiple of {multiple} pixels, got {num}, {resolution}")
    shapes = []
    for i in range(num):
        ratio = WIDEST ** (2 * i / (num - 1) - 1) if num > 1 else 1.0
        width = max(1, round(resolution * math.sqrt(ratio) / multiple)) * multiple
        height = max(1, round(resolution * resolution / width / multiple)) * multiple
        shapes.append((height, width))
    return list(dict.fromkeys(shapes))


def nearest_bucket(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> int:
    """Index of the shape whose ratio is nearest, in logarithm, to that of a picture's (height, width)."""
    wanted = math.log(size[1] / size[0])
    return min(range(len(shapes)), key=lambda i: abs(math.log(shapes[i][1] / shapes[i][0]) - wanted))


def read_sizes(size_of, num: int, *, threads: int = 8) -> list[tuple[int, int]]:
    """size_of(i) of `num` pictures, from their headers, saying how far it is; (1, 1) of those that cannot be read."""

    def one(index: int) -> tuple[int, int]:
        try:
            return size_of(index)
        except ValueError:  # a bad picture: training passes over it, and lists it
            return 1, 1

    sizes: list[tuple[int, int]] = []
    told = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for size in pool.map(one, range(num)):
            sizes.append(size)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"sizes of pictures: {len(sizes):,} of {num:,}", file=sys.stderr, flush=True)
    return sizes


class BucketOrder:
    """Which picture sample `sample` of step `step` is, where each batch is of one bucket.

    An epoch is every bucket's pictures in a fresh random order, cut into batches, these in random order. A bucket's
    last batch is filled up from the beginning of its order, so that each picture comes once an epoch, and those that
    fill up twice (or more, in a bucket of less than half a batch).
    """

    def __init__(self, buckets: Sequence[int], *, batch: int, seed: int) -> None:
        self.buckets, self.batch, self.seed = list(buckets), batch, seed
        self._members = [np.flatnonzero(np.asarray(buckets) == b) for b in range(max(buckets) + 1)]
        self.steps = sum(-(-len(m) // batch) for m in self._members)  # of an epoch
        self._epoch = lru_cache(maxsize=2)(self._epoch_of)

    def __getstate__(self) -> dict:  # caches do not travel to worker processes
        return {"buckets": self.buckets, "batch": self.batch, "seed": self.seed}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _epoch_of(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """(each bucket's order, rows of (bucket, position of its first sample) of the epoch's batches in order)"""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        orders = [random.permutation(m) for m in self._members]
        batches = [(b, first) for b, m in enumerate(self._members) for first in range(0, len(m), self.batch)]
        return orders, random.permutation(np.array(batches))

    def bucket_of(self, step: int) -> int:
        epoch, position = divmod(step, self.steps)
        return int(self._epoch(epoch)[1][position][0])

    def index_of(self, step: int, sample: int, after: int = 0) -> int:
        """The picture; with `after`, the one so many places later in its bucket's order, the end followed by the
        beginning."""
        epoch, position = divmod(step, self.steps)
        orders, batches = self._epoch(epoch)
        bucket, first = batches[position]
        return int(orders[bucket][(first + sample + after) % len(orders[bucket])])

    def length_of(self, step: int) -> int:
        """Pictures that a step's samples are out of."""
        return len(self._members[self.bucket_of(step)])
