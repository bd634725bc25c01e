"""Lowering: one guest instruction to the host code that does the same, as a template that can stand anywhere.

A template holds no address: guest addresses are made from ``st.page``, stubs are reached through GS, and what depends
on where in its page the instruction stands is a *hole* of 32 bits. So templates are made once for (bytes, mode, whether
flags must survive the checks) and then copied.

Each access to guest memory is a *check*: r10 has the address, and behind the check the operand's host address. The way
out when the TLB does not match stands behind the block (blocks.py), pushes the access descriptor and calls the stub
``slow``:

======  ====================================================
bits    access descriptor
======  ====================================================
0-11    the instruction's offset in its page (added by blocks.py)
12-21   operand size in bytes
22-23   0 read, 1 write, 2 read and write
24-25   TLB array: supervisor, user, supervisor with AC
26-27   which access of the instruction this is
28      it belongs to a REP string instruction
29      an operand that is not aligned is #GP, before any page fault
======  ====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from iced_x86 import (
    Code,
    Decoder,
    Encoder,
    EncodingKind,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    Register_,
    RegisterExt,
    RflagsBits,
)

from skep.engine.translate import allowed
from skep.engine.translate.asm import R8, R9, R10, R11, RAX, RBP, RBX, RCX, RDI, RDX, RSI, Assembler, Cond, Mem, Reg, gs
from skep.engine.translate.layout import (
    BOUNCE,
    BOUNCE_SIZE,
    BRK_STI,
    JC,
    JC_ARRAY,
    OFFSETS,
    TLB,
    TLB_ARRAY,
    TLB_ENTRIES,
    TLB_ENTRY,
    TLB_HOST,
    TLB_READ,
    TLB_WRITE,
    Mode,
)
from skep.engine.translate.stubs import field as state
from skep.engine.translate.stubs import jump_set, restore_flags, save_flags

ALL_FLAGS: int = RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF
READ, WRITE, READ_WRITE = 0, 1, 2
HOLE_IP, HOLE_NEXT, HOLE_TARGET = 0, 1, 2
"""What a hole is filled with: the instruction's offset in its page, the next one's, its RIP-relative operand's."""
TAG32 = 1 << 62
"""In jump-cache tags of 32-bit code."""


class Ends:
    """How an instruction ends its block."""

    NO = 0
    YES = 1  # the template leaves by itself
    JCC = 2
    JMP = 3
    CALL = 4  # the template pushes the return address; the block goes on at the target
    LOOP = 5  # LOOP, LOOPcc, JCXZ: short forms only, that touch no flag
    SHADOW = 6  # STI: one more instruction, then look for interrupts
    MODE = 7  # STAC, CLAC: goes on in another mode
    LOOK = 8  # POPF: goes on behind itself after looking for interrupts


@dataclass(slots=True)
class Template:
    code: bytes
    checks: tuple[tuple[int, int, int, bool], ...] = ()
    """(offset of the ja's displacement, offset to come back to, descriptor, flags are saved at the ja)"""
    holes: tuple[tuple[int, int, int], ...] = ()
    """(offset, what to put there, what to add to it)"""
    copies: tuple[tuple[int, int, int], ...] = ()
    """(offset, offset in the guest's instruction, bytes): displacement and immediate where the form leaves them open"""
    open: bool = False
    """There is anything of the three above."""


@dataclass(frozen=True, slots=True)
class Open:
    """Where in its bytes an instruction has constants that its form leaves open; 0 bytes: none."""

    disp: int = 0
    disp_size: int = 0
    imm: int = 0
    imm_size: int = 0


@dataclass(slots=True)
class Form:
    """What is known of an instruction's bytes in one mode. Instructions that differ only in open constants share it."""

    keeps: int = ALL_FLAGS  # mask of flags that it certainly leaves as they were
    reads: int = 0
    ends: int = Ends.NO
    cond: int = 0
    relative: bool = False  # has a RIP-relative operand, blanked in the key
    emulate: bool = False
    memory: bool = False  # may have checks
    plain: bool = False  # its displacement, relative to RIP, is its end: there is no immediate
    open: Open = Open()
    templates: list[Template | None] = field(default_factory=lambda: [None, None])


class Legality:
    """Bits of the legality class (Mode.CLASS_SHIFT): which CR0, CR4 and XCR0 settings code was translated for."""

    X87 = 1  # CR0.EM and CR0.TS clear
    SSE = 2  # and CR4.OSFXSR set
    AVX = 4  # and CR4.OSXSAVE set with SSE and AVX in XCR0
    TSC = 8  # CR4.TSD clear: RDTSC is the user's too
    OSXSAVE = 16


_NAMES = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{i}" for i in range(8, 16)))
_FULL = {getattr(Register, n): i for i, n in enumerate(_NAMES)}
_HIGH = {Register.AH: Register.AL, Register.CH: Register.CL, Register.DH: Register.DL, Register.BH: Register.BL}
_GENERAL: dict[int, tuple[int, int]] = {}  # register: (number, size)
_BY_SIZE: dict[tuple[int, int], Register_] = {}  # (number, size): register
for _r in cast("set[Register_]", {v for v in vars(Register).values() if isinstance(v, int)}):
    if RegisterExt.is_gpr(_r):
        _GENERAL[_r] = (_FULL[RegisterExt.full_register(_r)], RegisterExt.size(_r))
        if _r not in _HIGH:
            _BY_SIZE[_GENERAL[_r]] = _r
_IN_STATE = (9, 10, 11)
"""Guest registers without a host register; guest rsp (4) is in host r9."""
_HOST_RSP = 9


def home(number: int) -> int | None:
    """The host register of a guest register, None for those in the state block."""
    if number == 4:
        return _HOST_RSP
    return None if number in _IN_STATE else number


def mnemonics(names: frozenset[str]) -> frozenset[int]:
    return frozenset(getattr(Mnemonic, n) for n in names)


