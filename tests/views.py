"""Tensors as hypothesis draws them: any view of a larger one, and what kernels may say against it."""

import hypothesis.strategies as st
from gradients import DTYPES, randn
from torch import Tensor


@st.composite
def views(draw, max_rank: int = 3, min_rank: int = 0):
    """(x, groups): a tensor [N, C, *S] that is some view of a larger one (permuted, sliced, expanded), of any dtype."""
    rank = draw(st.integers(min_rank, max_rank))
    per_group, groups = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 3)), per_group * groups, *(draw(st.integers(1, 9)) for _ in range(rank))]
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    expanded = draw(st.sets(st.integers(0, rank + 1), max_size=2)) if draw(st.booleans()) else ()
    order = draw(st.permutations(range(len(shape))))
    sizes = [1 if i in expanded else shape[i] * steps[i] for i in range(len(shape))]
    x = randn([sizes[i] for i in order], DTYPES[draw(st.sampled_from(list(DTYPES)))])
    x = x.permute([order.index(i) for i in range(len(shape))])
    x = x[tuple(slice(None) if size == 1 else slice(None, None, step) for size, step in zip(sizes, steps, strict=True))]
    return x.expand(shape), groups


REFUSALS = ("walked", "expanded", "lie between")  # reasons against a kernel on a view


def settled(x: Tensor, groups: int) -> bool:
    """Whether the gradient of a norm of x is more than rounding: two values normalise to -1 and 1, equal ones to 0."""
    grouped = x.double().reshape(len(x), groups, -1)
    return grouped.shape[2] >= 8 and bool(grouped.var(2).min() > 0.01)
