"""Images whose blocks say of each sector whether it is there: VHD, and differencing VHDX.

A bit is set when its sector's data is written, and is in the file only after a commit, like every entry of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from skep.block.backend import Buffers, split
from skep.block.sparse import MOST_PENDING, Kind, Run, SparseImage
from skep.block.tables import Table


class SectorImage(SparseImage):
    """Blocks with a bitmap, of which ``_bits`` has the bytes. :meth:`_mapped` says which blocks have to be asked."""

    most_significant_first: ClassVar[bool]
    _bits: Table
    sector: int = 512
    """Bytes that one bit is for."""

    def _mapped(self, block: int) -> bool:
        """The block's bitmap counts, under the lock."""
        raise NotImplementedError

    def _noted(self, block: int) -> bool:
        """What is written to the block is noted in its bitmap, under the lock."""
        return self._mapped(block)

    def _bit(self, block: int) -> int:
        """The number of the bit of a block's first sector; a multiple of 8."""
        raise NotImplementedError

    def _ensure(self, block: int) -> None:
        """Give a block that is not there its place, under the lock."""
        raise NotImplementedError

    def _runs(self, offset: int, length: int) -> Iterator[Run]:
        for run in super()._runs(offset, length):
            if run.kind is not Kind.DATA:
                yield run
            else:
                yield from self._sector_runs(offset, run)
            offset += run.length

    def _sector_runs(self, offset: int, run: Run) -> Iterator[Run]:
        """A run of blocks in the file, each of which may have sectors that are not."""
        _, length, host = run
        kind, since = Kind.DATA, 0
        """What the bytes from ``host + since`` up to ``done`` are."""
        done = 0
        while done < length:
            block, start = divmod(offset + done, self.block_size)
            n = min(self.block_size - start, length - done)
            for there, part in self._present(block, start, n) if self._mapped(block) else ((True, n),):
                found = Kind.DATA if there else Kind.ABSENT
                if found is not kind and done > since:
                    yield Run(kind, done - since, host + since)
                    since = done
                kind = found
                done += part
        yield Run(kind, done - since, host + since)

    def _present(self, block: int, start: int, length: int) -> Iterator[tuple[bool, int]]:
        """Whether the sectors of these bytes of the block are there, in runs of bytes."""
        base, sector = self._bit(block), self.sector
        at, end = start, start + length
        while at < end:
            index, bit = divmod(at // sector, 8)
            byte = self._bits[base // 8 + index]
            if not bit and byte in (0, 0xFF):
                stop = at // sector * sector + 8 * sector
            else:
                stop = (at // sector + 1) * sector
                byte >>= 7 - bit if self.most_significant_first else bit
            stop = min(stop, end)
            yield bool(byte & 1), stop - at
            at = stop

    def _place(self, offset: int, length: int) -> list[Run]:
        with self._lock:
            first, last = offset // self.block_size, (offset + length - 1) // self.block_size
            for block in range(first, last + 1):
                if self._find(block)[0] is not Kind.DATA:
                    self._ensure(block)
            return list(super()._runs(offset, length))

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        if (offset | length) % self.sector == 0:
            super().pwritev(buffers, offset)
            return
        # Part of a sector of 4096 bytes: a bit stands for all of it.
        start = offset // self.sector * self.sector
        end = min(-(-(offset + length) // self.sector) * self.sector, self.size)
        first, rest = split(buffers, min(length, start + self.sector - offset))
        self._copy_sector(first, offset, start)
        if rest:
            offset = start + self.sector
            middle, last = split(rest, (end - offset - 1) // self.sector * self.sector)
            super().pwritev(middle, offset)
            self._copy_sector(last, offset + sum(map(len, middle)), end - self.sector)

    def _copy_sector(self, buffers: Buffers, offset: int, start: int) -> None:
        """Write into the sector at ``start``, with what is around it."""
        block = start // self.block_size
        data = memoryview(bytearray(self.sector))
        self._claim(block)
        try:
            self.preadv([data], start)
            data[offset - start : offset - start + sum(map(len, buffers))] = b"".join(buffers)
            super().pwritev([data], start)
        finally:
            self._unclaim(block)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        # One bit more is one change more, which needs the lock and may need the file.
        return (offset | sum(map(len, buffers))) % self.sector == 0 and super().write_now(buffers, offset)

    def _wrote(self, offset: int, length: int) -> None:
        with self._lock:
            while length:
                block, start = divmod(offset, self.block_size)
                n = min(self.block_size - start, length)
                if self._noted(block):
                    self._set_bits(block, start, n)
                offset += n
                length -= n

    def _set_bits(self, block: int, start: int, length: int) -> None:
        first = self._bit(block) + start // self.sector
        end = first + -(-length // self.sector)
        while first < end:
            index, bit = divmod(first, 8)
            n = min(8 - bit, end - first)
            mask = (1 << n) - 1
            mask <<= 8 - bit - n if self.most_significant_first else bit
            old = self._bits[index]
            if old | mask != old:
                self._bits[index] = old | mask
            first += n

    def _after_write(self) -> None:
        if self._bits.pending > (MOST_PENDING if self.write_cache else 0):
            self.flush()
        super()._after_write()

    def _begin(self) -> bool:
        bits, entries = self._bits.begin(), self._table.begin()
        return bool(bits or entries)

    def _landed(self) -> None:
        self._bits.landed()
        self._table.landed()

    def _finish(self) -> None:
        if self._table.pending or self._bits.pending:
            self.flush()
