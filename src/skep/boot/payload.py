"""The kernel inside a bzImage: what its decompressor would unpack (boot.rst of the kernel, payload_offset)."""

from __future__ import annotations

import bz2
import lzma
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable

from skep.boot.linux import parse_header
from skep.errors import UserError

_PAYLOAD = 0x248
"""payload_offset and payload_length in the setup header."""
_SIZE = 4
"""Bytes behind the compressed data in which the build notes its unpacked size; gzip has that in its own format."""


def vmlinux_of(image: bytes, where: object) -> bytes:
    """The ELF file that a bzImage was made from. Raises UserError for what has none, and where the tool to unpack it is
    missing."""
    header = parse_header(image[:0x290], len(image), where)
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (header.setup_sects + 1) * 512 + offset
    payload = image[start : start + length]
    for magic, unpack in _FORMATS.items():
        if payload.startswith(magic):
            try:
                kernel = unpack(payload)
            except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                raise UserError(f"the kernel inside cannot be unpacked: {error}", where) from None
            if kernel.startswith(b"\x7fELF"):
                return kernel
            break
    raise UserError(f"no kernel that we know how to unpack is inside ({payload[:4].hex()})", where)


def _tool(name: str) -> Callable[[bytes], bytes]:
    """Unpack with a program that the standard library has no match for."""

    def unpack(payload: bytes) -> bytes:
        program = shutil.which(name)
        if program is None:
            raise UserError(f"{name} is not installed, and the kernel inside is packed by it", None, f"install {name}")
        done = subprocess.run((program, "-dcq"), input=payload[:-_SIZE], capture_output=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr.decode(errors="replace").strip() or f"{name} says no")
        return done.stdout

    return unpack


_FORMATS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x7fELF": lambda payload: payload,
    b"\x1f\x8b": lambda payload: zlib.decompress(payload, wbits=31),
    b"\xfd7zXZ\0": lambda payload: lzma.decompress(payload[:-_SIZE]),
    b"\x5d\0\0": lambda payload: lzma.decompress(payload[:-_SIZE], lzma.FORMAT_ALONE),
    b"BZh": lambda payload: bz2.decompress(payload[:-_SIZE]),
    b"\x02\x21\x4c\x18": _tool("lz4"),
    b"\x28\xb5\x2f\xfd": _tool("zstd"),
}
"""How a payload begins, and what unpacks it. LZO is left out: no kernel that anybody ships uses it."""
