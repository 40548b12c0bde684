"""The wheel alone, in an environment of its own, does what the first page says."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import TOY

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "flux2", "train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `pip wheel .` does, of a copy: setuptools leaves a folder behind, and would take old files from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (built,) = out.glob("flux2_tokenizer-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter whose only copy of the project is the wheel's; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    # a plain path: the .pth files there, among them that of an editable installation, are not followed
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--force-reinstall", str(wheel)], check=True, timeout=300)
    return python


def run(python, folder, *arguments):
    """What a command prints, run in a folder that is not the project's."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(PACKAGES)
    shipped = {n for n in names if n.endswith(".py")}
    assert shipped == {str(p.relative_to(ROOT)) for d in PACKAGES for p in (ROOT / d).glob("*.py")}


def test_packages_are_those_of_the_wheel(python, tmp_path):
    code = "import kernels, flux2, train; print(*(m.__file__ for m in (kernels, flux2, train)), sep='\\n')"
    for path in run(python, tmp_path, "-c", code).split():
        assert Path(path).is_relative_to(Path(python).parent.parent)
    assert "flux.2" in run(python, tmp_path, "-m", "flux2", "info")


def test_train_on_a_folder_then_reconstruct_a_photograph(python, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (48, 40 + i, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
    small = "import train.vae as v; v.FITTED_PIXELS = 65536; v.HELD_OUT_CROPS = v.STATISTICS_CROPS = 16\n"
    small += "raise SystemExit(v.main())"
    said = run(python, tmp_path, "-c", small, *TOY, "--data", pictures, "--steps", "2", "--name", "mine")
    assert "held-out PSNR" in said.splitlines()[-1]
    run(python, tmp_path, "-m", "flux2", "reconstruct", pictures / "0.png", "--weights", "runs/mine", "--out", "out")
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".png", ".csv"}
