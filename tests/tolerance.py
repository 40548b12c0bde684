"""The tolerance of every comparison of an op with its definition, in one place."""

import torch
from torch import Tensor


def assert_no_worse(got: Tensor, base: Tensor, truth: Tensor, *, ulps: float = 2.0) -> None:
    """got: the op; base: eager torch in got's dtype; truth: fp64. Errors against truth, as maximum and as rms.

    Got's error may be twice base's, plus `ulps` units in the last place of truth's own size; four times base's for
    fewer than 64 values, of which the largest error is a matter of luck for both. A NaN fails.
    """
    factor = 2.0 if truth.numel() >= 64 else 4.0
    assert got.shape == base.shape == truth.shape, f"{got.shape}, {base.shape}, {truth.shape}"
    assert got.dtype == base.dtype and truth.dtype == torch.float64, f"{got.dtype}, {base.dtype}, {truth.dtype}"
    for name, stat in (("max", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        error, reference = stat(got.double() - truth), stat(base.double() - truth)
        floor = ulps * torch.finfo(got.dtype).eps * stat(truth)
        # Not `assert not error > ...`: NaN must fail.
        assert error <= factor * reference + floor, (
            f"{name} error {error:.3e}, eager {reference:.3e}, floor {floor:.3e}"
        )
