"""Lowering of 16- and 32-bit code: real mode, protected mode, virtual-8086 and compatibility mode.

Where CS, DS, ES and SS are flat, addresses are what the instruction says, cut to 32 bits. In *segmented* modes each
access is an offset first, is compared with the bounds that ``segments.window`` keeps in the state block, and gets the
segment's base; what lies outside leaves with Kind.SEGMENT, nothing committed. FS, GS and CS as data are taken so in
every mode.

EIP is an offset in CS, and so are ``st.rip`` and ``st.page`` (the page's start less the base, modulo 2**32, which
wraps where the base is inside the page). Jump-cache tags hold linear addresses. Translated code only ever runs in
pages that lie inside CS's limit as a whole (``st.code_end``): straight-line code needs no check of it, a branch has one
before it commits anything, and what fails that is done again by Python, with all the manuals' checks.
"""

from __future__ import annotations

from typing import ClassVar

from iced_x86 import Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register

from skep.engine.amd64.registers import Vector
from skep.engine.translate.asm import R9, R10, R11, RBP, RCX, Assembler, Cond, Mem
from skep.engine.translate.forms import (
    GPR,
    HOLE_IP,
    HOLE_TARGET,
    NOTHING_OPEN,
    READ,
    SREG_FIELD,
    STRINGS,
    WRITE,
    Ends,
    Form,
    Open,
)
from skep.engine.translate.layout import SEGMENTS, Mode
from skep.engine.translate.lower import POP_FLAGS, PUSH_FLAGS, Lowering
from skep.engine.translate.narrow_runtime import REPEATED, SEGMENT_SHIFT, SIXTEEN, UNTIL_EQUAL
from skep.engine.translate.stubs import field as state
from skep.engine.translate.stubs import restore_flags, save_flags

_COUNTS_CX = frozenset(
    v
    for n, v in vars(Code).items()
    if isinstance(v, int) and ((n.startswith("LOOP") and n.endswith("_CX")) or n.startswith("JCXZ"))
)
_LOOPNE, _LOOPE, _LOOP, _JCXZ = range(0xE0, 0xE4)
_LOOPS = {
    Mnemonic.LOOPNE: _LOOPNE, Mnemonic.LOOPE: _LOOPE, Mnemonic.LOOP: _LOOP, Mnemonic.JCXZ: _JCXZ, Mnemonic.JECXZ: _JCXZ,
}  # fmt: skip
_OPERATIONS = ("MOVS", "STOS", "CMPS", "SCAS", "LODS")
_ADDRESS16 = (OpKind.MEMORY_ESDI, OpKind.MEMORY_SEG_SI)
_PARAGRAPHS = (Register.DS, Register.ES, Register.FS, Register.GS)
"""Loaded in place in real mode. SS holds off interrupts besides, so it is Python's."""


