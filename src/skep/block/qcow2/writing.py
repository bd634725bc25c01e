"""Writing to a qcow2 image: in place where a cluster is the disk's alone, into new ones elsewhere."""

from __future__ import annotations

import errno
import threading
from array import array
from functools import partial

from skep.block.backend import ZEROES, Buffers, File, split, write_at
from skep.block.format import DamagedImage, ImageError, Write
from skep.block.qcow2.bitmaps import Tracker
from skep.block.qcow2.compression import compress
from skep.block.qcow2.header import Incompatible
from skep.block.qcow2.mapping import Kind
from skep.block.qcow2.owning import Owning
from skep.block.qcow2.tables import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET, ZERO, Slice

_CORRUPT = int(Incompatible.CORRUPT)  # every write asks, and flags are slow
_STEP = 4096
"""Clusters that one turn with the lock may clear."""


class Plan:
    """One step of a write: so many bytes in place, or new clusters for them."""

    __slots__ = ("blank", "clusters", "event", "fresh", "host", "index", "length", "placed", "whole")

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
        self.blank = False
        """Their entries were empty, and are in one slice of a table without subclusters."""
        self.fresh = False
        """Where they are nobody ever wrote."""
        self.event: threading.Event | None = None
        """For those who wait for it."""


class Written(Owning):
    """An image that is written to."""

    _tracked: Tracker

    def __init__(self, file: File, cache: int | None, refcount_cache: int | None) -> None:
        super().__init__(file, cache, refcount_cache)
        self._busy: dict[int, Plan] = {}
        """Clusters of the disk that somebody is giving a place."""
        self._packed_end = 0
        """Behind the last compressed cluster that was written."""

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        self._may_write()
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            length = sum(map(len, buffers))
            host = self._place_to_write(offset, length)
            if host is None:
                self._tracked.touch(offset, length)
                self._write(buffers, offset)
            else:
                self._data.pwritev(buffers, host)
        finally:
            self._transfers.discard(serial)
        self._after_write()

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            host = self._place_to_write(offset, sum(map(len, buffers)))
            return host is not None and self._data.write_now(buffers, host)
        finally:
            self._transfers.discard(serial)

    def _place_to_write(self, offset: int, length: int) -> int | None:
        if self.read_only or self._lost is not None or not self.write_cache:
            return None
        host = self._known_host(offset, length, COPIED)
        if host is None or not self._is_data(host, length):
            return None
        self._tracked.touch(offset, length)
        return host

    def _may_write(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the image is open for reading", self.path)
        if self._lost is not None:
            raise self._lost
        if self.header.incompatible & _CORRUPT:
            raise DamagedImage(self.path, "it is marked as corrupt; skep image check -r all mends it")

    def _after_write(self) -> None:
        if not self.write_cache or self._tables.crowded or self._refcounts.crowded:
            self.flush()

    def placed(self, offset: int, length: int) -> Write | None:
        if self._tables.words == 2:  # one cluster may take several steps, of which each waits for the one before
            return None
        self._may_write()
        serial = next(self._serial)
        self._transfers.add(serial)
        plans: list[Plan] = []
        at, end = offset, offset + length
        try:
            self._tracked.touch(offset, length)
            while at < end:
                plans.append(plan := self._next_plan(at, end))
                at += plan.length
        except BaseException:
            self._give_up(plans, serial)
            raise
        return partial(self._write_placed, plans, serial, offset)

    def _write_placed(self, plans: list[Plan], serial: int, offset: int, buffers: Buffers) -> None:
        rest, left = buffers, plans[::-1]
        try:
            while left:
                plan = left.pop()
                piece, rest = split(rest, plan.length) if left else (rest, [])
                self._carry_out(plan, piece, offset)
                offset += plan.length
        finally:
            self._give_up(left, serial)
        self._after_write()

    def _give_up(self, plans: list[Plan], serial: int) -> None:
        """Plans that nobody will carry out, of a transfer that has ended."""
        for plan in plans:
            self._settle(plan, None)
        self._transfers.discard(serial)

    def _write(self, buffers: Buffers, offset: int) -> None:
        end = offset + sum(map(len, buffers))
        rest = buffers
        while offset < end:
            plan = self._next_plan(offset, end)
            piece, rest = (rest, []) if plan.length == end - offset else split(rest, plan.length)
            self._carry_out(plan, piece, offset)
            offset += plan.length

    def _next_plan(self, offset: int, end: int) -> Plan:
        while True:
            with self._lock:
                plan = self._plan(offset, end)
            if isinstance(plan, Plan):
                return plan
            plan.wait()

    def _carry_out(self, plan: Plan, buffers: Buffers, offset: int) -> None:
        if plan.clusters:
            self._write_new(plan, buffers, offset)
        else:
            self._data.pwritev(buffers, plan.host)

    def _plan(self, offset: int, end: int) -> Plan | threading.Event:
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
        self._busy.update(dict.fromkeys(range(plan.index, plan.index + plan.clusters), plan))
        return plan

    def _wait_for(self, index: int) -> threading.Event:
        plan = self._busy[index]
        if plan.event is None:
            plan.event = threading.Event()
        return plan.event

    def _plan_in_place(self, found: tuple[Slice, int], index: int, inside: int, place: int, most: int) -> Plan:
        word = found[0].words[found[1]]
        if self._tables.words == 2:
            run = self._subclusters(found, inside, most)
            plan = Plan(place + inside, run.length)
            if run.kind is Kind.DATA:
                return plan
        else:
            plan = Plan(place + inside, min(most, self._cluster - inside))
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

    def _plan_new(self, index: int, last: int) -> Plan:
        """New clusters for those of the disk from ``index`` on that are like it in having no place."""
        blank = self._blank_row(index, last - index + 1)
        count = max(blank, 1)
        if not blank:
            first = self._entry(index)
            while index + count <= last and index + count not in self._busy:
                word = self._entry(index + count)
                if bool(word) != bool(first) or (word & COPIED and not word & COMPRESSED and word & OFFSET):
                    break
                if word and self._tables.words == 2:
                    break
                count += 1
        if self._apart:
            plan = Plan(index << self._bits, 0)
        else:
            start, count = self.take(count)
            plan = Plan(start << self._bits, 0)
            plan.fresh = start >= self._highest
            self._highest = max(self._highest, start + count)
        plan.index, plan.clusters, plan.blank = index, count, bool(blank)
        return plan

    def _blank_row(self, index: int, most: int) -> int:
        """How many clusters from here on, of this slice of the table, have empty entries and nobody at work on them, if
        it is quickly told: 0 may mean that it is not."""
        found = self._tables.find(index)
        if found is None or self._tables.words == 2:
            return 0
        row = found[0].words[found[1] : found[1] + most]
        return 0 if any(row) or not self._busy.keys().isdisjoint(range(index, index + len(row))) else len(row)

    def _write_new(self, plan: Plan, buffers: Buffers, offset: int) -> None:
        """Data into new clusters, and around it what was there before; then they are linked."""
        try:
            unit = self._cluster if plan.whole else self._subcluster
            start = offset // unit * unit
            end = -(-(offset + plan.length) // unit) * unit
            head, tail = bytearray(offset - start), bytearray(end - offset - plan.length)
            blank = self._fill_around(head, start) & self._fill_around(tail, offset + plan.length)
            base = plan.host - (plan.index << self._bits)
            if blank and plan.fresh and self._encryption is None:
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

    def _settle(self, plan: Plan, written: tuple[int, int] | None) -> None:
        """The plan was carried out, and these bytes of the disk were written, or it failed."""
        with self._lock:
            try:
                if plan.blank and written is not None:
                    row = range(plan.host | COPIED, (plan.host | COPIED) + (plan.clusters << self._bits), self._cluster)
                    self._tables.change_row(self._l2_to_change(plan.index), array("Q", row))
                    return
                for i in range(plan.clusters):
                    index = plan.index + i
                    if written is None:
                        if not plan.placed and not self._apart:
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

    # Zeros.

    def discard(self, offset: int, length: int) -> None:
        self._may_write()
        end = offset + length
        first = -(-offset // self._cluster)
        last = -(-end // self._cluster) if end == self.size else end // self._cluster
        if first < last:
            self._tracked.touch(first << self._bits, min(end, last << self._bits) - (first << self._bits))
        # Without a flag for zeros, a cluster that nobody needs shows what lies below it.
        if self.header.version >= 3 or self.backing_name() is None:
            self._clear_clusters(first, last, unmap=True, noted=self.backing_name() is not None)
        self._after_write()

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._may_write()
        end = offset + length
        unit = self._subcluster
        first = min(-(-offset // unit) * unit, end)
        last = max(first, end if end == self.size else end // unit * unit)
        below = self.header.version < 3 and self.backing_name() is not None
        if below or self._apart or (self.header.version < 3 and not unmap):
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
                self._clear_clusters(index, index_last, unmap, noted=True)
                stop = min(last, index_last << self._bits)
            at = stop
        self._zero_part(last, end)
        self._after_write()

    def _zero_part(self, offset: int, end: int) -> None:
        """Write zeros where something else may be."""
        while offset < end:
            stop = min(end, (offset // len(ZEROES) + 1) * len(ZEROES))
            with self._lock:
                runs = self._map(offset, stop)
            for run in runs:
                if run.kind in (Kind.DATA, Kind.COMPRESSED) or (run.kind is Kind.NONE and self.backing_name()):
                    self._write([ZEROES[: run.length]], offset)
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
                self._write([ZEROES[: end - start]], start)
                return
            event.wait()

    def _clear_clusters(self, first: int, last: int, unmap: bool, noted: bool) -> None:
        """Whole clusters of the disk become zeros. ``unmap``: their places are given back. ``noted``: those that are
        nowhere are noted to be zeros, whatever this image may be laid over some day."""
        while first < last:
            event = None
            with self._lock:
                for _ in range(_STEP):
                    if first >= last:
                        break
                    if first in self._busy:
                        event = self._wait_for(first)
                        break
                    first = self._clear_cluster(first, last, unmap, noted)
            if event is not None:
                event.wait()
            elif self._tables.crowded:
                self.flush()

    def _clear_cluster(self, index: int, last: int, unmap: bool, noted: bool) -> int:
        """One of them; returns which comes next. With the lock."""
        found = self._tables.find(index)
        noted = noted and self.header.version >= 3
        if found is None and not noted:
            return min(last, (index // self._tables.entries + 1) * self._tables.entries)
        found = self._l2_to_change(index) if found is None else found
        word = found[0].words[found[1]]
        wide = self._tables.words == 2
        bits = found[0].words[found[1] + 1] if wide else 0
        place = -1 if word & COMPRESSED else self._place(word)
        keep = place >= 0 and bool(word & COPIED) and not unmap
        if self._apart and place >= 0:
            self._data.discard(place, self._cluster)
            keep = True
        zero = self.header.version >= 3 and (noted or bool(word) or bool(bits))
        new_word = (word & (OFFSET | COPIED) if keep else 0) | (ZERO if zero and not wide else 0)
        new_bits = ALL_SUBCLUSTERS << 32 if zero else 0
        if new_word == word and new_bits == (bits if wide else new_bits):
            return index + 1
        found = self._l2_to_change(index)
        self._tables.change(found, new_word, new_bits if wide else None)
        if not keep:
            self._free_entry(word)
        return index + 1

    # Compressed clusters.

    def pack(self, data: bytes | memoryview) -> bytes:
        if self._apart:
            return b""
        whole = data if len(data) == self._cluster else bytes(data) + bytes(self._cluster - len(data))
        return compress(self.header.compression_type, whole) or b""

    def write_compressed(self, data: bytes | memoryview, offset: int, packed: bytes | None = None) -> None:
        """A whole cluster, or the end of the disk; one that does not get smaller is written as it is."""
        self._may_write()
        end = offset + len(data)
        if offset % self._cluster or end > self.size or (len(data) != self._cluster and end != self.size):
            raise ImageError("only whole clusters are compressed", self.path)
        if not data:
            return
        packed = self.pack(data) if packed is None else packed
        if not packed:
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
                    self._busy[index] = plan = Plan(host, len(data))
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
