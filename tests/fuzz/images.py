"""Damaged disk images as a fuzzer's inputs, and what is done with one.

An input is not the file itself, which may be a terabyte of zeros: two bytes that decide what is done with the image,
its length, and the pieces of it that are not zeros.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.block.damage import MOST, SECTOR, Sparse
from tests.block.hostile import LONGEST, bounded, seeds, small_disk, use

_HEAD = struct.Struct("<HQ")
_PIECE = struct.Struct("<QI")
_LONGEST = 2 * LONGEST
"""To count branches takes as long again at most."""

QEMU: dict[str, tuple[tuple[str, ...], ...]] = {
    "qcow2": ((), ("-c",), ("-c", "-o", "compression_type=zstd"), ("-o", "compat=0.10,cluster_size=512")),
    "qcow": (("-c",),),
    "vmdk": ((), ("-o", "subformat=streamOptimized"), ("-o", "compat6")),
    "vpc": ((), ("-o", "subformat=fixed")),
    "vhdx": (("-o", "block_size=1M"),),
    "vdi": ((), ("-o", "static")),
    "parallels": ((),),
}
"""Options of `qemu-img convert`."""


def pack(image: Sparse, way: int) -> bytes:
    pieces = (_PIECE.pack(at, len(data)) + data for at, data in image.runs())
    return _HEAD.pack(way, image.size) + b"".join(pieces)


def unpack(data: bytes) -> tuple[Sparse, int]:
    """The image, and the number that decides what is done with it. Any bytes are some image."""
    way, size = _HEAD.unpack(data[: _HEAD.size].ljust(_HEAD.size, b"\0"))
    image, at = Sparse(min(size, MOST), {}), _HEAD.size
    while at + _PIECE.size <= len(data):
        offset, length = _PIECE.unpack_from(data, at)
        at += _PIECE.size
        image.write(offset % MOST // SECTOR * SECTOR, data[at : at + length])
        at += length
    return image, way


def sound_images(format: str, directory: Path) -> list[Sparse]:
    """Of our making, and of QEMU's."""
    paths = seeds(format, directory)
    raw = directory / "raw"
    raw.write_bytes(small_disk())
    for options in QEMU.get(format, ()):
        paths.append(directory / f"qemu{len(paths)}.{format}")
        # Version 7.2 says 1 for a compressed qcow whatever became of it.
        command = ("qemu-img", "convert", *options, "-f", "raw", "-O", format, raw, paths[-1])
        subprocess.run(command, check=False, timeout=60)
    return [Sparse.of(path) for path in paths]


def target(format: str, scratch: Path) -> Callable[[bytes], None]:
    """Opens, reads, writes, changes, checks and mends an input; typed errors are fine, anything else is raised."""
    path = scratch / "image"

    def run(data: bytes) -> None:
        image, way = unpack(data)
        image.put(path)
        before = len(os.listdir("/proc/self/fd"))
        with bounded(_LONGEST):
            use(path, format, random.Random(way))
        assert len(os.listdir("/proc/self/fd")) == before, "a file is left open"

    return run