class Narrow(Lowering):
    """Makes the forms and templates of one mode of 16- or 32-bit code."""

    near_kinds: ClassVar[tuple[int, ...]] = (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32)

    def __init__(self, mode: int) -> None:
        self.segmented = bool(mode & Mode.SEGMENTED)
        self.stack16 = bool(mode & Mode.STACK16)
        self.real = bool(mode & Mode.REAL)
        self.tag = (mode & Mode.TAGGED) << Mode.TAG_SHIFT
        self._at: str | None = None
        super().__init__(mode)

    # Classification

    def form(self, ins: Instruction, relative: bool, open_: Open = NOTHING_OPEN) -> Form:
        form = super().form(ins, relative, open_)
        form.narrow = form is not self.emulated and ins.op_count > 0 and ins.op0_kind == OpKind.NEAR_BRANCH16
        if form.ends == Ends.LOOP:
            form.loop = self._loop(ins)
        return form

    def _is_python(self, ins: Instruction) -> bool:
        if self.real and ins.encoding == EncodingKind.VEX:  # #UD (SDM 2, 2.8)
            return True
        return super()._is_python(ins)

    def _allowed_special(self, ins: Instruction) -> bool:
        m = ins.mnemonic
        if m == Mnemonic.MOV and ins.op0_kind == OpKind.REGISTER and ins.op0_register in SREG_FIELD:
            return self.real and ins.op0_register in _PARAGRAPHS
        if m in (Mnemonic.PUSH, Mnemonic.POP) and ins.op0_kind == OpKind.REGISTER and ins.op0_register in SREG_FIELD:
            return m == Mnemonic.PUSH or (self.real and ins.op0_register in _PARAGRAPHS)
        if m in STRINGS and ins.is_string_instruction:
            return not self.aligns
        if m == Mnemonic.LEAVE:
            return True
        if m in PUSH_FLAGS:
            return not (self.real and self.user)  # virtual-8086 mode looks at IOPL
        if m in POP_FLAGS:
            return self.kernel
        return super()._allowed_special(ins)

    def generic(self, ins: Instruction, data: bytes) -> None:
        if ins.mnemonic in (Mnemonic.VZEROUPPER, Mnemonic.VZEROALL):  # of the eight registers that such code has
            for n in range(8):
                if ins.mnemonic == Mnemonic.VZEROALL:
                    self.a.raw(bytes((0xC5, 0x81 | (n ^ 15) << 3, 0xEF, 0xC0 | n << 3 | n)))  # vpxor xmm, xmm, xmm
                else:
                    self.a.raw(bytes((0xC5, 0xF8, 0x28, 0xC0 | n << 3 | n)))  # vmovaps xmm, xmm
        else:
            super().generic(ins, data)

    # Addresses

    def segment(self, ins: Instruction) -> None:
        """r10 is an offset so far; ``check`` makes the address of it."""
        register = ins.memory_segment
        if self.segmented or register in (Register.CS, Register.FS, Register.GS):
            self._at = SREG_FIELD[register][:2]

    def check(self, size: int, access: int, aligned: bool = False, anywhere: bool = False) -> None:
        name, self._at = self._at, None
        if name is not None and not (self.bounce is not None and self.count in self.bounce):
            self._within(name, size, bool(access))
        super().check(size, access, aligned, anywhere)

    def _within(self, name: str, size: int, write: bool) -> None:
        """r10: offset in a segment, if all of the operand is in it, to linear address."""
        a = self.a
        inside, outside = a.label(), a.label()
        if self.live:
            save_flags(a)
        a.lea(R11, Mem(R10, disp=size))
        a.cmp(R11, state(f"{name}_wend" if write else f"{name}_rend"))
        a.jcc(Cond.A, outside)
        a.cmp(R10, state(f"{name}_start"))
        a.jcc(Cond.AE, inside)
        a.bind(outside)
        if self.live:
            restore_flags(a)
        a.mov(state("info"), Vector.SS if name == "ss" else Vector.GP)
        self.page_plus(R10, HOLE_IP)
        a.jmp(state("segment_exit"))
        a.bind(inside)
        if self.live:
            restore_flags(a)
        a.mov(R11, state(f"{name}_base"))
        a.lea(R10, Mem(R10, R11), size=32)

    def stack_at(self, disp: int) -> None:
        a = self.a
        a.lea(R10, Mem(R9, disp=disp), size=32)
        if self.stack16:
            a.movzx(R10, R10, 16)
        if self.segmented:
            self._at = "ss"

    def stack_move(self, disp: int) -> None:
        self.a.lea(R9, Mem(R9, disp=disp), size=16 if self.stack16 else 32)

    def _leave(self, ins: Instruction) -> None:
        a = self.a
        w = 2 if ins.code == Code.LEAVEW else 4
        a.mov(R10, RBP, size=32)
        if self.stack16:
            a.movzx(R10, R10, 16)
        if self.segmented:
            self._at = "ss"
        self.check(w, READ)
        a.lea(R9, Mem(RBP, disp=w), size=16 if self.stack16 else 32)
        a.mov(RBP, Mem(R10), size=w * 8)

    def _string(self, ins: Instruction) -> None:
        """A routine does them all, repeated or not (narrow_runtime.py)."""
        if not ins.is_string_instruction:
            super()._string(ins)  # MOVSD, CMPSD of SSE2
            return
        name, shift = STRINGS[ins.mnemonic]
        what = _OPERATIONS.index(name) << 14 | shift << 12 | self.array << 24
        if ins.has_rep_prefix or ins.has_repne_prefix:
            what |= REPEATED | (UNTIL_EQUAL if ins.has_repne_prefix else 0)
        if any(ins.op_kind(i) in _ADDRESS16 for i in range(ins.op_count)):
            what |= SIXTEEN
        if name in ("MOVS", "CMPS", "LODS"):
            what |= SEGMENTS.index(SREG_FIELD[ins.memory_segment][:2]) << SEGMENT_SHIFT
        self.hole_push(what)
        self.a.call(state("narrow_string"))

    # Branches

    def near(self, target: int, at: int, narrow: bool) -> bool:
        """Whether a branch at offset ``at`` to an offset of the same page is certainly that: EIP neither wraps nor
        leaves the segment on the way. ``at`` is -1 for what goes on behind an instruction."""
        return target > at if self.segmented else self.bits == 16 or not narrow

    def branch_target(self, size: int) -> None:
        a = self.a
        if size == 2:
            a.movzx(R10, R10, 16)
        else:
            a.mov(R10, R10, size=32)
        if self.segmented:
            inside = a.label()
            if self.live:
                save_flags(a)
            a.cmp(R10, state("code_end"))
            a.jcc(Cond.B, inside)
            if self.live:
                restore_flags(a)
            self.emulate()
            a.bind(inside)
            if self.live:
                restore_flags(a)

    def _call(self, ins: Instruction) -> None:
        if self.segmented and ins.flow_control == FlowControl.CALL:
            self.page_plus(R10, HOLE_TARGET)
            self.branch_target(-ins.stack_pointer_increment)
        super()._call(ins)

    def dispatch(self) -> None:
        """Go to the EIP in r10, which is inside the segment, through the jump cache."""
        a = self.a
        if self.bounce is not None:
            a.jmp(state("done_exit"))
        else:
            self._to_tag(a)
            super().dispatch()

    def _to_tag(self, a: Assembler) -> None:
        if self.segmented:
            a.mov(R11, state("cs_base"))
            a.lea(R10, Mem(R10, R11), size=32)
        else:
            a.mov(R10, R10, size=32)
        a.mov(R11, self.tag)
        a.lea(R10, Mem(R10, R11))

    def way_out(self, target: int, at: int, narrow: bool) -> bytes:
        """Code that goes to the page's start + ``target``, which may be on any page: by the branch at offset ``at``
        with a target of 16 or 32 bits, or (-1) from one instruction to the next."""
        a = Assembler()
        a.mov(R10, state("page"))
        a.lea(R10, Mem(R10, disp=target), size=32)
        if narrow:
            a.movzx(R10, R10, 16)
        if self.segmented:
            inside = a.label()
            save_flags(a)
            a.cmp(R10, state("code_end"))
            a.jcc(Cond.B, inside)
            restore_flags(a)
            if at >= 0:  # the branch faults, or goes where code runs one instruction at a time
                a.mov(R10, state("page"))
                a.lea(R10, Mem(R10, disp=at), size=32)
                a.jmp(state("emu_exit"))
            else:
                a.jmp(state("brk_exit"))
            a.bind(inside)
            restore_flags(a)
        self._to_tag(a)
        self.jump(a)
        return a.code(0)

    def _loop(self, ins: Instruction) -> bytes:
        """LOOP, LOOPcc and JCXZ as far as whether they jump: falls through if not, else takes the jump that it ends in,
        whose displacement (32 bits) is left open. No flag changes."""
        opcode = _LOOPS[ins.mnemonic]
        a = Assembler()
        if ins.code not in _COUNTS_CX:
            a.raw(bytes((0x67, opcode, 2)))  # ECX, as here
            a.raw(b"\xeb\x05\xe9")  # over the jump
        else:
            zero, out, jump = a.label(), a.label(), a.label()
            a.mov(R11, RCX)
            if opcode != _JCXZ:
                a.lea(RCX, Mem(RCX, disp=-1), size=32)
            a.movzx(RCX, RCX, 16)
            a.mov(R11, RCX, size=16)
            a.jrcxz(zero)
            a.mov(RCX, R11)
            if opcode in (_LOOPNE, _LOOPE):
                a.jcc(Cond.E if opcode == _LOOPNE else Cond.NE, out)
            a.jmp(out if opcode == _JCXZ else jump)
            a.bind(zero)
            a.mov(RCX, R11)
            if opcode == _JCXZ:
                a.jmp(jump)
            a.bind(out)
            a.raw(b"\xeb\x05")
            a.bind(jump)
            a.raw(b"\xe9")
        a.raw(bytes(4))
        return a.code(0)

    # Segment registers

    def _mov(self, ins: Instruction) -> None:
        if ins.op0_kind == OpKind.REGISTER and ins.op0_register in SREG_FIELD:
            if ins.op1_kind == OpKind.MEMORY:
                self.address(ins)
                self.check(2, READ)
                self.a.movzx(R11, Mem(R10), 16)
            else:
                self.load(R11, GPR[ins.op1_register][0])
                self.a.movzx(R11, R11, 16)
            self._paragraph(ins)
        else:
            super()._mov(ins)

    def _push(self, ins: Instruction) -> None:
        if ins.op0_kind != OpKind.REGISTER or ins.op0_register not in SREG_FIELD:
            super()._push(ins)
            return
        w = -ins.stack_pointer_increment
        self.stack_at(-w)
        self.check(w, WRITE)
        self.a.mov(R11, state(SREG_FIELD[ins.op0_register]))
        self.a.mov(Mem(R10), R11, size=w * 8)
        self.stack_move(-w)

    def _pop(self, ins: Instruction) -> None:
        if ins.op0_register not in SREG_FIELD:
            super()._pop(ins)
            return
        w = ins.stack_pointer_increment
        self.stack_at(0)
        self.check(w, READ)
        self.a.movzx(R11, Mem(R10), 16)
        self._paragraph(ins)
        self.stack_move(w)

    def _paragraph(self, ins: Instruction) -> None:
        """Load a segment register from r11 in real mode: limit and rights stay. No flag changes."""
        a = self.a
        name = SREG_FIELD[ins.op0_register]
        a.mov(state(name), R11)
        a.lea(R11, Mem(None, R11, 8))
        a.lea(R11, Mem(R11, R11))
        a.mov(state(f"{name[:2]}_base"), R11)
