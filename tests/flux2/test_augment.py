"""Each operation of DiffAug against a loop over pixels; the gradient against finite differences."""

import numpy as np
import pytest
import torch

from flux2.augment import DIFFAUG_DRAWS, DiffAug

OFF = {"translation": 0.0, "brightness": 0.0, "saturation": 0.0, "contrast": 0.0, "cutout": 0.0}


def pictures(n=3, h=16, w=24):
    """Pixels and draws in fp64; no two draws alike."""
    x = torch.rand(n, 3, h, w, dtype=torch.float64) * 2 - 1
    return x, torch.rand(n, DIFFAUG_DRAWS, dtype=torch.float64)


def test_translation_equals_a_loop():
    x, draws = pictures(8)
    got, shifts = DiffAug(**OFF | {"translation": 0.125})(x, draws), set()
    for n in range(8):
        down = int(draws[n, 3].item() * 5) - 2  # 16 * 0.125 = 2 pixels either way
        right = int(draws[n, 4].item() * 7) - 3
        shifts.add((down, right))
        for i in range(16):
            for j in range(24):
                inside = 0 <= i - down < 16 and 0 <= j - right < 24
                expected = x[n, :, i - down, j - right] if inside else torch.zeros(3)
                assert torch.equal(got[n, :, i, j], expected.double())
    assert len(shifts) > 4


def test_translation_takes_every_length_and_no_other():
    x, draws = torch.ones(7, 1, 24, 24), torch.full((7, DIFFAUG_DRAWS), 0.5)
    draws[:, 3] = torch.tensor([2.0**-24, 1.5 / 7, 2.5 / 7, 3.5 / 7, 4.5 / 7, 5.5 / 7, 1 - 2.0**-24])
    moved = DiffAug(**OFF | {"translation": 0.125})(x, draws)
    assert [int(p[0, :12].sum(0)[0]) for p in moved] == [12, 12, 12, 12, 11, 10, 9]
    assert [int(p[0, 12:].sum(0)[0]) for p in moved] == [9, 10, 11, 12, 12, 12, 12]


@pytest.mark.parametrize(
    ("name", "strength", "column"), [("brightness", 0.5, 5), ("saturation", 1.0, 6), ("contrast", 0.5, 7)]
)
def test_colours_equal_numpy(name, strength, column):
    x, draws = pictures()
    got = DiffAug(**OFF | {name: strength})(x, draws).numpy()
    for n, picture in enumerate(x.numpy()):
        u = draws[n, column].item()
        if name == "brightness":
            expected = picture + (u - 0.5)  # in +-0.5
        elif name == "saturation":
            grey = picture.mean(0)
            expected = np.stack([grey + 2 * u * (plane - grey) for plane in picture])  # times 0 to 2
        else:
            expected = picture.mean() + (0.5 + u) * (picture - picture.mean())  # times 0.5 to 1.5
        np.testing.assert_allclose(got[n], expected, atol=1e-12)


@pytest.mark.parametrize("share", [0.25, 0.2])  # an even hole, 4 by 6 pixels, and an odd one, 3 by 5
def test_cutout_equals_a_loop(share):
    x, draws = pictures(8)
    got = DiffAug(**OFF | {"cutout": share})(x, draws)
    height, width = int(16 * share + 0.5), int(24 * share + 0.5)
    for n in range(8):
        top = int(draws[n, 8].item() * (16 + 1 - height % 2)) - height // 2
        left = int(draws[n, 9].item() * (24 + 1 - width % 2)) - width // 2
        expected = x[n].clone()
        for i in range(max(0, top), min(16, top + height)):
            for j in range(max(0, left), min(24, left + width)):
                expected[:, i, j] = 0
        assert torch.equal(got[n], expected) and not torch.equal(got[n], x[n])


def test_order_is_translation_colour_cutout():
    x, draws = pictures()
    every = DiffAug(cutout=0.25)(x, draws)
    steps = x
    for name in OFF:
        steps = DiffAug(**OFF | {name: getattr(DiffAug(cutout=0.25), name)})(steps, draws)
    torch.testing.assert_close(every, steps, rtol=0, atol=0)


def test_defaults_are_those_of_rae():
    assert vars(DiffAug()) == {
        "probability": 1.0,
        "translation": 0.125,
        "brightness": 0.5,
        "saturation": 1.0,
        "contrast": 0.5,
        "cutout": 0.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("off", [DiffAug(**OFF), DiffAug(probability=0.0, cutout=0.5)])
def test_identity_to_the_bit(off, dtype):
    x, draws = pictures()
    x = x.to(dtype)
    got = off(x, draws.float())
    assert got.dtype == dtype and torch.equal(got, x)


def test_bf16_is_rounded_once():
    x, draws = pictures()
    x, draws = x.bfloat16(), draws.float()
    assert torch.equal(DiffAug()(x, draws), DiffAug()(x.float(), draws).bfloat16())


def test_each_gate_opens_one_operation():
    x, draws = pictures(3)
    draws[:, :3], draws[:, 3:] = 0.9, 0.9
    for gate in range(3):
        draws[gate, gate] = 0.1
    got = DiffAug(probability=0.5, cutout=0.25)(x, draws)
    for n, names in enumerate((("translation",), ("brightness", "saturation", "contrast"), ("cutout",))):
        alone = DiffAug(**OFF | {name: getattr(DiffAug(cutout=0.25), name) for name in names})(x, draws)
        assert torch.equal(got[n], alone[n]) and not torch.equal(got[n], x[n])


def test_pictures_do_not_depend_on_their_batch():
    x, draws = pictures(4)
    augment = DiffAug(cutout=0.25)
    torch.testing.assert_close(augment(x, draws)[1:3], augment(x[1:3], draws[1:3]), rtol=0, atol=0)


def test_gradient_equals_finite_differences():
    x = torch.rand(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    draws = torch.rand(2, DIFFAUG_DRAWS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: DiffAug(cutout=0.3)(p, draws), (x,))


def test_one_graph_of_the_same_values():
    augment = DiffAug(cutout=0.25)
    x, draws = pictures()
    values = []
    for f in (augment, torch.compile(augment, backend="aot_eager", fullgraph=True)):
        leaf = x.float().requires_grad_()
        y = f(leaf, draws.float())
        values.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_expected_and_got():
    x, draws = pictures()
    with pytest.raises(ValueError, match=r"draws \[N, 10\], got \[3, 3, 16, 24\] and \[3, 9\]"):
        DiffAug()(x, draws[:, :9])
    with pytest.raises(ValueError, match=r"got \[3, 16, 24\] and \[3, 10\]"):
        DiffAug()(x[0], draws)
    with pytest.raises(ValueError, match=r"cutout: expected a number in \[0, 1\], got 1.5"):
        DiffAug(cutout=1.5)
