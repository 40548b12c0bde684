"""RAE: the protocol of an AutoEncoder, statistics of each position, and what is frozen."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux2 import RAE, RAES, AutoencoderConfig, RAEConfig
from flux2.latents import fit_latent_statistics
from flux2.rae import RAE_ENCODERS, NoisedLatent
from flux2.teachers import VITS, ViTTeacher
from flux2.tensor_files import save_tensors

TINY = RAES["rae-tiny"]  # 64 pixels, a grid of 4 x 4


@pytest.fixture(scope="module")
def frozen():
    return RAE(TINY)


@pytest.fixture
def rae(frozen):
    """A fresh decoder and statistics on the shared frozen encoder"""
    rae = RAE(TINY)
    rae.encoder = frozen.encoder
    with torch.no_grad():
        for p in rae.decoder.parameters():
            p.add_(0.02 * torch.randn_like(p))
    rae.latent_mean.normal_()
    rae.latent_var.uniform_(0.2, 3)
    return rae


def pixels(n=2, h=64, w=64):
    return torch.rand(n, 3, h, w) * 2 - 1


@pytest.mark.parametrize("name", RAES)
def test_presets_encode_a_grid_of_tokens(name):
    cfg = RAES[name]
    with torch.device("meta"):
        rae = RAE(cfg, encoder_weights=None)
        x = torch.empty(2, 3, cfg.resolution, cfg.resolution)
    channels, side = (192, 4) if name == "rae-tiny" else (768, 16)
    assert rae.encode(x).shape == (2, channels, side, side)
    assert rae.decode(rae.encode(x)).shape == x.shape
    assert (cfg.latent_channels, cfg.z_channels, cfg.multiple, cfg.downsample, cfg.patch) == (
        channels,
        channels,
        16,
        16,
        1,
    )
    assert cfg.latent_norm == "stats" and cfg.noise_tau == 0.8
    assert rae.encoder.net_patch == (14 if name == "rae" else 16)
    assert not [k for k in rae.state_dict() if k.startswith("encoder.net.norm.")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder": "dinov2-b"},
            r"RAE encoder: expected one of dinov2-b-reg, .*, got 'dinov2-b'; did you mean 'dinov2-b-reg'",
        ),
        ({"decoder": "huge"}, "RAE decoder: expected one of tiny, b, l, xl, got 'huge'$"),
        ({"resolution": 250}, "RAE resolution: expected a positive multiple of 16, got 250"),
        ({"noise_tau": -1.0}, r"RAE noise_tau: expected 0 or more, got -1\.0"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RAEConfig(**change)


def test_the_latent_is_the_normalised_token(rae):
    """timm's tokens before its final norm, normalised here by hand, less class token; then the statistics"""
    x = pixels()
    net = rae.encoder.net
    norm, net.norm = net.norm, nn.Identity()
    tokens = net.forward_features((x / 2 + 0.5 - 0.5) / 0.5)[:, 1:].detach().double().numpy()
    net.norm = norm
    tokens = (tokens - tokens.mean(2, keepdims=True)) / np.sqrt(tokens.var(2, keepdims=True) + 1e-6)
    raw = tokens.transpose(0, 2, 1).reshape(2, 192, 4, 4)
    np.testing.assert_allclose(rae.posterior(x).mode(), raw, atol=2e-4)
    mean, var = rae.latent_mean.double().numpy(), rae.latent_var.double().numpy()
    np.testing.assert_allclose(rae.encode(x), (raw - mean) / np.sqrt(var + 1e-5), rtol=1e-3, atol=1e-3)


def test_decode_undoes_the_statistics(rae):
    x, z = pixels(), torch.randn(2, 192, 4, 4)
    torch.testing.assert_close(rae.normalise(rae.denormalise(z)), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rae.decode(rae.encode(x)), rae(x)[0], rtol=1e-3, atol=1e-3)
    raw = z * torch.sqrt(rae.latent_var + 1e-5) + rae.latent_mean
    torch.testing.assert_close(rae.decode(z), rae.decode_raw(raw), rtol=1e-4, atol=1e-4)


