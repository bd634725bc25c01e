"""A layer that logs what a guest wrote and when it was durable, and makes the images that a loss of power could leave.

The promise of a disk is that whatever a completed flush covers survives. A :class:`Recorder` under the device writes
a log of every write, with its data, and of every completed flush. From the log, :func:`replay` makes the image as it
would be had the power gone at any point: the writes that a flush covered are there; of the others, none, or any that
a random generator chooses, sector by sector.

The log is a file of entries, each appended with one write(2): ``magic, kind, offset, length`` and, for writes and
marks, ``length`` bytes. Whoever has the file open for appending may add marks of his own between them: what a guest
had printed by then, say.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from skep.block.backend import Buffers, File, Located
from skep.block.format import SECTOR
from skep.block.over import Over
from skep.errors import UserError
from skep.locks import Lock, Order

_HEADER = struct.Struct("<4sB3xQQ")
_MAGIC = b"skpl"
_ZEROES = bytes(1 << 20)


class Kind(IntEnum):
    WRITE = 1
    """``offset``: where, in bytes. Logged when the write has completed."""
    FLUSH = 2
    """``offset``: how many of the writes logged so far it covers, namely those that had completed when it began."""
    MARK = 3
    """``data``: whatever the one who set the mark wants to find again."""
    ZEROES = 4
    """``data``: how many, 8 bytes little-endian. Stands for as many writes as there are MiB of them, begun ones
    included, and is read as those."""


@dataclass(frozen=True, slots=True)
class Entry:
    kind: Kind
    offset: int
    data: bytes


class Log:
    """The file that the entries go to."""

    def __init__(self, path: str, write_cache: bool) -> None:
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise UserError(f"the log of writes cannot be made: {e.strerror}", path) from None
        self._lock = Lock("disk log", Order.BLOCK_LOG)
        self._write_cache = write_cache
        self.writes = 0
        """How many there are."""

    def write(self, offset: int, data: bytes) -> None:
        self._add(Kind.WRITE, offset, data, 1)

    def zeroes(self, offset: int, length: int) -> None:
        self._add(Kind.ZEROES, offset, length.to_bytes(8, "little"), -(-length // len(_ZEROES)))

    def _add(self, kind: Kind, offset: int, data: bytes, writes: int) -> None:
        with self._lock:
            _append(self._fd, kind, offset, data)
            self.writes += writes
            if not self._write_cache:
                _append(self._fd, Kind.FLUSH, self.writes)

    def flushed(self, covered: int) -> None:
        _append(self._fd, Kind.FLUSH, covered)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Recorder(Over):
    """A layer over a file (below a format, or above one). A request completes when what is below has it, and the log.

    What a guest discards is logged as zeros, which is what our backends leave there.
    """

    def __init__(self, below: File, path: str) -> None:
        super().__init__(below)
        self._log = Log(path, below.write_cache)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        # One copy for both: the guest may change its buffers meanwhile, and image and log must not differ.
        data = b"".join(buffers)
        self.below.pwritev([memoryview(data)], offset)
        self._log.write(offset, data)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return False  # a log of its own to write

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        return None if write else self.below.locate(offset, length, write)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)
        self._log.zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.below.write_zeroes(offset, length, unmap)
        self._log.zeroes(offset, length)

    def resize(self, size: int) -> None:
        grows = size > self.size
        self.below.resize(size)
        if grows:  # the new length is as durable as a write of the last byte
            self._log.write(size - 1, b"\0")

    def allocate(self, offset: int, length: int) -> None:
        grows = offset + length > self.size
        self.below.allocate(offset, length)
        if grows:
            self._log.write(offset + length - 1, b"\0")

    def flush(self) -> None:
        covered = self._log.writes
        self.below.flush()
        self._log.flushed(covered)

    def close(self) -> None:
        self.below.close()
        self._log.close()


def mark(log: int, text: bytes) -> None:
    """Add a mark to a log, open for appending (O_APPEND) as the descriptor ``log``."""
    _append(log, Kind.MARK, 0, text)


def read_log(path: str) -> list[Entry]:
    """The entries of a log, up to the first that is not whole: a process that was killed may leave one."""
    entries = []
    with open(path, "rb") as file:
        while len(head := file.read(_HEADER.size)) == _HEADER.size:
            magic, kind, offset, length = _HEADER.unpack(head)
            if magic != _MAGIC:
                raise UserError("this is not a log of writes", path)
            data = file.read(length)
            if len(data) < length:
                break
            if kind == Kind.ZEROES:
                end = offset + int.from_bytes(data, "little")
                pieces = range(offset, end, len(_ZEROES))
                entries += [Entry(Kind.WRITE, at, _ZEROES[: end - at]) for at in pieces]
            else:
                entries.append(Entry(Kind(kind), offset, data))
    return entries


class Replay:
    """What a loss of power would leave, at one point of a log after another.

    ``image`` is a descriptor of the disk as it was at the log's start. :meth:`advance` makes it what is certainly left
    at a later point; :meth:`survivors` is what may be left besides.
    """

    def __init__(self, entries: Sequence[Entry], image: int) -> None:
        self._entries = entries
        self._image = image
        self._at = 0
        self._uncertain: list[Entry] = []
        """The writes up to here that no flush covers."""
        self._durable = 0
        """How many writes came before those."""

    def advance(self, to: int) -> None:
        """The power goes after the first ``to`` entries, which are no fewer than last time."""
        for entry in self._entries[self._at : to]:
            if entry.kind is Kind.WRITE:
                self._uncertain.append(entry)
            elif entry.kind is Kind.FLUSH:
                covered = max(0, entry.offset - self._durable)
                for write in self._uncertain[:covered]:
                    os.pwrite(self._image, write.data, write.offset)
                del self._uncertain[:covered]
                self._durable += covered
        self._at = to

    def survivors(self, rng: random.Random, sector: int = SECTOR) -> list[tuple[int, bytes]]:
        """Pieces, as (offset, data), that a disk may have written besides, in the order in which it did. Each
        ``sector`` bytes of a write are written whole or not at all.

        A disk may keep any sectors of the writes that no flush covers, and write them in any order, an older one over
        a newer one too. Sectors drawn one by one would hardly ever leave a large write whole beside another that is
        missing, and that is what journals fear; so sometimes whole writes are drawn, and all but one, and those up to
        some moment, the last of them torn.
        """
        writes = [(entry.offset, entry.data) for entry in self._uncertain]
        match rng.randrange(4):
            case 0:
                sectors = _sectors(writes, sector)
                rng.shuffle(sectors)
                return _some(sectors, rng)
            case 1:
                rng.shuffle(writes)
                return _some(writes, rng)
            case 2:
                pieces = _sectors(writes, sector) if rng.random() < 0.5 else writes
                if pieces:
                    del pieces[rng.randrange(len(pieces))]
                return pieces
            case _:
                kept = writes[: rng.randint(0, len(writes))]
                return kept[:-1] + _some(_sectors(kept[-1:], sector), rng)


def replay(entries: Sequence[Entry], image: int, survivors: random.Random | None = None) -> None:
    """Write to the descriptor ``image``, which holds the disk as it was at the log's start, what is left of it when the
    power goes after the last of ``entries``: a slice from the beginning of a log.

    Of the writes that no flush covers nothing is left, or, with ``survivors``, some (:meth:`Replay.survivors`).
    """
    log = Replay(entries, image)
    log.advance(len(entries))
    if survivors is not None:
        for offset, data in log.survivors(survivors):
            os.pwrite(image, data, offset)


def _sectors(writes: Sequence[tuple[int, bytes]], size: int) -> list[tuple[int, bytes]]:
    return [(offset + at, data[at : at + size]) for offset, data in writes for at in range(0, len(data), size)]


def _some(pieces: Sequence[tuple[int, bytes]], rng: random.Random) -> list[tuple[int, bytes]]:
    share = rng.random()
    return [piece for piece in pieces if rng.random() < share]


def _append(log: int, kind: Kind, offset: int, data: bytes = b"") -> None:
    head = _HEADER.pack(_MAGIC, kind, offset, len(data))
    if os.writev(log, (head, data)) != len(head) + len(data):
        raise OSError("the log of writes is short")
