"""Both directions of a line on one descriptor that belongs to us alone and never blocks."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from skep.chardev.backlog import Backlog
from skep.chardev.loop import Loop
from skep.chardev.pump import Pump

_CHUNK = 1 << 16
_READ = 4096
_ENOUGH = 4096
"""Bytes waiting for the guest, beyond which nothing more is read."""
_GONE = select.POLLHUP | select.POLLRDHUP | select.POLLERR


class Link:
    """Carries the backlog out and fills the pump, until the other side is gone: then it calls ``ended``, once.

    All of it happens on the loop's thread; ``finish`` may be called by another once nothing else can be.
    """

    def __init__(self, loop: Loop, fd: int, pump: Pump, backlog: Backlog, ended: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = fd
        self._pump = pump
        self._backlog = backlog
        self._ended = ended
        self._reading = True
        self._blocked = False
        """Waits until the other side takes more."""
        self._mute = False
        """It takes nothing any more, though there may still be something to read."""
        self._watch()

    def flush(self) -> None:
        """Pass on what it takes of the backlog."""
        if self._blocked or self.gone():  # TCP would take it, for a client that closed already
            return
        while self._pass_on():
            pass
        if len(self._backlog) and not self._mute:
            self._blocked = True
            self._watch()

    def advance(self) -> None:
        """The guest may have room again."""
        self._pump.run()
        if not self._reading and self._pump.waiting < _ENOUGH:
            self._reading = True
            self._watch()

    def gone(self) -> bool:
        """Whoever was there has left, though not all that they said may have been heard yet."""
        if not self._mute:
            poll = select.poll()
            poll.register(self._fd, select.POLLRDHUP)
            self._mute = any(events & _GONE for _, events in poll.poll(0))
        return self._mute

    def detach(self) -> None:
        """Let go of the descriptor, which is the caller's to close."""
        self._loop.watch(self._fd)

    def finish(self, patience: float) -> None:
        """After ``detach``: pass on what is left, but wait only ``patience`` seconds for who does not read, and not at
        all for who left."""
        deadline = time.monotonic() + patience
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while not self._mute and (left := len(self._backlog)):
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready or ready[0][1] & _GONE:  # a terminal without anybody is ready all the time, and takes nothing
                return
            self._pass_on()
            if len(self._backlog) >= left and time.monotonic() > deadline:
                return

    def _pass_on(self) -> bool:
        """One piece of the backlog; False: there is none, or it takes no more now."""
        data = self._backlog.take(_CHUNK)
        if not data:
            return False
        try:
            sent = os.write(self._fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = 0
            self._mute = True
        if sent == len(data):
            return True
        self._backlog.give_back(data[sent:])
        return False

    def _watch(self) -> None:
        self._loop.watch(
            self._fd, self._readable if self._reading else None, self._writable if self._blocked else None
        )

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.detach()
            self._ended()
            return
        self._pump.put(data)
        self._pump.run()
        if self._pump.waiting >= _ENOUGH:
            self._reading = False
            self._watch()

    def _writable(self) -> None:
        self._blocked = False
        self._watch()
        self.flush()
