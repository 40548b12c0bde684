"""Where pictures come from: files, tar shards, a zip, a `datasets` table. Each gives bytes by index, and opens no file
longer than a read, so that a source can be handed to worker processes.

A picture's name is a path: of a member of an archive ARCHIVE/MEMBER. Its class is the first folder below the root, in
an archive the first folder of the member; the file KEY.cls or the field "label" or "cls" of KEY.json goes before it.
Nothing of an archive is ever written to disk; a member that names a place outside it, or a link, is refused all the
same.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from flux2.images import IMAGE_SUFFIXES, find_images

LARGEST_BYTES = 2**29  # of a picture's file in an archive or table
BAD_FILE = (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EISDIR, errno.ENOTDIR)  # no fault of the disk's
HUB = re.compile(r"hf:(?://)?([\w.-]+/[\w.-]+)$")
ARCHIVES = (".tar", ".zip")
DAMAGE = (  # what the zip reader raises on damaged files
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OverflowError, ValueError
)  # fmt: skip


class Source(Protocol):
    """Pictures by index."""

    paths: list[Path]
    """What each is called."""
    labels: list[str]
    """The class of each, "" for none."""

    def open(self, index: int) -> Path | BinaryIO:
        """A picture's file, or its bytes. ValueError if it is no good, OSError if the disk is not."""
        ...

    def stamp(self, index: int) -> str:
        """Changes when the picture does, as far as can be told without reading it."""
        ...


class Files:
    """Files of a folder."""

    def __init__(self, paths: Sequence[Path], root: str | Path = "") -> None:
        self.paths = list(paths)
        parts = [p.relative_to(root).parts if root and p.is_relative_to(root) else p.parts[-2:] for p in self.paths]
        self.labels = [p[0] if len(p) > 1 else "" for p in parts]
        self._root = root

    def open(self, index: int) -> Path:
        path = self.paths[index]
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # a pipe must not be waited for
            if not path.is_file():
                raise ValueError(f"{path}: no plain file")
        except OSError as error:
            if error.errno in BAD_FILE:
                raise ValueError(f"{path}: cannot be opened ({error.strerror})") from None
            raise
        return path

    def stamp(self, index: int) -> str:
        path = self.paths[index]
        name = path.relative_to(self._root).as_posix() if self._root and path.is_relative_to(self._root) else path.name
        try:
            status = path.stat()
        except OSError as error:
            if error.errno in BAD_FILE:
                return f"{name} missing"
            raise
        changed = status.st_mtime_ns if self._root and path.is_relative_to(self._root) else 0  # a wheel's: its version
        return f"{name} {status.st_size} {changed}"


@dataclass(frozen=True)
class Member:
    """A picture in an archive: bytes offset .. offset + size of it."""

    archive: int
    name: str
    offset: int
    size: int


class TarShards:
    """Members of tar files, in the order of the archives, grouped by key as WebDataset does. Headers are read once."""

    def __init__(self, archives: Sequence[Path]) -> None:
        self.archives = list(archives)
        self.members: list[Member] = []
        self.labels: list[str] = []
        for number, path in enumerate(self.archives):
            self._index(number, path)
        if not self.members:
            raise ValueError(f"{self.archives[0]}: expected {', '.join(IMAGE_SUFFIXES)} members, got none")
        self.paths = [self.archives[m.archive] / m.name for m in self.members]
        self._status = [p.stat() for p in self.archives]

    def _index(self, number: int, path: Path) -> None:
        classes: dict[str, str] = {}
        first = len(self.members)
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    check_member(path, member.name)
                    if not (member.isfile() or member.isdir()):
                        raise ValueError(f"{path}: member {member.name!r} is a link or device, expected files")
                    key, suffix = _key(member.name)
                    if member.isdir() or PurePosixPath(member.name).name.startswith("."):
                        continue
                    if suffix in IMAGE_SUFFIXES:
                        if member.issparse():
                            raise ValueError(f"{path}: member {member.name!r} is a sparse file, expected whole ones")
                        self.members.append(Member(number, member.name, member.offset_data, member.size))
                    elif suffix in (".cls", ".json") and member.size < 2**20:
                        text = _pread(path, member.offset_data, member.size)
                        if (label := _label(suffix, text)) is not None:
                            classes[key] = label
        except (tarfile.TarError, EOFError, OverflowError) as error:
            raise ValueError(f"{path}: damaged tar file ({error})") from None
        for member in self.members[first:]:
            self.labels.append(classes.get(_key(member.name)[0], _folder_of(member.name)))

    def open(self, index: int) -> BinaryIO:
        member = self.members[index]
        if member.size > LARGEST_BYTES:
            raise ValueError(f"{self.paths[index]}: {member.size:,} bytes, expected at most {LARGEST_BYTES:,}")
        return io.BytesIO(_pread(self.archives[member.archive], member.offset, member.size))

    def stamp(self, index: int) -> str:
        member = self.members[index]
        archive, status = self.archives[member.archive], self._status[member.archive]
        return f"{archive.name}/{member.name} {member.offset} {member.size} {status.st_mtime_ns}"


