"""Runs a training program as it is, but for a fault: python faults.py PROGRAM FAULT NUMBER ARGS...

PROGRAM: vae or flow. FAULT
    none      nothing
    kill      SIGKILL to itself at the NUMBER-th step of writing files: an fsync, a rename, a tensor file's begin
    nan       a loss of process 1 is NaN from step 3 on, NUMBER times
    record    NUMBER is a folder, which gets the gradients of the first updates and a hash of each sample

Fits on few pixels, so that a run begins soon.
"""

import hashlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from flux2 import tensor_files
from train import dist, flow, flow_trainer, guards, vae, vae_trainer

vae.FITTED_PIXELS, vae.HELD_OUT_CROPS, vae.STATISTICS_CROPS = 16 * 64 * 64, 4, 8
flow.VALIDATION_CROPS, flow.SHOWN_CLASSES, flow.SHOWN_EACH = 4, 2, 2


def counted(plain, count):
    def call(*args, **kwargs):
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    return call


def break_loss(times):
    now, plain, l1 = {"step": 0}, vae_trainer.VaeTrainer.step, vae_trainer.PIXEL_LOSSES["l1"]

    def step(self, number, batch):
        now["step"] = number
        return plain(self, number, batch)

    vae_trainer.VaeTrainer.step = step
    bad = lambda: dist.rank() == 1 and 3 <= now["step"] < 3 + times  # noqa: E731
    vae_trainer.PIXEL_LOSSES["l1"] = lambda a, b: l1(a, b) * (float("nan") if bad() else 1.0)


def record(folder):
    update, seen = guards.GuardedOptimiser.update, {"samples": []}

    def noted(self, step, terms, *more):
        grads = {n: p.grad.detach() for n, p in self.named.items() if p.grad is not None}
        if step < 2 and dist.is_main() and not any(hasattr(g, "full_tensor") for g in grads.values()):
            tensor_files.save_tensors(folder / f"{next(iter(self.named))}-{step}.safetensors", grads)
        return update(self, step, terms, *more)

    guards.GuardedOptimiser.update = noted
    for trainer in (vae_trainer.VaeTrainer, flow_trainer.FlowTrainer):

        def step(self, number, batch, plain=trainer.step):
            pixels = batch["pixels"] if isinstance(batch, dict) else batch
            found = [hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16] for sample in pixels]
            seen["samples"].append([number, dict(zip(self.share.samples(), found, strict=True))])
            (folder / f"samples-{dist.rank()}-{os.getpid()}.json").write_text(json.dumps(seen["samples"]))
            return plain(self, number, batch)

        trainer.step = step


def main(program, fault, number, *arguments):
    if fault == "kill":
        count = [int(number)]
        os.fsync, Path.rename, Path.replace = (counted(f, count) for f in (os.fsync, Path.rename, Path.replace))
        tensor_files.save_file = counted(tensor_files.save_file, count)
    if fault == "nan":
        break_loss(int(number))
    if fault == "record":
        record(Path(number))
    return importlib.import_module(f"train.{program}").main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