def test_pixels_come_back_from_the_encoder_s_normalisation(rae):
    nn.init.zeros_(rae.decoder.pred.weight)
    rae.decoder.pred.bias.data = torch.tensor([1.0, -0.5, 0.25]).repeat(256)
    rae.encoder.mean.copy_(torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
    rae.encoder.std.copy_(torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1))
    try:
        x = rae.decode_raw(torch.randn(1, 192, 2, 2))
    finally:
        rae.encoder.mean.fill_(0.5)
        rae.encoder.std.fill_(0.5)
    for channel, value in enumerate((0.4 + 0.1, 0.5 - 0.5 * 0.2, 0.6 + 0.25 * 0.4)):
        torch.testing.assert_close(x[:, channel], torch.full((1, 32, 32), 2 * value - 1))


def test_statistics_are_of_one_resolution(rae):
    with pytest.raises(ValueError, match=r"statistics are of 64x64 pixels, .* got 64x80 pixels"):
        rae.encode(pixels(1, 64, 80))
    with pytest.raises(ValueError, match=r"statistics are of 64x64 pixels, .* got 256x256 pixels"):
        rae.decode(torch.zeros(1, 192, 16, 16))
    with pytest.raises(ValueError, match=r"expected \[N, 192, h, w\], got \[1, 768, 4, 4\]"):
        rae.decode(torch.zeros(1, 768, 4, 4))
    with pytest.raises(ValueError, match="positive multiples of 16, got 64x60"):
        rae.encode(pixels(1, 64, 60))
    with pytest.raises(ValueError, match="no moments: its latent is a point"):
        rae.encode_moments(pixels())
    assert rae(pixels(1, 32, 80))[0].shape == (1, 3, 32, 80)  # raw latents of any size
    x = pixels(1, 33, 70)
    recon = rae.reconstruct(x)
    assert recon.shape == x.shape and recon.abs().max() <= 1
    torch.testing.assert_close(recon, rae.decode_raw(rae.posterior(rae.pad(x)).mode())[..., :33, :70].clamp(-1, 1))


def test_the_latent_takes_noise_before_its_statistics(rae):
    x, noise = pixels(), torch.randn(2, 192, 4, 4)
    posterior = rae.posterior(x)
    assert torch.equal(posterior.mode(), posterior.mean)
    assert torch.equal(posterior.sample(noise), posterior.mean + noise)
    assert torch.equal(posterior.kl(), torch.zeros(2))
    torch.testing.assert_close(rae(x, sample=True, noise=noise)[0], rae.decode_raw(posterior.mean + noise))
    torch.testing.assert_close(rae(x)[0], rae.decode_raw(posterior.mean))
    with pytest.raises(ValueError, match=r"noise: expected shape \(2, 192, 4, 4\), got \(1, 192, 4, 4\)"):
        posterior.sample(noise[:1])
    levels = NoisedLatent(torch.zeros(400, 192, 4, 4), tau=0.8).sample().flatten(1).std(1)
    assert levels.max() < 0.85 and levels.min() < 0.05 and abs(levels.mean() - 0.4) < 0.06
    assert torch.equal(NoisedLatent(posterior.mean, tau=0.0).sample(), posterior.mean)


def test_the_decoder_learns_and_the_encoder_does_not(rae):
    rae.train()
    assert rae.decoder.training and not any(m.training for m in rae.encoder.modules())
    before = {k: v.clone() for k, v in rae.state_dict().items() if not k.startswith("decoder.")}
    optimiser = torch.optim.AdamW([p for p in rae.parameters() if p.requires_grad], lr=1e-3)
    x = pixels()
    losses = []
    for _ in range(3):
        recon, _ = rae(x, sample=True)
        loss = F.mse_loss(recon, x)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in rae.decoder.parameters())
        assert all(p.grad is None for p in rae.encoder.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(v, rae.state_dict()[k]) for k, v in before.items())


def test_last_layer_grad_norm_is_autograd_s(rae):
    z, weight = torch.randn(2, 192, 4, 4), torch.randn(2, 3, 64, 64)
    recon, h = rae.decode_with_features(z)
    (expected,) = torch.autograd.grad((recon * weight).sum(), rae.decoder.pred.weight)
    torch.testing.assert_close(rae.last_layer_grad(h, weight).norm(), expected.norm(), rtol=1e-5, atol=0)