class ZipArchive:
    """Members of a zip file."""

    def __init__(self, path: Path) -> None:
        self.archive = path
        self._zip, self._pid = self._open(), os.getpid()
        infos = [i for i in self._zip.infolist() if not i.is_dir()]
        size = path.stat().st_size
        for info in infos:
            check_member(path, info.filename)
            if not 0 <= info.header_offset < size:
                raise ValueError(f"{path}: damaged zip file (member {info.filename!r} lies outside of it)")
        names = {i.filename: i for i in infos}
        shown = [i for i in infos if _key(i.filename)[1] in IMAGE_SUFFIXES]
        shown = [i for i in shown if not any(p.startswith((".", "__MACOSX")) for p in i.filename.split("/"))]
        if not shown:
            raise ValueError(f"{path}: expected {', '.join(IMAGE_SUFFIXES)} members, got none")
        if locked := [i.filename for i in shown if i.flag_bits & 1]:
            raise ValueError(f"{path}: member {locked[0]!r} is encrypted, expected members that are not")
        packed = [i for i in shown if i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
        if packed:
            raise ValueError(
                f"{path}: member {packed[0].filename!r} is packed by method {packed[0].compress_type}, expected stored"
                " or deflated"
            )
        self.infos = shown
        self.paths = [path / i.filename for i in shown]
        self.labels = []
        for info in shown:
            key, label = _key(info.filename)[0], None
            for suffix in (".cls", ".json"):
                if (beside := names.get(key + suffix)) is not None and beside.file_size < 2**20:
                    try:
                        label = _label(suffix, self._zip.read(beside))
                    except DAMAGE as error:
                        raise ValueError(f"{path}: member {beside.filename!r} is damaged ({error})") from None
            self.labels.append(_folder_of(info.filename) if label is None else label)

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.archive)
        except DAMAGE as error:
            raise ValueError(f"{self.archive}: damaged zip file ({error})") from None

    def __getstate__(self) -> dict:  # open files do not travel
        return {k: v for k, v in self.__dict__.items() if k not in ("_zip", "_pid")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._pid = 0

    def open(self, index: int) -> BinaryIO:
        if self._pid != os.getpid():  # forked: the parent's file position is not ours
            self._zip, self._pid = self._open(), os.getpid()
        info = self.infos[index]
        if info.file_size > LARGEST_BYTES:
            raise ValueError(f"{self.paths[index]}: {info.file_size:,} bytes, expected at most {LARGEST_BYTES:,}")
        try:
            with self._zip.open(info) as member:  # which ends at the size the index says, and checks the CRC
                return io.BytesIO(member.read())
        except DAMAGE as error:
            raise ValueError(f"{self.paths[index]}: damaged in the archive ({error})") from None

    def stamp(self, index: int) -> str:
        info = self.infos[index]
        return f"{info.filename} {info.file_size} {info.CRC}"


class Table:
    """Rows of a `datasets` table with a column of pictures, the first of type Image; memory-mapped.

    Classes are those of its first ClassLabel column, else of a column "label".
    """

    def __init__(self, path: str) -> None:
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{path}: needs the package datasets: pip install 'flux2-tokenizer[data]'") from None

        table = _load_table(datasets, path)
        images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
        # parquet of other writers: a struct of bytes and path, which `datasets` does not know to be pictures
        plain = [name for name, kind in table.features.items() if isinstance(kind, dict) and "bytes" in kind]
        column = next(iter(images + plain), None)
        if column is None:
            raise ValueError(f"{path}: expected a column of pictures, got {', '.join(table.column_names)}")
        classes = {n: k for n, k in table.features.items() if isinstance(k, datasets.ClassLabel)}
        self._column = column
        self.labels = [""] * len(table)
        if classes:
            name, kind = next(iter(classes.items()))
            self.labels = [kind.names[i] if i is not None and i >= 0 else "" for i in table[name]]
        elif "label" in table.column_names:
            self.labels = [str(value) for value in table["label"]]
        if column in images:
            table = table.cast_column(column, datasets.Image(decode=False))
        self._table = table.select_columns([column])
        self._hash = getattr(table, "_fingerprint", "")
        stem = Path(path.removeprefix("hf:").strip("/"))
        self.paths = [stem / f"row-{i}" for i in range(len(table))]

    def open(self, index: int) -> Path | BinaryIO:
        value = self._table[index][self._column]
        if value is None or not (value.get("bytes") or value.get("path")):
            raise ValueError(f"{self.paths[index]}: no picture in this row")
        if value.get("bytes"):
            return io.BytesIO(value["bytes"])
        return Files([Path(value["path"])]).open(0)

    def stamp(self, index: int) -> str:
        return f"{self._hash} {index}"


def _load_table(datasets, path: str):
    """The table at a path, or on the hub."""
    if name := HUB.match(path):
        try:
            return datasets.load_dataset(name[1], split="train")
        except Exception as error:  # the hub's client raises one of many where it cannot be reached
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(f"{path}: cannot be had from the Hugging Face hub nor its cache ({reason})") from None
    where = Path(path)
    try:
        if where.is_dir() and (where / "state.json").is_file():  # save_to_disk's
            return datasets.load_from_disk(path)
        files = [path] if where.is_file() else sorted(str(p) for p in where.rglob("*.parquet"))
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:  # arrow's and pandas' own kinds
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged table ({reason})") from None


def open_source(data: str) -> Source:
    """The pictures at `data`: a folder of pictures, tar files or parquet files, one such file (by its content, not its
    name), a brace pattern of tar files (shards/{000..010}.tar), or hf:USER/NAME.

    FileNotFoundError if there is no such path; ValueError, with expected and got, if it holds no pictures.
    """
    if data.startswith("hf:"):
        if not HUB.match(data):
            raise ValueError(f"data: expected hf:USER/NAME, got {data!r}")
        return Table(data)
    if "{" in data and not Path(data).exists():
        return TarShards(_existing(expand_braces(data)))
    path = Path(data)
    if path.is_dir():
        if (path / "state.json").is_file() or _below(path, ".parquet"):
            return Table(data)
        if tars := _below(path, ".tar"):
            return TarShards(tars)
        return Files(find_images(path), path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of pictures")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return ZipArchive(path)
    if head[257:262] == b"ustar" or (path.suffix == ".tar" and tarfile.is_tarfile(path)):
        return TarShards([path])
    if head.startswith(b"PAR1"):
        return Table(data)
    if path.suffix.lower() in (*ARCHIVES, ".parquet", ".tgz", ".gz"):
        raise ValueError(f"{path}: expected a plain tar, zip or parquet file, got one that begins with {head[:8]!r}")
    return Files(find_images(path), path.parent)


def expand_braces(pattern: str) -> list[str]:
    """shards/{000..010}.tar -> its eleven names, and {a,b} likewise; several of them multiply."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        low, high = int(span[1]), int(span[2])
        if not 0 <= high - low < 10**6:
            raise ValueError(f"{pattern}: expected {{LOW..HIGH}} with LOW <= HIGH, got {found[0]}")
        parts = [f"{i:0{len(span[1])}d}" for i in range(low, high + 1)]
    else:
        parts = found[1].split(",")
    return [name for p in parts for name in expand_braces(pattern[: found.start()] + p + pattern[found.end() :])]


def _existing(names: list[str]) -> list[Path]:
    if missing := [n for n in names if not Path(n).is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file, {len(missing)} of the {len(names)} that --data names")
    return [Path(n) for n in names]


def _below(folder: Path, suffix: str) -> list[Path]:
    """Files right in a folder, hidden ones passed over."""
    return sorted(p for p in folder.iterdir() if p.suffix == suffix and not p.name.startswith("."))


def check_member(archive: Path, name: str) -> None:
    """ValueError if the name points out of the archive: a sign of an attack, though nothing is extracted."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise ValueError(f"{archive}: member {name!r} points out of the archive; expected paths below it")


def _key(name: str) -> tuple[str, str]:
    """(all before the first full stop of the file's name, the last suffix), as WebDataset groups them."""
    folder, _, file = name.rpartition("/")
    stem = file.split(".", 1)[0]
    return (f"{folder}/{stem}" if folder else stem), PurePosixPath(file).suffix.lower()


def _folder_of(name: str) -> str:
    parts = [p for p in PurePosixPath(name).parts if p != "."]
    return parts[0] if len(parts) > 1 else ""


def _label(suffix: str, content: bytes) -> str | None:
    """The class a file beside a picture gives it, if any."""
    text = content.decode("utf-8", "replace").strip()
    if suffix == ".cls":
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    return None if found is None else str(found)


def _pread(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file; ValueError if it ends before."""
    handle = os.open(path, os.O_RDONLY)
    try:
        parts, have = [], 0
        while have < size and (part := os.pread(handle, size - have, offset + have)):
            parts.append(part)
            have += len(part)
    finally:
        os.close(handle)
    if have < size:
        raise ValueError(f"{path}: ends within a member, at {offset + have:,} of {offset + size:,} bytes")
    return b"".join(parts)
