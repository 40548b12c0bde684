"""Runs a training program as it is, but for a fault: python faults.py PROGRAM FAULT NUMBER ARGS...

PROGRAM: vae or flow. FAULT `kill`: SIGKILL to itself at the NUMBER-th step of writing files: an fsync, a rename, or the
begin of a tensor file. Fits on few pixels, so that a run begins soon.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

from flux2 import tensor_files
from train import flow, vae

vae.FITTED_PIXELS, vae.HELD_OUT_CROPS, vae.STATISTICS_CROPS = 16 * 64 * 64, 4, 8
flow.VALIDATION_CROPS, flow.SHOWN_CLASSES, flow.SHOWN_EACH = 4, 2, 2


def counted(plain, count):
    def call(*args, **kwargs):
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    return call


def main(program, fault, number, *arguments):
    if fault == "kill":
        count = [int(number)]
        os.fsync, Path.rename, Path.replace = (counted(f, count) for f in (os.fsync, Path.rename, Path.replace))
        tensor_files.save_file = counted(tensor_files.save_file, count)
    return importlib.import_module(f"train.{program}").main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
