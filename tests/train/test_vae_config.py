"""Values that do not fit together, each by its message; and each preset, narrowed, for 20 steps."""

import dataclasses
import math

import pytest
import torch

from flux2 import load_autoencoder
from flux2.adversarial import AdversarialStart
from flux2.discriminator import BACKBONES
from flux2.rae import RAE_ENCODERS, RAES, RAEConfig
from flux2.teachers import TEACHERS
from train import vae
from train.configs import RunOptions
from train.loop import read_log
from train.vae_config import VAE_PRESETS, GanConfig

PHOTOS, RAE_TINY = VAE_PRESETS["photos"], VAE_PRESETS["rae-tiny"]
GAN = GanConfig(weight=0.5)
NO_LATENT = {"train": "decoder", "kl_weight": 0.0, "align_weight": 0.0}


def test_default_preset_is_the_issue_of_minutes():
    assert (PHOTOS.data, PHOTOS.teacher, PHOTOS.autoencoder.shortcut) == ("photographs", "hog", "patch")
    assert min(PHOTOS.l1_weight, PHOTOS.laplacian_weight, PHOTOS.kl_weight, PHOTOS.align_weight) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 0}, "resolution: expected a positive multiple of 16, got 0"),
        ({"steps": 0}, "steps: expected more than 0, got 0"),
        ({"accumulate": 0}, "accumulate: expected more than 0, got 0"),
        ({"accumulate": 3}, "accumulate: expected a divisor of batch=16, got 3"),
        ({"clip": -1.0}, "clip: expected more than 0, got -1"),
        ({"lpips_weight": -1.0}, "lpips_weight: expected 0 or more, got -1"),
        ({"vf_weight": -1.0}, "vf_weight: expected 0 or more"),
        ({"free_bits": -0.5}, "free_bits: expected 0 or more"),
        ({"workers": -1}, "workers: expected 0 or more"),
        ({"ema_decays": ()}, r"ema_decays: expected one or more numbers in \[0, 1\), got \(\)"),
        ({"ema_decays": (0.9, 1.0)}, r"ema_decays: .* got \(0.9, 1.0\)"),
        ({"l1_weight": 0.0, "laplacian_weight": 0.0}, "no reconstruction term: one of l1, l2, charbonnier, laplacian"),
        ({"eq_probability": 1.5}, r"eq: expected a probability in \[0, 1\] and scales in \(0, 1\], got 1.5"),
        ({"eq_scales": (0.5, 2.0)}, r"eq: .* got 0.0 and \(0.5, 2.0\)"),
        ({"eq_scales": ()}, r"eq: .* got 0.0 and \(\)"),
        ({"lpips_weight": 1.0, "resolution": 16}, "lpips needs sides of 32 pixels, the smallest here have 16"),
        ({"gan": GAN, "eq_probability": 0.5, "eq_scales": (0.25,)}, "gan needs sides of 24 pixels, .* have 16"),
        ({"gan": dataclasses.replace(GAN, n_layers=5)}, "gan needs sides of 96 pixels, the smallest here have 64"),
        ({"eq_probability": 0.5, "eq_scales": (0.5,), "resolution": 16}, "laplacian needs sides of 16 pixels, .* 8"),
        ({"schedules": ("lpips",)}, "schedule: expected TERM=SHARE:FACTOR,... .* got 'lpips'"),
        ({"schedules": ("recon=0:1",)}, "schedule: expected a term of l1, .*, kl, align, vf, gan, eq, got 'recon'"),
        ({"schedules": ("lpips=0:1",)}, "schedule: lpips has weight 0"),
        (
            {**NO_LATENT, "kl_weight": 1e-6},
            "train 'decoder' leaves the latent .* so that it needs --kl-weight 0$",
        ),
        ({**NO_LATENT, "vf_weight": 1.0}, "train 'decoder' .* needs --vf-weight 0$"),
        ({"lr": math.nan}, "lr: expected a finite number, got nan"),
        ({"kl_weight": math.inf}, "kl_weight: expected a finite number, got inf"),
        ({"final_lr": -3.0}, "final_lr: expected 0 or more, got -3"),
    ],
)
def test_values_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PHOTOS, **changes)


def test_hog_needs_positions_of_whole_cells():
    small = dataclasses.replace(PHOTOS.autoencoder, ch_mult=(1, 2), shortcut="none")
    with pytest.raises(ValueError, match="teacher 'hog' needs latent positions of a multiple of 8 pixels, got 4"):
        dataclasses.replace(PHOTOS, autoencoder=small, warm_start="none")
    dataclasses.replace(PHOTOS, autoencoder=small, warm_start="none", align_weight=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "gan.weight: expected a number of 0 or more, got -1"),
        ({"lecam": math.nan}, "gan.lecam: expected a number of 0 or more"),
        ({"r1_every": 0}, "gan.r1_every: expected 1 or more, got 0"),
        ({"n_layers": 0}, "gan.n_layers: expected 1 or more, got 0"),
        ({"lr": 0.0}, "gan.lr: expected more than 0, got 0"),
        ({"augment": 3.0}, r"gan.augment: expected a probability in \[0, 1\], got 3"),
    ],
)
def test_values_of_the_game_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        GanConfig(**changes)


