"""Space-efficient sparse extents, as ESXi 6.5 and later make them for snapshots: read only.

VMware publishes no specification; QEMU's `block/vmdk.c` tells the layout. All is little-endian; words have 64 bits, the
first of which say what an entry is. Offsets and lengths in the headers are in sectors.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from skep.block.backend import Buffers, File, read_at
from skep.block.format import SECTOR, DamagedImage, ImageError
from skep.block.sparse import Kind, SparseImage
from skep.block.tables import Table, check_room
from skep.block.vmdk.extent import Below, read_below

_CONSTANT = struct.Struct("<26Q")
_VOLATILE = struct.Struct("<4Q")
_MAGIC, _VERSION, _VOLATILE_MAGIC = 0xCAFEBABE, 0x2_0000_0001, 0xCAFECAFE
_GRAIN, _TABLE = 8, 64
"""Sectors."""
_ENTRY = struct.Struct("<Q")
_PER_TABLE = _TABLE * SECTOR // _ENTRY.size
_MOST_TABLES = 1 << 22
"""64 TiB."""
_THERE = 0x1000_0000
"""The upper half of an entry of the grain directory."""
_UNMAPPED, _ZERO, _DATA = 1, 2, 3
"""The uppermost four bits of an entry of a grain table."""


@dataclass(frozen=True, slots=True)
class Header:
    capacity: int
    directory: int
    directory_length: int
    tables: int
    """Where the grain tables are."""
    grains: int

    @classmethod
    def read(cls, file: File) -> Self:
        """Raises ImageError."""
        fields = _CONSTANT.unpack_from(read_at(file, 0, SECTOR))
        magic, version, capacity, grain, table, flags, _, _, _, _, volatile, _ = fields[:12]
        directory, directory_length, tables, _, _, _, _, _, grains, _ = fields[16:]
        path = file.path
        if magic != _MAGIC or version != _VERSION:
            raise ImageError("this is not a seSparse VMDK extent, or of an unknown version", path)
        if (grain, table, flags) != (_GRAIN, _TABLE, 0):
            raise ImageError(f"a seSparse extent with grains of {grain} and tables of {table} sectors", path)
        needed = -(-capacity // (_GRAIN * _PER_TABLE))
        if not 0 < needed <= min(_MOST_TABLES, directory_length * SECTOR // _ENTRY.size):
            raise ImageError("the grain directory of the seSparse extent does not fit its disk", path)
        if max(directory, tables, grains, volatile) >= 1 << 53 or directory * SECTOR + needed * 8 > file.size:
            raise ImageError("the grain directory of the seSparse extent is beyond the file", path)
        magic, _, _, replay = _VOLATILE.unpack_from(read_at(file, volatile * SECTOR, SECTOR))
        if magic != _VOLATILE_MAGIC or replay:
            raise ImageError("the journal of the seSparse extent has to be replayed, which only ESXi can", path)
        return cls(capacity, directory, needed, tables, grains)


class SeSparseExtent(SparseImage):
    """Grains of 4 KiB, found by a directory of tables. Raises ImageError."""

    format = "vmdk"

    def __init__(self, file: File, below: Below) -> None:
        self._header = header = Header.read(file)
        self._below = below
        if not file.read_only:
            raise ImageError("seSparse extents of VMDK are only read", file.path, "say ro")
        self._directory = array("Q", bytes(read_at(file, header.directory * SECTOR, header.directory_length * 8)))
        if sys.byteorder == "big":
            self._directory.byteswap()
        count = header.directory_length * _PER_TABLE
        table = Table(file, _ENTRY, count, self._place_of_table, _PER_TABLE)
        super().__init__(file, header.capacity * SECTOR, _GRAIN * SECTOR, table)

    def _place_of_table(self, number: int) -> int | None:
        entry = self._directory[number]
        if not entry:
            return None
        offset = (self._header.tables + (entry & 0xFFFF_FFFF) * _TABLE) * SECTOR
        if entry >> 32 != _THERE or offset + _TABLE * SECTOR > self.file.size:
            raise DamagedImage(self.path, f"grain table {number} is {entry:#x}")
        return offset

    def _check_room(self) -> None:
        check_room(self.file, len(self._directory) - self._directory.count(0), _TABLE * SECTOR)

    def _find(self, block: int) -> tuple[Kind, int]:
        entry = self._table[block]
        kind = entry >> 60
        if not entry:
            return Kind.ABSENT, 0
        if kind in (_UNMAPPED, _ZERO):
            return Kind.ZERO, 0
        number = (entry >> 48 & 0xFFF) | (entry & 0xFFFF_FFFF_FFFF) << 12
        host = (self._header.grains + number * _GRAIN) * SECTOR
        if kind != _DATA or host + self._block_length(block) > self.file.size:
            raise DamagedImage(self.path, f"grain {block} is {entry:#x}")
        return Kind.DATA, host

    def _has_below(self) -> bool:
        return self._below.disk.backing is not None

    def _read_below(self, buffers: Buffers, offset: int) -> None:
        read_below(self._below, buffers, offset)

    def _reserved(self) -> Iterator[tuple[int, int]]:
        yield 0, self._header.grains * SECTOR
