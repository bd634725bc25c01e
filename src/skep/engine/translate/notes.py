"""What shall be done at a VM's end, written down as it comes, so that it takes no memory until then."""

from __future__ import annotations

import marshal
import os
from collections.abc import Iterator
from typing import Any


class Notes:
    """Values of the kinds that :mod:`marshal` knows, in a file of this process alone, which has no name."""

    def __init__(self, directory: int) -> None:
        """``directory``: the descriptor of where the file may lie. Raises OSError."""
        name = f".{os.urandom(8).hex()}.notes"
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        os.unlink(name, dir_fd=directory)
        self._file = os.fdopen(file, "w+b", buffering=1 << 16)
        self.size = 0
        """Bytes."""
        self._count = 0

    def add(self, value: tuple[Any, ...]) -> None:
        """Raises OSError."""
        data = marshal.dumps(value)
        self._file.write(data)
        self.size += len(data)
        self._count += 1

    def __iter__(self) -> Iterator[Any]:
        """All that was added, in order; none may be added meanwhile."""
        self._file.seek(0)
        for _ in range(self._count):
            yield marshal.load(self._file)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # the disk is full, and nobody wants them any more
