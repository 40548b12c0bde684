"""Sources: a folder, tar shards, a zip and a table hold the same pictures; what is wrong with one is named."""

import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from train import sources
from train.crops import Augmentation
from train.data import CropBatches, Pictures, batches, open_pictures
from train.sources import expand_braces, open_source

NUM = 12


def encoded(i):
    rng = np.random.default_rng(i)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


CONTENT = [encoded(i) for i in range(NUM)]
CLASSES = ["cat" if i % 2 else "dog" for i in range(NUM)]


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def make_folder(place):
    for i, (content, label) in enumerate(zip(CONTENT, CLASSES, strict=True)):
        (place / "folder" / label).mkdir(parents=True, exist_ok=True)
        (place / "folder" / label / f"{i:03}.png").write_bytes(content)
    return str(place / "folder")


def make_tar(place, form=tarfile.PAX_FORMAT, long=""):
    (place / "shards").mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(place / "shards" / f"{shard:03}.tar", "w", format=form) as archive:
            for i in range(shard * 4, shard * 4 + 4):
                add(archive, f"{long}{i:03}.png", CONTENT[i])
                if i % 3:
                    add(archive, f"{long}{i:03}.cls", CLASSES[i].encode())
                else:
                    add(archive, f"{long}{i:03}.json", json.dumps({"label": CLASSES[i]}).encode())
    return str(place / "shards")


def make_zip(place):
    with zipfile.ZipFile(place / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, (content, label) in enumerate(zip(CONTENT, CLASSES, strict=True)):
            archive.writestr(f"{label}/{i:03}.png", content)
    return str(place / "p.zip")


def make_table(place):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": [{"bytes": c, "path": None} for c in CONTENT], "label": CLASSES}
    (place / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(place / "table" / "a.parquet")
    return str(place / "table")


MAKERS = {"folder": make_folder, "tar": make_tar, "zip": make_zip, "table": make_table}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def crops(pictures, **changes):
    options = {"resolution": 16, "batch": 5, "augmentation": Augmentation(crop_scale=(1.0, 2.0)), "seed": 1} | changes
    return CropBatches(pictures, **options)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_gives_the_same_pictures_and_classes(kind, tmp_path):
    pictures = Pictures(open_source(MAKERS[kind](tmp_path)))
    assert len(pictures) == NUM
    order = sorted(range(NUM), key=lambda i: (CLASSES[i], i)) if kind == "folder" else range(NUM)
    for got, i in enumerate(order):
        assert np.array_equal(pictures[got], np.array(Image.open(io.BytesIO(CONTENT[i])).convert("RGB")))
        assert pictures.size(got) == (30 + i, 40)
    assert pictures.labels == [CLASSES[i] for i in order]
    assert len({pictures.stamp(i) for i in range(NUM)}) == NUM
    assert np.array_equal(pickle.loads(pickle.dumps(pictures))[3], pictures[3])


@pytest.mark.parametrize("kind", MAKERS)
def test_resumed_in_mid_epoch_and_read_by_workers_batches_are_the_same(kind, tmp_path):
    data = MAKERS[kind](tmp_path)
    whole = list(batches(crops(open_pictures(data)[0]), 0, 7, workers=0))
    resumed = list(batches(crops(open_pictures(data)[0]), 3, 7, workers=2))  # 3 steps of 5 are within the second epoch
    assert len(resumed) == 4 and all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))


def test_pictures_of_archives_are_held_out_like_those_of_folders(tmp_path):
    train, held_out = open_pictures(make_zip(tmp_path))
    assert (len(train), len(held_out)) == (NUM - 1, 1) and held_out.paths[0].name == "000.png"
    train, held_out = open_pictures(make_tar(tmp_path), make_folder(tmp_path))
    assert len(train) == len(held_out) == NUM


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_names_longer_than_its_header(form, tmp_path):
    source = open_source(make_tar(tmp_path, form, long="a" * 90 + "/" + "b" * 90 + "/"))
    assert len(source.paths) == NUM and source.labels == CLASSES
    assert source.open(0).read() == CONTENT[0] and source.paths[0].name == "000.png"


def test_webdataset_reads_the_same_samples_of_the_same_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = make_tar(tmp_path)
    source = open_source(folder)
    shards = f"{folder}/{{000..002}}.tar"
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["png"] for sample in theirs] == [source.open(i).read() for i in range(NUM)]
    assert [p.stem for p in source.paths] == [sample["__key__"] for sample in theirs]
    assert open_source(shards).paths == source.paths


