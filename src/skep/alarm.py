"""A timer of the host's kernel that one thread sleeps on and any thread may set, without waking the sleeper."""

from __future__ import annotations

import ctypes
import os
import time

from skep.errors import HostError

_libc = ctypes.PyDLL(None, use_errno=True)  # setting takes a microsecond: not worth giving the interpreter away
_NS = 1_000_000_000


class Alarm:
    """Goes off once for each time it was set (timerfd_create(2))."""

    def __init__(self) -> None:
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC)
        if self._fd < 0:
            why = os.strerror(ctypes.get_errno())
            raise HostError(f"no timer is to be had: {why}", "timerfd_create", "close files")
        self._spec = (ctypes.c_int64 * 4)()  # the interval, which stays zero, and the value: seconds, nanoseconds

    def set(self, ns: int) -> None:
        """Go off in ``ns`` nanoseconds, now if that is not positive, instead of when it was to. The caller sees to it
        that no two threads do this at a time."""
        self._spec[2], self._spec[3] = divmod(max(ns, 1), _NS)
        _libc.timerfd_settime(self._fd, 0, self._spec, None)

    def cancel(self) -> None:
        """Not at all, unless it did already."""
        self._spec[2] = self._spec[3] = 0
        _libc.timerfd_settime(self._fd, 0, self._spec, None)

    def fileno(self) -> int:
        return self._fd

    def wait(self) -> None:
        """Sleep until it goes off; returns at once if it did since the last time."""
        os.read(self._fd, 8)

    def close(self) -> None:
        """Nobody waits any more."""
        os.close(self._fd)
