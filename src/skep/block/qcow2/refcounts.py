"""The count of references to every cluster of the file: who is free, and who takes what.

Nothing here locks: the image's lock is held. Changes are made in memory, and :meth:`Refcounts.collect` hands out what
is to be written.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from skep.block.backend import File, read_at, write_at, write_zeroes_as_data
from skep.block.format import DamagedImage
from skep.block.qcow2.header import MOST_REFCOUNT_TABLE_BYTES, Header

_CACHE = 2 << 20
"""Bytes of blocks that are kept unless told otherwise."""
_OFFSET = 0xFFFF_FFFF_FFFF_FE00  # of a refcount table's entry; the other bits are reserved
_TYPES = {8: "B", 16: "H", 32: "I", 64: "Q"}

Values = Any
"""A bytearray, or an array of wider items: what can be indexed, sliced and searched alike."""
Write = tuple[int, bytes]
"""An offset in the file, and what is to be written there."""


def from_big_endian(data: bytes | bytearray, typecode: str = "Q") -> array[int]:
    values = array(typecode, bytes(data))
    if sys.byteorder == "little":
        values.byteswap()
    return values


def to_big_endian(values: array[int]) -> bytes:
    if sys.byteorder == "little":
        values = values[:]
        values.byteswap()
    return values.tobytes()


_PIECE = 1 << 20
_ROW = 256
"""Words of a table that are compared with zeros at once."""
_NOTHING = array("Q", [0]) * _ROW


def read_words(file: File, offset: int, count: int) -> array[int]:
    """A table that may be as long as an L1 table: in memory once."""
    words = array("Q", bytes(8)) * count
    with memoryview(words).cast("B") as view:
        there = max(0, min(len(view), file.size - offset))
        for at in range(0, there, _PIECE):
            file.preadv([view[at : min(at + _PIECE, there)]], offset + at)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def words_in(file: File, offset: int, count: int) -> Iterator[array[int]]:
    """The same a part at a time."""
    step = _PIECE // 8
    for first in range(0, count, step):
        yield read_words(file, offset + first * 8, min(step, count - first))


def in_use(words: array[int], step: int) -> Iterator[int]:
    """The numbers of a table's entries, of ``step`` words each, but for long rows of zeros."""
    for start in range(0, len(words), _ROW):
        row = words[start : start + _ROW]
        if row != _NOTHING and any(row):  # the second for rows that are shorter
            yield from range(start, min(start + _ROW, len(words)), step)


def write_words(file: File, offset: int, words: array[int], length: int) -> None:
    """The same back, and zeros behind it up to ``length`` bytes."""
    step = _PIECE // 8
    for first in range(0, len(words), step):
        write_at(file, offset + first * 8, to_big_endian(words[first : first + step]))
    write_zeroes_as_data(file, offset + len(words) * 8, length - len(words) * 8)


