"""The two ends of a line of characters: the port that the guest sees, and what it is plugged into on the host."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Receiver(Protocol):
    """The guest's side: a UART, a port of a virtio console. The backend calls all of it, from threads of its own,
    holding no lock of its own."""

    def room(self) -> int:
        """How many bytes ``receive`` would take now; 0 makes the backend wait for ``room_available``."""

    def receive(self, data: bytes) -> None:
        """Bytes for the guest, never more than ``room`` said last: only the backend adds, so room only grows."""

    def drained(self) -> None:
        """Having said that it had no ``output_room``, the backend has some again."""

    def attached(self, present: bool) -> None:
        """Somebody is now, or is no longer, at the other end."""

    def resized(self, columns: int, rows: int) -> None:
        """The other end is a terminal of this size, from now on."""


class PlainLine:
    """The part of a receiver in which one has nothing to do that cannot make its guest wait, and has no way to say who
    is at the other end."""

    def drained(self) -> None:
        """Output is written whether there is room or not."""

    def attached(self, present: bool) -> None:
        """The guest does not hear of it."""

    def resized(self, columns: int, rows: int) -> None:
        """The guest does not hear of it."""


class BackendStatus(NamedTuple):
    """What a backend is at this moment."""

    where: str
    """As the tree says it, with what the host added: ``pty:/dev/pts/3``."""
    present: bool
    """Somebody is at the other end, as far as can be known."""
    waiting: int
    """Bytes of output that nobody has taken yet."""
    dropped: int
    """Bytes of output that nobody ever took."""


class CharBackend(Protocol):
    """The host's side. All of it may be called from any thread, ``write`` by one thread at a time."""

    def connect(self, receiver: Receiver) -> None:
        """Plug the line in, once. Bytes that came earlier were kept, and are delivered from now on. A backend to which
        somebody has to come says ``attached`` at once, and whenever that changes; one that says nothing has somebody
        all the time."""

    def write(self, data: bytes) -> None:
        """Bytes from the guest. Never raises, never waits. Beyond ``output_room`` the oldest that nobody took are
        dropped, counted, and a line in their place says so."""

    def output_room(self) -> int:
        """How many bytes ``write`` would take now without dropping any. Whoever can make its guest wait asks, and
        having heard 0 waits for ``drained``."""

    def room_available(self) -> None:
        """The receiver's FIFO was drained: offer it the bytes that wait. Never calls the receiver back from
        inside the call, so that a UART may say this while it holds its lock."""

    def status(self) -> BackendStatus:
        """Never waits."""

    def close(self) -> None:
        """Unplug, and give back what the host lent (a terminal's mode). The receiver is not called afterwards."""
