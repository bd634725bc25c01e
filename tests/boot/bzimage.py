"""Files that are Linux kernels as far as their headers go, and small guests in that form."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from tests.engine.assemble import Program, assemble

MiB = 1 << 20
LOAD = 16 * MiB
CODE = bytes(range(256)) * 8
"""What stands where a kernel's code would."""
ENTRY = 0x200
"""Of 64-bit kernels, in their code."""


def bzimage(
    *,
    code: bytes = CODE,
    version: int = 0x20F,
    xloadflags: int = 0x7F,
    init_size: int = 4 * MiB,
    pref_address: int = LOAD,
    initrd_max: int = 0x7FFFFFFF,
    setup_sects: int = 3,
    syssize: int | None = None,
) -> bytes:
    """Loaded at 16 MiB unless said otherwise; ``code`` in 16 bytes. The default cannot run."""
    image = bytearray(((setup_sects or 4) + 1) * 512)
    struct.pack_into("<BHI", image, 0x1F1, setup_sects, 0, len(code) // 16 if syssize is None else syssize)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x206] = b"\xeb\x66HdrS"
    struct.pack_into("<H", image, 0x206, version)
    image[0x211] = 1  # LOADED_HIGH
    struct.pack_into("<IIBBHI", image, 0x22C, initrd_max, 2 * MiB, 1, 21, xloadflags, 2047)
    struct.pack_into("<QI", image, 0x258, pref_address, init_size)
    return bytes(image) + code


def write_guest(path: Path, text: str) -> Program:
    """Make a kernel that runs ``text``, which is assembled: what there is in quotation marks is the letter's number.

    It is entered as a Linux kernel is: in long mode, with identity pages, no IDT, and the boot parameters in rsi."""
    text = re.sub("'(.)'", lambda letter: str(ord(letter[1])), text)
    program = assemble(text, LOAD + ENTRY)
    code = bytes(ENTRY) + program.code
    path.write_bytes(bzimage(code=code + bytes(-len(code) % 16)))
    return program
