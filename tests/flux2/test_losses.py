"""Losses against independent computations: numpy for the pyramid, closed forms for the rest."""

import math

import numpy as np
import pytest
import torch

from flux2.autoencoder import Posterior
from flux2.losses import (
    LogVariance,
    charbonnier,
    kl,
    kl_weight_from_ldm,
    l1,
    l2,
    laplacian_loss,
    laplacian_pyramid,
)


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


@pytest.mark.parametrize("loss", [l1, l2, charbonnier, laplacian_loss])
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


def test_pixel_losses_equal_numpy():
    a, b = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    error = a.numpy() - b.numpy()
    assert l2(a, b).item() == pytest.approx(np.square(error).mean(), rel=1e-6)
    assert charbonnier(a, b).item() == pytest.approx(np.mean(np.sqrt(error**2 + 1e-6) - 1e-3), rel=1e-5)
    assert charbonnier(a, a).item() == 0
    x = torch.full((1, 3, 4, 4), 1e-3, requires_grad=True)
    (gradient,) = torch.autograd.grad(charbonnier(x, torch.zeros_like(x)), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 0.5**0.5 / x.numel()))  # e / sqrt(e^2 + eps^2) at e = eps


def moments(mean, std):
    return torch.cat((mean, 2 * std.log()), dim=1)


def test_kl_equals_torch_distributions_and_has_its_gradient():
    mean, std = torch.randn(2, 4, 3, 3), torch.rand(2, 4, 3, 3) + 0.1
    normal = torch.distributions.Normal(mean, std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl(Posterior(moments(mean, std))), expected.mean())
    leaf = moments(mean, std).requires_grad_()
    kl(Posterior(leaf)).backward()
    of_mean, of_logvar = leaf.grad.chunk(2, 1)
    torch.testing.assert_close(of_mean, mean / mean.numel())
    torch.testing.assert_close(of_logvar, 0.5 * (std**2 - 1) / mean.numel())


def test_free_bits_leave_cheap_channels_alone():
    """Channel 0 costs 2 nats an element, channel 1 nothing: with 1 bit free it counts as ln 2 and has no gradient"""
    leaf = torch.zeros(2, 4, 3, 3)
    leaf[:, 0] = 2.0
    leaf.requires_grad_()
    loss = kl(Posterior(leaf), free_bits=1.0)
    assert loss.item() == pytest.approx((2.0 + math.log(2)) / 2, rel=1e-6)
    loss.backward()
    assert (leaf.grad[:, 0] > 0).all() and leaf.grad[:, 1].abs().max() == 0
    assert kl(Posterior(leaf), free_bits=4.0).item() == pytest.approx(4 * math.log(2), rel=1e-6)


def test_ldm_weight_is_that_of_its_summed_loss():
    """LDM: sum |error| + 1e-6 sum KL, of one image; ours times the count of pixel values is the same number"""
    recon, x = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    posterior = Posterior(torch.randn(1, 8, 8, 8))
    mean, logvar = posterior.mean, posterior.logvar
    summed = (recon - x).abs().sum() + 1e-6 * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
    ours = l1(recon, x) + kl_weight_from_ldm(1e-6, z_channels=4, downsample=8) * kl(posterior)
    torch.testing.assert_close(ours * x.numel(), summed)
    assert kl_weight_from_ldm(1e-6, z_channels=4, downsample=8) == pytest.approx(2.083e-8, rel=1e-3)


def test_log_variance_ends_at_the_logarithm_of_the_loss():
    module, loss = LogVariance(), torch.tensor(0.2)
    assert module(loss).item() == pytest.approx(0.2)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        module(loss).backward()
        optimiser.step()
    assert module.logvar.item() == pytest.approx(math.log(0.2), rel=1e-3)
    x = loss.clone().requires_grad_()
    module(x).backward()
    assert x.grad.item() == pytest.approx(1 / 0.2, rel=1e-3)
