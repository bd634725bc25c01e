"""VHD, the format of Virtual PC and of Azure, which QEMU calls vpc: fixed, dynamic, or differing from a parent.

The reference is Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0; comments name its sections.
Everything is big-endian.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from skep.block.backend import File, read_at, write_at
from skep.block.choices import choice, switch
from skep.block.file import create_file, open_file
from skep.block.format import SECTOR, BackingName, Can, CheckResult, DamagedImage, Image, ImageError, Option
from skep.block.secrets import NO_SECRETS, Secrets
from skep.block.sectors import SectorImage
from skep.block.sparse import Kind, Run
from skep.block.tables import Table, contiguous

_COOKIE, _DYNAMIC_COOKIE = b"conectix", b"cxsparse"
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_HEADER = struct.Struct(">8sQQIIII16sI4x512s192s256x")
_LOCATOR = struct.Struct(">4sII4xQ")
_ENTRY = struct.Struct(">I")
_BITS = struct.Struct(">B")

_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_NOWHERE = (1 << 64) - 1
_UNUSED = 0xFFFFFFFF
_VERSION = 0x00010000
_EPOCH = 946684800  # 2000-01-01, in time()'s seconds

_BLOCK = 2 << 20
_LARGEST_BLOCK = 256 << 20
_MOST_SECTORS = 0xFF000000
"""Of a disk: sectors of the file have numbers of 32 bits."""
_LARGEST_GEOMETRY = 65535 * 16 * 255

_SIZE_COUNTS = (b"win ", b"qem2", b"d2v ", b"tap\0", b"wa\0\0")
"""Creators that mean the size that they write; for others the geometry counts, as in Virtual PC."""


class Geometry(NamedTuple):
    cylinders: int
    heads: int
    sectors: int

    @property
    def total(self) -> int:
        return self.cylinders * self.heads * self.sectors


@dataclass(frozen=True, slots=True)
class Footer:
    """"Hard Disk Footer Format": at the end of the file, and of all but fixed images at its beginning too."""

    kind: int
    current: int
    """Bytes of the disk."""
    geometry: Geometry
    header: int = _NOWHERE
    """Where the dynamic header is."""
    creator: bytes = b"qem2"
    unique: bytes = bytes(16)
    original: int = 0
    timestamp: int = 0
    saved: int = 0

    @classmethod
    def read(cls, data: bytes | bytearray) -> Self | None:
        """None: this is none."""
        fields = _FOOTER.unpack(data)
        cookie, _, version, header, timestamp, creator, _, _, original, current, *rest = fields
        cylinders, heads, sectors, kind, checksum, unique, saved = rest
        if cookie != _COOKIE or version != _VERSION or checksum != _checksum(data, 64):
            return None
        geometry = Geometry(cylinders, heads, sectors)
        return cls(kind, current, geometry, header, creator, unique, original, timestamp, saved)

    def pack(self) -> bytes:
        ours = (self.creator, 0x00050003, b"Wi2k")
        sizes = (self.original, self.current, *self.geometry)
        fields = (_COOKIE, 2, _VERSION, self.header, self.timestamp, *ours, *sizes, self.kind)
        return _with_checksum(_FOOTER.pack(*fields, 0, self.unique, self.saved), 64)

    @property
    def size(self) -> int:
        """Bytes that a guest sees."""
        if self.creator in _SIZE_COUNTS or self.geometry.total >= _LARGEST_GEOMETRY:
            return self.current
        return self.geometry.total * SECTOR


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """"Dynamic Disk Header Format"."""

    table: int
    entries: int
    block_size: int
    parent: bytes = bytes(16)
    """The unique ID of the parent."""
    parent_time: int = 0
    parent_name: str = ""
    locators: tuple[tuple[bytes, int, int, int], ...] = ()
    """Of the parent: platform code, room in the file, length, offset."""

    @classmethod
    def read(cls, data: bytes | bytearray, path: str) -> Self:
        """Raises ImageError."""
        cookie, _, table, version, entries, block_size, checksum, parent, when, name, locators = _HEADER.unpack(data)
        if cookie != _DYNAMIC_COOKIE or version != _VERSION or checksum != _checksum(data, 36):
            raise ImageError("the header of the VHD is not valid", path)
        text = name.decode("utf-16-be", "replace").split("\0", 1)[0]
        return cls(table, entries, block_size, parent, when, text, tuple(_LOCATOR.iter_unpack(locators)))

    def pack(self) -> bytes:
        locators = b"".join(_LOCATOR.pack(*locator) for locator in self.locators)
        name = self.parent_name.encode("utf-16-be")[:510]
        fields = (self.table, _VERSION, self.entries, self.block_size, 0, self.parent, self.parent_time, name, locators)
        return _with_checksum(_HEADER.pack(_DYNAMIC_COOKIE, _NOWHERE, *fields), 36)


def _checksum(data: bytes | bytearray, at: int) -> int:
    """The one's complement of the sum of all bytes, those of the checksum itself left out."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def _with_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + _checksum(data, at).to_bytes(4, "big") + data[at + 4 :]


