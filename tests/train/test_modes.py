"""Ways to train: from other weights in each layout, decoder or encoder alone, on the posterior's draw or its mode."""

import dataclasses

import pytest
import torch
from toy import batch_of, run, saved, toy, trainer_of

from flux2 import AUTOENCODERS, RAE, AutoEncoder, load_autoencoder, save_autoencoder
from flux2.tensor_files import save_tensors
from train import vae
from train.configs import RunOptions
from train.vae_config import VAE_PRESETS

PLAIN = ["--autoencoder.shortcut", "none", "--warm-start", "none"]  # what other projects' layouts can hold
STOP = ["--steps", "9", "--stop-after", "2"]
DECODER = ["--train", "decoder", "--kl-weight", "0", "--align-weight", "0"]


@pytest.fixture(autouse=True)
def small_fits(monkeypatch):
    monkeypatch.setattr(vae, "FITTED_PIXELS", 64 * 64 * 64)
    monkeypatch.setattr(vae, "HELD_OUT_CROPS", 4)
    monkeypatch.setattr(vae, "STATISTICS_CROPS", 8)


def other_weights(cfg, seed=3):
    """An autoencoder nothing of which is at a special value"""
    torch.manual_seed(seed)
    ae = AutoEncoder(cfg)
    with torch.no_grad():
        for t in [*ae.parameters(), *(b for b in ae.buffers() if b.is_floating_point())]:
            t.add_(0.05 * torch.rand_like(t))
    return ae


def assert_unchanged(tensors, ae, prefixes):
    expected = {k: v for k, v in ae.state_dict().items() if k.startswith(prefixes)}
    assert expected
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


@pytest.mark.parametrize("layout", ["bfl", "diffusers", "run"])
def test_fine_tuning_starts_from_the_weights_it_is_given(layout, tmp_path):
    config = toy(*PLAIN)
    if layout == "run":
        assert run(tmp_path, *PLAIN, *STOP, "--name", "first") == 0
        source, ae = tmp_path / "first", load_autoencoder(tmp_path / "first")
    else:
        source, ae = tmp_path / "ae.safetensors", other_weights(config.autoencoder)
        save_autoencoder(ae, source, layout=layout)
    trainer = trainer_of(config)
    assert not torch.equal(trainer.ae.decoder.conv_in.weight, ae.decoder.conv_in.weight)
    vae.start_from(dataclasses.replace(config, init=str(source)), trainer, None)
    for tensors in (trainer.ae.state_dict(), trainer.ema.model.state_dict()):
        assert_unchanged(tensors, ae, ("encoder.", "decoder.", "bn.running"))
    flags = ["--init", str(source), "--lr", "1e-9", "--warmup", "0", "--align-weight", "0"]
    assert run(tmp_path, *PLAIN, *flags, *STOP, "--name", "second") == 0
    tuned = saved(tmp_path / "second")["model.safetensors"]
    for name, value in ae.state_dict().items():  # two updates of 1e-9 are no distance
        torch.testing.assert_close(tuned[name].float(), value.float(), rtol=0, atol=1e-7)
    assert not torch.equal(tuned["decoder.conv_in.weight"], ae.decoder.conv_in.weight)


