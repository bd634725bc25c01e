"""The pieces that every template is made of: addresses, checks, jumps, and an instruction with its operands moved.

Each access to guest memory is a *check*: r10 has the address, and behind the check the operand's host address. The way
out when the TLB does not match stands behind the block (writing_runtime.py), pushes the access descriptor and calls the
stub ``slow``:

======  ====================================================
bits    access descriptor
======  ====================================================
0-11    the instruction's offset in its page (added by writing_runtime.py)
12-21   operand size in bytes
22-23   0 read, 1 write, 2 read and write
24-25   TLB array: supervisor, user, supervisor with AC
26-27   which access of the instruction this is
28      it belongs to a REP string instruction
29      an operand that is not aligned is #GP, before any page fault
30      of a range that several operands share (sharing_runtime.py); with 29: of a table, the size in words of 8 bytes
======  ====================================================
"""

from __future__ import annotations

from iced_x86 import (
    Encoder,
    EncodingKind,
    Instruction,
    InstructionInfo,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    Register_,
    RegisterExt,
)

from skep.engine.amd64.registers import Vector
from skep.engine.translate.asm import R9, R10, R11, Assembler, Cond, Mem, Reg, gs
from skep.engine.translate.forms import (
    ANYWHERE,
    BORROWED,
    FULL_REGISTERS,
    GPR,
    GPR_BY_SIZE,
    HIGH_BYTES,
    HOLE_IP,
    HOLE_TARGET,
    HOMES,
    INTEGER,
    MOFFS,
    NARROW_CODES,
    NOTHING_OPEN,
    ONLY_IN_REGISTERS,
    OR_MEMORY,
    PLAIN_WRITE,
    READ,
    READ_WRITE,
    REGISTERS_64,
    REVERSED,
    SSE,
    TLB_MASK,
    UNALIGNED,
    VEX_ALIGNED,
    WRITE,
    WRITES,
    Legality,
    Open,
    Template,
    sign_extend,
    waits,
)
from skep.engine.translate.layout import (
    BOUNCE,
    BOUNCE_SIZE,
    JC,
    JC_ARRAY,
    TLB,
    TLB_ARRAY,
    TLB_HOST,
    TLB_READ,
    TLB_WRITE,
    Mode,
)
from skep.engine.translate.segments import ALIGNMENT
from skep.engine.translate.stubs import field as state
from skep.engine.translate.stubs import jump_set, restore_flags, save_flags

_MEMORY = OpKind.MEMORY
SAVED_STACK = (0, 2, 6)
"""Emitter.on_stack in a template's checks."""
PLACE = 0x1D7C6B5A
"""Stands for an operand's place in its range until the template is ready: no code and no constant has these bytes."""


