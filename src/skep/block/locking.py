"""Image locks that QEMU understands, and Skep understands QEMU's.

The protocol is that of QEMU's ``block/file-posix.c``: open-file-description locks (fcntl(2), F_OFD_SETLK) on single
bytes. Each permission has a number; whoever *uses* permission p holds a shared lock on byte 100 + p, and whoever does
not *share* it with others holds a shared lock on byte 200 + p. All locks are shared ones, so that descriptors open
for reading can hold them; a conflict is found by asking, after one's own locks are in place, whether an exclusive
lock could be had on the opposite bytes. Two that start together may refuse each other; two writers never both pass.

The locks go with the last descriptor of the open file, however the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import IntEnum

from skep.errors import HostError, UserError

_USED = 100
_UNSHARED = 200
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of the 64-bit ABIs


class Permission(IntEnum):
    """QEMU's BLK_PERM_*, by bit number."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


def lock_image(fd: int, path: str, *, write: bool) -> None:
    """Hold ``path``, open as ``fd``, against every other writer; with ``write``, also against every reader that relies
    on nobody writing: a VM does, ``qemu-img info`` does not.

    Raises UserError, naming the holder where /proc shows it.
    """
    used = [Permission.CONSISTENT_READ, Permission.WRITE] if write else [Permission.CONSISTENT_READ]
    unshared = [Permission.WRITE, Permission.RESIZE]
    for byte in [_USED + p for p in used] + [_UNSHARED + p for p in unshared]:
        _shared_lock(fd, path, byte)
    for byte in [_UNSHARED + p for p in used] + [_USED + p for p in unshared]:
        if _held_by_another(fd, path, byte):
            raise UserError(f"the image is in use by {_holder(fd, byte)}", path, "two VMs may share it only read-only")


def _shared_lock(fd: int, path: str, byte: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(f"the image is in use by {_holder(fd, byte)}", path) from None
        raise _no_locks(path, e) from None


def _held_by_another(fd: int, path: str, byte: int) -> bool:
    """Somebody else holds a lock on the byte: an exclusive one would conflict with it."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as e:
        raise _no_locks(path, e) from None
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _no_locks(path: str, error: OSError) -> HostError:
    return HostError(f"this file system cannot lock files: {error.strerror}", path, "lock=false opens it unprotected")


def _holder(fd: int, byte: int) -> str:
    """Who holds a lock on the byte: /proc/locks has no process id for these locks, but /proc/PID/fdinfo lists them."""
    from pathlib import Path  # for who has to wait, not for every image that is opened

    mine = os.fstat(fd)
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            for link in (process / "fd").iterdir():
                if process.name == str(os.getpid()) and link.name == str(fd):
                    continue
                there = link.stat()
                if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
                    continue
                if _covers((process / "fdinfo" / link.name).read_text(), byte):
                    if process.name == str(os.getpid()):
                        return "another disk of this VM"
                    return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue  # not ours to look into, or gone meanwhile
    return "another process"


def _covers(fdinfo: str, byte: int) -> bool:
    """A line is ``lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101``; the end may be EOF."""
    for line in fdinfo.splitlines():
        if line.startswith("lock:"):
            first, last = line.split()[-2:]
            if int(first) <= byte and (last == "EOF" or byte <= int(last)):
                return True
    return False
