"""One run's life, shared by every training program: its folder, resuming, the loop over steps, log and checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flux2.checkpoint_folders import Checkpoints
from flux2.tensor_files import save_json
from train import dist
from train.bad_samples import BadSamples
from train.configs import RunOptions, differences
from train.guards import GuardedOptimiser, Spike, SpikeWatch
from train.loop import (
    Interrupt,
    Log,
    Progress,
    environment,
    latest_run_folder,
    new_run_folder,
    peak_memory_bytes,
)
from train.trackers import Trackers, require

MOST_ROLLBACKS = 5  # of one run
LOG_EVERY = 10  # steps a line of log.jsonl is the mean of: reading a loss makes a GPU wait


class Trainer(Protocol):
    """What a run needs of the thing it trains."""

    guards: dict[str, GuardedOptimiser]
    lr: float
    watched: str  # the term whose rise --rollback goes back from, positive where all is well

    def step(self, step: int, batch: Any) -> dict[str, Tensor]:
        """One update: detached scalars by name."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs, by checkpoint file."""
        ...

    def restore(self, folder: Path) -> None:
        """Takes over what `tensors` gave, from a checkpoint's folder."""
        ...

    def remarks(self, means: Mapping[str, float]) -> dict[str, str]:
        """Text for the log, from a window's means."""
        ...


