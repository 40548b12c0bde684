"""The linear code against numpy's SVD, and the warm start that reproduces it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flux2.autoencoder import AutoEncoder, AutoencoderConfig
from flux2.images import from_uint8
from flux2.linear_code import ENERGY_GAIN, fit_context_decoder, fit_linear_code, warm_start, warm_start_energies
from flux2.probes import linear_probe_r2
from flux2.teachers import build_teacher
from train.data import embedded_photographs, held_out_crops

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


def test_first_components_are_the_best_smaller_code():
    x = smooth_pixels()
    small, large = (fit_linear_code(x, num_components=k, block=4) for k in (5, 30))
    for name in ("components", "std", "mean"):
        torch.testing.assert_close(getattr(large.first(5), name), getattr(small, name))


def hidden_units(ae, x):
    """[N, width, h, w]: the hidden units of the encoder's shortcut."""
    return F.silu(ae.encoder.shortcut.inner(F.pixel_unshuffle(x, ae.cfg.downsample)))


@torch.no_grad()
def test_energies_are_even_in_contrast_of_one_size_and_leave_the_code_as_it_is():
    x = smooth_pixels()
    pca = fit_linear_code(x, num_components=48, block=4)
    ae = AutoEncoder(SMALL)
    warm_start(ae, pca.first(8), centre_only(pca.first(8)))
    before, unit_48 = ae(x)[0], ae.encoder.shortcut.inner.weight[94].clone()
    warm_start_energies(ae, pca)
    torch.testing.assert_close(ae(x)[0], before, rtol=0, atol=0)
    pairs = 47  # of 48 components all but the brightness; width 256 has room for more, which stay random
    torch.testing.assert_close(ae.encoder.shortcut.inner.weight[94], unit_48, rtol=0, atol=0)
    mean = pca.mean.view(1, 3, 1, 1)
    inverted = 2 * mean - x  # contrast about the mean, turned round
    energies = [h[:, :pairs] + h[:, pairs : 2 * pairs] for h in (hidden_units(ae, x), hidden_units(ae, inverted))]
    torch.testing.assert_close(energies[0], energies[1], atol=1e-4, rtol=1e-4)
    u = pca.encode(x)[:, 1:] / pca.std[1:].view(-1, 1, 1).clamp(min=1e-3) * ENERGY_GAIN
    torch.testing.assert_close(energies[0], u * torch.tanh(u / 2), atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_teacher_is_read_from_energies_and_not_from_random_units():
    train, held_out = embedded_photographs()
    x, x_test = (from_uint8(held_out_crops(p, num_crops=n)) for p, n in ((train, 512), (held_out, 64)))
    ae = AutoEncoder(dataclasses.replace(SMALL, ch_mult=(1, 1, 1, 1), shortcut_width=64))
    teacher = build_teacher("hog", 16)

    def probe():
        tokens = [F.pixel_unshuffle(hidden_units(ae, p), 2) for p in (x, x_test)]
        return linear_probe_r2(tokens[0], teacher(x), tokens[1], teacher(x_test))

    random = probe()
    warm_start_energies(ae, fit_linear_code(x, num_components=192, block=8))
    assert random < 0.05 and probe() > 0.2, (random, probe())


def test_errors_name_what_was_expected():
    x = smooth_pixels(2)
    with pytest.raises(ValueError, match="at most 48 components"):
        fit_linear_code(x, num_components=49, block=4)
    with pytest.raises(ValueError, match="needs more blocks"):
        fit_linear_code(x[:1, :, :8, :8], num_components=4, block=4)
    code = fit_linear_code(x, num_components=4, block=4)
    with pytest.raises(ValueError, match="expected 8 components of 4x4 blocks, got 4 of 4x4"):
        warm_start(AutoEncoder(SMALL), code, centre_only(code))
    plain = AutoEncoder(dataclasses.replace(SMALL, shortcut="none"))
    with pytest.raises(ValueError, match="needs shortcut='patch', got 'none'"):
        warm_start_energies(plain, code)
    with pytest.raises(ValueError, match="expected components of 4x4 blocks, got 8x8"):
        warm_start_energies(AutoEncoder(SMALL), fit_linear_code(smooth_pixels(), num_components=4, block=8))
