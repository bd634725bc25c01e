"""Requests of one kind, many of them at once: how fast an image answers."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from skep.block.backend import Buffers
from skep.block.format import SECTOR, Image
from skep.block.pool import Pool
from skep.block.queue import Transfers, Vector, locate
from skep.block.uring import make_ring

_PAGE = 4096
_MOST_THREADS = 64


@dataclass(frozen=True, slots=True)
class Load:
    count: int
    """Requests."""
    depth: int
    """How many of them at once."""
    size: int
    """Of one, bytes."""
    offset: int
    """Of the first."""
    step: int
    """From one to the next; behind the end it goes on at the beginning."""
    write: bool = False
    pattern: int = 0
    """The byte to write."""
    flush_interval: int = 0
    """A flush after so many writes, which waits for those before it; 0: none."""
    threads: bool = False
    """What has to wait for the host does so on threads, not in an io_uring."""


def run(image: Image, load: Load) -> None:
    """Send them all, and wait for their ends. Raises OSError where the image refuses one."""
    if load.size <= 0 or image.size < load.size or load.depth < 1:
        raise OSError(errno.EINVAL, "requests do not fit into the disk", image.path)
    stride = -(-load.size // _PAGE) * _PAGE
    page = mmap.mmap(-1, load.depth * stride)  # aligned, as O_DIRECT wants it
    page.write(bytes([load.pattern & 0xFF]) * len(page))
    view = memoryview(page)
    rooms: list[Buffers] = [[view[at : at + load.size]] for at in range(0, len(view), stride)]
    ring = None if load.threads else make_ring(1 << load.depth.bit_length())
    way = _Threads(image, load.write, rooms) if ring is None else _Ring(image, load.write, rooms, Transfers(ring))
    try:
        _send(image, load, rooms, way)
    finally:
        way.close()


def _send(image: Image, load: Load, rooms: list[Buffers], way: _Way) -> None:
    free = list(range(load.depth))
    cached, flush_interval = image.file.alignment == 1, load.flush_interval if load.write else 0
    offset, limit = load.offset, image.size - load.size
    for number in range(1, load.count + 1):
        if offset > limit:
            offset = (offset - limit) % (limit + 1) if load.step % (limit + 1) else 0
            offset -= offset % min(load.size, SECTOR)
        if cached and load.write:  # a copy into the host's memory; if that has to wait, then for what others wait for
            image.pwritev(rooms[0], offset)
        elif not (cached and image.read_now(rooms[free[-1]], offset)):
            way.start(free.pop(), offset)
            if not free:
                free += way.wait()
        if flush_interval and number % flush_interval == 0:
            _wait_for_all(free, load.depth, way)
            image.flush()
        offset += load.step
    _wait_for_all(free, load.depth, way)


def _wait_for_all(free: list[int], depth: int, way: _Way) -> None:
    while len(free) < depth:
        free += way.wait()


class _Way(Protocol):
    """How requests wait. Each has one of the rooms."""

    def start(self, which: int, offset: int) -> None: ...

    def wait(self) -> Iterable[int]:
        """Those whose requests have ended, one at least. Raises OSError for the first that failed."""

    def close(self) -> None: ...


class _Ring:
    def __init__(self, image: Image, write: bool, rooms: list[Buffers], transfers: Transfers) -> None:
        self._image, self._write, self._rooms, self._transfers = image, write, rooms, transfers
        self._vectors = [Vector(room) for room in rooms]
        self._dones = [partial(self._done, which) for which in range(len(rooms))]
        self._ended: list[int] = []
        self._least = max(1, len(rooms) // 4)
        """What is handed over in one go."""
        self._error: Exception | None = None

    def start(self, which: int, offset: int) -> None:
        found = locate(self._image, self._write, self._vectors[which], offset, self._dones[which])
        if found is not None:
            self._transfers.start(found)
        else:
            _move(self._image, self._write)(self._rooms[which], offset)
            self._ended.append(which)

    def _done(self, which: int, error: Exception | None) -> None:
        self._ended.append(which)
        self._error = self._error or error

    def wait(self) -> list[int]:
        """Not for the first of many, since each handing over costs as much as several requests."""
        if not self._ended:
            self._transfers.wait(min(self._least, len(self._transfers)))
        if self._error is not None:
            raise self._error
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        while len(self._transfers):
            self._transfers.wait()
        self._transfers.close()


class _Threads:
    def __init__(self, image: Image, write: bool, rooms: list[Buffers]) -> None:
        self._move, self._rooms = _move(image, write), rooms
        self._pool = Pool("bench", min(len(rooms), _MOST_THREADS))
        self._ended: SimpleQueue[tuple[int, Exception | None]] = SimpleQueue()

    def start(self, which: int, offset: int) -> None:
        self._pool.submit(partial(self._do, which, offset))

    def _do(self, which: int, offset: int) -> None:
        error: Exception | None = None
        try:
            self._move(self._rooms[which], offset)
        except Exception as e:
            error = e
        self._ended.put((which, error))

    def wait(self) -> list[int]:
        which, error = self._ended.get()
        if error is not None:
            raise error
        return [which]

    def close(self) -> None:
        self._pool.close()


def _move(image: Image, write: bool) -> Callable[[Buffers, int], None]:
    return image.pwritev if write else image.preadv
