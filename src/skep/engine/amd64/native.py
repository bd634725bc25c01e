"""A few bytes of host machine code as Python functions: RDTSC, CPUID, XGETBV have no other door.

The page is written first and made executable afterwards, never both at once.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable
from typing import Any

from skep.errors import HostError


def function(code: bytes, result: Any, *arguments: Any, waits: bool = False) -> Callable[..., int]:
    """``code`` (System V calling convention, position independent) as a function of ctypes types.

    It runs with the GIL held, so it must be short, unless it ``waits``. Its page lives as long as the process: such
    functions are made once, at import. On a host of another architecture the function raises :class:`HostError` when
    called.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return _absent
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC):
        raise HostError("this system does not allow memory to become executable", "mprotect",
                        "allow it for this process (SELinux execmem, PaX MPROTECT)")
    made: Any = (ctypes.CFUNCTYPE if waits else ctypes.PYFUNCTYPE)(result, *arguments)(address)
    made.page = page  # the mapping lives as long as the function
    call: Callable[..., int] = made
    return call


def _absent(*_arguments: Any) -> int:
    raise HostError("this needs an x86-64 host", platform.machine(), "run an amd64 guest on an amd64 machine")
