"""Guest-physical memory: RAM below and above the hole under 4 GiB, one host mapping, one door for writers.

The RAM of a VM is one file without a name (file.py). It is mapped into one window of host addresses in which
``host = base + gpa`` holds everywhere: low RAM lies at the window's start, high RAM at ``high_base``, and what is
between them (the PCI hole) is PROT_NONE. Nothing is populated before the guest touches it, whatever the size, unless
the RAM is wired. There is no second copy and no second mapping: Python, the engine and the kernel see the same pages.

What lies over RAM or in the hole (ROM, a device's own memory, a device's window over RAM) is an overlay, and changes
while the guest runs (regions.py). Devices reach RAM only, where nothing lies over it; so no view leads elsewhere.

Whoever changes guest memory without being the guest's CPU tells :meth:`GuestMemory.dma_write`: it marks pages
dirty and lets listeners (a translator's code cache) drop what they derived from them. :meth:`GuestMemory.write` and
the ``store_`` helpers do so by themselves; who stores through a view calls it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from skep.errors import HostError
from skep.locks import Lock, Order
from skep.memory.dirty import PAGE, DirtyPages, DirtySource
from skep.memory.file import SMALL, TRANSPARENT, ram_file
from skep.memory.regions import MapListener, Overlay, Region, Rights, backings, layered
from skep.memory.window import Window

__all__ = ["PAGE", "GuestMemory", "MemoryFault", "Overlay", "Region", "Rights"]

_PIECE = 16 << 20
_LARGE = 2 << 20
"""Where the host makes huge pages by itself, processors and KVM map one whole where both addresses are multiples."""

WriteListener = Callable[[int, int], None]
"""``listener(gpa, n)``: n bytes of RAM at gpa were changed by somebody who is not the guest's CPU."""


class MemoryFault(Exception):
    """An access to guest-physical addresses of which at least one is not RAM."""

    def __init__(self, gpa: int, n: int) -> None:
        super().__init__(gpa, n)
        self.gpa = gpa
        self.n = n

    def __str__(self) -> str:
        return f"{self.n} bytes at guest-physical address {self.gpa:#x} are not all RAM"