class Packing:
    """How counts of ``bits`` bits each lie in a block: big-endian, those of less than a byte the least significant
    first. In memory each has an item of its own."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.most = (1 << bits) - 1
        per_byte = 8 // bits
        self._unpacked = (
            [bytes(byte >> (i * bits) & self.most for i in range(per_byte)) for byte in range(256)] if bits < 8 else []
        )
        self._packed = {unpacked: packed for packed, unpacked in enumerate(self._unpacked)}

    def unpack(self, data: bytes | bytearray) -> Values:
        if self.bits < 8:
            return bytearray(b"".join([self._unpacked[byte] for byte in data]))
        return bytearray(data) if self.bits == 8 else from_big_endian(data, _TYPES[self.bits])

    def pack(self, values: Values) -> bytes:
        if self.bits < 8:
            n = 8 // self.bits
            return bytes(self._packed[bytes(values[i : i + n])] for i in range(0, len(values), n))
        return bytes(values) if isinstance(values, bytearray) else to_big_endian(values)

    def several(self, value: int, count: int) -> Values:
        return bytearray([value]) * count if self.bits <= 8 else array(_TYPES[self.bits], [value]) * count


class _Block:
    __slots__ = ("first", "last", "values")

    def __init__(self, values: Values) -> None:
        self.values = values
        self.first, self.last = len(values), 0
        """What has changed: entries ``first`` to ``last``, that one not included."""

    @property
    def dirty(self) -> bool:
        return self.first < self.last

    def touch(self, first: int, last: int) -> None:
        self.first, self.last = min(self.first, first), max(self.last, last)


class Changes(NamedTuple):
    """What a flush is to write, in this order, each of these made durable before the next."""

    blocks: list[Write]
    table: list[Write]
    moved: bool
    """The table has another place, which the header is to tell after that."""


class Refcounts:
    def __init__(self, file: File, header: Header, cache: int | None = None) -> None:
        """``cache``: bytes of blocks that are kept in memory, four blocks at least."""
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        self._cluster = header.cluster_size
        self._packing = Packing(1 << header.refcount_order)
        self.most = self._packing.most
        self.per_block = self._cluster * 8 // self._packing.bits
        """Clusters that one block counts."""
        size = header.refcount_table_clusters << self._bits
        self.table = read_words(file, header.refcount_table_offset, size // 8)
        for i in in_use(self.table, 1):
            self.table[i] &= _OFFSET
        """Where the blocks are, by number; 0 for one that there is not."""
        self.table_offset = header.refcount_table_offset
        self._changed: set[int] = set()
        self._moved: tuple[int, int] | None = None
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._writing: set[int] = set()
        self._room = max(4, (_CACHE if cache is None else cache) // self._cluster)
        self._free = 0
        """No cluster before this one is free."""
        self.freed_table: tuple[int, int] | None = None
        """(first, count) of the clusters where the table was before it moved; whoever flushes releases them."""

    @property
    def crowded(self) -> bool:
        """A flush is due, as what changed fills the cache."""
        return len(self._blocks) > self._room and sum(b.dirty for b in self._blocks.values()) * 2 > self._room

    @property
    def dirty(self) -> bool:
        return any(block.dirty for block in self._blocks.values())

    def get(self, index: int) -> int:
        number, at = divmod(index, self.per_block)
        block = self._block(number)
        return 0 if block is None else int(block.values[at])

    def values(self, number: int) -> Values:
        """All counts of one block that there is."""
        block = self._block(number)
        return self._packing.several(0, self.per_block) if block is None else block.values

    def add(self, first: int, count: int, change: int) -> list[int]:
        """Count ``change`` more, or fewer, references to each cluster. Returns those that are free now."""
        free = []
        for index in range(first, first + count):
            number, at = divmod(index, self.per_block)
            block = self._block(number)
            if block is None:
                if change < 0:
                    raise DamagedImage(self._file.path, f"cluster {index} has no count")
                block = self._make_block(index)
            value = block.values[at] + change
            if value < 0:
                raise DamagedImage(self._file.path, f"cluster {index} is referred to more often than it is counted")
            if value > self.most:
                raise OSError(errno.EFBIG, f"cluster {index} has more references than its count holds", self._file.path)
            block.values[at] = value
            block.touch(at, at + 1)
            if value == 0:
                free.append(index)
                self._free = min(self._free, index)
        return free

    def set(self, index: int, value: int) -> None:
        """For who mends: the count as it should be."""
        number, at = divmod(index, self.per_block)
        block = self._block(number)
        if block is None:
            if not value:
                return
            block = self._make_block(index)
        block.values[at] = value
        block.touch(at, at + 1)
        if value == 0:
            self._free = min(self._free, index)

    def take(self, most: int) -> tuple[int, int]:
        """(first, count): up to ``most`` free clusters in a row, which have one reference from now on."""
        first = self._next_free(self._free)
        number, at = divmod(first, self.per_block)
        block = self._block(number)
        if block is None:
            block = self._make_block(first)
            if block.values[at]:  # the block itself
                return self.take(most)
        count = 1
        while count < most and at + count < len(block.values) and block.values[at + count] == 0:
            count += 1
        self._guard(first, count)
        block.values[at : at + count] = self._packing.several(1, count)
        block.touch(at, at + count)
        self._free = first + count
        return first, count

    def take_row(self, count: int) -> int:
        """The first of ``count`` free clusters in a row, which have one reference from now on."""
        start = self._free
        while True:
            first = self._next_free(start)
            run = 1
            while run < count and self._is_free(first + run):
                run += 1
            if run < count:
                start = first + run
                continue
            for number in range(first // self.per_block, (first + count - 1) // self.per_block + 1):
                if self._block(number) is None:
                    self._make_block(max(first, number * self.per_block))
            # A new block may have taken one of them.
            if all(self._is_free(index) for index in range(first, first + count)):
                self._guard(first, count)
                self.add(first, count, 1)
                return first

    def _guard(self, first: int, count: int) -> None:
        """Nobody gets what the image cannot do without, whatever its counts say. Raises DamagedImage."""
        header = self._header
        for what, offset, size in (
            ("header", 0, self._cluster),
            ("refcount table", self.table_offset, len(self.table) * 8),
            ("L1 table", header.l1_table_offset, header.l1_size * 8),
        ):
            if offset < first + count << self._bits and first << self._bits < offset + size:
                raise DamagedImage(self._file.path, f"the {what} is where clusters count as free")

    def _is_free(self, index: int) -> bool:
        return self.get(index) == 0

    def _next_free(self, index: int) -> int:
        while True:
            number, at = divmod(index, self.per_block)
            block = self._block(number)
            if block is None:
                return index
            values = block.values
            if isinstance(values, bytearray):
                found: int = values.find(0, at)
                if found >= 0:
                    return number * self.per_block + found
            else:
                try:
                    return number * self.per_block + int(values.index(0, at))
                except ValueError:
                    pass
            index = (number + 1) * self.per_block

    def _block(self, number: int) -> _Block | None:
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        offset = self.table[number] if number < len(self.table) else 0
        if not offset:
            return None
        if offset % self._cluster or offset >= 1 << 56:
            raise DamagedImage(self._file.path, f"refcount block {number} is at {offset:#x}")
        block = _Block(self._packing.unpack(read_at(self._file, offset, self._cluster)))
        self._keep(number, block)
        return block

    def _keep(self, number: int, block: _Block) -> None:
        self._blocks[number] = block
        if len(self._blocks) > self._room:
            for old, one in self._blocks.items():
                if not one.dirty and old not in self._writing and old != number:
                    del self._blocks[old]
                    break

    def _make_block(self, index: int) -> _Block:
        """The block that counts cluster ``index``, which is free. It becomes a cluster of the first free ones, whose
        own block may be missing too: that one lies in itself."""
        number = index // self.per_block
        place = self._next_free(self._free)
        home = place // self.per_block
        if home != number and self._block(home) is None:
            self._make_block(place)
            return self._make_block(index)
        if number >= len(self.table) or home >= len(self.table):
            self._grow_table(max(number, home) + 1)
            return self._block(number) or self._make_block(index)
        self._guard(place, 1)
        block = _Block(self._packing.several(0, self.per_block))
        block.touch(0, self.per_block)
        self.table[number] = place << self._bits
        self._changed.add(number)
        self._keep(number, block)
        self.add(place, 1, 1)
        return block

    def _grow_table(self, needed: int) -> None:
        per_cluster = self._cluster // 8
        clusters = -(-(needed + needed // 2 + 1) // per_cluster)
        if clusters << self._bits > MOST_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, "the image has as many clusters as can be counted", self._file.path)
        old = (self.table_offset >> self._bits, len(self.table) // per_cluster)
        self.table.extend([0] * (clusters * per_cluster - len(self.table)))
        self.table_offset = self.take_row(clusters) << self._bits
        if self._moved is None:
            self._moved = old
        else:  # it moved twice since the last flush, and nobody ever saw where it was in between
            self.add(old[0], old[1], -1)

    def collect(self) -> Changes:
        """What is to be written; :meth:`written` follows when it was."""
        blocks = []
        for number, block in self._blocks.items():
            if block.dirty:
                unit = max(1, 8 * 512 // self._packing.bits)
                first = block.first // unit * unit
                last = min(-(-block.last // unit) * unit, self.per_block)
                data = self._packing.pack(block.values[first:last])
                blocks.append((self.table[number] + first * self._packing.bits // 8, data))
                block.first, block.last = self.per_block, 0
                self._writing.add(number)
        moved, self._moved = self._moved, None
        if moved is not None:
            table = [(self.table_offset, to_big_endian(self.table))]
            self.freed_table = moved
        else:
            table = [(self.table_offset + 8 * i, self.table[i].to_bytes(8, "big")) for i in sorted(self._changed)]
        self._changed.clear()
        return Changes(blocks, table, moved is not None)

    def written(self) -> None:
        self._writing.clear()
