"""What a user may say of a disk: the keys under its node of the configuration tree."""

from __future__ import annotations

from typing import NamedTuple

from skep.block.format import SECTOR
from skep.block.registry import FORMATS
from skep.config import values
from skep.config.tree import Node
from skep.config.views import View, option, view
from skep.errors import UserError

LAYERS = "layers"
"""The node under a disk's that tells a stack of layers (:mod:`skep.block.tree`)."""
PASSWORD = "key"
"""The secret that ``keyfile`` has."""
_SERIAL_LENGTH = 20  # virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID


class BlockSizes(NamedTuple):
    """Bytes: what the disk transfers at least, and what it transfers without reading first."""

    logical: int = SECTOR
    physical: int = SECTOR


_SMALL = BlockSizes()


def block_sizes(value: str) -> BlockSizes:
    """LOGICAL or LOGICAL/PHYSICAL."""
    logical, slash, physical = value.partition("/")
    sizes = BlockSizes(_block_size(logical), _block_size(physical if slash else logical))
    if sizes.physical < sizes.logical:
        raise ValueError(f"{value!r} has a physical block smaller than the logical one")
    return sizes


def _block_size(value: str) -> int:
    size = int(value) if value.isascii() and value.isdecimal() and len(value) <= 6 else 0
    if not SECTOR <= size <= 1 << 16 or size & (size - 1):
        raise ValueError(f"{value!r} is not a power of 2 from 512 to 65536")
    return size


def serial_number(value: str) -> str:
    if not (value.isascii() and value.isprintable() and 0 < len(value) <= _SERIAL_LENGTH):
        raise ValueError(f"{value!r} is not 1 to {_SERIAL_LENGTH} printable characters of ASCII")
    return value


def _rate(value: str) -> int:
    """A slower disk would keep a VM from ending: what is under way is waited for."""
    rate = values.size(value)
    if rate < 1 << 20:
        raise ValueError(f"{value!r} is less than 1M")
    return rate


class BlockOptions(View):
    """One disk, in bhyve's keys where bhyve has them."""

    path: str = option(
        values.any_text, "", doc="the image: a regular file, a block device, nbd://HOST/EXPORT; or `layers` tell it"
    )
    read_only: bool = option(values.boolean, False, key="ro", doc="refuse writes; such an image can be shared")
    format: str = option(
        values.choice(*FORMATS), "raw", doc=f"how the image holds the disk's data: {', '.join(FORMATS)}"
    )
    backing: str | None = option(
        values.text,
        None,
        doc="directories, or files, that the image's backing and data files may lie in, with : between; none otherwise",
    )
    no_cache: bool = option(values.boolean, False, key="nocache", doc="bypass the host's page cache (O_DIRECT)")
    synchronous: bool = option(
        values.boolean,
        False,
        key="direct",
        doc="every write is durable before it completes (O_DSYNC), whatever the guest sets",
    )
    write_cache: bool = option(
        values.boolean,
        True,
        key="wce",
        doc="how the write cache starts, which the guest may switch; without it writes are durable when they complete",
    )
    block: BlockSizes = option(
        block_sizes, _SMALL, key="sectorsize", doc="LOGICAL[/PHYSICAL]: block sizes in bytes, 512 to 65536"
    )
    serial: str | None = option(
        serial_number, None, key="ser", doc="the serial number, 20 characters at most; otherwise made from the path"
    )
    queues: int | None = option(
        values.integer(1, 64), None, doc="how many queues requests come by; one for each CPU, up to 4, if not given"
    )
    no_delete: bool = option(values.boolean, False, key="nodelete", doc="the guest cannot discard (trim)")
    boot_index: int | None = option(
        values.integer(0, 65535), None, key="bootindex", doc="firmware boots from the lowest first"
    )
    lock: bool = option(values.boolean, True, doc="false: open without locks, on file systems that have none")
    bytes_per_second: int | None = option(
        _rate, None, key="bps", doc="how much is read and written in a second, at most: 1M or more"
    )
    requests_per_second: int | None = option(
        values.integer(10, 10**9), None, key="iops", doc="how many requests in a second, at most: 10 or more"
    )
    key_file: str | None = option(
        values.text, None, key="keyfile", doc="a file that is an encrypted image's password; to `layers`, secret `key`"
    )
    copy_on_read: bool = option(
        values.boolean, False, key="copyonread", doc="keep in the image what is read from its backing file"
    )
    trace: str | None = option(values.text, None, doc="a file that receives a line for each request")
    record: str | None = option(
        values.text, None, doc="a file that receives a log of every write and flush (skep.block.record)"
    )

    @classmethod
    def from_node(cls, node: Node) -> BlockOptions:
        """The options under a disk's node, whose ``device`` is somebody else's. Raises UserError."""
        options = view(node, cls, others=("device", LAYERS))
        prefix = f"{LAYERS}."
        layers = {key.removeprefix(prefix): node.get(key) for key in node.leaves() if key.startswith(prefix)}
        if not layers:
            if not options.path:
                raise UserError("must be given", node.full("path"), "the image, or layers that tell it")
            return options
        for key in ("path", "format"):
            if node.get(key) is not None:
                raise UserError("is told by the layers", node.full(key), "leave it out")
        import json  # few disks are told so

        return cls(**vars(options) | {"path": f"json:{json.dumps(layers)}"})
