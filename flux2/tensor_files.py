"""Files of tensors and of JSON: written whole or not at all, never executed, refused in one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LISTED = 8  # names an error spells out
MOST_JSON_BYTES = 64 * 2**20

T = TypeVar("T")


@contextmanager
def written_whole(path: Path):
    """Yields a temporary path in the same folder; flushed and renamed to `path` on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names to disk, so that a rename in it outlives a power cut. Nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, atomically. OSError if the place cannot be written."""
    path = Path(path)
    with written_whole(path) as temporary:
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, str(temporary), metadata)
        except SafetensorError as error:  # its own class hides what the system said
            raise OSError(f"cannot write {path}: {error}") from None


def save_json(path: str | Path, value: Any) -> None:
    """Writes JSON, atomically. OSError if the place cannot be written."""
    path = Path(path)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a .safetensors file or of a torch file that holds nothing but tensors.

    FileNotFoundError if there is none; ValueError, in one sentence, if it is cut short or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the weights it points to; fetch them with 'git lfs pull'")
    if head[8:9] != b"{":  # a safetensors header follows its length; that length may look like another file's mark
        if head.startswith((b"PK\x03\x04", b"\x80")):
            return _load_torch(path), {}
        raise ValueError(f"{path}: expected a .safetensors file, got {_looks_like(head)}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: a .safetensors file that is cut short or damaged ({error})") from None


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    text = head.decode("utf-8", errors="replace")
    return f"text that begins {text[:24]!r}" if text.isprintable() or "\n" in text else "a file of another kind"


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged or hostile file makes it raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a torch file of tensors alone, which is all that is read ({reason})") from None
    for key in ("ema", "state_dict", "model"):  # where trainers put it beside their own state
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        got = type(content).__name__
        raise ValueError(f"{path}: expected a dict of tensors, or one under 'ema', 'state_dict' or 'model', got {got}")
    return content


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError if it holds something else."""
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {MOST_JSON_BYTES} bytes of JSON, got {size}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or an empty string: the end of an error on an unknown name."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def dataclass_from_dict(kind: type[T], fields: Mapping[str, Any], what: str) -> T:
    """A config dataclass from its fields, lists as tuples. ValueError, begun with `what`, names unknown fields."""
    known = {f.name for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in fields:
        if name not in known:
            raise ValueError(f"{what}: unknown field {name!r}{nearest(name, known)}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def mismatch(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """One sentence on missing and unexpected names and wrong shapes; empty if `given` is exactly as `expected`."""
    problems = []
    if missing := expected.keys() - given.keys():
        problems.append(f"missing keys: {_listed(missing)}")
    if unexpected := given.keys() - expected.keys():
        problems.append(f"unexpected keys: {_listed(unexpected)}")
    shapes = [
        f"{k} {list(expected[k].shape)}, got {list(given[k].shape)}"
        for k in sorted(expected.keys() & given.keys())
        if expected[k].shape != given[k].shape
    ]
    if shapes:
        problems.append(f"wrong shapes: expected {'; '.join(shapes[:LISTED])}")
    return "; ".join(problems)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
