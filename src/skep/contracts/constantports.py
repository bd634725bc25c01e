"""Ports whose value is known before they are read."""

from __future__ import annotations

import ctypes
import mmap

_MAP_NORESERVE = 0x4000
PRESENT = 0x100


class ConstantPorts:
    """What reading a byte from a port gives, where that is known and reading does nothing else: an engine may answer
    such a read by itself, without a word to the device, and before it makes writes that it kept back
    (:class:`skep.contracts.io.PostedWrites`). A word for each port, 0, or ``PRESENT`` and the value, for machine code
    to look at; who changes it holds the board lock, and the next read sees it."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._table = mmap.mmap(-1, 2 << 16, flags=flags)
        self._pin = ctypes.c_char.from_buffer(self._table)
        self.address = ctypes.addressof(self._pin)
        self.words = memoryview(self._table).cast("H")
        """The same table, to be read by port."""

    def set(self, port: int, value: int | None) -> None:
        """From now on a read of ``port`` gives ``value``; None: the device is to be asked."""
        self.words[port] = 0 if value is None else PRESENT | value

    def close(self) -> None:
        self.words.release()
        del self._pin
        self._table.close()
