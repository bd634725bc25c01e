"""The instructions that are a case of their own: what they are on the host, when they cannot be copied."""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import (
    FlowControl,
    Instruction,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

from skep.engine.translate.asm import R9, R10, R11, RAX, RBP, RCX, RDI, RDX, RSI, Cond, Mem, Reg, gs
from skep.engine.translate.emitter import Emitter
from skep.engine.translate.forms import (
    BIT_TESTS,
    FLUSHES,
    FXRSTOR,
    FXSAVE,
    GPR,
    GPR_BY_SIZE,
    HOLE_IP,
    HOLE_NEXT,
    HOLE_TARGET,
    READ,
    READ_WRITE,
    SREG_FIELD,
    STRINGS,
    SYSTEM_REGISTERS,
    WRITE,
    XRSTOR,
    XSAVE,
    Legality,
    sign_extend,
)
from skep.engine.translate.layout import (
    BRK_STI,
    OFFSETS,
    SEGMENTS,
    VECTORS,
    Mode,
)
from skep.engine.translate.stubs import field as state
from skep.engine.translate.stubs import restore_flags, save_flags


class Special(Emitter):
    """One method a case, each for an instruction that lower.py has found to be lowered in this mode."""

    def special(self) -> dict[int, Callable[[Instruction], None]]:
        m = Mnemonic
        table: dict[int, Callable[[Instruction], None]] = {
            m.MOV: self._mov, m.LEA: self._lea, m.PUSH: self._push, m.POP: self._pop, m.LEAVE: self._leave,
            m.CALL: self._call, m.JMP: self._jmp, m.RET: self._ret,
            m.PUSHF: self._pushfq, m.PUSHFD: self._pushfq, m.PUSHFQ: self._pushfq,
            m.POPF: self._popfq, m.POPFD: self._popfq, m.POPFQ: self._popfq, m.STI: self._sti, m.CLI: self._cli,
            m.HLT: self._hlt,
            m.STAC: self._stac, m.CLAC: self._stac, m.SWAPGS: self._swapgs, m.INVLPG: self._invlpg,
            m.INVPCID: self._invpcid, m.PAUSE: self._pause,
            m.IRETQ: self._leave_by, m.SYSRETQ: self._leave_by, m.SYSCALL: self._leave_by,
            m.RDTSC: self._rdtsc, m.RDTSCP: self._rdtsc, m.IN: self._port, m.OUT: self._port,
            m.RDFSBASE: self._segment_base, m.RDGSBASE: self._segment_base,
            m.WRFSBASE: self._segment_base, m.WRGSBASE: self._segment_base,
            m.CPUID: self._by_routine, m.RDMSR: self._by_routine, m.WRMSR: self._by_routine,
            m.FNSTENV: self._x87_environment, m.FNSAVE: self._x87_environment,
        }  # fmt: skip
        for k in BIT_TESTS:
            table[k] = self._bit_test
        for k in FLUSHES:
            table[k] = self._flush
        for k in STRINGS:
            table[k] = self._string
        for k in XSAVE | XRSTOR:
            table[k] = self._xsave
        for k in FXSAVE | FXRSTOR:
            table[k] = self._fxsave
        return table

    def _plain(self, ins: Instruction) -> None:
        self.generic(ins, self.data)

    def _mov(self, ins: Instruction) -> None:
        for i in range(ins.op_count):
            if ins.op_kind(i) == OpKind.REGISTER and ins.op_register(i) in SYSTEM_REGISTERS:
                self._mov_system(ins)
                return
        self._plain(ins)

    def _mov_system(self, ins: Instruction) -> None:
        a = self.a
        if ins.op0_register in SREG_FIELD:
            self._load_segment(ins)
            return
        source = ins.op1_register
        if source in SREG_FIELD:
            name = SREG_FIELD[source]
            if ins.op0_kind == OpKind.MEMORY:
                self.address(ins)
                self.check(2, WRITE)
                a.mov(R11, state(name))
                a.mov(Mem(R10), R11, size=16)
                return
            number, size = GPR[ins.op0_register]
            h = self.homes[number]
            if h is None:
                h = R10
                if size == 2:
                    a.mov(R10, gs(number * 8))
            a.mov(h, state(name), size=16 if size == 2 else 64)
            if self.homes[number] is None:
                a.mov(gs(number * 8), Reg(h))
            return
        if ins.op0_register == Register.CR3:
            self.load(R10, GPR[source][0])
            self.hole_push()
            a.call(state("cr3_load"))
            self.page_plus(R10, HOLE_NEXT)
            self.dispatch()
            return
        name = {Register.CR0: "cr0", Register.CR2: "cr2", Register.CR3: "cr3", Register.CR4: "cr4"}[source]
        number = GPR[ins.op0_register][0]
        h = self.homes[number]
        a.mov(R10 if h is None else h, state(name))
        if h is None:
            a.mov(gs(number * 8), R10)

    def _load_segment(self, ins: Instruction) -> None:
        a = self.a
        if ins.op1_kind == OpKind.MEMORY:
            self.address(ins)
            self.check(2, READ)
            a.movzx(R10, Mem(R10), 16)
        else:
            self.load(R10, GPR[ins.op1_register][0])
        a.raw(b"\x68")
        self.holes.append((len(a), HOLE_IP, SEGMENTS.index(SREG_FIELD[ins.op0_register][:2]) << 12))
        a.raw(bytes(4))
        a.call(state("load_segment"))

    def _by_routine(self, ins: Instruction) -> None:
        """CPUID, RDMSR, WRMSR: system_runtime.py."""
        self.hole_push()
        self.a.call(state({Mnemonic.CPUID: "cpuid", Mnemonic.RDMSR: "rdmsr", Mnemonic.WRMSR: "wrmsr"}[ins.mnemonic]))

    def _lea(self, ins: Instruction) -> None:
        a = self.a
        number, size = GPR[ins.op0_register]
        parts = [GPR[r][0] for r in (ins.memory_base, ins.memory_index) if r in GPR]
        relative = ins.memory_base in (Register.RIP, Register.EIP)
        if self.wide and self.homes[number] == number and all(self.homes[n] == n for n in parts) and not relative:
            if self.open.disp_size:
                self.copies.append((len(a) + self.open.disp, self.open.disp, self.open.disp_size))
            a.raw(self.data)
            self.keeps = True
            return
        part = ins.memory_base if ins.memory_base != Register.NONE else ins.memory_index
        if self.wide and part in GPR and GPR[part][1] == 8 and size >= 4:
            disp = sign_extend(ins.memory_displacement & 0xFFFFFFFF, 32)
            self.lea(number, size, *self.memory_registers(ins), ins.memory_index_scale, disp)
            return
        h = self.homes[number]
        bare = ins.copy()
        bare.segment_prefix = Register.DS if not self.wide else Register.NONE
        self.address(bare)
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

    def lea(self, number: int, size: int, base: int | None, index: int | None, scale: int, disp: int) -> None:
        """Guest register ``number`` = the address that guest registers make, with ``disp`` or an open displacement."""
        a = self.a
        to = self.homes[number]
        host_base, host_index = self.parts(base, index)
        n = self.open.disp_size
        if n:
            disp = 0x11 if n == 1 else 0x11111111
        a.lea(R11 if to is None else to, Mem(host_base, host_index, scale, disp), size=size * 8)
        if n:
            self.copies.append((len(a) - n, self.open.disp, n))
        if to is None:
            a.mov(gs(number * 8), R11)

    def _push(self, ins: Instruction) -> None:
        a = self.a
        w = -ins.stack_pointer_increment
        kind = ins.op0_kind
        if kind == OpKind.MEMORY:
            self.address(ins)
            self.check(w, READ)
            a.mov(R10, Mem(R10), size=w * 8)
            a.mov(state("t0"), R10)
        self.stack_at(-w)
        self.check(w, WRITE)
        if kind == OpKind.MEMORY:
            a.mov(R11, state("t0"))
            a.mov(self.operand, R11, size=w * 8)
        elif kind == OpKind.REGISTER:
            number = GPR[ins.op0_register][0]
            h = self.homes[number]
            if h is None:
                a.mov(R11, gs(number * 8))
                h = R11
            a.mov(self.operand, Reg(h), size=w * 8)
        else:
            a.mov(self.operand, sign_extend(ins.immediate(0) & 0xFFFFFFFF, 32), size=w * 8)
        self.stack_move(-w)
        self.keeps = self.is_placed

    def _pop(self, ins: Instruction) -> None:
        a = self.a
        w = ins.stack_pointer_increment
        self.stack_at(0)
        self.check(w, READ)
        number = GPR[ins.op0_register][0]
        h = self.homes[number]
        if h is None:
            a.mov(R11, self.operand, size=w * 8)
            a.mov(gs(number * 8), R11)
        elif number == 4:
            a.mov(R9, self.operand, size=w * 8)
            return
        else:
            a.mov(h, self.operand, size=w * 8)
        self.stack_move(w)
        self.keeps = self.is_placed

    def push_next(self, w: int) -> None:
        """Push the address of the next instruction in ``w`` bytes; r10 and r11 are free."""
        a = self.a
        self.stack_at(-w)
        self.check(w, WRITE)
        self.page_plus(R11, HOLE_NEXT)
        a.mov(self.operand, R11, size=w * 8)
        self.stack_move(-w)

    def _indirect_target(self, ins: Instruction) -> None:
        """r10 = where an indirect branch goes."""
        a = self.a
        if ins.op0_kind == OpKind.MEMORY:
            w = self.size(ins)
            self.address(ins)
            self.check(w, READ)
            a.mov(R10, Mem(R10), size=w * 8)
        else:
            number, w = GPR[ins.op0_register]
            self.load(R10, number)
        self.branch_target(w)

    def _call(self, ins: Instruction) -> None:
        w = -ins.stack_pointer_increment
        if ins.flow_control == FlowControl.CALL:
            self.push_next(w)
            if self.bounce is not None:
                self.page_plus(R10, HOLE_TARGET)
                self.dispatch()
            return
        self._indirect_target(ins)
        self.a.mov(state("t0"), R10)
        self.push_next(w)
        self.a.mov(R10, state("t0"))
        self.dispatch()

    def _jmp(self, ins: Instruction) -> None:
        if ins.flow_control == FlowControl.INDIRECT_BRANCH:
            self._indirect_target(ins)
            self.dispatch()

    def _ret(self, ins: Instruction) -> None:
        released = ins.immediate(0) if ins.op_count else 0
        w = ins.stack_pointer_increment - released
        self.stack_at(0)
        self.check(w, READ)
        self.a.mov(R10, self.operand, size=w * 8)
        self.branch_target(w)
        self.stack_move(w + released)
        self.dispatch()

    def _leave(self, ins: Instruction) -> None:
        a = self.a
        if not self.is_placed:
            a.mov(R10, RBP)
        self.check(8, READ)
        a.lea(R9, Mem(RBP, disp=8))
        a.mov(RBP, self.operand)

    def _pushfq(self, ins: Instruction) -> None:
        a = self.a
        w = -ins.stack_pointer_increment
        self.stack_at(-w)
        self.check(w, WRITE)
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
        a.mov(Mem(R10), R11, size=w * 8)
        self.stack_move(-w)

    def _popfq(self, ins: Instruction) -> None:
        """POPF, POPFD, POPFQ at CPL 0. Where it changes more than the arithmetic flags, DF and IF, Python does it."""
        a = self.a
        same = a.label()
        w = ins.stack_pointer_increment
        self.stack_at(0)
        self.check(w, READ)
        a.mov(R11, Mem(R10), size=w * 8)
        a.mov(R10, R11)
        a.xor(R10, state("sysfl"))
        a.test(R10, 0x7100 if w == 2 else 0x3E7100, size=32)
        a.jcc(Cond.E, same)
        self.emulate()
        a.bind(same)
        self.stack_move(w)
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
        info = GPR[ins.op_register(value)][1] | (0x10 if out else 0)
        if ins.op_kind(port) != OpKind.REGISTER:
            info |= 0x20 | ins.immediate(port) << 16
        self.a.mov(state("info"), info)
        self.page_plus(R10, HOLE_NEXT)
        self.a.jmp(state("port_exit"))

    def _hlt(self, ins: Instruction) -> None:
        self.page_plus(R10, HOLE_NEXT)
        self.a.jmp(state("halt_exit"))

    def _sti(self, ins: Instruction) -> None:
        a = self.a
        a.mov(state("iflag"), 0x200)
        a.mov(R11, state("irq"))
        a.mov(gs(BRK_STI), R11, size=8)

    def _pause(self, ins: Instruction) -> None:
        """Now and then the host's CPU goes to somebody else, who may be the one that is waited for."""
        a = self.a
        over, zero = a.label(), a.label()
        a.raw(b"\xf3\x90")
        a.mov(R11, state("spins"))
        a.lea(R11, Mem(R11, disp=-1))
        a.mov(state("spins"), R11)
        a.xchg(RCX, R11)
        a.jrcxz(zero)
        a.xchg(RCX, R11)
        a.jmp(over)
        a.bind(zero)
        a.xchg(RCX, R11)
        a.call(state("yield_"))
        a.bind(over)

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

    def _invpcid(self, ins: Instruction) -> None:
        self.address(ins)
        self.check(16, READ, anywhere=True)
        self.load(R11, GPR[ins.op0_register][0])
        self.hole_push()
        self.a.call(state("invpcid"))

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
        number, size = GPR[ins.op0_register]
        h = self.homes[number]
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
        number, size = GPR[ins.op1_register]
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
        address_size = RegisterExt.size(part) or ins.memory_displ_size
        if address_size == 2:
            a.movzx(R10, R10, 16)
        elif not self.wide or address_size == 4:
            a.mov(R10, R10, size=32)
        self.check(size, READ if ins.mnemonic == Mnemonic.BT else READ_WRITE)
        self.load(R11, number)
        a.push(RCX)
        a.mov(RCX, 64 - shift)
        a.shlx(R11, R11, RCX)
        a.shrx(R11, R11, RCX)
        a.pop(RCX)
        y = self.moved(ins)
        y.op1_register = GPR_BY_SIZE[11, size]
        self.encoder.encode(y, 0)
        a.raw(self.encoder.take_buffer())

    def _string(self, ins: Instruction) -> None:
        if not ins.is_string_instruction:
            self._plain(ins)  # MOVSD, CMPSD of SSE2
            return
        a = self.a
        op, shift = STRINGS[ins.mnemonic]
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
        saving = ins.mnemonic in XSAVE
        self.address(ins)
        self.check(832 if self.legality & Legality.AVX else 576, READ_WRITE if saving else READ)
        skip = a.label()
        a.mov(state("t0"), RAX)  # should it fault, alone.py takes these three back from here
        a.mov(state("t1"), RDX)
        a.pushfq()
        a.pop(state("t2"))
        a.and_(RAX, state("xcr0"), size=32)
        a.xor(RDX, RDX, size=32)
        self.at_r10(ins)
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

    def _fxsave(self, ins: Instruction) -> None:
        a = self.a
        saving = ins.mnemonic in FXSAVE
        self.address(ins)
        self.check(512, READ_WRITE if saving else READ)
        if not self.wide:  # XMM8 to XMM15 are not to be seen: saved is what is there already
            self._upper_vectors(0x11)
            if saving:
                self._upper_vectors(0x10, memory=True)
        self.at_r10(ins)
        if not self.wide:
            self._upper_vectors(0x10)
        if saving:
            a.mov(Mem(R10, disp=8), 0)
            a.mov(Mem(R10, disp=16), 0)

    def _upper_vectors(self, opcode: int, *, memory: bool = False) -> None:
        """MOVUPS of XMM8 to XMM15: to (0x11) or from (0x10) a place of the state block, or the FXSAVE area at r10."""
        for number in range(8):
            if memory:
                self.a.raw(bytes((0x45, 0x0F, opcode, 0x82 | number << 3)) + (288 + 16 * number).to_bytes(4, "little"))
            else:
                place = (VECTORS + 16 * number).to_bytes(4, "little")
                self.a.raw(bytes((0x65, 0x44, 0x0F, opcode, 4 | number << 3, 0x25)) + place)

    def _x87_environment(self, ins: Instruction) -> None:
        """FNSTENV, FNSAVE: in their 32-bit layout the instruction and data pointers stand at 12 and 20."""
        size = self.size(ins)
        self.address(ins)
        self.check(size, WRITE)
        self.at_r10(ins)
        if size in (28, 108):
            self.a.mov(Mem(R10, disp=12), 0, size=32)
            self.a.mov(Mem(R10, disp=20), 0, size=32)
