"""Aspect buckets: shapes of one area, each picture in the nearest, once an epoch, a batch of one shape."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy import TOY, few_pixels, run, saved

from train.buckets import BucketOrder, bucket_shapes, nearest_bucket, read_sizes
from train.crops import Augmentation, crop_of
from train.data import CropBatches, Pictures, batches
from train.sources import open_source
from train.vae_config import parse_vae

WHOLE = Augmentation(crop_scale=(1e6, 1e6), flip=False)
SIZES = [(60, 120), (120, 60), (80, 80), (60, 110), (90, 80), (118, 60), (30, 61)]


def folder_of(place, sizes=SIZES):
    place.mkdir()
    for i, (h, w) in enumerate(sizes):
        x, y = np.meshgrid(np.linspace(0, 255, w), np.linspace(0, 255, h))
        Image.fromarray(np.stack([x, y, np.full_like(x, 20 * i)], 2).astype(np.uint8)).save(place / f"{i}.png")
    return str(place)


@pytest.mark.parametrize(("num", "resolution", "multiple"), [(1, 64, 16), (3, 64, 16), (5, 256, 16), (9, 512, 32)])
def test_shapes_are_multiples_of_about_one_area(num, resolution, multiple):
    shapes = bucket_shapes(num, resolution=resolution, multiple=multiple)
    assert 1 <= len(shapes) <= num and len(set(shapes)) == len(shapes)
    assert shapes == sorted(shapes, key=lambda s: s[1] / s[0])
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert abs(height * width / resolution**2 - 1) < 0.5 * multiple * (1 / height + 1 / width)
        assert 1 / 2.3 < width / height < 2.3
    assert num == 1 or (resolution, resolution) in shapes
    with pytest.raises(ValueError, match="buckets: expected 1 or more"):
        bucket_shapes(0, resolution=resolution, multiple=multiple)


def test_nearest_by_ratio():
    shapes = [(128, 64), (88, 88), (64, 128)]
    assert [nearest_bucket(s, shapes) for s in ((1000, 10), (100, 100), (141, 101), (143, 100), (10, 999))] == [
        0, 1, 1, 0, 2
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_each_picture_comes_in_every_epoch_and_only_what_fills_up_twice(batch):
    buckets = np.random.default_rng(0).integers(0, 4, 37).tolist()
    order = BucketOrder(buckets, batch=batch, seed=5)
    assert order.steps == sum(math.ceil(buckets.count(b) / batch) for b in range(4))
    epochs = []
    for epoch in range(3):
        seen = []
        for step in range(epoch * order.steps, (epoch + 1) * order.steps):
            indices = [order.index_of(step, i) for i in range(batch)]
            assert {buckets[i] for i in indices} == {order.bucket_of(step)}
            assert batch > order.length_of(step) or len(set(indices)) == batch
            seen += indices
        assert set(seen) == set(range(37)) and len(seen) == order.steps * batch
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert BucketOrder(buckets, batch=batch, seed=6).index_of(1, 0) >= 0
    assert [order.index_of(s, 0) for s in range(9)] != [
        BucketOrder(buckets, batch=batch, seed=6).index_of(s, 0) for s in range(9)
    ]


def test_a_crop_of_a_shape_is_the_largest_rectangle_of_its_ratio_or_whole_pixels():
    height, width = 60, 120
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = np.stack([x, y, x], 2).astype(np.uint8)
    whole = crop_of(image, (32, 64), [0.5] * 12, WHOLE)
    assert whole.shape == (32, 64, 3) and whole[0, 0].max() <= 2 and whole[-1, -1, 0] >= 117 and whole[-1, 0, 1] >= 57
    native = crop_of(image, (16, 48), [0.3, 0.5, 0.5, 0.9, 0.9], Augmentation(flip=False))
    top, left = int(0.5 * 45), int(0.5 * 73)
    assert np.array_equal(native, image[top : top + 16, left : left + 48])
    turned = crop_of(image, (16, 48), [0.3, 0.5, 0.5, 0.9, 0.9], Augmentation(flip=False, rotate=True))
    assert np.array_equal(turned, native[::-1, ::-1])
    assert np.array_equal(crop_of(image, 32, [0.3] * 12, WHOLE), crop_of(image, (32, 32), [0.3] * 12, WHOLE))


def test_batches_are_of_one_shape_and_do_not_depend_on_workers(tmp_path):
    pictures = Pictures(open_source(folder_of(tmp_path / "p")))
    (tmp_path / "p" / "6.png").write_bytes(b"")  # no header: counted square, and passed over
    shapes = [(88, 48), (64, 64), (48, 88)]

    def dataset():
        return CropBatches(pictures, resolution=64, batch=2, augmentation=WHOLE, seed=1, buckets=shapes)

    alone, shared = (list(batches(dataset(), 0, 9, workers=w)) for w in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert {tuple(b.shape[2:]) for b in alone} == set(shapes)
    for step, batch in enumerate(alone):
        assert tuple(batch.shape[2:]) == dataset().shape_of(step)
    samples = [dataset().read(step) for step in range(8)]
    assert {b.sample for s in samples for b in s.bad} == {str(tmp_path / "p" / "6.png")}
    assert {i for s in samples for i in s.pictures} == set(range(6))


def test_sizes_come_in_order_and_one_by_one_of_bad_pictures():
    def size_of(index):
        if index == 3:
            raise ValueError("bad")
        return index + 1, 2

    assert read_sizes(size_of, 6) == [(1, 2), (2, 2), (3, 2), (1, 1), (5, 2), (6, 2)]


@pytest.fixture
def small(monkeypatch):
    few_pixels(monkeypatch)


def test_an_autoencoder_trains_on_buckets_and_resumes_to_the_same_bits(tmp_path, small):
    data = folder_of(tmp_path / "p", SIZES * 2)
    flags = ("--data", data, "--buckets", "3", "--steps", "6", "--accumulate", "2", "--eq-probability", "0.5")
    flags += (
        "--gan.weight",
        "0.5",
        "--gan.width",
        "8",
        "--gan.n-layers",
        "1",
        "--teacher",
        "hog",
        "--resolution",
        "64",
    )
    flags += ("--eq-scales", "0.5", "1.0")
    assert run(tmp_path, *flags, "--name", "whole") == 0
    assert run(tmp_path, *flags, "--name", "parts", "--stop-after", "3") == 0
    assert run(tmp_path, *flags, "--name", "parts", "--resume", "auto") == 0
    for file, tensors in saved(tmp_path / "whole").items():
        for name, value in saved(tmp_path / "parts")[file].items():
            assert torch.equal(value, tensors[name]) or value.isnan().any(), (file, name)
    assert (tmp_path / "whole" / "report.html").is_file()


def test_where_buckets_do_not_go():
    with pytest.raises(ValueError, match="buckets: an RAE's decoder is of one square grid"):
        parse_vae(["--preset", "rae-tiny", "--buckets", "3"])
    with pytest.raises(ValueError, match="buckets: expected 0 or more, got -1"):
        parse_vae([*TOY, "--buckets", "-1"])
    with pytest.raises(ValueError, match="the smallest here have 48"):
        parse_vae(["--preset", "sd", "--resolution", "64", "--buckets", "3", "--gan.n-layers", "5"])
