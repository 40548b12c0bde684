"""Each operation's page: the signature is the function's, the snippet runs, the picture is of committed figures."""

import inspect
import json
import re
from pathlib import Path

import bandwidth
import pytest
import torch
from cases import OPS
from compare_flow import Calls

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
    found = re.findall(r"^def (\w+)(\(.*?\) -> [^\n]+)$", written, re.MULTILINE | re.DOTALL)
    assert len(found) == written.count("def ") > 0
    for name, signature in found:
        plain = lambda text: re.sub(r"[\s'\"]|,(?=\s*\))", "", text)  # noqa: E731
        assert plain(signature) == plain(str(inspect.signature(getattr(kernels, name)))), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippet_runs(page):
    (snippet,) = [code for title, code in blocks(page) if "signature" not in title]
    exec(compile(snippet, page.name, "exec"), {})


def bytes_an_element(call, n):
    with Calls() as seen:
        result = call()
    return result, round(seen.bytes / n)


def test_stock_bytes_are_what_aten_is_called_for():
    """Of the pages that count aten's calls; `randn_like` does not read the tensor whose shape it takes"""
    tensors = [t.requires_grad_() for t in OPS["repa_loss"].tensors((16, 64, 768), torch.bfloat16, torch.device("cpu"))]
    n = tensors[0].numel()
    loss, forward = bytes_an_element(lambda: OPS["repa_loss"].eager(*tensors), n)
    _, backward = bytes_an_element(lambda: torch.autograd.grad(loss, tensors), n)
    page = (ROOT / "docs" / "ops" / "repa_loss.md").read_text()
    assert f"| {forward}: two copies in fp32" in page and f"and their gradients | {backward} |" in page
    for f, words in (
        (OPS["repa_loss"].eager, "| {} |\n"),
        (OPS["repa_loss"].ours, "| {}: both, and three numbers a row |"),
    ):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.setdefault(t.data_ptr(), t), lambda t: t):
            f(*tensors)
        size = round(
            sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}.values()) / n
        )
        assert words.format(size) in page, size
    x = OPS["flow_match_inputs"].tensors((64, 128, 16, 16), torch.bfloat16, torch.device("cpu"))
    _, forward = bytes_an_element(lambda: OPS["flow_match_inputs"].eager(*x), x[0].numel())
    assert f"| {forward - 2}: noise, products" in (ROOT / "docs" / "ops" / "flow_match_inputs.md").read_text()


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
