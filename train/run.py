"""One run's life, shared by every training program: its folder, resuming, the loop over steps, log and checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flux2.tensor_files import save_json
from train.configs import RunOptions, differences
from train.guards import GuardedOptimiser
from train.loop import (
    Checkpoints,
    Interrupt,
    Log,
    Progress,
    environment,
    latest_run_folder,
    new_run_folder,
    peak_memory_bytes,
)

LOG_EVERY = 10  # steps a line of log.jsonl is the mean of: reading a loss makes a GPU wait


class Trainer(Protocol):
    """What a run needs of the thing it trains."""

    guards: dict[str, GuardedOptimiser]
    lr: float

    def step(self, step: int, batch: Any) -> dict[str, Tensor]:
        """One update: detached scalars by name."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs, by checkpoint file."""
        ...

    def remarks(self, means: Mapping[str, float]) -> dict[str, str]:
        """Text for the log, from a window's means."""
        ...


class Run:
    """A new run's folder, or the one that is gone on with: `start` is its step, `saved` its checkpoint's tensors.

    config: the plain dict that a resumed run must share with its checkpoint. Nothing is written before `open`.
    ValueError if the name is taken, or the config is another.
    """

    def __init__(self, options: RunOptions, *, preset: str, config: dict[str, Any]) -> None:
        self.options, self.config = options, config
        choose = latest_run_folder if options.resume == "auto" else new_run_folder
        self.folder: Path = choose(options.out, options.name, preset)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=options.keep)
        self.start, self.saved = 0, None
        if steps := self.checkpoints.steps():
            self.start = steps[-1]
            self.saved, plain = self.checkpoints.load(self.start)
            if changed := differences(plain["train"], config):
                raise ValueError(f"{self.folder} was started with another config; " + "; ".join(changed))

    def open(self, text: str, device: torch.device) -> None:
        """Makes the folder, with the config's `text` and what it runs on, and opens the log. OSError if it cannot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(text)
        save_json(self.folder / "env.json", environment(device))
        self.device = device
        self.log = Log(self.folder / "log.jsonl", start=self.start)
        resumed = f", resumed at step {self.start}" if self.start else ""
        print(f"run folder: {self.folder}{resumed}", flush=True)

    def stop(self, steps: int) -> int:
        """The step this process leaves at."""
        return min(steps, self.options.stop_after or steps)

    def loop(
        self,
        trainer: Trainer,
        batches: Iterable[Any],
        *,
        steps: int,
        batch: int,
        save: Callable[[int], None],
        samples: Callable[[int], list[str]],
    ) -> int | None:
        """Steps `start` to `stop(steps)` on `batches`. None when all `steps` are done, else the exit code.

        batch: images a step. save(done): writes a checkpoint. samples(step): names of a step's samples, for the log.
        FloatingPointError when --patience updates in a row were skipped; the state before them is saved.
        """
        stop, done = self.stop(steps), self.start
        save_every = self.options.save_every or min(1000, -(-steps // 4))
        known_dead: set[str] = set()
        window: list[dict[str, Tensor]] = []
        with Interrupt() as interrupt:
            progress = Progress(start=self.start, steps=steps, batch=batch, device=self.device)
            for step, data in enumerate(batches, self.start):
                window.append(trainer.step(step, data))
                done = step + 1
                if done % LOG_EVERY == 0 or done == stop:
                    means, window = _means(window), []
                    self._watch(trainer, samples, batch, known_dead, save=lambda done=done: save(done))
                    remarks = trainer.remarks({"step": step, **means})
                    progress.update(done, means, ", ".join(remarks.values()))
                    rate = {"lr": trainer.lr, "images_per_second": progress.images_per_second()}
                    memory = {"peak_memory_bytes": peak_memory_bytes(self.device)}
                    self.log.write({"step": done, "nimg": done * batch, **means, **rate, **memory, **remarks})
                if done % save_every == 0 or done == stop or interrupt.signal:
                    save(done)
                if interrupt.signal:
                    break
            progress.close()
        if done == steps:
            return None
        where, how = self.checkpoints.path(done), f"--resume auto --name {self.folder.name}"
        print(f"saved {where} after {done} of {steps} steps; go on with {how}")
        return 128 + interrupt.signal if interrupt.signal else 0

    def _watch(
        self,
        trainer: Trainer,
        samples: Callable[[int], list[str]],
        batch: int,
        known_dead: set[str],
        *,
        save: Callable[[], None],
    ) -> None:
        """Logs what the guards saw since the last call; raises when they skipped too many updates in a row."""
        for name, guard in trainer.guards.items():
            skipped, dead = guard.read()
            for skip in skipped:
                broke, names = list(skip.broke), samples(skip.step)
                self.log.write(
                    {"step": skip.step + 1, "nimg": (skip.step + 1) * batch, "skipped": name, "broke": broke,
                     "samples": names}
                )  # fmt: skip
            if skipped:
                text = f"{len(skipped)} updates of the {name} skipped ({skipped[0]}), {guard.skipped} in all"
                print(text, file=sys.stderr, flush=True)
            if new := [d for d in dead if d not in known_dead]:
                known_dead.update(new)
                shown = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
                print(f"no gradient reaches parameters of the {name}: {shown}", file=sys.stderr, flush=True)
                self.log.write({"step": guard.last_step + 1, "nimg": (guard.last_step + 1) * batch, "dead": new})
            if skipped and guard.longest >= self.options.patience:
                save()
                last = skipped[-1]
                names = samples(last.step)
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise FloatingPointError(
                    f"{guard.longest} updates of the {name} in a row were skipped; {last}, samples {shown} (all in"
                    f" {self.log.path}). The weights of before were saved; try a lower --lr or --precision fp32"
                )


def _means(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each scalar over the steps that have it and where it is finite; names without any are left out."""
    names = list(dict.fromkeys(name for terms in window for name in terms))
    columns = [torch.stack([t[n].detach().float().reshape(()) for t in window if n in t]) for n in names]
    means = [c.where(torch.isfinite(c), float("nan")).nanmean() for c in columns]
    values = torch.stack(means).tolist() if means else []
    return {n: v for n, v in zip(names, values, strict=True) if v == v}


def exit_code(program: Callable[[], int]) -> int:
    """What `program` returns; 2, with one line on stderr, on bad input; 130 on a Ctrl-C that nothing handled."""
    try:
        return program()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the last checkpoint (continue with --resume auto)", file=sys.stderr)
        return 130
