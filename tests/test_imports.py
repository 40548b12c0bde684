"""How the packages hang together: who imports whom, what importing costs, and what it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"kernels": {"flux2", "train", "benchmarks"}, "flux2": {"train", "benchmarks"}, "train": {"benchmarks"}}
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in FORBIDDEN}
# What importing kernels and flux2 must not need; triton is missing on macOS and Windows.
OPTIONAL = (
    "triton",
    "timm",
    "lpips",
    "tyro",
    "PIL",
    "skimage",
    "matplotlib",
    "diffusers",
    "transformers",
    "torchvision",
    "flash_attn",
    "xformers",
    "huggingface_hub",
    "yaml",
    "tensorboard",
)


def imports(path: Path) -> list[tuple[str, int]]:
    """(top-level module, relative level) of each import statement, wherever it stands in the file"""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(((node.module or "").split(".")[0], node.level))
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    assert FILES[package]
    wrong = [
        f"{p.name}: {m}" for p in FILES[package] for m, level in imports(p) if not level and m in FORBIDDEN[package]
    ]
    assert not wrong


def test_kernels_can_be_vendored():
    """torch, triton, the standard library, itself by relative imports only, and attention's peers when asked for."""
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "__future__", "flash_attn", "xformers"}
    wrong = [f"{p.name}: {m}" for p in FILES["kernels"] for m, level in imports(p) if not level and m not in allowed]
    assert not wrong


def test_the_walk_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from train.data import x\n    import flux2.ema\n    from . import y\n")
    assert imports(file) == [("train", 0), ("flux2", 0), ("", 1)]


@pytest.mark.parametrize(
    "path", [p for files in FILES.values() for p in files], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_each_file_says_what_it_is_and_stays_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert text.count("\n") <= 600


def test_each_operation_has_a_test_and_a_benchmark_of_its_file_s_name():
    import kernels

    stems = {getattr(kernels, name).__module__.rpartition(".")[2] for name in kernels.__all__}
    assert len(stems) >= 3
    for stem in stems:
        for path in (f"tests/kernels/test_{stem}.py", f"benchmarks/bench_{stem}.py"):
            assert (ROOT / path).is_file(), f"{path} is missing"


def python(code: str) -> str:
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def test_import_is_light_and_needs_torch_and_safetensors_only():
    blocked = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
    use = "import kernels, flux2\nprint(flux2.AUTOENCODERS['flux.2'].latent_channels)"
    assert python(blocked + use).strip() == "128"


def test_import_takes_little_longer_than_torchs():
    """In processor time, the best of three each, so that neither a slow nor a busy machine fails it."""

    def seconds(modules):
        return min(float(python(f"import {modules}, time; print(time.process_time())")) for _ in range(3))

    ours, torchs = seconds("kernels, flux2"), seconds("torch")
    assert ours < 1.5 * torchs, (ours, torchs)


def test_transformers_and_diffusers_import_beside_ours():
    """`kernels` is also a distribution of Hugging Face that both look for."""
    code = """
import warnings; warnings.simplefilter("ignore")
import kernels, flux2
import transformers, diffusers
from flux2.compat import ensure_torchvision
ensure_torchvision()  # both import torchvision, which may not go with this torch
from diffusers import AutoencoderKL
from transformers import AutoModel
print("ok")
"""
    assert python(code).strip().endswith("ok")
