"""Shapes, spaces and conventions of the autoencoder; values are held against diffusers in test_parity_diffusers."""

import dataclasses

import pytest
import torch

from flux2 import AUTOENCODERS, AutoEncoder, AutoencoderConfig
from flux2.autoencoder import Posterior
from flux2.latents import fit_latent_statistics, patchify, unpatchify
from flux2.layers import _reflected_index

TINY = AutoencoderConfig(
    z_channels=4, ch=8, decoder_ch=8, num_groups=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, latent_norm="batchnorm"
)

COUNTS = {  # published architectures: encoder, decoder, all (quant convolutions inside)
    "sd": (None, None, 83_653_863),
    "flux.1": (34_274_208, 49_545_475, 83_819_683),
    "flux.2": (34_425_856, 49_620_259, 84_046_115),
    "flux.2-small-decoder": (34_425_856, 27_947_235, 62_373_091),
    "va-vae": (None, None, 69_836_067),
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def narrow(name):
    """The preset's row with a sixteenth of its width."""
    row = AUTOENCODERS[name]
    return dataclasses.replace(row, ch=row.ch // 16, decoder_ch=row.decoder_ch // 16, num_groups=2)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        ae = AutoEncoder(AUTOENCODERS[name])
    for expected, got in zip(COUNTS[name], (count(ae.encoder), count(ae.decoder), count(ae)), strict=True):
        assert expected in (None, got)


def test_flux2_stores_250_tensors():
    with torch.device("meta"):
        state = AutoEncoder(AUTOENCODERS["flux.2"]).state_dict()
    assert len(state.keys() - {"bn.num_batches_tracked"}) == 250
    assert {"encoder.down.0.block.0.norm1.weight", "encoder.quant_conv.bias", "bn.running_mean"} <= state.keys()
    assert {"decoder.up.3.block.2.conv1.weight", "decoder.mid.attn_1.proj_out.weight"} <= state.keys()


@pytest.mark.parametrize(
    ("name", "token"),
    [("sd", (16, 16)), ("sdxl", (16, 16)), ("flux.1", (64, 16)), ("flux.2", (128, 16)), ("va-vae", (32, 16))],
)
def test_spaces_of_each_preset(name, token):
    ae = AutoEncoder(narrow(name)).eval()
    channels, pixels = token
    x = torch.rand(2, 3, 2 * pixels, 3 * pixels) * 2 - 1
    with torch.no_grad():
        z = ae.encode(x)
        assert z.shape == (2, channels, 2, 3)
        assert ae.decode(z).shape == x.shape
        f, latent = ae.cfg.downsample, ae.cfg.z_channels
        assert ae.encode_moments(x).shape == (2, 2 * latent, 2 * pixels // f, 3 * pixels // f)
        torch.testing.assert_close(ae.denormalise(z), ae.posterior(x).mode(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ae.decode(z), ae(x)[0], atol=1e-4, rtol=1e-3)


def test_patchify_order_is_channel_row_column():
    z = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    p = patchify(z, 2)
    assert p.shape == (1, 8, 2, 3)
    for c in range(2):
        for row in range(2):
            for column in range(2):
                assert torch.equal(p[0, c * 4 + row * 2 + column], z[0, c, row::2, column::2])
    assert torch.equal(unpatchify(p, 2), z)
    assert patchify(z, 1) is z
    with pytest.raises(ValueError, match="multiples of 2, got 3x6"):
        patchify(z[:, :, :3], 2)
    with pytest.raises(ValueError, match="multiple of 4, got 2"):
        unpatchify(z, 2)


def test_normalisations_follow_their_formulas():
    z = torch.randn(2, 4, 4, 4)
    affine = AutoEncoder(dataclasses.replace(TINY, latent_norm="affine", scale=0.3611, shift=0.1159))
    torch.testing.assert_close(affine.normalise(z), patchify(0.3611 * (z - 0.1159), 2))
    batch = AutoEncoder(TINY)
    batch.bn.running_mean.normal_()
    batch.bn.running_var.uniform_(0.5, 2)
    torch.testing.assert_close(batch.normalise(z), batch.bn(patchify(z, 2)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(batch.denormalise(batch.normalise(z)), z, atol=1e-5, rtol=1e-5)
    assert batch.bn.eps == 1e-4 and batch.bn.momentum == 0.1


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (5, 100), (64, 1), (16, 32)])
def test_reconstruct_takes_any_size(size):
    ae = AutoEncoder(TINY).eval()
    x = torch.rand(1, 3, *size) * 2 - 1
    recon = ae.reconstruct(x)
    assert recon.shape == x.shape and recon.abs().max() <= 1
    padded = ae.pad(x)
    assert padded.shape[2] % 16 == 0 == padded.shape[3] % 16
    assert torch.equal(padded[:, :, : size[0], : size[1]], x)
    expected = ae.decode(ae.encode(padded))[:, :, : size[0], : size[1]].clamp(-1, 1)
    torch.testing.assert_close(recon, expected)


def test_padding_is_reflection():
    assert _reflected_index(10, 16, torch.device("cpu")).tolist() == [*range(10), 8, 7, 6, 5, 4, 3]
    assert _reflected_index(3, 8, torch.device("cpu")).tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    x = torch.rand(1, 3, 10, 16)
    torch.testing.assert_close(AutoEncoder(TINY).pad(x), torch.nn.functional.pad(x, (0, 0, 0, 6), mode="reflect"))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 24, 32), "multiples of 16, got 24x32"),
        (torch.zeros(1, 3, 0, 32), "positive multiples of 16, got 0x32"),
        (torch.zeros(1, 4, 32, 32), r"expected \[N, 3, H, W\], got \[1, 4, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"expected \[N, 3, H, W\], got \[3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating-point tensor"),
    ],
)
def test_encode_names_what_is_wrong(x, message):
    with pytest.raises(ValueError, match=message):
        AutoEncoder(TINY).encode(x)


def test_decode_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"expected \[N, 16, h, w\], got \[1, 4, 2, 2\]"):
        AutoEncoder(TINY).decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="noise: expected shape"):
        AutoEncoder(TINY)(torch.zeros(1, 3, 16, 16), sample=True, noise=torch.zeros(1, 4, 1, 1))


