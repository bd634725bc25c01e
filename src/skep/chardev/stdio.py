"""The serial port on this process's standard input and output.

On a terminal, Ctrl-A is for us: Ctrl-A x stops the VM, Ctrl-A Ctrl-A (or Ctrl-A a) sends one Ctrl-A. From a pipe or a
file every byte goes to the guest as it is, and the end of the input is only that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from skep.chardev.loop import Loop
from skep.chardev.pump import Pump
from skep.chardev.terminal import Terminal
from skep.chardev.writer import Writer
from skep.contracts.chardev import Receiver

_CHUNK = 4096
_ENOUGH = 4096
"""Bytes waiting for the guest, beyond which nothing more is read, or on a terminal kept."""
_CTRL_A = 0x01


class Escape:
    """Finds Ctrl-A commands in what is typed, also where they are split between two reads."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._armed = False

    def feed(self, data: bytes) -> bytes:
        """What of ``data`` is meant for the guest."""
        if not self._armed and _CTRL_A not in data:
            return data
        out = bytearray()
        for byte in data:
            if self._armed:
                self._armed = False
                if byte in b"xX":
                    self._stop()
                elif byte in b"aA\x01":
                    out.append(_CTRL_A)
            elif byte == _CTRL_A:
                self._armed = True
            else:
                out.append(byte)
        return bytes(out)


class Stdio:
    """A :class:`~skep.contracts.chardev.CharBackend` on two descriptors, by default 0 and 1."""

    def __init__(self, loop: Loop, stop: Callable[[], None], source: int = 0, sink: int = 1) -> None:
        self._loop = loop
        self._source = source
        self._pump = Pump()
        self._escape = Escape(stop)
        self._terminal = Terminal(source) if os.isatty(source) else None
        self._watched = False
        self._ended = False
        self._always_ready = False
        self._closed = False
        self._writer = Writer(sink, "console-output")

    def connect(self, receiver: Receiver) -> None:
        self._pump.connect(receiver)
        self._writer.drained = receiver.drained
        if self._terminal is not None:
            if not self._terminal.ours():
                self._ended = True
                return
            self._terminal.raw()
        self._loop.call(self._start)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def output_room(self) -> int:
        return self._writer.room()

    def room_available(self) -> None:
        if self._pump.waiting or self._always_ready:
            self._loop.call(self._advance)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ended = True
        if self._watched:
            self._watched = False
            self._loop.remove(self._source)
        self._writer.close()
        if self._terminal is not None:
            self._terminal.restore()
        if self._writer.dropped:
            print(
                f"skep: {self._writer.dropped} bytes of console output were dropped, nobody read them", file=sys.stderr
            )

    # On the loop's thread

    def _start(self) -> None:
        if self._ended:
            return
        try:
            self._loop.add(self._source, self._readable)
            self._watched = True
        except PermissionError:
            self._always_ready = True
            self._advance()
        except OSError:
            self._ended = True  # No standard input at all.

    def _advance(self) -> None:
        """The guest may have room again: hand over what waits, then read on."""
        if self._closed:
            return
        self._pump.run()
        if self._ended:
            return
        if self._always_ready:
            while not self._ended and not self._pump.waiting:
                self._read()
        elif not self._watched and self._pump.waiting < _ENOUGH:
            self._loop.add(self._source, self._readable)
            self._watched = True

    def _readable(self) -> None:
        self._read()
        # A terminal is read in any case, or Ctrl-A x would wait for a guest that hangs.
        if self._watched and self._terminal is None and self._pump.waiting >= _ENOUGH:
            self._unwatch()

    def _read(self) -> None:
        try:
            data = os.read(self._source, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended = True
            self._always_ready = False
            self._unwatch()
            return
        if self._terminal is not None:
            data = self._escape.feed(data)[: max(0, _ENOUGH - self._pump.waiting)]
        self._pump.put(data)
        self._pump.run()

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove(self._source)
