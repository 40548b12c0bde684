"""Folders as people have them: bad files of every kind are passed over and listed, and the run is the same run."""

import io
import os
import random

import numpy as np
from PIL import Image
from programs import FLOW, VAE, run, tiny_autoencoder
from toy import saved

from flux2.images import load_image
from train.bad_samples import read_bad_samples

KINDS = ("truncated", "empty", "text", "bomb", "loop", "dangling", "pipe", "float")


def encoded(seed, kind="PNG", **options):
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    smooth = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize((48, 40), Image.Resampling.BICUBIC)
    smooth.save(file, format=kind, **options)
    return file.getvalue()


def bad_file(path, kind):
    """One of KINDS at `path`, a .png"""
    if kind in ("loop", "dangling"):
        path.symlink_to(path if kind == "loop" else path.with_name("none"))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "float":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(path, format="TIFF")
    else:
        good = encoded(0)
        size = (60000).to_bytes(4, "big")
        bomb = good[:16] + size + size + good[24:]  # the header's width and height; its CRC is wrong then
        path.write_bytes({"truncated": good[: len(good) // 2], "empty": b"", "text": b"hello", "bomb": bomb}[kind])


def folder_of(place, bad, good=60):
    """Pictures, and among them a bad file of each kind."""
    place.mkdir()
    for i in range(good):
        (place / f"{i:03}.png").write_bytes(encoded(i))
    for i, kind in enumerate(bad):
        bad_file(place / f"{i * 7 + 3:03}x-{kind}.png", kind)
    return place


def held_out(place):
    place.mkdir()
    (place / "a.png").write_bytes(encoded(99))
    return str(place)


def names(folder):
    return [r["sample"].rsplit("-", 1)[1] for r in read_bad_samples(folder / "bad_samples.jsonl")]


def test_bad_files_cost_nothing_but_themselves(soak, tmp_path):
    rounds = soak.rounds(1, 12)
    listed = 0
    for round in range(rounds):
        place = tmp_path / str(round)
        place.mkdir()
        data = folder_of(place / "p", KINDS, good=16)
        flags = ("--data", data, "--held-out", held_out(place / "h"), "--max-bad", "0.5", "--steps", "64",
                 "--save-every", "8", "--seed", str(round))  # fmt: skip
        assert run(VAE, place, *flags, "--stop-after", "16", name="whole")[0] == 0
        assert run(VAE, place, *flags, "--workers", "2", "--stop-after", "5", name="parts")[0] == 0
        code, said = run(VAE, place, *flags, "--allow-changed", "workers", "--stop-after", "16", name="parts")
        assert code == 0, said
        whole, parts = saved(place / "whole"), saved(place / "parts")
        assert whole.keys() == parts.keys()
        for file in whole:
            for name, value in whole[file].items():
                assert value.equal(parts[file][name]) or value.isnan().any(), (file, name)
        kinds = names(place / "whole")
        assert sorted(kinds) == sorted(f"{k}.png" for k in KINDS) and names(place / "parts") == kinds
        listed += len(kinds)
    soak.found("A folder with bad files trains to the same bits, interrupted or not, by any number of workers",
               runs=2 * rounds, bad_files=listed)  # fmt: skip


def test_too_many_bad_files_end_a_run_in_a_sentence(soak, tmp_path):
    data, held = folder_of(tmp_path / "p", KINDS, good=20), held_out(tmp_path / "h")
    code, said = run(VAE, tmp_path, "--data", data, "--held-out", held, "--steps", "30", "--workers", "1", name="a")
    assert code == 2 and "(--max-bad); they are listed in" in said and "Traceback" not in said
    assert str(tmp_path / "a" / "bad_samples.jsonl") in said and 4 <= len(names(tmp_path / "a")) <= 5  # two a step
    (tmp_path / "h" / "b.png").write_text("text")
    code, said = run(VAE, tmp_path, "--data", data, "--held-out", held, "--steps", "30", name="b")
    assert code == 2 and "b.png: not a picture" in said and not (tmp_path / "b").exists()
    soak.found("Too many bad files end a run in a sentence that names the list; a bad held-out one is refused", runs=2)


def test_a_flow_model_trains_beside_bad_files(soak, tmp_path):
    (tmp_path / "p").mkdir()
    data = tmp_path / "p"
    folder_of(data / "a", KINDS[:3], good=20)
    folder_of(data / "b", KINDS[3:], good=20)
    flags = ("--autoencoder", tiny_autoencoder(tmp_path), "--data", data, "--held-out", held_out(tmp_path / "h"),
             "--max-bad", "0.3", "--steps", "13", "--repa", "hog")  # fmt: skip
    code, said = run(FLOW, tmp_path, *flags)
    assert code == 0, said
    assert sorted(names(tmp_path / "x")) == sorted(f"{k}.png" for k in KINDS)
    soak.found("Flow models train beside bad files, with the class of the picture that stands in", bad_files=len(KINDS))


def test_what_can_be_converted_is_right(soak, tmp_path):
    """Odd but whole pictures: orientation, CMYK, palettes, 16 bits, one pixel, animation, in random combination."""
    rounds = soak.rounds(60, 2000)
    for seed in range(rounds):
        r = random.Random(seed)
        height, width = r.choice([(1, 1), (1, 7), (9, 14), (33, 20)])
        rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        kind = r.choice(("exif", "cmyk", "palette", "sixteen", "animated", "grey"))
        path = tmp_path / "p"
        if kind == "exif":
            turn = r.randrange(1, 9)
            exif = Image.Exif()
            exif[0x0112] = turn
            Image.fromarray(rgb).save(path, format="PNG", exif=exif)
            expected = {1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.swapaxes(0, 1),
                        6: np.rot90(rgb, 3), 7: rgb[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(rgb)}[turn]  # fmt: skip
        elif kind == "cmyk":
            Image.fromarray(255 - rgb).convert("RGB").convert("CMYK").save(path, format="TIFF")
            expected = 255 - rgb
        elif kind == "palette":
            image = Image.fromarray(rgb).quantize(16)
            image.save(path, format="PNG")
            expected = np.array(image.convert("RGB"))
        elif kind == "sixteen":
            values = np.random.default_rng(seed).integers(0, 65536, (height, width)).astype(np.uint16)
            Image.fromarray(values).save(path, format="PNG")
            expected = np.repeat(np.round(values[:, :, None] / 257).astype(np.uint8), 3, 2)
        elif kind == "animated":
            image = Image.fromarray(rgb)
            image.save(path, format="TIFF", save_all=True, append_images=[Image.new("RGB", (width, height))])
            expected = rgb
        else:
            Image.fromarray(rgb[..., 0]).save(path, format="BMP")
            expected = rgb[..., :1].repeat(3, 2)
        assert np.array_equal(load_image(path), expected), (seed, kind)
    soak.found("Turned, CMYK, palette, 16-bit, animated and one-pixel pictures are converted exactly", pictures=rounds)
