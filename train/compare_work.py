"""The work of a comparison: what is done, what can be done next, and one worker that does it until nothing is left.

A worker claims a task (`train.claims`), does it and writes its result whole; what others do meanwhile it passes over.
Autoencoders come first, and a model is ready when its autoencoder is.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from flux2.distances import Moments
from flux2.features import Features, build_features
from flux2.tensor_files import load_json, load_tensors, save_json, save_tensors
from train.cell import drop_checkpoints, train_cell
from train.cell_data import Latents, load_latents, reference_moments
from train.claims import Claim, Claims
from train.compare_autoencoders import prepare_autoencoder, weights_of
from train.compare_config import Cell, CompareConfig, CompareOptions
from train.compare_rows import Row
from train.flow_config import FlowOptions
from train.loop import SIGNALS, Interrupted, choose_device

WAIT = 2.0  # seconds between looks at what others do
DEVICE_LOST = 3  # exit code of a worker whose GPU does not answer any more


class Lost(Exception):
    """Another worker took the task over, because this one gave no sign of life for too long."""


class DeviceLost(Exception):
    """After an error the GPU refuses all further work of this process."""


class State:
    """What is done and what failed, by the files of a comparison's folder."""

    def __init__(self, config: CompareConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.cells = config.cells()

    def autoencoder_file(self, name: str) -> Path:
        return self.folder / "autoencoders" / f"{name}.json"

    def failure_file(self, name: str) -> Path:
        """Why an autoencoder, or the reference, could not be made."""
        return self.folder / "failures" / f"{name}.json"

    def result_file(self, cell: Cell) -> Path:
        return self.folder / "results" / f"{cell.id}.json"

    def results(self) -> list[dict[str, Any]]:
        """Those there are, in the order of the grid."""
        return [load_json(f) for c in self.cells if (f := self.result_file(c)).is_file()]

    def counts(self) -> tuple[int, int]:
        """(results, failures among them)"""
        results = self.results()
        return len(results), sum(r["status"] != "done" for r in results)

    def record_failure(self, name: str, error: str) -> None:
        """Of a task by its claim's name, unless it is done."""
        cell = next((c for c in self.cells if c.id == name), None)
        if cell is None:
            self._record(self.failure_file(name.removeprefix("autoencoder-")), {"error": error})
            return
        result = {"id": cell.id, "status": "failed", "cell": dataclasses.asdict(cell), "host": socket.gethostname()}
        self._record(self.result_file(cell), {**result, "seconds": 0.0, "error": error})

    def _record(self, path: Path, value: dict[str, Any]) -> None:
        if not path.is_file():
            save_json(path, value)

    def forget_failures(self) -> None:
        """Removes what failed, so that it is tried again."""
        for result in self.results():
            if result["status"] != "done":
                (self.folder / "results" / f"{result['id']}.json").unlink(missing_ok=True)
                shutil.rmtree(self.folder / "cells" / result["id"], ignore_errors=True)
        shutil.rmtree(self.folder / "failures", ignore_errors=True)

    def write_csv(self) -> Path:
        """cells.csv: a row for each model, checkpoint and sampling shift; one with empty figures for a failed model."""
        names, text = [*Row.__dataclass_fields__, "status"], io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        channels = {a: load_json(f)["channels"] for a in self.config.autoencoders
                    if (f := self.autoencoder_file(a)).is_file()}  # fmt: skip
        for result in self.results():
            row = {**result["cell"], "status": result["status"]}
            row["channels"] = channels.get(row["autoencoder"], 0)
            found = [
                {**row, "nimg": c["nimg"], "velocity": c["velocity"], "sampling_shift": float(shift), "fd": fd}
                for c in result.get("checkpoints", [])
                for shift, fd in c["fd"].items()
            ]
            writer.writerows(found or [row])
        path = self.folder / "cells.csv"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text.getvalue())
        temporary.replace(path)
        return path


class Leaving:
    """Signals that ask to leave raise Interrupted where they come; inside `held` at its end, or in a `free` part."""

    def __init__(self) -> None:
        self._held, self._signal = False, 0

    def __enter__(self) -> Leaving:
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        self._signal = number
        if not self._held:
            raise Interrupted(number)

    def _set(self, held: bool) -> None:
        self._held = held
        if self._signal and not held:
            raise Interrupted(self._signal)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._set(False)

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """A part of `held` in which signals raise."""
        try:
            self._set(False)
            yield
        finally:
            self._held = True


