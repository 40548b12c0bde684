"""The examples of CONTRIBUTING.md run as they stand there."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"\*\*An? ([a-z ]+)\*\* is.*?```python\n(.*?)```", PAGE, re.DOTALL)


def test_there_is_one_of_each():
    assert [name for name, _ in EXAMPLES] == ["operation", "autoencoder", "law of timesteps", "sampler"]


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_runs(name, code):
    exec(compile(code, f"CONTRIBUTING.md, {name}", "exec"), {"__name__": "example"})
