"""Which pages of guest memory were written: by devices and ourselves, and by the guest's CPUs, as engines tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from skep.locks import Lock, Order

PAGE = 4096

Mark = Callable[[int, bytes], None]
"""``mark(gpa, bitmap)``: bit i & 7 of byte i >> 3 stands for the page i pages behind ``gpa``."""


class DirtySource(Protocol):
    """An engine, which knows what the guest's CPUs write. Calls do not overlap; the CPUs may be running."""

    def start_dirty(self) -> None:
        """From here on it is known; no page is dirty."""

    def collect_dirty(self, mark: Mark) -> None:
        """``mark`` what was written since the last time. Whoever reads a page after this call and finds a later write
        missing finds the page dirty the next time."""

    def stop_dirty(self) -> None: ...


class DirtyPages:
    """A bit a page of guest-physical addresses."""

    def __init__(self, pages: int) -> None:
        self._bits = bytearray((pages + 7) // 8)
        self._lock = Lock("dirty pages", Order.MEMORY)  # setting a bit is a read and a write

    def mark_range(self, gpa: int, n: int) -> None:
        """The pages of [gpa, gpa + n), n > 0."""
        first, last = gpa // PAGE, (gpa + n - 1) // PAGE
        with self._lock:
            if last - first < 64:
                for page in range(first, last + 1):
                    self._bits[page >> 3] |= 1 << (page & 7)
                return
        ones = (1 << (last - first + 1)) - 1
        self.mark(first * PAGE, ones.to_bytes((last - first + 8) // 8, "little"))

    def mark(self, gpa: int, bitmap: bytes) -> None:
        """See :data:`Mark`."""
        page = gpa // PAGE
        low = page >> 3
        size = len(bitmap) + (1 if page & 7 else 0)
        more = int.from_bytes(bitmap, "little") << (page & 7)
        if not more:
            return
        with self._lock:
            place = self._bits[low : low + size]
            merged = int.from_bytes(place, "little") | more
            self._bits[low : low + size] = merged.to_bytes(size, "little")[: len(place)]

    def take(self) -> bytes:
        """All of them; they are clean then."""
        with self._lock:
            taken = bytes(self._bits)
            self._bits[:] = bytes(len(taken))
            return taken


def dirty_ranges(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """(gpa, bytes) of each run of dirty pages in what ``take_dirty`` gave, ascending."""
    start = -1
    page = 0
    while page < 8 * len(bitmap):
        if not page & 63 and start < 0:  # skip what is clean by 64 pages
            while page < 8 * len(bitmap) and not any(bitmap[page >> 3 : (page >> 3) + 8]):
                page += 64
            if page >= 8 * len(bitmap):
                return
        if bitmap[page >> 3] >> (page & 7) & 1:
            if start < 0:
                start = page
        elif start >= 0:
            yield start * PAGE, (page - start) * PAGE
            start = -1
        page += 1
    if start >= 0:
        yield start * PAGE, (page - start) * PAGE