class Run:
    """A new run's folder, or the one that is gone on with: `start` is its step, 0 of a new one.

    config: the plain dict that a resumed run must share with its checkpoint, but for `--allow-changed`. Nothing is
    written before `open`. ValueError if the name is taken, the config is another, no checkpoint is whole, or a tracker
    is not installed.
    """

    def __init__(self, options: RunOptions, *, preset: str, config: dict[str, Any]) -> None:
        require(options.track)
        self.options, self.config = options, config
        choose = latest_run_folder if options.resume == "auto" else new_run_folder
        self.folder: Path = dist.from_main(lambda: choose(options.out, options.name, preset))
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=options.keep)
        self.start, self.changed = 0, []
        self.offset = self.rollbacks = 0  # samples of step s are those of item s + offset
        if (newest := dist.from_main(self.checkpoints.newest)) is not None:
            self.start = newest
            plain = self.checkpoints.config(self.start)
            self.offset, self.rollbacks = plain.get("data_offset", 0), plain.get("rollbacks", 0)
            self.changed = differences(plain["train"], config)
            if refused := [line for line in self.changed if not _is_allowed(line, options.allow_changed)]:
                raise ValueError(
                    f"{self.folder} was started with another config; {'; '.join(refused)} (--allow-changed KEY lets KEY"
                    " differ)"
                )

    def open(self, text: str, device: torch.device) -> None:
        """Makes the folder, with the config's `text` and what it runs on, and opens the log. OSError if it cannot."""
        self.device = device
        dist.from_main(lambda: self._make_folder(text))
        self.trackers = Trackers(self.options.track if dist.is_main() else (), self.folder, self.config, self.start)
        self._open_log(self.start)
        if self.changed:
            self.log.write({"step": self.start, "changed": self.changed})
        resumed = f", resumed at step {self.start}" if self.start else ""
        print(f"run folder: {self.folder}{resumed}", flush=True)

    def _make_folder(self, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints.set_aside_after(self.start)
        (self.folder / "config.yaml").write_text(text)
        save_json(self.folder / "env.json", environment(self.device))

    def _open_log(self, start: int) -> None:
        path = self.folder / "log.jsonl"
        self.log = Log(path, start=start, also=self.trackers.log, writes=dist.is_main())

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> None:
        """Writes a checkpoint; config: what its reader needs, beside what the run itself does."""
        own = {"train": self.config, "step": step, "data_offset": self.offset, "rollbacks": self.rollbacks}
        if dist.size() > 1 and any(hasattr(t, "to_local") for group in tensors.values() for t in group.values()):
            from train.sharding import save_sharded

            save_sharded(self.checkpoints, step, tensors, {**config, **own})
        elif dist.is_main():
            self.checkpoints.save(step, tensors, {**config, **own})

    def bad_samples(self, pictures: int) -> BadSamples:
        """The list of its pictures that cannot be read."""
        return BadSamples(self.folder / "bad_samples.jsonl", total=pictures, most=self.options.max_bad)

    def stop(self, steps: int) -> int:
        """The step this process leaves at."""
        return min(steps, self.options.stop_after or steps)

    def loop(
        self,
        trainer: Trainer,
        batches: Callable[[int, int], Iterable[Any]],
        *,
        steps: int,
        batch: int,
        save: Callable[[int], None],
        samples: Callable[[int, Sequence[int]], list[str]],
    ) -> int | None:
        """Steps `start` to `stop(steps)`. None when all `steps` are done, else the exit code.

        batches(first, last): the batches of items first .. last - 1. batch: images a step. save(done): writes a
        checkpoint. samples(item, ranks): names of an item's samples, or of those of some processes, for the log.
        FloatingPointError when --patience updates in a row were skipped; the state before them is saved. With
        --rollback the run goes back instead, to the newest checkpoint from before, and on with the samples that follow.
        OSError, saying what is there to go on from, where the disk does not take what is written.
        """
        stop, done, self.good, self.signal = self.stop(steps), self.start, self.start, 0
        self.spikes = SpikeWatch(self.options.rollback)
        progress = Progress(start=self.start, steps=steps, batch=batch, device=self.device, shown=dist.is_main())
        try:
            with Interrupt() as interrupt:
                while True:
                    try:
                        done = self._stretch(
                            trainer, batches, range(done, stop), steps, batch, save, samples, progress, interrupt
                        )
                        break
                    except Spike as spike:
                        done = self._roll_back(trainer, spike)
        except OSError as error:
            raise OSError(f"{error}; {self._intact()}") from None
        finally:
            progress.close()
        if done == steps:
            return None
        where, how = self.checkpoints.path(done), f"--resume auto --name {self.folder.name}"
        self.trackers.close()
        print(f"saved {where} after {done} of {steps} steps; go on with {how}")
        return 128 + self.signal if self.signal else 0

    def _stretch(
        self,
        trainer: Trainer,
        batches: Callable[[int, int], Iterable[Any]],
        todo: range,
        steps: int,
        batch: int,
        save: Callable[[int], None],
        samples: Callable[[int, Sequence[int]], list[str]],
        progress: Progress,
        interrupt: Interrupt,
    ) -> int:
        """Steps of `todo` until its end or a signal; how many are done then, all saved. Spike to go back."""
        save_every = self.options.save_every or min(1000, -(-steps // 4))
        known_dead: set[str] = set()
        window: list[dict[str, Tensor]] = []
        done, agreement = todo.start, dist.Agreement()
        for step, data in zip(todo, batches(todo.start + self.offset, todo.stop + self.offset), strict=True):
            window.append(trainer.step(step, data))
            done = self.reached = step + 1
            if done % LOG_EVERY == 0 or done == todo.stop:
                means, window = _means(window), []
                self._watch(trainer, samples, batch, known_dead, save=lambda done=done: save(done))
                self.spikes.observe(means.get(trainer.watched, math.nan))
                self.good = done
                remarks = trainer.remarks({"step": step, **means})
                progress.update(done, means, ", ".join(remarks.values()))
                rate = {"lr": trainer.lr, "images_per_second": progress.images_per_second()}
                memory = {"peak_memory_bytes": peak_memory_bytes(self.device)}
                self.log.write({"step": done, "nimg": done * batch, **means, **rate, **memory, **remarks})
            self.signal = agreement.of(interrupt.signal)
            if done % save_every == 0 or done == todo.stop or self.signal:
                save(done)
            if self.signal:
                break
        agreement.last()
        return done

    def _roll_back(self, trainer: Trainer, spike: Spike) -> int:
        """Back to the newest whole checkpoint from before the spike; its step. FloatingPointError without a way."""
        step = dist.from_main(lambda: self.checkpoints.newest(self.good))
        if step is None:
            raise FloatingPointError(f"{spike}; no checkpoint from before it to go back to: save more often")
        if self.rollbacks == MOST_ROLLBACKS:
            raise FloatingPointError(
                f"{spike}, after going back {self.rollbacks} times; {self._intact()}. Try a lower --lr"
            )
        self.offset, self.rollbacks = self.offset + self.reached - step, self.rollbacks + 1
        trainer.restore(self.checkpoints.path(step))
        for guard in trainer.guards.values():
            guard.forget()
        self.spikes.forget()
        dist.barrier()  # all have read
        if dist.is_main():
            self.checkpoints.drop_after(step)
        self._open_log(step)
        self.log.write(
            {"step": step, "rolled_back_from": self.reached, "why": str(spike), "data_offset": self.offset,
             "rollbacks": self.rollbacks}
        )  # fmt: skip
        text = f"{spike}: back from step {self.reached} to {self.checkpoints.path(step)}, and on with other samples"
        if dist.is_main():
            print(f"\n{text} ({self.rollbacks} of at most {MOST_ROLLBACKS} times)", file=sys.stderr, flush=True)
        return step

    def _intact(self) -> str:
        """What there is to go on from."""
        if not (saved := self.checkpoints.steps()):
            return "no checkpoint is left"
        return f"{self.checkpoints.path(saved[-1])} is whole, go on with --resume auto --name {self.folder.name}"

    def _watch(
        self,
        trainer: Trainer,
        samples: Callable[[int, Sequence[int]], list[str]],
        batch: int,
        known_dead: set[str],
        *,
        save: Callable[[], None],
    ) -> None:
        """Logs what the guards saw since the last call; raises when they skipped too many updates in a row."""
        for name, guard in trainer.guards.items():
            skipped, dead = guard.read()
            for skip in skipped:
                broke, names = list(skip.broke), samples(skip.step + self.offset, skip.ranks)
                self.log.write(
                    {"step": skip.step + 1, "nimg": (skip.step + 1) * batch, "skipped": name, "broke": broke,
                     "samples": names, **({"ranks": list(skip.ranks)} if skip.ranks else {})}
                )  # fmt: skip
            if skipped and dist.is_main():
                text = f"{len(skipped)} updates of the {name} skipped ({skipped[0]}), {guard.skipped} in all"
                print(text, file=sys.stderr, flush=True)
            if new := [d for d in dead if d not in known_dead]:
                known_dead.update(new)
                shown = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
                if dist.is_main():
                    print(f"no gradient reaches parameters of the {name}: {shown}", file=sys.stderr, flush=True)
                self.log.write({"step": guard.last_step + 1, "nimg": (guard.last_step + 1) * batch, "dead": new})
            if skipped and guard.longest >= self.options.patience:
                last = skipped[-1]
                if self.options.rollback:
                    raise Spike(f"{guard.longest} updates of the {name} in a row were skipped ({last})")
                save()
                names = samples(last.step + self.offset, last.ranks)
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise FloatingPointError(
                    f"{guard.longest} updates of the {name} in a row were skipped; {last}, samples {shown} (all in"
                    f" {self.log.path}). The weights of before were saved; try a lower --lr or --precision fp32"
                )


def _is_allowed(line: str, keys: tuple[str, ...]) -> bool:
    """Whether a line of `differences` is of one of the keys, or within it."""
    changed = line.split(":", 1)[0]
    return any(changed == key or changed.startswith(f"{key}.") for key in keys)


def _means(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each scalar over the steps that have it and where it is finite; names without any are left out."""
    names = list(dict.fromkeys(name for terms in window for name in terms))
    columns = [torch.stack([t[n].detach().float().reshape(()) for t in window if n in t]) for n in names]
    means = [c.where(torch.isfinite(c), float("nan")).nanmean() for c in columns]
    values = torch.stack(means).tolist() if means else []
    return {n: v for n, v in zip(names, values, strict=True) if v == v}


def exit_code(program: Callable[[], int]) -> int:
    """What `program` returns; with one line on stderr 2 on bad input, 1 where another process of the run is gone, 130
    on a Ctrl-C that nothing handled."""
    try:
        return dist.leave(program())
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{dist.label()}error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not dist.is_loss_of_a_process(error):
            raise
        print(f"{dist.label()}error: another process is gone: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the last checkpoint (continue with --resume auto)", file=sys.stderr)
        return 130
