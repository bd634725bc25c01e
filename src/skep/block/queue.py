"""Between who has many requests at once and an image: transfers that wait for the host without a thread each.

A transfer whose bytes lie in a row in a file of the host's goes there through an io_uring (:mod:`skep.block.uring`).
All others (into a new cluster, through a filter, on a host that has no io_uring) are calls of the image's, each on a
thread of a pool until it ends.

Nothing is kept in order here: whoever wants one request to come after another sends it when that one has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from skep.block.backend import BlockBackend, Buffers, Located, split
from skep.block.pool import Job, Pool
from skep.block.uring import READ, READV, WRITE, WRITEV, Ring, make_ring

Done = Callable[[Exception | None], None]
"""Is told of the end of a transfer, and raises nothing."""

_IOV_MAX = 1024  # Linux's UIO_MAXIOV
_ENTRIES = 256
_BELL = 0
_AGAIN = (errno.EAGAIN, errno.EINTR)


class Vector:
    """Buffers, as the kernel is told of them. Raises TypeError for memory that is only read: Python has no address of
    that."""

    __slots__ = ("_keep", "address", "bits", "buffers", "count", "length", "single")

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.single = len(buffers) == 1 and len(buffers[0]) > 0
        if self.single:
            self._keep: object = (start := ctypes.c_char.from_buffer(buffers[0]))
            self.address = ctypes.addressof(start)
            self.length = self.count = len(buffers[0])
            """``count`` is as the kernel wants it: of several pieces their number, of a single one its bytes."""
            self.bits = self.address | self.length
            """All addresses and lengths, or-ed: how they are aligned."""
            return
        starts = [ctypes.c_char.from_buffer(buffer) for buffer in buffers if len(buffer)]
        pieces = array("Q")
        for start, buffer in zip(starts, filter(len, buffers), strict=True):
            pieces.extend((ctypes.addressof(start), len(buffer)))
        self._keep = (starts, pieces)
        self.address = pieces.buffer_info()[0]
        self.length, self.count, self.bits = sum(pieces[1::2]), len(starts), 0
        for number in pieces:
            self.bits |= number


class Transfer(NamedTuple):
    """One that the kernel can do by itself."""

    write: bool
    vector: Vector
    place: Located
    done: Done


def locate(backend: BlockBackend, write: bool, vector: Vector, offset: int, done: Done) -> Transfer | None:
    """None: it is for the image to do."""
    if not vector.length or len(vector.buffers) > _IOV_MAX:
        return None
    place = backend.locate(offset, vector.length, write)
    if place is None:
        return None
    transfer = Transfer(write, vector, place, done)
    if (vector.bits | place.offset) & (place.file.alignment - 1):
        place.ended()
        return None
    return transfer


class Transfers:
    """Those that are under way in a ring. For the thread that made it; the ring is this object's own from now on."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._free = list(range(_BELL + 1, ring.entries))
        self._under_way: dict[int, Transfer] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def full(self) -> bool:
        return not self._free

    def start(self, transfer: Transfer) -> None:
        """Begin it with the next :meth:`wait`; not while ``full``."""
        write, vector, place, _ = transfer
        number = self._free.pop()
        self._under_way[number] = transfer
        operation = (WRITE if vector.single else WRITEV) if write else (READ if vector.single else READV)
        self._ring.prepare(operation, place.file.fd, place.offset, vector.address, vector.count, number)

    def wait(self, least: int = 1) -> bool:
        """Begin what was started, wait until so many have ended, and tell each of its end. True: the bell rang, which
        counts as one of them."""
        self._ring.enter(least)
        rang = False
        for number, result in self._ring.take():
            if number == _BELL:
                rang = True
                continue
            transfer = self._under_way.pop(number)
            self._free.append(number)
            error = None if result == transfer.vector.length else _finish(transfer, result)
            transfer.place.ended()
            transfer.done(error)
        return rang

    def hang(self, bell: int, room: Vector) -> None:
        """Have one reading of this eventfd under way, into eight bytes."""
        self._ring.prepare(READ, bell, 0, room.address, room.count, _BELL)

    def close(self) -> None:
        """None is under way."""
        self._ring.close()


def _finish(transfer: Transfer, result: int) -> OSError | None:
    """What the kernel did not do, or only in part: files may be asked for the rest, as by anybody."""
    if result < 0 and -result not in _AGAIN:
        return OSError(-result, os.strerror(-result), transfer.place.file.path)
    done = max(0, result)
    rest = split(transfer.vector.buffers, done)[1]
    move = transfer.place.file.pwritev if transfer.write else transfer.place.file.preadv
    try:
        move(rest, transfer.place.offset + done)
    except OSError as error:
        return error
    return None


class Queue:
    """Requests of one image, from one thread at a time. Threads come as they are needed: one for the ring, and up to
    ``threads`` for what the ring cannot do."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._pool = Pool(name, threads)
        self._waiting: deque[Transfer | None] = deque()
        self._thread: threading.Thread | None = None
        self._ring_missing = False
        self._rung = False
        """The bell was rung, and the ring's thread has not looked since."""
        self._bell = -1

    def submit(self, job: Job) -> None:
        """Something else, for a thread of the pool. A job raises nothing."""
        self._pool.submit(job)

    def transfer(self, backend: BlockBackend, write: bool, buffers: Buffers, offset: int, done: Done) -> None:
        """``done`` is called on another thread, with an OSError where the host refused it."""
        found = None
        if not self._ring_missing:
            with contextlib.suppress(TypeError, OSError):  # of which the image's own call tells, if it has them too
                found = locate(backend, write, Vector(buffers), offset, done)
        if found is None:
            self._pool.submit(lambda: _call(backend.pwritev if write else backend.preadv, buffers, offset, done))
        else:
            self._to_ring(found)

    def close(self) -> None:
        """Everything has ended, nothing follows. Closing twice is closing once."""
        if self._thread is not None:
            self._to_ring(None)
            self._thread.join()
            self._thread = None
            os.close(self._bell)
        self._pool.close()

    def _to_ring(self, transfer: Transfer | None) -> None:
        if self._thread is None:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name=f"{self._name} ring", daemon=True)
            self._thread.start()
        self._waiting.append(transfer)
        if not self._rung:
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        ring = make_ring(_ENTRIES)
        if ring is None:
            self._ring_missing = True
            self._without_ring()
            return
        transfers = Transfers(ring)
        room = Vector([memoryview(bytearray(8))])
        transfers.hang(self._bell, room)
        closing = False
        while not closing or len(transfers):
            if rang := transfers.wait():
                self._rung = False
            while self._waiting and not transfers.full:
                transfer = self._waiting.popleft()
                if transfer is None:
                    closing = True
                else:
                    transfers.start(transfer)
            if rang and not closing:
                transfers.hang(self._bell, room)
        transfers.close()

    def _without_ring(self) -> None:
        """No ring: what came in the belief that there is one is done here, one after another."""
        while True:
            os.eventfd_read(self._bell)
            self._rung = False
            while self._waiting:
                transfer = self._waiting.popleft()
                if transfer is None:
                    return
                error = _finish(transfer, 0)
                transfer.place.ended()
                transfer.done(error)


def _call(move: Callable[[Buffers, int], None], buffers: Buffers, offset: int, done: Done) -> None:
    error: Exception | None = None
    try:
        move(buffers, offset)
    except Exception as e:
        error = e
    done(error)
