"""One port of a virtio console: characters between two virtqueues and a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from skep.contracts.chardev import CharBackend
from skep.devices.virtio.device import PUT_BACK
from skep.devices.virtio.queue import Chain, DriverError
from skep.locks import Lock
from skep.state import Fields

_INPUT = 1 << 14
"""Bytes for the guest that wait here at most."""
_PIECE = 1 << 16
"""Bytes for the backend at once."""


class Port(Fields):
    """Implements :class:`skep.contracts.chardev.Receiver`.

    Towards the guest a port gives what its driver has buffers for, once the guest has opened it. From the guest a port
    takes what its backend has room for, and the rest waits in the guest's buffers; but the port of a *console* takes
    everything, since Linux spins until a console's buffer is back, and leaves the backend to say what it dropped.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("added", "known", "guest_open", "host_open", "input", "sent")

    def __init__(
        self,
        backend: CharBackend,
        lock: Lock,
        *,
        console: bool,
        changed: Callable[[], None],
        take: Callable[[], None],
        give: Callable[[], None],
    ) -> None:
        """``lock`` is the console device's, of order CHARDEV. ``changed`` is called when ``present`` or ``size`` are
        not what they were; ``take`` when there is input for the guest, ``give`` when there may be room for output."""
        self.console = console
        self.backend = backend
        self.present = True
        """Somebody is at the other end."""
        self.size: tuple[int, int] | None = None
        """Columns and rows of the terminal at the other end, where it is one."""
        self.size_news = False
        """The driver has not been told of ``size``."""
        self._lock = lock
        self._changed = changed
        self._take = take
        self._give = give
        self._paused = False
        self._late = b""  # came while we were paused
        self.reset()

    def reset(self) -> None:
        self.added = False
        """The driver was told of it..."""
        self.known = False
        """... and said that it is ready."""
        self.guest_open = False
        """Somebody in the guest has opened it."""
        self.host_open = False
        """What the driver was last told of ``present``."""
        self.input = b""
        self.sent = 0
        """How much of the transmit queue's next chain the backend has already."""

    def set_paused(self, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            late, self._late = (b"", self._late) if paused else (self._late, b"")
            self.input += late
        if not paused:
            self.room_available()

    def open(self, is_open: bool) -> None:
        self.guest_open = is_open
        if is_open:
            self.room_available()

    def room_available(self) -> None:
        if self.room() > 0:
            self.backend.room_available()

    # The backend's side, on threads of its own.

    def room(self) -> int:
        return 0 if self._paused or not self.guest_open else _INPUT - len(self.input)

    def receive(self, data: bytes) -> None:
        with self._lock:
            if self._paused:
                self._late += data
                return
            self.input += data
        self._take()

    def drained(self) -> None:
        self._give()

    def attached(self, present: bool) -> None:
        if present != self.present:
            self.present = present
            self._changed()

    def resized(self, columns: int, rows: int) -> None:
        if (columns, rows) != self.size and columns in range(1 << 16) and rows in range(1 << 16):
            self.size = (columns, rows)
            self.size_news = True
            self._changed()

    # The guest's side, on the device's worker.

    @property
    def has_input(self) -> bool:
        return self.guest_open and bool(self.input)

    @property
    def has_room(self) -> bool:
        return self.console or self.backend.output_room() > 0

    def emergency(self, byte: int) -> None:
        """One character, whatever state the queues are in (5.3.4.1). From a vCPU's thread."""
        with self._lock:
            self.backend.write(bytes((byte,)))

    def transmit(self, chain: Chain, stopping: Callable[[], bool]) -> int:
        """Pass on what the guest says: 0 when the backend has all of it, PUT_BACK when only up to ``sent``: it has no
        more room, or the worker is ``stopping``."""
        if chain.writable:
            raise DriverError("a device-writable buffer in a transmitq")  # 5.3.6.1
        done = 0
        for buffer in chain.readable:
            while self.sent - done < len(buffer):
                room = _PIECE if self.console else min(self.backend.output_room(), _PIECE)
                if room <= 0 or stopping():
                    return PUT_BACK
                piece = bytes(buffer[self.sent - done :][:room])
                with self._lock:
                    self.backend.write(piece)
                self.sent += len(piece)
            done += len(buffer)
        self.sent = 0
        return 0

    def fill(self, chain: Chain) -> int:
        """Give the guest what waits for it; returns how much that was."""
        if chain.readable:
            raise DriverError("a device-readable buffer in a receiveq")
        given = 0
        with self._lock:
            for buffer in chain.writable:
                part = self.input[given : given + len(buffer)]
                buffer[: len(part)] = part
                given += len(part)
            self.input = self.input[given:]
        self.room_available()
        return given
