"""Named locks with one order, which can say who holds and who waits for what.

Two threads that take two locks in opposite orders may stop each other for good. So every lock has a place in one
order, and taking a lock whose place lies before one already held raises at once, on the first run that does it,
rather than hanging on the unlucky one. A lock is never held over guest code or a blocking call.
"""

from __future__ import annotations

import enum
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from skep.errors import InternalError


class Order(enum.IntEnum):
    """Places in the order: a thread that holds one may take only those further down."""

    VM = 10
    """The VM's state machine: what it is doing, and what was asked of it."""
    POSTED = 15
    """Writes of guests that an engine kept back are made, one after the other."""
    BOARD = 20
    """Every register of every device of one VM; vCPU threads, timers and backends' callbacks take it."""
    BLOCK = 30
    """A disk's queue of requests."""
    COPY_ON_READ = 31
    """One change after the other of an image that keeps what is read from below it."""
    IMAGE_FLUSH = 32
    """Taken by one flush of an image after the other, while it writes."""
    IMAGE = 33
    """An image format's tables. Held while they are read from the image's file, so never taken by who must not wait."""
    FILE = 34
    """The length of an image's file, and its writes of part of a block."""
    BLOCK_LOG = 36
    """A log of what was written to a disk."""
    CHARDEV = 40
    """A serial backend's buffers."""
    CLOCK = 50
    """A guest clock's queue of timers."""
    KVM_CLOCK = 52
    """What guests are told of a clock, in their memory."""
    MAP = 55
    """What guest memory is where. Held while engines follow its changes."""
    ENGINE = 60
    """An engine's own structures: translated code, memory slots."""
    MEMORY = 70
    """Which pages of guest memory are dirty."""


class _Held(threading.local):
    """The orders that this thread holds, the innermost last."""

    def __init__(self) -> None:
        self.orders: list[int] = []


_held = _Held()
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """A lock that its thread may take again while it holds it. Locks of equal order do not nest."""

    __slots__ = ("__weakref__", "_after", "_depth", "_inner", "_owner", "_waiting", "name", "order")

    def __init__(self, name: str, order: int) -> None:
        self.name = name
        self.order = int(order)
        self._inner = threading.Lock()
        self._owner = 0
        self._depth = 0
        self._waiting: set[int] = set()
        self._after: tuple[Callable[[], None], ...] = ()
        _locks.add(self)

    def __enter__(self) -> None:
        me = threading.get_ident()
        # Only this thread can have made _owner its own ident, so the unlocked read is safe.
        if self._owner == me:
            self._depth += 1
            return
        orders = _held.orders
        if orders and orders[-1] >= self.order:
            raise InternalError(f"lock {self.name!r} (order {self.order}) taken while holding order {orders[-1]}")
        if not self._inner.acquire(False):
            self._waiting.add(me)
            try:
                self._inner.acquire()
            finally:
                self._waiting.discard(me)
        self._owner = me
        orders.append(self.order)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner != threading.get_ident():
            raise InternalError(f"lock {self.name!r} released by a thread that does not hold it")
        if self._depth:
            self._depth -= 1
            return
        _held.orders.pop()
        after, self._after = self._after, ()
        self._owner = 0
        self._inner.release()
        for job in after:
            job()

    def try_enter(self) -> bool:
        """As entering, if that takes no waiting and this thread holds no lock of this place or behind; leave with
        ``__exit__(None, None, None)``. False: not entered."""
        orders = _held.orders
        if (orders and orders[-1] >= self.order) or not self._inner.acquire(False):
            return False
        self._owner = threading.get_ident()
        orders.append(self.order)
        return True

    def after(self, job: Callable[[], None]) -> None:
        """The calling thread holds this lock, and is to do ``job`` as soon as it holds it no more."""
        self._after = (*self._after, job)

    def held(self) -> bool:
        """The calling thread holds this lock."""
        return self._owner == threading.get_ident()


class Holding(NamedTuple):
    """Who has to do with one lock at this moment; threads by ``threading.get_ident``, as names need not be unique."""

    lock: str
    holder: int | None
    waiting: tuple[int, ...]


def holders() -> list[Holding]:
    """Every lock of this process that is held or waited for: what to read when nothing moves. Takes none of them."""
    found = []
    for lock in sorted(_every_lock(), key=lambda lock: (lock.order, lock.name)):
        owner, waiting = lock._owner, tuple(sorted(lock._waiting))
        if owner or waiting:
            found.append(Holding(lock.name, owner or None, waiting))
    return found


def _every_lock() -> list[Lock]:
    while True:
        try:
            return list(_locks)
        except RuntimeError:  # one was made meanwhile
            continue
