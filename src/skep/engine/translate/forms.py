"""What is known of instructions: how they end a block, what they do to flags, where registers are, which case they are.

:class:`Form` and :class:`Template` are what lower.py makes; writing_runtime.py puts them together. The tables below
name the instructions that are not simply copied. Numbers of general registers are those that encode them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from iced_x86 import (
    Code,
    Instruction,
    Mnemonic,
    OpAccess,
    OpCodeOperandKind,
    OpKind,
    Register,
    Register_,
    RegisterExt,
    RflagsBits,
)

from skep.engine.translate import allowed
from skep.engine.translate.asm import R8, RAX, RBP, RBX, RCX, RDI, RDX, RSI, Reg
from skep.engine.translate.layout import (
    TLB_ENTRIES,
    TLB_ENTRY,
)

ALL_FLAGS: int = RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF
READ, WRITE, READ_WRITE = 0, 1, 2
HOLE_IP, HOLE_NEXT, HOLE_TARGET, HOLE_PLACE = 0, 1, 2, 3
"""What a hole is filled with: the instruction's offset in its page, the next one's, its RIP-relative operand's;
where the operand lies in the range that was checked."""


class Ends:
    """How an instruction ends its block."""

    NO: Final = 0
    YES: Final = 1  # the template leaves by itself
    CALL: Final = 2  # the template pushes the return address; the block goes on at the target
    SHADOW: Final = 3  # STI: one more instruction, then look for interrupts
    MODE: Final = 4  # STAC, CLAC: goes on in the mode with AC, which `cond` is, or without
    LOOK: Final = 5  # POPF: goes on behind itself after looking for interrupts
    # There is no template for these:
    JCC: Final = 6
    JMP: Final = 7
    LOOP: Final = 8  # LOOP, LOOPcc, JCXZ: short forms only, that touch no flag


@dataclass(slots=True)
class Template:
    code: bytes
    checks: tuple[tuple[int, int, int, int], ...] = ()
    """(offset of the ja's displacement, offset to come back to, descriptor, 1: flags are saved at the ja, 2: it is the
    stack's, 4: and its page becomes the stack's)"""
    holes: tuple[tuple[int, int, int], ...] = ()
    """(offset, what to put there, what to add to it)"""
    copies: tuple[tuple[int, int, int], ...] = ()
    """(offset, offset in the guest's instruction, bytes): displacement and immediate where the form leaves them open"""
    open: bool = False
    """There is anything of the three above."""
    keeps: bool = False
    """r10 is behind it what it was before."""


class Open(NamedTuple):
    """Where in its bytes an instruction has constants that its form leaves open; 0 bytes: none."""

    disp: int = 0
    disp_size: int = 0
    imm: int = 0
    imm_size: int = 0


NOTHING_OPEN = Open()
FIXED = 1 << 16
"""In Form.uses: registers must be where they always are, because the host may fault in it or others look at them."""


@dataclass(slots=True)
class Form:
    """What is known of an instruction's bytes in one mode. Instructions that differ only in open constants share it."""

    keeps: int = ALL_FLAGS  # mask of flags that it certainly leaves as they were
    reads: int = 0
    ends: int = Ends.NO
    cond: int = 0
    relative: bool = False  # has a RIP-relative operand, blanked in the key
    behind: int = 0  # bytes behind the displacement of that
    emulate: bool = False
    memory: bool = False  # may have checks
    narrow: bool = False  # a branch whose target has 16 bits
    loop: bytes = b""  # LOOP, JCXZ in 16- and 32-bit code: counts, and ends in the displacement of the jump if taken
    wrap: int = 0
    """Not 0: it branches, or addresses something, relative to RIP; from here on a target relative to the page is a
    negative number"""
    open: Open = NOTHING_OPEN
    reach: tuple[int, int, int, bool, int, int] | None = None
    """An operand that may share its check: base register, constant besides an open displacement, size, is it written,
    where the open displacement stands in the instruction, and in how many bytes"""
    step: tuple[int, int, int, int, int, int] | None = None
    """A register becomes another plus a constant: (register, other, constant, sign of an open constant, where that
    stands, bytes)"""
    spoils: tuple[int, ...] = ()
    """General registers that become something else."""
    table: tuple[int, int, int, int, int, int, int] | None = None
    """An operand that is read at a register plus another, scaled: base, index, scale, size, constant besides an open
    displacement, where that stands in the instruction, and in how many bytes"""
    byte: int | None = None
    """A register that becomes a byte, zero-extended."""
    uses: int = 0
    """General registers that it touches in any way, as bits; and FIXED"""


Item = tuple[Form, int, int, int]
"""An instruction: form, offset in its page, length, and where it goes or what it addresses relative to the page."""


class Legality:
    """Bits of the legality class (Mode.CLASS_SHIFT): which CR0, CR4 and XCR0 settings code was translated for."""

    X87: Final = 1  # CR0.EM and CR0.TS clear
    SSE: Final = 2  # and CR4.OSFXSR set
    AVX: Final = 4  # CR0.TS clear, CR4.OSXSAVE set with SSE and AVX in XCR0
    TSC: Final = 8  # CR4.TSD clear: RDTSC is the user's too
    OSXSAVE: Final = 16
    INNER: Final = 32  # CPL 1 or 2: the supervisor's pages, but not its instructions
    WATCHED: Final = 64  # breakpoints are armed for data: each access has to make its check
    ALIGNED: Final = 128  # CPL 3 with RFLAGS.AC and CR0.AM: a misaligned operand is #AC


_NAMES = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{i}" for i in range(8, 16)))
FULL_REGISTERS = {getattr(Register, n): i for i, n in enumerate(_NAMES)}
HIGH_BYTES = {Register.AH: Register.AL, Register.CH: Register.CL, Register.DH: Register.DL, Register.BH: Register.BL}
GPR: dict[int, tuple[int, int]] = {}  # register: (number, size)
GPR_BY_SIZE: dict[tuple[int, int], Register_] = {}  # (number, size): register
for _r in cast("set[Register_]", {v for v in vars(Register).values() if isinstance(v, int)}):
    if RegisterExt.is_gpr(_r):
        GPR[_r] = (FULL_REGISTERS[RegisterExt.full_register(_r)], RegisterExt.size(_r))
        if _r not in HIGH_BYTES:
            GPR_BY_SIZE[GPR[_r]] = _r
IN_STATE = (9, 10, 11)
"""Guest registers without a host register; guest rsp (4) is in host r9."""
HOST_RSP = 9


HOMES = tuple(HOST_RSP if n == 4 else None if n in IN_STATE else n for n in range(16))
"""The host registers of guest registers, None for those in the state block."""


def mnemonics(names: frozenset[str]) -> frozenset[int]:
    return frozenset(getattr(Mnemonic, n) for n in names)


INTEGER, X87, SSE, AVX = map(mnemonics, (allowed.INTEGER, allowed.X87, allowed.SSE, allowed.AVX))
X87_WAITING = X87 - mnemonics(frozenset(n for n in allowed.X87 if n.startswith("FN")))
NO_OPERATION = mnemonics(allowed.NO_OPERATION)
SYSTEM_REGISTERS = frozenset(
    v
    for n, v in vars(Register).items()
    if isinstance(v, int)
    and (n in ("ES", "CS", "SS", "DS", "FS", "GS") or (n[:2] in ("CR", "DR", "TR") and n[2:].isdigit()))
)
SREG_FIELD = {getattr(Register, n.upper()): f"{n}_sel" for n in ("es", "cs", "ss", "ds", "fs", "gs")}
BIT_TESTS = (Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC)
BY_CL = (
    Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SAR, Mnemonic.SAL, Mnemonic.ROL, Mnemonic.ROR, Mnemonic.RCL, Mnemonic.RCR,
    Mnemonic.SHLD, Mnemonic.SHRD,
)  # fmt: skip
MOFFS = {
    Code.MOV_AL_MOFFS8: Code.MOV_R8_RM8, Code.MOV_AX_MOFFS16: Code.MOV_R16_RM16,
    Code.MOV_EAX_MOFFS32: Code.MOV_R32_RM32, Code.MOV_RAX_MOFFS64: Code.MOV_R64_RM64,
    Code.MOV_MOFFS8_AL: Code.MOV_RM8_R8, Code.MOV_MOFFS16_AX: Code.MOV_RM16_R16,
    Code.MOV_MOFFS32_EAX: Code.MOV_RM32_R32, Code.MOV_MOFFS64_RAX: Code.MOV_RM64_R64,
}  # fmt: skip
NARROW_CODES = {
    Code.INC_R16: Code.INC_RM16, Code.INC_R32: Code.INC_RM32, Code.DEC_R16: Code.DEC_RM16, Code.DEC_R32: Code.DEC_RM32,
    **{
        getattr(Code, f"{op}_RM8_IMM8_82"): getattr(Code, f"{op}_RM8_IMM8")
        for op in ("ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP")
    },
}  # fmt: skip
"""Encodings that 64-bit code does not have, and those that do the same."""
OR_MEMORY = frozenset(getattr(OpCodeOperandKind, f"R{n}_OR_MEM") for n in (8, 16, 32, 64))
ONLY_IN_REGISTERS = frozenset(
    getattr(Mnemonic, n) for n in "XCHG XADD CMPXCHG CMPXCHG8B CMPXCHG16B BT BTS BTR BTC".split()
)
"""With memory instead of a register operand these do something else, or the same as locked instructions."""
REVERSED = {
    getattr(Code, f"{op}_RM{n}_R{n}"): getattr(Code, f"{op}_R{n}_RM{n}")
    for op in ("MOV", "ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP")
    for n in (8, 16, 32, 64)
}
"""Encodings whose second operand is no memory, and those of the same instruction where it may be."""
STRINGS = {
    getattr(Mnemonic, op + suffix): (op, shift)
    for op in ("STOS", "MOVS", "LODS", "CMPS", "SCAS")
    for shift, suffix in enumerate("BWDQ")
}  # fmt: skip
XSAVE = {Mnemonic.XSAVE, Mnemonic.XSAVE64, Mnemonic.XSAVEOPT, Mnemonic.XSAVEOPT64, Mnemonic.XSAVEC, Mnemonic.XSAVEC64}
XRSTOR = {Mnemonic.XRSTOR, Mnemonic.XRSTOR64}
FXSAVE = {Mnemonic.FXSAVE, Mnemonic.FXSAVE64}
FXRSTOR = {Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64}
WRITES = (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
PLAIN_WRITE = (OpAccess.WRITE,)
UNALIGNED = frozenset(
    getattr(Mnemonic, n)
    for n in """MOVUPS MOVUPD MOVDQU LDDQU PCMPESTRI PCMPESTRM PCMPISTRI PCMPISTRM PCMPESTRI64 PCMPESTRM64""".split()
)
VEX_ALIGNED = frozenset(
    getattr(Mnemonic, n) for n in "VMOVAPS VMOVAPD VMOVDQA VMOVNTPS VMOVNTPD VMOVNTDQ VMOVNTDQA".split()
)
ANYWHERE = (Mnemonic.VCVTPH2PS, Mnemonic.VCVTPS2PH)
"""Their operands are never #AC (SDM 2, exceptions of type 11)."""
FLUSHES = (Mnemonic.CLFLUSH, Mnemonic.CLFLUSHOPT, Mnemonic.CLWB)
SHIFTS = frozenset(BY_CL)
"""Their count decides which flags they change."""
BORROWED = (RBX, RBP, RSI, RDI, R8, Reg(12), Reg(13), Reg(14), Reg(15), RDX, RCX, RAX)

GENERAL_SPECIAL = frozenset(
    getattr(Mnemonic, n)
    for n in (
        "PUSH POP CALL JMP RET LEAVE PUSHF PUSHFD PUSHFQ POPF POPFD POPFQ STI CLI PAUSE SWAPGS STAC CLAC INVLPG "
        "INVPCID HLT".split()
    )
) | frozenset(STRINGS) - {Mnemonic.MOVSD, Mnemonic.CMPSD}
"""Besides the integer instructions: those whose lowering no CR0, CR4 or XCR0 setting changes."""

TLB_MASK = (TLB_ENTRIES - 1) * TLB_ENTRY


_NEAR = {OpKind.NEAR_BRANCH16: 1 << 15, OpKind.NEAR_BRANCH32: 1 << 31, OpKind.NEAR_BRANCH64: 1 << 63}


def near_branch(ins: Instruction) -> int:
    """Of a near branch, from where on its target relative to the page is a negative number; else 0."""
    return _NEAR.get(ins.op0_kind, 0) if ins.op_count else 0


def waits(ins: Instruction) -> bool:
    """Whether it raises #MF for an x87 exception that is pending: x87 and MMX instructions."""
    return ins.mnemonic in X87_WAITING or any(
        ins.op_kind(i) == OpKind.REGISTER and RegisterExt.is_mm(ins.op_register(i)) for i in range(ins.op_count)
    )


def sign_extend(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


REGISTERS_64 = {i: r for r, i in FULL_REGISTERS.items()}
