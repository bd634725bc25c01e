"""L1 and L2 tables: where each cluster of the disk is.

L1 is in memory; of the L2 tables *slices* are cached, as many as an option says. Nothing here locks: the image's lock
is held.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import repeat

from skep.block.backend import File, read_at
from skep.block.format import DamagedImage
from skep.block.qcow2.header import Header
from skep.block.qcow2.refcounts import Write, from_big_endian, in_use, read_words, to_big_endian
from skep.block.tables import check_room

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
OFFSET = 0x00FF_FFFF_FFFF_FE00
ALL_SUBCLUSTERS = 0xFFFF_FFFF

_SLICE = 4096
_CACHE, _LEAST_CACHE = 16 << 20, 4 << 20
"""Bytes that are kept unless told otherwise: half as many fewer as a long L1 table takes, but as few."""


class Slice:
    """A part of an L2 table: words of 64 bits, two for an entry where there are subclusters."""

    __slots__ = ("dirty", "offset", "words")

    def __init__(self, offset: int, words: array[int]) -> None:
        self.offset = offset
        """In the file."""
        self.words = words
        self.dirty = False


class Tables:
    def __init__(self, file: File, header: Header, cache: int | None = None) -> None:
        """``cache``: bytes of L2 tables that are kept in memory."""
        self._file = file
        self._cluster = header.cluster_size
        self.entries = header.l2_entries
        """Of an L2 table; a power of 2."""
        self._bits, self._mask = self.entries.bit_length() - 1, self.entries - 1
        self.words = 2 if header.extended_l2 else 1
        """Of an entry."""
        self._slice = min(_SLICE, self._cluster)
        self._per_slice = self._slice // 8 // self.words
        self._slice_bits = self._per_slice.bit_length() - 1
        self.l1_offset = header.l1_table_offset
        self.l1 = read_words(file, header.l1_table_offset, header.l1_size)
        self._tables = self._count()
        self._l1_changed: set[int] = set()
        self._slices: OrderedDict[int, Slice] = OrderedDict()
        self._writing: set[int] = set()
        self._dirty = 0
        if cache is None:
            cache = max(_LEAST_CACHE, _CACHE - len(self.l1) * 8 // 2)
        self._room = max(8, cache // (self._slice + 128))

    def close(self) -> None:
        """The image is closed: up to 32 MiB, which should not wait until somebody collects circles of references."""
        self.l1 = array("Q")

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def crowded(self) -> bool:
        return self._dirty * 2 > self._room

    def check_room(self) -> None:
        """Whoever looks at all of them asks this first, as L1 may have some several times. Raises DamagedImage."""
        check_room(self._file, self._tables, self._cluster)

    def _count(self) -> int:
        """How many L2 tables L1 has; what is added to it later has a place of its own."""
        return len(self.l1) - self.l1.count(0)

    def l2_offset(self, l1_index: int) -> int:
        """Where the L2 table is; 0 if there is none."""
        entry = self.l1[l1_index]
        offset = entry & OFFSET
        if offset % self._cluster:
            raise DamagedImage(self._file.path, f"an L2 table is at {offset:#x}")
        return offset

    def find(self, index: int) -> tuple[Slice, int] | None:
        """The slice that has the entry of cluster ``index`` of the disk, and the number of its first word there."""
        l1_index, at = divmod(index, self.entries)
        if not self.l1[l1_index]:
            return None
        table = self.l2_offset(l1_index)
        if not table:
            return None
        number, at = divmod(at, self._per_slice)
        return self._load(table + number * self._slice), at * self.words

    def slices(self, l1_index: int) -> Iterator[Slice]:
        """All of one L2 table, if there is one."""
        if self.l1[l1_index] and (table := self.l2_offset(l1_index)):
            for offset in range(table, table + self._cluster, self._slice):
                yield self._load(offset)

    def cached(self, index: int) -> tuple[Slice, int] | None:
        """The same without reading, so None may also mean that it is not known."""
        entry = self.l1[index >> self._bits] & OFFSET
        found = self._slices.get(entry + ((index & self._mask) >> self._slice_bits) * self._slice)
        return None if found is None else (found, (index & (self._per_slice - 1)) * self.words)

    def _load(self, offset: int) -> Slice:
        found = self._slices.get(offset)
        if found is not None:
            self._slices.move_to_end(offset)
            return found
        made = Slice(offset, from_big_endian(read_at(self._file, offset, self._slice)))
        self._slices[offset] = made
        if len(self._slices) > self._room:
            for old, one in self._slices.items():
                if not one.dirty and old not in self._writing and one is not made:
                    del self._slices[old]
                    break
        return made

    def change(self, found: tuple[Slice, int], word: int, bits: int | None = None) -> None:
        """Set an entry, and the bits of its subclusters where it has some."""
        one, at = found
        one.words[at] = word
        if bits is not None:
            one.words[at + 1] = bits
        if not one.dirty:
            one.dirty = True
            self._dirty += 1

    def change_row(self, found: tuple[Slice, int], words: array[int]) -> None:
        """Set entries that follow each other, without subclusters."""
        one, at = found
        one.words[at : at + len(words)] = words
        if not one.dirty:
            one.dirty = True
            self._dirty += 1

    def set_l1(self, l1_index: int, entry: int) -> None:
        self.l1[l1_index] = entry
        self._l1_changed.add(l1_index)

    def forget(self, table: int) -> None:
        """The L2 table at this offset is one no more."""
        for offset in range(table, table + self._cluster, self._slice):
            old = self._slices.pop(offset, None)
            if old is not None and old.dirty:
                self._dirty -= 1

    def forget_all(self) -> None:
        """Whoever changed tables in the file has flushed before."""
        self._slices.clear()
        self._l1_changed.clear()
        self._dirty = 0

    def load_l1(self, offset: int, length: int, there: int | None = None) -> None:
        """Another L1 table; of its ``length`` entries ``there`` are in the file, and the rest are zeros."""
        self.forget_all()
        self.l1 = array("Q")  # two may be more than there is room for
        self.l1 = read_words(self._file, offset, length if there is None else there)
        self.l1.extend(repeat(0, length - len(self.l1)))
        self._tables = self._count()
        self.l1_offset = offset

    def collect(self) -> list[Write]:
        """What is to be written; :meth:`written` follows when it was."""
        writes = []
        if self._dirty:
            for offset, one in self._slices.items():
                if one.dirty:
                    writes.append((offset, to_big_endian(one.words)))
                    one.dirty = False
                    self._writing.add(offset)
            self._dirty = 0
        writes += [(self.l1_offset + 8 * i, self.l1[i].to_bytes(8, "big")) for i in sorted(self._l1_changed)]
        self._l1_changed.clear()
        return writes

    def written(self) -> None:
        self._writing.clear()


def numbered(parts: Iterable[array[int]]) -> Iterator[tuple[int, int]]:
    """The words of a table with their numbers, but for long rows of zeros."""
    first = 0
    for words in parts:
        for i in in_use(words, 1):
            yield first + i, words[i]
        first += len(words)