def is_footer(data: bytes) -> bool:
    """For probing: a fixed image has nothing else."""
    return len(data) == SECTOR and Footer.read(data) is not None


class VhdImage(SectorImage):
    """A block in the file has its bitmap before it. In a dynamic image the bitmap is written, all ones, and not asked:
    what was never written is zeros in the block too."""

    format = "vpc"
    most_significant_first = True
    can = Can.WRITE | Can.DISCARD | Can.CHECK | Can.REPAIR | Can.BACKING
    create_options: ClassVar = {
        "subformat": Option(
            "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ", "dynamic"
        ),
        "force_size": Option(
            "Force disk size calculation to use the actual size specified, "
            "rather than using the nearest CHS-based calculation",
            "off",
        ),
    }

    def __init__(self, file: File) -> None:
        path = file.path
        if file.size < SECTOR:
            raise ImageError("this is not a VHD image", path)
        footer = Footer.read(read_at(file, 0, SECTOR))
        if footer is None or footer.kind == _FIXED:
            footer = Footer.read(read_at(file, file.size - SECTOR, SECTOR))
        if footer is None:
            raise ImageError("the footer of the VHD is not valid", path)
        if footer.kind not in (_FIXED, _DYNAMIC, _DIFFERENCING):
            raise ImageError(f"a VHD of type {footer.kind} is not known", path)
        size = footer.size
        if not 0 < size <= _MOST_SECTORS * SECTOR or size % SECTOR:
            raise ImageError(f"a VHD disk of {size} bytes is not possible", path)
        self.footer = footer
        self._fixed = footer.kind == _FIXED
        self._differs = footer.kind == _DIFFERENCING
        if self._fixed:
            if size > file.size - SECTOR:
                raise ImageError("the VHD is shorter than its disk", path)
            self.header = DynamicHeader(0, 0, _BLOCK)
        else:
            self.header = self._read_header(file, footer, size)
        header = self.header
        self._bitmap = -(-header.block_size // SECTOR // 8 // SECTOR) * SECTOR
        """Bytes of a block's bitmap."""
        table = Table(file, _ENTRY, header.entries, contiguous(header.table, 4096), 1024, absent=_UNUSED)
        super().__init__(file, size, header.block_size, table)
        self._unit = self._bitmap + header.block_size
        self._bits = Table(file, _BITS, header.entries * self._bitmap, self._bits_at, self._bitmap)
        self._end = -(-file.size // SECTOR) * SECTOR
        if Footer.read(read_at(file, file.size - SECTOR, SECTOR)) is not None:
            self._end = file.size - SECTOR
        self._footer_at = self._end
        """Where the footer is, or is to be."""

    def _read_header(self, file: File, footer: Footer, size: int) -> DynamicHeader:
        path = file.path
        if footer.header > file.size - _HEADER.size:
            raise ImageError("the header of the VHD is beyond the file", path)
        header = DynamicHeader.read(read_at(file, footer.header, _HEADER.size), path)
        block = header.block_size
        if not SECTOR * 8 <= block <= _LARGEST_BLOCK or block & (block - 1):
            raise ImageError(f"a VHD block size of {block} is not possible", path)
        if header.table % SECTOR or header.table + header.entries * _ENTRY.size > file.size:
            raise ImageError("the block table of the VHD is in no possible place", path)
        if header.entries < -(-size // block):
            raise ImageError("the block table of the VHD is too short for the disk", path)
        return header

    @property
    def cluster_size(self) -> int | None:
        return None if self._fixed else self.block_size

    # Blocks.

    def _runs(self, offset: int, length: int) -> Iterator[Run]:
        return iter((Run(Kind.DATA, length, offset),)) if self._fixed else super()._runs(offset, length)

    def _place(self, offset: int, length: int) -> list[Run]:
        return [Run(Kind.DATA, length, offset)] if self._fixed else super()._place(offset, length)

    def _at_once(self, offset: int, length: int) -> Run | None:
        return Run(Kind.DATA, length, offset) if self._fixed else super()._at_once(offset, length)

    def _find(self, block: int) -> tuple[Kind, int]:
        if self._fixed:
            return Kind.DATA, block * self.block_size
        entry = self._table[block]
        if entry == _UNUSED:
            return Kind.ABSENT, 0
        host = entry * SECTOR + self._bitmap
        if host + self._block_length(block) > self.file.size:
            raise DamagedImage(self.path, f"block {block} is at {host:#x}, beyond the file")
        return Kind.DATA, host

    def _ensure(self, block: int) -> None:
        if self._end // SECTOR + self._unit // SECTOR >= _UNUSED:
            raise OSError(errno.EFBIG, "a VHD is 2 TiB long at most", self.path)
        start = self._reserve()
        # Here the footer was, which is written again with the next commit.
        write_at(self.file, start, (b"\0" if self._differs else b"\xff") * self._bitmap)
        self._table[block] = start // SECTOR

    def _mapped(self, block: int) -> bool:
        return self._differs

    def _noted(self, block: int) -> bool:
        return not self._fixed

    def _bit(self, block: int) -> int:
        return block * self._bitmap * 8

    def _bits_at(self, page: int) -> int | None:
        entry = self._table[page]
        return None if entry == _UNUSED else entry * SECTOR

    def _commit(self) -> None:
        with self._lock:
            units = [*self._bits.units(SECTOR), *self._table.units(SECTOR)]
            # Under the lock: a new block would come to where the footer goes.
            write_at(self.file, self._end, self.footer.pack())
            self._footer_at = self._end
        for offset, data in units:
            write_at(self.file, offset, data)
        self.file.flush()

    def _finish(self) -> None:
        if not self._fixed and self._end != self._footer_at:
            write_at(self.file, self._end, self.footer.pack())
            self._footer_at = self._end
        super()._finish()

    # As a whole.

    def backing_name(self) -> BackingName | None:
        if not self._differs:
            return None
        for code in (b"W2ru", b"W2ku"):
            for found, _, length, offset in self.header.locators:
                if found == code and 0 < length <= 4096 and offset + length <= self.file.size:
                    name = read_at(self.file, offset, length).decode("utf-16-le", "replace")
                    return BackingName(name.split("\0", 1)[0].replace("\\", "/").removeprefix("./"), "vpc")
        if self.header.parent_name:
            return BackingName(self.header.parent_name.replace("\\", "/"), "vpc")
        raise ImageError("the VHD has a parent and does not say which", self.path)

    def check_backing(self, backing: Image) -> None:
        if isinstance(backing, VhdImage) and backing.footer.unique != self.header.parent:
            raise ImageError(f"this is not its parent: {backing.path}", self.path)

    def _footprint(self, block: int, host: int) -> tuple[int, int]:
        return host - self._bitmap, self._bitmap + self._block_length(block)

    def _reserved(self) -> Iterator[tuple[int, int]]:
        yield 0, SECTOR
        yield self._end, SECTOR
        yield self.footer.header, _HEADER.size
        yield self.header.table, -(-self.header.entries * _ENTRY.size // SECTOR) * SECTOR
        for _, room, length, offset in self.header.locators:
            if length and offset < self.file.size:
                yield offset, -(-max(length, min(room, 4096)) // SECTOR) * SECTOR

    def _forget(self, block: int) -> None:
        self._table[block] = _UNUSED

    def check(self) -> CheckResult:
        return CheckResult() if self._fixed else super().check()

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        return CheckResult() if self._fixed else super().repair(leaks_only=leaks_only)

    # Creation.

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        kind = choice(path, options, "subformat", "dynamic", "fixed")
        if backing is not None and kind == "fixed":
            raise ImageError("a fixed VHD lies over no other", path)
        force = switch(path, options, "force_size")
        geometry = Geometry(65535, 16, 255) if force else _geometry(size // SECTOR)
        if geometry.total < _LARGEST_GEOMETRY:
            size = geometry.total * SECTOR
        if not 0 < size <= _MOST_SECTORS * SECTOR:
            raise ImageError(f"a VHD disk of {size} bytes is not possible", path, "up to 2040 GiB are")
        now = (int(time.time()) - _EPOCH) & 0xFFFFFFFF
        type_ = _FIXED if kind == "fixed" else _DYNAMIC if backing is None else _DIFFERENCING
        at = _NOWHERE if type_ == _FIXED else SECTOR
        creator = b"qem2" if force else b"qemu"
        footer = Footer(type_, size, geometry, at, creator, os.urandom(16), size, now)
        parent = None if backing is None else _parent(path, backing, footer)
        if type_ == _FIXED:
            with create_file(path, size + SECTOR) as file:
                write_at(file, size, footer.pack())
            return
        with create_file(path) as file:
            _write_dynamic(file, footer, parent)


def _write_dynamic(file: File, footer: Footer, parent: tuple[Footer, BackingName] | None) -> None:
    entries = -(-footer.current // _BLOCK)
    table = SECTOR + _HEADER.size
    length = -(-entries * _ENTRY.size // SECTOR) * SECTOR
    end = table + length
    header = DynamicHeader(table, entries, _BLOCK)
    if parent is not None:
        above, backing = parent
        relative = backing.name.replace("/", "\\")
        relative = relative if os.path.isabs(backing.name) else ".\\" + relative
        absolute = os.path.abspath(os.path.join(os.path.dirname(file.path), backing.name)).replace("/", "\\")
        locators = []
        for code, name in ((b"W2ru", relative), (b"W2ku", absolute)):
            text = name.encode("utf-16-le")
            room = -(-len(text) // SECTOR) * SECTOR
            write_at(file, end, text.ljust(room, b"\0"))
            locators.append((code, room, len(text), end))
            end += room
        name = os.path.basename(backing.name)
        header = DynamicHeader(table, entries, _BLOCK, above.unique, above.timestamp, name, tuple(locators))
    write_at(file, 0, footer.pack() + header.pack())
    unused = b"\xff" * min(length, 1 << 20)
    for at in range(table, table + length, len(unused)):
        write_at(file, at, unused[: table + length - at])
    write_at(file, end, footer.pack())


def _parent(path: str, backing: BackingName, overlay: Footer) -> tuple[Footer, BackingName]:
    """The footer of the image that a new one is to lie over. Raises UserError."""
    if backing.format not in (None, "vpc"):
        raise ImageError("a VHD lies over a VHD only", path)
    parent = os.path.join(os.path.dirname(path), backing.name)
    with open_file(parent, read_only=True) as file:
        image = VhdImage(file)
        if image.size != overlay.size:
            raise ImageError("a differencing VHD is as large as its parent", path, f"say {image.size}")
        return image.footer, backing


def _geometry(sectors: int) -> Geometry:
    """The smallest geometry with so many sectors that "Appendix: CHS Calculation" gives for any number."""
    wanted = sectors
    while True:
        found = _geometry_of(wanted)
        if found.total >= min(sectors, _LARGEST_GEOMETRY):
            return found
        wanted += 1


def _geometry_of(total: int) -> Geometry:
    total = min(total, _LARGEST_GEOMETRY)
    if total >= 65535 * 16 * 63:
        return Geometry(total // 255 // 16, 16, 255)
    sectors = 17
    tracks = total // sectors
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
        tracks = total // sectors
    if tracks >= heads * 1024:
        sectors, heads = 63, 16
        tracks = total // sectors
    return Geometry(tracks // heads, heads, sectors)
