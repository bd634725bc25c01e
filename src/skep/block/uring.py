"""Linux's io_uring (io_uring(7)), by system calls: many transfers at once from one thread.

A ring is memory shared with the kernel: *submission entries* of 64 bytes, which we fill, *completion entries* of 16,
which it fills, and a head and a tail of each. One system call hands over what was prepared, and waits for what ended.

Nothing here orders memory: a ring belongs to the thread that made it, and its completions are written either by that
thread in its own system calls (IORING_SETUP_DEFER_TASKRUN, Linux 6.1) or, on older kernels, before that call returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from array import array

_SETUP, _ENTER = 425, 426  # system calls, of the same numbers on every architecture
_GETEVENTS = 1 << 0
_SUBMIT_ALL, _SINGLE_ISSUER, _DEFER_TASKRUN = 1 << 7, 1 << 12, 1 << 13
_SINGLE_MMAP, _NODROP = 1 << 0, 1 << 1  # features, of Linux 5.4 and 5.5
_RINGS, _ENTRIES = 0, 0x1000_0000  # what mmap maps, by offset
_ENTRY, _COMPLETION = 64, 16

# struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd; of the
# submission ring the offsets of head, tail, ring_mask, ring_entries, flags, dropped and array; of the completion ring
# those of head, tail, ring_mask, ring_entries, overflow, cqes and flags.
_PARAMS = struct.Struct("=7I12x 7I12x 7I12x")

READV, WRITEV, READ, WRITE = 1, 2, 22, 23
"""Operations (enum io_uring_op)."""

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class Ring:
    """Of one thread: the one that makes it. Raises OSError where the kernel has none, or a filter refuses it.

    The caller keeps no more than ``entries`` operations under way, and their memory where it is until they ended; it
    waits for the last of them before it closes the ring.
    """

    def __init__(self, entries: int) -> None:
        """``entries`` is a power of 2."""
        self.entries = entries
        self._fd, found = _set_up(entries)
        try:
            self._map(found)
        except BaseException:
            os.close(self._fd)
            raise

    def _map(self, found: tuple[int, ...]) -> None:
        made, completions = found[:2]
        sq_tail, sq_mask, sq_array = found[8], found[9], found[13]
        cq_head, cq_tail, cq_mask, cq_entries = found[14], found[15], found[16], found[19]
        size = max(sq_array + 4 * made, cq_entries + _COMPLETION * completions)
        self._rings = mmap.mmap(self._fd, size, offset=_RINGS)
        self._entry_memory = mmap.mmap(self._fd, made * _ENTRY, offset=_ENTRIES)
        words = self._words = memoryview(self._rings).cast("I")
        self._signed = memoryview(self._rings).cast("i")
        self._entries = memoryview(self._entry_memory).cast("Q")
        self._entries[:] = array("Q", bytes(made * _ENTRY))
        words[sq_array // 4 : sq_array // 4 + made] = array("I", range(made))
        self._sq_tail, self._sq_mask = sq_tail // 4, words[sq_mask // 4]
        self._cq_head, self._cq_tail, self._cq_mask = cq_head // 4, cq_tail // 4, words[cq_mask // 4]
        self._first = cq_entries // 4
        self._tail, self._head = words[self._sq_tail], words[self._cq_head]
        self._prepared = 0

    def prepare(self, operation: int, fd: int, offset: int, address: int, length: int, number: int) -> None:
        """An operation for the next :meth:`enter`: ``length`` bytes at ``address``, or of a vector so many pieces.
        ``number`` is what its completion will be told by, of 32 bits."""
        entries, at = self._entries, (self._tail & self._sq_mask) * 8
        entries[at] = operation | fd << 32
        entries[at + 1] = offset
        entries[at + 2] = address
        entries[at + 3] = length
        entries[at + 4] = number
        self._tail = (self._tail + 1) & 0xFFFF_FFFF
        self._prepared += 1

    def enter(self, least: int) -> None:
        """Hand over what was prepared, and wait until so many have ended that nobody has taken yet."""
        self._words[self._sq_tail] = self._tail
        while True:
            done = _syscall(_ENTER, self._fd, self._prepared, least, _GETEVENTS, None, 0)
            if done >= 0:
                self._prepared -= done
                if not self._prepared:
                    return
            elif (code := ctypes.get_errno()) not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise OSError(code, f"io_uring_enter: {os.strerror(code)}")

    def take(self) -> list[tuple[int, int]]:
        """What has ended: (number, result), the result being bytes moved, or an error's number, negative."""
        words, signed, first, mask = self._words, self._signed, self._first, self._cq_mask
        tail = words[self._cq_tail]
        head, ended = self._head, []
        while head != tail:
            at = first + (head & mask) * 4
            ended.append((words[at], signed[at + 2]))
            head = (head + 1) & 0xFFFF_FFFF
        self._head = words[self._cq_head] = head
        return ended

    def close(self) -> None:
        """Closing twice is closing once."""
        if self._fd >= 0:
            for view in (self._words, self._signed, self._entries):
                view.release()
            self._rings.close()
            self._entry_memory.close()
            os.close(self._fd)
            self._fd = -1


def _set_up(entries: int) -> tuple[int, tuple[int, ...]]:
    """The ring's descriptor, and what the kernel says of it."""
    for flags in (_SUBMIT_ALL | _SINGLE_ISSUER | _DEFER_TASKRUN, 0):
        room = ctypes.create_string_buffer(_PARAMS.pack(0, 0, flags, *[0] * 18), _PARAMS.size)
        fd = _syscall(_SETUP, entries, room)
        if fd >= 0:
            found = _PARAMS.unpack(room.raw)
            if found[5] & (_SINGLE_MMAP | _NODROP) == _SINGLE_MMAP | _NODROP:
                return fd, found
            os.close(fd)
            raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
    code = ctypes.get_errno()
    raise OSError(code, f"io_uring_setup: {os.strerror(code)}")


def make_ring(entries: int) -> Ring | None:
    """None where there is no io_uring: before Linux 5.6, or refused by a filter or the administrator."""
    with contextlib.suppress(OSError):
        return Ring(entries)
    return None
