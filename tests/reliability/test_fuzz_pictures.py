"""Thousands of damaged pictures, archives and tables: decoded or refused in a sentence, in bounded time and memory."""

import io
import json
import resource
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
from mutate import mutated
from PIL import Image
from programs import ENVIRONMENT

MEMORY = 4 * 2**30  # address space of a process that has imported torch and arrow, and half a gigabyte of RGB
SECONDS = 20.0  # a file may take on a loaded machine
SIDE = 24


def seeds_of(folder):
    """{name: content} of a file of each kind, with the odd ones: progressive, palette, tiled, packed, animated."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((SIDE, SIDE))
    rgba = smooth.convert("RGBA")
    rgba.putalpha(smooth.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "a.jpg": (smooth, "JPEG", {"exif": exif}),
        "b.jpg": (smooth.convert("CMYK"), "JPEG", {"progressive": True}),
        "a.png": (rgba, "PNG", {"exif": exif}),
        "b.png": (smooth.quantize(16), "PNG", {"transparency": 3}),
        "c.png": (Image.fromarray(np.full((SIDE, SIDE), 3000, np.uint16)), "PNG", {}),
        "a.webp": (rgba, "WEBP", {"lossless": True}),
        "b.webp": (smooth, "WEBP", {"save_all": True, "append_images": [smooth.rotate(90)]}),
        "a.gif": (smooth.quantize(16), "GIF", {"save_all": True, "append_images": [smooth.rotate(90).quantize(8)]}),
        "a.tiff": (smooth, "TIFF", {"compression": "tiff_lzw"}),
        "b.tiff": (smooth.convert("1"), "TIFF", {"compression": "group4"}),
        "c.tiff": (smooth, "TIFF", {"compression": "jpeg"}),
        "a.bmp": (smooth, "BMP", {}),
    }
    for name, (image, kind, options) in kinds.items():
        image.save(folder / name, format=kind, **options)
    png = (folder / "b.png").read_bytes()
    for form, name in ((tarfile.PAX_FORMAT, "pax.tar"), (tarfile.GNU_FORMAT, "gnu.tar")):
        with tarfile.open(folder / name, "w", format=form) as archive:
            for member in ("x" * 120 + "/1.png", "2.png", "2.json"):
                info = tarfile.TarInfo(member)
                content = png if member.endswith("png") else b'{"label": 3}'
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    for way, name in ((zipfile.ZIP_STORED, "a.zip"), (zipfile.ZIP_DEFLATED, "b.zip")):
        with zipfile.ZipFile(folder / name, "w", way) as archive:
            for i in range(2):
                archive.writestr(f"{i}.png", png)
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": png, "path": None}] * 3, "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "a.parquet")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fuzz(folder, first, last):
    """Opens and decodes mutants first .. last - 1; how it ended, as JSON. An exception of another kind ends it."""
    import datasets

    from train.data import Pictures
    from train.sources import open_source

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    ends, slowest = {"refused": 0, "decoded": 0}, 0.0
    contents = {path.name: path.read_bytes() for path in sorted((folder / "seeds").iterdir())}
    names = list(contents)
    for seed in range(first, last):
        name = names[seed % len(names)]
        place = folder / f"{first}-{seed}{Path(name).suffix}"
        place.write_bytes(mutated(contents[name], seed, list(contents.values())))
        print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            pictures = Pictures(open_source(str(place)), channels=(1, 3, 4)[seed % 3])
            for i in range(min(len(pictures), 4)):
                pictures.size(i)
                assert pictures[i].dtype == np.uint8 and pictures[i].ndim == 3
            ends["decoded"] += 1
        except ValueError as error:
            assert "\n" not in str(error), str(error)
            ends["refused"] += 1
        slowest = max(slowest, time.monotonic() - began)
        place.unlink()
    print(json.dumps({**ends, "slowest": slowest}))


def test_damaged_pictures_are_decoded_or_refused(soak, tmp_path):
    (tmp_path / "seeds").mkdir()
    seeds_of(tmp_path / "seeds")
    total, part = soak.rounds(255, 5100), soak.rounds(255, 850)
    counts = {"refused": 0, "decoded": 0}
    slowest = 0.0
    for first in range(0, total, part):
        command = [sys.executable, __file__, str(tmp_path), str(first), str(first + part)]
        environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=part * SECONDS, env=environment, check=False
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2500:]}"
        row = json.loads(done.stdout.splitlines()[-1])
        slowest = max(slowest, row["slowest"])
        counts = {k: n + row[k] for k, n in counts.items()}
    assert slowest < SECONDS and sum(counts.values()) == total and min(counts.values()) > total / 20
    soak.found("Damaged pictures, archives and tables are decoded or refused in a sentence, in 4 GiB of address space",
               files=total, **counts, slowest_seconds=round(slowest, 2))  # fmt: skip


def test_a_file_that_would_run_a_program_is_no_picture(tmp_path, soak):
    from PIL import EpsImagePlugin  # noqa: F401  (it registers itself)

    from train.data import Pictures
    from train.sources import Files

    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch /tmp/x) (w) file\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(page)
    assert Image.open(tmp_path / "a.jpg").format == "EPS"
    try:
        Pictures(Files([tmp_path / "a.jpg"]))[0]
    except ValueError as error:
        assert "not a picture" in str(error)
    else:
        raise AssertionError("decoded")
    soak.found("PostScript renamed to .jpg, which Pillow hands to a program, is refused", files=1)


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
