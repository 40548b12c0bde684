"""Checkpoints of a run: folders that no kill leaves half, checked by checksums; the newest whole one counts.

    FOLDER/step_00000100/{manifest.json, config.json, *.safetensors}

A checkpoint is written under a temporary name, each file flushed to disk; `manifest.json`, the size and SHA-256 of each
file, comes last; then the folder is flushed and renamed. No file points at the newest one: it is the last by name whose
manifest its files agree with, so that there is no pointer that could name another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from flux2.tensor_files import file_hash, load_json, load_tensors, save_json, save_tensors, sync_folder

FORMAT = "flux2-tokenizer checkpoint 1"
MANIFEST = "manifest.json"


class Checkpoints:
    """`folder/step_00000100/` and so on, of which the last `keep` stay."""

    def __init__(self, folder: Path, *, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending; what they hold is not looked at."""
        if not self.folder.is_dir():
            return []
        names = (p.name for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(n[5:]) for n in names if n.startswith("step_") and n[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def newest(self, last: int | None = None, *, optimisers: bool = True) -> int | None:
        """Step of the newest whole checkpoint, up to `last`; None where there is none. Names damaged ones on stderr.

        optimisers: False does not read the optimisers' files, most of a checkpoint, for who takes weights alone.
        ValueError, naming each, if there are checkpoints and none is whole.
        """
        damaged: list[str] = []
        for step in reversed([s for s in self.steps() if last is None or s <= last]):
            try:
                check(self.path(step), optimisers=optimisers)
            except (ValueError, OSError) as error:
                damaged.append(str(error))
                continue
            for problem in damaged:
                print(f"damaged checkpoint: {problem}", file=sys.stderr)
            if damaged:
                print(f"the one before is taken, {self.path(step)}", file=sys.stderr, flush=True)
            return step
        if damaged:
            raise ValueError(f"{self.folder}: expected a whole checkpoint, got damaged ones: {'; '.join(damaged)}")
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps to damaged-step_N, so that those steps can be saved again."""
        for later in (s for s in self.steps() if s > step):
            aside = self.folder / f"damaged-{self.path(later).name}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(later).rename(aside)

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in (s for s in self.steps() if s > step):
            shutil.rmtree(self.path(later))

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder for the files of a checkpoint, which becomes that checkpoint at the end and is removed on an error.

        Older ones stay as they are until then; after it, those beyond `keep` go. OSError if it cannot be written.
        """
        temporary = self.temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            self.finish(step, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def temporary(self, step: int) -> Path:
        """Where this process writes a checkpoint's files."""
        return self.folder / f".tmp-{os.getpid()}-step_{step:08d}"

    def finish(self, step: int, temporary: Path) -> None:
        """Makes a folder of written files the checkpoint of a step."""
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        rows = {p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files}
        save_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "files": rows})
        for folder in {p.parent for p in files} | {temporary}:
            sync_folder(folder)
        temporary.rename(self.path(step))
        sync_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        for left_behind in self.folder.glob(".tmp-*"):  # of a process killed inside a save
            shutil.rmtree(left_behind, ignore_errors=True)

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> Path:
        """Writes tensors[name] to name.safetensors, `config` to config.json. On OSError older ones stay as they are."""
        if self.path(step).exists():  # resumed and stopped without a step in between
            return self.path(step)
        with self.writing(step) as folder:
            for name, group in tensors.items():
                save_tensors(folder / f"{name}.safetensors", group)
            save_json(folder / "config.json", config)
        return self.path(step)

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What `save` wrote: ({name: tensors}, config)."""
        return read_tensors(self.path(step)), self.config(step)

    def config(self, step: int) -> dict[str, Any]:
        """The config that `save` wrote."""
        return load_json(self.path(step) / "config.json")


def read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, by file."""
    return {p.stem: load_tensors(p)[0] for p in sorted(folder.glob("*.safetensors"))}


def check(folder: Path, *, optimisers: bool = True) -> None:
    """ValueError, naming the file, expected and got, unless a checkpoint's files are those of its manifest.

    optimisers: False looks at the size alone of files with "optimiser" in their name.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: expected a checkpoint with {MANIFEST}, got none")
    manifest = load_json(path)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{path}: expected the manifest {FORMAT!r}, got {manifest.get('format')!r}")
    if "config.json" not in manifest["files"]:
        raise ValueError(f"{path}: expected config.json among the files, got {', '.join(manifest['files']) or 'none'}")
    for name, row in manifest["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}: expected files of the checkpoint, got {name!r}")
        if not isinstance(row, dict) or not {"bytes", "sha256"} <= row.keys():
            raise ValueError(f"{path}: expected bytes and sha256 of {name}, got {row!r}")
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if (got := file.stat().st_size) != row["bytes"]:
            raise ValueError(f"{file}: expected {row['bytes']} bytes, got {got}")
        if (optimisers or "optimiser" not in name) and (digest := file_hash(file)) != row["sha256"]:
            raise ValueError(f"{file}: expected SHA-256 {str(row['sha256'])[:12]}, got {digest[:12]}")
