"""Timing that compares: contestants take turns, caches are cold, medians of many rounds; and what it was measured on.

A call is timed with CUDA events on a GPU, with the clock on a CPU. Before each, a buffer larger than the caches is
written, so that no contestant finds its input where the one before it left it.
"""

from __future__ import annotations

import ctypes
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLD_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}  # H200: 50 MB of L2; a CPU's share of L3 is below 64 MiB


def keep_memory() -> None:
    """Makes glibc keep what is freed: else it is a matter of luck which contestant waits for fresh pages."""
    mmap_max, trim_threshold = -4, -1
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (AttributeError, OSError, TypeError):  # another C library
        pass


class Stopwatch:
    """Milliseconds of one call, cold."""

    def __init__(self, device: torch.device, *, head_start: bool = False) -> None:
        """head_start: let the host run ahead of a GPU, so that what it takes to launch small kernels is not timed."""
        self.device, self.head_start = device, head_start
        if device.type == "cpu":
            keep_memory()
        self._buffer = torch.empty(COLD_BYTES.get(device.type, COLD_BYTES["cuda"]), dtype=torch.uint8, device=device)

    def cool(self) -> None:
        """Fills the caches with something else."""
        self._buffer.fill_(1)
        if self.device.type != "cpu":
            self._buffer.view(torch.int64).sum()  # else the fill is written back while the call runs

    def warm_time(self, call: Callable[[], Any]) -> float:
        """Without cooling first."""
        if self.device.type == "cpu":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        device = torch.get_device_module(self.device)
        start, end = device.Event(enable_timing=True), device.Event(enable_timing=True)
        if self.head_start and self.device.type == "cuda":
            torch.cuda._sleep(2_000_000)  # about a millisecond
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def time(self, call: Callable[[], Any]) -> float:
        self.cool()
        return self.warm_time(call)


def interleaved(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    head_start: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; within a round every contestant is called once, in turn."""
    watch = Stopwatch(device, head_start=head_start)
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(watch.time(call))
    return samples


def ratio(ours: list[float], reference: list[float]) -> tuple[float, float]:
    """Median over rounds of ours / reference, and its standard error, from the median deviation of the rounds."""
    rounds = [a / b for a, b in zip(ours, reference, strict=True)]
    middle = statistics.median(rounds)
    deviation = 1.4826 * statistics.median(abs(r - middle) for r in rounds)
    return middle, 1.2533 * deviation / len(rounds) ** 0.5


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and its vectors: hosts give processors of several generations one name."""
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    vectors = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {vectors}"


def slug(device: torch.device) -> str:
    """The device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, device, driver and versions."""

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    driver = "none"
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    return {
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "device": device_name(device),
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {p: version_of(p) for p in ("torch", "triton", "numpy", "diffusers", "liger-kernel")},
    }