class Emitter:
    """Writes one template at a time, for one mode."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.array = mode & 3
        self.user = bool(mode & Mode.USER)
        self.bits = 32 if mode & Mode.CODE32 else 16 if mode & Mode.CODE16 else 64
        self.wide = self.bits == 64
        self.legality = mode >> Mode.CLASS_SHIFT
        self.kernel = not self.user and not self.legality & Legality.INNER
        self.aligns = bool(self.legality & Legality.ALIGNED)
        told_apart = Legality.INNER | Legality.WATCHED | Legality.ALIGNED
        self.shape = mode & (Mode.SHAPE | told_apart << Mode.CLASS_SHIFT)
        """What tells apart modes that general instructions are lowered differently in."""
        self.info = InstructionInfoFactory()
        self.encoder = Encoder(64)
        self._checks: dict[tuple[int, bool, bool, bool], tuple[bytes, int]] = {}
        self._fallbacks: dict[tuple[int, bool, bool], tuple[bytes, int]] = {}
        self.homes = HOMES
        """Where guest registers are; others than forms.HOMES while a template for a loop is made."""
        self.begin(b"", False, None, NOTHING_OPEN)

    def begin(self, data: bytes, live: bool, bounce: dict[int, int] | None, open_: Open) -> None:
        """A new template, for the instruction whose bytes are ``data``; the rest is as for Lowering.template."""
        self.a = Assembler()
        self.data = data
        self.live = live
        self.bounce = bounce
        self.open = open_
        self.keeps = False
        self.is_placed = False
        self.count = 0
        self.checks: list[tuple[int, int, int, int]] = []
        self.on_stack = 0
        """1: the address in r10 was made from RSP; 2: and its page is to be the stack's from now on: something is
        pushed or popped there, or it is a table."""
        self.holes: list[tuple[int, int, int]] = []
        self.copies: list[tuple[int, int, int]] = []

    def finish(self) -> Template:
        open_parts = bool(self.checks or self.holes or self.copies)
        parts = tuple(self.checks), tuple(self.holes), tuple(self.copies)
        return Template(self.a.code(0), *parts, open_parts, self.keeps)

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

    def hole_push(self, what: int = 0) -> None:
        """Push the instruction's offset in its page + ``what``."""
        self.a.raw(b"\x68")
        self.holes.append((len(self.a), HOLE_IP, what))
        self.a.raw(bytes(4))

    def dispatch(self) -> None:
        """Go to the guest address in r10, through the jump cache (runtime.jump_set is the same function)."""
        a = self.a
        if self.bounce is not None:
            a.jmp(state("done_exit"))
        else:
            self.jump(a)

    def jump(self, a: Assembler) -> None:
        """Go to the jump-cache tag in r10."""
        jump_set(a)
        a.jmp(Mem(R11, disp=JC + self.array * JC_ARRAY + 8, gs=True))

    @staticmethod
    def memory_operand(ins: Instruction) -> bool:
        for i in range(ins.op_count):  # noqa: SIM110  (a generator costs as much again, and this is asked often)
            if ins.op_kind(i) == _MEMORY:
                return True
        return False

    @staticmethod
    def size(ins: Instruction) -> int:
        return MemorySizeExt.size(ins.memory_size)

    def _aligned(self, ins: Instruction) -> bool:
        """Whether the instruction checks its operand's alignment, which comes before page faults."""
        m = ins.mnemonic
        if ins.encoding == EncodingKind.VEX:
            return m in VEX_ALIGNED
        return (m in SSE and self.size(ins) == 16 and m not in UNALIGNED) or m == Mnemonic.CMPXCHG16B

    def check(self, size: int, access: int, aligned: bool = False, anywhere: bool = False) -> None:
        """r10: guest address to host address of ``size`` bytes that may be read or written. ``anywhere``: it is never
        #AC."""
        if self.is_placed:
            return
        a = self.a
        number = self.count
        self.count += 1
        if self.bounce is not None and number in self.bounce:
            self.on_stack = 0
            a.mov(R10, state("self_"))
            a.lea(R10, Mem(R10, disp=BOUNCE + number * BOUNCE_SIZE + self.bounce[number]))
            return
        if self.bounce is not None:
            self.on_stack = 0
        if self.aligns and not aligned and not anywhere and size in ALIGNMENT:
            self._aligned_or_leave(ALIGNMENT[size])
        key = (size, bool(access), self.live, self.on_stack > 0)
        known = self._checks.get(key)
        if known is None:
            known = self._checks[key] = self._check_code(*key)
        start = len(a)
        a.raw(known[0])
        descriptor = aligned << 29 | number << 26 | self.array << 24 | access << 22 | size << 12
        self.checks.append((start + known[1], len(a), descriptor, self.live | SAVED_STACK[self.on_stack]))
        self.on_stack = 0

    def _aligned_or_leave(self, alignment: int) -> None:
        """#AC where the address in r10 is no multiple of ``alignment``."""
        a = self.a
        fine = a.label()
        if self.live:
            save_flags(a)
        a.test(R10, alignment - 1, size=32)
        a.jcc(Cond.E, fine)
        if self.live:
            restore_flags(a)
        a.mov(state("va"), R10)
        a.mov(state("info"), Vector.AC)
        self.page_plus(R10, HOLE_IP)
        a.jmp(state("segment_exit"))
        a.bind(fine)
        if self.live:
            restore_flags(a)

    def _check_code(self, size: int, write: bool, live: bool, on_stack: bool = False) -> tuple[bytes, int]:
        """The check, and where the displacement of its way out stands. For the stack it compares with the page that was
        last seen there; the TLB is looked at out of the way (fallback)."""
        a = Assembler()
        base = TLB + self.array * TLB_ARRAY
        if live:
            save_flags(a)
        if on_stack:
            a.mov(R11, R10)
            a.xor(R11, state(f"stack{self.array}_page"))
            a.cmp(R11, 4096 - size)
            a.raw(b"\x0f\x87")
            jump = len(a)
            a.raw(bytes(4))
            a.add(R10, state(f"stack{self.array}_delta"))
            if live:
                restore_flags(a)
            return a.code(0), jump
        self._entry(a)
        a.xor(R10, Mem(R11, disp=base + (TLB_WRITE if write else TLB_READ), gs=True))
        a.cmp(R10, 4096 - size)
        a.raw(b"\x0f\x87")
        jump = len(a)
        a.raw(bytes(4))
        a.add(R10, Mem(R11, disp=base + TLB_HOST, gs=True))
        if live:
            restore_flags(a)
        return a.code(0), jump

    @staticmethod
    def _entry(a: Assembler) -> None:
        """r11 = the offset of the TLB's entry for the address in r10. Flags change."""
        a.rorx(R11, R10, 7, size=32)
        a.and_(R11, TLB_MASK, size=32)

    def fallback(self, size: int, write: bool, moves: bool) -> tuple[bytes, int]:
        """What the stack's check does when the page is another: the TLB's check, and if that succeeds and the page may
        be written it is the stack's from now on where ``moves``. Then the operand's host address is in r10. With it,
        where the displacement of its way out stands; the flags that live are saved, if any."""
        known = self._fallbacks.get((size, write, moves))
        if known is not None:
            return known
        a = Assembler()
        base = TLB + self.array * TLB_ARRAY
        self._entry(a)
        tag, writable = (Mem(R11, disp=base + at, gs=True) for at in (TLB_WRITE if write else TLB_READ, TLB_WRITE))
        a.xor(R10, tag)
        a.cmp(R10, 4096 - size)
        a.raw(b"\x0f\x87")
        jump = len(a)
        a.raw(bytes(4))
        if not moves:
            a.add(R10, Mem(R11, disp=base + TLB_HOST, gs=True))
        else:
            other = a.label()
            a.mov(state("stack_offset"), R10)
            a.mov(R10, tag)
            a.cmp(R10, writable)
            a.mov(R11, Mem(R11, disp=base + TLB_HOST, gs=True))
            a.jcc(Cond.NE, other)
            a.mov(state(f"stack{self.array}_page"), R10)
            a.mov(state(f"stack{self.array}_delta"), R11)
            a.sub(state(f"stack{self.array}_delta"), R10)
            a.bind(other)
            a.mov(R10, state("stack_offset"))
            a.add(R10, R11)
        known = self._fallbacks[size, write, moves] = (a.code(0), jump)
        return known

    def load(self, reg: int, number: int) -> None:
        """``reg`` = a guest register."""
        h = self.homes[number]
        if h is None:
            self.a.mov(reg, gs(number * 8))
        else:
            self.a.mov(reg, Reg(h))

    def address(self, ins: Instruction) -> None:
        """r10 = the linear address of the memory operand. No flag changes."""
        if self.is_placed:
            return
        a = self.a
        base, index = ins.memory_base, ins.memory_index
        disp = ins.memory_displacement
        narrow = not self.wide
        if base == Register.RSP and self.wide and ins.memory_segment not in (Register.FS, Register.GS):
            self.on_stack = 1 if index == Register.NONE else 2
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
            size = RegisterExt.size(base if base != Register.NONE else index)
            narrow = size == 4
            hb, hi = self.parts(*self.memory_registers(ins))
            d = sign_extend(disp & 0xFFFFFFFF, 32)
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

    @staticmethod
    def memory_registers(ins: Instruction) -> tuple[int | None, int | None]:
        """Numbers of a memory operand's base and index."""
        base, index = GPR.get(ins.memory_base), GPR.get(ins.memory_index)
        return None if base is None else base[0], None if index is None else index[0]

    def parts(self, base: int | None, index: int | None) -> tuple[int | None, int | None]:
        """Host registers of a memory operand's base and index, r10 and r11 for those in the state block."""
        found: list[int | None] = []
        for number, temporary in ((base, R10), (index, R11)):
            if number is None:
                found.append(None)
            elif self.homes[number] is None:
                self.a.mov(temporary, gs(number * 8))
                found.append(temporary)
            else:
                found.append(self.homes[number])
        return found[0], found[1]

    def segment(self, ins: Instruction) -> None:
        """Add the segment's base to r10. In 64-bit code only FS and GS have one."""
        seg = ins.memory_segment
        if seg in (Register.FS, Register.GS):
            self.a.mov(R11, state("fs_base" if seg == Register.FS else "gs_base"))
            self.a.lea(R10, Mem(R10, R11))

    def generic(self, ins: Instruction, data: bytes) -> None:
        """An instruction of the allow-list: the same on the host, with its operands where they are here."""
        memory = self.memory_operand(ins)
        registers = [
            (i, ins.op_register(i))
            for i in range(ins.op_count)
            if ins.op_kind(i) == OpKind.REGISTER and ins.op_register(i) in GPR
        ]
        moved = [(i, r) for i, r in registers if self.homes[GPR[r][0]] != GPR[r][0]]
        if not memory and not moved and self.wide:
            if self.open.imm_size:
                self.copies.append((len(self.a) + self.open.imm, self.open.imm, self.open.imm_size))
            self.a.raw(data)
            self.keeps = True
            return
        info = self.info.info(ins)
        if memory:
            if waits(ins):
                self.a.raw(b"\x9b")  # an exception that waits comes before what the operand raises
            self.address(ins)
            self.check(self.size(ins), self._access(info), self._aligned(ins), ins.mnemonic in ANYWHERE)
        self.reencode(ins, registers, memory)

    def _access(self, info: object) -> int:
        access = READ
        for used in info.used_memory():  # type: ignore[attr-defined]
            if used.access in PLAIN_WRITE and access == READ:
                access = WRITE
            elif used.access in WRITES:
                access = READ_WRITE
        return access

    def reencode(self, ins: Instruction, registers: list[tuple[int, Register_]], memory: bool) -> None:
        """Emit ``ins`` with [r10] for its memory operand and host registers for the guest's, or one of those in the
        state block as they are there."""
        a = self.a
        info = self.info.info(ins)
        y = self.moved(ins) if memory else ins.copy()
        if ins.code in MOFFS:
            y.code = MOFFS[ins.code]
        elif ins.code in NARROW_CODES:
            y.code = NARROW_CODES[ins.code]
        in_state = -1 if memory else self._in_state(y, registers, info)
        temporaries = [11] if memory else [11, 10]
        borrowed: list[tuple[int, str]] = []
        place: dict[int, int] = {}
        store: list[tuple[int, int]] = []
        exchange: int | None = None
        rex = memory or any(self.homes[GPR[r][0]] != GPR[r][0] for _, r in registers)
        used = {RegisterExt.full_register(u.register) for u in info.used_registers()}
        replaced = {GPR[r][0] for i, r in registers if info.op_access(i) == OpAccess.WRITE and GPR[r][1] >= 4}
        replaced -= {GPR[r][0] for i, r in registers if info.op_access(i) not in (OpAccess.WRITE, OpAccess.NONE)}
        for i, r in registers:
            number, size = GPR[r]
            access = info.op_access(i)
            if i == in_state:
                y.set_op_kind(i, OpKind.MEMORY)
                y.memory_base = y.memory_index = Register.NONE
                y.memory_index_scale = 1
                y.memory_displacement = number * 8
                y.memory_displ_size = 8
                y.segment_prefix = Register.GS
                continue
            if r in HIGH_BYTES:
                if not rex:
                    continue
                if access == OpAccess.READ:  # AH..DH cannot be named beside a REX prefix
                    t = temporaries.pop(0)
                    a.rorx(t, Reg(number), 8, size=32)
                    y.set_op_register(i, GPR_BY_SIZE[t, 1])
                else:
                    exchange = number
                    y.set_op_register(i, HIGH_BYTES[r])
                continue
            h = self.homes[number]
            if h is not None:
                y.set_op_register(i, GPR_BY_SIZE[h, size])
                continue
            if number not in place:
                if temporaries:
                    t = temporaries.pop(0)
                else:
                    t = self._borrow(used, place)
                    spill = f"t{len(borrowed)}"
                    a.mov(state(spill), Reg(t))
                    borrowed.append((t, spill))
                place[number] = t
                if number not in replaced:
                    a.mov(t, gs(number * 8))
            y.set_op_register(i, GPR_BY_SIZE[place[number], size])
            if access in WRITES and (place[number], number) not in store:
                store.append((place[number], number))
        if exchange is not None:
            a.raw(bytes((0x86, 0xE0 | exchange | exchange << 3)))  # xchg of the register's two low bytes
        self.encoder.encode(y, 0)
        a.raw(self.encoder.take_buffer())
        if self.open.imm_size:  # an immediate is an instruction's end
            self.copies.append((len(a) - self.open.imm_size, self.open.imm, self.open.imm_size))
        self.keeps = self.is_placed or (not memory and 10 in temporaries)
        if exchange is not None:
            a.raw(bytes((0x86, 0xE0 | exchange | exchange << 3)))
        for t, number in store:
            a.mov(gs(number * 8), Reg(t))
        for t, spill in borrowed:
            a.mov(Reg(t), state(spill))

    def _borrow(self, used: set[Register_], place: dict[int, int]) -> int:
        """A host register that an instruction which uses the guest registers ``used`` does not."""
        taken = {self.homes[FULL_REGISTERS[r]] for r in used if r in FULL_REGISTERS} | set(place.values())
        return next(b for b in BORROWED if REGISTERS_64[b] not in used and b not in taken)

    def _in_state(self, y: Instruction, registers: list[tuple[int, Register_]], info: InstructionInfo) -> int:
        """The operand of an instruction without memory operand that can stay in the state block, -1 if none can. ``y``
        becomes the encoding that has memory there. What is narrower is not written there, as a whole register would
        be slow to read behind it, and a write of 32 bits changes 64."""
        if y.mnemonic not in INTEGER or y.mnemonic in ONLY_IN_REGISTERS:
            return -1
        numbers = [GPR[r][0] for _, r in registers]
        for i, r in registers:
            number, size = GPR[r]
            access = info.op_access(i)
            if self.homes[number] is not None or numbers.count(number) > 1:
                continue
            if access != OpAccess.READ and not (access in WRITES and size == 8):
                continue
            if y.op_code().op_kind(i) in OR_MEMORY:
                return i
            if y.code in REVERSED and i == 1:
                y.code = REVERSED[y.code]
                return i
        return -1

    def moved(self, ins: Instruction) -> Instruction:
        """A copy of ``ins`` whose memory operand is [r10], or lies in a range at r10, or in a table there."""
        y = ins.copy()
        y.memory_base = Register.R10
        if not self.is_placed or ins.memory_index not in GPR:
            y.memory_index = Register.NONE
            y.memory_index_scale = 1
        else:
            index = self.homes[GPR[ins.memory_index][0]]
            assert index is not None
            y.memory_index = GPR_BY_SIZE[index, 8]
        y.memory_displacement = PLACE if self.is_placed else 0
        y.memory_displ_size = 8 if self.is_placed else 0
        y.segment_prefix = Register.NONE
        return y

    def at_r10(self, ins: Instruction) -> None:
        self.encoder.encode(self.moved(ins), 0)
        self.a.raw(self.encoder.take_buffer())

    def stack_at(self, disp: int) -> None:
        """r10 = the address ``disp`` bytes from the top of the stack."""
        if self.is_placed:
            return
        self.on_stack = 2
        if disp:
            self.a.lea(R10, Mem(R9, disp=disp))
        else:
            self.a.mov(R10, R9)

    @property
    def operand(self) -> Mem:
        """What is at r10 after a check."""
        return Mem(R10, disp=PLACE) if self.is_placed else Mem(R10)

    def stack_move(self, disp: int) -> None:
        """Move the stack pointer."""
        self.a.lea(R9, Mem(R9, disp=disp))

    def near(self, target: int, at: int, narrow: bool) -> bool:
        """Whether a branch at offset ``at`` to an offset of the same page is certainly that, wherever the page is."""
        return True

    def branch_target(self, size: int) -> None:
        """r10 is where a near branch with an operand of ``size`` bytes goes; nothing is committed yet."""
