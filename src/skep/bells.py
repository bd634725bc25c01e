"""Eventfds (eventfd(2)) that are added to without letting go of the interpreter: that takes a microsecond, after which
whoever got the interpreter meanwhile might keep it for thousands."""

from __future__ import annotations

import ctypes
import os

ring = ctypes.PyDLL(None).eventfd_write
"""``ring(fd, n)`` adds ``n``."""
ring.argtypes = (ctypes.c_int, ctypes.c_uint64)


def hang() -> int:
    """A new one, that does not block."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def answer(fd: int) -> int:
    """What was added since the last time, to an eventfd that does not block."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
