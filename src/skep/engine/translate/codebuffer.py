"""Memory for translated code, never writable and executable at one address."""

from __future__ import annotations

import ctypes
import mmap
import os


class CodeBuffer:
    """Memory for code, seen twice: writable, and executable; never both at one address."""

    def __init__(self, size: int) -> None:
        self.size = size
        fd = os.memfd_create("skep-code")
        try:
            os.ftruncate(fd, size)
            self._rw = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._rx = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        finally:
            os.close(fd)
        self.view = memoryview(self._rw)
        self._pin = ctypes.c_char.from_buffer(self._rw)
        self.rw = ctypes.addressof(self._pin)
        self.rx = _address_of(self._rx)

    def relax(self) -> None:
        """Let go of the writable alias's page-table entries: else every page of code counts twice as resident."""
        self._rw.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.view.release()
        del self._pin
        self._rw.close()
        self._rx.close()


def _address_of(mapping: mmap.mmap) -> int:
    """The address of a read-only mapping, which ctypes will not tell."""
    buffer = (ctypes.c_char * 80)()  # Py_buffer: void *buf is its first field
    api = ctypes.pythonapi
    if api.PyObject_GetBuffer(ctypes.py_object(mapping), buffer, 0):
        raise OSError("cannot take the address of a mapping")
    address: int = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint64))[0]
    api.PyBuffer_Release(buffer)
    return address
