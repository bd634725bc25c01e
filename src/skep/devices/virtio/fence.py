"""A full memory fence, for the places where virtio needs a store to be seen before a later load is made.

Both sides of a virtqueue write an index and then read what the other side wrote (virtio 1.2, 2.7.7 and 2.7.10). All
processors that we run on may make the load first; if both sides do, neither sees the other's word and a notification is
lost for good. Every other order that a virtqueue needs, load after load and store after store, x86 keeps by itself, and
CPython's interpreter executes one bytecode after the other.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

Fence = Callable[[], object]

_MEMBARRIER = {"x86_64": 324, "aarch64": 283}  # the system call's number
_PRIVATE_EXPEDITED = 1 << 3
_REGISTER_PRIVATE_EXPEDITED = 1 << 4


def make_fence() -> Fence:
    """A function for one thread's use: all stores made before a call are seen by every processor before any load made
    after it."""
    return lock_fence() if os.uname().machine == "x86_64" else membarrier_fence()


def lock_fence() -> Fence:
    """On x86: taking a free lock is a LOCK CMPXCHG, and no load passes a locked instruction, nor stays a store before
    it unseen (Intel SDM 3, 9.2.3.9). 0.1 us, where calling MFENCE through ctypes would take longer.

    The lock is free because no other thread has it; a thread that found it taken might execute no such instruction.
    """
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def fence() -> None:
        acquire()
        release()

    return fence


def membarrier_fence() -> Fence:
    """Elsewhere a lock orders less, and membarrier(2) does: 0.4 us."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    number = _MEMBARRIER[os.uname().machine]
    if syscall(number, _REGISTER_PRIVATE_EXPEDITED, 0, 0):
        raise OSError(ctypes.get_errno(), f"membarrier: {os.strerror(ctypes.get_errno())}")

    def fence() -> None:
        syscall(number, _PRIVATE_EXPEDITED, 0, 0)

    return fence