def test_braces():
    assert expand_braces("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    with pytest.raises(ValueError, match="LOW <= HIGH"):
        expand_braces("{9..1}")


def test_content_decides_what_a_file_is(tmp_path):
    make_zip(tmp_path)
    (tmp_path / "p.zip").rename(tmp_path / "pictures.bin")
    assert len(open_source(str(tmp_path / "pictures.bin")).paths) == NUM
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match=r"x\.tar: expected a plain tar, zip or parquet file, got one that begins"):
        open_source(str(tmp_path / "x.tar"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"003\.tar: no such file, 1 of the 4"):
        open_source(make_tar(tmp_path) + "/{000..003}.tar")


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_members_that_point_out_of_an_archive_are_refused_by_name(name, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "good.png", CONTENT[0])
        add(archive, name, CONTENT[1])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.png", CONTENT[0])
        archive.writestr(name, CONTENT[1])
    for file in ("a.tar", "a.zip"):
        with pytest.raises(ValueError, match=r"member .*evil\.png.* points out of the archive"):
            open_source(str(tmp_path / file))
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused_by_name(kind, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "good.png", CONTENT[0])
        info = tarfile.TarInfo("odd.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match=r"member 'odd\.png' is a link or device"):
        open_source(str(tmp_path / "a.tar"))


def test_zips_that_are_locked_packed_otherwise_or_bombs(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", CONTENT[0])
    with pytest.raises(ValueError, match=r"member 'a\.png' is packed by method 14, expected stored or deflated"):
        open_source(str(tmp_path / "lzma.zip"))
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.writestr("a.png", CONTENT[0])
    plain = (tmp_path / "plain.zip").read_bytes()
    entry = plain.index(b"PK\1\2")
    (tmp_path / "locked.zip").write_bytes(plain[: entry + 8] + b"\1" + plain[entry + 9 :])
    with pytest.raises(ValueError, match=r"member 'a\.png' is encrypted"):
        open_source(str(tmp_path / "locked.zip"))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.png", "w", force_zip64=True) as member:
            member.write(bytes(2**21))
    monkeypatch.setattr(sources, "LARGEST_BYTES", 2**20)
    with pytest.raises(ValueError, match=r"bomb\.zip/a\.png: 2,097,152 bytes, expected at most 1,048,576"):
        Pictures(open_source(str(tmp_path / "bomb.zip")))[0]
    damaged = plain.replace(CONTENT[0][100:110], bytes(10))
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.png: damaged in the archive"):
        Pictures(open_source(str(tmp_path / "damaged.zip")))[0]


def test_tar_cut_short_names_itself(tmp_path):
    source = open_source(make_tar(tmp_path))
    shard = tmp_path / "shards" / "002.tar"
    with shard.open("r+b") as file:
        file.truncate(source.members[-1].offset + 5)
    with pytest.raises(ValueError, match=r"002\.tar: ends within a member"):
        source.open(NUM - 1)


def test_table_errors(tmp_path):
    import datasets

    (tmp_path / "t").mkdir()
    datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(tmp_path / "t" / "a.parquet")
    with pytest.raises(ValueError, match="expected a column of pictures, got a"):
        open_source(str(tmp_path / "t"))
    (tmp_path / "t" / "a.parquet").write_bytes(b"PAR1 and nothing that follows")
    with pytest.raises(ValueError, match=r"damaged table"):
        open_source(str(tmp_path / "t" / "a.parquet"))
    with pytest.raises(ValueError, match="expected hf:USER/NAME, got 'hf:nobody'"):
        open_source("hf:nobody")
    for name in ("hf:nobody/nothing", "hf://nobody/nothing"):
        with pytest.raises(OSError, match=r"hf:.*nobody/nothing: cannot be had from the Hugging Face hub"):
            open_source(name)


def test_a_table_saved_to_disk_and_a_row_without_a_picture(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": CONTENT[0], "path": None}, None], "label": [7, 8]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    pictures = Pictures(open_source(str(tmp_path / "saved")))
    assert pictures[0].shape == (30, 40, 3) and pictures.labels == ["7", "8"]
    with pytest.raises(ValueError, match="row-1: no picture in this row"):
        pictures[1]


def test_pipes_and_link_loops_are_bad_pictures_not_hangs(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good.png").write_bytes(CONTENT[0])
    pictures = Pictures(open_source(str(tmp_path)))
    assert [p.name for p in pictures.paths] == ["good.png", "loop.png", "pipe.png"]
    for i, reason in ((1, "cannot be opened"), (2, "no plain file")):
        with pytest.raises(ValueError, match=reason):
            pictures[i]
        pictures.stamp(i)
