"""The header of a qcow2 image and its extensions."""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag

from skep.block.backend import File, read_at
from skep.block.format import ImageError

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
V3_LENGTH = _V2.size + _V3.size + 8  # with the type of compression, and its padding

MOST_L1_BYTES = 32 << 20
MOST_REFCOUNT_TABLE_BYTES = 8 << 20
MOST_SNAPSHOTS = 65536
MOST_BACKING_NAME = 1023


class Incompatible(IntFlag):
    DIRTY = 1
    """Refcounts may be wrong."""
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag):
    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag):
    BITMAPS = 1
    DATA_FILE_RAW = 2


class Extension(IntEnum):
    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
FEATURE_NAMES = b"".join(struct.pack(">BB46s", kind, bit, name.encode()) for kind, bit, name in _NAMES)


class Compression(IntEnum):
    ZLIB = 0
    ZSTD = 1


class Header:
    """The fields by their names in the specification, but for offsets and lengths that follow from others."""

    size: int = 0
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    crypt_method: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = Compression.ZLIB
    backing_name: str | None = None
    more_fields: bytes = b""
    """Of a header that is longer than we know."""

    def __init__(self, version: int, cluster_bits: int) -> None:
        self.version, self.cluster_bits = version, cluster_bits
        self.extensions: dict[int, bytes] = {}
        """In the file's order; unknown ones are kept."""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def l2_entries(self) -> int:
        """Of an L2 table."""
        return self.cluster_size // (16 if self.extended_l2 else 8)

    def pack(self) -> bytes:
        """What the first cluster begins with. Raises ImageError where it has no room for that."""
        backing = b"" if self.backing_name is None else self.backing_name.encode(errors="surrogateescape")
        parts = []
        for kind, data in self.extensions.items():
            parts.append(struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8))
        parts.append(bytes(8))
        fixed = _V2.size if self.version == 2 else V3_LENGTH + len(self.more_fields)
        tail = b"".join(parts)
        backing_offset = fixed + len(tail) if backing else 0
        head = _V2.pack(
            MAGIC,
            self.version,
            backing_offset,
            len(backing),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version >= 3:
            head += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, fixed)
            head += bytes([self.compression_type]) + bytes(7) + self.more_fields
        whole = head + tail + backing
        if len(whole) > self.cluster_size:
            raise ImageError("the first cluster has no room for the header and its extensions", None)
        return whole


def read_header(file: File) -> Header:
    """Raises ImageError for what the specification does not allow, or what is larger than QEMU takes."""

    def wrong(what: str) -> ImageError:
        return ImageError(f"not a sound qcow2 image: {what}", file.path)

    head = bytes(read_at(file, 0, 112))
    magic, version, backing_offset, backing_size, cluster_bits, *fields = _V2.unpack_from(head)
    if magic != MAGIC or version not in (2, 3):
        raise wrong(f"version {version}" if magic == MAGIC else "another beginning")
    if not 9 <= cluster_bits <= 21:
        raise wrong(f"clusters of 2^{cluster_bits} bytes")
    header = Header(version, cluster_bits)
    header.size, header.crypt_method, header.l1_size, header.l1_table_offset, *fields = fields
    header.refcount_table_offset, header.refcount_table_clusters, header.nb_snapshots, header.snapshots_offset = fields
    length = _V2.size
    if version >= 3:
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, length = _V3.unpack_from(
            head, _V2.size
        )
        if not _V2.size + _V3.size <= length <= header.cluster_size or length % 8:
            raise wrong(f"a header of {length} bytes")
        if length > _V2.size + _V3.size:
            header.compression_type = head[_V2.size + _V3.size]
        if length > V3_LENGTH:
            header.more_fields = bytes(read_at(file, V3_LENGTH, length - V3_LENGTH))
    first = bytes(read_at(file, 0, header.cluster_size))
    header.extensions = _extensions(first, length, backing_offset, wrong)
    if backing_offset:
        if backing_size > MOST_BACKING_NAME or backing_offset + backing_size > header.cluster_size or not backing_size:
            raise wrong("the name of the backing file is outside the first cluster")
        name = first[backing_offset : backing_offset + backing_size]
        if b"\0" in name:
            raise wrong("the name of the backing file has a zero in it")
        header.backing_name = name.decode(errors="surrogateescape")
    _check(header, wrong)
    return header


def _extensions(first: bytes, at: int, backing_offset: int, wrong: Callable[[str], ImageError]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    end = backing_offset if at < backing_offset <= len(first) else len(first)
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", first, at)
        at += 8
        if kind == Extension.END:
            break
        if length > end - at:
            raise wrong(f"header extension {kind:#x} of {length} bytes")
        found[kind] = first[at : at + length]
        at += -(-length // 8) * 8
    return found


def _check(header: Header, wrong: Callable[[str], ImageError]) -> None:
    bits, cluster = header.cluster_bits, header.cluster_size
    unknown = header.incompatible & ~sum(Incompatible)
    complaint = None
    if unknown:
        complaint = f"features that we do not know ({_feature_names(header, unknown)})"
    elif header.refcount_order > 6:
        complaint = f"refcounts of 2^{header.refcount_order} bits"
    elif header.size > 1 << 63 or header.size % 512:
        complaint = f"a disk of {header.size} bytes"
    elif header.l1_size * 8 > MOST_L1_BYTES:
        complaint = f"an L1 table of {header.l1_size} entries"
    elif header.l1_size < -(-header.size // (header.l2_entries << bits)):
        complaint = "an L1 table that is too small for the disk"
    elif header.l1_size and (header.l1_table_offset % cluster or not cluster <= header.l1_table_offset < 1 << 56):
        complaint = f"an L1 table at {header.l1_table_offset:#x}"
    elif not 0 < header.refcount_table_clusters << bits <= MOST_REFCOUNT_TABLE_BYTES:
        complaint = f"a refcount table of {header.refcount_table_clusters} clusters"
    elif header.refcount_table_offset % cluster or not cluster <= header.refcount_table_offset < 1 << 56:
        complaint = f"a refcount table at {header.refcount_table_offset:#x}"
    elif header.nb_snapshots > MOST_SNAPSHOTS:
        complaint = f"{header.nb_snapshots} snapshots"
    elif header.nb_snapshots and (header.snapshots_offset % cluster or header.snapshots_offset >= 1 << 56):
        complaint = f"snapshots at {header.snapshots_offset:#x}"
    elif header.compression_type not in (*Compression,):
        complaint = f"compression of type {header.compression_type}"
    elif bool(header.compression_type) != bool(header.incompatible & Incompatible.COMPRESSION):
        complaint = "the type of compression and its feature bit differ"
    elif header.extended_l2 and bits < 14:
        complaint = "subclusters in clusters that are too small for them"
    elif header.crypt_method > 2:
        complaint = f"encryption of type {header.crypt_method}"
    if complaint:
        raise wrong(complaint)


def _feature_names(header: Header, bits: int) -> str:
    table = header.extensions.get(Extension.FEATURE_NAMES, b"")
    names = {}
    for at in range(0, len(table) - 47, 48):
        if table[at] == 0:
            names[table[at + 1]] = table[at + 2 : at + 48].rstrip(b"\0").decode(errors="replace")
    return ", ".join(names.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1)