def test_fitted_statistics_are_of_each_position(rae):
    x = torch.randn(60, 3, 64, 64).clamp(-1, 1) * torch.linspace(0.1, 1, 64)  # brighter to the right
    raw = torch.cat([rae.posterior(part).mode() for part in x.split(20)]).double().numpy()
    assert fit_latent_statistics(rae, x[:40].split(17)) == 40  # parts of unequal size
    np.testing.assert_allclose(rae.latent_mean, raw[:40].mean(0), atol=1e-5)
    np.testing.assert_allclose(rae.latent_var, raw[:40].var(0, ddof=1), rtol=1e-4, atol=1e-6)
    held_out = rae.encode(x[40:])
    mean, std = held_out.mean(0), held_out.std(0)  # [192, 4, 4] each, from 20 samples
    assert mean.square().mean().sqrt() < 0.35 and abs(mean.mean()) < 0.05
    assert abs(std.mean() - 1) < 0.08 and abs(std.mean((0, 1)) - 1).max() < 0.15
    with pytest.raises(ValueError, match="statistics are of 64x64 pixels"):
        fit_latent_statistics(rae, [pixels(2, 32, 32)])
    with pytest.raises(ValueError, match="at least two latent positions .*pictures.*; got no batches or one"):
        fit_latent_statistics(rae, [x[:1]])


def test_autocast_half_precision_and_compiled(rae):
    x = pixels()
    with torch.no_grad():
        exact = rae(x)[0]
        torch.testing.assert_close(torch.compile(rae, fullgraph=True, backend="aot_eager")(x)[0], exact)
        with torch.autocast("cpu", torch.bfloat16):
            z, cast = rae.posterior(x).mode(), rae(x)[0]
        assert z.dtype == torch.float32 and cast.dtype == torch.bfloat16
        rae.encoder = RAE(TINY).encoder  # the shared one stays fp32
        half = rae.bfloat16()
        assert half.encode(x.bfloat16()).dtype == torch.bfloat16
        for y in (cast, half.reconstruct(x.bfloat16())):
            assert (y.float().clamp(-1, 1) - exact.clamp(-1, 1)).square().mean() < 1e-2 * exact.var()


def test_construction():
    state = torch.get_rng_state()
    a = RAE(TINY, "random", backend="torch")
    torch.set_rng_state(state)
    b = RAE(TINY)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    torch.manual_seed(5)
    assert torch.equal(RAE(TINY).encoder.net.pos_embed, a.encoder.net.pos_embed)
    with pytest.raises(ValueError, match="backend: expected one of auto, .*, got 'cuda'"):
        RAE(TINY, backend="cuda")
    with torch.device("meta"), pytest.warns(UserWarning, match="'mae-b/16' has random weights"):
        RAE(dataclasses.replace(TINY, encoder="mae-b/16"), "random")


def test_encoder_weights_come_from_a_file(monkeypatch, tmp_path):
    narrow = dataclasses.replace(
        VITS["dinov2-b-reg"], channels=32, options={"depth": 1, "embed_dim": 32, "num_heads": 2}
    )
    monkeypatch.setitem(RAE_ENCODERS, "dinov2-b-reg", narrow)
    net = ViTTeacher(narrow, 16, "random").net
    nn.init.normal_(net.cls_token)
    nn.init.normal_(net.norm.weight)  # of the norm that RAE leaves plain
    save_tensors(tmp_path / "a.safetensors", net.state_dict())
    cfg = RAEConfig(encoder="dinov2-b-reg", decoder="tiny", resolution=32)
    rae = RAE(cfg, tmp_path / "a.safetensors")
    assert torch.equal(rae.encoder.net.cls_token, net.cls_token)
    z = rae.posterior(pixels(1, 32, 32)).mode()
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(1, 2, 2), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="not the weights of vit_base_patch14_reg4_dinov2"):
        save_tensors(tmp_path / "b.safetensors", {"a": torch.zeros(1)})
        RAE(cfg, tmp_path / "b.safetensors")


def test_its_config_has_what_an_autoencoder_s_answers():
    theirs = {n for n in dir(AutoencoderConfig) if isinstance(getattr(AutoencoderConfig, n), property)}
    wanted = theirs | {"z_channels", "patch", "latent_norm", "shortcut"}
    assert all(hasattr(TINY, name) for name in wanted)
