"""Pictures that cannot be read: passed over, listed in the run's bad_samples.jsonl, and too many of them end a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ALWAYS_ALLOWED = 3  # bad pictures, however small the share
MOST_IN_A_ROW = 100  # bad pictures that the place of one sample is looked for past


class Bad(NamedTuple):
    """One that could not be read."""

    sample: str
    reason: str


class BadSamples:
    """The list of a run's bad pictures, each once, in a file that a resumed run goes on with.

    most: share of the `total` pictures that may be bad, beside ALWAYS_ALLOWED.
    """

    def __init__(self, path: Path, *, total: int, most: float) -> None:
        self.path, self.total = path, total
        self.allowed = max(ALWAYS_ALLOWED, int(most * total))
        self._known = {row["sample"] for row in read_bad_samples(path)}

    def __len__(self) -> int:
        return len(self._known)

    def note(self, step: int, bad: Sequence[Bad]) -> None:
        """Lists those that are new. ValueError, naming the list, when there are more than allowed."""
        new = {b.sample: b.reason for b in bad if b.sample not in self._known}
        if new:
            with self.path.open("a") as file:
                for sample, reason in new.items():
                    file.write(json.dumps({"sample": sample, "reason": reason, "step": step}) + "\n")
            self._known.update(new)
        if len(self._known) > self.allowed:
            raise ValueError(
                f"{len(self._known)} of {self.total} pictures cannot be read, expected at most {self.allowed}"
                f" (--max-bad); they are listed in {self.path}"
            )


def read_bad_samples(path: Path) -> list[dict]:
    """Rows of the list, none where there is no file; a line that a kill cut short is passed over, and cut off."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
