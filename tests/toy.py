"""The smallest autoencoder that has every part, for tests of training: flags, configs, batches, what a run left."""

import dataclasses
import warnings

import torch

from flux2.checkpoint_folders import Checkpoints
from flux2.tensor_files import load_tensors
from train import vae
from train.data import CropBatches, embedded_photographs
from train.vae import main
from train.vae_config import parse_vae
from train.vae_trainer import VaeTrainer

TOY = ["--autoencoder.ch", "8", "--autoencoder.decoder-ch", "8", "--autoencoder.ch-mult", "1", "1", "1", "1"]
TOY += ["--autoencoder.num-groups", "4", "--batch", "2", "--resolution", "32", "--precision", "fp32", "--warmup", "2"]
RANDOM_LPIPS = {"lpips_weight": 2.0, "lpips_net": "alex", "lpips_weights": "random"}


def few_pixels(monkeypatch, held_out=4):
    """PCA, latent statistics and quality on a few crops: for tests of what happens, not how well."""
    for name, value in (("FITTED_PIXELS", 16 * 64 * 64), ("HELD_OUT_CROPS", held_out), ("STATISTICS_CROPS", 8)):
        monkeypatch.setattr(vae, name, value)


def toy(*flags, **changes):
    """The photos preset at toy size, then `flags`, then fields by name; gan_FIELD is a field of its gan."""
    config = parse_vae([*TOY, *flags])[0]
    gan = {k[4:]: changes.pop(k) for k in list(changes) if k.startswith("gan_")}
    if gan:
        changes["gan"] = dataclasses.replace(config.gan, **{"width": 8, **gan})
    return dataclasses.replace(config, **changes)


def trainer_of(config, backend="auto", compiled=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that LPIPS and teachers are random
        return VaeTrainer(config, torch.device("cpu"), compiled=compiled, backend=backend)


def batch_of(config, step=0):
    """uint8 [batch, 3, R, R]: what the run would train on at `step`."""
    return CropBatches(
        embedded_photographs()[0],
        resolution=config.resolution,
        batch=config.batch,
        augmentation=config.augmentation,
        seed=config.seed,
    )[step]


def pixels_of(config, step=0):
    return batch_of(config, step).float() / 127.5 - 1


def run(out, *flags):
    """Exit code of the program at toy size."""
    return main([*TOY, "--out", str(out), *flags])


def saved(folder):
    """{file: tensors} of a run's newest checkpoint."""
    store = Checkpoints(folder / "checkpoints", keep=9)
    return {p.name: load_tensors(p)[0] for p in store.path(store.steps()[-1]).glob("*.safetensors")}


def assert_same_bits(a, b):
    assert a.keys() == b.keys() and {"model", "ema"} <= {name.split(".")[0].split("_")[0] for name in a}
    for name in a:  # a mean not yet taken is NaN on both sides
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
