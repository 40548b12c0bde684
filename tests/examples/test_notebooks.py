"""The notebooks run from top to bottom, and what is committed of them are the outputs of a run.

In a folder of its own, so that these minutes are not the last of the suite.
"""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs" / "make_notebook.py")
make_notebook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebook)


def kinds(notebook):
    """Per cell of code: the kinds of its outputs"""
    return [{output.output_type for output in cell.outputs} for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_is_committed(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    committed = nbformat.read(path, as_version=4)
    assert kinds(make_notebook.executed(path)) == kinds(committed)
    assert sum("display_data" in found for found in kinds(committed)) >= 3
    words = "".join(output.get("text", "") for cell in committed.cells for output in cell.get("outputs", []))
    assert "held-out PSNR" in words and not re.search(r"/(tmp|home|work)\b", words)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    words = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for target in re.findall(r"\]\(([^)#]+)", words):
        assert (path.parent / target).exists(), target
