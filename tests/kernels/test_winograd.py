"""Winograd's convolution: as close to the truth as the direct sum, and chosen only where nothing is learnt."""

import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch, norm_silu_conv2d, winograd


@pytest.fixture
def small(monkeypatch):
    """Small layers are taken, in chunks of a few rows."""
    for name, value in (("LEAST_IN", 1), ("LEAST_OUT", 1), ("LEAST_PIXELS", 1), ("CHUNK_BYTES", 20_000)):
        monkeypatch.setattr(winograd, name, value)


def relative(y, truth):
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    ("n", "c", "k", "h", "w"), [(1, 4, 4, 8, 8), (2, 3, 5, 9, 6), (1, 16, 8, 7, 13), (3, 2, 2, 1, 2), (1, 1, 1, 2, 1)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_definition(small, n, c, k, h, w, layout, has_bias):
    x, weight = torch.randn(n, c, h, w).to(memory_format=layout), torch.randn(k, c, 3, 3)
    bias = torch.randn(k) if has_bias else None
    truth = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    y = winograd.winograd_conv2d(x, weight, bias)
    assert y.shape == truth.shape and y.dtype == torch.float32 and relative(y, truth) < 1e-6


def test_is_as_close_to_the_truth_as_the_direct_sum():
    x, weight = torch.randn(1, 128, 64, 65), torch.randn(256, 128, 3, 3) / 34
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    direct = relative(F.conv2d(x, weight, padding=1), truth)
    assert relative(winograd.winograd_conv2d(x, weight, None), truth) < 2 * direct


@pytest.fixture
def taken(small, monkeypatch):
    """The convolutions that go through Winograd's"""
    from kernels import conv_block

    calls = []
    plain = conv_block.winograd_conv2d
    monkeypatch.setattr(conv_block, "winograd_conv2d", lambda *tensors: calls.append(1) or plain(*tensors))
    return calls


def arguments(learns=False):
    c = 8
    tensors = [torch.randn(2, c, 6, 6), torch.randn(c), torch.randn(c), torch.randn(c, c, 3, 3), torch.randn(c)]
    return [t.requires_grad_(learns) for t in tensors]


def test_is_chosen_where_nothing_is_learnt(taken):
    given = arguments(learns=True)
    y = norm_silu_conv2d(*given, num_groups=4)
    y.sum().backward()
    assert not taken
    with torch.no_grad():
        torch.testing.assert_close(norm_silu_conv2d(*given, num_groups=4), y, rtol=1e-4, atol=1e-4)
    assert len(taken) == 1
    norm_silu_conv2d(*(t.detach() for t in given), num_groups=4)
    assert len(taken) == 2


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 0}])
def test_other_convolutions_are_atens(taken, monkeypatch, options):
    monkeypatch.setattr(dispatch, "_LACKING", frozenset())  # a CPU that multiplies bf16
    norm_silu_conv2d(*arguments(), num_groups=4, **options)
    norm_silu_conv2d(*(t.bfloat16() for t in arguments()), num_groups=4)
    assert not taken


def test_sees_weights_that_change_behind_autograds_back(taken):
    given = arguments()
    norm_silu_conv2d(*given, num_groups=4)
    given[3].data.mul_(2)
    given[4].data.zero_()
    after = norm_silu_conv2d(*given, num_groups=4)
    truth = F.conv2d(F.silu(F.group_norm(given[0], 4, given[1], given[2], 1e-6)), given[3], padding=1)
    torch.testing.assert_close(after, truth, rtol=1e-4, atol=1e-4)


def test_one_graph_when_compiled(taken):
    given = arguments()
    compiled = torch.compile(lambda *t: norm_silu_conv2d(*t, num_groups=4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), norm_silu_conv2d(*given, num_groups=4))
    assert len(taken) == 2


def test_defaults_of_the_process_do_not_matter(small):
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    before = winograd.winograd_conv2d(x, weight, None)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(winograd.winograd_conv2d(x, weight, None), before)
    finally:
        torch.set_default_dtype(torch.float32)
