"""docs/data.md says what the code does: its table of speeds, its limits, its suffixes."""

import json
from pathlib import Path

from flux2.images import FORMATS, IMAGE_SUFFIXES, LARGEST_PIXELS
from train.bad_samples import ALWAYS_ALLOWED
from train.configs import RunOptions
from train.sources import LARGEST_BYTES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text()


def test_speeds_are_those_of_the_file():
    results = json.loads((ROOT / "benchmarks" / "results" / "loader-speed.json").read_text())
    found = {(r["loader"], r["workers"]): f"{r['median']:.0f} (best {r['best']:.0f})" for r in results["rows"]}
    for loader in {name for name, _ in found}:
        assert f"| {loader} | {found[loader, 0]} | {found[loader, 2]} |" in PAGE
    assert results["about"]["note"].startswith("not idle") == ("cores that were not idle" in PAGE)


def test_limits_are_those_of_the_code():
    assert f"over {LARGEST_PIXELS:,} pixels" in PAGE and f"at most {LARGEST_BYTES // 2**20} MiB" in PAGE
    assert f"`--max-bad` of the pictures ({RunOptions().max_bad}; three always may be bad)" in PAGE
    assert ALWAYS_ALLOWED == 3 and all(suffix[1:] in PAGE for suffix in IMAGE_SUFFIXES if suffix != ".jpeg")
    assert FORMATS == ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
    assert "Only JPEG, PNG, WebP, GIF, TIFF and BMP are decoded" in PAGE
