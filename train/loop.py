"""What every training program needs around its step: device, interruption, the log, the progress line."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def choose_device(name: str) -> torch.device:
    """auto is cuda where there is one, else cpu. ValueError if the device cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one this machine has, got {name!r} ({reason})") from None
    return device


def choose_precision(precision: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the device computes in it, else "fp32"; other values as they are."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory the run has held: of the GPU's allocator on cuda, else of the process (0 where Windows runs it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def environment(device: torch.device) -> dict[str, Any]:
    """What the run ran on: versions, processor, GPU, commit, command."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        commit = "unknown"
    cuda = device.type == "cuda"
    return {
        "commit": commit,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else "none",
        "cuda": torch.version.cuda or "none",
        "packages": {p: version_of(p) for p in ("torch", "triton", "numpy", "safetensors", "scikit-image", "pillow")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def new_run_folder(out: Path, name: str, default: str) -> Path:
    """The folder of a new run: out/name, or out/default with the first free number. Not created here.

    ValueError if a given name is taken.
    """
    if name:
        if (out / name).exists():
            raise ValueError(f"{out / name} exists: choose another --name, or continue that run with --resume auto")
        return out / name
    return next(p for i in range(1, 10**6) if not (p := out / (default if i == 1 else f"{default}-{i}")).exists())


def latest_run_folder(out: Path, name: str, default: str) -> Path:
    """The folder that --resume auto continues: out/name, or the newest numbered out/default; it may not exist yet."""
    if name:
        return out / name
    last = out / default
    for i in range(2, 10**6):
        if not (out / f"{default}-{i}").exists():
            return last
        last = out / f"{default}-{i}"
    return last


# what asks a program to save and leave; SIGUSR1 is what Slurm sends before its time limit (--signal=USR1@60)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupt:
    """Turns the first of SIGNALS into a flag that the loop reads between steps; a second one acts at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Interrupt:
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving (again: leave at once)", flush=True)


class Interrupted(Exception):
    """A signal asked to leave, and what was done so far is saved. `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors named `<index>.<field>`; learning rates are not part of it."""
    state = optimiser.state_dict()["state"]
    return {f"{i}.{key}": value for i, fields in state.items() for key, value in fields.items()}


def load_optimiser_tensors(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimiser_tensors`, into an optimiser over the same parameters in the same order.

    Moments get their parameter's memory format: the fused update walks both as they lie in memory.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


class Log:
    """One JSON object a line in `path`. Lines after the step a run goes on from (0: all) come again and are dropped.

    also: is given every record, too. writes: False, and nothing is written: another process of the run does.
    """

    def __init__(
        self,
        path: Path,
        *,
        start: int,
        also: Callable[[dict[str, Any]], None] = lambda record: None,
        writes: bool = True,
    ) -> None:
        self.path, self.also, self.writes = path, also, writes
        if not writes:
            return
        kept = [line for line in read_log(path) if start and line["step"] <= start]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)

    def write(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.also(record)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log; a last line cut short by a kill is passed over."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Progress:
    """One line with step, ETA, images/s, losses and peak memory: rewritten on a terminal, else printed every 10 s."""

    def __init__(self, *, start: int, steps: int, batch: int, device: torch.device, shown: bool = True) -> None:
        from tqdm import tqdm

        self.batch, self.device = batch, device
        self._times = [(time.monotonic(), start)]
        self._terminal, self._shown = shown and sys.stderr.isatty(), shown
        self._printed = time.monotonic()
        self._steps = steps
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not self._terminal,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} eta {remaining}{postfix}",
        )

    def images_per_second(self) -> float:
        """Over the last 50 updates of the line; 0 before the first."""
        (t0, s0), (t1, s1) = self._times[0], self._times[-1]
        return (s1 - s0) * self.batch / max(1e-9, t1 - t0)

    def update(self, done: int, losses: dict[str, float], remark: str = "") -> None:
        """`done` steps are done; losses by name, and what there is to say about them."""
        now = time.monotonic()
        self._times = [*self._times[-50:], (now, done)]
        rate = self.images_per_second()
        text = f"{rate:.0f} img/s, peak {peak_memory_bytes(self.device) / 2**30:.2f} GiB, "
        text += f"{remark}, " if remark else ""
        text += " ".join(f"{k} {v:.3g}" for k, v in losses.items())  # last: a narrow terminal cuts the line
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._shown and (now - self._printed > 10 or done == self._steps):
            self._printed = now
            left = (self._steps - done) * self.batch / rate if rate else 0
            print(f"step {done}/{self._steps} eta {left:.0f} s {text}", flush=True)

    def close(self) -> None:
        self._bar.close()


def cpp_compiler() -> str | None:
    """Path of the C++ compiler torch.compile would use on a CPU, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def parameters_by_rate(model: nn.Module, slow: str) -> Iterator[tuple[bool, list[nn.Parameter]]]:
    """(is slow, parameters): those under a module named `slow`, and the rest; empty groups left out."""
    named = list(model.named_parameters())
    for wanted in (False, True):
        group = [p for n, p in named if (slow in n.split(".")) is wanted]
        if group:
            yield wanted, group
