"""The interface between a disk device and what holds its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Buffers = Sequence[memoryview]
"""Pieces of guest memory, in order: one transfer scattered over, or gathered from, all of them."""


class BlockBackend(Protocol):
    """A disk's data. Offsets and lengths are bytes, and multiples of 512.

    All methods may be called from several threads at once. What the host refuses comes out as OSError, which the device
    turns into its own I/O error; the caller has checked offset and length against ``size``.

    A write that returned is seen by every later read. It is durable, that is, survives a loss of power, when a
    ``flush`` that began after it returned has returned; or at once, where ``write_cache`` is False.
    """

    size: int
    """Bytes."""
    read_only: bool
    write_cache: bool
    """False: every write is durable when it returns."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Fill all the buffers."""

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        """Write all the buffers."""

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        """As ``preadv``, if that takes hardly any time, because the host has the data in its memory. False: it would
        have to wait, and nobody knows what is in the buffers."""

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        """As ``pwritev``, if that takes hardly any time. False: it would have to wait, and part may be written."""

    def discard(self, offset: int, length: int) -> None:
        """Nobody needs this data any more. What is read there later is anything, and the same each time."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """A write of zeros. ``unmap``: the host may take back the space, otherwise it stays reserved."""

    def flush(self) -> None:
        """Make what was written durable. After one failure every later flush fails: what was lost stays lost."""

    def close(self) -> None:
        """No transfer is under way, none follows. Closing twice is closing once."""
