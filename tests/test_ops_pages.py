"""Each operation's page: the signature is the function's, the snippet runs, the picture is of committed figures."""

import inspect
import json
import re
from pathlib import Path

import bandwidth
import pytest

import kernels

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "ops").glob("*.md"))


def blocks(page):
    return re.findall(r"```python(.*?)\n(.*?)```", page.read_text(), re.DOTALL)


def test_every_operation_has_a_page():
    documented = [name for page in PAGES for name in re.findall(r"^def (\w+)", page.read_text(), re.MULTILINE)]
    assert sorted(documented) == sorted(kernels.__all__)
    listed = (ROOT / "docs" / "kernels.md").read_text() + (ROOT / "mkdocs.yml").read_text()
    assert all(listed.count(f"ops/{page.name}") == 2 for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_signature_is_the_functions(page):
    written = "".join(code for title, code in blocks(page) if "signature" in title)
    for name, signature in re.findall(r"^def (\w+)(\(.*?\) -> [^\n]+)$", written, re.MULTILINE | re.DOTALL):
        plain = lambda text: re.sub(r"[\s'\"]|,(?=\s*\))", "", text)  # noqa: E731
        assert plain(signature) == plain(str(inspect.signature(getattr(kernels, name)))), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippet_runs(page):
    (snippet,) = [code for title, code in blocks(page) if "signature" not in title]
    exec(compile(snippet, page.name, "exec"), {})


def test_pictures_are_of_committed_figures():
    results = json.loads(bandwidth.drawn().read_text())
    assert set(results["ops"]) == set(kernels.__all__)
    for page in PAGES:
        for name in re.findall(r"!\[[^\]]*\]\((\w+)\.png\)", page.read_text()):
            assert (page.parent / f"{name}.png").is_file() and results["ops"][name]


def test_bandwidth_measures_and_draws(tmp_path, monkeypatch):
    monkeypatch.setitem(bandwidth.SHAPES[bandwidth.KIND], "repa_loss", [(1, 2, 8), (2, 2, 8)])
    out = tmp_path / "bandwidth.json"
    assert bandwidth.main(["--only", "repa_loss", "--rounds", "2", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    rows = results["ops"]["repa_loss"]
    assert [row["direction"] for row in rows] == ["forward", "backward"] * 2
    assert all(row["bytes"] > 0 and {"ours", "copy"} <= row["gb_per_s"].keys() for row in rows)
    bandwidth.draw(results, "repa_loss", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    out.write_text(json.dumps(results | {"ops": {"repa_loss": rows[:1]}}))
    bandwidth.main(["--only", "repa_loss", "--rounds", "2", "--out", str(out)])
    assert len(json.loads(out.read_text())["ops"]["repa_loss"]) == 1  # of the same sources: not measured again
    with pytest.raises(SystemExit):
        bandwidth.main(["--rounds", "0"])
