"""HOG teacher against a loop over pixels, and against pictures whose orientation is known."""

import math

import numpy as np
import pytest
import torch

from flux2.alignment import HOG_BINS, AlignmentHead, HOGTeacher


def loop_hog(plane, eps):
    """[8, 8] plane with a replicated border -> centred histogram of 9 bins, one pixel at a time"""
    padded = np.pad(plane, 1, mode="edge")
    votes = np.zeros(HOG_BINS)
    for i in range(8):
        for j in range(8):
            gx = (padded[i + 1, j + 2] - padded[i + 1, j]) / 2
            gy = (padded[i + 2, j + 1] - padded[i, j + 1]) / 2
            position = (math.atan2(gy, gx) % math.pi) / math.pi * HOG_BINS
            low = int(position) % HOG_BINS
            part = position - int(position)
            votes[low] += math.hypot(gx, gy) * (1 - part)
            votes[(low + 1) % HOG_BINS] += math.hypot(gx, gy) * part
    votes /= 64
    votes /= math.sqrt((votes**2).sum() + eps**2)
    return votes - votes.mean()


def test_tokens_equal_a_loop_over_pixels():
    teacher = HOGTeacher(patch=8)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    tokens = teacher(x)
    assert tokens.shape == (1, teacher.channels, 1, 1) == (1, 27, 1, 1)
    for c in range(3):
        expected = loop_hog(x[0, c].double().numpy(), teacher.eps)
        np.testing.assert_allclose(tokens[0, 9 * c : 9 * c + 9, 0, 0].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("bin_index", [0, 2, 5, 8])
def test_gradient_direction_lands_in_its_bin(bin_index):
    angle = math.pi * bin_index / HOG_BINS
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = (columns * math.cos(angle) + rows * math.sin(angle)) / 32
    cells = HOGTeacher(patch=8)(ramp.expand(1, 3, 16, 16))[0, :9, 0, 0]
    assert cells.argmax().item() == bin_index


def test_flat_pictures_and_shapes():
    teacher = HOGTeacher(patch=16)
    assert teacher(torch.zeros(2, 3, 32, 48)).abs().max() == 0
    assert teacher(torch.rand(2, 3, 32, 48)).shape == (2, 108, 2, 3)
    with pytest.raises(ValueError, match="multiples of 16, got 24x32"):
        teacher(torch.zeros(1, 3, 24, 32))
    with pytest.raises(ValueError, match="multiple of 8"):
        HOGTeacher(patch=12)


def test_head_maps_latents_to_tokens():
    assert AlignmentHead(128, 108)(torch.zeros(2, 128, 4, 5)).shape == (2, 108, 4, 5)
