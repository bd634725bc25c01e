"""Machine code as Python functions."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import termios

from skep.engine.amd64.native import Builtin, ioctl


def test_an_ioctl_says_what_the_kernel_does() -> None:
    """FIONBIO takes a pointer, which is null; FIOCLEX has no argument, and works; there is no such request as 1."""
    read, write = os.pipe()
    try:
        os.set_inheritable(read, True)
        assert Builtin(ioctl(termios.FIOCLEX))(read)() == 0
        assert fcntl.fcntl(read, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert Builtin(ioctl(termios.FIONBIO))(read)() == -errno.EFAULT
        assert Builtin(ioctl(1))(read)() == -errno.ENOTTY
        assert Builtin(ioctl(1))(1 << 30)() == -errno.EBADF
    finally:
        os.close(read)
        os.close(write)


def test_an_ioctl_outlives_who_made_it() -> None:
    read, write = os.pipe()
    try:
        calls = [Builtin(ioctl(termios.FIOCLEX))(fd) for fd in (read, write) for _ in range(100)]
        gc.collect()
        assert [call() for call in calls] == [0] * 200
    finally:
        os.close(read)
        os.close(write)
