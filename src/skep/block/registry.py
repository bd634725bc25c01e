"""Which formats there are, and how to tell them apart. A format's module is imported when the first image needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple

from skep.block.backend import File, read_at
from skep.block.format import Image
from skep.errors import UserError

FILTERS = ("throttle", "delay", "fault", "trace", "record", "copy-on-read")
"""What :mod:`skep.block.filtering` makes."""
_HEAD = 1024
_SECTOR = 512


class Ends(NamedTuple):
    """What probing looks at."""

    head: bytes
    tail: bytes
    """The last sector."""


class Format(NamedTuple):
    module: str
    name: str
    """Of the class, an :class:`~skep.block.format.Image` made from an open file."""
    is_one: Callable[[Ends], bool]

    def load(self) -> type[Image]:
        loaded: type[Image] = getattr(import_module(self.module), self.name)
        return loaded


def _qcow(*versions: int) -> Callable[[Ends], bool]:
    return lambda ends: ends.head[:4] == b"QFI\xfb" and int.from_bytes(ends.head[4:8], "big") in versions


def _vhd(ends: Ends) -> bool:
    if ends.head[:8] == b"conectix":
        return True
    if ends.tail[:8] != b"conectix":
        return False
    from skep.block.vhd import is_footer

    return is_footer(ends.tail)


def _vmdk(ends: Ends) -> bool:
    return ends.head[:4] in (b"KDMV", b"COWD") or b"# Disk DescriptorFile" in ends.head[:_SECTOR]


FORMATS: Mapping[str, Format] = {
    "qcow2": Format("skep.block.qcow2.image", "Qcow2Image", _qcow(2, 3)),
    "raw": Format("skep.block.raw", "RawImage", lambda ends: True),
    "vmdk": Format("skep.block.vmdk.image", "VmdkImage", _vmdk),
    "qcow": Format("skep.block.qcow", "QcowImage", _qcow(1)),
    "parallels": Format(
        "skep.block.parallels",
        "ParallelsImage",
        lambda ends: ends.head[:16] in (b"WithoutFreeSpace", b"WithouFreSpacExt"),
    ),
    "dmg": Format("skep.block.dmg", "DmgImage", lambda ends: ends.tail[:4] == b"koly"),
    "vpc": Format("skep.block.vhd", "VhdImage", _vhd),
    "vdi": Format("skep.block.vdi", "VdiImage", lambda ends: ends.head[64:68] == b"\x7f\x10\xda\xbe"),
    "luks": Format("skep.block.luks.image", "LuksImage", lambda ends: ends.head[:8] == b"LUKS\xba\xbe\x00\x01"),
    "vhdx": Format("skep.block.vhdx.image", "VhdxImage", lambda ends: ends.head[:8] == b"vhdxfile"),
}
"""By the names that `qemu-img` has for them."""


def format_named(name: str, where: object = None) -> type[Image]:
    """Raises UserError for one that there is not."""
    if name not in FORMATS:
        raise UserError(f"no such format: {name!r}", where, f"known are {', '.join(sorted(FORMATS))}")
    return FORMATS[name].load()


def probe(file: File) -> str:
    """The format that the file seems to have. Whoever may write a raw disk decides what this says of it, so nothing
    that a guest wrote to is to be opened by it; a tool's user may ask for it."""
    ends = Ends(
        bytes(read_at(file, 0, _HEAD)), bytes(read_at(file, max(0, file.size - _SECTOR), min(file.size, _SECTOR)))
    )
    return next((name for name, one in FORMATS.items() if name != "raw" and one.is_one(ends)), "raw")
