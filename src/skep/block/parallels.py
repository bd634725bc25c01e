"""Parallels' expandable images: read only. Everything is little-endian.

The reference is QEMU's docs/interop/parallels.rst; comments name its sections.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from skep.block.backend import File, read_at
from skep.block.format import SECTOR, Can, CheckResult, DamagedImage, ImageError
from skep.block.sparse import Kind, SparseImage
from skep.block.tables import Table, contiguous

_HEADER = struct.Struct("<16sIIIIIQIIIQ")
_ENTRY = struct.Struct("<I")
_OLD, _EXTENDED = b"WithoutFreeSpace", b"WithouFreSpacExt"
_IN_USE = 0x746F6E59
_LARGEST_CLUSTER = 1 << 16  # sectors
_MOST_CLUSTERS = 1 << 26


class ParallelsImage(SparseImage):
    """Clusters, of which the BAT has places: in sectors in old images, in clusters in others ("BAT")."""

    format = "parallels"
    can = Can.CHECK

    def __init__(self, file: File) -> None:
        path = file.path
        fields = _HEADER.unpack(read_at(file, 0, _HEADER.size))
        magic, version, _, _, cluster, entries, sectors, in_use, data, _, _ = fields
        if magic not in (_OLD, _EXTENDED) or version != 2:
            raise ImageError("this is not a Parallels image", path)
        if magic == _OLD:
            sectors &= 0xFFFFFFFF
        if not 0 < cluster <= _LARGEST_CLUSTER:
            raise ImageError(f"Parallels clusters of {cluster} sectors are not possible", path)
        if not 0 < sectors <= entries * cluster or entries > _MOST_CLUSTERS:
            raise ImageError(f"a Parallels disk of {sectors} sectors in {entries} clusters is not possible", path)
        end = _HEADER.size + entries * _ENTRY.size
        if end > file.size:
            raise ImageError("the table of the Parallels image is beyond the file", path)
        table = Table(file, _ENTRY, entries, contiguous(_HEADER.size, 4096), 1024)
        super().__init__(file, sectors * SECTOR, cluster * SECTOR, table)
        self._scale = (1 if magic == _OLD else cluster) * SECTOR
        self._data = data * SECTOR or -(-end // SECTOR) * SECTOR
        self._in_use = bool(in_use == _IN_USE)

    @property
    def cluster_size(self) -> int | None:
        return None

    @property
    def dirty(self) -> bool:
        return self._in_use

    def _find(self, block: int) -> tuple[Kind, int]:
        entry = self._table[block]
        if not entry:
            return Kind.ABSENT, 0
        host = entry * self._scale
        if host < self._data or host + self._block_length(block) > self.file.size:
            raise DamagedImage(self.path, f"cluster {block} is at {host:#x}, outside the data")
        return Kind.DATA, host

    def _reserved(self) -> Iterator[tuple[int, int]]:
        yield 0, self._data

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        raise self.cannot("cannot be repaired")
