"""Runs machine code in this process, for tests: a code buffer mapped twice, and the state block in GS."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from skep.engine.translate.compiler import CompiledUnit, compile_functions
from skep.engine.translate.layout import StateBlock

_ARCH_PRCTL = 158
_ARCH_SET_GS = 0x1001
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class CodeBuffer:
    """Code that can be written and run, through two mappings of one file; never both through one."""

    def __init__(self, size: int = 1 << 16) -> None:
        self._size = size
        fd = os.memfd_create("code")
        try:
            os.ftruncate(fd, size)
            self._writable = mmap.mmap(fd, size)
            address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_SHARED, fd, 0)
            if address in (None, ctypes.c_void_p(-1).value):
                raise OSError(ctypes.get_errno(), "mmap")
        finally:
            os.close(fd)
        self.address: int = address

    def write(self, code: bytes) -> None:
        self._writable[: len(code)] = code

    def close(self) -> None:
        _libc.munmap(self.address, self._size)
        self._writable.close()


class Native:
    """Compiled functions, callable by name with the state block ``state``, on the thread that made this."""

    def __init__(self, functions: Sequence[Callable[..., Any]], state: StateBlock | None = None) -> None:
        self._buffer = CodeBuffer()
        self.unit: CompiledUnit = compile_functions(functions, self._buffer.address)
        self._buffer.write(self.unit.code)
        if state is not None and _libc.syscall(_ARCH_PRCTL, _ARCH_SET_GS, ctypes.c_ulong(state.address)):
            raise OSError(ctypes.get_errno(), "arch_prctl")

    def __getattr__(self, name: str) -> Callable[..., int]:
        address = self._buffer.address + self.unit.entry[name]
        function = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)

        def call(*args: int) -> int:
            result: int = function(*(ctypes.c_uint64(a) for a in args))
            return result

        return call

    def __enter__(self) -> Native:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._buffer.close()
