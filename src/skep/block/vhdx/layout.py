"""The structures at the beginning of a VHDX file, read and made. Everything is little-endian."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Self

from skep.block.backend import BlockBackend, read_at
from skep.block.crc32c import crc32c
from skep.block.format import ImageError

KIB, MIB = 1 << 10, 1 << 20

SIGNATURE = b"vhdxfile"
CREATOR = "Skep".encode("utf-16-le")
HEADER_AT = (64 * KIB, 128 * KIB)
REGIONS_AT = (192 * KIB, 256 * KIB)
FIRST_REGION = MIB
"""What lies before belongs to the structures above."""
REGION_TABLE_SIZE = 64 * KIB
METADATA_TABLE_SIZE = 64 * KIB
MAX_SIZE = 64 << 40
"""Of the disk (2.2)."""
SMALLEST_BLOCK, LARGEST_BLOCK = MIB, 256 * MIB

_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_HEADER_SIZE = 4 * KIB
_REGION_HEADER = struct.Struct("<4sIII")
_REGION = struct.Struct("<16sQII")
_METADATA_HEADER = struct.Struct("<8sHH20x")
_ITEM = struct.Struct("<16sIIII")
_LOCATOR_HEADER = struct.Struct("<16sHH")
_LOCATOR_ENTRY = struct.Struct("<IIHH")
_MOST_METADATA = MIB
"""Of one item (2.6): the largest there is, a parent locator, has a few paths."""


def guid(text: str) -> bytes:
    """A GUID as it is stored: its first three groups are little-endian numbers."""
    a, b, c, d, e = text.split("-")
    return struct.pack("<IHH", int(a, 16), int(b, 16), int(c, 16)) + bytes.fromhex(d + e)


def guid_text(stored: bytes) -> str:
    a, b, c = struct.unpack_from("<IHH", stored)
    return f"{a:08x}-{b:04x}-{c:04x}-{stored[8:10].hex()}-{stored[10:].hex()}"


BAT = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")

FILE_PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
VIRTUAL_DISK_SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
VIRTUAL_DISK_ID = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR_SIZE = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR_SIZE = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
VHDX_LOCATOR = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")

NO_GUID = bytes(16)


@dataclass(frozen=True, slots=True)
class Header:
    """2.2.2. Of the two in the file the valid one with the higher sequence number counts."""

    sequence: int
    file_write: bytes
    """A new GUID before the first change of the file after it was opened."""
    data_write: bytes
    """A new GUID before the first change of what a guest sees; overlays remember it."""
    log: bytes
    """The GUID that entries of the log must have; zero: the log is empty."""
    log_length: int
    log_offset: int
    slot: int = 0
    """Which of the two it is."""

    def pack(self) -> bytes:
        guids = (self.file_write, self.data_write, self.log)
        fields = (b"head", 0, self.sequence, *guids, 0, 1, self.log_length, self.log_offset)
        return with_checksum(_HEADER.pack(*fields).ljust(_HEADER_SIZE, b"\0"))

    def next(self, **changes: bytes) -> Self:
        """What to write over the other one."""
        return replace(self, sequence=self.sequence + 1, slot=1 - self.slot, **changes)  # type: ignore[arg-type]


class Region(NamedTuple):
    """2.2.3."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """2.6: what the disk is."""

    size: int
    block_size: int
    fixed: bool = False
    """LeaveBlocksAllocated."""
    logical_sector: int = 512
    physical_sector: int = 512
    disk_id: bytes = NO_GUID
    locator: Mapping[str, str] | None = None
    """Of a differencing image: what is known of its parent (2.6.2.6)."""

    @property
    def chunk_ratio(self) -> int:
        """How many blocks one block of sector bitmaps is for (2.5)."""
        return (1 << 23) * self.logical_sector // self.block_size

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def bat_entries(self) -> int:
        chunks = -(-self.blocks // self.chunk_ratio)
        if self.locator is not None:
            return chunks * (self.chunk_ratio + 1)
        return self.blocks + (self.blocks - 1) // self.chunk_ratio


def with_checksum(data: bytes) -> bytes:
    """Put the checksum of the whole in its place, bytes 4 to 8, which are zeros."""
    return data[:4] + crc32c(data).to_bytes(4, "little") + data[8:]


def checksum_right(data: bytes | bytearray) -> bool:
    crc = crc32c(data[:4])
    crc = crc32c(bytes(4), crc)
    return crc32c(memoryview(data)[8:], crc) == int.from_bytes(data[4:8], "little")


def read_header(file: BlockBackend, path: str) -> Header:
    """The current one. Raises ImageError."""
    found = []
    for slot, offset in enumerate(HEADER_AT):
        data = read_at(file, offset, _HEADER_SIZE)
        signature, _, sequence, file_write, data_write, log, log_version, version, length, at = _HEADER.unpack_from(
            data
        )
        if signature == b"head" and version == 1 and checksum_right(data):
            if log != NO_GUID and log_version != 0:
                raise ImageError(f"VHDX with a log of version {log_version} is not supported", path)
            found.append(Header(sequence, file_write, data_write, log, length, at, slot))
    if not found:
        raise ImageError("neither VHDX header is valid", path)
    header = max(found, key=lambda one: one.sequence)
    if header.sequence >> 63:  # nobody wrote as many, and those to come would not fit
        raise ImageError("the VHDX header has an impossible sequence number", path)
    if header.log_offset % MIB or header.log_length % MIB or header.log_offset < FIRST_REGION:
        raise ImageError("the VHDX log is in no possible place", path)
    if header.log_offset + header.log_length > file.size:
        raise ImageError("the VHDX log reaches beyond the file", path)
    return header


def read_regions(file: BlockBackend, path: str, log: Region) -> dict[bytes, Region]:
    """Where the BAT and the metadata are. Raises ImageError."""
    for offset in REGIONS_AT:
        data = read_at(file, offset, REGION_TABLE_SIZE)
        signature, _, count, _ = _REGION_HEADER.unpack_from(data)
        if signature == b"regi" and count <= 2047 and checksum_right(data):
            break
    else:
        raise ImageError("neither VHDX region table is valid", path)
    regions: dict[bytes, Region] = {}
    for i in range(count):
        kind, offset, length, flags = _REGION.unpack_from(data, _REGION_HEADER.size + i * _REGION.size)
        if kind not in (BAT, METADATA) and flags & 1:
            raise ImageError(f"VHDX region {guid_text(kind)} is required and not known", path)
        if offset % MIB or length % MIB or offset < FIRST_REGION or not length:
            raise ImageError(f"VHDX region {guid_text(kind)} is in no possible place", path)
        if kind in (BAT, METADATA) and offset + length > file.size:
            raise ImageError(f"VHDX region {guid_text(kind)} reaches beyond the file", path)
        if kind in regions:
            raise ImageError(f"VHDX region {guid_text(kind)} is there twice", path)
        regions[kind] = Region(offset, length)
    if BAT not in regions or METADATA not in regions:
        raise ImageError("a VHDX region is missing", path)
    places = sorted([*regions.values(), log])
    if any(a.offset + a.length > b.offset for a, b in pairwise(places)):
        raise ImageError("VHDX regions overlap", path)
    return regions


def pack_regions(regions: Mapping[bytes, Region]) -> bytes:
    data = _REGION_HEADER.pack(b"regi", 0, len(regions), 0)
    for kind, (offset, length) in regions.items():
        data += _REGION.pack(kind, offset, length, 1)
    return with_checksum(data.ljust(REGION_TABLE_SIZE, b"\0"))


def read_metadata(file: BlockBackend, path: str, region: Region) -> Metadata:
    """Raises ImageError."""
    table = read_at(file, region.offset, METADATA_TABLE_SIZE)
    signature, _, count = _METADATA_HEADER.unpack_from(table)
    if signature != b"metadata" or count > 1023:
        raise ImageError("the VHDX metadata table is not valid", path)
    items: dict[bytes, bytes] = {}
    for i in range(count):
        kind, offset, length, flags, _ = _ITEM.unpack_from(table, _METADATA_HEADER.size + i * _ITEM.size)
        if kind not in _KNOWN:
            if flags & 4:
                raise ImageError(f"VHDX metadata {guid_text(kind)} is required and not known", path)
            continue
        if length > _MOST_METADATA or offset < METADATA_TABLE_SIZE or offset + length > region.length:
            raise ImageError(f"VHDX metadata {guid_text(kind)} is in no possible place", path)
        if length < _KNOWN[kind]:
            raise ImageError(f"VHDX metadata {guid_text(kind)} is too short", path)
        items[kind] = bytes(read_at(file, region.offset + offset, length))
    try:
        block_size, flags = struct.unpack_from("<II", items[FILE_PARAMETERS])
        (size,) = struct.unpack_from("<Q", items[VIRTUAL_DISK_SIZE])
        (logical,) = struct.unpack_from("<I", items[LOGICAL_SECTOR_SIZE])
    except KeyError as e:
        raise ImageError(f"VHDX metadata {guid_text(e.args[0])} is missing", path) from None
    (physical,) = struct.unpack_from("<I", items.get(PHYSICAL_SECTOR_SIZE, struct.pack("<I", logical)))
    if not SMALLEST_BLOCK <= block_size <= LARGEST_BLOCK or block_size & (block_size - 1):
        raise ImageError(f"a VHDX block size of {block_size} is not possible", path)
    if logical not in (512, 4096) or physical not in (512, 4096):
        raise ImageError("the VHDX sector size is neither 512 nor 4096", path)
    if not 0 < size <= MAX_SIZE or size % logical:
        raise ImageError(f"a VHDX disk of {size} bytes is not possible", path)
    locator = None
    if flags & 2:
        if PARENT_LOCATOR not in items:
            raise ImageError("the VHDX has a parent and does not say which", path)
        locator = _read_locator(items[PARENT_LOCATOR], path)
    disk_id = items.get(VIRTUAL_DISK_ID, NO_GUID)[:16]
    return Metadata(size, block_size, bool(flags & 1), logical, physical, disk_id, locator)


_KNOWN = {
    FILE_PARAMETERS: 8,
    VIRTUAL_DISK_SIZE: 8,
    VIRTUAL_DISK_ID: 16,
    LOGICAL_SECTOR_SIZE: 4,
    PHYSICAL_SECTOR_SIZE: 4,
    PARENT_LOCATOR: _LOCATOR_HEADER.size,
}
"""Items and how long they are at least."""


def _read_locator(data: bytes, path: str) -> dict[str, str]:
    kind, _, count = _LOCATOR_HEADER.unpack_from(data)
    if kind != VHDX_LOCATOR:
        raise ImageError(f"a VHDX parent locator of type {guid_text(kind)} is not known", path)
    if _LOCATOR_HEADER.size + count * _LOCATOR_ENTRY.size > len(data):
        raise ImageError("the VHDX parent locator is too short", path)
    entries = {}
    for i in range(count):
        key_at, value_at, key_length, value_length = _LOCATOR_ENTRY.unpack_from(
            data, _LOCATOR_HEADER.size + i * _LOCATOR_ENTRY.size
        )
        if key_at + key_length > len(data) or value_at + value_length > len(data):
            raise ImageError("the VHDX parent locator is damaged", path)
        key = data[key_at : key_at + key_length].decode("utf-16-le", "replace")
        entries[key] = data[value_at : value_at + value_length].decode("utf-16-le", "replace")
    return entries


def _pack_locator(entries: Mapping[str, str]) -> bytes:
    head = _LOCATOR_HEADER.pack(VHDX_LOCATOR, 0, len(entries))
    strings = b""
    base = _LOCATOR_HEADER.size + len(entries) * _LOCATOR_ENTRY.size
    for key, value in entries.items():
        k, v = key.encode("utf-16-le"), value.encode("utf-16-le")
        head += _LOCATOR_ENTRY.pack(base + len(strings), base + len(strings) + len(k), len(k), len(v))
        strings += k + v
    return head + strings


def pack_metadata(metadata: Metadata) -> bytes:
    """The region from its beginning, as much of it as is not zeros."""
    flags = metadata.fixed | (metadata.locator is not None) << 1
    is_disk, required = 2, 4
    items = [
        (FILE_PARAMETERS, required, struct.pack("<II", metadata.block_size, flags)),
        (VIRTUAL_DISK_SIZE, is_disk | required, struct.pack("<Q", metadata.size)),
        (VIRTUAL_DISK_ID, is_disk | required, metadata.disk_id),
        (LOGICAL_SECTOR_SIZE, is_disk | required, struct.pack("<I", metadata.logical_sector)),
        (PHYSICAL_SECTOR_SIZE, is_disk | required, struct.pack("<I", metadata.physical_sector)),
    ]
    if metadata.locator is not None:
        items.append((PARENT_LOCATOR, required, _pack_locator(metadata.locator)))
    table = _METADATA_HEADER.pack(b"metadata", 0, len(items))
    data = b""
    for kind, flags, content in items:
        table += _ITEM.pack(kind, METADATA_TABLE_SIZE + len(data), len(content), flags, 0)
        data += content
    return table.ljust(METADATA_TABLE_SIZE, b"\0") + data
