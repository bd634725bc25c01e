"""A small x86-64 assembler: what the translator's own stubs and :mod:`compiler` need, no more.

Encodings are those of the Intel SDM, volume 2 (chapter 2 for prefixes, ModRM, SIB and VEX; chapters 3 to 5 for the
opcodes, which stand in the methods as in the manual). One method is one instruction and has its name, with an
underscore where Python owns the word (``and_``, ``or_``, ``not_``). Operand order is Intel's: destination first.

A destination may be any int from 0 to 15; as a *source*, a :class:`Reg` is a register and any other int an immediate.
``size`` is the operand size in bits: 8, 16, 32 or 64. The byte registers are AL..R15B; AH..DH cannot be named.

    a = Assembler()
    loop = a.label()
    a.mov(RCX, 10)
    a.bind(loop)
    a.add(RAX, Mem(RDI, RCX, 8))
    a.dec(RCX)
    a.jcc(Cond.NE, loop)
    a.ret()
    code = a.code(base)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class Reg(enum.IntEnum):
    """A general register, by the number that encodes it."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15


RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = Reg


class Cond(enum.IntEnum):
    """A condition, by the number that encodes it (SDM 1, appendix B)."""

    O = 0  # noqa: E741  (the manual's name)
    NO = 1
    B = 2
    AE = 3
    E = 4
    NE = 5
    BE = 6
    A = 7
    S = 8
    NS = 9
    P = 10
    NP = 11
    L = 12
    GE = 13
    LE = 14
    G = 15
    # other names of B, AE, E, NE
    C = 2
    NC = 3
    Z = 4
    NZ = 5

    @property
    def inverse(self) -> Cond:
        return Cond(self ^ 1)


@dataclass(frozen=True, slots=True)
class Mem:
    """The operand ``[base + index * scale + disp]``, in the GS segment if ``gs``. ``disp`` has 32 signed bits."""

    base: int | None = None
    index: int | None = None
    scale: int = 1
    disp: int = 0
    gs: bool = False


def gs(disp: int) -> Mem:
    """``gs:[disp]``: a field of the state block."""
    return Mem(disp=disp, gs=True)


class Label:
    """A place in the code of the Assembler that made it."""

    __slots__ = ("offset",)

    def __init__(self) -> None:
        self.offset: int | None = None


class _Fixup(NamedTuple):
    """A relative displacement of ``width`` bytes at ``offset``, to be filled in by :meth:`Assembler.code`."""

    offset: int
    width: int
    target: Label | int  # an int is an absolute address


Rm = int | Mem
Source = int | Mem

_SCALE = {1: 0x00, 2: 0x40, 4: 0x80, 8: 0xC0}
# SDM 2, NOP: recommended multi-byte sequences
_NOPS = [
    bytes.fromhex(s)
    for s in (
        "", "90", "6690", "0f1f00", "0f1f4000", "0f1f440000", "660f1f440000", "0f1f8000000000", "0f1f840000000000",
        "660f1f840000000000",
    )
]  # fmt: skip


def signed(value: int, bits: int) -> int:
    """``value``, given signed or unsigned in ``bits`` bits, as a signed number."""
    if not -(1 << bits - 1) <= value < 1 << bits:
        raise ValueError(f"{value:#x} does not fit {bits} bits")
    return value - (1 << bits) if value >> (bits - 1) > 0 else value


def fits(value: int, bits: int) -> bool:
    """Whether the signed number ``value`` fits ``bits`` bits."""
    return -(1 << bits - 1) <= value < 1 << bits - 1


