"""A serial line that is plugged into nothing."""

from __future__ import annotations

from skep.contracts.chardev import BackendStatus, Receiver


class Null:
    """Takes everything, gives nothing."""

    def connect(self, receiver: Receiver) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def output_room(self) -> int:
        return 1 << 16  # any number: it all vanishes

    def room_available(self) -> None:
        pass

    def status(self) -> BackendStatus:
        return BackendStatus("none", False, 0, 0)

    def close(self) -> None:
        pass
