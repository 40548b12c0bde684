"""Triton's interpreter, made to add as a GPU does."""

import numpy as np


def add_as_a_tree() -> None:
    """tl.sum in halves, as threads and warps do; numpy adds along an axis one by one, with errors no GPU makes."""
    from triton.runtime.interpreter import ReduceOps

    def tree_sum(self, input):
        data = np.moveaxis(np.asarray(input.handle.data), self.axis or 0, 0)
        while len(data) > 1:  # blocks are powers of two
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        return self.to_tensor(np.expand_dims(data[0], self.axis) if self.keep_dims else data[0], input.dtype)

    ReduceOps.sum = tree_sum
