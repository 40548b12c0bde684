"""Edge padding against torch's own, and under the compiler, where torch's own fails."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from flux2.layers import EdgeConv2d, pad_edges


@pytest.mark.parametrize("size", [1, 2])
def test_equals_replicate(size):
    x = torch.randn(2, 3, 4, 1, dtype=torch.float64, requires_grad=True)
    expected = F.pad(x, (size,) * 4, mode="replicate")
    assert torch.equal(pad_edges(x, size), expected)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (pad_edges(x, size), expected)]
    torch.testing.assert_close(*gradients)


def test_edge_convolution_is_a_replicate_padded_one():
    conv = EdgeConv2d(3, 5)
    stock = torch.nn.Conv2d(3, 5, 3, padding=1, padding_mode="replicate")
    stock.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(conv(x), stock(x))


@pytest.mark.skipif(not shutil.which("g++") and not torch.cuda.is_available(), reason="needs a C++ compiler")
def test_backward_compiles_in_channels_last():
    """F.pad(mode="replicate") fails here in torch 2.13: strides of its backward differ from what Inductor expects."""
    weight = torch.randn(3, 1, 5, 5)

    def loss(x):
        return F.conv2d(pad_edges(x * 2, 2), weight, groups=3).abs().mean()

    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)
