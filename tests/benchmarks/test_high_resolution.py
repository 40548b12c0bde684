"""docs/high-resolution.md says what was measured; the program refuses what it cannot measure."""

import importlib.util
import json
import sys
from pathlib import Path

import high_resolution
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "high-resolution.md").read_text()


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make_high_resolution.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(make):
    assert make.filled(PAGE) == PAGE and PAGE.count("| flux.2 |") >= 6
    assert make.filled(PAGE.replace("| flux.2 |", "| flux.3 |")) == PAGE


def test_bands_held_what_they_promise():
    """In the committed rows: less than the bound, and nearer to fp64 than the plain decoder"""
    rows = json.loads(high_resolution.RESULTS.read_text())["rows"]
    low = {name: row for name, row in rows.items() if row["way"] == "low"}
    assert len(low) >= 3
    for name, row in low.items():
        assert row["peak_bytes"] <= row["bound_bytes"], name
        if "error" in row:
            assert row["error"] < rows[name.replace(" low", " plain")]["error"]


def test_sizes_of_the_page_are_the_bounds():
    import torch

    from flux2 import AUTOENCODERS, AutoEncoder
    from flux2.banded import most_bytes

    with torch.device("meta"):
        decoder = AutoEncoder(AUTOENCODERS["flux.2"]).decoder
    for side in (1024, 2048, 4096):
        sizes = (
            most_bytes(decoder, side // 8, side // 8, dtype, torch.device("cpu")) / 2**30
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert f"| {side} x {side} | {' | '.join(f'{size:.2f} GiB' for size in sizes)} |" in PAGE


def test_bad_side_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["high_resolution.py", "--side", "1000"])
    with pytest.raises(SystemExit):
        high_resolution.main()
    assert "--side: expected a positive multiple of 16, got 1000" in capsys.readouterr().err