class Worker:
    """One process that works on a comparison; `work` until nothing is left."""

    def __init__(
        self,
        config: CompareConfig,
        options: CompareOptions,
        device: torch.device,
        tell: Callable[[str], None],
        leaving: Leaving,
    ) -> None:
        """tell: called with the name of each task when it begins, with "" when it has ended."""
        self.config, self.options, self.device, self.tell, self.leaving = config, options, device, tell, leaving
        self.folder = options.folder(config)
        self.state = State(config, self.folder)
        self.claims = Claims(self.folder / "claims", stale=options.stale)
        self.features: Features = build_features(config.features, config.feature_weights, device)
        self.reference: Moments | None = None
        self.latents: tuple[str, Latents] | None = None  # of the last cell's autoencoder
        self.first: tuple[float, int] | None = None  # when this worker began its first model, and results there were

    def work(self) -> None:
        """Does what can be done until all is done or failed. Interrupted by a signal, claims given back."""
        while True:
            if not (left := list(self._left())):
                return
            mine = [name for name, ready, run in left if self._try(name, ready, run)]
            if not mine:
                time.sleep(WAIT)  # others are at it

    def _left(self) -> Iterator[tuple[str, Callable[[], bool], Callable[[Claim], None]]]:
        """(name, whether it is still to be done and can be, what does it) of each task that is not done."""
        state = self.state
        reference, broken = self.folder / "reference.safetensors", state.failure_file("reference")
        if not reference.is_file() and not broken.is_file():
            ready = lambda: not reference.is_file() and not broken.is_file()  # noqa: E731
            yield "reference", ready, lambda claim: self._guarded("reference", claim, self._make_reference)
        for name in self.config.autoencoders:
            done, failed = state.autoencoder_file(name), state.failure_file(name)
            if not done.is_file() and not failed.is_file():
                ready = lambda d=done, f=failed: not d.is_file() and not f.is_file()  # noqa: E731
                yield f"autoencoder-{name}", ready, lambda claim, name=name: self._prepare(name, claim)
        for cell in state.cells:
            if not state.result_file(cell).is_file():
                yield cell.id, lambda cell=cell: self._is_ready(cell), lambda claim, cell=cell: self._cell(cell, claim)

    def _is_ready(self, cell: Cell) -> bool:
        if self.state.result_file(cell).is_file():
            return False
        needs = (cell.autoencoder, "reference")
        if any(self.state.failure_file(n).is_file() for n in needs):
            return True  # to be recorded as failed
        return self.state.autoencoder_file(cell.autoencoder).is_file() and self._has_reference()

    def _has_reference(self) -> bool:
        return (self.folder / "reference.safetensors").is_file()

    def _try(self, name: str, ready: Callable[[], bool], run: Callable[[Claim], None]) -> bool:
        """Whether the task was this worker's to do."""
        if not ready():
            return False
        with self.leaving.held():  # a claim is made and given up whole, or it would stay behind
            if (claim := self.claims.acquire(name)) is None:
                return False
            with claim:
                if not ready():  # done between the look and the claim
                    return False
                with self.leaving.free():
                    self.tell(name)
                    try:
                        run(claim)
                    except Lost:
                        print(f"{name}: taken over by another worker", file=sys.stderr, flush=True)
                    self.tell("")
        return True

    def _check_device(self) -> None:
        """After an error. DeviceLost where nothing can be computed any more: what comes next would fail as well."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeviceLost(str(error)) from None

    def _check(self, claim: Claim) -> None:
        if claim.lost:
            raise Lost(claim.name)

    def _guarded(self, name: str, claim: Claim, run: Callable[[Callable[[], None]], None]) -> None:
        """Runs it; an error becomes failures/NAME.json. What it prints goes to logs/NAME.txt."""
        try:
            with self._printing_to(self.folder / "logs" / f"{name}.txt"):
                run(lambda: self._check(claim))
        except (Interrupted, Lost, KeyboardInterrupt):
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            save_json(self.state.failure_file(name), {"error": text, "traceback": traceback.format_exc()})
            print(f"{name} failed: {text} (logs/{name}.txt)", flush=True)
            self._check_device()

    @contextlib.contextmanager
    def _printing_to(self, path: Path) -> Iterator[None]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                yield
            except Exception:
                traceback.print_exc()
                raise

    def _make_reference(self, check: Callable[[], None]) -> None:
        config = self.config
        if config.reference:
            from train.references import adm_reference, default_cache

            moments = adm_reference(Path(config.reference), self.features, self.device, cache=default_cache()).pool
        else:
            moments = reference_moments(config.crops, self.features, config.reference_crops, self.device, check)
        save_tensors(self.folder / "reference.safetensors", moments.tensors())

    def _prepare(self, name: str, claim: Claim) -> None:
        began = time.monotonic()

        def run(check: Callable[[], None]) -> None:
            figures = prepare_autoencoder(
                self.config, name, self.folder, self.features, self.device, self.options.compile
            )
            check()
            save_json(self.state.autoencoder_file(name), figures)

        self._guarded(name, claim, run)
        if (file := self.state.autoencoder_file(name)).is_file():
            f = load_json(file)
            print(
                f"autoencoder {name}: {f['channels']} channels a token, {f['psnr']:.2f} dB, probe R2"
                f" {f['probe_r2']:.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )

    def _cell(self, cell: Cell, claim: Claim) -> None:
        """Trains and judges a model; its result, or its error, is written."""
        began = time.monotonic()
        self.first = self.first or (began, self.state.counts()[0])
        result = {"id": cell.id, "status": "done", "cell": dataclasses.asdict(cell), "host": socket.gethostname()}
        run_folder = self.folder / "cells" / cell.id
        try:
            for need in (cell.autoencoder, "reference"):
                if (failure := self.state.failure_file(need)).is_file():
                    raise RuntimeError(f"{need} failed: {load_json(failure)['error']}")
            with self._printing_to(run_folder / "output.txt"):
                result["checkpoints"] = train_cell(
                    self.config.flow_of(cell), self._latents(cell.autoencoder), self.config.judging,
                    self.features, folder=run_folder, device=self.device, check=lambda: self._check(claim),
                    options=FlowOptions(compile=self.options.compile, device=str(self.device)),
                )  # fmt: skip
        except (Interrupted, Lost, KeyboardInterrupt):
            raise
        except Exception as error:
            result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = time.monotonic() - began
        self._check(claim)
        save_json(self.state.result_file(cell), result)
        if result["status"] == "done" and not self.options.keep_weights:
            drop_checkpoints(run_folder)
        self._tell(result)
        if result["status"] != "done":
            self._check_device()

    def _latents(self, name: str) -> Latents:
        if self.latents is None or self.latents[0] != name:
            if self.reference is None:
                self.reference = Moments.from_tensors(load_tensors(self.folder / "reference.safetensors")[0])
            weights = weights_of(self.config, name, self.folder)
            found = load_latents(weights, self.folder / "latents" / name, self.reference, self.device)
            self.latents = name, found
        return self.latents[1]

    def _tell(self, result: dict[str, Any]) -> None:
        """One line: how far the whole is, what was found, and how long the rest takes."""
        (done, _), total = self.state.counts(), len(self.state.cells)
        assert self.first is not None
        rate = (time.monotonic() - self.first[0]) / max(1, done - self.first[1])
        left = f"about {_duration((total - done) * rate)} left"
        if result["status"] == "done":
            last = result["checkpoints"][-1]
            shift, fd = min(last["fd"].items(), key=lambda item: item[1])
            said = f"velocity {last['velocity']:.4f}, {self.features.label} {fd:.4g} at sampling shift {shift}"
        else:
            said = f"failed: {result['error']}"
        print(f"[{done}/{total}] {result['id']}: {said}, {result['seconds']:.0f} s; {left}", flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def worker_process(config: CompareConfig, options: CompareOptions, threads: int, tell: Connection) -> None:
    """What a process of --jobs runs: leaves as `run_worker` does. tell: takes the names of its tasks.

    In a group of its own, so that a terminal's Ctrl-C comes once, through the parent; it leaves when the parent dies.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if (parent := multiprocessing.parent_process()) is not None:

        def follow() -> None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=follow, daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    sys.exit(run_worker(config, options, tell.send))


def run_worker(config: CompareConfig, options: CompareOptions, tell: Callable[[str], None] = lambda name: None) -> int:
    """Works until nothing is left; 0, 2 with a line on stderr, DEVICE_LOST, or 128 + signal. SIGTERM leaves as Ctrl-C
    does. tell: as a Worker's."""
    try:
        with Leaving() as leaving:
            Worker(config, options, choose_device(options.device), tell, leaving).work()
        return 0
    except Interrupted as interrupted:
        return 128 + interrupted.signal
    except KeyboardInterrupt:
        return 130
    except DeviceLost as error:
        print(f"the GPU does not answer any more: {error}", file=sys.stderr, flush=True)
        return DEVICE_LOST
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
