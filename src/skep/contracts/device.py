"""The life of a device, the same for all of them."""

from __future__ import annotations

from typing import Protocol

from skep.state import SavedState as SavedState


class Device(Protocol):
    """What the board asks of every device.

    Order: created, ``reset`` once, then any sequence of the others; ``close`` ends it and is the
    last call. ``pause`` returns when nothing of the device can change guest memory or its own state any
    more, and pausing twice is pausing once. ``save`` is called only between ``pause`` and ``resume``;
    ``load`` of what ``save`` gave is the identity.
    """

    name: str

    def reset(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def save(self) -> SavedState: ...

    def load(self, state: SavedState) -> None: ...

    def close(self) -> None: ...


class Passive:
    """The part of a device's life that one without threads, timers and backends has nothing to do in."""

    def pause(self) -> None:
        """Nothing happens to it but by the guest's accesses."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def close(self) -> None:
        """Nothing is held."""
