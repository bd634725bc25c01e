"""Two guest page frames side by side, for operands that lie on both."""

from __future__ import annotations

import ctypes
import mmap

from skep.engine.translate.layout import PAIR_SLOTS
from skep.engine.translate.world import World
from skep.memory import GuestMemory

_M64 = 0xFFFF_FFFF_FFFF_FFFF
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Pairs:
    """A window of host addresses that shows any two page frames side by side, for operands that lie on both."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._size = PAIR_SLOTS * 8192
        self.address = _libc.mmap(None, self._size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        self._table = mmap.mmap(-1, PAIR_SLOTS * 8)
        self._pin = ctypes.c_char.from_buffer(self._table)
        self.tags_address = ctypes.addressof(self._pin)
        self._tags = memoryview(self._table).cast("B").cast("Q")

    def close(self) -> None:
        _libc.munmap(self.address, self._size)
        self._tags.release()
        del self._pin
        self._table.close()

    def map(self, tag: int, world: World) -> None:
        """Map the two frames of a tag (runtime.fill_crossing) into their slot."""
        slot = (tag * 0x9E3779B97F4A7C15 & _M64) >> 52
        with world.lock:
            if self._tags[slot] in (0, tag):
                self._map_slot(slot, tag)
            else:  # somebody may be using what is there
                with world.stopped():
                    self._map_slot(slot, tag)

    def forget(self) -> None:
        """What lies at guest-physical addresses has changed. The vCPUs are stopped."""
        ctypes.memset(self.tags_address, 0, PAIR_SLOTS * 8)

    def _map_slot(self, slot: int, tag: int) -> None:
        at = self.address + slot * 8192
        for i, frame in enumerate((tag >> 32, tag & 0xFFFFFFFF)):
            gpa = frame << 12
            region = self._memory.region_at(gpa)
            if region is None:  # it went meanwhile: who asked will see
                self._tags[slot] = 0
                return
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
            got = _libc.mmap(at + i * 4096, 4096, protection, flags, region.fd, region.offset + gpa - region.gpa)
            if got != at + i * 4096:
                self._tags[slot] = 0
                raise OSError(ctypes.get_errno(), "cannot map two guest pages side by side")
        self._tags[slot] = tag
