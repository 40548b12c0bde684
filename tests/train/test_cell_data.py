"""What cells read: crops that judge are fixed and never trained on, the reference's moments, latents kept on disk."""

import dataclasses
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy

from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import save_autoencoder
from flux2.features import build_features
from flux2.images import save_png
from flux2.tensor_files import load_tensors
from train import cache, cell_data
from train.cache import LatentCache
from train.cell_data import PROBE_STEP, Crops, fixed_crops, load_latents, make_latents, reference_moments
from train.crops import Augmentation, centre_square
from train.data import CropBatches
from train.loop import Interrupted

CPU = torch.device("cpu")
CROPS = Crops(resolution=32, cached_crops=14)


def pixels_of(crops, num, pictures=None, classes=(), **kwargs):
    return torch.cat([x for x, _ in fixed_crops(crops, pictures or crops.pictures()[0], list(classes), num, **kwargs)])


def as_set(pixels):
    """Crops as bytes, but for those of a flat sky, which are all the same."""
    return {x.numpy().tobytes() for x in pixels if x.flatten(1).float().std(1).any()}


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """Files of two autoencoders with different weights."""
    folder = tmp_path_factory.mktemp("autoencoders")
    for seed in (0, 1):
        torch.manual_seed(seed)
        ae = AutoEncoder(dataclasses.replace(toy.toy().autoencoder, z_channels=2))
        save_autoencoder(ae, folder / f"{seed}.safetensors")
    return [str(folder / f"{seed}.safetensors") for seed in (0, 1)]


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """Folder of 11 pictures: 5 of class a, 6 of class b; the k-th by name is of grey 10 k throughout."""
    folder = tmp_path_factory.mktemp("greys")
    for k in range(11):
        place = folder / ("a" if k < 5 else "b")
        place.mkdir(exist_ok=True)
        save_png(place / f"{k:02d}.png", np.full((40, 48, 3), 10 * k, np.uint8))
    return folder


def test_fixed_crops_are_the_same_for_every_call_and_begin_alike(monkeypatch):
    pixels = pixels_of(CROPS, 70)
    assert pixels.shape == (70, 3, 32, 32) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, pixels_of(CROPS, 70))
    assert torch.equal(pixels[:66], pixels_of(CROPS, 66))
    assert len(as_set(pixels)) > 60


