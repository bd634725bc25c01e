"""Which bytes of guest memory were translated, in tables that machine code reads at every slow store."""

from __future__ import annotations

import ctypes
import mmap

from skep.engine.translate.walk_runtime import STORED
from skep.memory import GuestMemory

_MAP_NORESERVE = 0x4000
_ONES = (1 << 64) - 1


class CodeMap:
    """A word for each page frame (``mask``: a bit for each of its 64 lines), a word for each line of 64 bytes
    (``bytes``: a bit for each byte), and a byte for each frame (``wmapped``: whether some vCPU may store to it without
    asking, and whether one could since that was asked; walk_runtime.STORED and WRITTEN)."""

    def __init__(self, memory: GuestMemory) -> None:
        self.frames = frames = memory.end >> 12
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._tables = [mmap.mmap(-1, size, flags=flags) for size in (frames * 8, frames, frames * 512)]
        self._pins = [ctypes.c_char.from_buffer(t) for t in self._tables]
        self.mask_address, self.wmapped_address, self.bytes_address = map(ctypes.addressof, self._pins)
        self.mask = memoryview(self._tables[0]).cast("B").cast("Q")
        self.wmapped = memoryview(self._tables[1])
        self._bytes = memoryview(self._tables[2]).cast("B").cast("Q")
        self.changes: object = None
        """Another object each time somebody who is no vCPU has stored; a count could lose one of two at once."""

    def close(self) -> None:
        self.mask.release()
        self.wmapped.release()
        self._bytes.release()
        self._pins.clear()
        for t in self._tables:
            t.close()

    def storable(self, pa: int) -> int:
        """Whether some vCPU may store to the page of ``pa`` without asking."""
        return self.wmapped[pa >> 12] & STORED

    def mark(self, pa: int, n: int) -> None:
        """[pa, pa + n), in one page, has been translated."""
        line = pa >> 6
        last = pa + n - 1 >> 6
        words = self._bytes
        first = pa & 63
        while line < last:
            words[line] |= _ONES << first & _ONES
            first = 0
            line += 1
        words[line] |= (1 << (pa + n - 1 & 63) + 1) - (1 << first)
        self.mask[pa >> 12] |= _lines(pa, n)


def _lines(pa: int, n: int) -> int:
    """The code-mask bits of [pa, pa + n), which lies in one page."""
    first = pa >> 6 & 63
    last = pa + n - 1 >> 6 & 63
    return (1 << last + 1) - (1 << first)