def test_another_shape_is_refused_key_by_key(tmp_path, capsys):
    cfg = dataclasses.replace(toy(*PLAIN).autoencoder, ch=16, z_channels=16)
    save_autoencoder(other_weights(cfg), tmp_path / "ae.safetensors")
    assert run(tmp_path, *PLAIN, "--init", str(tmp_path / "ae.safetensors"), "--name", "x") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --init {tmp_path}/ae.safetensors: another shape than the preset's: ")
    assert "ch: expected 8, got 16; " in error and "z_channels: expected 32, got 16" in error
    assert error.count("expected") == 2 and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_file_that_two_presets_fit_is_the_configs(tmp_path, monkeypatch):
    """The tensors of sd and sdxl are alike; their latents' scale is not"""
    narrow = {"ch": 32, "decoder_ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    for name in ("sd", "sdxl"):
        monkeypatch.setitem(AUTOENCODERS, name, dataclasses.replace(AUTOENCODERS[name], **narrow))
    ae = other_weights(AUTOENCODERS["sdxl"])
    save_tensors(tmp_path / "plain.safetensors", ae.state_dict())
    for name in ("sd", "sdxl"):
        config = toy(*PLAIN, autoencoder=AUTOENCODERS[name], init=str(tmp_path / "plain.safetensors"))
        trainer = trainer_of(config)
        vae.start_from(config, trainer, None)
        assert_unchanged(trainer.ae.state_dict(), ae, ("encoder.", "decoder."))
        assert trainer.ae.cfg.scale == AUTOENCODERS[name].scale


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_what_is_not_trained_is_bit_unchanged(part, tmp_path):
    ae = other_weights(toy(*PLAIN).autoencoder)
    save_autoencoder(ae, tmp_path / "ae.safetensors")
    flags = [*PLAIN, "--init", str(tmp_path / "ae.safetensors"), "--weight-decay", "0.1", "--gan.weight", "0.5"]
    flags += ["--gan.width", "8", *(DECODER if part == "decoder" else ["--train", "encoder"])]
    assert run(tmp_path, *flags, *STOP, "--name", "x") == 0
    files = saved(tmp_path / "x")
    frozen = {"decoder": ("encoder.", "bn."), "encoder": ("decoder.",)}[part]
    for name in ("model.safetensors", "ema.safetensors"):
        assert_unchanged(files[name], ae, frozen)
        for key, value in ae.state_dict().items():
            if key.startswith(part) and not key.endswith("bias"):
                assert not torch.equal(files[name][key], value), key
    if part == "encoder":  # its latents are others now, and so are their statistics
        assert not torch.equal(files["ema.safetensors"]["bn.running_var"], ae.bn.running_var)
    count = len(list(getattr(ae, part).parameters()))
    moments = {k.partition(".")[0] for k in files["optimiser.safetensors"]}
    assert len(moments) == count + (part == "encoder")  # the alignment's head trains with the encoder


def test_a_decoder_is_not_trained_behind_a_random_encoder(tmp_path, capsys):
    assert run(tmp_path, *PLAIN, *DECODER, *STOP, "--name", "x") == 2
    message = "error: --train decoder keeps an encoder that is trained already: give it with --init\n"
    assert capsys.readouterr().err == message and not (tmp_path / "x").exists()


def test_the_posterior_is_drawn_from_or_its_mode_decoded():
    config = toy(*PLAIN)
    x = batch_of(config).float() / 127.5 - 1
    recons = {}
    for sample in (True, False):
        trainer = trainer_of(dataclasses.replace(config, sample_posterior=sample))
        recons[sample] = trainer.generate(0, 0, x, None, 1.0)[1]
        posterior = trainer.ae.posterior(x)
        noise = trainer.noise(0, 0, posterior.mean.shape) if sample else 0.0
        z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
        torch.testing.assert_close(recons[sample], trainer.ae.decode_raw(z), rtol=1e-4, atol=1e-5)
    assert (recons[True] - recons[False]).abs().max() > 0.01


def test_an_rae_is_fine_tuned_with_the_encoder_of_its_file(tmp_path, monkeypatch):
    """No weights of the encoder are looked for anywhere else, and its statistics stay"""
    shape = dataclasses.replace(VAE_PRESETS["rae-tiny"].autoencoder, resolution=32)
    torch.manual_seed(3)
    rae = RAE(shape, "random")
    with torch.no_grad():
        for t in (*rae.encoder.parameters(), rae.latent_var, rae.latent_mean):
            t.add_(0.1 * torch.rand_like(t))
    save_autoencoder(rae, tmp_path / "rae.safetensors")
    changes = {"resolution": 32, "batch": 2, "init": str(tmp_path / "rae.safetensors"), "precision": "fp32"}
    config = dataclasses.replace(VAE_PRESETS["rae-tiny"], autoencoder=shape, **changes)
    given, build = [], RAE.__init__

    def noted(self, cfg, encoder_weights, *rest):
        given.append(encoder_weights)
        build(self, cfg, encoder_weights, *rest)

    monkeypatch.setattr(RAE, "__init__", noted)
    assert vae.train(config, RunOptions(out=tmp_path, name="x", stop_after=2)) == 0
    assert set(given) == {None}
    files = saved(tmp_path / "x")
    for name in ("model.safetensors", "ema.safetensors"):
        assert_unchanged(files[name], rae, ("encoder.", "latent_"))
        assert not torch.equal(files[name]["decoder.pred.weight"], rae.decoder.pred.weight)
