"""A qcow2 image as a disk: reading, writing, and the order in which what was written becomes durable."""

from __future__ import annotations

import errno
import itertools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

from skep.block.backend import Buffers, Extent, read_at, split, write_at
from skep.block.file import HostFile
from skep.block.format import (
    BackingName,
    Bitmap,
    Can,
    CheckResult,
    DamagedImage,
    Image,
    ImageError,
    Option,
    Snapshot,
    read_backing,
)
from skep.block.qcow2 import bitmaps, check, create, snapshots
from skep.block.qcow2.compression import compress, decompress
from skep.block.qcow2.header import Autoclear, Compression, Extension, Incompatible, read_header
from skep.block.qcow2.refcounts import Refcounts, to_big_endian
from skep.block.qcow2.tables import ALL_SUBCLUSTERS, COMPRESSED, COPIED, DEFAULT_CACHE, OFFSET, ZERO, Slice, Tables
from skep.locks import Lock, Order

_UNPACKED_BYTES = 1 << 20
"""Of compressed clusters that are kept unpacked."""
_STEP = 4096
"""Clusters that one turn with the lock may clear."""
_ZEROES = bytes(2 << 20)


class Kind(IntEnum):
    NONE = 0
    """Not in this image: in the backing file, or zeros."""
    DATA = 1
    ZERO = 2
    COMPRESSED = 3


class Run(NamedTuple):
    """Bytes of the disk that are kept in one way."""

    kind: Kind
    host: int
    """Where in the file, for data and for zeros that have a place; -1: nowhere. Of a compressed cluster its entry."""
    length: int


class _Plan:
    """One step of a write: so many bytes in place, or new clusters for them."""

    __slots__ = ("clusters", "event", "fresh", "host", "index", "length", "placed", "whole")

    def __init__(self, host: int, length: int) -> None:
        self.host = host
        """Where the first byte goes; of a plan with clusters, where the first cluster is."""
        self.length = length
        self.clusters = 0
        """To be linked when the data is there; 0: in place."""
        self.index = 0
        """The first of them."""
        self.placed = False
        """They had their place before."""
        self.whole = False
        """All of the cluster is copied, not only the subclusters that are written."""
        self.fresh = False
        """Where they are nobody ever wrote."""
        self.event: threading.Event | None = None
        """For those who wait for it."""


