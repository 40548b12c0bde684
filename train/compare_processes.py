"""The worker processes of one machine: started, told of signals, and replaced where one dies.

A worker says which task it is at. A task that two workers died of, out of memory or in a crash of native code, is
recorded as failed: it would take every worker with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from train.compare_config import CompareConfig, CompareOptions
from train.compare_work import DEVICE_LOST, State, worker_process
from train.loop import SIGNALS

DEATHS = 2  # workers that may die of a task before it counts as failed
LOSSES = 3  # of a GPU, before no worker is started on it any more
# A CPU's workers keep the memory that they free: glibc would give it back and ask for it again at every step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def cores() -> int:
    """Of a CPU, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    """A process, the pipe that it tells its task through, and the task."""

    process: BaseProcess
    told: Connection
    place: int
    task: str = ""

    def listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while self.told.poll():
                self.task = self.told.recv()


class Crew:
    """`count` workers on `device`. On a CPU each has its share of the cores; GPUs are dealt out in turn."""

    def __init__(self, config: CompareConfig, options: CompareOptions, device: torch.device, count: int) -> None:
        self.config, self.device, self.count = config, device, count
        self.options = dataclasses.replace(options, device=str(device))  # no CPU in a lost GPU's place
        self.state = State(config, options.folder(config))
        self.threads = max(1, cores() // count) if device.type == "cpu" else 0
        self.workers: list[_Worker] = []
        self.deaths: Counter[str] = Counter()  # by task, "" for none
        self.losses: Counter[int] = Counter()  # by place
        self.signal = 0

    def run(self) -> int:
        """Works until all workers have left; the exit code: 0, or the greatest of theirs. A signal to this process
        reaches them all, and is the exit code's."""
        previous = {s: signal.signal(s, self._pass_on) for s in SIGNALS}
        codes = [0]
        try:
            for place in range(self.count):
                self._start(place)
            while self.workers:
                wait([w.process.sentinel for w in self.workers], timeout=1.0)
                for worker in list(self.workers):
                    worker.listen()
                    if not worker.process.is_alive():
                        self.workers.remove(worker)
                        codes.append(self._left(worker))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 128 + self.signal if self.signal else max(codes)

    def _pass_on(self, number: int, _: Any) -> None:
        self.signal = number
        for worker in self.workers:
            if worker.process.is_alive() and worker.process.pid:
                os.kill(worker.process.pid, signal.SIGTERM)

    def _start(self, place: int) -> None:
        if self.signal:
            return
        spawn = multiprocessing.get_context("spawn")
        told, tell = spawn.Pipe(duplex=False)
        process = spawn.Process(target=worker_process, args=(self.config, self.options, self.threads, tell))
        with _environment(self._variables(place)):
            process.start()
        tell.close()
        self.workers.append(_Worker(process, told, place))
        if self.signal and process.pid:  # it came while the process started
            os.kill(process.pid, signal.SIGTERM)

    def _variables(self, place: int) -> dict[str, str]:
        if self.device.type == "cpu":
            return {"OMP_NUM_THREADS": str(self.threads), **KEEP_MEMORY}
        if self.device.index is not None:
            return {}
        number = place % torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[number] if visible[0] else str(number)}

    def _left(self, worker: _Worker) -> int:
        """What a worker that left adds to the exit code; another takes its place if it died."""
        worker.listen()
        worker.told.close()
        code = worker.process.exitcode or 0
        if self.signal or (code >= 0 and code != DEVICE_LOST):
            return code
        if code == DEVICE_LOST:  # what it was at is recorded
            self.losses[worker.place] += 1
            if self.losses[worker.place] >= LOSSES:
                return DEVICE_LOST
            self._start(worker.place)
            return 0
        name, task = signal.Signals(-code).name, worker.task
        self.deaths[task] += 1
        often = self.deaths[task] >= DEATHS
        if often and not task:
            return 128 - code
        print(f"a worker died of {name} at {task or 'no task'}: another takes its place", flush=True)
        if often:
            hint = "; was there enough memory?" if name == "SIGKILL" else ""
            self.state.record_failure(task, f"{DEATHS} workers died of it, the last of {name}{hint}")
        self._start(worker.place)
        return 0


@contextlib.contextmanager
def _environment(variables: dict[str, str]):
    kept = {k: os.environ.get(k) for k in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in kept.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
