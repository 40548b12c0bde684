"""`kernels/` laid out for Hugging Face's kernel hub, and loaded as its client loads it."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
# As Hugging Face's importer does, in a process that cannot import ours; then an op with gradients.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch

for name in ("kernels", "flux2"):
    sys.modules[name] = None
variant = Path(sys.argv[1])
about = json.loads((variant / "metadata.json").read_text())
file = variant / about["name"].replace("-", "_") / "__init__.py"
spec = importlib.util.spec_from_file_location(about["id"], file)
module = importlib.util.module_from_spec(spec)
sys.modules[about["id"]] = module
spec.loader.exec_module(module)
"""
RUN = """
torch.manual_seed(0)
x, w, b, k = torch.randn(1, 8, 6, 6), torch.rand(8), torch.rand(8), torch.randn(4, 8, 3, 3)
leaves = [t.requires_grad_() for t in (x, w, b, k)]
y = module.norm_silu_conv2d(*leaves, None, 4)
plain = torch.conv2d(torch.nn.functional.silu(torch.group_norm(x, 4, w, b, 1e-6)), k, None, 1, 1)
torch.testing.assert_close(y, plain)
for got, expected in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, plain)), strict=True):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
assert module.sample_timesteps(5).shape == (5,)
print(module.__name__, *sorted(module.__all__))
"""


@pytest.fixture(scope="module")
def kernel_hub():
    spec = importlib.util.spec_from_file_location("kernel_hub", ROOT / "docs" / "kernel_hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(kernel_hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel-hub"
    kernel_hub.write(folder)
    kernel_hub.write(folder)  # over itself
    return folder


def python(code, *arguments, cwd):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_the_build_loads_as_the_hub_s_client_loads_it(built):
    import kernels

    name, *operations = python(LOAD + RUN, built / "build" / "torch-cpu", cwd=built)
    assert name == "_flux2_tokenizer_kernels_1_cpu" and operations == sorted(kernels.__all__)


def test_metadata(built, kernel_hub):
    general = tomllib.loads((built / "build.toml").read_text())["general"]
    assert general["name"] == kernel_hub.NAME and general["backends"] == ["cpu", "cuda", "rocm", "xpu"]
    variants = sorted((built / "build").iterdir())
    assert [v.name for v in variants] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-universal", "torch-xpu"]
    for variant in variants:
        about = json.loads((variant / "metadata.json").read_text())
        assert about["name"] == general["name"] and about["version"] == general["version"]
        assert about["license"] == general["license"] and about["id"].isidentifier()
        assert variant.name in (f"torch-{about['backend']['type']}", "torch-universal")
        own = {p.name: p.read_bytes() for p in (ROOT / "kernels").glob("*.py")}
        for copy in (variant, built / "torch-ext"):
            assert {p.name: p.read_bytes() for p in (copy / kernel_hub.PACKAGE).iterdir()} == own
    card = (built / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0" and "`norm_silu_conv2d`" in card


def test_a_folder_of_something_else_is_left_alone(kernel_hub, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="expected a folder that is free, or an older build, got something else"):
        kernel_hub.write(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
