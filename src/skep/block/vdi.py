"""VDI, VirtualBox's format: static, dynamic or differencing. What is known of it is what VirtualBox writes and QEMU
reads.

Everything is little-endian. An entry of the block map is the number of a block of the data area, which has no more
than the disk; so space that a loss of power leaked is found again, and used.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from skep.block.backend import Buffers, File, read_at, write_at
from skep.block.choices import choice, switch
from skep.block.file import create_file, open_file
from skep.block.format import SECTOR, BackingName, Can, CheckResult, DamagedImage, Image, ImageError, Option
from skep.block.naming import backing_path
from skep.block.secrets import NO_SECRETS, Secrets
from skep.block.sparse import Kind, SparseImage
from skep.block.tables import Table, contiguous

_HEADER = struct.Struct("<64sIIIII256sIIIIIIIQIIII16s16s16s16s")
_ENTRY = struct.Struct("<I")
_TEXT = b"<<< Skep Virtual Disk Image >>>\n"
_SIGNATURE = 0xBEDA107F
_VERSION = 0x00010001
_DYNAMIC, _STATIC, _DIFFERENCING = 1, 2, 4
_FREE, _DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE
_ALLOCATED_AT = 0x184
_MODIFICATION_AT = 0x198
_BLOCK = 1 << 20
_LARGEST_BLOCK = 256 << 20
_MOST_BLOCKS = 1 << 26
"""64 TiB in blocks of 1 MiB."""
_NO_UUID = bytes(16)
_WINDOW = 1 << 22
"""Numbers of blocks that are looked for at once, one byte each."""


@dataclass(frozen=True, slots=True)
class Header:
    kind: int
    table: int
    """Where the block map is."""
    data: int
    size: int
    block_size: int
    blocks: int
    allocated: int
    """How many blocks the map has in the file."""
    uuid: bytes = _NO_UUID
    modification: bytes = _NO_UUID
    """Another one whenever somebody begins to write, so that images over this one know."""
    parent: bytes = _NO_UUID
    """Of a differencing image, the UUID of what is below, and in what state that was."""
    parent_modification: bytes = _NO_UUID

    @classmethod
    def read(cls, file: File) -> Self:
        """Raises ImageError."""
        path = file.path
        fields = _HEADER.unpack_from(read_at(file, 0, SECTOR))
        signature, version, _, kind, *_ = fields[1:]
        table, data, _, _, _, sector, _, size, block_size, extra, blocks, allocated = fields[7:19]
        uuids = fields[19:]
        if signature != _SIGNATURE:
            raise ImageError("this is not a VDI image", path)
        if version != _VERSION:
            raise ImageError(f"a VDI of version {version >> 16}.{version & 0xFFFF} is not supported", path)
        if kind not in (_DYNAMIC, _STATIC, _DIFFERENCING) or (kind == _DIFFERENCING) != (uuids[2] != _NO_UUID):
            raise ImageError(f"a VDI of kind {kind} over {uuids[2].hex()} is not possible", path)
        if sector != SECTOR or extra or not SECTOR <= block_size <= _LARGEST_BLOCK or block_size & (block_size - 1):
            raise ImageError(f"VDI blocks of {block_size} bytes, sectors of {sector}, are not supported", path)
        if not size or blocks > _MOST_BLOCKS or size > blocks * block_size:
            raise ImageError(f"a VDI disk of {size} bytes in {blocks} blocks is not possible", path)
        end = table + blocks * _ENTRY.size
        if table % SECTOR or data % SECTOR or table < SECTOR or end > data or end > file.size:
            raise ImageError("the block map of the VDI is in no possible place", path)
        return cls(kind, table, data, -(-size // SECTOR) * SECTOR, block_size, blocks, allocated, *uuids)

    def pack(self) -> bytes:
        places = (self.table, self.data, 0, 0, 0, SECTOR, 0, self.size, self.block_size, 0)
        uuids = (self.uuid, self.modification, self.parent, self.parent_modification)
        start = (_TEXT, _SIGNATURE, _VERSION, 0x180, self.kind, 0, b"")
        return _HEADER.pack(*start, *places, self.blocks, self.allocated, *uuids)


class VdiImage(SparseImage):
    """The header counts the blocks, in a sector that a loss of power may keep apart from the map's: whoever opens the
    image for writing counts again."""

    format = "vdi"
    can = Can.WRITE | Can.DISCARD | Can.CHECK | Can.REPAIR | Can.BACKING
    create_options: ClassVar = {
        "static": Option("VDI static (pre-allocated) image", "off", told=True),
        "preallocation": Option("Preallocation mode (allowed values: off, metadata)", "off"),
    }

    def __init__(self, file: File) -> None:
        header = Header.read(file)
        self.header = header
        pages = contiguous(header.table, 4096)
        table = Table(file, _ENTRY, header.blocks, pages, 4096 // _ENTRY.size, absent=_FREE)
        super().__init__(file, header.size, header.block_size, table)
        self._allocated = header.allocated
        self._numbers = self._unused()
        self._modified = False
        if not file.read_only:
            try:
                self._count_again()
            except OSError as e:
                raise ImageError(f"the header of the VDI cannot be written: {e.strerror}", file.path) from None

    def _count_again(self) -> None:
        count = sum(len(page) - page.count(_FREE) - page.count(_DISCARDED) for _, page in self._map())
        if count != self._allocated:
            self._allocated = count
            self._write_count()
            self.file.flush()

    def _write_count(self) -> None:
        write_at(self.file, _ALLOCATED_AT, self._allocated.to_bytes(4, "little"))

    def _map(self) -> Iterator[tuple[int, array[int]]]:
        """The map as it is in the file, in parts, with the number of each one's first block."""
        step = 1 << 18
        for first in range(0, self.header.blocks, step):
            n = min(step, self.header.blocks - first)
            part = array("I", bytes(read_at(self.file, self.header.table + first * _ENTRY.size, n * _ENTRY.size)))
            yield first, part

    # What is below: the header has no name of it.

    @property
    def needs_backing(self) -> bool:
        return self.header.kind == _DIFFERENCING

    def check_backing(self, backing: Image) -> None:
        if not isinstance(backing, VdiImage) or backing.header.uuid != self.header.parent:
            raise ImageError(f"lies over another image than {backing.path}", self.path)
        if self.header.parent_modification not in (_NO_UUID, backing.header.modification):
            raise ImageError(f"its parent was changed since: {backing.path}", self.path)

    def _has_below(self) -> bool:
        return self.needs_backing

    def _must_be_writable(self) -> None:
        super()._must_be_writable()
        if not self._modified:
            self._modified = True
            write_at(self.file, _MODIFICATION_AT, os.urandom(16))

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return self._modified and super().write_now(buffers, offset)

    # Blocks.

    def _bind_zero(self, block: int) -> bool:
        """Only where a block that is not there would be what is below."""
        if self.needs_backing and self._table[block] == _FREE:
            self._table[block] = _DISCARDED
            return True
        return False

    def _find(self, block: int) -> tuple[Kind, int]:
        entry = self._table[block]
        if entry == _FREE:
            return Kind.ABSENT, 0
        if entry == _DISCARDED:
            return Kind.ZERO, 0
        host = self.header.data + entry * self.block_size
        if entry >= self.header.blocks or host + self._block_length(block) > self.file.size:
            raise DamagedImage(self.path, f"block {block} is at {host:#x}, beyond the file")
        return Kind.DATA, host

    def _bind(self, block: int, host: int) -> None:
        self._table[block] = (host - self.header.data) // self.block_size
        self._allocated += 1

    def _reserve(self, length: int | None = None) -> int:
        number = next(self._numbers, None)
        if number is None:
            raise OSError(errno.ENOSPC, "the VDI has more blocks than its disk", self.path)
        host = self.header.data + number * self.block_size
        end = host + self.block_size
        if host < self.file.size:
            there = min(end, self.file.size) - host
            self.file.write_zeroes(host, there, True)  # what a write before a loss of power left
        if end > self.file.size:
            self.file.resize(end)
        return host

    def _unused(self) -> Iterator[int]:
        """Numbers of blocks that are nobody's, under the lock. Those that it gave out lie before the part that it looks
        at, so changes that are not in the file yet do not matter."""
        for base in range(0, self.header.blocks, _WINDOW):
            marks = bytearray(min(_WINDOW, self.header.blocks - base))
            for _, part in self._map():
                if part.count(_FREE) == len(part):
                    continue
                for number in part:
                    if base <= number < base + _WINDOW and number - base < len(marks):
                        marks[number - base] = 1
            at = -1
            while (at := marks.find(0, at + 1)) >= 0:
                yield base + at

    def _commit(self) -> None:
        with self._lock:
            self._write_count()
        super()._commit()

    # As a whole.

    def _reserved(self) -> Iterator[tuple[int, int]]:
        yield 0, self.header.data

    def _forget(self, block: int) -> None:
        self._table[block] = _FREE
        self._allocated -= 1

    def check(self) -> CheckResult:
        result = super().check()
        count = sum(len(page) - page.count(_FREE) - page.count(_DISCARDED) for _, page in self._map())
        if not self._table.pending and count != self._allocated:
            result.corrupt(f"the header counts {self._allocated} blocks, and there are {count}")
        return result

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        parent = None if backing is None else _parent(path, backing)
        static = switch(path, options, "static")
        static |= choice(path, options, "preallocation", "off", "metadata") == "metadata"
        blocks = -(-size // _BLOCK)
        if not 0 < blocks <= _MOST_BLOCKS:
            raise ImageError(f"a VDI disk of {size} bytes is not possible", path)
        table = SECTOR
        data = -(-(table + blocks * _ENTRY.size) // _BLOCK) * _BLOCK
        if static and parent is not None:
            raise ImageError("a static VDI lies over no other", path, "leave static out")
        kind = _STATIC if static else _DYNAMIC if parent is None else _DIFFERENCING
        below = (_NO_UUID, _NO_UUID) if parent is None else (parent.uuid, parent.modification)
        uuids = (os.urandom(16), os.urandom(16), *below)
        header = Header(kind, table, data, size, _BLOCK, blocks, blocks if static else 0, *uuids)
        with create_file(path, data + (blocks * _BLOCK if static else 0)) as file:
            write_at(file, 0, header.pack())
            step = 1 << 18
            for first in range(0, blocks, step):
                n = min(step, blocks - first)
                entries = array("I", range(first, first + n)) if static else array("I", [_FREE]) * n
                write_at(file, table + first * _ENTRY.size, entries.tobytes())


def _parent(path: str, backing: BackingName) -> Header:
    if backing.format not in (None, "vdi"):
        raise ImageError("a VDI lies over a VDI only", path)
    with open_file(backing_path(path, backing.name), read_only=True) as file:
        return Header.read(file)