_INTEGER, _X87, _SSE, _AVX = map(mnemonics, (allowed.INTEGER, allowed.X87, allowed.SSE, allowed.AVX))
_X87_WAITING = _X87 - mnemonics(frozenset(n for n in allowed.X87 if n.startswith("FN")))
_NOTHING = mnemonics(allowed.NO_OPERATION)
_SYSTEM_REGISTERS = frozenset(
    v
    for n, v in vars(Register).items()
    if isinstance(v, int)
    and (n in ("ES", "CS", "SS", "DS", "FS", "GS") or (n[:2] in ("CR", "DR", "TR") and n[2:].isdigit()))
)
_SREG_FIELD = {getattr(Register, n.upper()): f"{n}_sel" for n in ("es", "cs", "ss", "ds", "fs", "gs")}
_BIT_TESTS = (Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC)
_BY_CL = (
    Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SAR, Mnemonic.SAL, Mnemonic.ROL, Mnemonic.ROR, Mnemonic.RCL, Mnemonic.RCR,
    Mnemonic.SHLD, Mnemonic.SHRD,
)  # fmt: skip
_MOFFS = {
    Code.MOV_AL_MOFFS8: Code.MOV_R8_RM8, Code.MOV_AX_MOFFS16: Code.MOV_R16_RM16,
    Code.MOV_EAX_MOFFS32: Code.MOV_R32_RM32, Code.MOV_RAX_MOFFS64: Code.MOV_R64_RM64,
    Code.MOV_MOFFS8_AL: Code.MOV_RM8_R8, Code.MOV_MOFFS16_AX: Code.MOV_RM16_R16,
    Code.MOV_MOFFS32_EAX: Code.MOV_RM32_R32, Code.MOV_MOFFS64_RAX: Code.MOV_RM64_R64,
}  # fmt: skip
_SHORT_INC = {
    Code.INC_R16: Code.INC_RM16, Code.INC_R32: Code.INC_RM32, Code.DEC_R16: Code.DEC_RM16, Code.DEC_R32: Code.DEC_RM32,
}  # fmt: skip
_STRINGS = {
    getattr(Mnemonic, op + suffix): (op, shift)
    for op in ("STOS", "MOVS", "LODS", "CMPS", "SCAS")
    for shift, suffix in enumerate("BWDQ")
}  # fmt: skip
_XSAVE = {Mnemonic.XSAVE, Mnemonic.XSAVE64, Mnemonic.XSAVEOPT, Mnemonic.XSAVEOPT64, Mnemonic.XSAVEC, Mnemonic.XSAVEC64}
_XRSTOR = {Mnemonic.XRSTOR, Mnemonic.XRSTOR64}
_FXSAVE = {Mnemonic.FXSAVE, Mnemonic.FXSAVE64}
_FXRSTOR = {Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64}
_WRITES = (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
_PLAIN_WRITE = (OpAccess.WRITE,)
_LOOP16 = frozenset(
    v
    for n, v in vars(Code).items()
    if n.startswith(("LOOP", "JCXZ")) and n.endswith(("_CX", "JCXZ_REL8_32")) and isinstance(v, int)
)
"""Those of 32-bit code that count in CX."""
_UNALIGNED = frozenset(
    getattr(Mnemonic, n)
    for n in """MOVUPS MOVUPD MOVDQU LDDQU PCMPESTRI PCMPESTRM PCMPISTRI PCMPISTRM PCMPESTRI64 PCMPESTRM64""".split()
)
_VEX_ALIGNED = frozenset(
    getattr(Mnemonic, n) for n in "VMOVAPS VMOVAPD VMOVDQA VMOVNTPS VMOVNTPD VMOVNTDQ VMOVNTDQA".split()
)
_FLUSHES = (Mnemonic.CLFLUSH, Mnemonic.CLFLUSHOPT, Mnemonic.CLWB)
_SHIFTS = frozenset(_BY_CL)
"""Their count decides which flags they change."""
_BORROWED = (RBX, RBP, RSI, RDI, R8, Reg(12), Reg(13), Reg(14), Reg(15), RDX, RCX, RAX)

_GENERAL_SPECIAL = frozenset(
    getattr(Mnemonic, n) for n in "PUSH POP CALL JMP RET LEAVE PUSHFQ POPFQ STI CLI SWAPGS STAC CLAC INVLPG".split()
) | frozenset(_STRINGS) - {Mnemonic.MOVSD, Mnemonic.CMPSD}
"""Besides the integer instructions: those whose lowering no CR0, CR4 or XCR0 setting changes."""

TLB_MASK = (TLB_ENTRIES - 1) * TLB_ENTRY


def _waits(ins: Instruction) -> bool:
    """Whether it raises #MF for an x87 exception that is pending: x87 and MMX instructions."""
    return ins.mnemonic in _X87_WAITING or any(
        ins.op_kind(i) == OpKind.REGISTER and RegisterExt.is_mm(ins.op_register(i)) for i in range(ins.op_count)
    )


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def u32(value: int) -> bytes:
    return (value & 0xFFFFFFFF).to_bytes(4, "little")


class Unsupported(Exception):
    """This form is not lowered: it becomes Python's."""


class Lowering:
    """Makes the forms and templates of one mode."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.array = mode & 3
        self.user = bool(mode & Mode.USER)
        self.wide = not mode & (Mode.CODE32 | Mode.CODE16)
        self.legality = mode >> Mode.CLASS_SHIFT
        self._info = InstructionInfoFactory()
        self._encoder = Encoder(64)
        self._handlers: dict[int, Callable[[Instruction], None]] = self._special()
        self.bounce: dict[int, int] | None = None
        self._checks: dict[tuple[int, bool, bool], tuple[bytes, int]] = {}
        special = set(self._handlers) - {Mnemonic.MOV, Mnemonic.LEA}
        self._closed = frozenset(special)
        """Mnemonics whose constants templates do not leave open."""
        self.emulated = Form(keeps=0, reads=ALL_FLAGS, ends=Ends.YES, emulate=True)
        self.dispatch_code = self._fragment(self.dispatch)
        self.done_code = self._fragment(lambda: self.a.jmp(state("done_exit")))
        self.holes: list[tuple[int, int, int]] = []
        self.a = Assembler()
        self.emulate()
        self.emulated_template = Template(self.a.code(0), (), tuple(self.holes), (), True)

    def _fragment(self, build: Callable[[], None]) -> bytes:
        self.a = Assembler()
        build()
        return self.a.code(0)

    # What an instruction is

    def form(self, ins: Instruction, relative: bool) -> Form:
        """Classify an instruction; templates are made later, when it is known whether flags must survive."""
        flow = ins.flow_control
        m = ins.mnemonic
        if self._is_python(ins):
            return self.emulated
        form = Form(relative=relative)
        form.memory = self._memory_operand(ins) or ins.is_stack_instruction or ins.is_string_instruction
        modified: int = ins.rflags_modified
        if ins.is_string_instruction or (m in _BY_CL and ins.op_kind(ins.op_count - 1) == OpKind.REGISTER):
            modified = 0  # a count of zero leaves every flag
        form.keeps = ALL_FLAGS & ~modified
        form.reads = ins.rflags_read & ALL_FLAGS
        if m == Mnemonic.PUSHFQ or m == Mnemonic.PUSHFD:
            form.reads = ALL_FLAGS
        if flow == FlowControl.CONDITIONAL_BRANCH:
            if ins.is_jcx_short or ins.is_loop or ins.is_loopcc:
                form.ends = Ends.LOOP
            else:
                form.ends = Ends.JCC
                form.cond = ins.condition_code - 1
        elif flow == FlowControl.UNCONDITIONAL_BRANCH:
            form.ends = Ends.JMP
        elif flow == FlowControl.CALL and m == Mnemonic.CALL:
            form.ends = Ends.CALL
        elif flow != FlowControl.NEXT:
            form.ends = Ends.YES
            form.keeps = ALL_FLAGS
        elif m == Mnemonic.STI:
            form.ends = Ends.SHADOW
        elif m == Mnemonic.POPFQ:
            form.ends = Ends.LOOK
            form.keeps = form.reads = 0
        elif m in (Mnemonic.IN, Mnemonic.OUT):
            form.ends = Ends.YES
            form.keeps = ALL_FLAGS
        elif m in (Mnemonic.STAC, Mnemonic.CLAC):
            form.ends = Ends.MODE
            form.keeps, form.reads = ALL_FLAGS, 0
        elif m == Mnemonic.MOV and ins.op0_kind == OpKind.REGISTER and ins.op0_register == Register.CR3:
            form.ends = Ends.YES
        return form

    def _is_python(self, ins: Instruction) -> bool:
        """Whether the emulator has this instruction, in this mode."""
        if ins.is_invalid or ins.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
            return True
        m = ins.mnemonic
        flow = ins.flow_control
        if m in self._handlers:
            return not self._allowed_special(ins)
        if m in _NOTHING:
            return False
        if flow in (FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH, FlowControl.CALL):
            return self._branch_is_python(ins)
        if flow != FlowControl.NEXT:
            return True
        if not (
            m in _INTEGER
            or (m in _X87 and self.legality & Legality.X87)
            or (m in _SSE and self.legality & Legality.SSE)
            or (m in _AVX and self.legality & Legality.AVX)
        ):
            return True
        if ins.is_string_instruction:
            return True
        for i in range(ins.op_count):
            kind = ins.op_kind(i)
            if kind == OpKind.REGISTER and ins.op_register(i) in _SYSTEM_REGISTERS:
                return True
        if ins.has_lock_prefix and ins.op0_kind != OpKind.MEMORY:
            return True
        return self._memory_operand(ins) and self._size(ins) == 0

    def _branch_is_python(self, ins: Instruction) -> bool:
        if self.wide:
            return not (
                ins.is_jcc_short_or_near
                or ins.is_jmp_short_or_near
                or ins.is_call_near
                or ins.is_jcx_short
                or ins.is_loop
                or ins.is_loopcc
            ) or ins.op0_kind not in (OpKind.NEAR_BRANCH64,)
        return ins.op0_kind != OpKind.NEAR_BRANCH32 or ins.code in _LOOP16

    def _allowed_special(self, ins: Instruction) -> bool:
        """For a mnemonic with a handler: whether this form, in this mode, is the handler's."""
        m = ins.mnemonic
        code = ins.code
        if m == Mnemonic.MOV:
            if code in _MOFFS:
                return True
            for i in range(ins.op_count):
                if ins.op_kind(i) == OpKind.REGISTER and ins.op_register(i) in _SYSTEM_REGISTERS:
                    if ins.op_register(i) in _SREG_FIELD:
                        return i == 1
                    if self.user or not self.wide:
                        return False
                    if i == 0:
                        return bool(ins.op_register(0) == Register.CR3)
                    return ins.op_register(1) in (Register.CR0, Register.CR2, Register.CR3, Register.CR4)
            return True
        if m in (Mnemonic.PUSH, Mnemonic.POP):
            if m == Mnemonic.POP and ins.op0_kind == OpKind.MEMORY:
                return False
            if ins.op0_kind == OpKind.REGISTER and ins.op0_register in _SREG_FIELD:
                return False
            return bool(ins.stack_pointer_increment in ((-8, 8) if self.wide else (-4, 4)))
        if m in (Mnemonic.CALL, Mnemonic.JMP, Mnemonic.RET):
            flow = ins.flow_control
            if m == Mnemonic.RET:
                return code in ((Code.RETNQ, Code.RETNQ_IMM16) if self.wide else (Code.RETND, Code.RETND_IMM16))
            if flow in (FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL):
                return code in ((Code.JMP_RM64, Code.CALL_RM64) if self.wide else (Code.JMP_RM32, Code.CALL_RM32))
            return not self._branch_is_python(ins)
        if m in (Mnemonic.IN, Mnemonic.OUT):
            return not self.user
        if m == Mnemonic.POPFQ:
            return not self.user and self.wide
        if m in (Mnemonic.STI, Mnemonic.CLI, Mnemonic.SWAPGS, Mnemonic.STAC, Mnemonic.CLAC, Mnemonic.INVLPG):
            return not self.user and (self.wide or m in (Mnemonic.STI, Mnemonic.CLI))
        if m == Mnemonic.IRETQ:
            return not self.user and self.wide
        if m in (Mnemonic.SYSCALL, Mnemonic.SYSRETQ):
            return self.wide and self.user == (m == Mnemonic.SYSCALL) and ins.len == (2 if self.user else 3)
        if m in (Mnemonic.RDTSC, Mnemonic.RDTSCP):
            return not self.user or bool(self.legality & Legality.TSC)
        if m in (Mnemonic.RDFSBASE, Mnemonic.RDGSBASE, Mnemonic.WRFSBASE, Mnemonic.WRGSBASE):
            return self.wide
        if m in _STRINGS:
            if not ins.is_string_instruction:
                return self._sse_movsd(ins)
            if not self.wide or self._address_size(ins) != 8:
                return False
            op, _ = _STRINGS[m]
            if op in ("CMPS", "SCAS"):
                return True
            return not (ins.has_rep_prefix or ins.has_repne_prefix) or (op != "LODS" and not ins.has_repne_prefix)
        if m in _XSAVE or m in _XRSTOR:
            return bool(self.legality & Legality.OSXSAVE and self.legality & Legality.X87)
        if m in _FXSAVE or m in _FXRSTOR:
            return bool(self.legality & Legality.SSE)
        if m in (Mnemonic.LEAVE, Mnemonic.PUSHFQ):
            return self.wide and code in (Code.LEAVEQ, Code.PUSHFQ)
        if m in _BIT_TESTS:
            return not ins.has_lock_prefix or ins.op0_kind == OpKind.MEMORY
        if m in (Mnemonic.FNSTENV, Mnemonic.FNSAVE):
            return bool(self.legality & Legality.X87)
        return True

    def _sse_movsd(self, ins: Instruction) -> bool:
        return bool(self.legality & Legality.SSE)

    @staticmethod
    def _address_size(ins: Instruction) -> int:
        for i in range(ins.op_count):
            k = ins.op_kind(i)
            if k in (OpKind.MEMORY_ESRDI, OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_SEG_RDI):
                return 8
        return 4

    @staticmethod
    def _memory_operand(ins: Instruction) -> bool:
        return any(ins.op_kind(i) == OpKind.MEMORY for i in range(ins.op_count))

    @staticmethod
    def _size(ins: Instruction) -> int:
        return MemorySizeExt.size(ins.memory_size)

    @staticmethod
    def is_general(ins: Instruction) -> bool:
        """Whether the form is the same in every legality class."""
        m = ins.mnemonic
        return m in _INTEGER or m in _GENERAL_SPECIAL

    # Templates

    def opens(self, ins: Instruction, decoder: Decoder) -> Open:
        """Which constants of an instruction templates can take from its bytes each time."""
        if ins.mnemonic in self._closed or ins.is_invalid:
            return Open()
        where = decoder.get_constant_offsets(ins)
        disp, disp_size = where.displacement_offset, where.displacement_size
        if disp_size not in (1, 4, 8) or ins.is_ip_rel_memory_operand:
            disp = disp_size = 0
        imm, imm_size = where.immediate_offset, where.immediate_size
        if where.has_immediate2 or ins.mnemonic in _SHIFTS:
            imm = imm_size = 0
        return Open(disp, disp_size, imm, imm_size)

    def template(
        self, ins: Instruction, data: bytes, live: bool, bounce: dict[int, int] | None = None, open_: Open = Open()
    ) -> Template:
        """Lower one instruction. ``live``: flags must survive its checks. ``bounce``: {access number: address mod 64}
        of the operands that lie in bounce buffers; such a template is run alone. ``open_``: constants that the template
        leaves open."""
        self.open = open_
        self.copies: list[tuple[int, int, int]] = []
        self.a = Assembler()
        self.checks: list[tuple[int, int, int, bool]] = []
        self.holes = []
        self.live = live
        self.count = 0
        self.bounce = bounce
        self.data = data
        if self._is_python(ins):
            self.emulate()
        else:
            m = ins.mnemonic
            handler = self._handlers.get(m)
            if handler is not None:
                handler(ins)
            elif m in _NOTHING:
                pass
            else:
                self.generic(ins, data)
        open_parts = bool(self.checks or self.holes or self.copies)
        return Template(
            self.a.code(0), tuple(self.checks), tuple(self.holes), tuple(self.copies), open_parts
        )

    def emulate(self) -> None:
        """Leave: Python has this one."""
        self.page_plus(R10, HOLE_IP)
        self.a.jmp(state("emu_exit"))

    def page_plus(self, reg: int, what: int) -> None:
        """``reg`` = the page's address + a hole."""
        self.a.mov(reg, state("page"))
        self.a.raw(bytes((0x4D if reg > 7 else 0x48, 0x8D, 0x80 | (reg & 7) << 3 | (reg & 7))))
        self.holes.append((len(self.a), what, 0))
        self.a.raw(bytes(4))

    def hole_push(self) -> None:
        """Push the instruction's offset in its page."""
        self.a.raw(b"\x68")
        self.holes.append((len(self.a), HOLE_IP, 0))
        self.a.raw(bytes(4))

    def dispatch(self) -> None:
        """Go to the guest address in r10, through the jump cache (runtime.jump_set is the same function)."""
        a = self.a
        if self.bounce is not None:
            a.jmp(state("done_exit"))
            return
        if not self.wide:
            a.mov(R11, TAG32)
            a.lea(R10, Mem(R10, R11))
        jump_set(a)
        a.jmp(Mem(R11, disp=JC + self.array * JC_ARRAY + 8, gs=True))

    def _aligned(self, ins: Instruction) -> bool:
        """Whether the instruction checks its operand's alignment, which comes before page faults."""
        m = ins.mnemonic
        if ins.encoding == EncodingKind.VEX:
            return m in _VEX_ALIGNED
        return (m in _SSE and self._size(ins) == 16 and m not in _UNALIGNED) or m == Mnemonic.CMPXCHG16B

    def check(self, size: int, access: int, aligned: bool = False) -> None:
        """r10: guest address to host address of ``size`` bytes that may be read or written."""
        a = self.a
        number = self.count
        self.count += 1
        if self.bounce is not None and number in self.bounce:
            a.mov(R10, state("self_"))
            a.lea(R10, Mem(R10, disp=BOUNCE + number * BOUNCE_SIZE + self.bounce[number]))
            return
        key = (size, bool(access), self.live)
        known = self._checks.get(key)
        if known is None:
            known = self._checks[key] = self._check_code(*key)
        start = len(a)
        a.raw(known[0])
        descriptor = aligned << 29 | number << 26 | self.array << 24 | access << 22 | size << 12
        self.checks.append((start + known[1], len(a), descriptor, self.live))

    def _check_code(self, size: int, write: bool, live: bool) -> tuple[bytes, int]:
        """The check, and where the displacement of its way out stands."""
        a = Assembler()
        base = TLB + self.array * TLB_ARRAY
        if live:
            save_flags(a)
        a.mov(R11, R10, size=32)
        a.shr(R11, 7, size=32)
        a.and_(R11, TLB_MASK, size=32)
        a.xor(R10, Mem(R11, disp=base + (TLB_WRITE if write else TLB_READ), gs=True))
        a.cmp(R10, 4096 - size)
        a.raw(b"\x0f\x87")
        jump = len(a)
        a.raw(bytes(4))
        a.add(R10, Mem(R11, disp=base + TLB_HOST, gs=True))
        if live:
            restore_flags(a)
        return a.code(0), jump

    def load(self, reg: int, number: int) -> None:
        """``reg`` = a guest register."""
        h = home(number)
        if h is None:
            self.a.mov(reg, gs(number * 8))
        else:
            self.a.mov(reg, Reg(h))

    def address(self, ins: Instruction) -> None:
        """r10 = the linear address of the memory operand. No flag changes."""
        a = self.a
        base, index = ins.memory_base, ins.memory_index
        disp = ins.memory_displacement
        narrow = not self.wide
        if base in (Register.RIP, Register.EIP):
            self.page_plus(R10, HOLE_TARGET)
            narrow = base == Register.EIP
        elif base == Register.NONE and index == Register.NONE:
            size = self.open.disp_size
            if size:
                a.raw(b"\x49\xba" if size == 8 else b"\x49\xc7\xc2")  # mov r10, imm64 or imm32
                self.copies.append((len(a), self.open.disp, size))
                a.raw(bytes(size))
            else:
                a.mov(R10, disp)
        else:
            if RegisterExt.is_vector_register(index):
                raise Unsupported
            size = RegisterExt.size(base if base != Register.NONE else index)
            narrow = size == 4
            hb: int | None = None
            hi: int | None = None
            if base != Register.NONE:
                n = _GENERAL[base][0]
                hb = home(n)
                if hb is None:
                    a.mov(R10, gs(n * 8))
                    hb = R10
            if index != Register.NONE:
                n = _GENERAL[index][0]
                hi = home(n)
                if hi is None:
                    a.mov(R11, gs(n * 8))
                    hi = R11
            d = _signed(disp & 0xFFFFFFFF, 32)
            n = self.open.disp_size
            if n:
                a.lea(R10, Mem(hb, hi, ins.memory_index_scale, 0x11 if n == 1 and hb is not None else 0x11111111))
                self.copies.append((len(a) - n, self.open.disp, n))
            elif hi is None and d == 0 and hb is not None:
                if hb != R10:
                    a.mov(R10, Reg(hb))
            else:
                a.lea(R10, Mem(hb, hi, ins.memory_index_scale, d))
            if size == 2:
                a.movzx(R10, R10, 16)
        if narrow:
            a.mov(R10, R10, size=32)
        self.segment(ins)

    def segment(self, ins: Instruction) -> None:
        """Add the segment's base to r10. In 64-bit code only FS and GS have one; flat 32-bit code has no others."""
        seg = ins.memory_segment
        if seg in (Register.FS, Register.GS):
            self.a.mov(R11, state("fs_base" if seg == Register.FS else "gs_base"))
            self.a.lea(R10, Mem(R10, R11))
            if not self.wide:
                self.a.mov(R10, R10, size=32)

    def generic(self, ins: Instruction, data: bytes) -> None:
        """An instruction of the allow-list: the same on the host, with its operands where they are here."""
        memory = self._memory_operand(ins)
        registers = [
            (i, ins.op_register(i))
            for i in range(ins.op_count)
            if ins.op_kind(i) == OpKind.REGISTER and ins.op_register(i) in _GENERAL
        ]
        moved = [(i, r) for i, r in registers if home(_GENERAL[r][0]) != _GENERAL[r][0]]
        if not memory and not moved and self.wide:
            if self.open.imm_size:
                self.copies.append((len(self.a) + self.open.imm, self.open.imm, self.open.imm_size))
            self.a.raw(data)
            return
        info = self._info.info(ins)
        if memory:
            if _waits(ins):
                self.a.raw(b"\x9b")  # an exception that waits comes before what the operand raises
            self.address(ins)
            self.check(self._size(ins), self._access(info), self._aligned(ins))
        self.reencode(ins, registers, memory)

    def _access(self, info: object) -> int:
        access = READ
        for used in info.used_memory():  # type: ignore[attr-defined]
            if used.access in _PLAIN_WRITE and access == READ:
                access = WRITE
            elif used.access in _WRITES:
                access = READ_WRITE
        return access

    def reencode(self, ins: Instruction, registers: list[tuple[int, Register_]], memory: bool) -> None:
        """Emit ``ins`` with [r10] for its memory operand and host registers for the guest's."""
        a = self.a
        info = self._info.info(ins)
        y = ins.copy()
        if memory:
            y.memory_base = Register.R10
            y.memory_index = Register.NONE
            y.memory_index_scale = 1
            y.memory_displacement = 0
            y.memory_displ_size = 0
            y.segment_prefix = Register.NONE
        if ins.code in _MOFFS:
            y.code = _MOFFS[ins.code]
        elif ins.code in _SHORT_INC:
            y.code = _SHORT_INC[ins.code]
        temporaries = [11] if memory else [10, 11]
        borrowed: list[tuple[int, str]] = []
        place: dict[int, int] = {}
        store: list[tuple[int, int]] = []
        exchange: int | None = None
        rex = memory or any(home(_GENERAL[r][0]) != _GENERAL[r][0] for _, r in registers)
        used = {RegisterExt.full_register(u.register) for u in info.used_registers()}
        for i, r in registers:
            number, size = _GENERAL[r]
            access = info.op_access(i)
            if r in _HIGH:
                if not rex:
                    continue
                if access == OpAccess.READ:  # AH..DH cannot be named beside a REX prefix
                    t = temporaries.pop(0)
                    a.rorx(t, Reg(number), 8, size=32)
                    y.set_op_register(i, _BY_SIZE[t, 1])
                else:
                    exchange = number
                    y.set_op_register(i, _HIGH[r])
                continue
            h = home(number)
            if h is not None:
                y.set_op_register(i, _BY_SIZE[h, size])
                continue
            if number not in place:
                if temporaries:
                    t = temporaries.pop(0)
                else:
                    t = next(b for b in _BORROWED if _FULL_BY_NUMBER[b] not in used and b not in place.values())
                    spill = f"t{len(borrowed)}"
                    a.mov(state(spill), Reg(t))
                    borrowed.append((t, spill))
                place[number] = t
                a.mov(t, gs(number * 8))
            y.set_op_register(i, _BY_SIZE[place[number], size])
            if access in _WRITES and (place[number], number) not in store:
                store.append((place[number], number))
        if exchange is not None:
            a.raw(bytes((0x86, 0xE0 | exchange | exchange << 3)))  # xchg of the register's two low bytes
        self._encoder.encode(y, 0)
        a.raw(self._encoder.take_buffer())
        if self.open.imm_size:  # an immediate is an instruction's end
            self.copies.append((len(a) - self.open.imm_size, self.open.imm, self.open.imm_size))
        if exchange is not None:
            a.raw(bytes((0x86, 0xE0 | exchange | exchange << 3)))
        for t, number in store:
            a.mov(gs(number * 8), Reg(t))
        for t, spill in borrowed:
            a.mov(Reg(t), state(spill))

    # The special cases

    def _special(self) -> dict[int, Callable[[Instruction], None]]:
        m = Mnemonic
        table: dict[int, Callable[[Instruction], None]] = {
            m.MOV: self._mov, m.LEA: self._lea, m.PUSH: self._push, m.POP: self._pop, m.LEAVE: self._leave,
            m.CALL: self._call, m.JMP: self._jmp, m.RET: self._ret,
            m.PUSHFQ: self._pushfq, m.POPFQ: self._popfq, m.STI: self._sti, m.CLI: self._cli,
            m.STAC: self._stac, m.CLAC: self._stac, m.SWAPGS: self._swapgs, m.INVLPG: self._invlpg,
            m.IRETQ: self._leave_by, m.SYSRETQ: self._leave_by, m.SYSCALL: self._leave_by,
            m.RDTSC: self._rdtsc, m.RDTSCP: self._rdtsc, m.IN: self._port, m.OUT: self._port,
            m.RDFSBASE: self._segment_base, m.RDGSBASE: self._segment_base,
            m.WRFSBASE: self._segment_base, m.WRGSBASE: self._segment_base,
            m.FNSTENV: self._x87_environment, m.FNSAVE: self._x87_environment,
        }  # fmt: skip
        for k in _BIT_TESTS:
            table[k] = self._bit_test
        for k in _FLUSHES:
            table[k] = self._flush
        for k in _STRINGS:
            table[k] = self._string
        for k in _XSAVE | _XRSTOR:
            table[k] = self._xsave
        for k in _FXSAVE | _FXRSTOR:
            table[k] = self._fxsave
        return table

    def _plain(self, ins: Instruction) -> None:
        self.generic(ins, self.data)

    def _mov(self, ins: Instruction) -> None:
        for i in range(ins.op_count):
            if ins.op_kind(i) == OpKind.REGISTER and ins.op_register(i) in _SYSTEM_REGISTERS:
                self._mov_system(ins)
                return
        self._plain(ins)

    def _mov_system(self, ins: Instruction) -> None:
        a = self.a
        source = ins.op1_register
        if source in _SREG_FIELD:
            name = _SREG_FIELD[source]
            if ins.op0_kind == OpKind.MEMORY:
                self.address(ins)
                self.check(2, WRITE)
                a.mov(R11, state(name))
                a.mov(Mem(R10), R11, size=16)
                return
            number, size = _GENERAL[ins.op0_register]
            h = home(number)
            if h is None:
                h = R10
                if size == 2:
                    a.mov(R10, gs(number * 8))
            a.mov(h, state(name), size=16 if size == 2 else 64)
            if home(number) is None:
                a.mov(gs(number * 8), Reg(h))
            return
        if ins.op0_register == Register.CR3:
            self.load(R10, _GENERAL[source][0])
            self.hole_push()
            a.call(state("cr3_load"))
            self.page_plus(R10, HOLE_NEXT)
            self.dispatch()
            return
        name = {Register.CR0: "cr0", Register.CR2: "cr2", Register.CR3: "cr3", Register.CR4: "cr4"}[source]
        number = _GENERAL[ins.op0_register][0]
        h = home(number)
        a.mov(R10 if h is None else h, state(name))
        if h is None:
            a.mov(gs(number * 8), R10)

    def _lea(self, ins: Instruction) -> None:
        a = self.a
        number, size = _GENERAL[ins.op0_register]
        parts = [_GENERAL[r][0] for r in (ins.memory_base, ins.memory_index) if r in _GENERAL]
        relative = ins.memory_base in (Register.RIP, Register.EIP)
        if self.wide and home(number) == number and all(home(n) == n for n in parts) and not relative:
            if self.open.disp_size:
                self.copies.append((len(a) + self.open.disp, self.open.disp, self.open.disp_size))
            a.raw(self.data)
            return
        bare = ins.copy()
        bare.segment_prefix = Register.DS if not self.wide else Register.NONE
        self.address(bare)
        h = home(number)
        if h is None:
            if size == 2:
                a.mov(R11, gs(number * 8))
                a.mov(R11, R10, size=16)
                a.mov(gs(number * 8), R11)
            else:
                if size == 4:
                    a.mov(R10, R10, size=32)
                a.mov(gs(number * 8), R10)
        else:
            a.mov(h, R10, size=size * 8)

    @property
    def _word(self) -> int:
        """Bytes of a stack slot."""
        return 8 if self.wide else 4

    def _stack_at(self, reg: int, disp: int) -> None:
        self.a.lea(reg, Mem(R9, disp=disp), size=64 if self.wide else 32)

    def _push(self, ins: Instruction) -> None:
        a = self.a
        w = self._word
        kind = ins.op0_kind
        if kind == OpKind.MEMORY:
            self.address(ins)
            self.check(w, READ)
            a.mov(R10, Mem(R10), size=w * 8)
            a.mov(state("t0"), R10)
        self._stack_at(R10, -w)
        self.check(w, WRITE)
        if kind == OpKind.MEMORY:
            a.mov(R11, state("t0"))
            a.mov(Mem(R10), R11, size=w * 8)
        elif kind == OpKind.REGISTER:
            number = _GENERAL[ins.op0_register][0]
            h = home(number)
            if h is None:
                a.mov(R11, gs(number * 8))
                h = R11
            a.mov(Mem(R10), Reg(h), size=w * 8)
        else:
            a.mov(Mem(R10), _signed(ins.immediate(0) & 0xFFFFFFFF, 32), size=w * 8)
        self._stack_at(R9, -w)

    def _pop(self, ins: Instruction) -> None:
        a = self.a
        w = self._word
        a.mov(R10, R9)
        self.check(w, READ)
        number = _GENERAL[ins.op0_register][0]
        h = home(number)
        if h is None:
            a.mov(R11, Mem(R10), size=w * 8)
            a.mov(gs(number * 8), R11)
        elif number == 4:
            a.mov(R9, Mem(R10), size=w * 8)
            return
        else:
            a.mov(h, Mem(R10), size=w * 8)
        self._stack_at(R9, w)

    def push_next(self) -> None:
        """Push the address of the next instruction; r10 and r11 are free."""
        a = self.a
        w = self._word
        self._stack_at(R10, -w)
        self.check(w, WRITE)
        self.page_plus(R11, HOLE_NEXT)
        a.mov(Mem(R10), R11, size=w * 8)
        self._stack_at(R9, -w)

    def _indirect_target(self, ins: Instruction) -> None:
        """r10 = where an indirect branch goes."""
        a = self.a
        if ins.op0_kind == OpKind.MEMORY:
            self.address(ins)
            self.check(self._word, READ)
            a.mov(R10, Mem(R10), size=self._word * 8)
        else:
            self.load(R10, _GENERAL[ins.op0_register][0])
            if not self.wide:
                a.mov(R10, R10, size=32)

    def _call(self, ins: Instruction) -> None:
        if ins.flow_control == FlowControl.CALL:
            self.push_next()
            if self.bounce is not None:
                self.page_plus(R10, HOLE_TARGET)
                self.dispatch()
            return
        self._indirect_target(ins)
        self.a.mov(state("t0"), R10)
        self.push_next()
        self.a.mov(R10, state("t0"))
        self.dispatch()

    def _jmp(self, ins: Instruction) -> None:
        if ins.flow_control == FlowControl.INDIRECT_BRANCH:
            self._indirect_target(ins)
            self.dispatch()

    def _ret(self, ins: Instruction) -> None:
        a = self.a
        w = self._word
        a.mov(R10, R9)
        self.check(w, READ)
        a.mov(R10, Mem(R10), size=w * 8)
        self._stack_at(R9, w + (ins.immediate(0) if ins.op_count else 0))
        self.dispatch()

    def _leave(self, ins: Instruction) -> None:
        a = self.a
        a.mov(R10, RBP)
        self.check(8, READ)
        a.lea(R9, Mem(RBP, disp=8))
        a.mov(RBP, Mem(R10))

    def _pushfq(self, ins: Instruction) -> None:
        a = self.a
        self._stack_at(R10, -8)
        self.check(8, WRITE)
        a.pushfq()
        a.pop(R11)
        if self.live:
            save_flags(a)
        a.and_(R11, 0xCD5, size=32)
        a.or_(R11, state("iflag"))
        a.or_(R11, state("sysfl"))
        a.or_(R11, 2, size=32)
        a.and_(R11, ~0x30000 & 0xFFFFFFFF, size=32)  # RF and VM are pushed as zero
        if self.live:
            restore_flags(a)
        a.mov(Mem(R10), R11)
        self._stack_at(R9, -8)

    def _popfq(self, ins: Instruction) -> None:
        """POPFQ at CPL 0. Where it changes more than the arithmetic flags, DF and IF, Python does it."""
        a = self.a
        same = a.label()
        a.mov(R10, R9)
        self.check(8, READ)
        a.mov(R11, Mem(R10))
        a.mov(R10, R11)
        a.xor(R10, state("sysfl"))
        a.test(R10, 0x3E7100, size=32)
        a.jcc(Cond.E, same)
        self.emulate()
        a.bind(same)
        a.lea(R9, Mem(R9, disp=8))
        a.mov(R10, R11, size=32)
        a.and_(R10, 0x200, size=32)
        a.mov(state("iflag"), R10)
        a.shr(R10, 9, size=32)
        a.and_(R10, state("irq"), size=32)
        a.mov(gs(BRK_STI), R10, size=8)
        a.and_(R11, 0xCD5, size=32)
        a.push(R11)
        a.popfq()

    def _port(self, ins: Instruction) -> None:
        """Leave with the port access: bytes, 0x10 for OUT, 0x20 for an immediate port, which stands at bit 16."""
        out = ins.mnemonic == Mnemonic.OUT
        value, port = (1, 0) if out else (0, 1)
        info = _GENERAL[ins.op_register(value)][1] | (0x10 if out else 0)
        if ins.op_kind(port) != OpKind.REGISTER:
            info |= 0x20 | ins.immediate(port) << 16
        self.a.mov(state("info"), info)
        self.page_plus(R10, HOLE_NEXT)
        self.a.jmp(state("port_exit"))

    def _sti(self, ins: Instruction) -> None:
        a = self.a
        a.mov(state("iflag"), 0x200)
        a.mov(R11, state("irq"))
        a.mov(gs(BRK_STI), R11, size=8)

    def _cli(self, ins: Instruction) -> None:
        self.a.mov(state("iflag"), 0)

    def _swapgs(self, ins: Instruction) -> None:
        a = self.a
        a.mov(R10, state("gs_base"))
        a.mov(R11, state("kernel_gs_base"))
        a.mov(state("gs_base"), R11)
        a.mov(state("kernel_gs_base"), R10)

    def _stac(self, ins: Instruction) -> None:
        a = self.a
        ac = gs(OFFSETS["sysfl"] + 2)
        if self.live:
            save_flags(a)
        if ins.mnemonic == Mnemonic.STAC:
            a.or_(ac, 4, size=8)
            a.or_(state("mode"), Mode.AC, size=8)
        else:
            a.and_(ac, 0xFB - 0x100, size=8)
            a.and_(state("mode"), ~Mode.AC, size=8)
        if self.live:
            restore_flags(a)

    def _flush(self, ins: Instruction) -> None:
        """CLFLUSH and its like: nothing to be done, but the address must be one that can be read."""
        self.address(ins)
        self.check(1, READ)

    def _invlpg(self, ins: Instruction) -> None:
        self.address(ins)
        self.hole_push()
        self.a.call(state("invlpg"))

    def _leave_by(self, ins: Instruction) -> None:
        """IRETQ, SYSRETQ, SYSCALL: a routine each."""
        m = ins.mnemonic
        self.page_plus(R10, HOLE_IP)
        self.a.jmp(state({Mnemonic.IRETQ: "iret", Mnemonic.SYSRETQ: "sysret", Mnemonic.SYSCALL: "syscall"}[m]))

    def _rdtsc(self, ins: Instruction) -> None:
        a = self.a
        if ins.mnemonic == Mnemonic.RDTSCP:
            a.raw(b"\x0f\xae\xe8")  # lfence: RDTSCP waits for earlier instructions
        a.rdtsc()
        a.rorx(RDX, RDX, 32)
        a.lea(RAX, Mem(RAX, RDX))
        a.mov(R11, state("tsc_offset"))
        a.lea(RAX, Mem(RAX, R11))
        a.rorx(RDX, RAX, 32)
        a.mov(RDX, RDX, size=32)
        a.mov(RAX, RAX, size=32)
        if ins.mnemonic == Mnemonic.RDTSCP:
            a.mov(RCX, state("tsc_aux"), size=32)

    def _segment_base(self, ins: Instruction) -> None:
        a = self.a
        m = ins.mnemonic
        base = state("fs_base" if m in (Mnemonic.RDFSBASE, Mnemonic.WRFSBASE) else "gs_base")
        number, size = _GENERAL[ins.op0_register]
        h = home(number)
        offered = a.label()
        if self.live:
            a.pushfq()
        a.test(state("cr4"), 1 << 16, size=32)  # CR4.FSGSBASE
        a.jcc(Cond.NE, offered)
        if self.live:
            a.popfq()
        self.emulate()  # #UD
        a.bind(offered)
        if self.live:
            a.popfq()
        if m in (Mnemonic.RDFSBASE, Mnemonic.RDGSBASE):
            a.mov(R10 if h is None else h, base, size=size * 8)
            if h is None:
                a.mov(gs(number * 8), R10)
            return
        self.load(R10, number)
        if size == 4:
            a.mov(R10, R10, size=32)
        else:
            good = a.label()
            if self.live:
                a.pushfq()
            a.mov(R11, R10)
            a.shl(R11, 16)
            a.sar(R11, 16)
            a.cmp(R11, R10)
            a.jcc(Cond.E, good)
            if self.live:
                a.popfq()
            self.emulate()  # not canonical: #GP
            a.bind(good)
            if self.live:
                a.popfq()
        a.mov(base, R10)

    def _bit_test(self, ins: Instruction) -> None:
        if ins.op0_kind != OpKind.MEMORY or ins.op1_kind != OpKind.REGISTER:
            self._plain(ins)
            return
        # A register's bit offset reaches outside the operand: move the address to the word that holds the bit.
        a = self.a
        number, size = _GENERAL[ins.op1_register]
        shift = {2: 4, 4: 5, 8: 6}[size]
        self.address(ins)
        self.load(R11, number)
        if size == 4:
            a.movsxd(R11, R11)
        elif size == 2:
            a.movsx(R11, R11, 16)
        a.push(RCX)
        a.mov(RCX, shift)
        a.sarx(R11, R11, RCX)
        a.pop(RCX)
        a.lea(R10, Mem(R10, R11, size))
        part = ins.memory_base if ins.memory_base != Register.NONE else ins.memory_index
        if not self.wide or RegisterExt.size(part) == 4:
            a.mov(R10, R10, size=32)
        self.check(size, READ if ins.mnemonic == Mnemonic.BT else READ_WRITE)
        self.load(R11, number)
        a.push(RCX)
        a.mov(RCX, 64 - shift)
        a.shlx(R11, R11, RCX)
        a.shrx(R11, R11, RCX)
        a.pop(RCX)
        y = ins.copy()
        y.memory_base = Register.R10
        y.memory_index = Register.NONE
        y.memory_index_scale = 1
        y.memory_displacement = 0
        y.memory_displ_size = 0
        y.segment_prefix = Register.NONE
        y.op1_register = _BY_SIZE[11, size]
        self._encoder.encode(y, 0)
        a.raw(self._encoder.take_buffer())

    def _string(self, ins: Instruction) -> None:
        if not ins.is_string_instruction:
            self._plain(ins)  # MOVSD, CMPSD of SSE2
            return
        a = self.a
        op, shift = _STRINGS[ins.mnemonic]
        source = ins.memory_segment if op != "STOS" else Register.NONE
        base = {Register.FS: "fs_base", Register.GS: "gs_base"}.get(source)
        repeated = ins.has_rep_prefix or ins.has_repne_prefix
        if repeated or op in ("CMPS", "SCAS"):
            if op in ("MOVS", "CMPS"):
                if base:
                    a.mov(R11, state(base))
                    a.mov(state("t7"), R11)
                else:
                    a.mov(state("t7"), 0)
            a.raw(b"\x68")
            how = (op == "SCAS") << 14 | ins.has_repne_prefix << 15 | (not repeated) << 16
            self.holes.append((len(a), HOLE_IP, self.array << 24 | how | shift << 12))
            a.raw(bytes(4))
            a.call(state({"STOS": "rep_stos", "MOVS": "rep_movs"}.get(op, "rep_cmps")))
            return
        size = 1 << shift
        opcode = (b"\x66" if size == 2 else b"\x48" if size == 8 else b"") + bytes(
            ({"MOVS": 0xA4, "STOS": 0xAA, "LODS": 0xAC}[op] + (size > 1),)
        )
        if op != "STOS":
            a.mov(R10, RSI)
            if base:
                a.mov(R11, state(base))
                a.lea(R10, Mem(R10, R11))
            self.check(size, READ)
            if op == "MOVS":
                a.mov(state("t0"), R10)
        if op != "LODS":
            a.mov(R10, RDI)
            self.check(size, WRITE)
        # Let the host's instruction move the pointers, for DF, and take over by how far.
        if op == "MOVS":
            a.mov(R11, state("t0"))
            a.mov(state("t1"), RSI)
            a.mov(state("t2"), RDI)
            a.mov(RSI, R11)
            a.mov(RDI, R10)
            a.raw(opcode)
            a.not_(R10)
            a.lea(R10, Mem(RDI, R10, disp=1))
            a.mov(RSI, state("t1"))
            a.mov(RDI, state("t2"))
            a.lea(RSI, Mem(RSI, R10))
            a.lea(RDI, Mem(RDI, R10))
        else:
            reg = RDI if op == "STOS" else RSI
            a.mov(R11, reg)
            a.mov(reg, R10)
            a.raw(opcode)
            a.not_(R10)
            a.lea(reg, Mem(reg, R10, disp=1))
            a.lea(reg, Mem(reg, R11))

    def _xsave(self, ins: Instruction) -> None:
        """XSAVE and XRSTOR on the guest's own memory, with the components cut to the guest's XCR0. FIP and FDP, which
        would show host addresses, are saved as zero, as CPUs do that keep them only with a pending exception."""
        a = self.a
        saving = ins.mnemonic in _XSAVE
        self.address(ins)
        self.check(832 if self.legality & Legality.AVX else 576, READ_WRITE if saving else READ)
        skip = a.label()
        a.mov(state("t0"), RAX)  # should it fault, vcpu.py takes these three back from here
        a.mov(state("t1"), RDX)
        a.pushfq()
        a.pop(state("t2"))
        a.and_(RAX, state("xcr0"), size=32)
        a.xor(RDX, RDX, size=32)
        self._at_r10(ins)
        if saving:
            a.test(RAX, 1, size=32)
            a.jcc(Cond.E, skip)
            a.mov(Mem(R10, disp=8), 0)
            a.mov(Mem(R10, disp=16), 0)
            a.bind(skip)
        a.push(state("t2"))
        a.popfq()
        a.mov(RAX, state("t0"))
        a.mov(RDX, state("t1"))

    def _at_r10(self, ins: Instruction) -> None:
        y = ins.copy()
        y.memory_base = Register.R10
        y.memory_index = Register.NONE
        y.memory_index_scale = 1
        y.memory_displacement = 0
        y.memory_displ_size = 0
        y.segment_prefix = Register.NONE
        self._encoder.encode(y, 0)
        self.a.raw(self._encoder.take_buffer())

    def _fxsave(self, ins: Instruction) -> None:
        a = self.a
        saving = ins.mnemonic in _FXSAVE
        self.address(ins)
        self.check(512, READ_WRITE if saving else READ)
        self._at_r10(ins)
        if saving:
            a.mov(Mem(R10, disp=8), 0)
            a.mov(Mem(R10, disp=16), 0)

    def _x87_environment(self, ins: Instruction) -> None:
        """FNSTENV, FNSAVE: in their 32-bit layout the instruction and data pointers stand at 12 and 20."""
        size = self._size(ins)
        self.address(ins)
        self.check(size, WRITE)
        self._at_r10(ins)
        if size in (28, 108):
            self.a.mov(Mem(R10, disp=12), 0, size=32)
            self.a.mov(Mem(R10, disp=20), 0, size=32)


_FULL_BY_NUMBER = {i: r for r, i in _FULL.items()}
