"""The snippets of docs/use-elsewhere.md run as they stand there, one after another."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "use-elsewhere.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_snippets_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == 6
    scope = {"__name__": "example"}
    for i, code in enumerate(SNIPPETS):
        exec(compile(code, f"use-elsewhere.md, snippet {i}", "exec"), scope)
    (said,) = re.findall(r"print\(fuse\(vae\)\)  # (.*)", PAGE)
    assert capsys.readouterr().out.startswith(said)
    assert {p.name for p in tmp_path.iterdir()} == {"my-vae", "for-diffusers", "decode.pt2"}
