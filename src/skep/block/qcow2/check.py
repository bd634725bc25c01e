"""Counting all references of an image, comparing them with its refcounts, and mending what differs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from skep.block.backend import read_at, write_at
from skep.block.format import CheckResult, DamagedImage, ImageError
from skep.block.qcow2 import snapshots
from skep.block.qcow2.header import MOST_REFCOUNT_TABLE_BYTES, Incompatible
from skep.block.qcow2.refcounts import Packing, from_big_endian, in_use, to_big_endian
from skep.block.qcow2.tables import COMPRESSED, COPIED, OFFSET, ZERO, numbered

if TYPE_CHECKING:
    from skep.block.qcow2.image import Qcow2Image

_PIECE = 256
"""Counts that are kept together: an image may be large, and may refer to few of its clusters."""
_NONE = bytes(_PIECE)


class Tally:
    """References found, by cluster of the file."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self._more: dict[int, int] = {}
        """What a byte cannot hold."""

    def add(self, index: int, times: int = 1) -> int:
        """So many more; returns how many there are now."""
        number, at = divmod(index, _PIECE)
        piece = self._pieces.get(number)
        if piece is None:
            piece = self._pieces[number] = bytearray(_PIECE)
        count = self[index] + times
        piece[at] = min(count, 255)
        if count >= 255:
            self._more[index] = count
        return count

    def __getitem__(self, index: int) -> int:
        piece = self._pieces.get(index // _PIECE)
        if piece is None:
            return 0
        count = piece[index % _PIECE]
        return count if count < 255 else self._more.get(index, 255)

    def numbers(self, start: int, stop: int) -> Iterator[int]:
        """Clusters from ``start`` to ``stop`` that have a reference, in order."""
        first, last = start // _PIECE, -(-stop // _PIECE)
        sparse = last - first > len(self._pieces)
        for number in sorted(n for n in self._pieces if first <= n < last) if sparse else range(first, last):
            piece = self._pieces.get(number)
            if piece is not None:
                for at, count in enumerate(piece):
                    if count and start <= number * _PIECE + at < stop:
                        yield number * _PIECE + at

    def piece(self, start: int) -> bytes | bytearray:
        """The counts of the ``_PIECE`` clusters from ``start``, a multiple of that, on; 255 stands for more too."""
        return self._pieces.get(start // _PIECE, _NONE)

    def spans(self, size: int) -> set[int]:
        """Which of the parts of ``size`` clusters each, a power of 2, have one with a reference."""
        if size >= _PIECE:
            return {number * _PIECE // size for number in self._pieces}
        per_piece = _PIECE // size
        return {number * per_piece + i for number in self._pieces for i in range(per_piece)}

    @property
    def end(self) -> int:
        """Behind the last cluster with a reference."""
        if not self._pieces:
            return 0
        last = max(self._pieces)
        return last * _PIECE + len(self._pieces[last].rstrip(b"\0"))


class Checker:
    """One look at all tables; ``fix`` drops entries that lead nowhere."""

    def __init__(self, image: Qcow2Image, *, fix: bool = False) -> None:
        self.image = image
        self.result = CheckResult()
        self.tally = Tally()
        self.broken = False
        """The refcount structure itself is not to be trusted."""
        self._fix = fix
        self._cluster = image.cluster_size
        self._end = -(-image.file.size // self._cluster)
        self._tables: dict[int, int] = {}
        """How many L1 tables lead to an L2 table, by where that is; each is looked at once."""
        self._active: set[int] = set()
        """Those that the disk itself uses."""
        self._bad: dict[int, list[int]] = {}
        """Entries of L2 tables that lead nowhere, by where the table is."""
        self.blocks: dict[int, int] = {}
        """Where the sound refcount blocks are, by number."""
        self._next = 0

    def look(self, *, counts: bool = True) -> None:
        """At everything; without ``counts`` as if there were no refcount table and no blocks."""
        image, header = self.image, self.image.header
        self._refer(0, 1, "header")
        self._span(header.l1_table_offset, header.l1_size * 8, "L1 table")
        if image.encryption is not None:
            self._span(image.encryption.offset, image.encryption.length, "LUKS header")
        self._tree([image.l1()], active=True)
        if header.nb_snapshots:
            self._snapshots()
        for offset, times in self._tables.items():
            self._table(offset, times, offset in self._active)
        try:
            for index in image.tracker.clusters():
                self._refer(index, 1, "bitmap")
        except DamagedImage as error:
            self.result.corrupt(str(error))
        if counts:
            table = image.refcounts.table
            self.broken = not self._span(image.refcounts.table_offset, len(table) * 8, "refcount table", alone=True)
            for number, offset in numbered([table]):
                if offset:
                    self._refcount_block(number, offset)
            # Clusters that count as free would be taken, those of the header first.
            self.broken = self.broken or not self.tally.spans(image.refcounts.per_block) <= self.blocks.keys()
        if self._fix:
            self._drop_bad()
        self.result.clusters = -(-image.size // self._cluster)
        self.result.end = self._cluster * max(self.tally.end, self._counted_end())

    def _refcount_block(self, number: int, offset: int) -> None:
        index, odd = divmod(offset, self._cluster)
        if odd or index >= self._end:
            self.result.corrupt(f"refcount block {number} is at {offset:#x}")
            self.broken = True
        elif self.tally.add(index) > 1:
            self.result.corrupt(f"refcount block {number} at {offset:#x} lies over something else")
            self.broken = True
        else:
            self.blocks[number] = offset

    def _snapshots(self) -> None:
        image = self.image
        try:
            entries, size = snapshots.read(image), snapshots.table_size(image)
        except DamagedImage as error:
            self.result.corrupt(str(error))
            return
        if sum(entry.l1_size for entry in entries) * 8 > image.file.size:
            self.result.corrupt("the L1 tables of the snapshots are larger than the file")
            return
        self._span(image.header.snapshots_offset, size, "snapshot table")
        for entry in entries:
            self._span(entry.l1_offset, entry.l1_size * 8, f"L1 table of snapshot {entry.snapshot.id}")
            self._tree(snapshots.l1_in_parts(image, entry), active=False)

    def _span(self, offset: int, size: int, what: str, *, alone: bool = False) -> bool:
        """False: it cannot be there, or, if it has to be ``alone``, something else is."""
        if not size:
            return True
        first = offset // self._cluster
        count = -(-(offset + size) // self._cluster) - first
        if not self._refer(first, count, what):
            return False
        if alone and any(self.tally[index] > 1 for index in range(first, first + count)):
            self.result.corrupt(f"{what} at {offset:#x} lies over something else")
            return False
        return True

    def _refer(self, first: int, count: int, what: str, times: int = 1) -> bool:
        if first + count > self._end + (1 if what == "data cluster" else 0):
            self.result.corrupt(f"{what} beyond the end of the file, at {first * self._cluster:#x}")
            return False
        for index in range(first, first + count):
            self.tally.add(index, times)
        return True

    def _tree(self, parts: Iterable[array[int]], *, active: bool) -> None:
        """Under an L1 table."""
        seen = set()
        for i, entry in numbered(parts):
            offset = entry & OFFSET
            if not offset:
                continue
            if offset % self._cluster or offset in seen:
                self.result.corrupt(f"L1 entry {i} leads to {offset:#x}" + (" too" if offset in seen else ""))
                self._drop_l1(i, active)
            elif not self._refer(offset // self._cluster, 1, f"L2 table of L1 entry {i}"):
                self._drop_l1(i, active)
            else:
                seen.add(offset)
                self._tables[offset] = self._tables.get(offset, 0) + 1
        if active:
            self._active = seen

    def _drop_l1(self, index: int, active: bool) -> None:
        if self._fix and active:
            self.image.change_l1(index, 0)

    def _table(self, offset: int, times: int, active: bool) -> None:
        """What an L2 table refers to, as often as it counts."""
        image, cluster, result = self.image, self._cluster, self.result
        self._next = 0
        words = from_big_endian(read_at(image.file, offset, cluster))
        step = 2 if image.header.extended_l2 else 1
        bad = []
        for at in in_use(words, step):
            word = words[at]
            if word & COMPRESSED:
                host, size = image.packed_extent(word)
                if active:
                    result.allocated += 1
                    result.compressed += 1
                    result.fragmented += 1
                first = host // cluster
                count = (host + size - 1) // cluster - first + 1
                if word & COPIED or not self._refer(first, count, "data cluster", times):
                    if word & COPIED:
                        result.corrupt(f"a compressed cluster at {host:#x} has the flag COPIED")
                    bad.append(at)
            elif word & OFFSET or (word & COPIED and image.has_data_file):
                host = word & OFFSET
                if word & ZERO and (image.header.version < 3 or step == 2):
                    result.corrupt(f"L2 entry {word:#x}")
                    bad.append(at)
                    continue
                if active:
                    result.allocated += 1
                    if self._next and host != self._next:
                        result.fragmented += 1
                    self._next = host + cluster
                if image.has_data_file:
                    if host % cluster:
                        result.corrupt(f"a data cluster at {host:#x} of the data file")
                        bad.append(at)
                elif host % cluster:
                    result.corrupt(f"a data cluster is at {host:#x}")
                    bad.append(at)
                elif not self._refer(host // cluster, 1, "data cluster", times):
                    bad.append(at)
            elif step == 2 and words[at + 1] & 0xFFFF_FFFF:
                result.corrupt(f"subclusters {words[at + 1]:#x} of no cluster")
                bad.append(at)
        if bad:
            self._bad[offset] = bad

    def _drop_bad(self) -> None:
        """But for those of a table that is something else too."""
        step = 2 if self.image.header.extended_l2 else 1
        for offset, bad in self._bad.items():
            if self.tally[offset // self._cluster] == self._tables[offset]:
                for at in bad:
                    write_at(self.image.file, offset + at * 8, bytes(8 * step))
        self.image.file.flush()

    def _counted_end(self) -> int:
        """Behind the last cluster that has a count."""
        counts = self.image.refcounts
        for number in sorted(self.blocks, reverse=True):
            values = counts.values(number)
            step = min(_PIECE, len(values))
            for start in reversed(range(0, len(values), step)):
                if any(values[start : start + step]):
                    last = max(i for i in range(start, start + step) if values[i])
                    return number * counts.per_block + last + 1
        return 0

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """(cluster, its count, references found) wherever the two are not the same."""
        counts = self.image.refcounts
        for number in sorted(self.blocks.keys() | self.tally.spans(counts.per_block)):
            first = number * counts.per_block
            if number not in self.blocks:
                for index in self.tally.numbers(first, first + counts.per_block):
                    yield index, 0, self.tally[index]
                continue
            values = counts.values(number)
            step = min(_PIECE, len(values))
            for start in range(0, len(values), step):
                part = values[start : start + step]
                at = (first + start) % _PIECE
                if list(part) == list(self.tally.piece(first + start)[at : at + step]) and 255 not in part:
                    continue
                for index in range(first + start, first + start + step):
                    count, found = values[index - first], self.tally[index]
                    if count != found:
                        yield index, count, found

    def compare(self) -> None:
        for index, count, found in self.differences():
            if count > found:
                self.result.leak(f"cluster {index} refcount={count} reference={found}")
            else:
                self.result.corrupt(f"cluster {index} refcount={count} reference={found}")

    def flags(self) -> None:
        """COPIED is to say that a cluster has one reference."""
        image = self.image
        l1 = image.l1()
        for i in in_use(l1, 1):
            entry = l1[i]
            table = entry & OFFSET
            if table not in self._active:
                continue
            self._active.discard(table)
            if bool(entry & COPIED) != (image.count_of(table // self._cluster) == 1):
                self.result.corrupt(f"OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={entry:x}")
            if image.has_data_file:
                continue
            words = from_big_endian(read_at(image.file, table, self._cluster))
            for word in map(words.__getitem__, in_use(words, 2 if image.header.extended_l2 else 1)):
                host = word & OFFSET
                if word & COMPRESSED or not host or host % self._cluster or host // self._cluster > self._end:
                    continue
                if bool(word & COPIED) != (image.count_of(host // self._cluster) == 1):
                    self.result.corrupt(f"OFLAG_COPIED data cluster: l2_entry={word:x}")


def check(image: Qcow2Image) -> CheckResult:
    checker = Checker(image)
    try:
        checker.look()
        checker.compare()
        checker.flags()
    except DamagedImage as error:
        checker.result.corrupt(str(error))
    return checker.result


def repair(image: Qcow2Image, leaks_only: bool) -> CheckResult:
    """Set the counts to what was found, drop what leads nowhere, and set the flags by the counts."""
    if image.read_only:
        raise ImageError("an image that is only read cannot be repaired", image.path)
    image.settle()  # what waits to be written is of the image, too
    before = check(image)
    if leaks_only and before.corruptions:
        checker = Checker(image)
        checker.look()
        if not checker.broken and snapshots.sound(image)[1]:
            _set(image, [(i, found) for i, count, found in checker.differences() if count > found])
            before.leaks_fixed = before.leaks
        return before
    if before.corruptions or before.leaks:
        if before.corruptions:
            _move_lost_tables(image)
        Checker(image, fix=True).look()
        image.forget_tables()
        checker = Checker(image)
        checker.look()
        if checker.broken:
            _rebuild(image, image.header.refcount_order)
        else:
            _set(image, [(i, found) for i, _, found in checker.differences()])
        snapshots.set_flags(image)
        image.settle()
        after = check(image)
        before.corruptions_fixed = max(0, before.corruptions - after.corruptions)
        before.leaks_fixed = max(0, before.leaks - after.leaks)
        if after.corruptions or after.errors:
            return before
    marks = Incompatible.DIRTY | Incompatible.CORRUPT
    if image.header.incompatible & marks:
        image.header.incompatible &= ~marks
        image.write_header()
        image.flush()
    return before


def _move_lost_tables(image: Qcow2Image) -> None:
    """An L1 table that the file ends before is made anew of what there is of it, and a table of snapshots without those
    that cannot be read: behind everything else, as no count is to be trusted yet."""
    cluster, header, file = image.cluster_size, image.header, image.file
    at = (-(-file.size // cluster) + 1) * cluster  # the disk's last cluster may be where the file ends
    lost = header.l1_table_offset + header.l1_size * 8 > file.size
    kept, whole = snapshots.sound(image)
    if not lost and whole:
        return
    if lost:
        size = len(image.l1()) * 8
        for start in range(0, size // 8, _PIECE):
            write_at(file, at + start * 8, to_big_endian(image.l1()[start : start + _PIECE]))
        header.l1_table_offset, at = at, at + -(-size // cluster) * cluster
        image.moved_l1(header.l1_table_offset)
    if not whole:
        table = snapshots.pack_table(kept)
        write_at(file, at, table)
        header.snapshots_offset, header.nb_snapshots = at if kept else 0, len(kept)
    file.flush()
    write_at(file, 0, header.pack())
    file.flush()


def _set(image: Qcow2Image, wanted: list[tuple[int, int]]) -> None:
    with image.tables_lock:
        most = image.refcounts.most
        # Higher ones first: a new block may take only what is free for sure.
        for index, found in sorted(wanted, key=lambda one: -one[1]):
            image.refcounts.set(index, min(found, most))
    image.settle()


def change_refcounts(image: Qcow2Image, order: int) -> None:
    """Counts of 2^``order`` bits from now on. Raises ImageError where one does not fit, or the image is not sound."""
    found = check(image)
    if found.corruptions or found.errors:
        raise ImageError("the image is damaged", image.path, "skep image check -r all mends it")
    _rebuild(image, order)


def _rebuild(image: Qcow2Image, order: int) -> None:
    """A new refcount table and new blocks, behind everything else; the header, written last, says where, and how wide
    counts are."""
    cluster, header = image.cluster_size, image.header
    packing = Packing(1 << order)
    per_block = cluster * 8 // packing.bits
    fresh = Checker(image)
    fresh.look(counts=False)
    tally, start = fresh.tally, max(fresh.tally.end, -(-image.file.size // cluster))
    used = tally.spans(per_block)
    """Blocks with a count that is not zero: a file may be long, and have little in it."""
    blocks, table = len(used), 0
    while True:
        end = start + blocks + table
        needed_table = -(-max(max(used, default=0) + 1, -(-end // per_block)) * 8 // cluster)
        if needed_table * cluster > MOST_REFCOUNT_TABLE_BYTES:
            raise ImageError("the image is too large for its refcounts to be made anew", image.path)
        wanted = used | set(range(start // per_block, -(-end // per_block)))
        if (len(wanted), needed_table) == (blocks, table):
            break
        blocks, table = len(wanted), needed_table
    for index in range(start, end):
        tally.add(index)
    entries = array("Q", bytes(table * cluster))
    for place, i in enumerate(sorted(wanted), start + table):
        entries[i] = place * cluster
        values = packing.several(0, per_block)
        for index in tally.numbers(i * per_block, (i + 1) * per_block):
            if tally[index] > packing.most and order != header.refcount_order:
                what = f"cluster {index} has {tally[index]} references, too many for {packing.bits} bits"
                raise ImageError(what, image.path)
            values[index - i * per_block] = min(tally[index], packing.most)
        write_at(image.file, entries[i], packing.pack(values))
    write_at(image.file, start * cluster, to_big_endian(entries))
    image.file.flush()
    header.refcount_table_offset, header.refcount_table_clusters = start * cluster, table
    header.refcount_order = order
    write_at(image.file, 0, header.pack())
    image.file.flush()
    image.reload_counts()