def test_statistics_of_an_rae_are_of_the_resolution_it_trains_at():
    with pytest.raises(ValueError, match=r"statistics are of --autoencoder.resolution 64, .* got 32"):
        dataclasses.replace(RAE_TINY, resolution=32)
    dataclasses.replace(RAE_TINY, resolution=32, init="decoder.safetensors")  # has its statistics


@pytest.fixture
def narrow_networks(monkeypatch):
    """The networks that presets name, at a block or four of width 32; what is fitted, on few pixels"""
    tiny = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    for rows, name in ((TEACHERS, "dinov2-l"), (RAE_ENCODERS, "dinov2-b-reg"), (RAE_ENCODERS, "tiny-random")):
        monkeypatch.setitem(rows, name, dataclasses.replace(rows[name], channels=32, options=tiny))
    monkeypatch.setitem(BACKBONES, "dino-s/8", BACKBONES["random-tiny"])
    monkeypatch.setattr(vae, "FITTED_PIXELS", 64 * 64 * 64)
    monkeypatch.setattr(vae, "HELD_OUT_CROPS", 4)
    monkeypatch.setattr(vae, "STATISTICS_CROPS", 8)


def narrowed(config):
    """Every switch of the preset, on networks of toy width, 20 steps in which the game begins"""
    game = config.gan
    if game.weight:
        start = dataclasses.replace(game.start, step=5, warmup=2, ramp=2, window=5, threshold=0.99)
        weights = "random" if game.discriminator == "vit" else ""
        game = dataclasses.replace(game, width=8, start=start, backbone_weights=weights)
    changes = {"batch": 2, "accumulate": min(config.accumulate, 2), "steps": 20, "warmup": 2, "workers": 0}
    changes |= {"gan": game, "lpips_net": "alex", "lpips_weights": "random", "precision": "fp32", "resolution": 32}
    if isinstance(config.autoencoder, RAEConfig):
        shape = dataclasses.replace(config.autoencoder, decoder="tiny", resolution=32)
        weights = "" if shape.encoder == "tiny-random" else "random"
        return dataclasses.replace(config, **changes, autoencoder=shape, teacher_weights=weights)
    narrow = {"ch": 8, "decoder_ch": 8, "num_groups": 8, "num_res_blocks": 1, "shortcut_width": 16}
    shape = dataclasses.replace(config.autoencoder, **narrow)
    weights = "random" if config.teacher != "hog" else ""
    return dataclasses.replace(config, **changes, autoencoder=shape, teacher_weights=weights)


@pytest.mark.filterwarnings("ignore:.*random")
@pytest.mark.parametrize("preset", VAE_PRESETS)
def test_each_preset_runs_20_steps(preset, narrow_networks, tmp_path, capsys):
    config = narrowed(VAE_PRESETS[preset])
    if preset == "flux.2-finetune":
        first = dataclasses.replace(narrowed(VAE_PRESETS["flux.2"]), gan=GanConfig(), vf_weight=0.0, lpips_weight=0.0)
        vae.train(first, RunOptions(out=tmp_path, name="first", stop_after=1))
        config = dataclasses.replace(config, init=str(tmp_path / "first"))
    whole = preset == "rae-tiny"  # the others leave before the report, which is drawn in seconds
    config = dataclasses.replace(config, steps=20 if whole else 21)
    assert vae.train(config, RunOptions(out=tmp_path, name="x", stop_after=20, save_every=30)) == 0
    records = read_log(tmp_path / "x" / "log.jsonl")
    losses = [r for r in records if "loss" in r]
    assert [r["step"] for r in losses] == [10, 20] and not [r for r in records if "skipped" in r or "dead" in r]
    terms = {n for n in ("l1", "laplacian", "lpips", "kl", "vf", "align") if config.weight(n)}
    terms |= {"gan", "d_loss", "gan_weight"} if config.gan.weight else set()
    assert terms <= losses[-1].keys() and ("gan_diagnosis" in losses[-1]) == bool(config.gan.weight)
    assert all(torch.isfinite(torch.tensor(v)) for r in losses for v in r.values() if not isinstance(v, str))
    ae = load_autoencoder(tmp_path / "x")
    assert ae.cfg == config.autoencoder and all(torch.isfinite(p).all() for p in ae.parameters())
    if whole:
        assert "held-out PSNR" in capsys.readouterr().out.splitlines()[-1]


def test_a_fine_tuning_preset_needs_something_to_start_from(capsys):
    assert vae.main(["--preset", "flux.2-finetune"]) == 2
    message = "error: --train decoder keeps an encoder that is trained already: give it with --init\n"
    assert capsys.readouterr().err == message


def test_presets_say_when_the_game_begins():
    starts = {name: p.gan.start for name, p in VAE_PRESETS.items() if p.gan.weight}
    assert starts.keys() == {"sd", "flux.1", "flux.2", "va-vae", "rae"}
    assert starts["flux.2"] == AdversarialStart(when="plateau", step=20_000, warmup=1000, ramp=5000)
    assert {name: s.step for name, s in starts.items() if s.when == "step"} == {
        "sd": 50_001, "flux.1": 50_001, "va-vae": 5001, "rae": 15_000,
    }  # fmt: skip
    assert VAE_PRESETS["rae"].autoencoder == RAES["rae"]
