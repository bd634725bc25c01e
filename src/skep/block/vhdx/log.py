"""The log of a VHDX file (2.3): changes of tables, written here before they are written in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from skep.block.backend import BlockBackend, Storage, read_at, write_at
from skep.block.format import ImageError
from skep.block.vhdx.layout import MIB, Region, checksum_right, with_checksum

SECTOR = 4096
MOST_SECTORS = 120
"""In one entry: two of the largest fit a log of 1 MiB, and their descriptors one sector."""
_MOST_REPLAY = 64 * MIB
"""The largest log that is replayed. Hyper-V and QEMU make it 1 MiB."""
_LARGEST_FILE = 1 << 50

_ENTRY = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR = struct.Struct("<4s4s8sQQ")
_ZEROES = struct.Struct("<4sIQQQ")


class Entry(NamedTuple):
    """``at`` and ``tail`` are offsets in the log, the sizes are those of the file when it was written."""

    at: int
    length: int
    tail: int
    sequence: int
    flushed: int
    last: int


def pack_entry(
    units: Sequence[tuple[int, bytes]], log: bytes, at: int, sequence: int, flushed: int, last: int
) -> bytes:
    """An entry that has these sectors, as (offset in the file, contents), and needs none before it."""
    length = SECTOR * (1 + len(units))
    head = _ENTRY.pack(b"loge", 0, length, at, sequence, len(units), 0, log, flushed, last)
    for offset, data in units:
        head += _DESCRIPTOR.pack(b"desc", data[-4:], data[:8], offset, sequence)
    high, low = sequence >> 32, sequence & 0xFFFFFFFF
    sectors = [struct.pack("<4sI", b"data", high) + data[8:-4] + struct.pack("<I", low) for _, data in units]
    return with_checksum(head.ljust(SECTOR, b"\0") + b"".join(sectors))


class Log:
    """The log as it was found, for replaying. Raises ImageError where it cannot be."""

    def __init__(self, file: BlockBackend, path: str, region: Region, guid: bytes) -> None:
        if region.length > _MOST_REPLAY:
            raise ImageError(f"a VHDX log of {region.length >> 20} MiB is not supported", path)
        self._file = file
        self._path = path
        self._region = region
        self._guid = guid
        self._sequence = self._active()

    @property
    def empty(self) -> bool:
        return not self._sequence

    def _read(self, at: int, length: int) -> bytes:
        """Around the end, where it comes to that."""
        at %= self._region.length
        first = min(length, self._region.length - at)
        data = read_at(self._file, self._region.offset + at, first)
        if first < length:
            data += read_at(self._file, self._region.offset, length - first)
        return bytes(data)

    def _entry(self, at: int) -> Entry | None:
        """The entry there, if there is one and it is whole (2.3.1). Each sector of an entry has a signature that no
        first one has, so entries do not overlap, and no byte is summed up twice."""
        head = self._read(at, SECTOR)
        signature, _, length, tail, sequence, count, _, guid, flushed, last = _ENTRY.unpack_from(head)
        if signature != b"loge" or guid != self._guid or not sequence:
            return None
        descriptors = -(-(_ENTRY.size + count * _DESCRIPTOR.size) // SECTOR)
        if length % SECTOR or not descriptors * SECTOR <= length <= self._region.length:
            return None
        if tail % SECTOR or tail >= self._region.length:
            return None
        for i in range(1, length // SECTOR):
            start = self._read(at + i * SECTOR, 4)
            if start not in ((b"desc", b"zero") if i < descriptors else (b"data",)):
                return None
        data = self._read(at, length)
        if not checksum_right(data):
            return None
        wanted = 0
        for i in range(count):
            kind, *_, number = _DESCRIPTOR.unpack_from(data, _ENTRY.size + i * _DESCRIPTOR.size)
            if number != sequence or kind not in (b"desc", b"zero"):
                return None
            wanted += kind == b"desc"
        if length != (descriptors + wanted) * SECTOR:
            return None
        for i in range(descriptors * SECTOR, length, SECTOR):
            high, low = data[i + 4 : i + 8], data[i + SECTOR - 4 : i + SECTOR]
            if int.from_bytes(low + high, "little") != sequence:
                return None
        return Entry(at, length, tail, sequence, flushed, last)

    def _active(self) -> list[Entry]:
        """The sequence of entries to replay (2.3.2): of those that reach back to their tail, the newest."""
        entries = {}
        for at in range(0, self._region.length, SECTOR):
            entry = self._entry(at)
            if entry is not None:
                entries[at] = entry
        best: list[Entry] = []
        for head in entries.values():
            if self._next(entries, head) is not None or (best and head.sequence <= best[-1].sequence):
                continue
            chain = []
            entry = entries.get(head.tail)
            while entry is not None:
                chain.append(entry)
                entry = self._next(entries, entry)
            if chain and chain[-1] == head:
                best = chain
        return best

    def _next(self, entries: dict[int, Entry], entry: Entry) -> Entry | None:
        following = entries.get((entry.at + entry.length) % self._region.length)
        return following if following is not None and following.sequence == entry.sequence + 1 else None

    def replay(self, file: Storage) -> bool:
        """Write everything in its place, not durably. False: the log is empty. Raises ImageError or OSError."""
        if not self._sequence:
            return False
        head = self._sequence[-1]
        if head.flushed > file.size:
            raise ImageError("the VHDX file is shorter than its log says; it was cut off", self._path)
        if head.last > _LARGEST_FILE:
            raise ImageError("the VHDX log wants the file impossibly long", self._path)
        if head.last > file.size:
            file.resize(head.last)
        for entry in self._sequence:
            self._replay_entry(file, entry)
        return True

    def _replay_entry(self, file: Storage, entry: Entry) -> None:
        data = self._read(entry.at, entry.length)
        (count,) = struct.unpack_from("<I", data, 24)
        at = -(-(_ENTRY.size + count * _DESCRIPTOR.size) // SECTOR) * SECTOR
        for i in range(count):
            where = _ENTRY.size + i * _DESCRIPTOR.size
            kind, trailing, leading, offset, _ = _DESCRIPTOR.unpack_from(data, where)
            length = SECTOR
            if kind == b"zero":
                _, _, length, offset, _ = _ZEROES.unpack_from(data, where)
            inside = self._region.offset < offset + length and offset < self._region.offset + self._region.length
            if offset % SECTOR or length % SECTOR or offset + length > file.size or inside:
                raise ImageError("the VHDX log has a change of what is not there", self._path)
            if kind == b"zero":
                file.write_zeroes(offset, length, True)
            else:
                write_at(file, offset, leading + data[at + 8 : at + SECTOR - 4] + trailing)
                at += SECTOR
