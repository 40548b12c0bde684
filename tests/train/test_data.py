"""Crops: pure functions of (seed, step, sample), right geometry, held-out pictures kept apart."""

import numpy as np
import pytest
import torch
from PIL import Image

from train.crops import Augmentation, crop_of
from train.data import (
    HELD_OUT_PHOTOGRAPHS,
    CropBatches,
    Pictures,
    batches,
    embedded_photographs,
    held_out_crops,
    open_pictures,
    training_pixels,
)
from train.sources import Files

FULL = Augmentation(crop_scale=(0.5, 2.0), rotate=True, colour=0.3)


def dataset(**changes):
    options = {"resolution": 32, "batch": 4, "augmentation": FULL, "seed": 3} | changes
    return CropBatches(embedded_photographs()[0], **options)


def coordinates(height, width):
    """A picture whose red and green say where each pixel is."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack((rows, columns, np.zeros_like(rows)), axis=-1).astype(np.uint8)


def test_embedded_photographs_hold_out_coffee_and_chelsea():
    train, held_out = embedded_photographs()
    assert len(train) == 7
    assert tuple(p.name for p in held_out.paths) == HELD_OUT_PHOTOGRAPHS == ("coffee.png", "chelsea.png")
    assert not {p.name for p in train.paths} & set(HELD_OUT_PHOTOGRAPHS)
    assert all(train[i].ndim == 3 and train[i].dtype == np.uint8 for i in range(7))


def test_a_crop_depends_on_seed_step_and_sample_alone():
    batch = dataset()[5]
    assert batch.dtype == torch.uint8 and batch.shape == (4, 3, 32, 32)
    assert torch.equal(batch, dataset()[5])
    assert not torch.equal(batch, dataset()[6]) and not torch.equal(batch, dataset(seed=4)[5])
    assert len({bytes(c.numpy()) for c in batch}) == 4


def test_each_epoch_visits_each_picture_once_in_a_new_order():
    crops = dataset()
    visits = [crops.picture_of(*divmod(n, 4)) for n in range(28)]
    epochs = [visits[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_sample_does_not_depend_on_the_batch_beside_it():
    """Crop parameters come from (seed, step, sample): a larger batch at step 0 begins with the smaller one."""
    assert torch.equal(dataset(batch=2)[0], dataset(batch=4)[0][:2])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers):
    alone = list(batches(dataset(), 3, 7, workers=0))
    shared = list(batches(dataset(), 3, 7, workers=workers))
    assert len(alone) == len(shared) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert torch.equal(next(iter(batches(dataset(), 5, 7, workers=0))), alone[2])


def test_native_scale_is_copied_pixel_for_pixel():
    image = coordinates(100, 200)
    for u in ([0.0] * 5, [0.5] * 5, [0.999999] * 5):
        crop = crop_of(image, 64, u, Augmentation(flip=False)).astype(int)
        assert crop.shape == (64, 64, 3)
        assert (np.diff(crop[:, 0, 0]) == 1).all() and (np.diff(crop[0, :, 1]) == 1).all()
    assert crop[-1, -1, 0] == 99 and crop[-1, -1, 1] == 199  # the far corner is reached
    assert crop_of(image, 64, [0.0] * 5, Augmentation(flip=False))[0, 0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_scale_is_source_pixels_per_output_pixel(scale):
    crop = crop_of(coordinates(200, 250), 64, [0.5] * 5, Augmentation(crop_scale=(scale, scale), flip=False)).astype(
        float
    )
    assert np.polyfit(np.arange(20), crop[20:40, 32, 0], 1)[0] == pytest.approx(scale, rel=0.05)
    assert np.polyfit(np.arange(20), crop[32, 20:40, 1], 1)[0] == pytest.approx(scale, rel=0.05)


def test_small_pictures_are_enlarged_and_flips_and_rotations_applied():
    assert crop_of(coordinates(5, 9), 64, [0.5] * 5, Augmentation()).shape == (64, 64, 3)
    image = coordinates(64, 64)
    plain = crop_of(image, 64, [0.0, 0.0, 0.0, 0.9, 0.0], Augmentation())
    flipped = crop_of(image, 64, [0.0, 0.0, 0.0, 0.1, 0.0], Augmentation())
    turned = crop_of(image, 64, [0.0, 0.0, 0.0, 0.9, 0.3], Augmentation(rotate=True))
    assert np.array_equal(flipped, plain[:, ::-1]) and np.array_equal(turned, np.rot90(plain))


def test_colour_zero_changes_nothing_and_more_changes_the_mean():
    plain = dataset(augmentation=Augmentation())[0].float()
    coloured = dataset(augmentation=Augmentation(colour=0.5))[0].float()
    assert torch.equal(plain, dataset(augmentation=Augmentation(colour=0.0))[0].float())
    assert (plain - coloured).abs().mean() > 1


def test_held_out_crops_are_fixed_and_half_of_each():
    crops = held_out_crops(embedded_photographs()[1])
    assert crops.shape == (256, 3, 64, 64) and torch.equal(crops, held_out_crops(embedded_photographs()[1]))
    coffee, chelsea = (torch.from_numpy(embedded_photographs()[1][i].copy()).permute(2, 0, 1) for i in (0, 1))
    for crop, picture in ((crops[0], coffee), (crops[127], coffee), (crops[128], chelsea), (crops[255], chelsea)):
        windows = picture[0].unfold(0, 64, 1).unfold(1, 64, 1)  # every 64x64 window of the red plane
        assert (windows == crop[0]).flatten(2).all(2).any()


def test_folder_splits_off_held_out_pictures(tmp_path):
    for i in range(25):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(tmp_path / f"class{i % 2}" / f"{i:02}.png")
    train, held_out = open_pictures(str(tmp_path))
    assert len(train) == 23 and len(held_out) == 2
    assert not {str(p) for p in train.paths} & {str(p) for p in held_out.paths}
    assert len(open_pictures("photographs", str(tmp_path / "class0"))[1]) == 13
    one = tmp_path / "one"
    one.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(one / "a.png")
    with pytest.raises(ValueError, match="at least 2 pictures"):
        open_pictures(str(one))


def test_folder_errors_are_one_sentence(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="missing"):
        open_pictures(str(tmp_path / "missing"))
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match=r"a\.jpg"):
        CropBatches(Pictures(Files([tmp_path / "a.jpg"])), resolution=8, batch=1, augmentation=FULL, seed=0)[0]


def test_training_pixels_are_outside_the_run():
    x = training_pixels(dataset(), 10)
    assert x.shape == (12, 3, 32, 32) and x.dtype == torch.float32 and x.abs().max() <= 1
    assert torch.equal(x[:4], dataset()[2**31].float() / 127.5 - 1)