def test_config_refuses_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="multiples of num_groups=32, got"):
        AutoencoderConfig(z_channels=4, ch=48)
    with pytest.raises(ValueError, match="latent_norm: expected one of"):
        AutoencoderConfig(z_channels=4, latent_norm="batch")


def test_training_forward_leaves_the_latent_statistics_alone():
    ae = AutoEncoder(TINY).train()
    assert ae.training and not ae.bn.training
    before = {k: v.clone() for k, v in ae.bn.state_dict().items()}
    x = torch.rand(2, 3, 32, 32)
    recon, posterior = ae(x, sample=True)
    ae.encode(x)
    assert all(torch.equal(v, before[k]) for k, v in ae.bn.state_dict().items())
    ae.bn.running_mean.fill_(100.0)  # and does not use them
    torch.testing.assert_close(ae(x)[0], ae.decode_raw(posterior.mode()))
    (recon.mean() + posterior.kl().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ae.parameters())


def test_sample_uses_the_noise_it_is_given():
    ae = AutoEncoder(TINY).eval()
    x, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 2, 2)
    recon, posterior = ae(x, sample=True, noise=noise)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
    torch.testing.assert_close(recon, ae.decode_raw(z))
    assert not torch.allclose(ae(x, sample=True)[0], ae(x, sample=True)[0])
    assert torch.equal(ae(x)[0], ae(x)[0])


def test_kl_is_the_closed_form_mean():
    posterior = Posterior(torch.randn(3, 8, 2, 2))
    gaussian = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    expected = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(posterior.kl(), expected)
    assert Posterior(torch.full((1, 2, 1, 1), 99.0)).logvar.item() == 20.0


def test_activations_and_weights_are_channels_last():
    ae = AutoEncoder(TINY, backend="torch")  # whose convolutions' hooks run
    last = torch.channels_last
    convs = [m for m in ae.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=last) for m in convs)
    seen = []
    for m in convs:
        if m.kernel_size == (3, 3):
            m.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous(memory_format=last)))
    ae(torch.rand(2, 3, 32, 32))
    assert len(seen) > 20 and all(seen)


