"""Bad pictures: the next of the epoch's order in their place, listed once, the same for any workers and resume."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from train import cache
from train.bad_samples import Bad, BadSamples, read_bad_samples
from train.crops import Augmentation
from train.data import CropBatches, Pictures, batches, held_out_crops, open_pictures
from train.flow_data import LabelledCrops
from train.sources import open_source

PLAIN = Augmentation(flip=False)


def folder_of(place, good=10, bad=("b3", "b6")):
    """Pictures of one value each, 10 i; and files that are none."""
    place.mkdir(exist_ok=True)
    for i in range(good):
        Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(place / f"a{i}.png")
    for name in bad:
        (place / f"{name}.jpg").write_text("text renamed to a picture")
    return str(place)


def crops(folder, **changes):
    options = {"resolution": 8, "batch": 5, "augmentation": PLAIN, "seed": 2} | changes
    return CropBatches(Pictures(open_source(folder)), **options)


def values(batch):
    return [int(v) for v in batch[:, 0, 0, 0]]


def test_the_next_of_the_epochs_order_stands_in_for_a_bad_one(tmp_path):
    dataset = crops(folder_of(tmp_path), batch=12)
    order = [dataset.picture_of(0, i) for i in range(12)]
    samples = dataset.read(0)
    for place in range(12):
        later = next(i for i in order[place:] + order[:place] if i < 10)  # a0 .. a9 come first
        assert samples.pictures[place] == later and values(samples.crops)[place] == 10 * later
    assert sorted(b.sample for b in samples.bad)[0].endswith("b3.jpg") and "not a picture" in samples.bad[0].reason
    assert order != sorted(order) and {b.sample[-6:] for b in samples.bad} == {"b3.jpg", "b6.jpg"}


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_and_list_are_the_same_for_any_number_of_workers_and_any_resume(workers, tmp_path):
    folder = folder_of(tmp_path / "pictures")

    def run(name, first, last, workers):
        bad = BadSamples(tmp_path / name, total=12, most=0.5)
        return list(batches(crops(folder), first, last, workers=workers, bad=bad))

    whole = run("whole.jsonl", 0, 6, 0)
    parts = run("parts.jsonl", 0, 4, workers) + run("parts.jsonl", 4, 6, workers)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    rows = read_bad_samples(tmp_path / "parts.jsonl")
    assert rows == read_bad_samples(tmp_path / "whole.jsonl") and len(rows) == 2
    assert {r["sample"] for r in rows} == {f"{folder}/b3.jpg", f"{folder}/b6.jpg"} and all(r["step"] < 3 for r in rows)


def test_a_run_stops_past_its_share_and_names_the_list(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    few = BadSamples(path, total=500, most=0.01)
    assert few.allowed == 5 and BadSamples(path, total=10, most=0.0).allowed == 3
    few.note(7, [Bad(f"p{i}", "why") for i in (0, 1, 1, 2, 3, 4)])
    with pytest.raises(ValueError, match=r"6 of 500 pictures cannot be read, expected at most 5 \(--max-bad\).*jsonl"):
        few.note(8, [Bad("p5", "why")])
    assert [r["step"] for r in read_bad_samples(path)] == [7] * 5 + [8]
    with path.open("a") as file:
        file.write('{"sample": "p6", "rea')  # a kill within a line
    again = BadSamples(path, total=500, most=0.1)
    again.note(9, [Bad("p6", "why"), Bad("p0", "why")])
    assert len(again) == 7 and [r["sample"] for r in map(json.loads, path.read_text().splitlines())][-1] == "p6"


def test_a_folder_without_one_good_picture(tmp_path):
    folder = folder_of(tmp_path / "p", good=0, bad=("x", "y"))
    with pytest.raises(ValueError, match=r"\.jpg: not a picture; nor can the 1 tried before it"):
        _ = crops(folder)[0]
    for workers in (0, 1):
        bad = BadSamples(tmp_path / f"{workers}.jsonl", total=2, most=0.0)
        with pytest.raises(ValueError, match="none of the pictures tried for step 0 can be read; they are listed in"):
            next(batches(crops(folder), 0, 1, workers=workers, bad=bad))
        assert len(read_bad_samples(bad.path)) == 2


def test_held_out_pictures_and_evaluations_refuse_by_name(tmp_path):
    folder = folder_of(tmp_path)
    with pytest.raises(ValueError, match=r"b3\.jpg: not a picture"):
        held_out_crops(Pictures(open_source(folder)), num_crops=24, resolution=8)
    with pytest.raises(ValueError, match=r"b\d\.jpg: not a picture"):
        _ = crops(folder, batch=12, skip_bad=False)[0]


def test_labels_follow_the_picture_that_stands_in(tmp_path):
    for i in range(6):
        (tmp_path / f"c{i}").mkdir()
        Image.fromarray(np.full((9, 9, 3), 10 * i, np.uint8)).save(tmp_path / f"c{i}" / "a.png")
        (tmp_path / f"c{i}" / "b.png").write_bytes(b"")
    pictures = Pictures(open_source(str(tmp_path)))
    labelled = LabelledCrops(
        pictures, str(tmp_path), [f"c{i}" for i in range(6)], resolution=8, batch=12, augmentation=PLAIN, seed=0
    )
    item, bad = labelled.reported(0)
    assert [10 * int(y) for y in item["labels"]] == values(item["pixels"]) and len({b.sample for b in bad}) == 6


def test_a_cache_passes_over_bad_pictures_and_lists_them(tmp_path):
    import programs

    folder = folder_of(tmp_path / "p", bad=("a33",))
    for name in ("first", "second"):
        config = cache.CacheConfig(
            autoencoder=str(programs.tiny_autoencoder(tmp_path)), out=tmp_path / name, data=folder, resolution=16
        )
        assert cache.make_cache(config) == 0
    rows = read_bad_samples(tmp_path / "first" / "bad_samples.jsonl")
    assert [r["sample"] for r in rows] == [f"{folder}/a33.jpg"] and "not a picture" in rows[0]["reason"]
    items = [cache.LatentCache(tmp_path / n).get(list(range(10)), [False] * 10) for n in ("first", "second")]
    assert torch.equal(items[0]["mean"], items[1]["mean"])
    names = [p.name for p in open_pictures(folder)[0].paths]
    place = names.index("a33.jpg")
    assert torch.equal(items[0]["mean"][place], items[0]["mean"][place + 1])
