"""References: moments against NumPy, a cache that is used, mended and done without, and ADM's batches."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from flux2.features import Features, build_features
from train import references
from train.data import Augmentation
from train.picture_sets import FolderPictures, NpzPictures, TrainingCrops
from train.references import (
    Collected,
    adm_reference,
    collect,
    default_cache,
    load_reference,
    reference_of,
    save_reference,
)

CPU = torch.device("cpu")


class Means(Features):
    """Mean and maximum of two channels; counts its calls"""

    name, label, channels, identity = "inception", "FID", 4, "inception-0"

    def __init__(self):
        super().__init__()
        self.calls = 0

    def features(self, images):
        self.calls += 1
        x = images[:, :2].float().flatten(2)
        pool = torch.cat([x.mean(2), x.amax(2)], 1)
        return {"pool": pool, "spatial": pool[:, :2] * 3, "logits": pool}


def crops(num=50):
    return TrainingCrops(resolution=16, num=num, augmentation=Augmentation())


def test_collected_moments_and_rows():
    x = torch.randn(50, 4, dtype=torch.float64) + 100
    found = Collected(50, 7)
    for part in x.split(8):
        found.add({"pool": part, "spatial": part[:, :2], "logits": part})
    np.testing.assert_allclose(found.pool.cov, np.cov(x.T.numpy()), rtol=1e-10)
    np.testing.assert_allclose(found.spatial.mean, x[:, :2].mean(0), rtol=1e-12)
    assert torch.equal(found.rows(), x[[0, 7, 14, 21, 28, 35, 42]].float()) and found.logits().shape == (50, 4)
    assert Collected(3, 0)._wanted == set()


def test_a_reference_is_computed_once(tmp_path):
    features = Means()
    first = reference_of(crops(), features, CPU, cache=tmp_path)
    assert features.calls == 1 and first.count == 50 and len(first.rows) == 50
    again = reference_of(crops(), features, CPU, cache=tmp_path)
    assert features.calls == 1 and again.digest == first.digest and again.name == "photographs"
    assert torch.equal(again.pool.cov, first.pool.cov) and torch.equal(again.spatial.mean, first.spatial.mean)
    assert torch.equal(again.rows, first.rows)
    found = collect(crops(), features, CPU, keep=0, workers=0)
    assert torch.equal(found.pool.mean, first.pool.mean) and features.calls == 2
    reference_of(crops(49), features, CPU, cache=tmp_path)
    other = Means()
    other.identity = "inception-1"
    reference_of(crops(), other, CPU, cache=tmp_path)
    assert features.calls == 3 and other.calls == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.glob("*.json"))) == 3


def damage_tensors(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def claim_other_features(path):
    about = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**about, "features": "hog-v1"}))


DAMAGES = {
    "a bit": (damage_tensors, "expected SHA-256"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:200]), "cut short or damaged"),
    "no tensors": (lambda p: p.unlink(), "no such file"),
    "json": (lambda p: p.with_suffix(".json").write_text("{"), "not JSON"),
    "another format": (lambda p: p.with_suffix(".json").write_text("{}"), "expected a reference of version 1"),
    "other features": (claim_other_features, "expected the statistics of photographs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_computed_again(tmp_path, damage, capsys):
    features, (spoil, reason) = Means(), DAMAGES[damage]
    first = reference_of(crops(), features, CPU, cache=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    spoil(path)
    again = reference_of(crops(), features, CPU, cache=tmp_path)
    assert features.calls == 2 and torch.equal(again.pool.mean, first.pool.mean)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line and line.endswith(": computed again")
    reference_of(crops(), features, CPU, cache=tmp_path)
    assert features.calls == 2


def test_without_a_place_to_keep_it(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    reference = reference_of(crops(), Means(), CPU, cache=tmp_path / "file" / "cache")
    assert reference.count == 50 and "the reference is not kept: " in capsys.readouterr().err


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "flux2-tokenizer" / "reference"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert str(default_cache()) == "/home/x/.cache/flux2-tokenizer/reference"


def test_saved_references(tmp_path):
    reference = reference_of(crops(), Means(), CPU, cache=tmp_path)
    save_reference(dataclasses.replace(reference, spatial=None), tmp_path / "mine.safetensors")
    loaded = load_reference(tmp_path / "mine.safetensors")
    assert loaded.spatial is None and loaded.digest == reference.digest and loaded.crop == reference.crop
    (tmp_path / "mine.json").unlink()
    with pytest.raises(FileNotFoundError, match="mine.safetensors: expected a saved reference, with mine.json"):
        load_reference(tmp_path / "mine.safetensors")


@pytest.fixture
def batch(tmp_path):
    """An ADM reference batch whose statistics are not those of its few pictures"""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    arrays = {"arr_0": rng.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8), "mu": np.arange(4.0)}
    arrays |= {"sigma": root @ root.T, "mu_s": np.arange(2.0), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "batch.npz", **arrays)
    return tmp_path / "batch.npz", arrays


def test_adm_statistics_are_taken_as_stored(batch, tmp_path):
    path, arrays = batch
    reference = adm_reference(path, Means(), CPU, cache=tmp_path / "cache")
    np.testing.assert_allclose(reference.pool.mean, arrays["mu"])
    np.testing.assert_allclose(reference.pool.cov, arrays["sigma"], rtol=1e-12)
    np.testing.assert_allclose(reference.spatial.cov, arrays["sigma_s"])
    assert reference.count == 0 and len(reference.rows) == 12  # of how many pictures is not known; some are there
    assert torch.equal(reference.rows, Means()(next(NpzPictures(path).batches()))["pool"])


def test_adm_statistics_are_inceptions_alone(batch, tmp_path):
    reference = adm_reference(batch[0], build_features("hog"), CPU, cache=tmp_path / "cache")
    assert reference.pool.dim == 120 and reference.count == reference.pool.count == 12


def test_adm_batches_with_parts_missing(batch, tmp_path):
    path, arrays = batch
    np.savez(path, mu=arrays["mu"], sigma=arrays["sigma"])
    reference = adm_reference(path, Means(), CPU, cache=tmp_path / "cache")
    assert reference.spatial is None and reference.rows.shape == (0, 4)
    with pytest.raises(ValueError, match="expected arr_0, got mu, sigma"):
        adm_reference(path, build_features("hog"), CPU, cache=tmp_path / "cache")
    wrong = {
        r"expected mu \[4\], got \[3\]": (np.zeros(3), np.eye(3)),
        "mu and sigma: moments: expected a mean": (np.zeros(4), np.eye(3)),
        "mu and sigma: moments: expected a finite": (np.full(4, np.nan), np.eye(4)),
    }
    for message, (mu, sigma) in wrong.items():
        np.savez(path, mu=mu, sigma=sigma)
        with pytest.raises(ValueError, match=message):
            adm_reference(path, Means(), CPU, cache=tmp_path / "cache")


def test_an_interrupted_reference_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(references, "collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reference_of(crops(), Means(), CPU, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_workers_give_the_same(tmp_path):
    from PIL import Image

    for i in range(5):
        image = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    pictures = FolderPictures(tmp_path, resolution=16)
    pictures.chunk = 2
    found = [collect(pictures, Means(), CPU, keep=9, workers=n) for n in (0, 1)]
    assert torch.equal(found[0].rows(), found[1].rows())
