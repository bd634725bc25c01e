"""Memory for translated code, never writable and executable at one address."""

from __future__ import annotations

import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MREMAP_MAYMOVE, _MAP_NORESERVE = 1, 0x4000
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_FAILED = ctypes.c_void_p(-1).value


class CodeBuffer:
    """Memory for code, seen twice: writable, and executable; never both at one address.

    It is shared anonymous memory: mremap(2) with an old size of 0 gives a second mapping of it, and Linux perf looks
    for the names of what runs there (watch.py), which it does not do for a file.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rw = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self._pin = ctypes.c_char.from_buffer(self._rw)
        self.rw = ctypes.addressof(self._pin)
        self.rx: int = _libc.mremap(self.rw, 0, size, _MREMAP_MAYMOVE)
        if self.rx == _FAILED or _libc.mprotect(self.rx, size, mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), f"no executable memory: {os.strerror(ctypes.get_errno())}")
        self.view = memoryview(self._rw)

    def prepare(self, start: int, size: int) -> None:
        """Have the pages of a range at once, where the kernel can (Linux 5.14), instead of by two faults each."""
        _libc.madvise(self.rw + start, size, _MADV_POPULATE_WRITE)
        _libc.madvise(self.rx + start, size, _MADV_POPULATE_READ)

    def relax(self) -> None:
        """Let go of the writable alias's page-table entries: else every page of code counts twice as resident."""
        self._rw.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.view.release()
        del self._pin
        self._rw.close()
        _libc.munmap(self.rx, self.size)
