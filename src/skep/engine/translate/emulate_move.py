"""Moves to and from segment, control and debug registers; far pointers; questions about selectors."""

from __future__ import annotations

from iced_x86 import Instruction, MemorySizeExt, Mnemonic, OpKind, Register, Register_, RegisterExt

from skep.engine.amd64.registers import Attr, Rflags, SystemType, Vector
from skep.engine.translate import segments
from skep.engine.translate.context import SEGMENT_NAME, Context, Handler
from skep.engine.translate.emulate_system import read_cr, read_dr, require_protected, write_cr, write_dr
from skep.engine.translate.port import GuestFault
from skep.engine.translate.segments import Loaded

_CONTROL = range(Register.CR0, Register.CR15 + 1)
_DEBUG = range(Register.DR0, Register.DR15 + 1)


def mov(e: Context, i: Instruction) -> None:
    to = i.op0_register if i.op0_kind == OpKind.REGISTER else Register.NONE
    source = i.op1_register if i.op1_kind == OpKind.REGISTER else Register.NONE
    if to in _CONTROL:
        write_cr(e, i)
    elif source in _CONTROL:
        read_cr(e, i)
    elif to in _DEBUG:
        write_dr(e, i)
    elif source in _DEBUG:
        read_dr(e, i)
    elif to in SEGMENT_NAME:
        load_register(e, to, e.load(i, 1) & 0xFFFF)
    else:
        _mov_general(e, i, source)


def _mov_general(e: Context, i: Instruction, source: int) -> None:
    """MOV of general registers, memory and immediates, and from a segment register: 16 bits to memory, or to the whole
    of a register."""
    value = e.load(i, 1)
    if source in SEGMENT_NAME and i.op0_kind == OpKind.MEMORY:
        e.write(i, value.to_bytes(2, "little"))
    else:
        e.store(i, 0, value)


def load_register(e: Context, register: Register_, selector: int) -> None:
    """MOV or POP to a segment register: not CS."""
    if register == Register.CS:
        raise GuestFault(Vector.UD)
    name = SEGMENT_NAME[register]
    e.load_segment(name, selector)
    e.shadow = name == "ss"


def load_far_pointer(e: Context, i: Instruction) -> None:
    """LDS, LES, LFS, LGS, LSS."""
    size = RegisterExt.size(i.op0_register)
    raw = e.read(i, size + 2)
    name = _POINTER_SEGMENT[i.mnemonic]
    e.load_segment(name, int.from_bytes(raw[size:], "little"))
    e.put(i.op0_register, int.from_bytes(raw[:size], "little"))


_POINTER_SEGMENT = {
    Mnemonic.LDS: "ds", Mnemonic.LES: "es", Mnemonic.LFS: "fs", Mnemonic.LGS: "gs", Mnemonic.LSS: "ss",
}  # fmt: skip

# LAR and LSL answer for these system descriptors (SDM 2, LAR and LSL); in IA-32e mode no 16-bit ones and no task gates
_LAR_LONG = frozenset((SystemType.LDT, SystemType.TSS, SystemType.TSS_BUSY, SystemType.CALL_GATE))
_LAR_LEGACY = _LAR_LONG | {SystemType.TSS16, SystemType.TSS16_BUSY, SystemType.CALL_GATE16, SystemType.TASK_GATE}
_LSL_LONG = _LAR_LONG - {SystemType.CALL_GATE}
_LSL_LEGACY = _LSL_LONG | {SystemType.TSS16, SystemType.TSS16_BUSY}


def _visible(e: Context, selector: int) -> tuple[Loaded, int] | None:
    """The descriptor and its second word, if the selector names one at all."""
    if segments.is_null(selector):
        return None
    address = segments.in_table(e.cpu, selector)
    if address is None:
        return None
    descriptor = int.from_bytes(e.cpu.read(address, 8, True), "little")
    return segments.unpack(selector, descriptor), descriptor >> 32


