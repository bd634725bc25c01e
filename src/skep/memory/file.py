"""The file that a guest's RAM is made of, and the kind of pages that the host makes it of."""

from __future__ import annotations

import ctypes
import os

from skep.errors import HostError

SMALL, TRANSPARENT = 0, 1
_MFD_HUGETLB, _MFD_HUGE_SHIFT = 4, 26
_SHARED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"

# The calls that make a file system which is mounted nowhere (fsopen(2) and what follows from it).
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _SET_STRING, _CREATE = 1, 1, 6
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8

_syscall = ctypes.CDLL(None, use_errno=True).syscall


def ram_file(size: int, huge: int | None) -> tuple[int, int]:
    """A file of ``size`` bytes that has no name, and what its pages are: SMALL, TRANSPARENT, or bytes of a huge page.

    ``huge`` is what they are to be; None: TRANSPARENT where the host makes such, else SMALL. Raises HostError."""
    if huge is not None and huge > TRANSPARENT:
        return _sized(_from_pool(huge), size), huge
    if huge != SMALL:
        if _setting(_SHARED) in ("always", "within_size", "advise", "force"):
            return _sized(_memfd(0), size), TRANSPARENT
        try:
            return _sized(_on_a_tmpfs_of_its_own(), size), TRANSPARENT
        except OSError as error:
            if huge is not None:
                what = f"this host makes no transparent huge pages of shared memory: {error.strerror}"
                todo = f"be root, write advise to {_SHARED}, or ask for 2M"
                raise HostError(what, "memory.hugepages", todo) from None
    return _sized(_memfd(0), size), SMALL


def _from_pool(huge: int) -> int:
    try:
        return _memfd(_MFD_HUGETLB | huge.bit_length() - 1 << _MFD_HUGE_SHIFT)
    except OSError as error:
        what = f"this host has no pages of {huge >> 20} MiB: {error.strerror}"
        raise HostError(what, "memory.hugepages", "use off") from None


def _memfd(flags: int) -> int:
    return os.memfd_create("skep-guest", os.MFD_CLOEXEC | flags)


def _on_a_tmpfs_of_its_own() -> int:
    """Linux makes huge pages of shared memory where the file system says so, and memfd's says what the whole host does:
    ``never``, as Linux comes. To make another one takes CAP_SYS_ADMIN; it goes with its only file."""
    system = _call(_FSOPEN, b"tmpfs", _CLOEXEC)
    try:
        for key, value in ((b"huge", b"advise"), (b"size", b"0")):  # without a limit
            _call(_FSCONFIG, system, _SET_STRING, key, value, 0)
        _call(_FSCONFIG, system, _CREATE, None, None, 0)
        root = _call(_FSMOUNT, system, _CLOEXEC, _NOSUID | _NODEV | _NOEXEC)
    finally:
        os.close(system)
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root)
    finally:
        os.close(root)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = _syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _sized(fd: int, size: int) -> int:
    os.ftruncate(fd, size)
    return fd


def _setting(path: str) -> str:
    """Of the choices in a file of sysfs the one in brackets; empty where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return ""
