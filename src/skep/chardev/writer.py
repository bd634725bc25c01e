"""Bytes from the guest to a descriptor that may block, without ever making a vCPU wait for it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

from skep.chardev.backlog import LIMIT, Backlog

_GATHER = 0.001
"""Seconds: a guest writes byte by byte, and this turns a burst into one system call."""
_CHUNK = 1 << 16
_RETRY = 0.5
"""Seconds until a full file system is tried again."""
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
"""Errors that may be over some day. After any other the reader is gone, and will not come back."""


class Writer:
    """Writes on a thread of its own: the descriptor may block, and cannot be made not to without changing it for
    every process that shares it, the user's shell among them.

    ``write`` is called by one thread at a time.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.backlog = Backlog()
        self.failed: Callable[[OSError], None] | None = None
        """Hears of the first error of each kind."""
        self._told: set[int | None] = set()
        self._aside = Backlog()
        self._held = False
        self._unwritten = 0
        self._gone = 0
        self._ready = threading.Event()
        self._closing = False
        self._broken = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Bytes that nobody took."""
        return self.backlog.dropped + self._gone

    @property
    def waiting(self) -> int:
        """Bytes that nobody took yet."""
        return len(self.backlog) + self._unwritten

    def write(self, data: bytes) -> None:
        if self._broken:
            self._gone += len(data)
            return
        self.backlog.put(data)
        if not self._ready.is_set():
            self._ready.set()

    def room(self) -> int:
        """How many bytes ``write`` would take now. Of a broken descriptor any number: they are dropped and counted."""
        return LIMIT if self._broken else self.backlog.room()

    def aside(self, data: bytes) -> None:
        """Write what is not the guest's; it overtakes what waits. From any thread."""
        self._aside.put(data)
        self._ready.set()

    def hold(self, held: bool) -> None:
        """Keep the guest's bytes back, or let them go again."""
        self._held = held
        self._ready.set()

    def close(self, patience: float = 2.0) -> bool:
        """Write what is left, but wait no longer than ``patience`` seconds for a reader that does not read. False: it
        still does not, and the thread still waits for it."""
        self._held = False
        self._closing = True
        self._ready.set()
        self._thread.join(patience)
        if not self._thread.is_alive():
            return True
        self._gone += self._unwritten
        self.backlog.discard()
        return False

    def _main(self) -> None:
        while True:
            self._ready.wait()
            if not self._closing:
                time.sleep(_GATHER)
            self._ready.clear()
            closing = self._closing  # after clearing: who closes later sets it once more
            while self._pass_on():
                pass
            if closing:
                return

    def _pass_on(self) -> bool:
        """One piece of what there is; False: there is nothing."""
        if data := self._aside.take(_CHUNK):
            self._write_all(data)
        elif data := b"" if self._held else self.backlog.take(_CHUNK):
            self._unwritten = len(data)
            self._gone += self._write_all(data)
            self._unwritten = 0
        return bool(data)

    def _write_all(self, data: bytes) -> int:
        """How many of the bytes nobody took."""
        while data and not self._broken:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                # Somebody else made the shared descriptor non-blocking.
                time.sleep(_GATHER)
            except OSError as error:
                self._note(error)
        return len(data)

    def _note(self, error: OSError) -> None:
        if error.errno not in self._told:
            self._told.add(error.errno)
            if self.failed is not None:
                self.failed(error)
        if error.errno in _PASSING and not self._closing:
            time.sleep(_RETRY)
        else:
            self._broken = True
            if self.backlog.drained is not None:
                self.backlog.drained()
