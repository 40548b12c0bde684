"""Sets of pictures: what they hold against the files, digests that know their content, and refusals."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flux2.images import adm_center_crop
from train.data import Augmentation, embedded_photographs, held_out_crops
from train.picture_sets import FolderPictures, HeldOutPhotographs, NpzPictures, TrainingCrops, check_pairs, read_npz


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of different sizes in two folders"""
    for i in range(7):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(40 + i, 90, 3, seed=i)).save(path)
    return tmp_path / "pictures"


def all_of(pictures):
    return torch.cat(list(pictures.batches()))


def test_a_folder_is_cropped_in_the_order_of_its_names(folder):
    pictures = FolderPictures(folder, resolution=16)
    pictures.chunk = 3
    got = all_of(pictures)
    order = [0, 2, 4, 6, 1, 3, 5]
    assert pictures.names() == [f"{'ab'[i % 2]}/{i}" for i in order] and pictures.side() == 16
    for x, i in zip(got, order, strict=True):
        assert (x.permute(1, 2, 0).numpy() == adm_center_crop(noise(40 + i, 90, 3, seed=i), 16)).all()


def test_some_of_a_folder_are_spread_over_it(folder):
    assert FolderPictures(folder, resolution=16, num=3).names() == ["a/0", "a/4", "b/1"]
    with pytest.raises(ValueError, match="expected 8 pictures or more, got 7"):
        FolderPictures(folder, num=8)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        FolderPictures(folder / "none")


def test_pictures_of_several_sizes_need_a_crop(folder):
    with pytest.raises(ValueError, match=r"2.png: expected 90x40 pixels, as 0.png has, got 90x42; .* --resolution"):
        all_of(FolderPictures(folder))
    (folder / "a" / "6.png").write_bytes(b"")
    with pytest.raises(ValueError, match="6.png: not a picture"):
        all_of(FolderPictures(folder, resolution=16))


def test_a_digest_knows_content_names_and_crop_but_not_the_place(folder):
    first = FolderPictures(folder, resolution=16).digest()
    moved = folder.rename(folder.parent / "moved")
    assert FolderPictures(moved, resolution=16).digest() == first and len(first) == 64
    digests = {
        first,
        FolderPictures(moved, resolution=32).digest(),
        FolderPictures(moved, resolution=16, num=6).digest(),
    }
    (moved / "a" / "0.png").rename(moved / "a" / "1.png")
    digests.add(FolderPictures(moved, resolution=16).digest())
    (moved / "a" / "1.png").rename(moved / "a" / "0.png")
    assert FolderPictures(moved, resolution=16).digest() == first
    Image.fromarray(noise(40, 90, 3, seed=9)).save(moved / "a" / "0.png")
    assert len(digests | {FolderPictures(moved, resolution=16).digest()}) == 5


def test_folders_are_paired_by_name(folder, tmp_path):
    own = FolderPictures(folder)
    other = tmp_path / "other"
    for name in own.names():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 8, 3)).save(other / f"{name}.jpg")
    check_pairs(own, FolderPictures(other))
    (other / "b" / "5.jpg").rename(other / "b" / "9.jpg")
    expected = r"other: expected the 7 names of .*pictures, got 1 missing, as b/5; 1 others, as b/9"
    with pytest.raises(ValueError, match=expected):
        check_pairs(own, FolderPictures(other))
    Image.fromarray(noise(8, 8, 3)).save(other / "a" / "0.png")
    with pytest.raises(ValueError, match="other: expected one picture of each name, got several of a/0"):
        check_pairs(own, FolderPictures(other))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    images = noise(70, 8, 12, 3)
    save(tmp_path / "x.npz", arr_0=images, labels=np.arange(70), mu=np.arange(3.0), sigma=np.eye(3, dtype=np.float32))
    pictures = NpzPictures(tmp_path / "x.npz")
    parts = list(pictures.batches(workers=2))
    assert [len(p) for p in parts] == [32, 32, 6] and pictures.count == 70
    assert (torch.cat(parts).permute(0, 2, 3, 1).numpy() == images).all()
    stored = read_npz(tmp_path / "x.npz", ("mu", "sigma", "mu_s"))
    assert stored.keys() == {"mu", "sigma"} and stored["sigma"].dtype == np.float64
    with pytest.raises(ValueError, match="expected square pictures, got 12x8"):
        pictures.side()
    first = pictures.digest()
    save(tmp_path / "x.npz", arr_0=images[::-1])
    assert NpzPictures(tmp_path / "x.npz").digest() != first


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_npz_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    wrong = {
        r"uint8 \[2, 4, 4, 1\]": noise(2, 4, 4, 1),
        r"float64 \[2, 4, 4, 3\]": np.zeros((2, 4, 4, 3)),
        r"uint8 \[0, 4, 4, 3\]": noise(0, 4, 4, 3),
        r"uint8 \[2, 4, 4, 3\] by columns": np.asfortranarray(noise(2, 4, 4, 3)),
    }
    for got, array in wrong.items():
        np.savez(path, arr_0=array)
        with pytest.raises(ValueError, match=rf"expected arr_0 uint8 \[N, H, W, 3\], got {got}"):
            NpzPictures(path)
    np.savez(path, other=noise(2, 4, 4, 3))
    with pytest.raises(ValueError, match="expected arr_0, got other"):
        NpzPictures(path)
    np.savez(path, arr_0=np.array([Bomb()], dtype=object), mu=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match="expected arr_0 uint8"):
        NpzPictures(path)
    with pytest.raises(ValueError, match="expected arrays of numbers, got something else"):
        read_npz(path, ("mu",))
    path.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="expected an .npz file, got something else"):
        NpzPictures(path)
    with pytest.raises(FileNotFoundError):
        NpzPictures(tmp_path / "none.npz")


def test_damaged_npz_is_refused(tmp_path):
    path, images = tmp_path / "x.npz", noise(40, 8, 8, 3)
    np.savez(path, arr_0=images)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged .npz file"):  # the archive's own checksum
        all_of(NpzPictures(path))
    whole = io.BytesIO()
    np.save(whole, images)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", whole.getvalue()[:-100])
    with pytest.raises(ValueError, match="arr_0 is cut short: expected 40 pictures"):
        all_of(NpzPictures(path))


def test_held_out_photographs_are_the_crops_that_training_reports():
    pictures = HeldOutPhotographs(resolution=32, num=40)
    assert torch.equal(all_of(pictures), held_out_crops(embedded_photographs()[1], num_crops=40, resolution=32))
    assert HeldOutPhotographs(resolution=64).count == 256


def test_more_training_crops_begin_with_the_fewer():
    crops = [TrainingCrops(resolution=16, num=n, augmentation=Augmentation(crop_scale=(1, 4))) for n in (70, 20)]
    many, few = map(all_of, crops)
    assert many.shape == (70, 3, 16, 16) and torch.equal(many[:20], few)
    assert crops[0].crop.endswith("training pictures, 1 to 4 source pixels a pixel, mirrored, seed 0")
    assert len({c.digest() for c in crops}) == 2
