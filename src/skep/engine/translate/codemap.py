"""Which bytes of guest memory were translated, in tables that machine code reads at every slow store."""

from __future__ import annotations

import ctypes
import mmap

from skep.memory import GuestMemory

_MAP_NORESERVE = 0x4000
_ONES = (1 << 64) - 1


class CodeMap:
    """A word for each page frame (``mask``: a bit for each of its 64 lines), a word for each line of 64 bytes
    (``bytes``: a bit for each byte), and a byte for each frame (``wmapped``: some vCPU may store to it without
    asking)."""

    def __init__(self, memory: GuestMemory) -> None:
        frames = (memory.top + 4095) >> 12
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

    def clear_page(self, frame: int) -> None:
        """Nothing of a page was translated."""
        mask = self.mask[frame]
        index = frame << 6
        while mask:
            bit = mask & -mask
            self._bytes[index + bit.bit_length() - 1] = 0
            mask ^= bit
        self.mask[frame] = 0

    def clear(self, pa: int, n: int) -> None:
        """Nothing of [pa, pa + n), which lies in one page, was translated."""
        words = self._bytes
        end = pa + n
        for line in range(pa >> 6, end + 63 >> 6):
            start = line << 6
            low, high = max(pa - start, 0), min(end - start, 64)
            words[line] &= _ONES ^ (1 << high) - (1 << low)
            if not words[line]:
                self.mask[pa >> 12] &= ~(1 << (line & 63))

    def mark_bits(self, frame: int, bits: int) -> None:
        """As :meth:`mark` for the bytes of a page that ``bits`` names."""
        words = self._bytes
        line = 0
        while bits:
            skip = (bits & -bits).bit_length() - 1 >> 6
            bits >>= 64 * skip
            line += skip
            words[(frame << 6) + line] |= bits & _ONES
            self.mask[frame] |= 1 << line
            bits &= ~_ONES

    def clear_all(self) -> None:
        """Nothing at all was translated."""
        self._tables[0].madvise(mmap.MADV_DONTNEED)
        self._tables[2].madvise(mmap.MADV_DONTNEED)


def _lines(pa: int, n: int) -> int:
    """The code-mask bits of [pa, pa + n), which lies in one page."""
    first = pa >> 6 & 63
    last = pa + n - 1 >> 6 & 63
    return (1 << last + 1) - (1 << first)
