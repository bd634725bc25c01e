"""Who has which cluster of a qcow2 image's file, and the order in which that becomes durable.

The package's docstring has the rules.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

from skep.block.backend import ZEROES, File, read_at, write_at, write_zeroes_as_data
from skep.block.format import DamagedImage
from skep.block.qcow2.header import Incompatible
from skep.block.qcow2.mapping import Mapped
from skep.block.qcow2.refcounts import Refcounts, in_use, write_words
from skep.block.qcow2.tables import COMPRESSED, COPIED, OFFSET, Slice
from skep.locks import Lock, Order


class Owning(Mapped):
    """An image whose clusters can be taken, linked and given back."""

    def __init__(self, file: File, cache: int | None, refcount_cache: int | None) -> None:
        super().__init__(file, cache, refcount_cache)
        self._gate = Lock(f"qcow2 flush {self.path}", Order.IMAGE_FLUSH)
        self._lost: OSError | None = None
        self._freed: list[tuple[int, int, int]] = []
        """(first, count, serial number then) of clusters that lost a reference which may still be in the file."""

    # Taking.

    def take(self, most: int) -> tuple[int, int]:
        """Free clusters of the file, as :meth:`Refcounts.take`; none that a table lies in. With the lock."""
        first, count = self._refcounts.take(most)
        if self._over_tables(first << self._bits, count << self._bits):
            raise self.corrupt(f"clusters {first} to {first + count} are counted as free, and hold tables")
        return first, count

    def take_row(self, count: int) -> int:
        """Clusters in a row for a table. With the lock."""
        first = self._refcounts.take_row(count)
        if self._over_tables(first << self._bits, count << self._bits):
            raise self.corrupt(f"clusters {first} to {first + count} are counted as free, and hold tables")
        self._highest = max(self._highest, first + count)
        return first

    def _entry(self, index: int) -> int:
        found = self._tables.find(index)
        return 0 if found is None else found[0].words[found[1]]

    def _is_data(self, host: int, length: int) -> bool:
        """Data of the disk may be in these bytes of the file: no table is, as far as that is quickly known, and they
        are not behind all that is in use."""
        if self._apart:
            return True
        return not self._over_tables(host, length) and (
            host < self.file.size or host < self._highest << self._bits
        )

    def _over_tables(self, host: int, length: int) -> bool:
        header, counts, end = self.header, self._refcounts, host + length
        return (  # in full, since every write asks
            host < self._cluster
            or header.l1_table_offset - length < host < header.l1_table_offset + header.l1_size * 8
            or counts.table_offset - length < host < counts.table_offset + len(counts.table) * 8
            or (header.nb_snapshots > 0 and end > header.snapshots_offset and host < header.snapshots_offset + 8)
        )

    def _l2_to_change(self, index: int) -> tuple[Slice, int]:
        """The entry of a cluster, in an L2 table that is this disk's alone; it is made if there is none. With the
        lock."""
        l1_index = index // self._tables.entries
        fresh = False
        if not self._tables.l1[l1_index] & COPIED:
            old = self._tables.l2_offset(l1_index)
            first, _ = self.take(1)
            fresh, self._highest = first >= self._highest, max(self._highest, first + 1)
            new = first << self._bits
            if old:
                write_at(self.file, new, read_at(self.file, old, self._cluster))
                self._free(old >> self._bits, 1)
            elif not fresh:
                write_at(self.file, new, ZEROES[: self._cluster])
            self._tables.forget(new)
            self._tables.set_l1(l1_index, new | COPIED)
        found = self._tables.find(index)
        if found is None:
            raise DamagedImage(self.path, f"L1 entry {l1_index} is {self._tables.l1[l1_index]:#x}")
        if fresh:  # it is to be in the file even if nothing gets a place by it
            self._tables.change(found, found[0].words[found[1]])
        return found

    # Giving back.

    def _free_entry(self, word: int) -> None:
        """An L2 entry that was this is so no more. With the lock."""
        if self._apart and not word & COMPRESSED:
            return
        if word & COMPRESSED:
            host, size = self.packed_extent(word)
            first = host >> self._bits
            self._free(first, ((host + size - 1) >> self._bits) - first + 1)
        elif word & OFFSET:
            self._free(self._place(word) >> self._bits, 1)

    def _free(self, first: int, count: int) -> None:
        """Clusters of the file lose a reference, when nothing in the file refers to them any more. With the lock."""
        self._freed.append((first, count, next(self._serial)))

    # Making it durable.

    def flush(self) -> None:
        with self._gate:
            if self._lost is not None:
                raise self._lost
            try:
                self._flush()
            except OSError as error:
                self._lost = error
                raise

    def _flush(self) -> None:
        with self._lock:
            counts, links = self._refcounts.collect(), self._tables.collect()
            freed, self._freed = self._freed, []
        if self._apart:
            self._data.flush()
        for offset, data in counts.blocks:
            write_at(self.file, offset, data)
        if (end := max((offset + len(data) for offset, data in links), default=0)) > self.file.size:
            write_at(self.file, end - 1, b"\0")  # a new table, all of whose data failed, is there before the link to it
        self.file.flush()
        if counts.table:
            for offset, data in counts.table:
                write_at(self.file, offset, data)
            self.file.flush()
            if counts.moved:
                self.write_header()
                self.file.flush()
        if links:
            for offset, data in links:
                write_at(self.file, offset, data)
            self.file.flush()
        with self._lock:
            self._refcounts.written()
            self._tables.written()
            if counts.moved and self._refcounts.freed_table is not None:
                self._refcounts.add(*self._refcounts.freed_table, -1)
                self._refcounts.freed_table = None
            oldest = min(tuple(self._transfers), default=None)
            ready = [one for one in freed if oldest is None or one[2] < oldest]
            self._freed += [one for one in freed if not (oldest is None or one[2] < oldest)]
            last = [
                index
                for first, count, _ in ready
                for index in range(first, first + count)
                if self._refcounts.get(index) == 1
            ]
        for first, count in _rows(last):
            self.file.discard(first << self._bits, count << self._bits)
        with self._lock:
            for first, count, _ in ready:
                self._refcounts.add(first, count, -1)
            if ready:
                self._unpacked.clear()

    def settle(self) -> None:
        """Flush until there is nothing left to write: what a flush gave back changes the refcounts once more."""
        for _ in range(4):
            self.flush()
            if not (self._freed or self._refcounts.dirty):
                break

    def write_header(self) -> None:
        self.header.refcount_table_offset = self._refcounts.table_offset
        self.header.refcount_table_clusters = len(self._refcounts.table) * 8 >> self._bits
        write_at(self.file, 0, self.header.pack())

    def corrupt(self, what: str) -> DamagedImage:
        """Mark the image: nobody is to write to it before it was repaired."""
        if not self.read_only and self.header.version >= 3:
            self.header.incompatible |= Incompatible.CORRUPT
            self.write_header()
        return DamagedImage(self.path, what)

    # What the modules beside this one do with the tables. They come alone, as their callers do.

    @property
    def tables_lock(self) -> Lock:
        return self._lock

    @property
    def refcounts(self) -> Refcounts:
        return self._refcounts

    def l1(self) -> array[int]:
        return self._tables.l1

    def change_l1(self, index: int, entry: int) -> None:
        with self._lock:
            if self._tables.l1[index] != entry:
                self._tables.set_l1(index, entry)

    def count_of(self, index: int) -> int:
        with self._lock:
            return self._refcounts.get(index)

    def count(self, clusters: Sequence[int], change: int) -> None:
        """References to clusters of the file: one more or one fewer, at once."""
        with self._lock:
            for index in clusters:
                self._refcounts.add(index, 1, change)
        if self._refcounts.crowded:
            self.flush()

    def give_back(self, clusters: Sequence[int]) -> None:
        """Clusters that nothing in the file refers to any more."""
        with self._lock:
            for index in clusters:
                self._free(index, 1)
        self.settle()

    def place_table(self, data: bytes) -> int:
        """Write a table into new clusters, to which the next flush's header may refer; where."""
        with self._lock:
            offset = self.take_row(-(-len(data) // self._cluster)) << self._bits
        write_at(self.file, offset, data.ljust(-(-len(data) // self._cluster) * self._cluster, b"\0"))
        return offset

    def place_words(self, parts: Iterable[array[int]], count: int) -> int:
        """The same of a table that may be as long as an L1 table: ``count`` words, zeros behind ``parts``."""
        clusters = max(1, -(-count * 8 // self._cluster))
        with self._lock:
            at = offset = self.take_row(clusters) << self._bits
        for words in parts:
            write_words(self.file, at, words, len(words) * 8)
            at += len(words) * 8
        write_zeroes_as_data(self.file, at, offset + (clusters << self._bits) - at)
        return offset

    def set_copied_flags(self, l1_index: int) -> None:
        """COPIED in one L2 table, by the counts."""
        if self.has_data_file:
            return
        with self._lock:
            for one in self._tables.slices(l1_index):
                for at in in_use(one.words, self._tables.words):
                    word = one.words[at]
                    if word & OFFSET and not word & COMPRESSED:
                        alone = self._refcounts.get((word & OFFSET) >> self._bits) == 1
                        if alone != bool(word & COPIED):
                            self._tables.change((one, at), word & ~COPIED | (COPIED if alone else 0))
        if self._tables.crowded:
            self.flush()


def _rows(indexes: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of numbers that follow each other."""
    start = 0
    for i in range(1, len(indexes) + 1):
        if i == len(indexes) or indexes[i] != indexes[i - 1] + 1:
            yield indexes[start], i - start
            start = i
