"""What backends on descriptors of their own share: the bytes of both directions, and the link that carries them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from skep.chardev.backlog import Backlog
from skep.chardev.link import Link
from skep.chardev.loop import Loop
from skep.chardev.pump import Pump
from skep.contracts.chardev import BackendStatus, Receiver

_GATHER = 0.001
"""Seconds: a guest writes byte by byte, and this turns a burst into one system call."""
PATIENCE = 1.0
"""Seconds that the last output waits for a reader when the VM ends."""


class Line:
    """Most of a :class:`~skep.contracts.chardev.CharBackend` whose other end comes and goes, one at a time.

    Who inherits says where that end comes from: ``_open`` begins to wait for it, ``_attach`` brings a descriptor,
    ``_left`` hears that it is gone, ``_shut`` waits no more. All of these are called on the loop's thread.
    """

    def __init__(self, loop: Loop, where: str, say: Callable[[str], None]) -> None:
        self._loop = loop
        self._where = where
        self._pump = Pump()
        self._backlog = Backlog()
        self._backlog.overflows = lambda: say("nobody reads its output, of which only the last MiB is kept")
        self._receiver: Receiver | None = None
        self._link: Link | None = None
        self._link_fd = -1
        self._flushing = False
        self._closing = threading.Lock()
        self._closed = False

    # Any thread.

    def connect(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._pump.connect(receiver)
        self._backlog.drained = receiver.drained
        self._loop.call(self._begin)

    def write(self, data: bytes) -> None:
        self._backlog.put(data)
        if not self._flushing and self._link is not None:
            self._flushing = True
            self._loop.call_later(_GATHER, self._flush)

    def output_room(self) -> int:
        return self._backlog.room()

    def room_available(self) -> None:
        if self._pump.waiting:
            self._loop.call(self._advance)

    def status(self) -> BackendStatus:
        return BackendStatus(self._where, self._link is not None, len(self._backlog), self._backlog.dropped)

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._loop.run(self._close)

    # The loop's thread.

    def _open(self) -> None:
        raise NotImplementedError

    def _left(self, fd: int) -> None:
        raise NotImplementedError

    def _shut(self) -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        if not self._closed:
            self._open()
            if self._link is None and self._receiver is not None:
                self._receiver.attached(False)

    def _attach(self, fd: int) -> None:
        self._link_fd = fd
        self._link = Link(self._loop, fd, self._pump, self._backlog, self._detach)
        self._link.flush()
        if self._receiver is not None:
            self._receiver.attached(True)

    def _detach(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        link.detach()
        self._left(self._link_fd)
        if self._receiver is not None and not self._closed:
            self._receiver.attached(False)

    def _close(self) -> None:
        self._receiver = self._backlog.drained = None
        if self._link is not None:
            self._link.detach()
            self._link.finish(PATIENCE)
        self._backlog.discard()
        self._detach()
        self._shut()

    def _flush(self) -> None:
        self._flushing = False
        if self._link is not None:
            self._link.flush()

    def _advance(self) -> None:
        if self._closed:
            return
        if self._link is not None:
            self._link.advance()
        else:
            self._pump.run()