def test_shortcut_adds_a_linear_path():
    cfg = dataclasses.replace(TINY, shortcut="patch")
    ae = AutoEncoder(cfg).eval()
    for last in (ae.encoder.conv_out, ae.decoder.conv_out):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    torch.nn.init.zeros_(ae.encoder.quant_conv.bias)
    x, y = torch.randn(2, 1, 3, 32, 32)
    mean = ae.posterior
    zero = mean(torch.zeros_like(x)).mean
    torch.testing.assert_close(mean(x + y).mean - zero, mean(x).mean + mean(y).mean - 2 * zero, atol=1e-5, rtol=1e-4)
    assert ae(x)[0].shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_stay_themselves(dtype):
    ae = AutoEncoder(TINY).to(dtype).eval()
    z = ae.encode(torch.rand(1, 3, 16, 16, dtype=dtype))
    assert z.dtype == dtype and ae.decode(z).dtype == dtype


@pytest.mark.parametrize("norm", ["batchnorm", "stats"])
def test_fitted_statistics_normalise_the_latents(norm):
    ae = AutoEncoder(dataclasses.replace(TINY, latent_norm=norm)).eval()
    images = torch.rand(12, 3, 32, 32) * 2 - 1
    assert fit_latent_statistics(ae, images.split(5)) == 12
    z = ae.encode(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    var = patchify(ae.posterior(images).mode(), 2).transpose(0, 1).flatten(1).var(1)
    expected = (
        (var / (var + 1e-4)).sqrt() if norm == "batchnorm" else torch.ones(16)
    )  # BatchNorm's eps shrinks a little
    torch.testing.assert_close(z.std(1), expected, atol=2e-3, rtol=0)
    mean, std = (t.clone() for t in ae.latent_affine())
    fit_latent_statistics(ae, images.split(1))
    torch.testing.assert_close(ae.latent_affine(), (mean, std))


def test_fitting_refuses_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_latent_statistics(AutoEncoder(dataclasses.replace(TINY, latent_norm="affine")), [])
    with pytest.raises(ValueError, match="no batches"):
        fit_latent_statistics(AutoEncoder(TINY), [])


def test_compiles_without_a_graph_break():
    ae = AutoEncoder(TINY)
    x = torch.rand(1, 3, 16, 16)
    compiled = torch.compile(ae.encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ae.encode(x))


def test_five_resolutions_are_one_compilation():
    """Both ways, with backward; sizes that are equal at first, or 1, would be compiled as such"""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ae = AutoEncoder(TINY)
    torch.compiler.reset()
    step = torch.compile(lambda x: ae(x)[0].square().mean(), fullgraph=True, dynamic=True, backend=count)
    decode = torch.compile(ae.decode, fullgraph=True, dynamic=True, backend=count)
    for h, w in ((4, 7), (3, 2), (4, 4), (5, 7), (8, 6)):
        step(torch.rand(5, 3, h * TINY.multiple, w * TINY.multiple)).backward()
        with torch.no_grad():
            decode(torch.randn(5, TINY.latent_channels, h, w))
    assert len(graphs) == 2


@pytest.mark.parametrize("quant_conv", [True, False])
def test_gradient_norms_of_the_last_layers_equal_autograds(quant_conv):
    """What adaptive weights compare, against a full backward pass"""
    cfg = dataclasses.replace(TINY, quant_conv=quant_conv)
    ae = AutoEncoder(cfg)
    x = torch.rand(2, 3, 2 * cfg.multiple, 3 * cfg.multiple) * 2 - 1
    moments, h = ae.encode_with_features(x)
    recon, g = ae.decode_with_features(moments.chunk(2, 1)[0])
    torch.testing.assert_close(moments, ae.encode_moments(x))
    loss = (recon - x).abs().mean() + moments.square().mean()
    grad_moments, grad_recon = torch.autograd.grad(loss, (moments, recon), retain_graph=True)
    loss.backward()
    for layer, norm in (
        (ae.decoder.conv_out, ae.last_layer_grad(g, grad_recon).norm()),
        (ae.encoder.conv_out, ae.encoder_grad(h, grad_moments).norm()),
    ):
        assert norm.dtype == torch.float32 and not norm.requires_grad
        torch.testing.assert_close(norm, layer.weight.grad.norm(), rtol=1e-4, atol=0)
