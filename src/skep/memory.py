"""Guest-physical memory: RAM below and above the hole under 4 GiB, one host mapping, one door for writers.

The RAM of a VM is one memfd. It is mapped into one window of host addresses in which ``host = base + gpa``
holds everywhere: low RAM lies at the window's start, high RAM at ``high_base``, and what is between them (the PCI
hole) is PROT_NONE. Nothing is populated before the guest touches it, whatever the size. There is no second copy and
no second mapping: Python, the engine and the kernel see the same pages.

Whoever changes guest memory without being the guest's CPU tells :meth:`GuestMemory.dma_write`: it marks pages
dirty and lets listeners (a translator's code cache) drop what they derived from them. :meth:`GuestMemory.write` and
the ``store_`` helpers do so by themselves; who stores through a view calls it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

from skep.errors import HostError
from skep.locks import Lock, Order

PAGE = 4096

_MAP_NORESERVE = 0x4000  # Linux, all architectures we run on; mmap has no name for it before Python 3.13
_MAP_FIXED = 0x10
_PROT_NONE = 0
_PIECE = 16 << 20
_GUARD = 2 << 20  # behind the window, never accessible: an engine's stray page-crossing access hits nothing

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_munmap = _libc.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value

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


class Region(NamedTuple):
    """A contiguous piece of RAM: ``size`` bytes at guest-physical ``gpa``, at host address ``host``."""

    gpa: int
    size: int
    host: int


class GuestMemory:
    """The RAM of one VM.

    ``size`` bytes, a positive multiple of 4096: the first ``low_limit`` of them from address 0, the rest from
    ``high_base``. Reading and writing may happen from any thread; the guest's CPUs do so at the same time.
    """

    def __init__(self, size: int, low_limit: int = 3 << 30, high_base: int = 4 << 30) -> None:
        if size <= 0 or size % PAGE or low_limit <= 0 or low_limit % PAGE or high_base % PAGE or high_base <= low_limit:
            raise ValueError(f"guest memory: size {size}, low limit {low_limit}, high base {high_base}")
        self.size = size
        self.low_size = min(size, low_limit)
        self.high_base = high_base
        self.high_size = size - self.low_size
        self.top = high_base + self.high_size if self.high_size else self.low_size
        self._listeners: tuple[WriteListener, ...] = ()
        self._dirty: bytearray | None = None
        self._dirty_lock = Lock("memory", Order.MEMORY)
        self.fd = os.memfd_create("skep-guest", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self.base = _map(0, self.top + _GUARD, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        except OSError as e:
            os.close(self.fd)
            raise HostError(f"the host cannot reserve {size >> 20} MiB of guest memory: {e.strerror}") from None
        window = _window(self.top, self.base)
        # The window goes when the last view of it is gone, so that a view held too long is late, not wild.
        self._unmap = weakref.finalize(window, _munmap, self.base, self.top + _GUARD)
        self._unmap.atexit = False  # the process may end while processors and devices still use it
        self.regions = [Region(0, self.low_size, self.base)]
        if self.high_size:
            self.regions.append(Region(high_base, self.high_size, self.base + high_base))
        offset = 0
        try:
            for region in self.regions:
                flags = mmap.MAP_SHARED | _MAP_FIXED
                _map(region.host, region.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.fd, offset)
                offset += region.size
        except OSError as e:
            os.close(self.fd)
            raise HostError(f"the host cannot map {size >> 20} MiB of guest memory: {e.strerror}") from None
        self._b = memoryview(window).cast("B")
        self._h = self._b[: self.top & ~7].cast("H")
        self._i = self._b[: self.top & ~7].cast("I")
        self._q = self._b[: self.top & ~7].cast("Q")
        self.closed = False

    def close(self) -> None:
        """Give the memory back. Views still held keep the mapping, and only it, alive until they go."""
        if self.closed:
            return
        self.closed = True
        self._listeners = ()
        self._dirty = None
        self.low_size = self.high_size = 0  # from here on nothing is RAM
        self.top = self.high_base
        for view in (self._h, self._i, self._q, self._b):
            view.release()
        os.close(self.fd)

    def is_ram(self, gpa: int, n: int = 1) -> bool:
        """All n bytes at gpa are RAM. For n = 0: gpa lies in RAM or just behind it."""
        end = gpa + n
        return 0 <= gpa <= end <= self.low_size or self.high_base <= gpa <= end <= self.top

    def view(self, gpa: int, n: int) -> memoryview:
        """n bytes of RAM at gpa, writable; after storing call :meth:`dma_write`. Raises MemoryFault."""
        end = gpa + n
        if not (0 <= gpa <= end <= self.low_size or self.high_base <= gpa <= end <= self.top):
            raise MemoryFault(gpa, n)
        return self._b[gpa:end]

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
        if self._dirty is not None:
            self._mark(gpa, n)
        for listener in self._listeners:
            listener(gpa, n)

    def add_write_listener(self, listener: WriteListener) -> None:
        """Called from whatever thread wrote; it must be quick and must not write guest memory itself."""
        self._listeners = (*self._listeners, listener)

    def remove_write_listener(self, listener: WriteListener) -> None:
        self._listeners = tuple(one for one in self._listeners if one != listener)

    def clear(self) -> None:
        """All RAM back to zero, and its pages back to the host. No vCPU and no device may be running."""
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, self.size)
        for region in self.regions:
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

    # Dirty pages: a bit a page of the window, while somebody asks. What the guest's CPUs write is the engine's to add.

    def start_dirty(self) -> None:
        """Begin, with no page dirty."""
        with self._dirty_lock:
            self._dirty = bytearray((self.top // PAGE + 7) // 8)

    def take_dirty(self) -> bytes:
        """The pages written since the last call: bit i & 7 of byte i >> 3 stands for page i. They are clean then."""
        with self._dirty_lock:
            if self._dirty is None:
                raise ValueError("dirty tracking is off")
            taken = bytes(self._dirty)
            self._dirty = bytearray(len(taken))
            return taken

    def stop_dirty(self) -> None:
        with self._dirty_lock:
            self._dirty = None

    def _mark(self, gpa: int, n: int) -> None:
        with self._dirty_lock:  # setting a bit is a read and a write
            dirty = self._dirty
            if dirty is not None:
                for page in range(gpa // PAGE, (gpa + n - 1) // PAGE + 1):
                    dirty[page >> 3] |= 1 << (page & 7)


def _window(size: int, base: int) -> ctypes.Array[ctypes.c_char]:
    """The host window as a ctypes array; of a class made in Python, because only those can be referred to weakly."""
    array: type[ctypes.Array[ctypes.c_char]] = type("_Window", (ctypes.c_char * size,), {})
    return array.from_address(base)


def _map(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    host = _mmap(address, size, protection, flags | _MAP_NORESERVE, fd, offset)
    if host == _MAP_FAILED:
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code))
    return int(host)