class Assembler:
    """Collects instructions; :meth:`code` places them at an address."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._fixups: list[_Fixup] = []
        self._base: int | None = None

    def __len__(self) -> int:
        return len(self._bytes)

    # Labels and the result

    def label(self) -> Label:
        return Label()

    def bind(self, label: Label) -> None:
        """Let ``label`` be here."""
        if label.offset is not None:
            raise ValueError("label is bound already")
        label.offset = len(self._bytes)

    def here(self) -> Label:
        """A new label, bound here."""
        label = Label()
        self.bind(label)
        return label

    def code(self, base: int) -> bytes:
        """The bytes as they must stand at address ``base``. May be asked again for another base."""
        out = bytearray(self._bytes)
        for f in self._fixups:
            if isinstance(f.target, Label):
                if f.target.offset is None:
                    raise ValueError("a label is used and never bound")
                target = f.target.offset
            else:
                target = f.target - base
            distance = target - (f.offset + f.width)
            if not fits(distance, 8 * f.width):
                raise ValueError(f"jump over {distance:#x} bytes does not fit {8 * f.width} bits")
            out[f.offset : f.offset + f.width] = distance.to_bytes(f.width, "little", signed=True)
        self._base = base
        return bytes(out)

    def address_of(self, label: Label) -> int:
        """Where the last :meth:`code` put ``label``."""
        if self._base is None or label.offset is None:
            raise ValueError("not placed yet")
        return self._base + label.offset

    def raw(self, data: bytes) -> None:
        self._bytes += data

    def align(self, n: int) -> None:
        """Fill with NOPs to a multiple of ``n`` bytes from the start (the base must be aligned as well)."""
        self.nop(-len(self._bytes) % n)

    # Encoding

    def _relative(self, width: int, target: Label | int) -> None:
        self._fixups.append(_Fixup(len(self._bytes), width, target))
        self._bytes += bytes(width)

    def _imm(self, value: int, size: int) -> None:
        self._bytes += signed(value, size).to_bytes(size // 8, "little", signed=True)

    def _modrm(self, reg: int, rm: Rm) -> None:
        """ModRM, SIB and displacement; their fourth register bits are in REX or VEX."""
        reg = (reg & 7) << 3
        if not isinstance(rm, Mem):
            self._bytes.append(0xC0 | reg | rm & 7)
            return
        disp = rm.disp
        if not fits(disp, 32):
            raise ValueError(f"displacement {disp:#x} does not fit 32 bits")
        if rm.index == RSP:
            raise ValueError("rsp cannot be an index")
        sib = 0x20 if rm.index is None else _SCALE[rm.scale] | (rm.index & 7) << 3
        if rm.base is None:  # base 101 with mod 00: a 32-bit displacement and no base
            self._bytes += bytes((reg | 4, sib | 5)) + disp.to_bytes(4, "little", signed=True)
            return
        base = rm.base & 7
        if disp == 0 and base != RBP:  # mod 00 with rbp or r13 means something else
            mod, width = 0x00, 0
        elif fits(disp, 8):
            mod, width = 0x40, 1
        else:
            mod, width = 0x80, 4
        if rm.index is None and base != RSP:  # rm 100, rsp or r12, means that a SIB follows
            self._bytes.append(mod | reg | base)
        else:
            self._bytes += bytes((mod | reg | 4, sib | base))
        self._bytes += disp.to_bytes(width, "little", signed=True)

    def _op(self, opcode: bytes, reg: int, rm: Rm, size: int = 64, prefix: bytes = b"", byte_reg: bool = False) -> None:
        """An instruction with a ModRM byte. ``byte_reg`` says that ``reg`` names a byte register (it may be /digit)."""
        out = self._bytes
        x = b = 0
        byte_rm = False
        if isinstance(rm, Mem):
            if rm.gs:
                out.append(0x65)
            x = 0 if rm.index is None else rm.index >> 3
            b = 0 if rm.base is None else rm.base >> 3
        else:
            b = rm >> 3
            byte_rm = size == 8 and 4 <= rm < 8
        if size == 16:
            out.append(0x66)
        out += prefix
        rex = (size == 64) << 3 | reg >> 3 << 2 | x << 1 | b
        if rex or byte_rm or (byte_reg and 4 <= reg < 8):  # SPL, BPL, SIL, DIL need a REX, else they are AH..BH
            out.append(0x40 | rex)
        out += opcode
        self._modrm(reg, rm)

    def _sized(self, opcode: int, reg: int, rm: Rm, size: int, digit: bool = False) -> None:
        """``opcode`` for 16 to 64 bits, ``opcode - 1`` for 8, as the manual pairs them. ``digit``: reg is /digit."""
        self._op(bytes((opcode - (size == 8),)), reg, rm, size, byte_reg=size == 8 and not digit)

    def _vex(self, pp: int, mmmmm: int, opcode: int, reg: int, vvvv: int, rm: Rm, size: int) -> None:
        """A VEX instruction on general registers (SDM 2, 2.3.5), always with the three-byte prefix."""
        x = b = 0
        if isinstance(rm, Mem):
            if rm.gs:
                self._bytes.append(0x65)
            x = 0 if rm.index is None else rm.index >> 3
            b = 0 if rm.base is None else rm.base >> 3
        else:
            b = rm >> 3
        first = (reg >> 3 ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | mmmmm
        self._bytes += bytes((0xC4, first, (size == 64) << 7 | (vvvv ^ 15) << 3 | pp, opcode))
        self._modrm(reg, rm)

    # Moves

    def mov(self, dst: Rm, src: Source, size: int = 64) -> None:
        """Register, memory and immediate in any pair the CPU has. Leaves the flags alone."""
        if isinstance(src, Mem):
            if isinstance(dst, Mem):
                raise TypeError("mov has one memory operand")
            self._sized(0x8B, dst, src, size)
        elif isinstance(src, Reg):
            self._sized(0x89, src, dst, size)
        elif isinstance(dst, Mem):
            self._sized(0xC7, 0, dst, size, digit=True)
            self._imm(self._imm32(src, size), min(size, 32))
        elif size >= 32:
            self._mov_imm(dst, signed(src, size) & (1 << size) - 1)
        else:
            self._sized(0xC7, 0, dst, size, digit=True)
            self._imm(src, size)

    def _mov_imm(self, dst: int, value: int) -> None:
        """The shortest of: 32 bits zero-extended, 32 bits sign-extended, all 64 bits."""
        if value < 1 << 32:
            if dst > 7:
                self._bytes.append(0x41)
            self._bytes.append(0xB8 | dst & 7)
            self._imm(value, 32)
        elif fits(signed(value, 64), 32):
            self._op(b"\xc7", 0, dst)
            self._imm(signed(value, 64), 32)
        else:
            self._bytes += bytes((0x48 | dst >> 3, 0xB8 | dst & 7))
            self._imm(value, 64)

    @staticmethod
    def _imm32(value: int, size: int) -> int:
        """An immediate operand as the CPU extends it: 64-bit instructions have 32 signed bits."""
        value = signed(value, size)
        if not fits(value, 32):
            raise ValueError(f"immediate {value:#x} does not fit 32 bits")
        return value

    def movzx(self, dst: int, src: Rm, size: int = 8) -> None:
        """Zero-extend 8, 16 or 32 bits (the last is a plain MOV) to 64."""
        if size == 32:
            if isinstance(src, Mem):
                self._op(b"\x8b", dst, src, 32)
            else:
                self._op(b"\x89", src, dst, 32)
        else:
            self._extend(0xB6, dst, src, size, 32)

    def movsx(self, dst: int, src: Rm, size: int = 8) -> None:
        """Sign-extend 8, 16 or 32 bits to 64."""
        if size == 32:
            self._op(b"\x63", dst, src)
        else:
            self._extend(0xBE, dst, src, size, 64)

    def movsxd(self, dst: int, src: Rm) -> None:
        self.movsx(dst, src, 32)

    def _extend(self, opcode: int, dst: int, src: Rm, size: int, to: int) -> None:
        if size == 8 and to == 32 and not isinstance(src, Mem) and 4 <= src < 8 and dst < 8:
            self._bytes.append(0x40)
        self._op(bytes((0x0F, opcode + (size == 16))), dst, src, to)

    def lea(self, dst: int, src: Mem, size: int = 64) -> None:
        self._op(b"\x8d", dst, src, size)

    def lea_label(self, dst: int, label: Label) -> None:
        """``dst`` = the address of ``label``, RIP-relative."""
        self._bytes += bytes((0x48 | dst >> 3 << 2, 0x8D, (dst & 7) << 3 | 5))
        self._relative(4, label)

    def xchg(self, dst: Rm, src: int, size: int = 64) -> None:
        """With memory it is locked by itself."""
        self._sized(0x87, src, dst, size)

    def cmpxchg(self, dst: Rm, src: int, size: int = 64, lock: bool = False) -> None:
        if lock:
            self.lock()
        self._op(bytes((0x0F, 0xB1 - (size == 8))), src, dst, size, byte_reg=size == 8)

    def xadd(self, dst: Rm, src: int, size: int = 64, lock: bool = False) -> None:
        if lock:
            self.lock()
        self._op(bytes((0x0F, 0xC1 - (size == 8))), src, dst, size, byte_reg=size == 8)

    def setcc(self, cond: Cond, dst: Rm) -> None:
        """A byte, 0 or 1."""
        self._op(bytes((0x0F, 0x90 | cond)), 0, dst, 8)

    def cmovcc(self, cond: Cond, dst: int, src: Rm, size: int = 64) -> None:
        self._op(bytes((0x0F, 0x40 | cond)), dst, src, size)

    def push(self, src: Source) -> None:
        """A 64-bit register, memory word or sign-extended immediate."""
        if isinstance(src, Mem):
            self._op(b"\xff", 6, src, 32)
        elif isinstance(src, Reg):
            self._bytes += b"\x41" * (src >> 3) + bytes((0x50 | src & 7,))
        else:
            value = self._imm32(src, 64)
            self._bytes.append(0x6A if fits(value, 8) else 0x68)
            self._imm(value, 8 if fits(value, 8) else 32)

    def pop(self, dst: Rm) -> None:
        if isinstance(dst, Mem):
            self._op(b"\x8f", 0, dst, 32)
        else:
            self._bytes += b"\x41" * (dst >> 3) + bytes((0x58 | dst & 7,))

    # Arithmetic and logic

    def _alu(self, n: int, dst: Rm, src: Source, size: int) -> None:
        """One of the eight operations that share an encoding, by their number ``n`` in it."""
        if isinstance(src, Mem):
            if isinstance(dst, Mem):
                raise TypeError("one operand must be a register or an immediate")
            self._sized(n << 3 | 3, dst, src, size)
        elif isinstance(src, Reg):
            self._sized(n << 3 | 1, src, dst, size)
        else:
            value = self._imm32(src, size)
            if size > 8 and fits(value, 8):
                self._op(b"\x83", n, dst, size)
                self._imm(value, 8)
            else:
                self._sized(0x81, n, dst, size, digit=True)
                self._imm(value, min(size, 32))

    def add(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(0, dst, src, size)

    def or_(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(1, dst, src, size)

    def adc(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(2, dst, src, size)

    def sbb(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(3, dst, src, size)

    def and_(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(4, dst, src, size)

    def sub(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(5, dst, src, size)

    def xor(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(6, dst, src, size)

    def cmp(self, dst: Rm, src: Source, size: int = 64) -> None:
        self._alu(7, dst, src, size)

    def test(self, dst: Rm, src: Source, size: int = 64) -> None:
        if isinstance(src, Mem):  # there is one encoding, the order does not matter
            if isinstance(dst, Mem):
                raise TypeError("one operand must be a register or an immediate")
            self._sized(0x85, dst, src, size)
        elif isinstance(src, Reg):
            self._sized(0x85, src, dst, size)
        else:
            self._sized(0xF7, 0, dst, size, digit=True)
            self._imm(self._imm32(src, size), min(size, 32))

    def inc(self, dst: Rm, size: int = 64) -> None:
        self._sized(0xFF, 0, dst, size, digit=True)

    def dec(self, dst: Rm, size: int = 64) -> None:
        self._sized(0xFF, 1, dst, size, digit=True)

    def not_(self, dst: Rm, size: int = 64) -> None:
        self._sized(0xF7, 2, dst, size, digit=True)

    def neg(self, dst: Rm, size: int = 64) -> None:
        self._sized(0xF7, 3, dst, size, digit=True)

    def mul(self, src: Rm, size: int = 64) -> None:
        """RDX:RAX = RAX * src, unsigned."""
        self._sized(0xF7, 4, src, size, digit=True)

    def div(self, src: Rm, size: int = 64) -> None:
        """RAX, RDX = RDX:RAX divided by src, the rest; unsigned."""
        self._sized(0xF7, 6, src, size, digit=True)

    def imul(self, dst: int, src: Source, imm: int | None = None, size: int = 64) -> None:
        """``dst *= src``, or ``dst = src * imm``; ``imul(dst, number)`` multiplies dst by it."""
        if not isinstance(src, Reg | Mem):
            imm = src
            src = Reg(dst)
        if imm is None:
            self._op(b"\x0f\xaf", dst, src, size)
        else:
            value = self._imm32(imm, size)
            small = fits(value, 8)
            self._op(b"\x6b" if small else b"\x69", dst, src, size)
            self._imm(value, 8 if small else min(size, 32))

    def _shift(self, n: int, dst: Rm, count: int | Reg, size: int) -> None:
        if isinstance(count, Reg):
            if count != RCX:
                raise ValueError("a shift count is an immediate or cl")
            self._sized(0xD3, n, dst, size, digit=True)
        elif count == 1:
            self._sized(0xD1, n, dst, size, digit=True)
        else:
            self._sized(0xC1, n, dst, size, digit=True)
            self._imm(count, 8)

    def rol(self, dst: Rm, count: int | Reg, size: int = 64) -> None:
        """By an immediate, or by CL when ``count`` is RCX; so too the next four."""
        self._shift(0, dst, count, size)

    def ror(self, dst: Rm, count: int | Reg, size: int = 64) -> None:
        self._shift(1, dst, count, size)

    def shl(self, dst: Rm, count: int | Reg, size: int = 64) -> None:
        self._shift(4, dst, count, size)

    def shr(self, dst: Rm, count: int | Reg, size: int = 64) -> None:
        self._shift(5, dst, count, size)

    def sar(self, dst: Rm, count: int | Reg, size: int = 64) -> None:
        self._shift(7, dst, count, size)

    # BMI1 and BMI2 leave the flags alone (andn excepted)

    def shlx(self, dst: int, src: Rm, count: int, size: int = 64) -> None:
        self._vex(1, 2, 0xF7, dst, count, src, size)

    def sarx(self, dst: int, src: Rm, count: int, size: int = 64) -> None:
        self._vex(2, 2, 0xF7, dst, count, src, size)

    def shrx(self, dst: int, src: Rm, count: int, size: int = 64) -> None:
        self._vex(3, 2, 0xF7, dst, count, src, size)

    def rorx(self, dst: int, src: Rm, count: int, size: int = 64) -> None:
        self._vex(3, 3, 0xF0, dst, 0, src, size)
        self._imm(count, 8)

    def pdep(self, dst: int, src: int, mask: Rm, size: int = 64) -> None:
        self._vex(3, 2, 0xF5, dst, src, mask, size)

    def pext(self, dst: int, src: int, mask: Rm, size: int = 64) -> None:
        self._vex(2, 2, 0xF5, dst, src, mask, size)

    def andn(self, dst: int, inverted: int, src: Rm, size: int = 64) -> None:
        self._vex(0, 2, 0xF2, dst, inverted, src, size)

    # Bits

    def _bit(self, n: int, dst: Rm, bit: int | Reg, size: int) -> None:
        if isinstance(bit, Reg):
            self._op(bytes((0x0F, 0x83 | n << 3)), bit, dst, size)
        else:
            self._op(b"\x0f\xba", n, dst, size)
            self._imm(bit, 8)

    def bt(self, dst: Rm, bit: int | Reg, size: int = 64) -> None:
        """By register on memory, this reaches beyond the operand, as the CPU does."""
        self._bit(4, dst, bit, size)

    def bts(self, dst: Rm, bit: int | Reg, size: int = 64) -> None:
        self._bit(5, dst, bit, size)

    def btr(self, dst: Rm, bit: int | Reg, size: int = 64) -> None:
        self._bit(6, dst, bit, size)

    def btc(self, dst: Rm, bit: int | Reg, size: int = 64) -> None:
        self._bit(7, dst, bit, size)

    def bsf(self, dst: int, src: Rm, size: int = 64) -> None:
        self._op(b"\x0f\xbc", dst, src, size)

    def bsr(self, dst: int, src: Rm, size: int = 64) -> None:
        self._op(b"\x0f\xbd", dst, src, size)

    def tzcnt(self, dst: int, src: Rm, size: int = 64) -> None:
        self._op(b"\x0f\xbc", dst, src, size, prefix=b"\xf3")

    def popcnt(self, dst: int, src: Rm, size: int = 64) -> None:
        self._op(b"\x0f\xb8", dst, src, size, prefix=b"\xf3")

    # Control

    def jmp(self, target: Label | Rm, short: bool = False) -> None:
        if isinstance(target, Label):
            self._bytes.append(0xEB if short else 0xE9)
            self._relative(1 if short else 4, target)
        else:
            self._op(b"\xff", 4, target, 32)

    def call(self, target: Label | Rm) -> None:
        if isinstance(target, Label):
            self._bytes.append(0xE8)
            self._relative(4, target)
        else:
            self._op(b"\xff", 2, target, 32)

    def jcc(self, cond: Cond, target: Label, short: bool = False) -> None:
        self._bytes += bytes((0x70 | cond,)) if short else bytes((0x0F, 0x80 | cond))
        self._relative(1 if short else 4, target)

    def jrcxz(self, target: Label) -> None:
        """Reaches 127 bytes."""
        self._bytes.append(0xE3)
        self._relative(1, target)

    def jmp_abs(self, address: int) -> None:
        """To a fixed address within 2 GiB of where the code will stand."""
        self._bytes.append(0xE9)
        self._relative(4, address)

    def call_abs(self, address: int) -> None:
        self._bytes.append(0xE8)
        self._relative(4, address)

    def jcc_abs(self, cond: Cond, address: int) -> None:
        self._bytes += bytes((0x0F, 0x80 | cond))
        self._relative(4, address)

    def ret(self, pop: int = 0) -> None:
        """Return, and drop ``pop`` bytes of arguments."""
        if pop:
            self._bytes += b"\xc2" + pop.to_bytes(2, "little")
        else:
            self._bytes.append(0xC3)

    def int3(self) -> None:
        self.raw(b"\xcc")

    def ud2(self) -> None:
        self.raw(b"\x0f\x0b")

    def syscall(self) -> None:
        self.raw(b"\x0f\x05")

    def nop(self, n: int = 1) -> None:
        """``n`` bytes of it, in as few instructions as can be."""
        while n > 0:
            self.raw(_NOPS[min(n, 9)])
            n -= 9

    # Flags, strings, order

    def pushfq(self) -> None:
        self.raw(b"\x9c")

    def popfq(self) -> None:
        self.raw(b"\x9d")

    def lahf(self) -> None:
        self.raw(b"\x9f")

    def sahf(self) -> None:
        self.raw(b"\x9e")

    def cld(self) -> None:
        self.raw(b"\xfc")

    def std(self) -> None:
        self.raw(b"\xfd")

    def lock(self) -> None:
        """A prefix to the next instruction."""
        self.raw(b"\xf0")

    def _string(self, opcode: int, size: int) -> None:
        prefix = {8: b"", 16: b"\x66", 32: b"", 64: b"\x48"}[size]
        self.raw(b"\xf3" + prefix if size == 64 else prefix + b"\xf3")
        self.raw(bytes((opcode - (size == 8),)))

    def rep_movs(self, size: int) -> None:
        self._string(0xA5, size)

    def rep_stos(self, size: int) -> None:
        self._string(0xAB, size)

    def mfence(self) -> None:
        self.raw(b"\x0f\xae\xf0")

    def lfence(self) -> None:
        self.raw(b"\x0f\xae\xe8")

    def rdtsc(self) -> None:
        self.raw(b"\x0f\x31")

    # FPU state, segment bases

    def fxsave64(self, dst: Mem) -> None:
        self._op(b"\x0f\xae", 0, dst)

    def fxrstor64(self, src: Mem) -> None:
        self._op(b"\x0f\xae", 1, src)

    def xsave64(self, dst: Mem) -> None:
        self._op(b"\x0f\xae", 4, dst)

    def xrstor64(self, src: Mem) -> None:
        self._op(b"\x0f\xae", 5, src)

    def ldmxcsr(self, src: Mem) -> None:
        self._op(b"\x0f\xae", 2, src, 32)

    def stmxcsr(self, dst: Mem) -> None:
        self._op(b"\x0f\xae", 3, dst, 32)

    def fninit(self) -> None:
        self.raw(b"\xdb\xe3")

    def vzeroupper(self) -> None:
        self.raw(b"\xc5\xf8\x77")

    def rdgsbase(self, dst: int) -> None:
        self._op(b"\x0f\xae", 1, dst, prefix=b"\xf3")

    def wrgsbase(self, src: int) -> None:
        self._op(b"\x0f\xae", 3, src, prefix=b"\xf3")