class GuestMemory:
    """The RAM of one VM.

    ``size`` bytes, a positive multiple of 4096: the first ``low_limit`` of them from address 0, the rest from
    ``high_base``. Reading and writing may happen from any thread; the guest's CPUs do so at the same time.

    ``reach``: overlays may lie below this address, and in any case below the end of RAM. ``huge``: bytes of the host's
    huge pages that RAM is made of, from the host's pool; or 1: transparent ones, as far as the host finds any; None:
    the same, where this host makes them at all. ``wired``: all of it is in the host's RAM from the beginning and stays
    there. Raises HostError where the host has not got it.
    """

    def __init__(
        self,
        size: int,
        low_limit: int = 3 << 30,
        high_base: int = 4 << 30,
        *,
        reach: int = 0,
        huge: int | None = SMALL,
        wired: bool = False,
    ) -> None:
        unit = max(PAGE, huge or SMALL)
        if size <= 0 or size % unit or low_limit <= 0 or low_limit % unit or high_base % unit or high_base <= low_limit:
            raise ValueError(f"guest memory: {size}, {low_limit} of it low, the rest from {high_base}, pages of {unit}")
        self.size = size
        self.low_size = min(size, low_limit)
        self.high_base = high_base
        self.high_size = size - self.low_size
        self.top = high_base + self.high_size if self.high_size else self.low_size
        self.end = max(self.top, -(-reach // PAGE) * PAGE)
        """The end of what can be guest memory; of RAM it is ``top``."""
        self.page_size = unit
        """Of the host's pages that RAM is made of, as far as that is sure."""
        self._wired = wired
        self._listeners: tuple[WriteListener, ...] = ()
        self._map_listeners: tuple[MapListener, ...] = ()
        self._dirty_sources: tuple[DirtySource, ...] = ()
        self._dirty: DirtyPages | None = None
        self._map_lock = Lock("memory map", Order.MAP)
        self.overlays: tuple[Overlay, ...] = ()
        """What lies over RAM and beside it, the topmost last."""
        self._covered: tuple[tuple[int, int], ...] = ()
        """Where something lies over RAM."""
        self.fd, self._huge = ram_file(size, huge)
        try:
            self._window = Window(self.end, max(unit, _LARGE))
        except OSError as e:
            os.close(self.fd)
            raise HostError(f"the host cannot reserve {size >> 20} MiB of guest memory: {e.strerror}") from None
        self.base = self._window.base
        ram = [Region(0, self.low_size, self.base, Rights.WRITE, self.fd, 0)]
        if self.high_size:
            high = self.base + high_base
            ram.append(Region(high_base, self.high_size, high, Rights.WRITE, self.fd, self.low_size))
        self.ram = tuple(ram)
        """The guest's RAM, whatever lies over it."""
        self.regions = self.ram
        """What the guest's CPUs see now: disjoint, ascending."""
        self._b = self._window.bytes
        try:
            for region in self.ram:
                self._populate(region)
        except BaseException:
            self._b.release()
            os.close(self.fd)
            raise
        self._h = self._b[: self.top & ~7].cast("H")
        self._i = self._b[: self.top & ~7].cast("I")
        self._q = self._b[: self.top & ~7].cast("Q")
        self.closed = False

    @property
    def kind(self) -> str:
        """What the host was asked for, in words; empty: nothing."""
        pages = {SMALL: "", TRANSPARENT: "transparent huge pages"}.get(self._huge, f"pages of {self._huge >> 20} MiB")
        return ", ".join(word for word in (pages, "wired" if self._wired else "") if word)

    def _populate(self, region: Region) -> None:
        """Map a piece of RAM, of the pages that were asked for."""
        try:
            self._window.show(region.gpa, region.size, region.fd, region.offset, reserve=self._huge > TRANSPARENT)
        except OSError as error:
            if self._huge <= TRANSPARENT:
                what = f"the host cannot map {self.size >> 20} MiB of guest memory: {error.strerror}"
                raise HostError(what) from None
            pool = f"/sys/kernel/mm/hugepages/hugepages-{self._huge >> 10}kB"
            with open(f"{pool}/free_hugepages", encoding="utf-8") as file:
                free, needed = int(file.read()), self.size // self._huge
            what = f"the VM needs {needed} pages of {self._huge >> 20} MiB, and this host has {free} free"
            raise HostError(what, "memory.hugepages", f"write a larger number to {pool}/nr_hugepages") from None
        if self._huge == TRANSPARENT:
            self._window.advise_huge(region.gpa, region.size)
        if self._wired:
            self._wire(region)

    def _wire(self, region: Region) -> None:
        try:
            self._window.lock(region.gpa, region.size)
        except OSError as error:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            if limit == resource.RLIM_INFINITY:
                what = f"the host cannot wire {self.size >> 20} MiB: {error.strerror}"
                raise HostError(what, "memory.wired") from None
            what = f"{self.size >> 20} MiB cannot be wired: RLIMIT_MEMLOCK is {limit >> 10} KiB"
            raise HostError(what, "memory.wired", "raise it (ulimit -l), or do without") from None

    def close(self) -> None:
        """Give the memory back. Views still held keep the mapping, and only it, alive until they go."""
        if self.closed:
            return
        self.closed = True
        self._listeners = ()
        self._dirty = None
        self.regions = ()
        self.low_size = self.high_size = 0  # from here on nothing is RAM
        self.top = self.high_base
        for view in (self._h, self._i, self._q, self._b):
            view.release()
        os.close(self.fd)

    def is_ram(self, gpa: int, n: int = 1) -> bool:
        """All n bytes at gpa are RAM, and nothing lies over it. For n = 0: gpa lies in RAM or just behind it."""
        end = gpa + n
        if not (0 <= gpa <= end <= self.low_size or self.high_base <= gpa <= end <= self.top):
            return False
        return not self._covered or all(end <= low or high <= gpa for low, high in self._covered)

    def view(self, gpa: int, n: int) -> memoryview:
        """n bytes of RAM at gpa, writable; after storing call :meth:`dma_write`. Raises MemoryFault."""
        if not self.is_ram(gpa, n):
            raise MemoryFault(gpa, n)
        return self._b[gpa : gpa + n]

    def read(self, gpa: int, n: int) -> bytes:
        if not self.is_ram(gpa, n):
            raise MemoryFault(gpa, n)
        return self._b[gpa : gpa + n].tobytes()

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store and tell; pieces of 2, 4 and 8 bytes are single stores to anyone who watches."""
        n = len(data)
        if not self.is_ram(gpa, n):
            raise MemoryFault(gpa, n)
        self._b[gpa : gpa + n] = data
        self.dma_write(gpa, n)

    # Single loads and stores. Aligned ones go through the casts; a slice of 2, 4 or 8 bytes is copied in one piece
    # as well. struct.pack_into is not used: it zeroes the field first, and another CPU can see the zero.

    def load_u8(self, gpa: int) -> int:
        if not self.is_ram(gpa):
            raise MemoryFault(gpa, 1)
        return self._b[gpa]

    def load_u16(self, gpa: int) -> int:
        if not self.is_ram(gpa, 2):
            raise MemoryFault(gpa, 2)
        return self._h[gpa >> 1] if not gpa & 1 else int.from_bytes(self._b[gpa : gpa + 2], "little")

    def load_u32(self, gpa: int) -> int:
        if not self.is_ram(gpa, 4):
            raise MemoryFault(gpa, 4)
        return self._i[gpa >> 2] if not gpa & 3 else int.from_bytes(self._b[gpa : gpa + 4], "little")

    def load_u64(self, gpa: int) -> int:
        if not self.is_ram(gpa, 8):
            raise MemoryFault(gpa, 8)
        return self._q[gpa >> 3] if not gpa & 7 else int.from_bytes(self._b[gpa : gpa + 8], "little")

    def store_u8(self, gpa: int, value: int) -> None:
        if not self.is_ram(gpa):
            raise MemoryFault(gpa, 1)
        self._b[gpa] = value
        self.dma_write(gpa, 1)

    def store_u16(self, gpa: int, value: int) -> None:
        if not self.is_ram(gpa, 2):
            raise MemoryFault(gpa, 2)
        if gpa & 1:
            self._b[gpa : gpa + 2] = value.to_bytes(2, "little")
        else:
            self._h[gpa >> 1] = value
        self.dma_write(gpa, 2)

    def store_u32(self, gpa: int, value: int) -> None:
        if not self.is_ram(gpa, 4):
            raise MemoryFault(gpa, 4)
        if gpa & 3:
            self._b[gpa : gpa + 4] = value.to_bytes(4, "little")
        else:
            self._i[gpa >> 2] = value
        self.dma_write(gpa, 4)

    def store_u64(self, gpa: int, value: int) -> None:
        if not self.is_ram(gpa, 8):
            raise MemoryFault(gpa, 8)
        if gpa & 7:
            self._b[gpa : gpa + 8] = value.to_bytes(8, "little")
        else:
            self._q[gpa >> 3] = value
        self.dma_write(gpa, 8)

    def dma_write(self, gpa: int, n: int) -> None:
        """The DMA door: n bytes at gpa (all RAM) were changed by a device, or by us.

        Called after the data was stored and before the completion is published to the guest.
        """
        if n <= 0:
            return
        dirty = self._dirty
        if dirty is not None:
            dirty.mark_range(gpa, n)
        for listener in self._listeners:
            listener(gpa, n)

    def add_write_listener(self, listener: WriteListener) -> None:
        """Called from whatever thread wrote; it must be quick and must not write guest memory itself."""
        self._listeners = (*self._listeners, listener)

    def remove_write_listener(self, listener: WriteListener) -> None:
        self._listeners = tuple(one for one in self._listeners if one != listener)

    def clear(self) -> None:
        """All RAM back to zero, and its pages back to the host, unless it is to keep them. No vCPU and no device may be
        running."""
        if self._huge > TRANSPARENT:  # given back, they could be gone for good
            for region in self.ram:
                for at in self._window.touched(region.gpa, region.size, self._huge):
                    ctypes.memset(self.base + at, 0, self._huge)
        else:
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, self.size)
        for region in self.ram:
            if self._wired:
                self._wire(region)
            self.dma_write(region.gpa, region.size)

    def written(self) -> Iterator[tuple[int, bytes]]:
        """The pieces that have pages behind them, (address, contents); the others were never written to."""
        end = 0
        while True:
            try:
                begin = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no more
                    return
                raise
            end = os.lseek(self.fd, begin, os.SEEK_HOLE)
            while begin < end:
                high = begin >= self.low_size
                upto = min(end, begin + _PIECE, self.size if high else self.low_size)
                yield begin + (self.high_base - self.low_size if high else 0), os.pread(self.fd, upto - begin, begin)
                begin = upto

    # The map: what the guest's CPUs see, and who has to know

    def change(self, remove: Iterable[Overlay] = (), add: Iterable[Overlay] = ()) -> None:
        """Take overlays away and put others on top, all at once for the guest's CPUs, which may be running. The bytes
        of what goes are its file's; what comes is dirty. Any thread may ask that holds no lock of an engine.

        Raises ValueError for what is not there, or cannot be; HostError where an engine has no room for it.
        """
        remove, add = tuple(remove), tuple(add)
        with self._map_lock:
            if any(one not in self.overlays for one in remove):
                raise ValueError("an overlay that is not there")
            for one in add:
                if (one.gpa | one.size | one.offset) % PAGE or one.size <= 0 or not 0 <= one.gpa < one.end <= self.end:
                    raise ValueError(f"no place for an overlay: {one.gpa:#x}-{one.end - 1:#x}")
            overlays = (*(one for one in self.overlays if one not in remove), *add)
            regions = layered(self.ram, overlays, self.base)
            where = tuple((one.gpa, one.end) for one in (*remove, *add))
            with ExitStack() as stack:
                for listener in self._map_listeners:
                    stack.enter_context(listener.changing(self.regions, regions, where))
                for start, end in where:
                    self._show(overlays, start, end)
                self.overlays, self.regions = overlays, regions
                self._covered = tuple(
                    (one.gpa, one.end) for one in overlays if one.gpa < self.low_size or one.end > self.high_base
                )
            if self._dirty is not None:
                for start, end in where:
                    self._dirty.mark_range(start, end - start)

    def _show(self, overlays: Iterable[Overlay], start: int, end: int) -> None:
        """Have the window show what lies in [start, end); behind a device's window that is what it hides."""
        before, after = (
            backings(layered(self.ram, (o for o in some if o.rights is not Rights.NONE), self.base), start, end)
            for some in (self.overlays, overlays)
        )
        if before == after:
            return
        at = start
        for gpa, size, fd, offset in after:
            if at < gpa:
                self._window.hide(at, gpa - at)
            self._window.show(gpa, size, fd, offset)
            at = gpa + size
        if at < end:
            self._window.hide(at, end - at)

    def region_at(self, gpa: int) -> Region | None:
        """The region of an address."""
        at = bisect_right(self.regions, gpa, key=lambda region: region.gpa) - 1
        return self.regions[at] if at >= 0 and gpa < self.regions[at].end else None

    def allows(self, gpa: int, n: int, rights: Rights) -> bool:
        """Whether the guest's CPUs may do so with [gpa, gpa + n), which lies in one page."""
        if self.is_ram(gpa, n):
            return True
        region = self.region_at(gpa)
        return region is not None and gpa + n <= region.end and region.rights & rights == rights

    def behind(self, gpa: int, n: int) -> memoryview:
        """What the guest's CPUs see at [gpa, gpa + n), of one region. For engines, while they keep the map from
        changing. Raises MemoryFault."""
        if not self.allows(gpa, n, Rights.READ):
            raise MemoryFault(gpa, n)
        return self._b[gpa : gpa + n]

    def add_map_listener(self, listener: MapListener) -> None:
        with self._map_lock:
            self._map_listeners = (*self._map_listeners, listener)

    def remove_map_listener(self, listener: MapListener) -> None:
        with self._map_lock:
            self._map_listeners = tuple(one for one in self._map_listeners if one is not listener)

    # Dirty pages: while somebody asks. What devices write is told to dma_write, what the guest's CPUs write to engines.

    def start_dirty(self) -> None:
        """Begin, with no page dirty."""
        with self._map_lock:
            if self._dirty is None:
                self._dirty = DirtyPages(self.end // PAGE)
                for source in self._dirty_sources:
                    source.start_dirty()
            self._take()

    def take_dirty(self) -> bytes:
        """The pages of guest-physical memory that were written since the last call, by whomever: bit i & 7 of byte
        i >> 3 stands for page i (:func:`skep.memory.dirty.dirty_ranges`). They are clean then.

        Whoever reads a page now and misses a write finds it dirty the next time, so a copy that is made so often enough
        is complete. Raises ValueError while nobody asks.
        """
        with self._map_lock:
            return self._take()

    def stop_dirty(self) -> None:
        with self._map_lock:
            if self._dirty is not None:
                self._dirty = None
                for source in self._dirty_sources:
                    source.stop_dirty()

    def _take(self) -> bytes:
        if self._dirty is None:
            raise ValueError("dirty tracking is off")
        for source in self._dirty_sources:
            source.collect_dirty(self._dirty.mark)
        return self._dirty.take()

    def mark_dirty(self, gpa: int, bitmap: bytes) -> None:
        """An engine says what it cannot keep until it is asked (:data:`skep.memory.dirty.Mark`)."""
        dirty = self._dirty
        if dirty is not None:
            dirty.mark(gpa, bitmap)

    def add_dirty_source(self, source: DirtySource) -> None:
        with self._map_lock:
            self._dirty_sources = (*self._dirty_sources, source)
            if self._dirty is not None:
                source.start_dirty()

    def remove_dirty_source(self, source: DirtySource) -> None:
        """What it knows is not lost."""
        with self._map_lock:
            if self._dirty is not None:
                source.collect_dirty(self._dirty.mark)
            self._dirty_sources = tuple(one for one in self._dirty_sources if one is not source)
