"""Alignment losses against loops over positions, with gradients against finite differences."""

import math

import numpy as np
import pytest
import torch

from flux2.alignment import AlignmentHead, cosine_alignment, vf_loss


def test_head_maps_latents_to_tokens():
    assert AlignmentHead(128, 108)(torch.zeros(2, 128, 4, 5)).shape == (2, 108, 4, 5)


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
    with pytest.raises(ValueError, match="expected two equal shapes"):
        cosine_alignment(x, x[:1])


def loop_vf(p, t, m1, m2):
    """[N, D, h, w] twice -> marginal cosine plus marginal distance matrix, one pair at a time"""
    n = p.shape[0]
    p, t = (v.reshape(n, v.shape[1], -1).transpose(0, 2, 1) for v in (p, t))

    def cos(a, b):
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    size = p.shape[1]
    first = np.mean([max(0.0, 1 - m1 - cos(p[i, k], t[i, k])) for i in range(n) for k in range(size)])
    pairs = [
        max(0.0, abs(cos(p[i, j], p[i, k]) - cos(t[i, j], t[i, k])) - m2)
        for i in range(n)
        for j in range(size)
        for k in range(size)
    ]
    return first + np.mean(pairs)


@pytest.mark.parametrize("margins", [(0.5, 0.25), (0.0, 0.0)])
def test_vf_loss_equals_a_loop_over_pairs(margins):
    p, t = torch.randn(2, 6, 2, 3, dtype=torch.float64), torch.randn(2, 6, 2, 3, dtype=torch.float64)
    got = vf_loss(p, t, cosine_margin=margins[0], distance_margin=margins[1])
    assert got.item() == pytest.approx(loop_vf(p.numpy(), t.numpy(), *margins), rel=1e-5)
    assert vf_loss(t, t, cosine_margin=margins[0], distance_margin=margins[1]).item() == pytest.approx(0, abs=1e-6)


def test_vf_loss_has_the_gradient_of_its_value():
    p, t = torch.randn(1, 5, 2, 2, requires_grad=True), torch.randn(1, 5, 2, 2)
    (gradient,) = torch.autograd.grad(vf_loss(p, t), p)
    step = 1e-2 * gradient / gradient.norm()
    slope = (vf_loss(p + step, t) - vf_loss(p - step, t)) / 2e-2
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.02)


def test_vf_loss_is_content_inside_its_margins():
    t = torch.randn(1, 64, 2, 2)
    p = (t + 0.3 * torch.randn_like(t)).requires_grad_()
    loss = vf_loss(p, t, cosine_margin=0.5, distance_margin=0.25)
    assert loss.item() == 0
    loss.backward()
    assert p.grad.abs().max() == 0


def test_tokens_that_are_zero_are_safe():
    p, t = torch.zeros(1, 3, 2, 2, requires_grad=True), torch.randn(1, 3, 2, 2)
    loss = vf_loss(p, t)
    loss.backward()
    assert torch.isfinite(loss) and p.grad.abs().max() == 0
