"""What the emulation of an instruction works with: registers, operands, addresses, the stack.

Methods that touch memory may raise GuestFault; an instruction calls them before it commits anything.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import CodeSize, Instruction, MemorySizeExt, OpKind, Register, Register_, RegisterExt

from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace
from skep.engine.amd64.cpuid import Cpuid
from skep.engine.amd64.registers import Attr, Rflags, Vector, canonical
from skep.engine.translate import segments
from skep.engine.translate.delivery import Stack
from skep.engine.translate.layout import SEGMENTS, XSAVE_AREA, StateBlock
from skep.engine.translate.modelspecific import ModelSpecific
from skep.engine.translate.port import CpuPort, GuestFault

M64 = 0xFFFF_FFFF_FFFF_FFFF
M32 = 0xFFFF_FFFF
MASK = {1: 0xFF, 2: 0xFFFF, 4: M32, 8: M64}

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)


def _general() -> dict[Register_, tuple[int, int, int]]:
    """iced register -> (number, size in bytes, shift: 8 for AH to DH)."""
    table = {}
    high = (Register.AH, Register.CH, Register.DH, Register.BH)
    for name in dir(Register):
        register = getattr(Register, name)
        if not name.isupper() or not RegisterExt.is_gpr(register):
            continue
        number = RegisterExt.number(RegisterExt.full_register(register))
        table[register] = (number, RegisterExt.size(register), 8 if register in high else 0)
    return table


GENERAL = _general()
SEGMENT_NAME = {getattr(Register, name.upper()): name for name in SEGMENTS}

_STACK_BASES = (Register.RSP, Register.RBP, Register.ESP, Register.EBP)
_IMMEDIATES = frozenset(getattr(OpKind, name) for name in dir(OpKind) if name.startswith("IMMEDIATE"))
_STRING_INDEX = {
    OpKind.MEMORY_SEG_SI: (RSI, 2), OpKind.MEMORY_SEG_ESI: (RSI, 4), OpKind.MEMORY_SEG_RSI: (RSI, 8),
    OpKind.MEMORY_SEG_DI: (RDI, 2), OpKind.MEMORY_SEG_EDI: (RDI, 4), OpKind.MEMORY_SEG_RDI: (RDI, 8),
    OpKind.MEMORY_ESDI: (RDI, 2), OpKind.MEMORY_ESEDI: (RDI, 4), OpKind.MEMORY_ESRDI: (RDI, 8),
}  # fmt: skip

XSTATE_BV = XSAVE_AREA + 512
XMM = XSAVE_AREA + 160
YMM_HIGH = XSAVE_AREA + 576
MMX = XSAVE_AREA + 32
FSW, FTW = XSAVE_AREA + 2, XSAVE_AREA + 4
X87_INITIAL = (0x37F).to_bytes(24, "little")


def operand_segment(i: Instruction) -> Register_:
    """The segment of a memory operand. In 64-bit code prefixes for ES, CS, SS and DS say nothing: RSP and RBP as the
    base mean SS, all else DS (SDM 1, 3.7.4)."""
    if i.code_size == CodeSize.CODE64 and i.memory_segment not in (Register.FS, Register.GS):
        return Register.SS if i.memory_base in _STACK_BASES else Register.DS
    return i.memory_segment if i.memory_segment != Register.NONE else Register.DS


class Context:
    """One instruction's view of its vCPU."""

    def __init__(self, cpu: CpuPort, cpuid: Cpuid, msrs: ModelSpecific) -> None:
        self.cpu = cpu
        self.cpuid = cpuid
        self.msrs = msrs
        self.st: StateBlock = cpu.st
        self.io: IoSpace = cpu.io
        self.interrupts: LocalInterrupts = cpu.interrupts
        self.bits = 64
        """Default size of the current code: 16, 32 or 64."""
        self.next_rip = 0
        """Where the guest goes on; an instruction that jumps sets it."""
        self.halted = False
        self.entered = False
        """An instruction went to a handler or to the kernel: it ends a single step only if TF is still set there."""
        self.shadow = False
        """The instruction holds off interrupts until after the next one (STI, MOV SS, POP SS)."""

    # Registers

    def get(self, register: Register_) -> int:
        """A general register of any size, or a segment register's selector."""
        entry = GENERAL.get(register)
        if entry is None:
            selector: int = getattr(self.st, f"{SEGMENT_NAME[register]}_sel")
            return selector
        number, size, shift = entry
        return self.st.q[number] >> shift & MASK[size]

    def put(self, register: Register_, value: int) -> None:
        """As the CPU writes it: a 32-bit result clears the upper half, smaller ones keep the rest."""
        number, size, shift = GENERAL[register]
        self.put_number(number, size, value, shift)

    def put_number(self, number: int, size: int, value: int, shift: int = 0) -> None:
        q = self.st.q
        if size >= 4:
            q[number] = value & MASK[size]
        else:
            mask = MASK[size] << shift
            q[number] = q[number] & ~mask | (value << shift) & mask

    def operand_size(self, i: Instruction, operand: int) -> int:
        """In bytes."""
        if i.op_kind(operand) == OpKind.REGISTER:
            return RegisterExt.size(i.op_register(operand))
        return MemorySizeExt.size(i.memory_size)

    def load(self, i: Instruction, operand: int) -> int:
        """An operand's value: register, memory or immediate."""
        kind = i.op_kind(operand)
        if kind == OpKind.REGISTER:
            return self.get(i.op_register(operand))
        if kind in _IMMEDIATES:
            return i.immediate(operand)
        return int.from_bytes(self.read(i, MemorySizeExt.size(i.memory_size)), "little")

    def store(self, i: Instruction, operand: int, value: int) -> None:
        """To a register or to memory, cut to the operand's size."""
        if i.op_kind(operand) == OpKind.REGISTER:
            self.put(i.op_register(operand), value)
        else:
            size = MemorySizeExt.size(i.memory_size)
            self.write(i, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def load_segment(self, name: str, selector: int) -> None:
        """A load of any segment register but CS, with all checks."""
        segments.put(self.st, name, segments.check_register(self.cpu, name, selector))
        if self.bits != 64:
            self.cpu.state_changed()

    # Memory operands

    def address_size(self, i: Instruction) -> int:
        """The size in bytes of the effective address of the memory operand."""
        for register in (i.memory_base, i.memory_index):
            if register in (Register.RIP, Register.EIP):
                return 8 if register == Register.RIP else 4
            if register in GENERAL:
                return GENERAL[register][1]
        return i.memory_displ_size or self.bits // 8

    def offset(self, i: Instruction) -> int:
        """The effective address of the memory operand, before segmentation."""
        value = i.memory_displacement  # RIP-relative: iced has added rip
        base, index = i.memory_base, i.memory_index
        if base in GENERAL:
            value += self.get(base)
        if index in GENERAL:  # AL, for XLAT
            value += self.get(index) * i.memory_index_scale
        return value & MASK[self.address_size(i)]

    def linear(self, segment: str, offset: int, size: int, *, write: bool = False) -> int:
        """The linear address of ``size`` bytes in a segment, with the checks of the mode.

        Outside 64-bit mode a null segment, an offset past the limit, a store to code or read-only data fault (SDM 3,
        5.3 and 5.5). Inside an access the offset wraps only where the segment has all 4 GiB.
        """
        st = self.st
        vector = Vector.SS if segment == "ss" else Vector.GP
        if self.bits == 64:
            if segment in ("fs", "gs"):
                offset = offset + getattr(st, f"{segment}_base") & M64
            if not canonical(offset):
                raise GuestFault(vector, 0)
            return offset
        held = segments.held(st, segment)
        start, *ends = segments.window(held, rights=not segments.paragraphs(st))
        end = ends[write]
        if offset < start or (offset + size > end and end <= M32):
            raise GuestFault(vector, 0)
        return held.base + offset & M32

    def address(self, i: Instruction, size: int, *, write: bool = False, plus: int = 0) -> int:
        """The linear address of the memory operand, ``plus`` bytes further on."""
        offset = self.offset(i) + plus & MASK[self.address_size(i)]
        return self.linear(SEGMENT_NAME[operand_segment(i)], offset, size, write=write)

    def read(self, i: Instruction, size: int) -> bytes:
        address = self.address(i, size)
        segments.check_alignment(self.st, address, size)
        return self.cpu.read(address, size)

    def write(self, i: Instruction, data: bytes) -> None:
        address = self.address(i, len(data), write=True)
        segments.check_alignment(self.st, address, len(data))
        self.cpu.write(address, data)

    def string_index(self, i: Instruction, operand: int) -> tuple[int, int]:
        """(register number, address size) of a string operand."""
        return _STRING_INDEX[i.op_kind(operand)]

    # Stack

    def stack(self) -> Stack:
        """Pops in the making; commit them with ``st.rsp = stack.rsp``."""
        return Stack(self.cpu)

    @property
    def stack_mask(self) -> int:
        """What part of RSP the stack uses: by the mode, or by SS.B."""
        if self.bits == 64:
            return M64
        return M32 if self.st.ss_attr & Attr.D else 0xFFFF

    def push(self, data: bytes, size: int = 0) -> None:
        """Store ``data`` below the stack pointer and move it: one push, or several of ``size`` bytes as one."""
        st, mask = self.st, self.stack_mask
        below = st.rsp - len(data) & mask
        address = self.linear("ss", below, len(data), write=True)
        segments.check_alignment(st, address, size or len(data))
        self.cpu.write(address, data)
        st.rsp = st.rsp & ~mask | below

    # Checks and flags

    def require_cpl0(self) -> None:
        if self.st.cpl:
            raise GuestFault(Vector.GP, 0)

    @property
    def iopl(self) -> int:
        return self.st.sysfl >> Rflags.IOPL_SHIFT & 3

    def set_status(self, value: int, mask: int = Rflags.STATUS) -> None:
        """Write those of CF, PF, AF, ZF, SF, OF that are in ``mask``."""
        st = self.st
        st.flags = st.flags & ~mask | value & mask

    # Vector registers, in the XSAVE area

    def touch_state(self, component: int) -> None:
        """Bring a state component into use: an area that is in its initial configuration may hold anything."""
        area = self.st.bytes
        (present,) = area[XSTATE_BV : XSTATE_BV + 8].cast("Q")
        if present & component:
            return
        if component == 1:
            area[XSAVE_AREA : XSAVE_AREA + 24] = X87_INITIAL
            area[MMX : MMX + 128] = bytes(128)
        elif component == 2:
            area[XMM : XMM + 256] = bytes(256)
        elif component == 4:
            area[YMM_HIGH : YMM_HIGH + 256] = bytes(256)
        area[XSTATE_BV : XSTATE_BV + 8].cast("Q")[0] = present | component

    def get_vector(self, register: Register_) -> bytes:
        """An XMM (16 bytes) or YMM (32 bytes) register."""
        return self.get_ymm(RegisterExt.number(register))[: RegisterExt.size(register)]

    def get_ymm(self, number: int) -> bytes:
        """All of a vector register."""
        area = self.st.bytes
        self.touch_state(2)
        self.touch_state(4)
        at = 16 * number
        return bytes(area[XMM + at : XMM + at + 16]) + bytes(area[YMM_HIGH + at : YMM_HIGH + at + 16])

    def get_mmx(self, number: int) -> bytes:
        self.touch_state(1)
        slot = MMX + 16 * (number - self._top & 7)  # the image is in stack order
        return bytes(self.st.bytes[slot : slot + 8])

    @property
    def _top(self) -> int:
        return self.st.bytes[FSW + 1] >> 3 & 7

    def enter_mmx(self) -> None:
        """What every MMX instruction but EMMS does: all x87 registers valid, top of stack 0 (SDM 1, 9.5.1). Before it
        comes #MF for an x87 exception that waits."""
        area = self.st.bytes
        if area[FSW] & 0x80:
            raise GuestFault(Vector.MF)
        top = self._top
        slots = bytes(area[MMX : MMX + 128])
        at = -16 * top % 128
        area[MMX : MMX + 128] = slots[at:] + slots[:at]
        area[FTW] = 0xFF
        area[FSW + 1] &= ~0x38 & 0xFF

    def put_vector(self, register: Register_, data: bytes) -> None:
        """As a VEX instruction does: the part above ``data`` becomes zero."""
        area, number = self.st.bytes, RegisterExt.number(register)
        self.touch_state(2)
        self.touch_state(4)
        data = data.ljust(32, b"\0")
        area[XMM + 16 * number : XMM + 16 * number + 16] = data[:16]
        area[YMM_HIGH + 16 * number : YMM_HIGH + 16 * number + 16] = data[16:]


Handler = Callable[[Context, Instruction], None]
"""Executes one instruction, or raises GuestFault with nothing committed."""
