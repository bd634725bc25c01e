"""Instructions from their bytes: the plain ones of 64-bit code, which have a ModRM byte and integers for operands.

Nearly all that 64-bit code consists of is one of some hundred opcodes, and two instructions with the same opcode,
prefix and operand size differ in the registers that ModRM, SIB and REX name, and in constants (SDM 2, chapter 2). What
is not plain - opcodes that are not in the table, more than one prefix, prefixes that change nothing, AH to DH - is
iced's to decode.
"""

from __future__ import annotations

from typing import Final, NamedTuple

REGISTER: Final = 0
"""ModRM.rm names a register;"""
SAME: Final = 1
"""the one that ModRM.reg names, too;"""
BASE: Final = 2
"""memory at a base register,"""
INDEXED: Final = 3
"""at a base and an index,"""
SCALED: Final = 4
"""at an index,"""
ABSOLUTE: Final = 5
"""at an address,"""
RELATIVE: Final = 6
"""at an address relative to RIP."""
NONE: Final = 16
"""The number of no register."""
OPERAND_SIZE, LOCK, DS, FS, GS = 0x66, 0xF0, 0x3E, 0x64, 0x65
"""Prefixes. DS changes nothing; Linux puts it in LOCK's place where there is one CPU."""
_PREFIXES = (GS, OPERAND_SIZE, DS, LOCK, FS)
_SEGMENTS = (DS, FS, GS)
# What is said of an opcode:
_GROUP: Final = 1  # ModRM.reg is part of the opcode, or nothing
_BYTE: Final = 2  # all operands have 8 bits
_BYTE_SOURCE: Final = 4  # the operand that ModRM.rm names has 8 bits
_COUNT: Final = 8  # the immediate is a count, which decides what happens to flags
_SIZES = (0, 1, 4)
"""Bytes of a displacement by ModRM.mod."""


def _opcodes() -> dict[int, int]:
    """Opcodes that may be plain (SDM 2, appendix A; those behind 0F with bit 8 set), and what is said of them."""
    table: dict[int, int] = {}
    for alu in range(0, 0x40, 8):  # ADD OR ADC SBB AND SUB XOR CMP
        table.update({alu: _BYTE, alu + 1: 0, alu + 2: _BYTE, alu + 3: 0})
    table.update(dict.fromkeys((0x63, 0x69, 0x6B, 0x85, 0x87, 0x89, 0x8B, 0x8D), 0))
    table.update(dict.fromkeys((0x84, 0x86, 0x88, 0x8A), _BYTE))
    table.update(dict.fromkeys((0x80, 0xC6, 0xD0, 0xD2, 0xF6, 0xFE), _GROUP | _BYTE))
    table.update(dict.fromkeys((0x81, 0x83, 0xC7, 0xD1, 0xD3, 0xF7, 0xFF, 0x1BA), _GROUP))
    table.update({0xC0: _GROUP | _BYTE | _COUNT, 0xC1: _GROUP | _COUNT})
    table.update(dict.fromkeys(range(0x140, 0x150), 0))  # CMOVcc
    table.update(dict.fromkeys(range(0x190, 0x1A0), _GROUP | _BYTE))  # SETcc
    table.update(dict.fromkeys((0x1A3, 0x1AB, 0x1B3, 0x1BB), 0))  # BT, BTS, BTR, BTC
    table.update({0x1A4: _COUNT, 0x1A5: 0, 0x1AC: _COUNT, 0x1AD: 0})  # SHLD, SHRD
    table.update({0x1B0: _BYTE, 0x1B1: 0, 0x1C0: _BYTE, 0x1C1: 0})  # CMPXCHG, XADD
    table.update({0x1B6: _BYTE_SOURCE, 0x1B7: 0, 0x1BE: _BYTE_SOURCE, 0x1BF: 0})  # MOVZX, MOVSX
    table.update(dict.fromkeys((0x1AF, 0x1BC, 0x1BD), 0))  # IMUL, BSF, BSR
    return table


OPCODES = _opcodes()


class Read(NamedTuple):
    """What the bytes of an instruction say."""

    kind: int
    """Prefix, REX.W, opcode and ``where``, in fields of their own; and the count if that is an immediate."""
    where: int
    """What ModRM.rm names: REGISTER to RELATIVE"""
    reg: int
    """The register that ModRM.reg names."""
    rm: int
    """The register that ModRM.rm names, or the base."""
    scaled: int
    """The index register."""
    address: int
    """Registers, scale, bytes of displacement and segment of an operand in memory, in fields of their own."""
    scale: int
    """As SIB has it."""
    disp: int
    """Where the displacement stands."""
    disp_size: int
    imm: int
    """Where the immediate stands, or the instruction ends."""

    @property
    def prefix(self) -> int:
        return self.kind & 0xFF

    @property
    def wide(self) -> int:
        """REX.W, where it stands in REX."""
        return self.kind >> 5 & 8

    @property
    def opcode(self) -> int:
        return self.kind >> 9 & 0x1FF

    @property
    def digit(self) -> int:
        """What ModRM.reg is if it names no register."""
        return self.kind >> 21 & 7


def read(data: bytes) -> Read | None:
    """What the instruction of 64-bit code that begins here says, if it is a valid one; None if it is not plain.
    ``data`` are 15 bytes, or end with the instruction."""
    at = prefix = rex = 0
    opcode = data[0]
    if opcode in _PREFIXES:
        prefix = opcode
        at = 1
        opcode = data[1]
    if opcode & 0xF0 == 0x40:
        rex = opcode
        at += 1
        opcode = data[at]
    if opcode == 0x0F:
        at += 1
        opcode = 0x100 | data[at]
    how = OPCODES.get(opcode)
    if how is None:
        return None
    wide = rex & 8
    if (wide and prefix == OPERAND_SIZE) or (how & _BYTE and (wide or prefix == OPERAND_SIZE)):
        return None  # a prefix that changes nothing
    modrm = data[at + 1]
    at += 2
    reg = modrm >> 3 & 7
    kind = prefix | wide << 5 | opcode << 9
    if how & _GROUP:
        if rex & 4 or (reg and opcode & 0x1F0 == 0x190):
            return None
        kind |= reg << 21
        reg = NONE
    elif rex:
        reg |= (rex & 4) << 1
    elif reg > 3 and how & _BYTE:
        return None  # AH to DH
    mod = modrm >> 6
    rm = modrm & 7
    index = NONE
    disp = at
    size = scale = 0
    if mod == 3:
        if (rm > 3 and not rex and how & (_BYTE | _BYTE_SOURCE)) or prefix in _SEGMENTS:
            return None
        rm |= (rex & 1) << 3
        where = SAME if rm == reg else REGISTER
    else:
        size = _SIZES[mod]
        where = BASE
        if rm == 4:
            sib = data[at]
            disp = at + 1
            rm = sib & 7
            index = sib >> 3 & 7 | (rex & 2) << 2
            if index == 4:
                index = NONE
            else:
                scale = sib >> 6
                where = INDEXED
        if rm == 5 and not mod:
            size = 4
            rm = NONE
            where = RELATIVE if disp == at else ABSOLUTE if index == NONE else SCALED
        else:
            rm |= (rex & 1) << 3
    if how & _COUNT:
        kind |= data[disp + size] << 27
    address = where | rm << 3 | index << 8 | scale << 13 | size << 15
    if prefix == GS or prefix == FS:
        address |= prefix << 18
    return Read(kind | where << 24, where, reg, rm, index, address, scale, disp, size, disp + size)
