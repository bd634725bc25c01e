"""The end of what a guest said on its consoles, kept for whoever asks why it says no more."""

from __future__ import annotations

import threading

from skep.contracts.chardev import CharBackend

KEPT = 64 << 10
"""Bytes, of each port."""


class Transcript:
    """Taps into any number of ports. Ports write, from any thread; one thread waits for news."""

    def __init__(self) -> None:
        self.news = threading.Event()
        self._taps: list[_Tap] = []

    def tap(self, backend: CharBackend) -> CharBackend:
        """``backend``, with what is written to it kept here too."""
        tap = _Tap(self, backend)
        self._taps.append(tap)
        return tap

    def text(self) -> str:
        """The end of every port's output, one port after the other."""
        return "\n".join(bytes(tap.kept[-KEPT:]).decode("utf-8", "replace") for tap in self._taps if tap.kept)

    def listen(self) -> None:
        """Clear ``news``, which the next output sets."""
        self.news.clear()
        for tap in self._taps:
            tap.quiet = True

    def forget(self) -> None:
        """The guest begins anew."""
        for tap in self._taps:
            tap.kept = bytearray()


class _Tap:
    """A :class:`~skep.contracts.chardev.CharBackend` around another."""

    def __init__(self, transcript: Transcript, backend: CharBackend) -> None:
        self._news = transcript.news
        self._backend = backend
        self.connect = backend.connect
        self.output_room = backend.output_room
        self.room_available = backend.room_available
        self.status = backend.status
        self.close = backend.close
        self.kept = bytearray()
        self.quiet = True
        """Nothing came since somebody listened."""

    def write(self, data: bytes) -> None:
        kept = self.kept
        kept += data
        if len(kept) > 2 * KEPT:
            del kept[:-KEPT]
        if self.quiet:
            self.quiet = False
            self._news.set()
        self._backend.write(data)
