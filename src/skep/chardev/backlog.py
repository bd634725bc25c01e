"""Bytes from the guest that wait for their reader: a bounded number, and none is lost in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable

LIMIT = 1 << 20
"""Bytes kept for a reader that does not read."""


class Backlog:
    """A queue that never makes who puts wait. Where it is full the oldest bytes go: who comes to a console late wants
    to see how it ended. In their place stands a line with their number.

    Any thread puts, one takes.
    """

    def __init__(self) -> None:
        self.overflows: Callable[[], None] | None = None
        """Called by the one who puts, when bytes begin to be dropped."""
        self.drained: Callable[[], None] | None = None
        """Called by the one who takes, when there was no ``room`` and half of it is there again."""
        self.dropped = 0
        """Bytes dropped, in all."""
        self._guard = threading.Lock()
        self._data = bytearray()
        self._gap = 0
        """How many were dropped before the first byte of ``_data``."""
        self._awaited = False

    def __len__(self) -> int:
        return len(self._data)

    def put(self, data: bytes) -> None:
        with self._guard:
            self._data += data
            over = len(self._data) - LIMIT
            if over <= 0:
                return
            del self._data[:over]
            begins = not self._gap
            self._gap += over
            self.dropped += over
        if begins and self.overflows is not None:
            self.overflows()

    def room(self) -> int:
        """How many bytes ``put`` takes without dropping any."""
        with self._guard:
            room = LIMIT - len(self._data)
            if room <= 0:
                self._awaited = True
            return max(room, 0)

    def take(self, most: int) -> bytes:
        """The oldest bytes, about ``most`` of them; they are the caller's now. Empty: there are none."""
        with self._guard:
            data = bytes(self._data[:most])
            del self._data[:most]
            gap, self._gap = self._gap, 0
            told = self._awaited and 2 * len(self._data) <= LIMIT
            if told:
                self._awaited = False
        if told and self.drained is not None:
            self.drained()
        return _note(gap) + data

    def give_back(self, data: bytes) -> None:
        """The end of what was taken last could not be passed on: it is the oldest again."""
        with self._guard:
            self._data[:0] = data + _note(self._gap)
            self._gap = 0

    def discard(self) -> None:
        """Nobody will ever take what is left."""
        with self._guard:
            self.dropped += len(self._data)
            self._data.clear()


def _note(gap: int) -> bytes:
    return b"\r\n[skep: %d bytes of output are lost here]\r\n" % gap if gap else b""
