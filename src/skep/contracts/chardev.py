"""The two ends of a serial line: the port that the guest sees, and what it is plugged into on the host."""

from __future__ import annotations

from typing import Protocol


class Receiver(Protocol):
    """The guest's side, a UART. The backend calls both, from its own thread, holding no lock of its own."""

    def room(self) -> int:
        """How many bytes ``receive`` would take now; 0 makes the backend wait for ``room_available``."""

    def receive(self, data: bytes) -> None:
        """Bytes for the guest, never more than ``room`` said last: only the backend adds, so room only grows."""


class CharBackend(Protocol):
    """The host's side. All of it may be called from any thread."""

    def connect(self, receiver: Receiver) -> None:
        """Plug the line in, once. Bytes that came earlier were kept, and are delivered from now on."""

    def write(self, data: bytes) -> None:
        """Bytes from the guest. Never raises; what nobody can take any more is dropped."""

    def room_available(self) -> None:
        """The receiver's FIFO was drained: offer it the bytes that wait. Never calls the receiver back from
        inside the call, so that a UART may say this while it holds its lock."""

    def close(self) -> None:
        """Unplug, and give back what the host lent (a terminal's mode). The receiver is not called afterwards."""
