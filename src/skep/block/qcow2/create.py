"""Making a qcow2 image: the smallest one there is, which then grows to its size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from skep.block.backend import write_at
from skep.block.format import PREALLOCATION, BackingName, ImageError, Option
from skep.block.luks import names
from skep.block.luks.names import prefixed
from skep.block.protocol import create_protocol, open_protocol
from skep.block.qcow2.header import (
    FEATURE_NAMES,
    Autoclear,
    Compatible,
    Compression,
    Extension,
    Header,
    Incompatible,
)
from skep.block.qcow2.refcounts import Packing
from skep.block.secrets import Secrets

if TYPE_CHECKING:
    from skep.block.qcow2.image import Qcow2Image

OPTIONS: Mapping[str, Option] = {
    "cluster_size": Option("qcow2 cluster size", "65536", told=True),
    "extended_l2": Option("Extended L2 tables", "off", told=True),
    "preallocation": Option("Preallocation mode (allowed values: off, metadata, falloc, full)", "off"),
    "compression_type": Option("Compression method used for image cluster compression", "zlib", told=True),
    "compat": Option("Compatibility level (v2 [0.10] or v3 [1.1])", "1.1"),
    "data_file": Option("File name of an external data file"),
    "data_file_raw": Option("The external data file must stay valid as a raw image", "off"),
    "lazy_refcounts": Option("Postpone refcount updates", "off", told=True),
    "refcount_bits": Option("Width of a reference count entry in bits", "16", told=True),
    "encrypt.format": Option("Encrypt the image, format choices: 'aes', 'luks'"),
    **prefixed("encrypt.", names.CREATE),
}
OPEN_OPTIONS: Mapping[str, Option] = {
    "l2-cache-size": Option("L2 tables kept in memory, bytes", "16M"),
    "refcount-cache-size": Option("Refcount blocks kept in memory, bytes", "2M"),
    "encrypt.format": OPTIONS["encrypt.format"],
    "encrypt.key-secret": OPTIONS["encrypt.key-secret"],
}

_LARGEST = 1 << 62


def create(
    kind: type[Qcow2Image],
    path: str,
    size: int,
    options: Mapping[str, str],
    backing: BackingName | None,
    secrets: Secrets,
) -> None:
    header = _header(path, options)
    if size > _LARGEST:
        raise ImageError(f"a disk of {size} bytes is too large", path)
    preallocation = options.get("preallocation", "off")
    if preallocation not in PREALLOCATION:
        raise ImageError(f"no such preallocation: {preallocation!r}", path, f"known are {', '.join(PREALLOCATION)}")
    encrypted = _wants_encryption(path, options, secrets)
    if backing is not None:
        if preallocation != "off" and not header.extended_l2:
            raise ImageError("what is preallocated hides the backing file", path)
        header.backing_name = backing.name
        if backing.format is not None:
            header.extensions = {int(Extension.BACKING_FORMAT): backing.format.encode()} | header.extensions
    data_file = _data_file(path, options, header, backing)
    cluster = header.cluster_size
    with create_protocol(path) as file:
        # The refcount table, one block, and nothing else yet: clusters 0, 1 and 2.
        packing = Packing(1 << header.refcount_order)
        counts = packing.several(0, cluster * 8 // packing.bits)
        counts[:3] = packing.several(1, 3)
        write_at(file, cluster, (2 * cluster).to_bytes(8, "big").ljust(cluster, b"\0"))
        write_at(file, 2 * cluster, packing.pack(counts))
        write_at(file, 0, header.pack())
    with kind(open_protocol(path, volatile=True)) as image:  # what is half made need not survive
        if data_file is not None:
            place = data_file
            image.open_files(lambda name: create_protocol(place, size))
        if encrypted:
            from skep.block.qcow2.encryption import encrypt_new

            encrypt_new(image, options, secrets)
        image.resize(size)
        image.reserve(0, preallocation)
    with open_protocol(path) as file:
        file.flush()


def _wants_encryption(path: str, options: Mapping[str, str], secrets: Secrets) -> bool:
    if not any(name.startswith("encrypt.") for name in options):
        return False
    from skep.block.qcow2 import encryption

    encrypted = encryption.wanted(path, options)
    if encrypted:
        encryption.check_password(path, options, secrets)
    return encrypted


def _header(path: str, options: Mapping[str, str]) -> Header:
    def wrong(name: str, todo: str) -> ImageError:
        return ImageError(f"{options[name]!r} will not do for {name}", path, todo)

    cluster = parse_size(options.get("cluster_size", "65536"))
    if cluster is None or cluster & (cluster - 1) or not 512 <= cluster <= 2 << 20:
        raise wrong("cluster_size", "a power of 2 from 512 to 2M")
    compat = options.get("compat", "1.1")
    if compat not in ("0.10", "v2", "1.1", "v3"):
        raise wrong("compat", "known are 0.10 (or v2) and 1.1 (or v3)")
    bits = options.get("refcount_bits", "16")
    if bits not in ("1", "2", "4", "8", "16", "32", "64"):
        raise wrong("refcount_bits", "a power of 2 from 1 to 64")
    compression = options.get("compression_type", "zlib")
    if compression not in ("zlib", "zstd"):
        raise wrong("compression_type", "known are zlib and zstd")
    header = Header(2 if compat in ("0.10", "v2") else 3, cluster.bit_length() - 1)
    header.refcount_table_offset, header.refcount_table_clusters = cluster, 1
    header.refcount_order = int(bits).bit_length() - 1
    header.compression_type = Compression[compression.upper()]
    if header.compression_type:
        header.incompatible |= Incompatible.COMPRESSION
    if on_off(options, "lazy_refcounts", path):
        header.compatible |= Compatible.LAZY_REFCOUNTS
    if on_off(options, "extended_l2", path):
        header.incompatible |= Incompatible.EXTENDED_L2
        if cluster < 16384:
            raise wrong("extended_l2", "clusters must have at least 16k then")
    if header.version == 2 and (header.incompatible or header.compatible or bits != "16"):
        raise ImageError("compat=0.10 has none of the other options", path, "leave compat out")
    if header.version == 3 and cluster >= 1024:
        header.extensions[int(Extension.FEATURE_NAMES)] = FEATURE_NAMES
    return header


def _data_file(path: str, options: Mapping[str, str], header: Header, backing: BackingName | None) -> str | None:
    raw = on_off(options, "data_file_raw", path)
    name = options.get("data_file")
    if name is None:
        if raw:
            raise ImageError("data_file_raw needs a data_file", path)
        return None
    if header.version == 2:
        raise ImageError("compat=0.10 has no data file", path, "leave compat out")
    if raw and backing is not None:
        raise ImageError("a raw data file lies over no other image", path)
    header.incompatible |= Incompatible.DATA_FILE
    header.autoclear |= Autoclear.DATA_FILE_RAW if raw else 0
    header.extensions[int(Extension.DATA_FILE)] = name.encode(errors="surrogateescape")
    return os.path.join(os.path.dirname(path), name)


def on_off(options: Mapping[str, str], name: str, path: str) -> bool:
    value = options.get(name, "off")
    if value not in ("on", "off"):
        raise ImageError(f"{name} is on or off, not {value!r}", path)
    return value == "on"


def parse_size(text: str) -> int | None:
    """A number of bytes, or of units of k, M, G, T, P, E, or a hexadecimal one; None: it is not one."""
    if text[:2] in ("0x", "0X"):
        digits = text[2:]
        return int(digits, 16) if digits.isalnum() and not digits.strip("0123456789abcdefABCDEF") else None
    unit = "bkmgtpe".find(text[-1:].lower()) if text[-1:].isalpha() else 0
    number = text[:-1] if text[-1:].isalpha() else text
    if unit < 0 or not number or number.count(".") > 1 or not number.replace(".", "").isdecimal():
        return None
    return int(float(number) * (1 << 10 * unit)) if "." in number else int(number) << (10 * unit)


def measure(size: int, data: Sequence[tuple[int, int]], options: Mapping[str, str]) -> tuple[int, int]:
    """As QEMU counts: clusters of data, and the tables for a disk that is full of them."""
    header = _header("measure", options)
    cluster = header.cluster_size
    clusters = -(-size // cluster)
    luks = 0
    if _wants_encryption("measure", options, {options.get("encrypt.key-secret", ""): b""}):
        from skep.block.qcow2.encryption import header_length

        luks = -(-header_length(options) // cluster)
    l2 = -(-clusters // header.l2_entries)
    l1 = -(-l2 * 8 // cluster)
    meta = 1 + l1 + l2 + luks
    full = _with_counts(header, meta + clusters) * cluster
    touched = last = 0
    for offset, length in data:
        first, end = offset // cluster, -(-(offset + length) // cluster)
        touched += end - max(first, last)
        last = end
    if options.get("preallocation", "off") in ("falloc", "full"):
        return full, full
    return full - (clusters - touched) * cluster, full


def _with_counts(header: Header, clusters: int) -> int:
    """Clusters, and those for their own counts."""
    per_block = header.cluster_size * 8 >> header.refcount_order
    blocks = table = 0
    while True:
        total = clusters + blocks + table
        needed = -(-total // per_block)
        needed_table = -(-needed * 8 // header.cluster_size)
        if (needed, needed_table) == (blocks, table):
            return total
        blocks, table = needed, needed_table
