"""What lies over RAM or beside it, as machine code asks for it: a byte a page frame, once there is anything."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from skep.engine.translate.blocks import Cache
from skep.engine.translate.pairs import Pairs
from skep.memory import PAGE, GuestMemory, Region

_KNOWN = 0x80
"""In a frame's byte, with the bits of Rights: it says what the guest may do there, whatever RAM there is."""
_NORESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


class Overlays:
    """Follows the memory map (:class:`skep.memory.regions.MapListener`).

    What is at a host address changes by itself, so only rights, and what was derived from contents, have to go: TLBs,
    translations, pages side by side."""

    def __init__(self, memory: GuestMemory, cache: Cache, pairs: Pairs) -> None:
        self.frames = memory.end // PAGE
        self.address = 0
        """Of the table, for state blocks; 0: there is nothing but RAM."""
        self._cache = cache
        self._pairs = pairs
        self._table: mmap.mmap | None = None
        if memory.overlays:
            self._learn(memory.regions, [(one.gpa, one.end) for one in memory.overlays])

    @contextmanager
    def changing(
        self, before: Sequence[Region], after: Sequence[Region], where: Sequence[tuple[int, int]]
    ) -> Iterator[None]:
        cache = self._cache
        with cache.world.stopped():
            yield
            self._learn(after, where)
            for st in cache.world.blocks:
                st.overlays = self.address
            cache.forget_pages()
            self._pairs.forget()
            for start, end in where:
                cache.written(start, end - start)

    def _learn(self, regions: Sequence[Region], where: Sequence[tuple[int, int]]) -> None:
        if self._table is None:
            self._table = mmap.mmap(-1, self.frames, flags=_NORESERVE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._table))
        for start, end in where:
            self._table[start // PAGE : end // PAGE] = bytes((_KNOWN,)) * ((end - start) // PAGE)
            for region in regions:
                part = region.cut(start, end)
                if part.size > 0:
                    frames = slice(part.gpa // PAGE, part.end // PAGE)
                    self._table[frames] = bytes((_KNOWN | part.rights,)) * (part.size // PAGE)
