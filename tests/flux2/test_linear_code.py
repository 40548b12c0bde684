"""The linear code against numpy's SVD, and the warm start that reproduces it."""

import numpy as np
import pytest
import torch

from flux2.autoencoder import AutoEncoder, AutoencoderConfig
from flux2.linear_code import fit_context_decoder, fit_linear_code, warm_start

SMALL = AutoencoderConfig(
    z_channels=8,
    ch=8,
    decoder_ch=8,
    ch_mult=(1, 1, 1),
    num_res_blocks=1,
    num_groups=4,
    shortcut="patch",
    latent_norm="batchnorm",
)


def smooth_pixels(n=40, side=32):
    torch.manual_seed(0)
    coarse = torch.randn(n, 3, side // 4, side // 4)
    return torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(-1, 1)


def test_components_are_the_singular_vectors():
    x = smooth_pixels()
    code = fit_linear_code(x, num_components=6, block=4)
    blocks = x.double().numpy().reshape(40, 3, 8, 4, 8, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    mean = np.repeat(x.double().numpy().mean((0, 2, 3)), 16)
    _, singular, rows = np.linalg.svd(blocks - mean, full_matrices=False)
    np.testing.assert_allclose(code.std.numpy(), singular[:6] / np.sqrt(len(blocks)), rtol=1e-4)
    overlap = np.abs(code.components.double().numpy() @ rows[:6].T)
    np.testing.assert_allclose(overlap, np.eye(6), atol=1e-3)


def test_all_components_reconstruct_exactly():
    x = smooth_pixels()
    code = fit_linear_code(x, num_components=48, block=4)
    torch.testing.assert_close(code.reconstruct(x), x, atol=1e-4, rtol=0)


def centre_only(code):
    """The decoder of the plain linear code as a conv3x3."""
    weight = torch.zeros(code.components.shape[1], len(code.components), 3, 3)
    weight[:, :, 1, 1] = code.components.T
    return weight


def test_warm_started_autoencoder_is_the_linear_code():
    x = smooth_pixels()
    code = fit_linear_code(x, num_components=8, block=4)
    ae = AutoEncoder(SMALL)
    assert (ae(x)[0] - code.reconstruct(x)).abs().max() > 0.1
    warm_start(ae, code, centre_only(code))
    recon, posterior = ae(x)
    torch.testing.assert_close(recon.clamp(-1, 1), code.reconstruct(x), atol=1e-4, rtol=0)
    assert posterior.logvar.unique().tolist() == [-8.0]
    recon.square().mean().backward()
    assert ae.decoder.conv_out.weight.grad.abs().max() > 0  # the zeroed layer still learns


def test_context_decoder_is_the_least_squares_solution():
    x = smooth_pixels()
    code = fit_linear_code(x, num_components=8, block=4)
    ae = AutoEncoder(SMALL)
    warm_start(ae, code, centre_only(code))
    plain = (ae(x)[0] - x).square().mean()
    warm_start(ae, code, fit_context_decoder(code, x))
    best = (ae(x)[0] - x).square().mean()
    assert best < 0.9 * plain
    (gradient,) = torch.autograd.grad(best, ae.decoder.shortcut.linear.weight)
    step = 1e-2 * gradient / gradient.norm() * ae.decoder.shortcut.linear.weight.norm()
    with torch.no_grad():
        for sign in (1, -2):  # to one side, then to the other
            ae.decoder.shortcut.linear.weight.add_(sign * step)
            assert (ae(x)[0] - x).square().mean() >= best


def test_errors_name_what_was_expected():
    x = smooth_pixels(2)
    with pytest.raises(ValueError, match="at most 48 components"):
        fit_linear_code(x, num_components=49, block=4)
    with pytest.raises(ValueError, match="needs more blocks"):
        fit_linear_code(x[:1, :, :8, :8], num_components=4, block=4)
    code = fit_linear_code(x, num_components=4, block=4)
    with pytest.raises(ValueError, match="expected 8 components of 4x4 blocks, got 4 of 4x4"):
        warm_start(AutoEncoder(SMALL), code, centre_only(code))
