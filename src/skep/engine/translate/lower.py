"""Lowering: one guest instruction to the host code that does the same, as a template that can stand anywhere.

A template holds no address: guest addresses are made from ``st.page``, stubs are reached through GS, and what depends
on where in its page the instruction stands is a *hole* of 32 bits. So templates are made once for (bytes, mode, whether
flags must survive the checks) and then copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from iced_x86 import (
    Code,
    ConstantOffsets,
    EncodingKind,
    FlowControl,
    Instruction,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

from skep.engine.translate.emitter import PLACE
from skep.engine.translate.forms import (
    ALL_FLAGS,
    AVX,
    BIT_TESTS,
    BY_CL,
    FIXED,
    FULL_REGISTERS,
    FXRSTOR,
    FXSAVE,
    GENERAL_SPECIAL,
    GPR,
    HOLE_PLACE,
    HOMES,
    INTEGER,
    MOFFS,
    NO_OPERATION,
    NOTHING_OPEN,
    READ,
    SHIFTS,
    SREG_FIELD,
    SSE,
    STRINGS,
    SYSTEM_REGISTERS,
    WRITES,
    X87,
    XRSTOR,
    XSAVE,
    Ends,
    Form,
    Legality,
    Open,
    Template,
    sign_extend,
    waits,
)
from skep.engine.translate.layout import Mode
from skep.engine.translate.special import Special
from skep.engine.translate.stubs import field as state
from skep.errors import InternalError

PUSH_FLAGS = (Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ)
POP_FLAGS = (Mnemonic.POPF, Mnemonic.POPFD, Mnemonic.POPFQ)
RETURNS_WITH_FLAGS = (Mnemonic.IRETQ, Mnemonic.SYSRETQ)
DATA_SEGMENTS = (Register.DS, Register.ES, Register.FS, Register.GS)
RSP, RBP = 4, 5
"""Numbers of guest registers."""
_INDIRECT64 = (Code.JMP_RM64, Code.CALL_RM64)
_INDIRECT = (Code.JMP_RM32, Code.CALL_RM32, Code.JMP_RM16, Code.CALL_RM16)


class Lowering(Special):
    """Makes the forms and templates of one mode."""

    near_kinds: ClassVar[tuple[int, ...]] = (OpKind.NEAR_BRANCH64,)

    def __init__(self, mode: int) -> None:
        super().__init__(mode)
        self._handlers: dict[int, Callable[[Instruction], None]] = self.special()
        self._range_checks: dict[tuple[bool, bool, bool], tuple[bytes, int]] = {}
        self._closed = frozenset(self._handlers) - {Mnemonic.MOV, Mnemonic.LEA}
        """Mnemonics whose constants templates do not leave open."""
        self.emulated = Form(keeps=0, reads=ALL_FLAGS, ends=Ends.YES, emulate=True)
        self.dispatch_code = self._fragment(self.dispatch)
        self.done_code = self._fragment(lambda: self.a.jmp(state("done_exit")))
        self._fragment(self.emulate)
        self.emulated_template = self.finish()

    def _fragment(self, build: Callable[[], None]) -> bytes:
        self.begin(b"", False, None, NOTHING_OPEN)
        build()
        return self.a.code(0)

    def form(self, ins: Instruction, relative: bool, open_: Open = NOTHING_OPEN) -> Form:
        """Classify an instruction; templates are made later, when it is known whether flags must survive."""
        flow = ins.flow_control
        m = ins.mnemonic
        if self._is_python(ins):
            return self.emulated
        form = Form(relative=relative, open=open_)
        if self.wide and not self.aligns:
            self._describe(form, ins)
        else:
            form.uses = FIXED
        form.memory = self.memory_operand(ins) or ins.is_stack_instruction or ins.is_string_instruction
        modified: int = ins.rflags_modified
        if ins.is_string_instruction or (m in BY_CL and ins.op_kind(ins.op_count - 1) == OpKind.REGISTER):
            modified = 0  # a count of zero leaves every flag
        form.keeps = ALL_FLAGS & ~modified
        form.reads = ins.rflags_read & ALL_FLAGS
        if m in PUSH_FLAGS:
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
            form.keeps = 0 if m in RETURNS_WITH_FLAGS else ALL_FLAGS
        elif m == Mnemonic.STI:
            form.ends = Ends.SHADOW
        elif m in POP_FLAGS:
            form.ends = Ends.LOOK
            form.keeps = form.reads = 0
        elif m in (Mnemonic.IN, Mnemonic.OUT, Mnemonic.HLT):
            form.ends = Ends.YES
            form.keeps = ALL_FLAGS
        elif m in (Mnemonic.STAC, Mnemonic.CLAC):
            form.ends = Ends.MODE
            form.cond = Mode.AC if m == Mnemonic.STAC else 0
            form.keeps, form.reads = ALL_FLAGS, 0
        elif m == Mnemonic.MOV and ins.op0_kind == OpKind.REGISTER and ins.op0_register == Register.CR3:
            form.ends = Ends.YES
        return form

    def _describe(self, form: Form, ins: Instruction) -> None:
        """What sharing_runtime.py wants to know."""
        m = ins.mnemonic
        info = self.info.info(ins)
        full = {RegisterExt.full_register(used.register) for used in info.used_registers() if used.access in WRITES}
        spoils = {FULL_REGISTERS[r] for r in full if r in FULL_REGISTERS}
        for used in info.used_registers():
            number = FULL_REGISTERS.get(RegisterExt.full_register(used.register))
            if number is not None:
                form.uses |= 1 << number
        if not self._may_be_moved(ins):
            form.uses |= FIXED
        w = ins.stack_pointer_increment
        open_ = form.open
        if m in (Mnemonic.PUSH, Mnemonic.POP) and ins.op0_kind != OpKind.MEMORY:
            if ins.op0_kind == OpKind.REGISTER and ins.op0_register in SREG_FIELD:
                pass
            else:
                form.reach = (RSP, min(w, 0), 8, m == Mnemonic.PUSH, 0, 0)
                if not (m == Mnemonic.POP and ins.op0_register == Register.RSP):
                    form.step = (RSP, RSP, w, 0, 0, 0)
        elif m == Mnemonic.CALL and ins.flow_control == FlowControl.CALL:
            form.reach = (RSP, -8, 8, True, 0, 0)
        elif m == Mnemonic.RET:
            form.reach = (RSP, 0, 8, False, 0, 0)
        elif m == Mnemonic.LEAVE:
            form.reach = (RBP, 0, 8, False, 0, 0)
            form.step = (RSP, RBP, 8, 0, 0, 0)
        elif m in (Mnemonic.ADD, Mnemonic.SUB, Mnemonic.LEA, Mnemonic.MOV) and self._moves_pointer(form, ins):
            pass
        elif self._may_share(ins):
            disp = 0 if open_.disp_size else sign_extend(ins.memory_displacement & 0xFFFFFFFF, 32)
            written = self._access(info) != READ
            form.reach = (GPR[ins.memory_base][0], disp, self.size(ins), written, open_.disp, open_.disp_size)
        elif self._may_share(ins, index=True) and m in INTEGER and self._access(info) == READ and self.size(ins) <= 8:
            disp = 0 if open_.disp_size else sign_extend(ins.memory_displacement & 0xFFFFFFFF, 32)
            registers = GPR[ins.memory_base][0], GPR[ins.memory_index][0]
            form.table = (*registers, ins.memory_index_scale, self.size(ins), disp, open_.disp, open_.disp_size)
        if m == Mnemonic.MOVZX and RegisterExt.size(ins.op0_register) >= 4 and self._reads_byte(ins):
            form.byte = GPR[ins.op0_register][0]
        if form.step is not None:
            spoils.discard(form.step[0])
        if m in (Mnemonic.INVLPG, Mnemonic.INVPCID):
            spoils.update(range(16))  # any page may be another from here on
        form.spoils = tuple(spoils)

    def _may_be_moved(self, ins: Instruction) -> bool:
        """Whether the instruction may run with other host registers than usual (renaming.py)."""
        m = ins.mnemonic
        if ins.is_jcc_short_or_near or ins.is_jmp_short_or_near or m in NO_OPERATION or m == Mnemonic.LEA:
            return True
        if m not in INTEGER or m in (Mnemonic.DIV, Mnemonic.IDIV) or ins.has_lock_prefix:
            return False
        memory = self.memory_operand(ins)
        if memory and (m == Mnemonic.XCHG or self._aligned(ins)):
            return False
        if m == Mnemonic.MOV or (m in BIT_TESTS and not memory):
            operands = [ins.op_register(i) for i in range(ins.op_count) if ins.op_kind(i) == OpKind.REGISTER]
            return all(register in GPR for register in operands)
        return m not in self._handlers and ins.flow_control == FlowControl.NEXT

    @staticmethod
    def _moves_pointer(form: Form, ins: Instruction) -> bool:
        """Whether a register becomes a register plus a constant."""
        if ins.op0_kind != OpKind.REGISTER or RegisterExt.size(ins.op0_register) != 8:
            return False
        to = GPR.get(ins.op0_register)
        if to is None:
            return False
        m = ins.mnemonic
        if m == Mnemonic.LEA:
            base = GPR.get(ins.memory_base)
            if base is None or base[1] != 8 or ins.memory_index != Register.NONE:
                return False
            open_ = form.open
            disp = 0 if open_.disp_size else sign_extend(ins.memory_displacement & 0xFFFFFFFF, 32)
            form.step = (to[0], base[0], disp, 1, open_.disp, open_.disp_size)
        elif m == Mnemonic.MOV:
            source = GPR.get(ins.op1_register) if ins.op1_kind == OpKind.REGISTER else None
            if source is None:
                return False
            form.step = (to[0], source[0], 0, 0, 0, 0)
        elif form.open.imm_size:
            form.step = (to[0], to[0], 0, 1 if m == Mnemonic.ADD else -1, form.open.imm, form.open.imm_size)
        else:
            return False
        return True

    def _reads_byte(self, ins: Instruction) -> bool:
        """Whether the second operand has 8 bits."""
        if ins.op1_kind == OpKind.REGISTER:
            return RegisterExt.size(ins.op1_register) == 1
        return self.size(ins) == 1

    def _may_share(self, ins: Instruction, index: bool = False) -> bool:
        """Whether the instruction is copied with one operand at a 64-bit register plus a constant, or plus another
        64-bit register with a host register (``index``)."""
        m = ins.mnemonic
        return (
            self.memory_operand(ins)
            and (m not in self._handlers or m == Mnemonic.MOV)
            and m not in NO_OPERATION
            and ins.flow_control == FlowControl.NEXT
            and ins.memory_base in GPR
            and RegisterExt.size(ins.memory_base) == 8
            and (
                RegisterExt.size(ins.memory_index) == 8 and HOMES[GPR[ins.memory_index][0]] is not None
                if index and ins.memory_index in GPR
                else not index and ins.memory_index == Register.NONE
            )
            and ins.memory_segment not in (Register.FS, Register.GS)
            and 0 < self.size(ins) <= 64
            and not self._aligned(ins)
            and not ins.is_string_instruction
            and not waits(ins)
            and not any(
                ins.op_kind(i) == OpKind.REGISTER and ins.op_register(i) in SYSTEM_REGISTERS
                for i in range(ins.op_count)
            )
        )

    def _is_python(self, ins: Instruction) -> bool:
        """Whether the emulator has this instruction, in this mode."""
        if ins.is_invalid or ins.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
            return True
        m = ins.mnemonic
        flow = ins.flow_control
        if m in self._handlers:
            return not self._allowed_special(ins)
        if m in NO_OPERATION:
            return False
        if flow in (FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH, FlowControl.CALL):
            return self._branch_is_python(ins)
        if flow != FlowControl.NEXT:
            return True
        if not (
            m in INTEGER
            or (m in X87 and self.legality & Legality.X87)
            or (m in SSE and self.legality & Legality.SSE)
            or (m in AVX and self.legality & Legality.AVX)
        ):
            return True
        if ins.is_string_instruction:
            return True
        for i in range(ins.op_count):
            kind = ins.op_kind(i)
            if kind == OpKind.REGISTER and ins.op_register(i) in SYSTEM_REGISTERS:
                return True
        if ins.has_lock_prefix and ins.op0_kind != OpKind.MEMORY:
            return True
        return self.memory_operand(ins) and self.size(ins) == 0

    def _branch_is_python(self, ins: Instruction) -> bool:
        return not (
            ins.is_jcc_short_or_near
            or ins.is_jmp_short_or_near
            or ins.is_call_near
            or ins.is_jcx_short
            or ins.is_loop
            or ins.is_loopcc
        ) or ins.op0_kind not in self.near_kinds

    def _allowed_special(self, ins: Instruction) -> bool:
        """For a mnemonic with a handler: whether this form, in this mode, is the handler's."""
        m = ins.mnemonic
        code = ins.code
        if m == Mnemonic.MOV:
            if code in MOFFS:
                return True
            for i in range(ins.op_count):
                if ins.op_kind(i) == OpKind.REGISTER and ins.op_register(i) in SYSTEM_REGISTERS:
                    if ins.op_register(i) in SREG_FIELD:
                        return i == 1 or (self.wide and ins.op_register(i) in DATA_SEGMENTS)
                    if not self.kernel or not self.wide:
                        return False
                    if i == 0:
                        return bool(ins.op_register(0) == Register.CR3)
                    return ins.op_register(1) in (Register.CR0, Register.CR2, Register.CR3, Register.CR4)
            return True
        if m in (Mnemonic.PUSH, Mnemonic.POP):
            if m == Mnemonic.POP and ins.op0_kind == OpKind.MEMORY:
                return False
            if ins.op0_kind == OpKind.REGISTER and ins.op0_register in SREG_FIELD:
                return False
            return not self.wide or ins.stack_pointer_increment in (-8, 8)
        if m in (Mnemonic.CALL, Mnemonic.JMP, Mnemonic.RET):
            flow = ins.flow_control
            if m == Mnemonic.RET:
                return not self.wide or code in (Code.RETNQ, Code.RETNQ_IMM16)
            if flow in (FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL):
                return code in (_INDIRECT64 if self.wide else _INDIRECT)
            return not self._branch_is_python(ins)
        if m in (Mnemonic.IN, Mnemonic.OUT):
            return self.kernel
        if m in POP_FLAGS:
            return self.kernel and m == Mnemonic.POPFQ
        if m in (Mnemonic.STI, Mnemonic.CLI, Mnemonic.SWAPGS, Mnemonic.STAC, Mnemonic.CLAC, Mnemonic.INVLPG):
            return self.kernel and (self.wide or m in (Mnemonic.STI, Mnemonic.CLI))
        if m in (Mnemonic.IRETQ, Mnemonic.INVPCID):
            return self.kernel and self.wide
        if m in (Mnemonic.RDMSR, Mnemonic.WRMSR):
            return self.kernel and self.wide and ins.len == 2
        if m == Mnemonic.HLT:
            return self.kernel and self.wide
        if m == Mnemonic.CPUID:
            return self.wide
        if m == Mnemonic.SYSCALL:
            return self.wide and self.user and ins.len == 2
        if m == Mnemonic.SYSRETQ:
            return self.wide and self.kernel and ins.len == 3
        if m in (Mnemonic.RDTSC, Mnemonic.RDTSCP):
            return self.kernel or bool(self.legality & Legality.TSC)
        if m in (Mnemonic.RDFSBASE, Mnemonic.RDGSBASE, Mnemonic.WRFSBASE, Mnemonic.WRGSBASE):
            return self.wide
        if m in STRINGS:
            if not ins.is_string_instruction:
                return bool(self.legality & Legality.SSE)  # MOVSD, CMPSD of SSE2
            if not self.wide or self.aligns or self._address_size(ins) != 8:
                return False
            op, _ = STRINGS[m]
            if op in ("CMPS", "SCAS"):
                return True
            return not (ins.has_rep_prefix or ins.has_repne_prefix) or (op != "LODS" and not ins.has_repne_prefix)
        if m in XSAVE or m in XRSTOR:
            return bool(self.legality & Legality.OSXSAVE and self.legality & Legality.X87)
        if m in FXSAVE or m in FXRSTOR:
            return bool(self.legality & Legality.SSE)
        if m == Mnemonic.LEAVE:
            return code == Code.LEAVEQ
        if m in PUSH_FLAGS:
            return m == Mnemonic.PUSHFQ
        if m in BIT_TESTS:
            return not ins.has_lock_prefix or ins.op0_kind == OpKind.MEMORY
        if m in (Mnemonic.FNSTENV, Mnemonic.FNSAVE):
            return bool(self.legality & Legality.X87)
        return True

    @staticmethod
    def _address_size(ins: Instruction) -> int:
        for i in range(ins.op_count):
            k = ins.op_kind(i)
            if k in (OpKind.MEMORY_ESRDI, OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_SEG_RDI):
                return 8
        return 4

    @staticmethod
    def is_general(ins: Instruction) -> bool:
        """Whether the form is the same in every legality class."""
        m = ins.mnemonic
        return m in INTEGER or m in GENERAL_SPECIAL

    def opens(self, ins: Instruction, where: ConstantOffsets) -> Open:
        """Which constants of an instruction templates can take from its bytes each time."""
        if ins.mnemonic in self._closed:
            return NOTHING_OPEN
        disp, disp_size = where.displacement_offset, where.displacement_size
        if disp_size not in (1, 4, 8) or ins.is_ip_rel_memory_operand:
            disp = disp_size = 0
        imm, imm_size = where.immediate_offset, where.immediate_size
        if where.has_immediate2 or ins.mnemonic in SHIFTS:
            imm = imm_size = 0
        return Open(disp, disp_size, imm, imm_size)

    def template(
        self,
        ins: Instruction,
        data: bytes,
        live: bool,
        bounce: dict[int, int] | None = None,
        open_: Open = NOTHING_OPEN,
    ) -> Template:
        """Lower one instruction. ``live``: flags must survive its checks. ``bounce``: {access number: address mod 64}
        of the operands that lie in bounce buffers; such a template is run alone. ``open_``: constants that the template
        leaves open."""
        self.begin(data, live, bounce, open_)
        if self._is_python(ins):
            self.emulate()
        else:
            m = ins.mnemonic
            handler = self._handlers.get(m)
            if handler is not None:
                handler(ins)
            elif m in NO_OPERATION:
                self.keeps = True
            else:
                self.generic(ins, data)
        return self.finish()

    def placed(self, ins: Instruction, data: bytes, open_: Open) -> Template:
        """Lower an instruction whose form has a reach: its operand is at r10 plus a hole."""
        self.begin(data, False, None, open_)
        self.is_placed = True
        handler = self._handlers.get(ins.mnemonic)
        if handler is not None:
            handler(ins)
        else:
            self.generic(ins, data)
        code = self.a.code(0)
        place = PLACE.to_bytes(4, "little")
        if code.count(place) != 1:
            raise InternalError(f"{ins}: an operand's place is not to be found in {code.hex()}")
        self.holes.append((code.index(place), HOLE_PLACE, 0))
        return self.finish()

    def range_check(self, write: bool, live: bool, on_stack: bool) -> tuple[bytes, int]:
        """The check of a range whose start is in r10, and where the displacement of its way out stands; the length's
        complement to 4096 is an immediate 6 bytes before that."""
        known = self._range_checks.get((write, live, on_stack))
        if known is None:
            known = self._range_checks[write, live, on_stack] = self._check_code(8, write, live, on_stack)
        return known
