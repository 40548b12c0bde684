"""Kernels broken on purpose must fail the comparison with fp64, or it proves nothing; and copies of kernels/ work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MUTANTS = Path(__file__).with_name("mutants.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="breaks memory on purpose; the interpreter contains it")
def test_every_mutant_is_rejected(tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    out = subprocess.run([sys.executable, MUTANTS, tmp_path], capture_output=True, text=True, timeout=500, env=env)
    lines = dict(line.split(": ", 1) for line in out.stdout.splitlines())
    assert len(lines) >= 20, out.stderr[-3000:]
    assert [name for name, said in lines.items() if said == "passed"] == ["unchanged"], out.stdout


def test_a_copy_under_another_name_runs_beside_ours(tmp_path):
    """kernels/ alone, vendored: relative imports, ops under a name of their own."""
    code = f"""
import shutil, sys
shutil.copytree({str(ROOT / "kernels")!r}, {str(tmp_path)!r} + "/mine/fused", dirs_exist_ok=True)
sys.path[:0] = [{str(tmp_path)!r}]
import torch, mine.fused as fused
assert not any(m == "kernels" or m.startswith(("kernels.", "flux2", "train")) for m in sys.modules), "imports ours"
x, p, w = torch.randn(2, 8, 6, 6, requires_grad=True), torch.ones(8), torch.randn(8, 8, 3, 3)
def use(package, backend):
    y = package.norm_silu_conv2d(x, p, p, w, None, 4, backend=backend)
    y, stats = package.add_bias_group_stats(y, x, p, 4, backend=backend)
    y = package.upsample_conv2d(package.group_norm_silu(y, p, p, 4, stats=stats, backend=backend), w, p)
    return y.detach(), *torch.autograd.grad(y.square().sum(), x)
sys.path[:0] = [{str(ROOT)!r}]
import kernels
for a, b in zip(use(fused, "triton"), use(kernels, "torch")):
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
print(fused.group_norm.__module__, sorted(n for n in dir(torch.ops) if n.startswith("flux2_")))
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=env
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.startswith("mine.fused.group_norm") and "flux2_mine_fused" in out.stdout
