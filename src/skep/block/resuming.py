"""A copy that goes on where it was killed: what is noted of it, in a file beside the new image.

The note says which files are copied, as they were then, and up to where the copy is durable: the target is flushed
before each note, and a note replaces the last one whole. So whatever ended the copy, what a note says is there. What
was written behind that is written again; a format may have lost some space by it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from skep.block.backend import read_at
from skep.block.format import Can, Image, ImageError

_SECONDS = 2.0
"""Between two notes: a flush each."""
_SAMPLES = 32
_SAMPLE = 1 << 16


class Note:
    """Of one copy. Make one with the sources open and the target not yet made."""

    def __init__(self, target: str, sources: Sequence[Image], how: Mapping[str, Any]) -> None:
        """``how`` is all else that decides what the target will be, as JSON."""
        self.path = f"{target}.resume"
        self._target = target
        self._sources = [_identities(source) for source in sources]
        self._how = dict(how)
        self._last = time.monotonic()

    def found(self) -> int | None:
        """Up to where the copy was made, in bytes; None: there is no note, or of another copy."""
        try:
            with open(self.path, encoding="utf-8") as file:
                said = json.load(file)
            done = said.pop("done")
            same = said == self._described() and isinstance(done, int) and done >= 0
            return done if same else None
        except (OSError, ValueError, KeyError, AttributeError, RecursionError):
            return None

    def settled(self, target: Image, done: int) -> None:
        """All before ``done`` has been written; now and then that is noted."""
        if time.monotonic() - self._last < _SECONDS:
            return
        target.flush()
        text = json.dumps(self._described() | {"done": done})
        new = f"{self.path}.new"
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        self._last = time.monotonic()

    def forget(self) -> None:
        """The copy is whole, or begun anew."""
        for path in (self.path, f"{self.path}.new"):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def _described(self) -> dict[str, Any]:
        status = os.stat(self._target)
        return {"sources": self._sources, "how": self._how, "target": [status.st_dev, status.st_ino]}


def _identities(image: Image | None) -> list[list[Any]]:
    """Of the files of a chain."""
    found: list[list[Any]] = []
    while image is not None:
        try:
            status = os.stat(image.path)
        except OSError:
            todo = "leave --resume out"
            raise ImageError("it is no file, so nobody could tell whether it was changed", image.path, todo) from None
        found.append([image.format, image.size, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns])
        image = image.backing
    return found


def prepare(sources: Sequence[Image], target: Image, done: int) -> None:
    """Give back what a killed copy lost in the target, and look here and there whether it is that copy. Raises
    ImageError where it is not."""
    if Can.REPAIR in target.can:
        target.repair(leaks_only=True)
    starts = [0]
    for source in sources:
        starts.append(starts[-1] + source.size)
    for i in range(_SAMPLES):
        at = done * i // _SAMPLES // _SAMPLE * _SAMPLE
        which = max(k for k, start in enumerate(starts[:-1]) if start <= at)
        n = min(_SAMPLE, starts[which + 1] - at, done - at)
        if n > 0 and read_at(sources[which], at - starts[which], n) != read_at(target, at, n):
            what = f"it is not what was left there: {n} bytes at {at} differ"
            raise ImageError(what, target.path, f"remove {target.path}.resume to begin anew")
