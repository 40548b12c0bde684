"""Who works on what in a folder that processes of one machine or of many share: one file a claim.

`NAME.json` names its holder. It is made with O_EXCL, so that one of any number of processes gets it, and touched by a
thread while the holder lives. A claim is stale once it was not touched for `stale` seconds by the file server's own
clock, or at once if its holder was a process of this machine that is gone. Taking it over replaces the file in one
rename, and is the right of whoever makes `.NAME.TOKEN.taken` first: TOKEN is the stale claim's own, so that a claim
that is already somebody else's cannot be taken by mistake. A holder that was only slow finds another's token and is
told by `lost`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def machine() -> str:
    """This machine's name and, on Linux, its boot and process-id namespace: where a process id means something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks; "" where that is not known; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]  # a zombie works on nothing
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@dataclass(frozen=True)
class _Holder:
    """A claim as it was read: who holds it, its token, and when it was last touched."""

    fields: dict[str, Any]
    token: str
    touched: float


class Claims:
    """The claims of a folder. stale: seconds without a touch after which a claim may be taken over."""

    def __init__(self, folder: Path, *, stale: float) -> None:
        self.folder, self.stale = folder, stale
        folder.mkdir(parents=True, exist_ok=True)
        self._machine = machine()

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def acquire(self, name: str) -> Claim | None:
        """The claim, now this process's, or None while another holds it. OSError if the folder cannot be written."""
        token = secrets.token_hex(8)
        fields = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "token": token}
        fields |= {"machine": self._machine, "started": _started(os.getpid())}
        if not _create(self.path(name), json.dumps(fields)):
            there = self._read(name)
            if there is None or not self._is_stale(there) or not self._take_over(name, there, json.dumps(fields)):
                return None
        return Claim(self, name, token)

    def _read(self, name: str) -> _Holder | None:
        try:
            with self.path(name).open() as file:
                status = os.fstat(file.fileno())
                text = file.read()
        except FileNotFoundError:
            return None
        try:
            fields = json.loads(text)
            return _Holder(fields, str(fields["token"]), status.st_mtime)
        except (ValueError, KeyError, TypeError):  # its maker has not written it yet, or died before it did
            return _Holder({}, f"unwritten-{status.st_ino}", status.st_mtime)

    def _is_stale(self, there: _Holder) -> bool:
        if there.fields.get("machine") == self._machine:
            started = _started(there.fields["pid"])
            if started is None or (started and started != there.fields["started"]):
                return True
        return self._now() - there.touched > self.stale

    def _now(self) -> float:
        """The time by the clock that touches are measured with: on a file server, its own."""
        clock = self.folder / f".clock-{os.getpid()}-{threading.get_ident()}"
        clock.touch()
        try:
            os.utime(clock)
            return clock.stat().st_mtime
        finally:
            clock.unlink(missing_ok=True)

    def _tomb(self, name: str, token: str) -> Path:
        return self.folder / f".{name}.{token}.taken"

    def _take_over(self, name: str, stale: _Holder, text: str) -> bool:
        tomb = self._tomb(name, stale.token)
        if not _create(tomb, ""):
            try:
                if self._now() - tomb.stat().st_mtime > self.stale:  # of a process that died while it took over
                    tomb.unlink()
            except FileNotFoundError:
                pass
            return False
        try:
            there = self._read(name)
            if there is None or there.token != stale.token:
                return False
            temporary = self.folder / f".{name}.{secrets.token_hex(8)}.tmp"
            temporary.write_text(text)
            temporary.replace(self.path(name))
        finally:
            tomb.unlink(missing_ok=True)
        there = self._read(name)
        return there is not None and there.token == json.loads(text)["token"]

    def _release(self, name: str, token: str) -> None:
        tomb = self._tomb(name, token)
        if not _create(tomb, ""):  # it is being taken over
            return
        try:
            there = self._read(name)
            if there is not None and there.token == token:
                self.path(name).unlink(missing_ok=True)
        finally:
            tomb.unlink(missing_ok=True)


class Claim:
    """A claim of this process, touched by a thread until `release`; a context manager that releases it."""

    def __init__(self, claims: Claims, name: str, token: str) -> None:
        self.claims, self.name, self.token = claims, name, token
        self._lost, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether somebody else took it over."""
        return self._lost.is_set()

    def _beat(self) -> None:
        while not self._over.wait(min(10.0, self.claims.stale / 8)):
            try:
                there = self.claims._read(self.name)
                if there is None or there.token != self.token:
                    self._lost.set()
                    return
                os.utime(self.claims.path(self.name))
            except OSError:  # the file server may come back before the claim is stale
                continue

    def release(self) -> None:
        """Gives it up; leaves it alone where it is somebody else's by now."""
        self._over.set()
        self._thread.join()
        if not self.lost:
            self.claims._release(self.name, self.token)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _create(path: Path, text: str) -> bool:
    """Makes a file with `text`; False if it is there. O_EXCL: of all processes one makes it."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    return True
