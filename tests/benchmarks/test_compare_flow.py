"""The comparison of flow-matching steps at a tiny size: the contestants are one model, and what is counted adds up."""

import json
import shutil

import compare_flow
import pytest
import torch
from compare_flow import Calls, main, table

from flux2 import TransformerConfig

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--batch", "2", "--rounds", "1", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(compare_flow, "SIDE", 2)
    monkeypatch.setattr(compare_flow, "TEACHER", 8)


def test_counts_calls_and_their_bytes():
    x = torch.randn(4, 4)
    with Calls() as seen:
        y = x.view(16).reshape(2, 8)  # views are free
        y + 1
        x.mul_(2)
    assert seen.calls == 2 and seen.bytes == 2 * 2 * 64


def test_both_train_the_same_network():
    cfg = TransformerConfig(width=16, depth=2, heads=2, repa_depth=1)
    data = compare_flow.inputs(2)
    made = [make(cfg, data, "fp32", False) for make in compare_flow.CONTESTANTS.values()]
    assert made[0].parameters == made[1].parameters > 0
    assert all(torch.isfinite(step.call()) for step in made)


def test_rows_and_table(tmp_path):
    out = tmp_path / "flow.json"
    assert main([*TINY, "--mode", "eager", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    row = report["rows"]["fp32 eager"]
    for name in compare_flow.CONTESTANTS:
        assert row[name]["calls"] > row[name]["block_calls"] > 0 and row[name]["bytes"] > row[name]["block_bytes"] > 0
    assert row["ours"]["calls"] < row["SiT/REPA"]["calls"] and row["ratio"] > 0
    assert main(["--table", "--out", str(out)]) == 0
    assert "| fp32, eager |" in table(report)
    with pytest.raises(SystemExit):
        main(["--depth", "0"])
    with pytest.raises(SystemExit):
        main(["--width", "17"])


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_ours_compiles_once(tmp_path):
    out = tmp_path / "flow.json"
    assert main([*TINY, "--mode", "compiled", "--out", str(out)]) == 0
    ours = json.loads(out.read_text())["rows"]["fp32 compiled"]["ours"]
    assert ours == {"graphs": 1, "graph_breaks": 0, "recompilations": 0}
