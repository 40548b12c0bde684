"""Figures of reports: what a program draws does not change how a notebook shows its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_programs_leave_the_backend_alone(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import matplotlib
matplotlib.use("svg")
from train.report import plot_curves
plot_curves([dict(step=1, nimg=16, loss=0.5), dict(step=1, nimg=16, held_out_psnr=30.0)], "a.png", dict(PCA=29.0))
assert matplotlib.get_backend() == "svg" and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    programs = [
        path.name
        for path in (ROOT / "train").glob("*.py")
        if "pyplot" in path.read_text().replace("without pyplot", "")
    ]
    assert programs == []
