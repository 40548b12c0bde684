"""Where a run's log goes beside log.jsonl: TensorBoard, Weights & Biases, trackio. None of them can stop a run.

A tracker gets every record that log.jsonl gets: numbers under their names at the record's step, text as text. The
newest pictures of the run's samples/ follow when it ends. What a tracker raises is counted and said once.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

PROJECT = "flux2-tokenizer"  # in Weights & Biases and trackio
MOST_FAILURES = 5  # in a row, after which a tracker is asked no more: each may have waited for the net


class Tracker(Protocol):
    """A service, or a folder of files, that shows runs."""

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of log.jsonl: scalars, text and lists by name, among them step."""
        ...

    def images(self, name: str, path: Path, step: int) -> None:
        """A picture of the run, under a name that comes again at other steps."""
        ...

    def close(self) -> None:
        """Sends what is waiting."""
        ...


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record but for its step."""
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}


def texts(record: Mapping[str, Any]) -> dict[str, str]:
    """What else a record says, as text."""
    return {k: v if isinstance(v, str) else str(v) for k, v in record.items() if not isinstance(v, (int, float))}


class TensorBoard:
    """Event files in FOLDER/tensorboard; those of steps after `start` are hidden on resume."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        if not start:
            self.writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])
        for name, text in texts(record).items():
            self.writer.add_text(name, text, record["step"])
        self.writer.flush()

    def images(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, the same after a resume; WANDB_MODE=offline keeps it in FOLDER/wandb."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int) -> None:
        self.wandb: Any = importlib.import_module("wandb")
        known = folder / "wandb_id"
        if not (start and known.is_file()):
            known.write_text(uuid.uuid4().hex)
        self.run = self.wandb.init(
            project=PROJECT,
            name=folder.name,
            id=known.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        self.run.define_metric("*", step_metric="step")  # steps come again after a --rollback

    def log(self, record: Mapping[str, Any]) -> None:
        self.run.log({"step": record["step"], **scalars(record), **texts(record)})

    def images(self, name: str, path: Path, step: int) -> None:
        self.run.log({"step": step, name: self.wandb.Image(str(path))})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine unless its own environment variables say otherwise."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int) -> None:
        self.trackio: Any = importlib.import_module("trackio")
        self.trackio.init(project=PROJECT, name=folder.name, resume="allow", config=dict(config))

    def log(self, record: Mapping[str, Any]) -> None:
        self.trackio.log({**scalars(record), **texts(record)}, step=record["step"])

    def images(self, name: str, path: Path, step: int) -> None:
        self.trackio.log({name: self.trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        self.trackio.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def require(names: tuple[str, ...]) -> None:
    """ValueError that names the extra if one of the trackers is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--track {name}: expected an installed {name}, got: {error}; pip install 'flux2-tokenizer[track]'"
            ) from None


class Trackers:
    """The trackers of a run."""

    def __init__(self, names: tuple[str, ...], folder: Path, config: Mapping[str, Any], start: int) -> None:
        self.folder, self.step = folder, start
        self.failures = dict.fromkeys(names, 0)
        self._in_a_row = dict.fromkeys(names, 0)
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self._open.update({name: TRACKERS[name](folder, config, start)}))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a service and its client can fail with: the run goes on
            self.failures[name] += 1
            self._in_a_row[name] += 1
            if self.failures[name] == 1:
                text = str(error).strip().splitlines()
                reason = text[0] if text else type(error).__name__
                print(f"warning: --track {name}: {reason}; training goes on, log.jsonl has it all", file=sys.stderr)
            if self._in_a_row[name] == MOST_FAILURES:
                self._open.pop(name, None)
        else:
            self._in_a_row[name] = 0

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands a record to each."""
        self.step = record["step"]
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(record))

    def close(self) -> None:
        """Hands over the pictures of samples/ but those of single steps, and closes each; says what was not taken."""
        pictures = sorted(p for p in self.folder.glob("samples/*.png") if not p.stem.startswith("step_"))
        for name, tracker in list(self._open.items()):
            for path in pictures:
                self._try(name, lambda t=tracker, path=path: t.images(path.stem, path, self.step))
            self._try(name, tracker.close)
        self._open.clear()
        for name, count in self.failures.items():
            if count:
                print(f"--track {name}: {count} calls failed; log.jsonl has it all", file=sys.stderr)
