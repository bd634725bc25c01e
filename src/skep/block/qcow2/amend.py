"""Changing what a qcow2 image was made with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

from skep.block.backend import read_at, write_zeroes_as_data
from skep.block.format import SECTOR, BackingName, ImageError, Option
from skep.block.luks import names
from skep.block.luks.names import prefixed
from skep.block.qcow2 import check, snapshots
from skep.block.qcow2.create import OPTIONS, on_off, parse_size
from skep.block.qcow2.header import FEATURE_NAMES, Compatible, Extension, Incompatible
from skep.block.qcow2.refcounts import from_big_endian
from skep.block.qcow2.tables import COMPRESSED, OFFSET, ZERO
from skep.block.secrets import Secrets

if TYPE_CHECKING:
    from skep.block.qcow2.image import Qcow2Image

_OLD, _NEW = ("0.10", "v2"), ("1.1", "v3")

AMEND: Mapping[str, Option] = {
    "backing_file": Option("File name of a base image"),
    "backing_fmt": Option("Image format of the base image"),
    **{name: OPTIONS[name] for name in ("compat", "lazy_refcounts", "refcount_bits")},
    "size": Option("Virtual disk size"),
    **prefixed("encrypt.", names.AMEND),
}


def amend(image: Qcow2Image, options: Mapping[str, str], secrets: Secrets, force: bool) -> None:
    """The options are of ``AMEND``. Raises ImageError for what cannot be; what came before that is done then."""
    header, path = image.header, image.path
    compat, bits = options.get("compat"), options.get("refcount_bits")
    if compat not in (None, *_OLD, *_NEW):
        raise ImageError(f"no such compat: {compat!r}", path, "known are 0.10 (or v2) and 1.1 (or v3)")
    if bits not in (None, "1", "2", "4", "8", "16", "32", "64"):
        raise ImageError(f"{bits!r} will not do for refcount_bits", path, "a power of 2 from 1 to 64")
    size = parse_size(options["size"]) if "size" in options else None
    if "size" in options and size is None:
        raise ImageError(f"{options['size']!r} is not a size", path)
    version = 3 if compat in _NEW else 2 if compat in _OLD else header.version
    order = header.refcount_order if bits is None else int(bits).bit_length() - 1
    lazy = on_off(options, "lazy_refcounts", path)
    if version == 2 and order != 4:
        raise ImageError("compat=0.10 requires refcount_bits=16", path)
    if version == 2 and lazy:
        raise ImageError("lazy_refcounts needs compat=1.1", path)
    image.settle()
    if any(name.startswith("encrypt.") for name in options):
        if image.encryption is None:
            raise ImageError("it is not encrypted", path)
        image.encryption.amend(options, secrets, force)
    if version > header.version:
        _set_version(image, 3)
    if order != header.refcount_order:
        check.change_refcounts(image, order)
        header = image.header
    if version < header.version:
        _downgrade(image)
    if "lazy_refcounts" in options:
        header.compatible = header.compatible & ~Compatible.LAZY_REFCOUNTS | (Compatible.LAZY_REFCOUNTS if lazy else 0)
        image.write_header()
        image.flush()
    if "backing_file" in options or "backing_fmt" in options:
        old = image.backing_name()
        name = options.get("backing_file", "" if old is None else old.name)
        kind = options.get("backing_fmt", None if old is None else old.format)
        image.set_backing(BackingName(name, kind) if name else None)
    if size is not None:
        image.resize(-(-size // SECTOR) * SECTOR)


def _set_version(image: Qcow2Image, version: int) -> None:
    image.header.version = version
    if version == 2:
        image.header.compatible = 0
        image.header.extensions.pop(Extension.FEATURE_NAMES, None)
    elif image.cluster_size >= 1024:
        image.header.extensions.setdefault(Extension.FEATURE_NAMES, FEATURE_NAMES)
    image.write_header()
    image.flush()


def _downgrade(image: Qcow2Image) -> None:
    """To version 2, which knows nothing of clusters that are zeros: they become data, or are forgotten where that
    reads the same."""
    header, path = image.header, image.path
    if unknown := header.incompatible & ~Incompatible.DIRTY:
        names = ", ".join(one.name or "" for one in Incompatible if unknown & one)
        raise ImageError(f"it uses what only version 3 has: {names}", path)
    if header.autoclear:
        raise ImageError("it has bitmaps, which only version 3 has", path, "skep image bitmap --remove")
    seen: set[int] = set()
    for entry in snapshots.read(image):
        if _has_zeroes(image, entry, seen):
            what = f"snapshot {entry.snapshot.name!r} has clusters of zeros, which only version 3 has"
            raise ImageError(what, path, f"skep image snapshot -d {entry.snapshot.id}")
    if image.backing_name() is None:
        image.forget_zeroes()
    else:
        for extent in image.layer(0, image.size):
            if extent.zero:
                write_zeroes_as_data(image, extent.offset, extent.length)
    image.settle()
    _set_version(image, 2)


def _has_zeroes(image: Qcow2Image, entry: snapshots.Entry, seen: set[int]) -> bool:
    """``seen``: tables that have none; snapshots share most."""
    for l1_entry in chain.from_iterable(snapshots.l1_in_parts(image, entry)):
        table = l1_entry & OFFSET
        if table and table not in seen:
            seen.add(table)
            words = from_big_endian(read_at(image.file, table, image.cluster_size))
            if any(word & ZERO and not word & COMPRESSED for word in words):
                return True
    return False
