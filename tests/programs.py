"""Training programs as processes of their own, at toy size, and what they left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from toy import TOY

from flux2 import AutoEncoder, AutoencoderConfig, save_autoencoder
from flux2.checkpoint_folders import Checkpoints
from flux2.tensor_files import load_tensors
from train.loop import read_log

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "reliability" / "faults.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
VAE = ["vae", *TOY, "--gan.weight", "0.5", "--gan.width", "8"]
FLOW = ["flow", "--transformer.width", "16", "--transformer.depth", "2", "--transformer.heads", "2", "--batch", "4",
        "--transformer.repa-depth", "1", "--repa-hidden", "8", "--resolution", "32", "--precision", "fp32",
        "--warmup", "2", "--sample-steps", "2", "--cache", ""]  # fmt: skip
STARTED = []  # processes, for stop_all
LONG = 240  # seconds that anything takes at most on a loaded machine


def tiny_autoencoder(folder):
    """A file of weights that flow models can be trained on."""
    torch.manual_seed(0)
    cfg = AutoencoderConfig(z_channels=4, ch=4, decoder_ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2)
    save_autoencoder(AutoEncoder(cfg), folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def torchrun(*flags):
    """`launcher` of a run of several processes on one machine."""
    return ("-m", "torch.distributed.run", "--standalone", *map(str, flags))


def start(program, out, *flags, fault=("none", "0"), name="x", launcher=()):
    """The process: PROGRAM ARGS --out OUT --name NAME --resume auto FLAGS, in a group of its own."""
    which, *arguments = map(str, program)
    if launcher:
        launcher = (*launcher, "--log-dir", str(out / "torchrun"))  # by default a folder more in /tmp
    command = [sys.executable, *launcher, str(FAULTS), which, *fault, *arguments, "--out", str(out), "--name", name]
    process = subprocess.Popen(
        [*command, "--resume", "auto", *map(str, flags)], env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def stop_all():
    """Kills what a test that failed left running."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            for pid in (worker(process, rank) for rank in range(4)):  # torchrun's are in sessions of their own
                if pid:
                    os.kill(pid, signal.SIGKILL)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(process):
    """(exit code, what it said)"""
    said, _ = process.communicate(timeout=LONG)
    return process.returncode, said


def run(program, out, *flags, **options):
    return finish(start(program, out, *flags, **options))


def wait_for(what, process):
    """Polls until `what()` is true; fails where the process ends before, or nothing happens."""
    deadline = time.monotonic() + LONG
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def worker(process, rank):
    """Process id of a run's process of that rank, or None while there is none."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().split(b"\0")
            parent = environ.with_name("stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it left while it was looked at
            continue
        if b"RANK=%d" % rank in variables and int(parent) == process.pid:
            return int(environ.parent.name)
    return None


def steps_logged(folder):
    """The last step in a run's log; 0 before the first."""
    return max((r["step"] for r in read_log(folder / "log.jsonl")), default=0)


def store_of(folder):
    return Checkpoints(folder / "checkpoints", keep=9)


def newest(folder):
    """{file: tensors} of a run's newest checkpoint."""
    store = store_of(folder)
    return {p.name: load_tensors(p)[0] for p in store.path(store.newest()).glob("*.safetensors")}
