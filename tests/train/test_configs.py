"""The command line: presets, overrides, and errors that name the nearest name."""

import dataclasses
import re
import subprocess
import sys

import pytest

from train.configs import RunOptions, describe, differences, in_short, to_dict
from train.vae import main
from train.vae_config import VAE_PRESETS, parse_vae


def test_presets_are_rows_and_flags_go_over_them():
    config, run = parse_vae(
        ["--preset", "flux.2", "--steps", "7", "--autoencoder.ch", "64", "--compile", "--name", "x"]
    )
    assert (config.preset, config.steps, config.autoencoder.ch, config.autoencoder.z_channels) == ("flux.2", 7, 64, 32)
    assert config.lr == VAE_PRESETS["flux.2"].lr and run.compile and run.name == "x"
    assert parse_vae([]) == (VAE_PRESETS["photos"], RunOptions())


def test_default_is_flux2_shaped():
    shape = VAE_PRESETS["photos"].autoencoder
    assert (shape.z_channels, shape.downsample, shape.latent_channels, shape.latent_norm) == (32, 8, 128, "batchnorm")
    assert VAE_PRESETS["flux.2"].autoencoder.shortcut == "none"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'photo'; did you mean 'photos'\?"):
        parse_vae(["--preset", "photo"])


def test_unknown_key_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_vae(["--stepz", "3"])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resolution", "40"], "resolution: expected a positive multiple of 16, got 40"),
        (["--batch", "0"], "batch: expected more than 0, got 0"),
        (["--ema-decays", "1"], r"ema_decays: expected one or more numbers in \[0, 1\), got \(1"),
        (["--autoencoder.shortcut", "none"], "warm_start: 'pca' needs"),
        (["--autoencoder.ch", "12"], "widths must be multiples of num_groups=8"),
        (["--name", "a/b"], "expected a plain folder name, got 'a/b'"),
        (["--augmentation.crop-scale", "2", "1"], "crop_scale"),
    ],
)
def test_values_that_do_not_fit(argv, message, capsys):
    """Exit code 2 and the message, in one line or in the command line parser's frame."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    error = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().err).split())
    assert code == 2 and re.search(message, error), error
    assert "Traceback" not in error


def test_differences_name_each_key():
    a, b = to_dict(VAE_PRESETS["photos"]), to_dict(VAE_PRESETS["photos"])
    assert differences(a, b) == []
    b["lr"], b["autoencoder"]["ch"] = 5.0, 99
    assert differences(a, b) == [
        f"autoencoder.ch: saved {a['autoencoder']['ch']}, now 99",
        f"lr: saved {a['lr']}, now 5.0",
    ]


def test_a_run_prints_what_differs_from_its_preset():
    config = VAE_PRESETS["photos"]
    assert in_short(config, VAE_PRESETS) == "preset photos"
    changed = dataclasses.replace(config, steps=7)
    assert in_short(changed, VAE_PRESETS) == f"preset photos, but\n  steps: preset {config.steps}, now 7"
    own = dataclasses.replace(config, preset="made in code")
    assert in_short(own, VAE_PRESETS) == describe(own).rstrip()


def test_help_shows_an_example():
    out = subprocess.run([sys.executable, "-m", "train.vae", "--help"], capture_output=True, text=True, timeout=180)
    assert out.returncode == 0
    assert "python -m train.vae --compile" in out.stdout and "--resume" in out.stdout