def test_fixed_crops_are_never_those_of_training():
    pictures = CROPS.pictures()[0]
    config = cache.CacheConfig(autoencoder="", out=Path(), resolution=32, crops=20, crop_scale=CROPS.crop_scale)
    cached = torch.stack([cache._pixels(config, pictures[i // 20], i) for i in range(20 * len(pictures))])
    augmentation = Augmentation(crop_scale=CROPS.crop_scale)  # of the training of an autoencoder
    drawn = CropBatches(pictures, resolution=32, batch=64, augmentation=augmentation, seed=0)
    trained = as_set(cached) | as_set(cached.flip(3)) | as_set(torch.cat([drawn[step] for step in range(4)]))
    judging, probing = as_set(pixels_of(CROPS, 192)), as_set(pixels_of(CROPS, 192, first_step=PROBE_STEP))
    assert len(trained) > 400 and len(judging) > 150
    assert not trained & judging and not trained & probing and not judging & probing


def test_labels_of_fixed_crops_are_of_their_pictures(greys):
    crops = Crops(data=str(greys), held_out=str(greys / "b"), resolution=16, cached_crops=30)
    pictures = crops.pictures()[0]
    ((pixels, labels),) = fixed_crops(crops, pictures, ["a", "b"], 22)
    assert labels.tolist() == [int(x[0, 0, 0] >= 50) for x in pixels] and labels.unique().tolist() == [0, 1]
    ((_, labels),) = fixed_crops(crops, pictures, ["b"], 22)
    assert set(labels.tolist()) == {0, 1}  # 1: of no class


@pytest.mark.parametrize("num, chosen", [(1, [0]), (3, [0, 5, 10]), (6, [0, 2, 4, 6, 8, 10]), (11, range(11))])
def test_centre_squares_are_spread_evenly_over_the_pictures(greys, monkeypatch, num, chosen):
    monkeypatch.setattr(cell_data, "PART", 4)
    crops = Crops(data=str(greys), held_out=str(greys / "b"), resolution=16, cached_crops=0)
    parts = list(fixed_crops(crops, crops.pictures()[0], ["a", "b"], num))
    assert [len(x) for x, _ in parts] == [4] * (num // 4) + [num % 4] * (num % 4 > 0)
    pixels, labels = (torch.cat(x) for x in zip(*parts, strict=True))
    assert pixels.shape[1:] == (3, 16, 16)
    assert (pixels.flatten(1).float().mean(1) / 10).tolist() == list(chosen)
    assert labels.tolist() == [int(k >= 5) for k in chosen]


def test_centre_squares_of_uneven_and_too_many(greys):
    crops = Crops(data=str(greys), held_out=str(greys / "b"), resolution=16, cached_crops=0)
    chosen = (pixels_of(crops, 8)[:, 0, 0, 0] / 10).tolist()
    assert len(set(chosen)) == 8 and chosen[0] == 0 and chosen[-1] == 10 and set(np.diff(chosen)) <= {1, 2}
    assert len(pixels_of(crops, 10**9)) == 11
    photographs = Crops(resolution=16, cached_crops=0)
    expected = [centre_square(image, 16) for image in map(photographs.pictures()[0].__getitem__, range(7))]
    np.testing.assert_array_equal(pixels_of(photographs, 7).permute(0, 2, 3, 1).numpy(), np.stack(expected))


def test_reference_is_the_mean_and_covariance_of_the_features():
    features, calls = build_features("hog"), []
    moments = reference_moments(CROPS, features, 70, CPU, check=lambda: calls.append(1))
    rows = features(pixels_of(CROPS, 70))["pool"].double().numpy()
    assert moments.count == 70 and len(calls) == 2  # parts of 64
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.cov.numpy(), np.cov(rows, rowvar=False), atol=1e-12)


def test_what_check_raises_ends_the_reference():
    def check():
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        reference_moments(CROPS, build_features("hog"), 70, CPU, check=check)


def test_latents_are_kept_and_what_is_missing_is_made_again(autoencoders, tmp_path):
    folder = tmp_path / "latents"
    make_latents(autoencoders[0], folder, CROPS, held_out=5, device=CPU)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    make_latents(autoencoders[0], folder, CROPS, held_out=5, device=CPU)
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    for name, other in (("held_out.safetensors", "shard-00000.safetensors"), ("shard-00000.safetensors", None)):
        (folder / name).unlink()
        make_latents(autoencoders[0], folder, CROPS, held_out=5, device=CPU)
        assert (folder / name).read_bytes() == before[name][1]
        assert other is None or (folder / other).stat().st_mtime_ns == before[other][0]

    found = load_latents(autoencoders[0], folder, SimpleNamespace(count=9), CPU)
    pixels = pixels_of(CROPS, 5, CROPS.pictures()[1])
    with torch.no_grad():
        expected = found.ae.encode(pixels.float() / 127.5 - 1)
    torch.testing.assert_close(found.held_out, expected, rtol=1e-5, atol=1e-5)
    assert (found.channels, found.reference.count, len(found.cache)) == (8, 9, 14)
    assert found.labels.tolist() == [len(found.cache.classes)] * 5  # held-out photographs are of no class
    assert not any(p.requires_grad for p in found.ae.parameters())

    with pytest.raises(ValueError, match="cache of other content: content.autoencoder"):
        make_latents(autoencoders[1], folder, CROPS, held_out=5, device=CPU)
    with pytest.raises(ValueError, match="is stale: it was made with an autoencoder of hash"):
        load_latents(autoencoders[1], folder, SimpleNamespace(count=9), CPU)
    (folder / "held_out.safetensors").write_bytes(before["held_out.safetensors"][1][:-7])
    with pytest.raises(ValueError, match=r"held_out\.safetensors"):
        load_latents(autoencoders[0], folder, SimpleNamespace(count=9), CPU)


def test_interrupted_by_a_signal_while_encoding_and_gone_on_with(autoencoders, tmp_path, monkeypatch):
    encode = cache._encode

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(*args)

    monkeypatch.setattr(cache, "_encode", interrupted)
    with pytest.raises(Interrupted) as raised:
        make_latents(autoencoders[0], tmp_path / "latents", CROPS, held_out=5, device=CPU)
    assert raised.value.signal == signal.SIGTERM and not (tmp_path / "latents" / "held_out.safetensors").exists()
    monkeypatch.setattr(cache, "_encode", encode)
    make_latents(autoencoders[0], tmp_path / "latents", CROPS, held_out=5, device=CPU)
    assert load_tensors(tmp_path / "latents" / "held_out.safetensors")[0]["latents"].shape == (5, 8, 2, 2)


@pytest.mark.parametrize("wanted, share", [(0, 1), (1, 2), (7, 2), (15, 3)])
def test_what_is_cached_is_cut_as_what_judges(autoencoders, tmp_path, wanted, share):
    crops = dataclasses.replace(CROPS, cached_crops=wanted)
    assert crops.share() == share
    make_latents(autoencoders[0], tmp_path, crops, held_out=1, device=CPU)
    cached = LatentCache(tmp_path)
    assert (len(cached), cached.crop_scale) == (7 * share, CROPS.crop_scale if wanted else None)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"resolution": 0}, "resolution: expected 1 or more, got 0"),
        ({"cached_crops": -1}, "cached_crops: expected 0 or more, got -1"),
        ({"crop_scale": (2.0, 1.0)}, r"crop_scale: expected 0 < low <= high, got \(2.0, 1.0\)"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale: expected 0 < low <= high, got \(0.0, 1.0\)"),
    ],
)
def test_errors_name_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CROPS, **fields)


def test_pictures_and_sizes_that_do_not_fit_are_errors(autoencoders, greys, tmp_path):
    with pytest.raises((ValueError, OSError), match="nothing-here"):
        Crops(data=str(tmp_path / "nothing-here")).pictures()
    with pytest.raises(ValueError, match="resolution: expected a multiple of 16, got 24"):
        crops = dataclasses.replace(CROPS, resolution=24)
        make_latents(autoencoders[0], tmp_path / "latents", crops, held_out=1, device=CPU)
    with pytest.raises(FileNotFoundError):
        load_latents(autoencoders[0], tmp_path / "latents", SimpleNamespace(count=9), CPU)
