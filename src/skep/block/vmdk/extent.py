"""One part of a VMDK disk: sparse ("Hosted Sparse Extents", "ESX Server Sparse Extents"), with compressed grains or
without, flat, or of zeros."""

from __future__ import annotations

import errno
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from sys import byteorder
from typing import NamedTuple, Self

from skep.block.backend import BlockBackend, Buffers, Extent, File, fill_zeroes, read_at, read_padded, write_at
from skep.block.format import SECTOR, CheckResult, DamagedImage, Image, ImageError
from skep.block.places import Owned, examine
from skep.block.sparse import Kind, Run, SparseImage
from skep.block.tables import Table, check_room, first_in_use

HOSTED, ESX = b"KDMV", b"COWD"

_HOSTED = struct.Struct("<4sIIQQQQIQQQB4sH433x")
_ESX = struct.Struct("<4sIIIIIII")
_GRAIN = struct.Struct("<QI")
"""A marker before a compressed grain: its first sector on the disk, and how many bytes follow."""
_GTE = struct.Struct("<I")

_NEWLINES, _REDUNDANT, _ZEROED, _COMPRESSED, _MARKERS = 1, 2, 4, 1 << 16, 1 << 17
_NEWLINE_TEST = b"\n \r\n"
_DEFLATE = 1
_AT_END = (1 << 64) - 1
_ZEROED_GRAIN = 1
_ESX_TABLE = 4096
_MOST_TABLES = 1 << 22
_LARGEST_GRAIN = 1 << 21
"""Sectors; of a compressed one, less: it is unpacked in memory."""
_LARGEST_PACKED = 1 << 13
_LONGEST_DESCRIPTOR = 1 << 11


