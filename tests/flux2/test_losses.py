"""Losses against independent computations: numpy for the pyramid, closed forms for the rest."""

import numpy as np
import pytest
import torch

from flux2.losses import cosine_alignment, l1, laplacian_loss, laplacian_pyramid


def numpy_blur(x):
    """[h, w] -> binomial 5x5 filter by a double loop over taps, edges replicated"""
    taps = np.array([1, 4, 6, 4, 1]) / 16
    padded = np.pad(x, 2, mode="edge")
    out = np.zeros_like(x)
    for i in range(5):
        for j in range(5):
            out += taps[i] * taps[j] * padded[i : i + x.shape[0], j : j + x.shape[1]]
    return out


def test_pyramid_equals_numpy():
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    bands = laplacian_pyramid(x, 3)
    assert [tuple(b.shape[-2:]) for b in bands] == [(16, 24), (8, 12), (4, 6)]
    current = x[1, 2].numpy()
    for band in bands[:-1]:
        low = numpy_blur(current)
        np.testing.assert_allclose(band[1, 2].numpy(), current - low, atol=1e-12)
        current = low[::2, ::2]
    np.testing.assert_allclose(bands[-1][1, 2].numpy(), current, atol=1e-12)


def test_laplacian_loss_is_the_mean_over_bands():
    a, b = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    expected = np.mean(
        [(p - q).abs().mean().item() for p, q in zip(laplacian_pyramid(a, 4), laplacian_pyramid(b, 4), strict=True)]
    )
    assert laplacian_loss(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert laplacian_loss(a, a).item() == 0


@pytest.mark.parametrize("loss", [l1, laplacian_loss])
def test_losses_do_not_depend_on_batch_and_have_gradients(loss):
    a, b = torch.randn(3, 3, 32, 32, requires_grad=True), torch.randn(3, 3, 32, 32)
    repeated = loss(a.repeat(2, 1, 1, 1), b.repeat(2, 1, 1, 1))
    torch.testing.assert_close(repeated, loss(a, b))
    (gradient,) = torch.autograd.grad(loss(a, b), a)
    step = 1e-3 * gradient / gradient.norm()
    slope = (loss(a.detach() + step, b) - loss(a.detach() - step, b)) / 2e-3
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_pyramid_refuses_small_sides():
    with pytest.raises(ValueError, match=r"4 levels need sides >= 16, got \[8, 32\]"):
        laplacian_loss(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))


def test_cosine_alignment_closed_forms():
    x = torch.randn(2, 5, 3, 3)
    assert cosine_alignment(x, 7 * x).item() == pytest.approx(0, abs=1e-6)
    assert cosine_alignment(x, -x).item() == pytest.approx(2, abs=1e-6)
    a, b = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    a[0, 0], b[0, 1] = 1.0, 2.0
    assert cosine_alignment(a, b).item() == 1.0
    zero = torch.zeros(1, 2, 1, 2, requires_grad=True)
    cosine_alignment(zero, b).backward()
    assert torch.isfinite(zero.grad).all()
    with pytest.raises(ValueError, match="shapes must be equal"):
        cosine_alignment(x, x[:1])