class Qcow2Image(Image):
    """An open qcow2 image."""

    format = "qcow2"
    create_options: ClassVar[Mapping[str, Option]] = create.OPTIONS
    can = (
        Can.WRITE
        | Can.DISCARD
        | Can.ZERO
        | Can.RESIZE
        | Can.COMPRESS
        | Can.CHECK
        | Can.REPAIR
        | Can.SNAPSHOT
        | Can.BITMAP
        | Can.BACKING
    )

    def __init__(self, file: HostFile, *, cache: int = DEFAULT_CACHE) -> None:
        """``cache``: bytes of L2 tables that are kept in memory."""
        self.file = self._data = file
        self.path = file.path
        self.read_only = file.read_only
        self.write_cache = file.write_cache
        self.header = read_header(file)
        if self.header.crypt_method:
            raise ImageError("the image is encrypted, which is not supported", self.path)
        self.size = self.header.size
        self._cache = cache
        self._bits = self.header.cluster_bits
        self._cluster = self.header.cluster_size
        self._subcluster = self._cluster // 32 if self.header.extended_l2 else self._cluster
        self._unusual = ((1 << 64) - 1) & ~(COPIED | OFFSET) | (self._cluster - 1)
        """Bits that the entry of a cluster of data does not have."""
        self._lock = Lock(f"qcow2 {self.path}", Order.IMAGE)
        self._gate = Lock(f"qcow2 flush {self.path}", Order.IMAGE_FLUSH)
        self._lost: OSError | None = None
        self._busy: dict[int, _Plan] = {}
        """Clusters of the disk that somebody is giving a place."""
        self._serial = itertools.count()
        self._transfers: set[int] = set()
        """Transfers under way, by the serial number of their beginning. Adding and removing one is atomic."""
        self._freed: list[tuple[int, int, int]] = []
        """(first, count, serial number then) of clusters that lost a reference which may still be in the file."""
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self._packed_end = 0
        """Behind the last compressed cluster that was written."""
        self._load()
        self._data_name = self.header.extensions.get(Extension.DATA_FILE)
        self._tracked = bitmaps.Tracker(self)
        if not self.read_only:
            self._open_for_writing()

    def _load(self) -> None:
        self._refcounts = Refcounts(self.file, self.header)
        self._tables = Tables(self.file, self.header, self._cache)
        self._highest = -(-self.file.size // self._cluster)
        """Clusters of the file from here on were never written."""
        self._unpacked.clear()

    def _open_for_writing(self) -> None:
        known = self.header.autoclear & sum(Autoclear)
        if known != self.header.autoclear:
            self.header.autoclear = known
            self.write_header()
        if self.header.incompatible & Incompatible.DIRTY:
            self.repair()

    # Reading.

    def preadv(self, buffers: Buffers, offset: int) -> None:
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            self._read(buffers, offset)
        finally:
            self._transfers.discard(serial)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            host = self._known_host(offset, sum(map(len, buffers)), 0)
            return host is not None and self._data.read_now(buffers, host)
        finally:
            self._transfers.discard(serial)

    def _read(self, buffers: Buffers, offset: int) -> None:
        end = offset + sum(map(len, buffers))
        with self._lock:
            runs = self._map(offset, end)
        if len(runs) == 1:
            self._read_run(runs[0], buffers, offset)
            return
        rest = buffers
        for run in runs:
            piece, rest = split(rest, run.length)
            self._read_run(run, piece, offset)
            offset += run.length

    def _read_run(self, run: Run, buffers: Buffers, offset: int) -> None:
        if run.kind is Kind.DATA:
            there = self._data.size - run.host
            if there >= run.length:
                self._data.preadv(buffers, run.host)
                return
            # The file may end before its last cluster is full.
            inside, outside = split(buffers, max(0, there))
            if inside:
                self._data.preadv(inside, run.host)
            _clear(outside)
        elif run.kind is Kind.NONE:
            read_backing(self.backing, buffers, offset)
        elif run.kind is Kind.ZERO:
            _clear(buffers)
        else:
            data = self._unpack(run.host)
            at = offset & (self._cluster - 1)
            for buffer in buffers:
                buffer[:] = data[at : at + len(buffer)]
                at += len(buffer)

    def _map(self, offset: int, end: int) -> list[Run]:
        """How these bytes are kept, all of them. With the lock."""
        runs: list[Run] = []
        bits, cluster, tables = self._bits, self._cluster, self._tables
        kind, host, length = Kind.NONE, -1, 0
        while offset < end:
            index, inside = offset >> bits, offset & (cluster - 1)
            found = tables.find(index)
            if found is None:
                beyond = ((index // tables.entries + 1) * tables.entries) << bits
                new = Run(Kind.NONE, -1, min(end, beyond) - offset)
            elif tables.words == 2:
                new = self._subclusters(found, inside, end - offset)
            else:
                word = found[0].words[found[1]]
                n = min(end - offset, cluster - inside)
                if not word:
                    new = Run(Kind.NONE, -1, n)
                elif word & COMPRESSED:
                    new = Run(Kind.COMPRESSED, word, n)
                else:
                    place = self._place(word)
                    kind_here = Kind.ZERO if word & ZERO else Kind.DATA if place >= 0 else Kind.NONE
                    new = Run(kind_here, place + inside if place >= 0 else -1, n)
            offset += new.length
            if kind is new.kind and kind is not Kind.COMPRESSED and new.host == (host + length if host >= 0 else -1):
                length += new.length
                continue
            if length:
                runs.append(Run(kind, host, length))
            kind, host, length = new
        if length:
            runs.append(Run(kind, host, length))
        return runs

    def _subclusters(self, found: tuple[Slice, int], inside: int, most: int) -> Run:
        """The subclusters from ``inside`` a cluster on that are kept in one way."""
        word, bitmap = found[0].words[found[1]], found[0].words[found[1] + 1]
        if word & COMPRESSED:
            return Run(Kind.COMPRESSED, word, min(most, self._cluster - inside))
        place = self._place(word)
        number = inside // self._subcluster
        kind = _subcluster_kind(bitmap, number, place)
        if kind is None:
            raise DamagedImage(self.path, f"subclusters {bitmap:#x} of the cluster at {place:#x}")
        last = number + 1
        while last < 32 and _subcluster_kind(bitmap, last, place) is kind:
            last += 1
        n = min(most, last * self._subcluster - inside)
        return Run(kind, place + inside if place >= 0 and kind is not Kind.NONE else -1, n)

    def _place(self, word: int) -> int:
        """Where a cluster is; -1 if it has no place."""
        place = word & OFFSET
        if word & ZERO and (self.header.version < 3 or self._tables.words == 2):
            raise DamagedImage(self.path, f"an L2 entry {word:#x}")
        if place & (self._cluster - 1):
            raise DamagedImage(self.path, f"a cluster is at {place:#x}")
        if not place:  # a data file may have a cluster at its very beginning
            return 0 if word & COPIED and self._data is not self.file else -1
        return place

    def _known_host(self, offset: int, length: int, flags: int) -> int | None:
        """Where the bytes are, if they are all data, in a row, their entries have all these flags, and nobody has to
        wait to find it out.

        Without the lock: an entry is one word, and whoever takes a cluster out of the tables changes its entry before
        he draws the number by which :meth:`_flush` knows which transfers may have seen the old one. Who calls this has
        his own number already.
        """
        first, host = offset >> self._bits, None
        for index in range(first, ((offset + length - 1) >> self._bits) + 1):
            found = self._tables.cached(index)
            if found is None:
                return None
            word = found[0].words[found[1]]
            place = word & OFFSET
            if word & self._unusual or not place or word & flags != flags:
                return None
            if self._tables.words == 2 and found[0].words[found[1] + 1] != ALL_SUBCLUSTERS:
                return None
            if host is None:
                host = place
            elif place != host + ((index - first) << self._bits):
                return None
        return None if host is None else host + (offset & (self._cluster - 1))

    def _unpack(self, word: int) -> bytes:
        data = self._unpacked.get(word)
        if data is not None:
            return data
        host, size = self.packed_extent(word)
        try:
            data = decompress(self.header.compression_type, read_at(self.file, host, size), self._cluster)
        except ValueError as error:
            raise DamagedImage(self.path, f"a compressed cluster at {host:#x}: {error}") from None
        with self._lock:
            self._unpacked[word] = data
            if len(self._unpacked) * self._cluster > _UNPACKED_BYTES and len(self._unpacked) > 1:
                self._unpacked.popitem(last=False)
        return data

    def packed_extent(self, word: int) -> tuple[int, int]:
        """Offset and length in the file of a compressed cluster, by its entry."""
        shift = 62 - (self._bits - 8)
        host = word & ((1 << shift) - 1)
        sectors = ((word & (COMPRESSED - 1)) >> shift) + 1
        return host, sectors * 512 - host % 512

    # Writing.

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        self._may_write()
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            self._write(buffers, offset)
        finally:
            self._transfers.discard(serial)
        self._after_write()

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        if self.read_only or self._lost is not None or not self.write_cache:
            return False
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            length = sum(map(len, buffers))
            host = self._known_host(offset, length, COPIED)
            if host is None or not self._is_data(host, length):
                return False
            self._tracked.touch(offset, length)
            return self._data.write_now(buffers, host)
        finally:
            self._transfers.discard(serial)

    def _may_write(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the image is open for reading", self.path)
        if self._lost is not None:
            raise self._lost
        if self.header.incompatible & Incompatible.CORRUPT:
            raise DamagedImage(self.path, "it is marked as corrupt; skep image check -r all mends it")

    def _after_write(self) -> None:
        if not self.write_cache or self._tables.crowded or self._refcounts.crowded:
            self.flush()

    def _write(self, buffers: Buffers, offset: int) -> None:
        end = offset + sum(map(len, buffers))
        self._tracked.touch(offset, end - offset)
        rest = buffers
        while offset < end:
            with self._lock:
                plan = self._plan(offset, end)
            if isinstance(plan, threading.Event):
                plan.wait()
                continue
            piece, rest = (rest, []) if plan.length == end - offset else split(rest, plan.length)
            if plan.clusters:
                self._write_new(plan, piece, offset)
            else:
                self._data.pwritev(piece, plan.host)
            offset += plan.length

    def _plan(self, offset: int, end: int) -> _Plan | threading.Event:
        """The next step of a write, or what to wait for first. With the lock."""
        index, inside = offset >> self._bits, offset & (self._cluster - 1)
        if index in self._busy:
            return self._wait_for(index)
        found = self._l2_to_change(index)
        word = found[0].words[found[1]]
        place = -1 if word & COMPRESSED else self._place(word)
        if place >= 0 and word & COPIED:
            plan = self._plan_in_place(found, index, inside, place, end - offset)
        else:
            last = (end - 1) >> self._bits
            plan = self._plan_new(index, min(last, (index // self._tables.entries + 1) * self._tables.entries - 1))
            plan.whole = bool(word)  # copied for a snapshot's sake, or unpacked
            plan.length = min(end, (index + plan.clusters) << self._bits) - offset
        if not self._is_data(plan.host, plan.length):
            raise self.corrupt(f"data of the disk would be written over tables at {plan.host:#x}")
        for one in range(plan.index, plan.index + plan.clusters):
            self._busy[one] = plan
        return plan

    def _wait_for(self, index: int) -> threading.Event:
        plan = self._busy[index]
        if plan.event is None:
            plan.event = threading.Event()
        return plan.event

    def _plan_in_place(self, found: tuple[Slice, int], index: int, inside: int, place: int, most: int) -> _Plan:
        word = found[0].words[found[1]]
        if self._tables.words == 2:
            run = self._subclusters(found, inside, most)
            plan = _Plan(place + inside, run.length)
            if run.kind is Kind.DATA:
                return plan
        else:
            plan = _Plan(place + inside, min(most, self._cluster - inside))
            if not word & ZERO:
                while plan.length < most:
                    index += 1
                    following = self._tables.find(index)
                    if following is None or index in self._busy:
                        break
                    word = following[0].words[following[1]]
                    if word != (plan.host + plan.length) | COPIED:
                        break
                    plan.length += min(most - plan.length, self._cluster)
                return plan
        plan.host, plan.index, plan.clusters, plan.placed = place, index, 1, True
        return plan

    def _plan_new(self, index: int, last: int) -> _Plan:
        """New clusters for those of the disk from ``index`` on that are like it in having no place."""
        count = 1
        first = self._entry(index)
        while index + count <= last and index + count not in self._busy:
            word = self._entry(index + count)
            if bool(word) != bool(first) or (word & COPIED and not word & COMPRESSED and word & OFFSET):
                break
            if word and self._tables.words == 2:
                break
            count += 1
        if self._data is not self.file:
            plan = _Plan(index << self._bits, 0)
        else:
            start, count = self.take(count)
            plan = _Plan(start << self._bits, 0)
            plan.fresh = start >= self._highest
            self._highest = max(self._highest, start + count)
        plan.index, plan.clusters = index, count
        return plan

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
        if self._data is not self.file:
            return True
        return not self._over_tables(host, length) and (
            host < self.file.size or host < self._highest << self._bits
        )

    def _over_tables(self, host: int, length: int) -> bool:
        header = self.header
        tables = (
            (0, self._cluster),
            (header.l1_table_offset, header.l1_size * 8),
            (self._refcounts.table_offset, len(self._refcounts.table) * 8),
            (header.snapshots_offset, 8 if header.nb_snapshots else 0),
        )
        end = host + length
        return any(end > at and host < at + n for at, n in tables)

    def _l2_to_change(self, index: int) -> tuple[Slice, int]:
        """The entry of a cluster, in an L2 table that is this disk's alone; it is made if there is none. With the
        lock."""
        l1_index = index // self._tables.entries
        if not self._tables.l1[l1_index] & COPIED:
            old = self._tables.l2_offset(l1_index)
            first, _ = self.take(1)
            fresh, self._highest = first >= self._highest, max(self._highest, first + 1)
            new = first << self._bits
            if old:
                write_at(self.file, new, read_at(self.file, old, self._cluster))
                self._free(old >> self._bits, 1)
            elif not fresh:
                write_at(self.file, new, memoryview(_ZEROES)[: self._cluster])
            self._tables.forget(new)
            self._tables.set_l1(l1_index, new | COPIED)
        found = self._tables.find(index)
        if found is None:
            raise DamagedImage(self.path, f"L1 entry {l1_index} is {self._tables.l1[l1_index]:#x}")
        return found

    def _write_new(self, plan: _Plan, buffers: Buffers, offset: int) -> None:
        """Data into new clusters, and around it what was there before; then they are linked."""
        try:
            unit = self._cluster if plan.whole else self._subcluster
            start = offset // unit * unit
            end = -(-(offset + plan.length) // unit) * unit
            head, tail = bytearray(offset - start), bytearray(end - offset - plan.length)
            blank = self._fill_around(head, start) & self._fill_around(tail, offset + plan.length)
            base = plan.host - (plan.index << self._bits)
            if blank and plan.fresh:
                self._data.pwritev(buffers, base + offset)
            else:
                around = [memoryview(head), *buffers, memoryview(tail)]
                self._data.pwritev([one for one in around if len(one)], base + start)
        except BaseException:
            self._settle(plan, None)
            raise
        self._settle(plan, (start, end))

    def _fill_around(self, room: bytearray, offset: int) -> bool:
        """Read what a write of part of a cluster leaves there. True: it is zeros, because nothing is there."""
        if not room:
            return True
        with self._lock:
            runs = self._map(offset, offset + len(room))
        if all(run.kind is Kind.ZERO or (run.kind is Kind.NONE and self.backing is None) for run in runs):
            return True
        at = 0
        with memoryview(room) as view:
            for run in runs:
                self._read_run(run, [view[at : at + run.length]], offset + at)
                at += run.length
        return False

    def _settle(self, plan: _Plan, written: tuple[int, int] | None) -> None:
        """The plan was carried out, and these bytes of the disk were written, or it failed."""
        with self._lock:
            try:
                for i in range(plan.clusters):
                    index = plan.index + i
                    if written is None:
                        if not plan.placed and self._data is self.file:
                            self._free((plan.host >> self._bits) + i, 1)
                    else:
                        self._link(index, plan.host + (i << self._bits), written)
            finally:
                for index in range(plan.index, plan.index + plan.clusters):
                    del self._busy[index]
                if plan.event is not None:
                    plan.event.set()

    def _link(self, index: int, host: int, written: tuple[int, int]) -> None:
        """A cluster of the disk is here from now on, with these bytes of the disk written. With the lock."""
        found = self._l2_to_change(index)
        old = found[0].words[found[1]]
        if self._tables.words == 1:
            self._tables.change(found, host | COPIED)
        else:
            start = index << self._bits
            first = max(0, written[0] - start) // self._subcluster
            last = min(self._cluster, written[1] - start) // self._subcluster
            now = (1 << last) - (1 << first)
            bits = 0 if old & COMPRESSED else found[0].words[found[1] + 1]
            self._tables.change(found, host | COPIED, (bits | now) & ~(now << 32))
        if old & COMPRESSED or old & OFFSET != host:
            self._free_entry(old)

    # Giving back.

    def _free_entry(self, word: int) -> None:
        """An L2 entry that was this is so no more. With the lock."""
        if self._data is not self.file and not word & COMPRESSED:
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

    def discard(self, offset: int, length: int) -> None:
        self._may_write()
        end = offset + length
        first = -(-offset // self._cluster)
        last = -(-end // self._cluster) if end == self.size else end // self._cluster
        if first < last:
            self._tracked.touch(first << self._bits, min(end, last << self._bits) - (first << self._bits))
        # Without a flag for zeros, a cluster that nobody needs shows what lies below it.
        if self.header.version >= 3 or self.backing_name() is None:
            self._clear_clusters(first, last, unmap=True)
        self._after_write()

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._may_write()
        end = offset + length
        unit = self._subcluster
        first = min(-(-offset // unit) * unit, end)
        last = max(first, end if end == self.size else end // unit * unit)
        below = self.header.version < 3 and self.backing_name() is not None
        if below or self._data is not self.file or (self.header.version < 3 and not unmap):
            first = last = end
        self._tracked.touch(offset, length)
        self._zero_part(offset, first)
        at = first
        while at < last:
            index = at >> self._bits
            stop = min(last, (index + 1) << self._bits)
            if at & (self._cluster - 1) or (stop & (self._cluster - 1) and stop != self.size):
                self._zero_subclusters(index, at, stop)
            else:
                index_last = -(-last // self._cluster) if last == self.size else last >> self._bits
                self._clear_clusters(index, index_last, unmap)
                stop = min(last, index_last << self._bits)
            at = stop
        self._zero_part(last, end)
        self._after_write()

    def _zero_part(self, offset: int, end: int) -> None:
        """Write zeros where something else may be."""
        while offset < end:
            stop = min(end, (offset // len(_ZEROES) + 1) * len(_ZEROES))
            with self._lock:
                runs = self._map(offset, stop)
            for run in runs:
                if run.kind in (Kind.DATA, Kind.COMPRESSED) or (run.kind is Kind.NONE and self.backing_name()):
                    self._write([memoryview(_ZEROES)[: run.length]], offset)
                offset += run.length

    def _zero_subclusters(self, index: int, start: int, end: int) -> None:
        """Whole subclusters of one cluster become zeros."""
        while True:
            with self._lock:
                event = self._wait_for(index) if index in self._busy else None
                if event is None:
                    found = self._l2_to_change(index)
                    word, bits = found[0].words[found[1]], found[0].words[found[1] + 1]
                    compressed = bool(word & COMPRESSED)
                    if not compressed:
                        inside = self._cluster - 1
                        now = (1 << (((end - 1) & inside) // self._subcluster + 1)) - (
                            1 << ((start & inside) // self._subcluster)
                        )
                        self._tables.change(found, word, (bits | now << 32) & ~now)
                        return
            if event is None:
                self._write([memoryview(_ZEROES)[: end - start]], start)
                return
            event.wait()

    def _clear_clusters(self, first: int, last: int, unmap: bool) -> None:
        """Whole clusters of the disk become zeros. ``unmap``: their places are given back."""
        while first < last:
            event = None
            with self._lock:
                for _ in range(_STEP):
                    if first >= last:
                        break
                    if first in self._busy:
                        event = self._wait_for(first)
                        break
                    first = self._clear_cluster(first, last, unmap)
            if event is not None:
                event.wait()
            elif self._tables.crowded:
                self.flush()

    def _clear_cluster(self, index: int, last: int, unmap: bool) -> int:
        """One of them; returns which comes next. With the lock."""
        found = self._tables.find(index)
        below = self.backing_name() is not None
        if found is None and not below:
            return min(last, (index // self._tables.entries + 1) * self._tables.entries)
        found = self._l2_to_change(index) if found is None else found
        word = found[0].words[found[1]]
        wide = self._tables.words == 2
        bits = found[0].words[found[1] + 1] if wide else 0
        place = -1 if word & COMPRESSED else self._place(word)
        keep = place >= 0 and bool(word & COPIED) and not unmap
        if self._data is not self.file and place >= 0:
            self._data.discard(place, self._cluster)
            keep = True
        zero = self.header.version >= 3 and (below or bool(word) or bool(bits))
        new_word = (word & (OFFSET | COPIED) if keep else 0) | (ZERO if zero and not wide else 0)
        new_bits = ALL_SUBCLUSTERS << 32 if zero else 0
        if new_word == word and new_bits == (bits if wide else new_bits):
            return index + 1
        found = self._l2_to_change(index)
        self._tables.change(found, new_word, new_bits if wide else None)
        if not keep:
            self._free_entry(word)
        return index + 1

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
        if self._data is not self.file:
            self._data.flush()
        for offset, data in counts.blocks:
            write_at(self.file, offset, data)
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

    def close(self) -> None:
        if not self.read_only and self._lost is None and self.file.is_open:
            try:
                self._tracked.store()
                self.settle()
            except OSError:
                pass  # whoever wants to know has flushed
        if self._data is not self.file:
            self._data.close()
        super().close()

    def corrupt(self, what: str) -> DamagedImage:
        """Mark the image: nobody is to write to it before it was repaired."""
        if not self.read_only and self.header.version >= 3:
            self.header.incompatible |= Incompatible.CORRUPT
            self.write_header()
        return DamagedImage(self.path, what)

    # Compressed clusters.

    def write_compressed(self, data: bytes | memoryview, offset: int) -> None:
        """A whole cluster, or the end of the disk; one that does not get smaller is written as it is."""
        self._may_write()
        if offset % self._cluster or (len(data) != self._cluster and offset + len(data) != self.size):
            raise ImageError("only whole clusters are compressed", self.path)
        whole = data if len(data) == self._cluster else bytes(data) + bytes(self._cluster - len(data))
        packed = None if self._data is not self.file else compress(self.header.compression_type, whole)
        if packed is None:
            self.pwritev([memoryview(data)], offset)
            return
        index = offset >> self._bits
        self._tracked.touch(offset, len(data))
        while True:
            with self._lock:
                event = self._wait_for(index) if index in self._busy else None
                if event is None:
                    self._l2_to_change(index)
                    host = self._packed_place(len(packed))
                    self._busy[index] = plan = _Plan(host, len(data))
                    break
            event.wait()
        try:
            write_at(self.file, host, packed)
        finally:
            with self._lock:
                del self._busy[index]
                if plan.event is not None:
                    plan.event.set()
        sectors = (host + len(packed) - 1) // 512 - host // 512
        with self._lock:
            found = self._l2_to_change(index)
            old = found[0].words[found[1]]
            word = COMPRESSED | sectors << (62 - (self._bits - 8)) | host
            self._tables.change(found, word, 0 if self._tables.words == 2 else None)
            self._free_entry(old)
        self._after_write()

    def _packed_place(self, length: int) -> int:
        """Where so many bytes go: behind those of the last compressed cluster if there is room. With the lock."""
        at = self._packed_end
        room = -at % self._cluster
        last = at >> self._bits
        if room and self._refcounts.get(last) < self._refcounts.most:
            if length <= room:
                self._refcounts.add(last, 1, 1)
                self._packed_end = at + length
                return at
            following, _ = self.take(1)
            self._highest = max(self._highest, following + 1)
            if following == last + 1:
                self._refcounts.add(last, 1, 1)
                self._packed_end = at + length
                return at
        else:
            following, _ = self.take(1)
            self._highest = max(self._highest, following + 1)
        self._packed_end = (following << self._bits) + length
        return following << self._bits

    # How it is kept.

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        step = max(1 << 30, self._cluster)
        while offset < end:
            with self._lock:
                runs = self._map(offset, min(end, offset + step))
            for run in runs:
                host = run.host if run.host >= 0 and run.kind is not Kind.COMPRESSED else None
                yield Extent(
                    offset,
                    run.length,
                    data=run.kind in (Kind.DATA, Kind.COMPRESSED),
                    zero=run.kind is Kind.ZERO,
                    host=host,
                    present=run.kind is not Kind.NONE,
                    compressed=run.kind is Kind.COMPRESSED,
                )
                offset += run.length

    @property
    def cluster_size(self) -> int:
        return self._cluster

    @property
    def dirty(self) -> bool:
        return bool(self.header.incompatible & Incompatible.DIRTY)

    @property
    def corrupted(self) -> bool:
        return bool(self.header.incompatible & Incompatible.CORRUPT)

    def info(self) -> dict[str, Any]:
        header = self.header
        if header.version < 3:
            found: dict[str, Any] = {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
            return found
        found = {
            "compat": "1.1",
            "compression-type": Compression(header.compression_type).name.lower(),
            "lazy-refcounts": bool(header.compatible & 1),
            "refcount-bits": 1 << header.refcount_order,
            "corrupt": self.corrupted,
            "extended-l2": header.extended_l2,
        }
        if self._data_name is not None:
            found["data-file"] = self._data_name.decode(errors="surrogateescape")
            found["data-file-raw"] = bool(header.autoclear & Autoclear.DATA_FILE_RAW)
        marks = [
            {"flags": list(one.flags), "name": one.name, "granularity": one.granularity} for one in self.bitmaps()
        ]
        return {**found, "bitmaps": marks} if marks else found

    # What is below, and beside it.

    def backing_name(self) -> BackingName | None:
        name = self.header.backing_name
        kind = self.header.extensions.get(Extension.BACKING_FORMAT)
        return None if name is None else BackingName(name, None if kind is None else kind.decode(errors="replace"))

    def set_backing(self, name: BackingName | None) -> None:
        self.header.backing_name = None if name is None else name.name
        self.header.extensions.pop(Extension.BACKING_FORMAT, None)
        if name is not None and name.format is not None:
            first = {int(Extension.BACKING_FORMAT): name.format.encode()}
            self.header.extensions = first | self.header.extensions
        self.write_header()
        self.flush()

    def open_files(self, opener: Callable[[str], HostFile]) -> None:
        if self._data_name is not None:
            self._data = opener(self._data_name.decode(errors="surrogateescape"))

    # Its size.

    def resize(self, size: int) -> None:
        """Beyond the old end there are zeros; what is cut off is given back."""
        self._may_write()
        old = self.size
        if size < old:
            if self.header.nb_snapshots:
                raise ImageError("an image with snapshots is not made smaller", self.path)
            self.write_zeroes(size, min(old, -(-size // self._cluster) * self._cluster) - size, True)
            self.settle()
            self._set_size(size)
            self._cut(-(-size // self._cluster), -(-old // self._cluster))
        elif size > old:
            self.settle()
            entries = -(-size // (self._tables.entries << self._bits))
            if entries > len(self._tables.l1):
                self.replace_l1([*self._tables.l1, *[0] * (entries - len(self._tables.l1))], size)
            else:
                self._set_size(size)
            if self._data is not self.file:
                self._data.resize(max(size, self._data.size))
            if self.backing is not None and self.backing.size > old:
                self.write_zeroes(old, min(size, self.backing.size) - old, True)
        self._tracked.resize()
        self.settle()

    def _set_size(self, size: int) -> None:
        self.size = self.header.size = size
        self.write_header()
        self.file.flush()

    def _cut(self, first: int, last: int) -> None:
        """Forget these clusters of the disk, and L2 tables that have no others."""
        entries = self._tables.entries
        for l1_index in range(first // entries, -(-last // entries)):
            with self._lock:
                if not self._tables.l2_offset(l1_index):
                    continue
                for index in range(max(first, l1_index * entries), min(last, (l1_index + 1) * entries)):
                    self._cut_one(index)
                if l1_index * entries >= first:
                    table = self._tables.l2_offset(l1_index)
                    self._tables.set_l1(l1_index, 0)
                    self._free(table >> self._bits, 1)
            if self._tables.crowded:
                self.flush()

    def _cut_one(self, index: int) -> None:
        found = self._tables.find(index)
        if found is not None and any(found[0].words[found[1] : found[1] + self._tables.words]):
            found = self._l2_to_change(index)
            word = found[0].words[found[1]]
            self._tables.change(found, 0, 0 if self._tables.words == 2 else None)
            self._free_entry(word)

    def make_empty(self) -> None:
        self._may_write()
        self.settle()
        self._cut(0, -(-self.size // self._cluster))
        self.settle()

    def replace_l1(self, entries: Sequence[int], size: int) -> None:
        """Another L1 table, of a disk of another size. Everything has been flushed; the old table's tree is the
        caller's affair."""
        words = array("Q", entries)
        old = (self._tables.l1_offset >> self._bits, -(-len(self._tables.l1) * 8 // self._cluster))
        with self._lock:
            offset = self.take_row(max(1, -(-len(words) * 8 // self._cluster))) << self._bits
        data = to_big_endian(words)
        write_at(self.file, offset, data.ljust(-(-len(data) // self._cluster) * self._cluster, b"\0"))
        self.flush()
        self.header.l1_table_offset, self.header.l1_size = offset, len(words)
        self._set_size(size)
        self._tables.forget_all()
        self._tables.l1, self._tables.l1_offset = words, offset
        self.give_back(range(old[0], old[0] + old[1]))

    def preallocate(self) -> None:
        """Give every cluster of the disk that has none its place, in their order; in a new image."""
        offset = 0
        while offset < self.size:
            with self._lock:
                plan = self._plan(offset, min(self.size, offset + (64 << 20)))
            if isinstance(plan, threading.Event):
                raise AssertionError("a new image is nobody else's")
            end = offset + plan.length
            self._settle(plan, (offset, -(-end // self._cluster) * self._cluster))
            offset = end
            if self._tables.crowded or self._refcounts.crowded:
                self.flush()
        self._data.resize(max(self._data.size, self._highest << self._bits if self._data is self.file else self.size))
        self.settle()

    def amend(self, options: Mapping[str, str]) -> None:
        """Change options of creation. Raises ImageError for those that cannot be changed."""
        create.amend(self, options)

    # What the modules beside this one do with the tables. They come alone, as their callers do.

    @property
    def tables_lock(self) -> Lock:
        return self._lock

    @property
    def data_file(self) -> HostFile:
        """Where the disk's data is: this file, or another."""
        return self._data

    @property
    def has_data_file(self) -> bool:
        return self._data_name is not None

    @property
    def refcounts(self) -> Refcounts:
        return self._refcounts

    @property
    def tracker(self) -> bitmaps.Tracker:
        return self._tracked

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

    def set_copied_flags(self, l1_index: int) -> None:
        """COPIED in one L2 table, by the counts."""
        if self.has_data_file:
            return
        with self._lock:
            for index in range(l1_index * self._tables.entries, (l1_index + 1) * self._tables.entries):
                found = self._tables.find(index)
                if found is None:
                    return
                word = found[0].words[found[1]]
                if word & OFFSET and not word & COMPRESSED:
                    alone = self._refcounts.get((word & OFFSET) >> self._bits) == 1
                    if alone != bool(word & COPIED):
                        self._tables.change(found, word & ~COPIED | (COPIED if alone else 0))
        if self._tables.crowded:
            self.flush()

    # What tools ask for.

    def check(self) -> CheckResult:
        if not self.read_only:
            self.settle()
        return check.check(self)

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        return check.repair(self, leaks_only)

    def forget_tables(self) -> None:
        """L2 tables were changed in the file."""
        self.flush()
        self._tables.forget_all()

    def reload(self) -> None:
        """Tables were changed behind our back."""
        self.header = read_header(self.file)
        self.size = self.header.size
        self._load()

    def snapshots(self) -> Sequence[Snapshot]:
        return [one.snapshot for one in snapshots.read(self)]

    def snapshot_create(self, name: str) -> None:
        self._may_write()
        snapshots.create(self, name)

    def snapshot_apply(self, name: str) -> None:
        self._may_write()
        snapshots.apply(self, name)

    def show_snapshot(self, name: str) -> None:
        entry = snapshots.find(self, name)
        self.size = entry.snapshot.size
        self._tables.forget_all()
        self._tables.l1 = snapshots.l1_of(self, entry)
        self._unpacked.clear()

    def snapshot_delete(self, name: str) -> None:
        self._may_write()
        snapshots.delete(self, name)

    def bitmaps(self) -> Sequence[Bitmap]:
        return self._tracked.described()

    @classmethod
    def create(cls, path: str, size: int, options: Mapping[str, str], backing: BackingName | None = None) -> None:
        create.create(cls, path, size, options, backing)

    @classmethod
    def measure(cls, size: int, data: Sequence[tuple[int, int]], options: Mapping[str, str]) -> tuple[int, int]:
        return create.measure(size, data, options)


def _subcluster_kind(bitmap: int, number: int, place: int) -> Kind | None:
    """None: it is said to be both data and zeros, or data nowhere."""
    data, zero = bitmap >> number & 1, bitmap >> (32 + number) & 1
    if data:
        return None if zero or place < 0 else Kind.DATA
    return Kind.ZERO if zero else Kind.NONE


def _clear(buffers: Buffers) -> None:
    for buffer in buffers:
        buffer[:] = _ZEROES[: len(buffer)] if len(buffer) <= len(_ZEROES) else bytes(len(buffer))


def _rows(indexes: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of numbers that follow each other."""
    start = 0
    for i in range(1, len(indexes) + 1):
        if i == len(indexes) or indexes[i] != indexes[i - 1] + 1:
            yield indexes[start], i - start
            start = i
