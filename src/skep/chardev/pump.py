"""Bytes on their way to the guest, which takes no more than its FIFO has room for."""

from __future__ import annotations

from skep.contracts.chardev import Receiver


class Pump:
    """A queue before a receiver. All but ``wanted`` belong to the loop's thread."""

    def __init__(self) -> None:
        self._receiver: Receiver | None = None
        self._queue = bytearray()

    def connect(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def put(self, data: bytes) -> None:
        self._queue += data

    @property
    def waiting(self) -> int:
        """How many bytes the guest has not taken yet. May be read from any thread."""
        return len(self._queue)

    def run(self) -> None:
        """Hand over what there is room for."""
        receiver = self._receiver
        if receiver is None:
            return
        while self._queue:
            room = receiver.room()
            if room <= 0:
                return
            data = bytes(self._queue[:room])
            del self._queue[:room]
            receiver.receive(data)
