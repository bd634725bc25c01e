"""What images of fixed-size blocks have in common: VHDX, VMDK, VHD, VDI and others that only differ in their tables.

A block is somewhere in the file, or all zeros, or absent: then the backing image has it, or it is zeros too. A write
to a block that is not there puts it at the end of the file. A block never leaves its place, and is never given to
another one: what a guest discards becomes a hole in the file, and keeps its entry. So a reader needs the lock only
to look where a block is, and a loss of power leaks space at most (:mod:`skep.block.tables`).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from skep.block.backend import Buffers, Extent, File, fill_zeroes, read_padded, split, write_zeroes_as_data
from skep.block.format import CheckResult, DamagedImage, Image
from skep.block.places import Owned, examine
from skep.block.tables import Table
from skep.locks import Lock, Order

MOST_PENDING = 16384
"""So many changes of tables wait for a flush, in 2 MiB of memory; then they are committed unasked."""
_COPY = 1 << 20
"""Bytes of memory for one copy of what a block held before."""
_AT_ONCE = 256
"""Entries that a check looks at while others wait for the lock."""


class Kind(Enum):
    DATA = auto()
    """In the file, as it is."""
    ZERO = auto()
    ABSENT = auto()
    """The backing image has it."""
    PACKED = auto()
    """In the file, compressed."""


class Run(NamedTuple):
    """Bytes of the disk that are kept in one way. ``host``: where in the file."""

    kind: Kind
    length: int
    host: int = 0


class SparseImage(Image):
    """An image of blocks of ``block_size`` bytes. A format says how a block's entry is read (:meth:`_find`) and bound
    to a place (:meth:`_bind`), and how its tables are committed. ``backing`` may be shorter than the disk.
    """

    locks_tables = True

    def __init__(
        self,
        file: File,
        size: int,
        block_size: int,
        table: Table,
    ) -> None:
        self.file = file
        self.path = file.path
        self.size = size
        self.block_size = block_size
        self.read_only = file.read_only
        self.write_cache = file.write_cache
        self._table = table
        self._unit = block_size
        """Bytes of the file that a new block takes."""
        self._end = file.size
        """Where the next one goes."""
        self._lock = Lock("image tables", Order.IMAGE)
        """Over the tables and ``_end``: held while a page of a table is read, never over a transfer of data."""
        self._flushing = threading.Lock()
        """One commit at a time."""
        self._lost: OSError | None = None
        self._filling: set[int] = set()
        """Blocks that somebody copies from the backing image."""
        self._filled = threading.Condition()
        self._closed = False

    # What a format says.

    def _find(self, block: int) -> tuple[Kind, int]:
        """Where the block is, under the lock. Raises OSError where its entry is nonsense."""
        raise NotImplementedError

    def _bind(self, block: int, host: int) -> None:
        """Its entry is to say that it is there, under the lock."""
        raise NotImplementedError

    def _bind_zero(self, block: int) -> bool:
        """Its entry is to say that it is all zeros, under the lock. False: the format has no such entry."""
        return False

    def _unpack(self, block: int) -> bytes | bytearray:
        """The contents of a PACKED block."""
        raise DamagedImage(self.path, f"block {block} is compressed")

    def _has_below(self) -> bool:
        """What is absent is in another image."""
        return self.backing is not None

    def _read_below(self, buffers: Buffers, offset: int) -> None:
        read_padded(self.backing, buffers, offset)

    def _commit(self) -> None:
        """Write the changes that :meth:`_begin` took; what they point at is durable."""
        with self._lock:
            units = list(self._table.units(512))
        for offset, data in units:
            self.file.pwritev([memoryview(data)], offset)
        self.file.flush()

    def _begin(self) -> bool:
        """Take the changes that wait, under the lock; False: none do."""
        return bool(self._table.begin())

    def _landed(self) -> None:
        self._table.landed()

    # The tables.

    def _runs(self, offset: int, length: int) -> Iterator[Run]:
        """How these bytes are kept, under the lock, in order; neighbours that can be moved at once are one."""
        size = self.block_size
        end = offset + length
        kind, run, host = Kind.ZERO, 0, 0
        while offset < end:
            block, start = divmod(offset, size)
            found, at = self._find(block)
            n = min(size - start, end - offset)
            if found is Kind.ABSENT and n == size:
                n = max(n, min((self._skip(block, -(-end // size)) - block) * size, end - offset))
            if run and found is kind and (at + start == host + run if kind is Kind.DATA else kind is not Kind.PACKED):
                run += n
            else:
                if run:
                    yield Run(kind, run, host)
                kind, run, host = found, n, at + start
            offset += n
        if run:
            yield Run(kind, run, host)

    def _skip(self, block: int, end: int) -> int:
        """The first block from here on that may be there, or ``end``. Large disks are mostly empty."""
        return self._table.skip(block, end)

    def _reserve(self, length: int | None = None) -> int:
        """A place of zeros for one block, under the lock. Raises OSError if the file cannot grow."""
        host = self._end
        end = host + (self._unit if length is None else length)
        self.file.resize(end)
        self._end = end
        return host

    def _place(self, offset: int, length: int) -> list[Run]:
        """Where a write goes. A block without contents gets its place here; one with contents elsewhere is ABSENT or
        PACKED, and to be copied."""
        with self._lock:
            first, last = offset // self.block_size, (offset + length - 1) // self.block_size
            for block in range(first, last + 1):
                kind, _ = self._find(block)
                if kind is Kind.ZERO or (kind is Kind.ABSENT and not self._has_below()):
                    self._bind(block, self._reserve())
            return list(self._runs(offset, length))

    # Transfers.

    def preadv(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        with self._lock:
            runs = list(self._runs(offset, length))
        if len(runs) == 1 and runs[0].kind is Kind.DATA:
            self.file.preadv(buffers, runs[0].host)
            return
        rest = list(buffers)
        for kind, n, host in runs:
            piece, rest = split(rest, n)
            if kind is Kind.DATA:
                self.file.preadv(piece, host)
            elif kind is Kind.PACKED:
                self._read_packed(piece, offset, n)
            elif kind is Kind.ABSENT:
                self._read_below(piece, offset)
            else:
                fill_zeroes(piece)
            offset += n

    def _read_packed(self, buffers: Buffers, offset: int, length: int) -> None:
        block, start = divmod(offset, self.block_size)
        data = memoryview(self._unpack(block))[start : start + length]
        at = 0
        for buffer in buffers:
            buffer[:] = data[at : at + len(buffer)]
            at += len(buffer)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        if not length:
            return
        self._must_be_writable()
        runs = self._place(offset, length)
        rest = buffers
        for kind, n, host in runs:
            piece, rest = split(rest, n)
            if kind is Kind.DATA:
                self.file.pwritev(piece, host)
                self._wrote(offset, n)
            else:
                self._copy_on_write(piece, offset, n)
            offset += n
        self._after_write()

    def _must_be_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the image is open for reading only", self.path)

    def _wrote(self, offset: int, length: int) -> None:
        """These bytes are in their blocks now: formats that know it of each sector note it."""

    def _after_write(self) -> None:
        if self._table.pending > (0 if not self.write_cache else MOST_PENDING):
            self.flush()

    def _copy_on_write(self, buffers: Buffers, offset: int, length: int) -> None:
        """Fill blocks that have their contents elsewhere with those and, over them, with the buffers."""
        rest = buffers
        while length:
            block, start = divmod(offset, self.block_size)
            n = min(self.block_size - start, length)
            piece, rest = split(rest, n)
            self._claim(block)
            try:
                self._fill_block(block, piece, start, n)
            finally:
                self._unclaim(block)
            offset += n
            length -= n

    def _fill_block(self, block: int, buffers: Buffers, start: int, length: int) -> None:
        with self._lock:
            kind, host = self._find(block)
            if kind is not Kind.DATA:
                host = self._reserve()
        if kind is not Kind.DATA:
            self._copy_old(block, kind, host, 0, start)
            self._copy_old(block, kind, host, start + length, self._block_length(block))
        self.file.pwritev(buffers, host + start)
        if kind is not Kind.DATA:
            with self._lock:
                self._bind(block, host)

    def _block_length(self, block: int) -> int:
        """The last block may reach beyond the disk."""
        return min(self.block_size, self.size - block * self.block_size)

    def _copy_old(self, block: int, kind: Kind, host: int, start: int, end: int) -> None:
        if start >= end or kind is Kind.ZERO:
            return
        if kind is Kind.PACKED:
            self.file.pwritev([memoryview(self._unpack(block))[start:end]], host + start)
        elif self._has_below():
            buffer = memoryview(bytearray(min(_COPY, end - start)))
            while start < end:
                piece = buffer[: end - start]
                self._read_below([piece], block * self.block_size + start)
                self.file.pwritev([piece], host + start)
                start += len(piece)

    def _claim(self, block: int) -> None:
        with self._filled:
            while block in self._filling:
                self._filled.wait()
            self._filling.add(block)

    def _unclaim(self, block: int) -> None:
        with self._filled:
            self._filling.discard(block)
            self._filled.notify_all()

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        run = self._at_once(offset, sum(map(len, buffers)))
        if run is None:
            return False
        if run.kind is Kind.DATA:
            return self.file.read_now(buffers, run.host)
        fill_zeroes(buffers)
        return True

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        run = self._at_once(offset, sum(map(len, buffers)))
        return run is not None and run.kind is Kind.DATA and self.file.write_now(buffers, run.host)

    def _at_once(self, offset: int, length: int) -> Run | None:
        """The one run that these bytes are, if its block's entry is in memory and nothing is to be fetched."""
        if length > self.block_size - offset % self.block_size or not self._lock.try_enter():
            return None
        try:
            if not self._table.cached(offset // self.block_size):
                return None
            runs = list(self._runs(offset, length))
        finally:
            self._lock.__exit__(None, None, None)
        if len(runs) != 1 or runs[0].kind is Kind.PACKED or (runs[0].kind is Kind.ABSENT and self._has_below()):
            return None
        return runs[0]

    def discard(self, offset: int, length: int) -> None:
        self._must_be_writable()
        with self._lock:
            runs = list(self._runs(offset, length))
        for kind, n, host in runs:
            if kind is Kind.DATA:
                self.file.discard(host, n)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._must_be_writable()
        while length:
            block, start = divmod(offset, self.block_size)
            n = min(self.block_size - start, length)
            whole = n == self._block_length(block)
            with self._lock:
                kind = self._find(block)[0]
                elsewhere = kind is Kind.PACKED or (kind is Kind.ABSENT and self._has_below())
                bound = whole and elsewhere and self._bind_zero(block)
                runs = [] if bound else list(self._runs(offset, n))
            at = offset
            for kind, part, host in runs:
                if kind is Kind.DATA:
                    self.file.write_zeroes(host, part, unmap)
                elif kind is Kind.PACKED or (kind is Kind.ABSENT and self._has_below()):
                    write_zeroes_as_data(self, at, part)
                at += part
            offset += n
            length -= n
        self._after_write()

    def flush(self) -> None:
        """Two waits for the host where tables changed since the last flush, one where they did not."""
        with self._flushing:
            if self._lost is not None:
                raise self._lost
            try:
                self._flush()
            except OSError as e:
                self._lost = e
                raise

    def _flush(self) -> None:
        with self._lock:
            changed = self._begin()
        self.file.flush()
        if changed:
            self._commit()
            with self._lock:
                self._landed()

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        self._check_room()
        while offset < end:
            step = min(end - offset, self.block_size << 14)
            with self._lock:
                runs = list(self._runs(offset, step))
            for kind, n, host in runs:
                if kind is Kind.DATA:
                    yield Extent(offset, n, data=True, host=host)
                elif kind is Kind.PACKED:
                    yield Extent(offset, n, data=True, compressed=True)
                else:
                    yield Extent(offset, n, zero=kind is Kind.ZERO, present=kind is Kind.ZERO)
                offset += n

    # As a whole.

    def _check_room(self) -> None:
        """Raises DamagedImage where the file has no room for all; only tables of tables can say so."""

    @property
    def cluster_size(self) -> int | None:
        return self.block_size

    @property
    def _blocks(self) -> int:
        return -(-self.size // self.block_size)

    def _reserved(self) -> Iterator[tuple[int, int]]:
        """Parts of the file, as (offset, length), that are no blocks."""
        raise NotImplementedError

    def _owned(self) -> Iterator[Owned]:
        """Everything that entries of tables point at, and entries that make no sense."""
        self._check_room()
        block, blocks = 0, self._blocks
        while block < blocks:
            found = []
            with self._lock:
                block = self._skip(block, blocks)
                end = min(block + _AT_ONCE, blocks)
                while block < end:
                    try:
                        kind, host = self._find(block)
                    except DamagedImage as e:
                        found.append(Owned(block, 0, 0, e.strerror))
                    else:
                        if kind is Kind.DATA:
                            found.append(Owned(block, *self._footprint(block, host)))
                        elif kind is Kind.ABSENT:
                            block = self._skip(block + 1, end)
                            continue
                    block += 1
            yield from found

    def _footprint(self, block: int, host: int) -> tuple[int, int]:
        """Offset and length of what a block takes in the file."""
        return host, self._block_length(block)

    def _forget(self, block: int) -> None:
        """Its entry is to say that it is not there, under the lock."""
        raise NotImplementedError

    def check(self) -> CheckResult:
        return examine(self.file, self._unit, self._reserved, self._owned, None)

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        """Entries that make no sense, or point at what another one has, become those of blocks that are not there."""

        self._must_be_writable()

        def forget(number: int) -> None:
            with self._lock:
                self._forget(number)
            self._after_write()

        result = examine(self.file, self._unit, self._reserved, self._owned, None if leaks_only else forget, mend=True)
        self.flush()
        return result

    def close(self) -> None:
        """Commit what waits, durably, and close the files. Raises OSError if that fails, with the files closed."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only and self._lost is None:
                self._finish()
        finally:
            self.file.close()
            if self.backing is not None:
                self.backing.close()

    def _finish(self) -> None:
        if self._table.pending:
            self.flush()
