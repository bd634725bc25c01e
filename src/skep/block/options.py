"""What a user may say of a disk: the keys under its node of the configuration tree."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from skep.errors import UserError

SECTOR = 512
"""The unit of virtio-blk's protocol, whatever the disk's block size."""

_TRUE = frozenset(("true", "on", "yes", "1"))
_FALSE = frozenset(("false", "off", "no", "0"))
_SERIAL_LENGTH = 20  # virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """One disk, in bhyve's keys where bhyve has them; the name of a key is in brackets where it differs."""

    path: str
    """A regular file or a block device."""
    read_only: bool = False
    """[ro] Also refuses the guest's writes. Images that others only read can be shared."""
    format: str = "raw"
    no_cache: bool = False
    """[nocache] Bypass the host's page cache (O_DIRECT)."""
    synchronous: bool = False
    """[direct] Every write is durable before it completes (O_DSYNC), whatever the guest sets."""
    write_cache: bool = True
    """[wce] How the write cache starts: with it off, every write is durable before it completes. The guest may switch
    it."""
    logical_block: int = SECTOR
    """[sectorsize=LOGICAL[/PHYSICAL]] Bytes: a power of 2, from 512 to 65536."""
    physical_block: int = SECTOR
    serial: str | None = None
    """[ser] At most 20 characters of ASCII; None derives one from the path."""
    lock: bool = True
    """False: open without image locks, on file systems that have none."""
    record: str | None = None
    """A file that receives a log of every write and flush; see skep.block.record."""

    @classmethod
    def from_options(cls, options: Mapping[str, str], where: str = "disk") -> BlockOptions:
        """From the leaves of a node, whose name is ``where``. Raises UserError."""
        for key in options:
            if key not in _KEYS:
                near = difflib.get_close_matches(key, _KEYS, 1)
                raise UserError(f"unknown option {key!r}", where, f"did you mean {near[0]!r}?" if near else None)
        path = options.get("path", "")
        if not path:
            raise UserError("a disk needs a path", where)
        image_format = options.get("format", "raw")
        if image_format != "raw":
            raise UserError(f"unknown image format {image_format!r}", where, "use format=raw")
        logical, physical = _block_sizes(options.get("sectorsize", str(SECTOR)), where)
        serial = options.get("ser")
        if serial is not None and not (serial.isascii() and serial.isprintable() and len(serial) <= _SERIAL_LENGTH):
            raise UserError(f"ser is longer than {_SERIAL_LENGTH} characters or not printable ASCII", where)
        return cls(
            path=path,
            read_only=_boolean(options, "ro", False, where),
            format=image_format,
            no_cache=_boolean(options, "nocache", False, where),
            synchronous=_boolean(options, "direct", False, where),
            write_cache=_boolean(options, "wce", True, where),
            logical_block=logical,
            physical_block=physical,
            serial=serial,
            lock=_boolean(options, "lock", True, where),
            record=options.get("record"),
        )


_KEYS = ("path", "ro", "format", "nocache", "direct", "wce", "sectorsize", "ser", "lock", "record")


def _boolean(options: Mapping[str, str], key: str, default: bool, where: str) -> bool:
    text = options.get(key)
    if text is None:
        return default
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise UserError(f"{key} is {text!r}, which is neither true nor false", where)


def _block_sizes(text: str, where: str) -> tuple[int, int]:
    logical, slash, physical = text.partition("/")
    sizes = (_block_size(logical, where), _block_size(physical if slash else logical, where))
    if sizes[1] < sizes[0]:
        raise UserError(f"sectorsize {text!r} has a physical block smaller than the logical one", where)
    return sizes


def _block_size(text: str, where: str) -> int:
    size = int(text) if text.isdecimal() and len(text) <= 6 else 0
    if not SECTOR <= size <= 1 << 16 or size & (size - 1):
        raise UserError(f"sectorsize {text!r} is not a power of 2 from 512 to 65536", where)
    return size