def _privileged_enough(e: Context, segment: Loaded) -> bool:
    return segment.conforming or segment.dpl >= max(e.st.cpl, segment.selector & 3)


def _ask(e: Context, i: Instruction, long: frozenset[int], legacy: frozenset[int]) -> tuple[Loaded, int] | None:
    require_protected(e)
    found = _visible(e, e.load(i, 1) & 0xFFFF)
    if found is None or not _privileged_enough(e, found[0]):
        return None
    segment = found[0]
    types = long if segments.long_mode(e.st) else legacy
    if not segment.attributes & Attr.S and segment.attributes & Attr.TYPE not in types:
        return None
    return found


def lar(e: Context, i: Instruction) -> None:
    found = _ask(e, i, _LAR_LONG, _LAR_LEGACY)
    e.set_status(Rflags.ZF if found else 0, Rflags.ZF)
    if found:
        e.put(i.op0_register, found[1] & 0x00F0_FF00)


def lsl(e: Context, i: Instruction) -> None:
    found = _ask(e, i, _LSL_LONG, _LSL_LEGACY)
    e.set_status(Rflags.ZF if found else 0, Rflags.ZF)
    if found:
        e.put(i.op0_register, found[0].limit)


def verify(e: Context, i: Instruction) -> None:
    """VERR, VERW."""
    require_protected(e)
    found = _visible(e, e.load(i, 0) & 0xFFFF)
    good = found is not None and _privileged_enough(e, found[0])
    if found is not None and good:
        good = found[0].readable if i.mnemonic == Mnemonic.VERR else found[0].writable_data
    e.set_status(Rflags.ZF if good else 0, Rflags.ZF)


def arpl(e: Context, i: Instruction) -> None:
    require_protected(e)
    to, rpl = e.load(i, 0), e.load(i, 1) & 3
    lower = to & 3 < rpl
    if lower:
        e.store(i, 0, to & ~3 | rpl)
    e.set_status(Rflags.ZF if lower else 0, Rflags.ZF)


def push(e: Context, i: Instruction) -> None:
    """PUSH of anything, its size from the encoding: a segment register's selector is zero-extended."""
    size = -i.stack_pointer_increment
    e.push((e.load(i, 0) & (1 << 8 * size) - 1).to_bytes(size, "little"))


def pop(e: Context, i: Instruction) -> None:
    """POP of anything. A memory operand's address is taken after the stack pointer has moved."""
    st, size = e.st, i.stack_pointer_increment
    stack = e.stack()
    value = stack.pop(size)
    if i.op0_kind == OpKind.MEMORY:
        before, st.rsp = st.rsp, stack.rsp
        try:
            e.write(i, value.to_bytes(size, "little"))
        except GuestFault:
            st.rsp = before
            raise
        return
    if i.op0_register in SEGMENT_NAME:
        load_register(e, i.op0_register, value & 0xFFFF)
        st.rsp = stack.rsp
    else:
        st.rsp = stack.rsp
        e.put(i.op0_register, value)


def xlat(e: Context, i: Instruction) -> None:
    e.put(Register.AL, e.read(i, MemorySizeExt.size(i.memory_size))[0])


HANDLERS: dict[int, Handler] = {
    Mnemonic.MOV: mov,
    Mnemonic.PUSH: push,
    Mnemonic.POP: pop,
    Mnemonic.LDS: load_far_pointer,
    Mnemonic.LES: load_far_pointer,
    Mnemonic.LFS: load_far_pointer,
    Mnemonic.LGS: load_far_pointer,
    Mnemonic.LSS: load_far_pointer,
    Mnemonic.LAR: lar,
    Mnemonic.LSL: lsl,
    Mnemonic.VERR: verify,
    Mnemonic.VERW: verify,
    Mnemonic.ARPL: arpl,
    Mnemonic.XLATB: xlat,
}
