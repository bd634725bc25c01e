"""Snapshots inside the image: a copy of the L1 table each, whose clusters have one reference more.

Everything is flushed before; the header, written last, is the moment at which a snapshot is there or gone. What a power
cut leaves before or after it are counts that are too high.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from skep.block.backend import read_at
from skep.block.format import DamagedImage, ImageError, Snapshot
from skep.block.qcow2.header import MOST_L1_BYTES, MOST_SNAPSHOTS, Incompatible
from skep.block.qcow2.refcounts import from_big_endian, words_in
from skep.block.qcow2.tables import COMPRESSED, COPIED, OFFSET, numbered

if TYPE_CHECKING:
    from skep.block.qcow2.image import Qcow2Image

_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
_MOST_BYTES = 64 << 20
_MOST_EXTRA = 1024
_NO_ICOUNT = (1 << 64) - 1


class Entry(NamedTuple):
    snapshot: Snapshot
    l1_offset: int
    l1_size: int
    """Entries."""
    extra: bytes = b""
    """Behind what we know of the extra data."""


def read(image: Qcow2Image) -> list[Entry]:
    """Raises DamagedImage."""
    return [entry for entry, _ in _read(image)]


def table_size(image: Qcow2Image) -> int:
    """Bytes of the table of snapshots."""
    return max((end for _, end in _read(image)), default=0)


def sound(image: Qcow2Image) -> tuple[list[Entry], bool]:
    """Snapshots of a damaged image that can be read, with tables that are in the file; and whether those are all."""
    kept, whole, total = [], True, 0
    try:
        for entry, _ in _read(image):
            total += entry.l1_size * 8
            try:
                length_of_l1(image, entry)
            except DamagedImage:
                whole = False
                continue
            if total > image.file.size or entry.l1_offset + entry.l1_size * 8 > image.file.size:
                whole = False
            else:
                kept.append(entry)
    except DamagedImage:
        whole = False
    return kept, whole


def _read(image: Qcow2Image) -> Iterator[tuple[Entry, int]]:
    """Each with where it ends in the table. Raises DamagedImage at the first that cannot be."""
    header = image.header
    at = start = header.snapshots_offset

    def take(length: int) -> bytes:
        nonlocal at
        if at + length > image.file.size or at + length - start > _MOST_BYTES:
            raise DamagedImage(image.path, "the table of snapshots ends too early")
        data = bytes(read_at(image.file, at, length))
        at += length
        return data

    for _ in range(header.nb_snapshots):
        l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, state, extra_size = _ENTRY.unpack(
            take(_ENTRY.size)
        )
        if extra_size > _MOST_EXTRA or l1_size * 8 > MOST_L1_BYTES or l1_offset % image.cluster_size:
            raise DamagedImage(image.path, "an entry of the table of snapshots")
        extra = take(extra_size)
        size, icount = image.header.size, None
        if extra_size >= 8:
            state = int.from_bytes(extra[:8], "big")
        if extra_size >= 16:
            size = int.from_bytes(extra[8:16], "big")
        if extra_size >= 24 and (count := int.from_bytes(extra[16:24], "big")) != _NO_ICOUNT:
            icount = count
        id_, name = (take(n).decode(errors="surrogateescape") for n in (id_size, name_size))
        at = start + -(-(at - start) // 8) * 8
        one = Snapshot(id_, name, size, state, seconds, nanoseconds, clock, icount)
        yield Entry(one, l1_offset, l1_size, extra[24:]), at - start


def pack_table(entries: list[Entry]) -> bytes:
    parts = []
    for one in entries:
        s = one.snapshot
        extra = _EXTRA.pack(s.state_size, s.size, _NO_ICOUNT if s.icount is None else s.icount) + one.extra
        id_, name = (text.encode(errors="surrogateescape") for text in (s.id, s.name))
        head = _ENTRY.pack(
            one.l1_offset,
            one.l1_size,
            len(id_),
            len(name),
            s.seconds,
            s.nanoseconds,
            s.vm_clock,
            min(s.state_size, 0xFFFF_FFFF),
            len(extra),
        )
        whole = head + extra + id_ + name
        parts.append(whole + bytes(-len(whole) % 8))
    return b"".join(parts)


def find(image: Qcow2Image, name: str) -> Entry:
    """By its id, or else its name. Raises ImageError."""
    entries = read(image)
    by_id = [one for one in entries if one.snapshot.id == name]
    for one in by_id or [one for one in entries if one.snapshot.name == name]:
        return one
    raise ImageError(f"there is no snapshot {name!r}", image.path)


def create(image: Qcow2Image, name: str) -> None:
    if image.has_data_file:
        raise ImageError("has its data in another file, and so no snapshots", image.path)
    image.settle()
    entries = read(image)
    if len(entries) >= MOST_SNAPSHOTS:
        raise ImageError("there are as many snapshots as can be", image.path)
    ids = [int(one.snapshot.id) for one in entries if one.snapshot.id.isascii() and one.snapshot.id.isdecimal()]
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    taken = Snapshot(str(max(ids, default=0) + 1), name, image.size, 0, seconds & 0xFFFF_FFFF, nanoseconds, 0, 0)
    with _uncertain(image):
        l1 = image.l1()
        _count(image, l1, 1)
        set_flags(image)
        image.settle()
        offset = image.place_words([l1], len(l1)) if l1 else 0
        _write(image, [*entries, Entry(taken, offset, len(l1))])


def delete(image: Qcow2Image, name: str) -> None:
    image.settle()
    gone = find(image, name)
    length_of_l1(image, gone)
    with _uncertain(image):
        _write(image, [one for one in read(image) if one != gone])
        _count(image, chain.from_iterable(l1_in_parts(image, gone)), -1)
        image.give_back(_row(image, gone.l1_offset, gone.l1_size * 8))
        image.settle()
        set_flags(image)


def apply(image: Qcow2Image, name: str) -> None:
    image.settle()
    wanted = find(image, name)
    old = array("Q", filter(None, image.l1()))  # an image may have room for far more tables than there are
    length = length_of_l1(image, wanted)
    with _uncertain(image):
        _count(image, chain.from_iterable(l1_in_parts(image, wanted)), 1)
        image.flush()
        shared = (array("Q", (entry & ~COPIED for entry in part)) for part in l1_in_parts(image, wanted))
        image.replace_l1(shared, length, wanted.snapshot.size)
        image.settle()
        _count(image, old, -1)
        image.settle()
        set_flags(image)


def _clusters_of(image: Qcow2Image, l1_entry: int) -> list[int]:
    """Clusters that an L2 table refers to, as often as it does."""
    found: list[int] = []
    cluster = image.cluster_size
    words = from_big_endian(read_at(image.file, l1_entry & OFFSET, cluster))
    for word in words[:: 2 if image.header.extended_l2 else 1]:
        if word & COMPRESSED:
            host, size = image.packed_extent(word)
            found += range(host // cluster, (host + size - 1) // cluster + 1)
        elif word & OFFSET and not image.has_data_file:
            found.append((word & OFFSET) // cluster)
    return found


def _count(image: Qcow2Image, l1: Iterable[int], change: int) -> None:
    """References of the tree under an L1 table, which is all in the file: one more, or one fewer, of each."""
    seen = set()
    for entry in l1:
        if entry & OFFSET:
            if entry & OFFSET & (image.cluster_size - 1) or entry & OFFSET in seen:
                raise DamagedImage(image.path, f"an L2 table is at {entry & OFFSET:#x}")
            seen.add(entry & OFFSET)
            image.count([(entry & OFFSET) // image.cluster_size, *_clusters_of(image, entry)], change)


def set_flags(image: Qcow2Image) -> None:
    """COPIED says that a cluster has one reference: in the active tables, after the counts have changed."""
    seen = set()
    for i, entry in numbered([image.l1()]):
        table = entry & OFFSET
        if not table or table in seen:
            continue
        seen.add(table)
        image.change_l1(i, table | (COPIED if image.count_of(table // image.cluster_size) == 1 else 0))
        image.set_copied_flags(i)


def length_of_l1(image: Qcow2Image, entry: Entry) -> int:
    """How many entries a snapshot's L1 table needs for its disk, or has. Raises DamagedImage."""
    least = -(-entry.snapshot.size // (image.header.l2_entries * image.cluster_size))
    if entry.snapshot.size % 512 or least * 8 > MOST_L1_BYTES:
        raise DamagedImage(image.path, f"a snapshot of {entry.snapshot.size} bytes")
    return max(least, entry.l1_size)


def l1_in_parts(image: Qcow2Image, entry: Entry) -> Iterator[array[int]]:
    """A snapshot's L1 table, as far as it is in the file: whole, it may be as large as the image's own."""
    return words_in(image.file, entry.l1_offset, entry.l1_size)


def _write(image: Qcow2Image, entries: list[Entry]) -> None:
    """The table of snapshots, in another place, and then the header that says where."""
    old = _row(image, image.header.snapshots_offset, table_size(image)) if image.header.nb_snapshots else []
    packed = pack_table(entries)
    image.header.snapshots_offset = image.place_table(packed) if packed else 0
    image.header.nb_snapshots = len(entries)
    image.flush()
    image.write_header()
    image.flush()
    image.give_back(old)


def _row(image: Qcow2Image, offset: int, size: int) -> list[int]:
    return list(range(offset // image.cluster_size, -(-(offset + size) // image.cluster_size))) if size else []


@contextmanager
def _uncertain(image: Qcow2Image) -> Iterator[None]:
    """Meanwhile the file says that its counts may be wrong; whoever finds it so counts anew."""
    if image.header.version < 3:
        yield
        return
    image.header.incompatible |= Incompatible.DIRTY
    image.write_header()
    image.flush()
    yield
    image.settle()
    image.header.incompatible &= ~Incompatible.DIRTY
    image.write_header()
    image.flush()
