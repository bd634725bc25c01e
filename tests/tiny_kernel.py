"""A kernel of a hundred bytes in the form of a bzImage, which does what it is told on its serial port.

It prints ``B`` when it starts. Then each byte that it receives is a command:
``q`` power off by ACPI, ``r`` reset by port 0xcf9, ``t`` triple fault, ``h`` HLT with interrupts off,
``p`` wait for the power button and power off, ``s`` spin for good; anything else is sent back.
"""

from __future__ import annotations

import struct

_COM1, _PM1_STATUS, _PM1_CONTROL, _RESET = 0x3F8, 0x600, 0x604, 0xCF9
_LOAD = 1 << 20


def _dx(port: int) -> bytes:
    return b"\x66\xba" + struct.pack("<H", port)  # mov dx, port


def _al(value: int) -> bytes:
    return bytes((0xB0, value))  # mov al, value


_OUT, _IN = b"\xee", b"\xec"  # out dx, al; in al, dx
_OFF = _dx(_PM1_CONTROL) + b"\x66\xb8\x00\x34\x66\xef\xf4\xeb\xfd"  # SLP_TYP 5 and SLP_EN; hlt for ever
_ON_COMMAND = {
    b"q": _OFF,
    b"r": _dx(_RESET) + _al(6) + _OUT + b"\xf4\xeb\xfd",
    b"t": b"\x0f\x01\x1d\x02\x00\x00\x00\x0f\x0b" + bytes(10),  # lidt of an empty table; ud2
    b"h": b"\xfa\xf4\xeb\xfd",
    # in ax, dx until PWRBTN_STS
    b"p": _dx(_PM1_STATUS) + b"\x66\xed\xf6\xc4\x01\x74\xf9" + _OFF,
    b"s": b"\xeb\xfe",
}

COMMANDS = b"".join(_ON_COMMAND)


def _code() -> bytes:
    code = _dx(_COM1 + 4) + _al(0x0B) + _OUT  # MCR: DTR, RTS, OUT2: ready
    code += _dx(_COM1) + _al(ord("B")) + _OUT
    again = len(code)
    code += _dx(_COM1 + 5) + _IN + b"\xa8\x01\x74\xfb"  # LSR until DR
    code += _dx(_COM1) + _IN
    for letter, action in _ON_COMMAND.items():
        code += b"\x3c" + letter + bytes((0x75, len(action))) + action  # cmp al, letter; jne over
    code += _OUT
    return code + b"\xe9" + struct.pack("<i", again - len(code) - 5)


def printing(count: int) -> bytes:
    """Code that prints ``count`` dots as fast as it can, and powers off."""
    code = _dx(_COM1) + _al(ord(".")) + b"\xb9" + struct.pack("<I", count)  # mov ecx, count
    return code + _OUT + b"\xff\xc9\x75\xfb" + _OFF  # dec ecx; jnz out


def tiny_kernel(code: bytes = b"") -> bytes:
    """A file that ``--kernel`` takes; with ``code`` it runs that instead."""
    body = (bytes(512) + (code or _code())).ljust(4096, b"\xcc")  # the 64-bit entry is at 0x200
    setup = bytearray(1024)
    struct.pack_into("<BHI", setup, 0x1F1, 1, 0, len(body) // 16)  # setup_sects, root_flags, syssize
    setup[0x1FE:0x206] = b"\x55\xaa\xeb\x66HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)  # version
    struct.pack_into("<I", setup, 0x22C, 0x7FFFFFFF)  # initrd_addr_max
    struct.pack_into("<BBHI", setup, 0x234, 1, 0, 1, 2047)  # relocatable, min_alignment, XLF_KERNEL_64, cmdline_size
    struct.pack_into("<QI", setup, 0x258, _LOAD, 1 << 16)  # pref_address, init_size
    return bytes(setup) + body
