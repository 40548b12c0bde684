"""torchvision's import guard, in fresh interpreters: timm and lpips run behind it, and it needs no torchvision."""

import subprocess
import sys

MODELS = """
from flux2.compat import ensure_torchvision
ensure_torchvision(); ensure_torchvision()
import lpips, timm, torch
vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
assert vit(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
distance = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
x = torch.rand(1, 3, 64, 64)
assert distance(x, x).item() == 0 and distance(x, -x).item() != 0
print("ok")
"""

ABSENT = """
import sys
sys.modules["torchvision"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torchvision" else real(name, *a)
from flux2.compat import ensure_torchvision
ensure_torchvision()
print("ok")
"""


def run(code):
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and out.stdout.strip().endswith("ok"), out.stderr[-2000:]


def test_timm_and_lpips_run_behind_the_guard():
    run(MODELS)


def test_nothing_happens_without_torchvision():
    run(ABSENT)
