"""ELF files made for tests: segments, and a PVH note."""

from __future__ import annotations

import struct

MiB = 1 << 20
LOAD = 16 * MiB

# Prints its command line on COM1 and powers off; it is told where that is, or it spins.
CODE = bytes.fromhex(
    "ba f8030000"  #     mov edx, 0x3f8
    "81 3b 78c56e33"  #  cmp dword [ebx], XEN_HVM_START_MAGIC_VALUE
    "75 fe"  #           jne $
    "8b 73 18"  #        mov esi, [ebx + cmdline_paddr]
    "ac"  #              lodsb
    "84 c0"  #           test al, al
    "74 03"  #           jz over
    "ee"  #              out dx, al
    "eb f8"  #           jmp lodsb
    "ba 04060000"  #     mov edx, PM1a control
    "b8 00340000"  #     mov eax, SLP_TYP 5 and SLP_EN
    "66 ef"  #           out dx, ax
    "f4 eb fd"  #        hlt for ever
)


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack("<III", len(name) + 1, len(desc), kind) + padded(name + b"\0") + padded(desc)


def vmlinux(
    *,
    wide: bool = True,
    code: bytes = CODE,
    load: int = LOAD,
    memsz: int = MiB,
    entry: int | None = LOAD,
    machine: int | None = None,
    notes: bytes = b"",
) -> bytes:
    """A kernel of one segment, with a PVH note unless ``entry`` is None. ``wide`` is ELF64 for x86-64."""
    if entry is not None:
        notes += note(b"Xen", 18, struct.pack("<Q" if wide else "<I", entry))
    header_form, segment_form = ("<HHIQQQIHHHHHH", "<II6Q") if wide else ("<HHIIIIIHHHHHH", "<8I")
    ehsize, phentsize = 16 + struct.calcsize(header_form), struct.calcsize(segment_form)
    at = ehsize + 2 * phentsize
    machine = machine if machine is not None else (62 if wide else 3)
    ident = b"\x7fELF" + bytes((2 if wide else 1, 1, 1)).ljust(12, b"\0")
    header = ident + struct.pack(header_form, 2, machine, 1, load, ehsize, 0, 0, ehsize, phentsize, 2, 0, 0, 0)

    def segment(kind: int, offset: int, paddr: int, filesz: int, memsz: int) -> bytes:
        if wide:
            return struct.pack(segment_form, kind, 7, offset, paddr, paddr, filesz, memsz, 4096)
        return struct.pack(segment_form, kind, offset, paddr, paddr, filesz, memsz, 7, 4096)

    headers = segment(1, at + len(notes), load, len(code), memsz) + segment(4, at, 0, len(notes), len(notes))
    return header + headers + notes + code
