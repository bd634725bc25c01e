"""The serial port on this process's standard input and output.

On a terminal, Ctrl-A is for us: Ctrl-A x stops the VM, Ctrl-A c goes to the monitor and back, Ctrl-A Ctrl-A (or
Ctrl-A a) sends one Ctrl-A. From a pipe or a file every byte goes to the guest as it is, and the end of the input is
only that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

from skep.chardev.loop import Loop
from skep.chardev.pump import Pump
from skep.chardev.terminal import Terminal
from skep.chardev.writer import Writer
from skep.contracts.chardev import BackendStatus, Receiver

_CHUNK = 4096
_ENOUGH = 4096
"""Bytes waiting for the guest, beyond which nothing more is read, or on a terminal kept."""
_CTRL_A = 0x01


class Escape:
    """Finds Ctrl-A commands in what is typed, also where they are split between two reads."""

    def __init__(self, typed: Callable[[bytes], None], commands: Mapping[str, Callable[[], None]]) -> None:
        """``commands`` by their letter, in lower case. All else goes to ``typed``, in its order among them."""
        self._typed = typed
        self._commands = commands
        self._armed = False

    def feed(self, data: bytes) -> None:
        if not self._armed and _CTRL_A not in data:
            self._typed(data)
            return
        out = bytearray()
        for byte in data:
            if not self._armed:
                if byte == _CTRL_A:
                    self._armed = True
                else:
                    out.append(byte)
                continue
            self._armed = False
            if byte in b"aA\x01":
                out.append(_CTRL_A)
            elif (command := self._commands.get(chr(byte).lower())) is not None:
                self._typed(bytes(out))
                out.clear()
                command()
        self._typed(bytes(out))


class Overlay(Protocol):
    """What Ctrl-A c brings to the terminal in the guest's place: the VM's monitor. All on the loop's thread."""

    def enter(self) -> None: ...

    def typed(self, data: bytes) -> None: ...

    def leave(self) -> None: ...


class Stdio:
    """A :class:`~skep.contracts.chardev.CharBackend` on two descriptors, by default 0 and 1."""

    def __init__(self, loop: Loop, stop: Callable[[], None], source: int = 0, sink: int = 1) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._pump = Pump()
        self._receiver: Receiver | None = None
        self._escape = Escape(self._typed, {"x": stop, "c": self._toggle})
        self._terminal = Terminal(source) if os.isatty(source) else None
        self.make_overlay: Callable[[], Overlay] | None = None
        """Where it can be made, Ctrl-A c goes to it and back."""
        self._overlay: Overlay | None = None
        self._overlaid = False
        self._watched = False
        self._ended = False
        self._always_ready = False
        self._closed = False
        self._writer = Writer(sink, "console-output")

    def connect(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._pump.connect(receiver)
        self._writer.backlog.drained = receiver.drained
        if self._terminal is not None:
            if not self._terminal.ours():
                self._ended = True
                return
            self._terminal.raw()
            self.look_at_size()
        self._loop.call(self._start)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def output_room(self) -> int:
        return self._writer.room()

    def room_available(self) -> None:
        if self._pump.waiting or self._always_ready:
            self._loop.call(self._advance)

    def status(self) -> BackendStatus:
        return BackendStatus("stdio", not self._ended, self._writer.waiting, self._writer.dropped)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ended = True
        if self._watched:
            self._watched = False
            self._loop.watch(self._source)
        self._writer.backlog.drained = None
        self._writer.close()
        if self._terminal is not None:
            self._terminal.restore()

    def look_at_size(self) -> None:
        """The terminal may have another size now: tell the guest. From any thread."""
        self._loop.call(self._tell_size)

    def show(self, data: bytes) -> None:
        """Put what is not the guest's on the terminal, for the overlay."""
        self._writer.aside(data)

    def call(self, callback: Callable[[], None]) -> None:
        """Call back on the loop's thread, soon."""
        self._loop.call(callback)

    def leave_overlay(self) -> None:
        """Back to the guest, as Ctrl-A c does it. On the loop's thread."""
        if self._overlaid:
            self._toggle()

    # On the loop's thread

    def _start(self) -> None:
        if self._ended:
            return
        try:
            self._loop.watch(self._source, self._readable)
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
            self._loop.watch(self._source, self._readable)
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
        elif self._terminal is None:
            self._pump.put(data)
            self._pump.run()
        else:
            self._escape.feed(data)

    def _typed(self, data: bytes) -> None:
        if self._overlaid and self._overlay is not None:
            self._overlay.typed(data)
        else:
            self._pump.put(data[: max(0, _ENOUGH - self._pump.waiting)])
            self._pump.run()

    def _toggle(self) -> None:
        """The guest's output waits while the overlay is there."""
        if self._overlay is None:
            if self.make_overlay is None:
                return
            self._overlay = self.make_overlay()
        self._overlaid = not self._overlaid
        if self._overlaid:
            self._writer.hold(True)
            self._overlay.enter()
        else:
            self._overlay.leave()
            self._writer.hold(False)

    def _tell_size(self) -> None:
        try:
            columns, rows = os.get_terminal_size(self._sink)
        except OSError:
            return  # output that is no terminal has no size
        if self._receiver is not None and not self._closed and columns and rows:
            self._receiver.resized(columns, rows)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.watch(self._source)
