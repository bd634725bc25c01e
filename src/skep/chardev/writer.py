"""Bytes from the guest to a file descriptor, without ever making a vCPU wait for whoever reads there."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

BACKLOG = 1 << 20
"""Bytes kept for a reader that does not read; what comes beyond is dropped, as on a real line."""
_GATHER = 0.001
"""Seconds: a guest writes byte by byte, and this turns a burst into one system call."""


class Writer:
    """Writes on a thread of its own: the descriptor may block, and cannot be made not to without changing it for
    every process that shares it, the user's shell among them.

    ``write`` is called by one thread at a time.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.drained: Callable[[], None] | None = None
        """Called on the writer's thread when there is room again, after ``room`` said 0."""
        self._full = False
        self._chunks: deque[bytes] = deque()
        self._put = 0
        self._done = 0
        self.dropped = 0
        """Bytes that nobody took."""
        self._ready = threading.Event()
        self._closing = False
        self._broken = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        # _put and _done each have one writer, so their difference needs no lock; it may only look too large.
        if self._broken or self._put - self._done + len(data) > BACKLOG:
            self.dropped += len(data)
            return
        self._put += len(data)
        self._chunks.append(data)
        if not self._ready.is_set():
            self._ready.set()

    def room(self) -> int:
        """How many bytes ``write`` would take now. Of a broken descriptor any number: they are dropped and counted."""
        self._full = True  # before looking: whoever makes room after the look sees it
        room = BACKLOG if self._broken else max(BACKLOG - self._put + self._done, 0)
        self._full = not room
        return room

    def close(self, patience: float = 2.0) -> None:
        """Write what is left, but wait no longer than ``patience`` seconds for a reader that does not read."""
        self._closing = True
        self._ready.set()
        self._thread.join(patience)

    def _main(self) -> None:
        while True:
            self._ready.wait()
            if not self._closing:
                time.sleep(_GATHER)
            closing = self._closing
            self._ready.clear()
            data = b"".join(self._chunks.popleft() for _ in range(len(self._chunks)))
            self._write_all(data)
            self._done += len(data)
            if self._full and self.drained is not None:
                self._full = False
                self.drained()
            if closing:
                return

    def _write_all(self, data: bytes) -> None:
        while data and not self._broken:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                # Somebody else made the shared descriptor non-blocking.
                time.sleep(_GATHER)
            except OSError:
                # The reader is gone, and will not come back.
                self._broken = True
