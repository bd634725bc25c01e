"""qcow, the first version of QEMU's own format: read only. Everything is big-endian.

The reference is QEMU's implementation; there never was a specification.
"""

from __future__ import annotations

import struct
import zlib
from functools import cached_property

from skep.block.backend import File, read_at
from skep.block.format import BackingName, Can, CheckResult, DamagedImage, ImageError
from skep.block.sparse import Kind, SparseImage
from skep.block.tables import Table, check_room, contiguous

_HEADER = struct.Struct(">4sIQIIQBBxxIQ")
_ENTRY = struct.Struct(">Q")
_COMPRESSED = 1 << 63
_LONGEST_NAME = 1023
_LARGEST_DISK = 1 << 62
_MOST_TABLES = 1 << 22


class QcowImage(SparseImage):
    """Clusters, found by a table of tables; compressed, or not, or in a backing file."""

    format = "qcow"
    can = Can.NOTHING

    def __init__(self, file: File) -> None:
        path = file.path
        fields = _HEADER.unpack(read_at(file, 0, _HEADER.size))
        magic, version, name_at, name_length, _, size, cluster_bits, table_bits, method, directory = fields
        if magic != b"QFI\xfb" or version != 1:
            raise ImageError("this is not a qcow image", path)
        if method:
            raise ImageError("an encrypted qcow image is not supported", path)
        if not 9 <= cluster_bits <= 16 or not 6 <= table_bits <= 13:
            raise ImageError(f"qcow clusters of {cluster_bits} bits, tables of {table_bits}, are not possible", path)
        if not 0 < size <= _LARGEST_DISK or size % 512:
            raise ImageError(f"a qcow disk of {size} bytes is not possible", path)
        tables = -(-size >> cluster_bits + table_bits)
        if tables > _MOST_TABLES:
            raise ImageError(f"a qcow disk of {size} bytes is not supported", path)
        if directory + tables * _ENTRY.size > file.size:
            raise ImageError("the table of the qcow image is beyond the file", path)
        self._name = ""
        if name_at:
            if name_length > _LONGEST_NAME or name_at + name_length > file.size:
                raise ImageError("the name of the qcow image's backing file is too long", path)
            self._name = read_at(file, name_at, name_length).decode("utf-8", "surrogateescape")
        self._cluster_bits, self._table_bits = cluster_bits, table_bits
        self._directory = Table(file, _ENTRY, tables, contiguous(directory, 4096), 512)
        per_table = 1 << table_bits
        table = Table(file, _ENTRY, tables * per_table, self._table_at, per_table)
        super().__init__(file, size, 1 << cluster_bits, table)

    def _table_at(self, number: int) -> int | None:
        return self._directory[number] or None

    @cached_property
    def _tables(self) -> int:
        found, directory = 0, self._directory
        at = directory.skip(0, directory.count)
        while at < directory.count:
            found += 1
            at = directory.skip(at + 1, directory.count)
        return found

    def _check_room(self) -> None:
        check_room(self.file, self._tables, _ENTRY.size << self._table_bits)

    def _find(self, block: int) -> tuple[Kind, int]:
        entry = self._table[block]
        if not entry:
            return Kind.ABSENT, 0
        if entry & _COMPRESSED:
            return Kind.PACKED, entry
        if entry + self._block_length(block) > self.file.size:
            raise DamagedImage(self.path, f"cluster {block} is at {entry:#x}, beyond the file")
        return Kind.DATA, entry

    def _unpack(self, block: int) -> bytes:
        with self._lock:
            _, entry = self._find(block)
        shift = 63 - self._cluster_bits
        host, length = entry & (1 << shift) - 1, entry >> shift & self.block_size - 1
        try:
            data = zlib.decompressobj(-12).decompress(read_at(self.file, host, length), self.block_size)
        except zlib.error as e:
            raise DamagedImage(self.path, f"cluster {block} cannot be unpacked: {e}") from None
        if len(data) < self._block_length(block):
            raise DamagedImage(self.path, f"cluster {block} has {len(data)} bytes")
        return data

    def backing_name(self) -> BackingName | None:
        return BackingName(self._name, None) if self._name else None

    def check(self) -> CheckResult:
        raise self.cannot("cannot be checked")

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        raise self.cannot("cannot be repaired")
