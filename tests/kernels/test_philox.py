"""Philox4x32-10 against the published known answers; draws do not depend on the split, and have the right laws."""

import math

import pytest
import torch

from kernels.philox import normal, philox_4x32, philox_uint32, uniform

KNOWN = [  # Random123's kat_vectors: counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox_4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_counter_is_block_index_step_stream_and_key_the_seed_low_word_first():
    seed, step, index, stream = 0x299F31D0_A4093822, 0x13198A2E, 0x85A308D3, 0x03707344
    words = philox_uint32(seed, step, torch.tensor([index]), stream, 2)
    expected = philox_4x32(tuple(torch.tensor(c) for c in (1, index, step, stream)), (0xA4093822, 0x299F31D0))
    assert words[0, 4:].tolist() == [int(w) for w in expected]


def test_uniform_is_23_bits_at_half_steps():
    words = philox_uint32(5, 6, torch.arange(3), 0, 2)
    u = uniform(5, 6, 0, 3, 7)
    assert u.shape == (3, 7) and u.dtype == torch.float32
    assert torch.equal(u.double(), ((words[:, :7] >> 9).double() + 0.5) * 2.0**-23)
    assert u.min() > 0 and u.max() < 1


def test_rows_do_not_depend_on_the_split():
    whole = normal(1, 2, 0, (8, 3, 5, 5))
    parts = torch.cat([normal(1, 2, first, (2, 3, 5, 5)) for first in (0, 2, 4, 6)])
    assert torch.equal(whole, parts)
    assert torch.equal(normal(1, 2, 0, (8, 10))[:, :9], normal(1, 2, 0, (8, 9)))


@pytest.mark.parametrize("change", [{"seed": 8}, {"step": 8}, {"stream": 8}, {"first_index": 8}])
def test_every_coordinate_matters(change):
    base = {"seed": 1, "step": 2, "first_index": 3, "n": 4, "count": 16, "stream": 5}
    a, b = uniform(**base), uniform(**base | change)
    assert (a != b).float().mean() > 0.99


def test_box_muller_pairs():
    u, z = uniform(3, 4, 0, 2, 6), normal(3, 4, 0, (2, 6))
    radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
    torch.testing.assert_close(z[:, 0::2], radius * torch.cos(2 * math.pi * u[:, 1::2]))
    torch.testing.assert_close(z[:, 1::2], radius * torch.sin(2 * math.pi * u[:, 1::2]))


def test_laws():
    u = uniform(0, 0, 0, 1000, 1000).double().flatten()
    n = len(u)
    order = u.sort().values
    ks = (order - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)
    assert ks < 1.95  # Kolmogorov-Smirnov, p = 0.001
    z = normal(0, 1, 0, (1000, 1000)).double().flatten()
    cdf = torch.special.ndtr(z.sort().values)
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n) < 1.95
    assert abs(torch.corrcoef(torch.stack((z[:-1], z[1:])))[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize(
    ("seed", "step", "name"), [(-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "step"), (0, 2**32, "step")]
)
def test_ranges_are_named(seed, step, name):
    with pytest.raises(ValueError, match=f"{name}: expected a number in"):
        uniform(seed, step, 0, 1, 1)


@pytest.mark.parametrize(("first_index", "n"), [(-1, 2), (2**32, 1), (2**32 - 1, 2)])
def test_indices_are_32_bits(first_index, n):
    """A 33rd bit would leave the counter's word, and two samples would share their numbers or break the products."""
    with pytest.raises(ValueError, match="first_index: expected indices in"):
        uniform(0, 0, first_index, n, 1)
    assert uniform(0, 0, 2**32 - 1, 1, 4).shape == (1, 4)


def test_compiles_to_one_graph():
    compiled = torch.compile(normal, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(1, 2, 3, (2, 3, 5, 5)), normal(1, 2, 3, (2, 3, 5, 5)))