@dataclass(frozen=True, slots=True)
class SparseHeader:
    """Of a hosted or an ESX sparse extent; offsets and lengths are sectors."""

    magic: bytes
    capacity: int
    grain: int
    directory: int
    """Where the grain directory is."""
    table_length: int = 512
    """Entries of a grain table."""
    redundant: int = 0
    """Where the other grain directory is; 0: there is none."""
    descriptor: int = 0
    descriptor_length: int = 0
    overhead: int = 0
    zeroed: bool = False
    """Grains can be marked as zeros."""
    compressed: bool = False
    markers: bool = False

    @property
    def tables(self) -> int:
        return -(-self.capacity // (self.grain * self.table_length))

    @classmethod
    def read(cls, file: BlockBackend, path: str) -> Self:
        """Raises ImageError."""
        data = read_at(file, 0, SECTOR)
        if data[:4] == ESX:
            _, _, _, capacity, grain, directory, count, _ = _ESX.unpack_from(data)
            header = cls(ESX, capacity, grain, directory, _ESX_TABLE)
            if header.grain and header.tables > count:
                raise ImageError("the grain directory of the VMDK is too short", path)
        else:
            header = cls._hosted(data, path)
            if header.directory == _AT_END:
                # "Stream-Optimized Compressed Sparse Extents": the footer, before the end-of-stream marker, counts.
                footer = read_at(file, max(0, file.size - 2 * SECTOR), SECTOR)
                header = cls._hosted(footer, path)
        header._check(file, path)
        return header

    @classmethod
    def _hosted(cls, data: bytes | bytearray, path: str) -> Self:
        fields = _HOSTED.unpack_from(data)
        magic, version, flags, capacity, grain, descriptor, descriptor_length, length = fields[:8]
        redundant, directory, overhead, _, newlines, compression = fields[8:]
        if magic != HOSTED:
            raise ImageError("this is not a sparse VMDK extent", path)
        if version not in (1, 2, 3):
            raise ImageError(f"a VMDK of version {version} is not supported", path)
        if flags & _NEWLINES and newlines != _NEWLINE_TEST:
            raise ImageError("the VMDK was damaged by a transfer as text", path)
        if flags & _COMPRESSED and compression != _DEFLATE:
            raise ImageError(f"the VMDK is compressed by method {compression}, which is not known", path)
        return cls(
            magic,
            capacity,
            grain,
            directory,
            length,
            redundant if flags & _REDUNDANT else 0,
            descriptor,
            descriptor_length,
            overhead,
            bool(flags & _ZEROED),
            bool(flags & _COMPRESSED),
            bool(flags & _MARKERS),
        )

    def _check(self, file: BlockBackend, path: str) -> None:
        largest = _LARGEST_PACKED if self.compressed else _LARGEST_GRAIN
        if not 0 < self.grain <= largest or self.grain & (self.grain - 1):
            raise ImageError(f"a VMDK grain of {self.grain} sectors is not possible", path)
        if not 0 < self.table_length <= _ESX_TABLE or not 0 < self.capacity < 1 << 53:
            raise ImageError("a VMDK extent of that size is not possible", path)
        if self.tables > _MOST_TABLES:
            raise ImageError("the grain directory of the VMDK is impossibly long", path)
        if self.descriptor_length > _LONGEST_DESCRIPTOR:
            raise ImageError("the descriptor of the VMDK is impossibly long", path)
        for place in (self.directory, self.redundant):
            if (place * SECTOR) + self.tables * 4 > file.size:
                raise ImageError("the grain directory of the VMDK is beyond the file", path)

    def pack(self) -> bytes:
        """Of a hosted extent."""
        flags = _NEWLINES | _REDUNDANT | _ZEROED * self.zeroed
        flags |= _COMPRESSED * self.compressed | _MARKERS * self.markers
        version = 3 if self.compressed else 2 if self.zeroed else 1
        method = _DEFLATE if self.compressed else 0
        sizes = (self.capacity, self.grain, self.descriptor, self.descriptor_length, self.table_length)
        places = (self.redundant, self.directory, self.overhead)
        return _HOSTED.pack(HOSTED, version, flags, *sizes, *places, 0, _NEWLINE_TEST, method)


class Below(NamedTuple):
    """What an extent lies over: part of the backing image of its disk, which is set after the extent is opened."""

    disk: Image
    offset: int
    """Of the extent on the disk, bytes."""


class SparseExtent(SparseImage):
    """Grains, found by a directory of tables. Raises ImageError."""

    format = "vmdk"

    def __init__(self, file: File, below: Below) -> None:
        header = SparseHeader.read(file, file.path)
        self.header = header
        self._below = below
        self._directory = _read_directory(file, header.directory, header.tables)
        table = self._tables(file, self._directory)
        super().__init__(file, header.capacity * SECTOR, header.grain * SECTOR, table)
        self._redundant: Table | None = None
        if header.redundant and not file.read_only:
            self._redundant = self._tables(file, _read_directory(file, header.redundant, header.tables))
        if header.magic == ESX and not file.read_only:
            raise ImageError("ESX sparse extents of VMDK are only read", file.path, "say ro")
        self._end = -(-file.size // SECTOR) * SECTOR
        if header.compressed and file.size >= 2 * SECTOR and not any(read_at(file, file.size - SECTOR, SECTOR)):
            self._end -= SECTOR  # the end-of-stream marker: close() writes another
        self._opened_end = self._end

    def _tables(self, file: File, directory: array[int]) -> Table:
        size = self.header.table_length * _GTE.size

        def where(number: int) -> int | None:
            offset = directory[number] * SECTOR
            if not offset:
                return None
            if offset + size > file.size:
                raise DamagedImage(file.path, f"grain table {number} is at {offset:#x}, beyond the file")
            return offset

        count = self.header.tables * self.header.table_length
        next_page = partial(first_in_use, directory)
        return Table(file, _GTE, count, where, self.header.table_length, next_page=next_page)

    def _check_room(self) -> None:
        tables = self.header.tables - self._directory.count(0)
        check_room(self.file, tables, self.header.table_length * _GTE.size)

    # Grains.

    def _find(self, block: int) -> tuple[Kind, int]:
        entry = self._table[block]
        if entry == 0:
            return Kind.ABSENT, 0
        if entry == _ZEROED_GRAIN and self.header.zeroed:
            return Kind.ZERO, 0
        host = entry * SECTOR
        length = _GRAIN.size if self.header.compressed else self._block_length(block)
        if host + length > self.file.size:
            raise DamagedImage(self.path, f"grain {block} is at {host:#x}, beyond the file")
        return (Kind.PACKED if self.header.compressed else Kind.DATA), host

    def _bind(self, block: int, host: int) -> None:
        self._set(block, host // SECTOR)

    def _set(self, block: int, entry: int) -> None:
        number = block // self.header.table_length
        if not self._directory[number]:
            raise DamagedImage(self.path, f"grain table {number} is missing")
        self._table[block] = entry
        if self._redundant is not None:
            self._redundant[block] = entry

    def _bind_zero(self, block: int) -> bool:
        if not self.header.zeroed:
            return False
        self._set(block, _ZEROED_GRAIN)
        return True

    def _reserve(self, length: int | None = None) -> int:
        if self._end >= SECTOR << 32:
            raise OSError(errno.EFBIG, "a VMDK extent is 2 TiB long at most", self.path)
        return super()._reserve(length)

    def _begin(self) -> bool:
        if self._redundant is not None:
            self._redundant.begin()
        return super()._begin()

    def _commit(self) -> None:
        if self._redundant is not None:
            with self._lock:
                units = list(self._redundant.units(SECTOR))
            for offset, data in units:
                write_at(self.file, offset, data)
        super()._commit()

    def _landed(self) -> None:
        if self._redundant is not None:
            self._redundant.landed()
        super()._landed()

    # What is below.

    def _has_below(self) -> bool:
        return self._below.disk.backing is not None

    def _read_below(self, buffers: Buffers, offset: int) -> None:
        read_below(self._below, buffers, offset)

    # Compressed grains.

    def _unpack(self, block: int) -> bytes:
        with self._lock:
            kind, host = self._find(block)
        if kind is not Kind.PACKED:
            raise DamagedImage(self.path, f"grain {block} went away")
        length, start = self._packed_length(host)
        packed = read_at(self.file, host + start, min(length, self.file.size - host - start))
        try:
            data = zlib.decompressobj().decompress(packed, self.block_size)
        except zlib.error as e:
            raise DamagedImage(self.path, f"grain {block} cannot be unpacked: {e}") from None
        if len(data) < self._block_length(block):
            raise DamagedImage(self.path, f"grain {block} has {len(data)} bytes")
        return data

    def _packed_length(self, host: int) -> tuple[int, int]:
        """How many compressed bytes there are, and where they begin."""
        if not self.header.markers:
            return 2 * self.block_size, 0
        _, length = _GRAIN.unpack(read_at(self.file, host, _GRAIN.size))
        if length > 2 * self.block_size:
            raise DamagedImage(self.path, f"the compressed grain at {host:#x} is {length} bytes long")
        return length, _GRAIN.size

    def _place(self, offset: int, length: int) -> list[Run]:
        if not self.header.compressed:
            return super()._place(offset, length)
        return [Run(Kind.PACKED, length)]

    def _fill_block(self, block: int, buffers: Buffers, start: int, length: int) -> None:
        """A compressed grain is never written over: its new contents go to the end of the stream."""
        if not self.header.compressed:
            super()._fill_block(block, buffers, start, length)
            return
        data = memoryview(bytearray(self.block_size))
        if length < self._block_length(block):
            self.preadv([data[: self._block_length(block)]], block * self.block_size)
        data[start : start + length] = b"".join(buffers)
        with self._lock:
            kind, _ = self._find(block)
        if kind is Kind.ABSENT and not self._has_below() and data == bytes(self.block_size):
            return
        packed = zlib.compress(data)
        record = _GRAIN.pack(block * self.header.grain, len(packed)) + packed
        with self._lock:
            host = self._reserve(-(-len(record) // SECTOR) * SECTOR)
        write_at(self.file, host, record)
        with self._lock:
            self._bind(block, host)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if self.header.compressed:
            Image.write_zeroes(self, offset, length, unmap)
        else:
            super().write_zeroes(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        if not self.header.compressed:
            super().discard(offset, length)

    def _finish(self) -> None:
        super()._finish()
        if self.header.compressed and self._end != self._opened_end:
            write_at(self.file, self._end, bytes(SECTOR))  # the end-of-stream marker
            self.file.flush()

    # As a whole.

    def _reserved(self) -> Iterator[tuple[int, int]]:
        header = self.header
        yield 0, SECTOR
        yield header.descriptor * SECTOR, header.descriptor_length * SECTOR
        length = -(-header.tables * _GTE.size // SECTOR) * SECTOR
        for place in (header.directory, header.redundant):
            if place:
                yield place * SECTOR, length
        if header.redundant:
            for place in _read_directory(self.file, header.redundant, header.tables):
                if place:
                    yield place * SECTOR, header.table_length * _GTE.size

    def _owned(self) -> Iterator[Owned]:
        """Grains by their numbers, grain tables by numbers behind those."""
        for number, place in enumerate(self._directory):
            if place:
                offset, length = place * SECTOR, self.header.table_length * _GTE.size
                wrong = None
                if offset + length > self.file.size:
                    wrong = f"grain table {number} is at {offset:#x}, beyond the file"
                yield Owned(self._blocks + number, offset, length, wrong)
        if not self.header.compressed:
            yield from super()._owned()
            return
        self._check_room()
        block = 0
        while block < self._blocks:
            yield from self._owned_packed(block)
            with self._lock:
                block = self._skip(block + 1, self._blocks)

    def _owned_packed(self, block: int) -> Iterator[Owned]:
        try:
            with self._lock:
                kind, host = self._find(block)
            if kind is Kind.PACKED:
                length, start = self._packed_length(host)
                yield Owned(block, host, -(-(start + length) // SECTOR) * SECTOR if start else SECTOR)
        except DamagedImage as e:
            yield Owned(block, 0, 0, e.strerror)

    def _forget(self, block: int) -> None:
        if block < self._blocks:
            self._set(block, 0)
            return
        number = block - self._blocks
        self._directory[number] = 0
        write_at(self.file, self.header.directory * SECTOR + number * _GTE.size, bytes(_GTE.size))
        self._table.drop(number)

    def check(self) -> CheckResult:
        if not self.header.compressed:
            return super().check()
        return examine(self.file, 1 << 62, self._reserved, self._owned, None)


class FlatExtent:
    """Bytes of a file, from ``start`` on."""

    def __init__(self, file: File, start: int, size: int) -> None:
        if start + size > file.size:
            raise ImageError("the flat extent of the VMDK is shorter than its descriptor says", file.path)
        self.file = file
        self.size = size
        self._start = start

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self.file.preadv(buffers, self._start + offset)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        self.file.pwritev(buffers, self._start + offset)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return self.file.read_now(buffers, self._start + offset)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return self.file.write_now(buffers, self._start + offset)

    def discard(self, offset: int, length: int) -> None:
        self.file.discard(self._start + offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.file.write_zeroes(self._start + offset, length, unmap)

    def flush(self) -> None:
        self.file.flush()

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        for extent in self.file.extents(self._start + offset, length):
            yield extent._replace(offset=extent.offset - self._start)

    def close(self) -> None:
        self.file.close()


class ZeroExtent:
    """Zeros, which no file holds; what is written there is an error."""

    def __init__(self, size: int, path: str) -> None:
        self.size = size
        self._path = path

    def preadv(self, buffers: Buffers, offset: int) -> None:
        fill_zeroes(buffers)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        raise OSError(errno.EROFS, "an extent of zeros is only read", self._path)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        fill_zeroes(buffers)
        return True

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def discard(self, offset: int, length: int) -> None:
        pass

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        pass

    def flush(self) -> None:
        pass

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, zero=True)

    def close(self) -> None:
        pass


def read_below(below: Below, buffers: Buffers, offset: int) -> None:
    read_padded(below.disk.backing, buffers, offset + below.offset)


def _read_directory(file: BlockBackend, sector: int, count: int) -> array[int]:
    directory = array("I")
    directory.frombytes(read_at(file, sector * SECTOR, count * _GTE.size))
    if byteorder == "big":
        directory.byteswap()
    return directory


def make_sparse(file: File, capacity: int, descriptor: bytes, *, zeroed: bool, compressed: bool) -> None:
    """Write a new hosted sparse extent of ``capacity`` sectors, with all its grain tables, into an empty file."""
    grain, table = 128, 512
    room = -(-max(len(descriptor), 20 * SECTOR) // SECTOR) if descriptor else 0
    probe = SparseHeader(HOSTED, capacity, grain, 0, table)
    directory_length = -(-probe.tables * _GTE.size // SECTOR)
    table_length = table * _GTE.size // SECTOR
    redundant = 1 + room
    directory = redundant + directory_length + probe.tables * table_length
    overhead = -(-(directory + directory_length + probe.tables * table_length) // grain) * grain
    header = SparseHeader(
        HOSTED,
        capacity,
        grain,
        directory,
        table,
        redundant,
        1 if room else 0,
        room,
        overhead,
        zeroed,
        compressed,
        compressed,
    )
    file.resize(overhead * SECTOR)
    write_at(file, 0, header.pack())
    write_at(file, SECTOR, descriptor)
    for place in (redundant, directory):
        first = place + directory_length
        entries = array("I", range(first, first + probe.tables * table_length, table_length))
        if byteorder == "big":
            entries.byteswap()
        write_at(file, place * SECTOR, entries.tobytes())
