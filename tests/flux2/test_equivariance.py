"""EQ-VAE's transforms: geometry against known pictures, and what the draw makes of its uniforms."""

import pytest
import torch
import torch.nn.functional as F

from flux2.equivariance import Transform, draw


def test_quarter_turns_move_pixels_as_positions():
    """A latent that is the picture's mean over blocks turns into the turned picture's mean over blocks."""
    x = torch.randn(1, 3, 16, 32)
    z = F.avg_pool2d(x, 8)
    for turns in range(4):
        transform = Transform(turns=turns)
        sides = transform.sides(*z.shape[2:])
        assert sides == ((2, 4), (4, 2))[turns % 2]
        moved = transform(x, (8 * sides[0], 8 * sides[1]))
        torch.testing.assert_close(F.avg_pool2d(moved, 8), transform(z, sides))
    assert torch.equal(Transform(turns=1)(x, (32, 16))[0, 0, -1, 0], x[0, 0, 0, 0])  # counter-clockwise


def test_scaling_keeps_a_ramp_and_low_passes():
    ramp = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    small = Transform(scale=0.5)(ramp, (16, 16))
    torch.testing.assert_close(small[0, 0, 5, 2:-2], F.avg_pool2d(ramp, 2)[0, 0, 5, 2:-2], atol=1e-5, rtol=0)
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32)
    assert Transform(scale=0.5)(stripes, (16, 16))[0, 0, 5, 2:-2].abs().max() < 0.01  # not aliased
    assert Transform(scale=0.3).sides(8, 4) == (2, 1)


def test_gradient_flows_back():
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    Transform(scale=0.5, turns=1)(z, (4, 4)).sum().backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().min() > 0


def test_draw_is_a_function_of_its_uniforms():
    assert draw((0.5, 0.1), probability=0.5, scales=(1.0,)) is None
    assert draw((0.0, 0.1), probability=0.0, scales=(1.0,)) is None
    steps = [draw((0.1, (i + 0.5) / 1100), probability=0.5, scales=(0.5, 0.75, 1.0)) for i in range(1100)]
    found = {t: steps.count(t) for t in set(steps)}
    assert len(found) == 11 and Transform() not in found and set(found.values()) == {100}
    assert draw((0.1, 1.0), probability=1.0, scales=(0.5,)) == Transform(scale=0.5, turns=3)


@pytest.mark.parametrize("turns", [1, 3])
def test_turning_back_is_the_identity(turns):
    x = torch.randn(1, 2, 4, 6)
    there = Transform(turns=turns)(x, (6, 4))
    assert torch.equal(Transform(turns=4 - turns)(there, (4, 6)), x)
