"""The window of host addresses through which everybody sees a guest's memory: reserved whole, mapped by pieces."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux, all architectures we run on
_PROT_NONE = 0
_GUARD = 2 << 20  # behind the window, never accessible: an engine's stray page-crossing access hits nothing

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_munmap = _libc.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mlock, _madvise, _mincore = _libc.mlock, _libc.madvise, _libc.mincore
_mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_HUGEPAGE = 14


class Window:
    """``size`` bytes of host addresses from ``base``, a multiple of ``alignment``; nothing is mapped yet. They go when
    the last view of ``bytes`` is gone, so that a view held too long is late, not wild. All methods raise OSError."""

    def __init__(self, size: int, alignment: int) -> None:
        whole = size + _GUARD + alignment
        start = _map(0, whole, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        self.base = -(-start // alignment) * alignment
        # Of a class made in Python, because only those can be referred to weakly.
        array: type[ctypes.Array[ctypes.c_char]] = type("_Window", (ctypes.c_char * size,), {})
        window = array.from_address(self.base)
        unmap = weakref.finalize(window, _munmap, start, whole)
        unmap.atexit = False  # the process may end while processors and devices still use it
        self.bytes = memoryview(window).cast("B")

    def show(self, at: int, size: int, fd: int, offset: int, *, reserve: bool = False) -> None:
        """Map a file's bytes at an offset of the window, in place of what is there, at once for all who look there.
        ``reserve``: fail where the host has not enough pages of the file's kind, rather than at their first use."""
        flags = mmap.MAP_SHARED | _MAP_FIXED | (0 if reserve else _MAP_NORESERVE)
        _map(self.base + at, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)

    def hide(self, at: int, size: int) -> None:
        """Nothing is there any more."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        _map(self.base + at, size, _PROT_NONE, flags, -1, 0)

    def lock(self, at: int, size: int) -> None:
        """Give it pages now, and keep them in the host's RAM."""
        _check(_mlock(self.base + at, size))

    def advise_huge(self, at: int, size: int) -> None:
        """The host may use transparent huge pages."""
        _check(_madvise(self.base + at, size, _MADV_HUGEPAGE))

    def touched(self, at: int, size: int, page: int) -> list[int]:
        """Offsets of pages of ``page`` bytes that were used through this window."""
        present = ctypes.create_string_buffer(size // mmap.PAGESIZE)
        _check(_mincore(self.base + at, size, present))
        first = present.raw[:: page // mmap.PAGESIZE]
        return [at + i * page for i, there in enumerate(first) if there & 1]


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _map(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    host = _mmap(address, size, protection, flags, fd, offset)
    if host == _MAP_FAILED:
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code))
    return int(host)
