"""Thousands of damaged weights and checkpoints: refused in a sentence, passed over, or read as they are."""

import io
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mutate import mutated

from flux2 import AutoEncoder, AutoencoderConfig, save_autoencoder
from flux2.checkpoint_folders import Checkpoints
from flux2.checkpoints import config_to_dict

LEAST_MEMORY = 3 * 2**30  # address space of a process that has imported torch, and some
SECONDS = 20.0  # a file may take on a loaded machine

TINY = AutoencoderConfig(z_channels=2, ch=4, decoder_ch=4, ch_mult=(1, 1), num_res_blocks=1, num_groups=2)


def seeds_of(folder):
    """{name: content} of files of every kind that is read: weights in three formats, a run, a diffusers folder."""
    torch.manual_seed(0)
    ae = AutoEncoder(TINY)
    save_autoencoder(ae, folder / "own.safetensors")
    for name, new in (("zip.pt", True), ("legacy.pt", False)):
        buffer = io.BytesIO()
        torch.save({"state_dict": ae.state_dict()}, buffer, _use_new_zipfile_serialization=new)
        (folder / name).write_bytes(buffer.getvalue())
    store = Checkpoints(folder / "run" / "checkpoints", keep=9)
    for step in (1, 2):
        config = {"format": "flux2-tokenizer", "autoencoder": config_to_dict(TINY), "step": step}
        store.save(step, {"model": ae.state_dict(), "ema": ae.state_dict()}, config)


def targets(folder):
    """(what is loaded, the file of it that is damaged)"""
    newest = folder / "run" / "checkpoints" / "step_00000002"
    singles = [(folder / n, folder / n) for n in ("own.safetensors", "zip.pt", "legacy.pt")]
    return [*singles, *((folder / "run", newest / n) for n in ("manifest.json", "config.json", "ema.safetensors")),
            (newest, newest / "ema.safetensors")]  # fmt: skip


def fuzz(folder, first, last):
    """Loads mutants first .. last - 1; how it ended, as JSON on stdout. An exception of another kind ends it."""
    from flux2 import load_autoencoder

    resource.setrlimit(resource.RLIMIT_AS, (LEAST_MEMORY, LEAST_MEMORY))
    ends, slowest = {"refused": 0, "fell back": 0, "read": 0}, 0.0
    others = [f.read_bytes() for _, f in targets(folder)]
    for seed in range(first, last):
        place, file = targets(folder)[seed % len(targets(folder))]
        good = file.read_bytes()
        file.write_bytes(mutated(good, seed, others))
        print(f"seed {seed}: {file.name}", file=sys.stderr, flush=True)
        began, said = time.monotonic(), io.StringIO()
        stderr, sys.stderr = sys.stderr, said
        try:
            load_autoencoder(place)
            ends["fell back" if "damaged checkpoint" in said.getvalue() else "read"] += 1
        except (ValueError, OSError):
            ends["refused"] += 1
        finally:
            sys.stderr = stderr
            file.write_bytes(good)
        slowest = max(slowest, time.monotonic() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({**ends, "slowest_s": round(slowest, 2), "peak_mib": peak}))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded by RLIMIT_AS")
def test_damaged_weights_and_checkpoints(soak, tmp_path):
    seeds_of(tmp_path)
    count = soak.rounds(300, 5000)
    path = [str(Path(__file__).parent), *map(str, Path(__file__).parents[1:3])]
    code = f"import sys; sys.path[:0] = {path!r}\nfrom pathlib import Path\nimport test_fuzz_checkpoints as t\n"
    code += f"t.fuzz(Path({str(tmp_path)!r}), 0, {count})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]  # the last seed named is the one
    ends = json.loads(done.stdout)
    assert ends["slowest_s"] < SECONDS and ends["refused"] > count / 3 and ends["fell back"] > count / 10
    shutil.rmtree(tmp_path)
    soak.found("Mutated weights and checkpoints: refused or passed over, no crash, no hang", mutants=count, **ends)
