"""Latent caches: content against the autoencoder, resumption after each kind of interruption, and refusals."""

import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from flux2 import AutoEncoder, AutoencoderConfig, save_autoencoder
from flux2.images import from_uint8
from flux2.teachers import HOGTeacher
from train import cache
from train.cache import LatentCache, fingerprint
from train.crops import centre_square
from train.data import class_names, main, open_pictures

TOY = AutoencoderConfig(
    z_channels=4, ch=4, decoder_ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2, latent_norm="batchnorm"
)


@pytest.fixture
def place(tmp_path):
    """An autoencoder and seven pictures in two classes, one of them held out"""
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(TOY), tmp_path / "ae.safetensors")
    rng = np.random.default_rng(0)
    for i in range(7):
        folder = tmp_path / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def make(place, *flags, out="cache"):
    where = ["--autoencoder", str(place / "ae.safetensors"), "--data", str(place / "pictures")]
    sizes = ["--resolution", "32", "--shard", "2", "--batch", "2"]
    return main(["cache", *where, *sizes, "--out", str(place / out), *flags])


def autoencoder(place):
    from flux2 import load_autoencoder

    return load_autoencoder(place / "ae.safetensors")


def shards(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_cache_holds_what_the_autoencoder_says(place, capsys):
    assert make(place, "--teacher", "hog", "--dtype", "fp32") == 0
    assert "6 crops, " in capsys.readouterr().out.splitlines()[-1]
    ae, data = autoencoder(place), str(place / "pictures")
    stored = LatentCache(place / "cache", ae)
    pictures, held_out = open_pictures(data)
    assert len(stored) == len(pictures) == 6 and len(held_out) == 1 and stored.classes == ["a", "b"]
    names = class_names(pictures, data)
    items, mirrored = [5, 0, 3, 3], [False, True, False, True]
    got = stored.get(items, mirrored)
    for row, (item, mirror) in enumerate(zip(items, mirrored, strict=True)):
        x = from_uint8(torch.from_numpy(centre_square(pictures[item], 32).copy()).permute(2, 0, 1)[None])
        x = x.flip(3) if mirror else x
        moments = torch.cat((got["mean"][row], got["logvar"][row]))
        torch.testing.assert_close(moments, ae.encode_moments(x)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["tokens"][row], HOGTeacher(patch=16)(x)[0], rtol=1e-4, atol=1e-5)
        assert stored.classes[got["labels"][row]] == names[item] == pictures.paths[item].parent.name
    shapes = {"mean": [4, 4, 4], "logvar": [4, 4, 4], "labels": [], "tokens": [108, 2, 2]}
    assert {k: list(v.shape[1:]) for k, v in got.items()} == shapes


def test_half_precision_and_random_crops_of_the_photographs(place):
    flags = ["--data", "photographs", "--crops", "3", "--shard", "16"]
    assert make(place, *flags) == 0
    assert make(place, *flags, "--dtype", "fp32", "--no-flip", out="full") == 0
    half, full = LatentCache(place / "cache"), LatentCache(place / "full")
    assert len(half) == 21 and half.classes == sorted(half.classes) and "astronaut" in half.classes
    items, plain = list(range(21)), [False] * 21
    a, b = half.get(items, plain), full.get(items, plain)
    torch.testing.assert_close(a["mean"], b["mean"], rtol=1e-3, atol=1e-4)
    assert (a["mean"][0] - a["mean"][1]).abs().max() > 0.01  # crops of one picture differ
    assert a["labels"].tolist() == [
        i for i in (half.classes.index(n) for n in class_names_of_photographs()) for _ in range(3)
    ]
    with pytest.raises(ValueError, match="has no mirror images"):
        full.get([0], [True])


def class_names_of_photographs():
    return class_names(open_pictures("photographs")[0], "photographs")


@pytest.mark.parametrize("where", ["in a shard", "before the manifest", "at a signal"])
def test_an_interrupted_cache_goes_on_where_it_was(place, monkeypatch, capsys, where):
    assert make(place, out="whole") == 0
    calls = []
    with monkeypatch.context() as m:
        if where == "at a signal":
            real = cache._encode

            def encode(*arguments):
                calls.append(0)
                if len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(*arguments)

            m.setattr(cache, "_encode", encode)
            assert make(place) == 128 + signal.SIGTERM
            assert "1 of 3 shards are saved" in capsys.readouterr().out
        else:
            name = "save_tensors" if where == "in a shard" else "save_json"
            real = getattr(cache, name)

            def killed(*arguments):
                calls.append(0)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                real(*arguments)

            m.setattr(cache, name, killed)
            with pytest.raises(KeyboardInterrupt):
                make(place)
    with pytest.raises(ValueError, match="is unfinished: 2 of 6 crops"):
        LatentCache(place / "cache")
    encoded = []
    real = cache._encode
    monkeypatch.setattr(cache, "_encode", lambda *a: encoded.append(len(a[2])) or real(*a))
    assert make(place) == 0
    assert sum(encoded) == 4  # the first shard was not made again
    assert shards(place / "cache") == shards(place / "whole")


def test_a_damaged_shard_is_refused_and_made_again(place, capsys):
    assert make(place) == 0
    whole, path = shards(place / "cache"), place / "cache" / "shard-00001.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    stored = LatentCache(place / "cache")
    assert stored.get([0], [False])["labels"].shape == (1,)
    with pytest.raises(ValueError, match=r"cache is corrupt: .*shard-00001.safetensors: expected SHA-256"):
        stored.get([2], [False])
    path.write_bytes(flipped[:-10])
    with pytest.raises(
        ValueError, match=rf"cache is corrupt: .*: expected {len(flipped)} bytes, got {len(flipped) - 10}"
    ):
        LatentCache(place / "cache")
    path.unlink()
    with pytest.raises(ValueError, match=r"cache is corrupt: .*shard-00001.safetensors: missing"):
        LatentCache(place / "cache")
    path.write_bytes(flipped)
    capsys.readouterr()
    assert make(place) == 0
    assert "is damaged or missing" in capsys.readouterr().out
    assert shards(place / "cache") == whole


def test_another_autoencoder_is_refused_by_name(place, capsys):
    assert make(place) == 0
    torch.manual_seed(1)
    other = AutoEncoder(TOY)
    with pytest.raises(ValueError, match=r"cache is stale: it was made with an autoencoder of hash [0-9a-f]{12}, this"):
        LatentCache(place / "cache", other)
    save_autoencoder(other, place / "ae.safetensors")
    assert make(place) == 2
    error = capsys.readouterr().err
    assert "holds a cache of other content: content.autoencoder: saved" in error and "choose another --out" in error


def test_other_preprocessing_is_refused_by_name(place, capsys):
    assert make(place) == 0
    assert make(place, "--no-flip") == 2
    assert "content.preprocessing.flip: saved True, now False" in capsys.readouterr().err
    (place / "pictures" / "a" / "new.png").write_bytes((place / "pictures" / "a" / "2.png").read_bytes())
    assert make(place) == 2
    assert "content.pictures: saved" in capsys.readouterr().err


def test_what_is_no_cache_is_refused(place, capsys):
    with pytest.raises(FileNotFoundError, match="expected a latent cache"):
        LatentCache(place / "pictures")
    for text in ("{", "[]", json.dumps({"content": {"format": "x"}})):
        (place / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="expected the manifest of a latent cache of version 1"):
            LatentCache(place)
    assert make(place, "--resolution", "40") == 2
    assert "resolution: expected a multiple of 16, got 40" in capsys.readouterr().err
    assert main(["cash"]) == 2 and "expected the command cache, got cash" in capsys.readouterr().out


def test_values_that_half_precision_cannot_hold_are_named(place, capsys):
    ae = autoencoder(place)
    with torch.no_grad():
        ae.encoder.conv_out.bias.fill_(1e5)
    save_autoencoder(ae, place / "ae.safetensors")
    assert make(place) == 2
    assert "mean: a value that fp16 cannot hold; use --dtype fp32" in capsys.readouterr().err
    assert make(place, "--dtype", "fp32") == 0


def test_fingerprint_sees_each_bit_buffers_included():
    ae = AutoEncoder(TOY)
    before = fingerprint(ae)
    assert before == fingerprint(ae) and len(before) == 64
    ae.bn.running_mean[3] += 1e-7
    assert fingerprint(ae) != before


def test_other_pictures_than_it_was_made_of_are_refused(place, capsys):
    """With another --data or --held-out, held-out pictures would be trained on, and labels be of other folders"""
    data = str(place / "pictures")
    assert make(place) == 0
    stored = LatentCache(place / "cache")
    stored.check_pictures(open_pictures(data)[0], data)
    for pictures in (open_pictures(data, data)[0], open_pictures("photographs")[0]):
        with pytest.raises(ValueError, match=rf"cache is of other pictures than the {len(pictures)} that --data"):
            stored.check_pictures(pictures, data)
    path = open_pictures(data)[0].paths[0]
    os.utime(path, (1, 1))  # rewritten at the same size
    with pytest.raises(ValueError, match="or they changed since"):
        stored.check_pictures(open_pictures(data)[0], data)


def test_tokens_of_other_weights_are_refused(place):
    assert make(place, "--teacher", "hog") == 0
    teacher = HOGTeacher(16)
    LatentCache(place / "cache").check_teacher(teacher)
    teacher.register_buffer("other", torch.ones(1))
    with pytest.raises(ValueError, match="cache: its tokens are of a teacher with other weights than --repa-weights"):
        LatentCache(place / "cache").check_teacher(teacher)


def test_a_cache_travels_to_worker_processes(place):
    assert make(place) == 0
    stored = LatentCache(place / "cache")
    assert stored.has_logvar
    there = pickle.loads(pickle.dumps(stored))
    for name, value in stored.get([0, 3], [False, False]).items():
        assert torch.equal(there.get([0, 3], [False, False])[name], value)
