"""Integer instructions that translated code does not copy: RFLAGS as a whole, stack frames, decimal arithmetic."""

from __future__ import annotations

from iced_x86 import Code, Instruction, Mnemonic, Register, RegisterExt

from skep.engine.amd64.registers import Cr0, Rflags, Vector
from skep.engine.translate import segments
from skep.engine.translate.context import M32, MASK, RBP, Context, Handler
from skep.engine.translate.port import GuestFault
from skep.engine.translate.segments import check_alignment

_FRAME_SIZE = {
    Code.ENTERW_IMM16_IMM8: 2, Code.ENTERD_IMM16_IMM8: 4, Code.ENTERQ_IMM16_IMM8: 8,
    Code.LEAVEW: 2, Code.LEAVED: 4, Code.LEAVEQ: 8,
    Code.RETNW: 2, Code.RETND: 4, Code.RETNQ: 8,
    Code.RETNW_IMM16: 2, Code.RETND_IMM16: 4, Code.RETNQ_IMM16: 8,
}  # fmt: skip


def result_flags(value: int, size: int) -> int:
    """PF, ZF and SF of a result of ``size`` bytes."""
    flags = 0 if (value & 0xFF).bit_count() & 1 else Rflags.PF
    if not value & MASK[size]:
        flags |= Rflags.ZF
    return flags | (Rflags.SF if value >> 8 * size - 1 & 1 else 0)


def subtract_flags(left: int, right: int, size: int) -> int:
    """All six status flags of ``left`` - ``right``, as CMP sets them."""
    value = left - right & MASK[size]
    flags = result_flags(value, size)
    if left < right:
        flags |= Rflags.CF
    if (left ^ right ^ value) & 0x10:
        flags |= Rflags.AF
    if (left ^ right) & (left ^ value) & 1 << 8 * size - 1:
        flags |= Rflags.OF
    return flags


# RFLAGS


def require_virtual_iopl(e: Context) -> None:
    """PUSHF, POPF, INT n and IRET look at IOPL in virtual-8086 mode only (SDM 3, 21.2.7)."""
    if e.st.sysfl & Rflags.VM and e.iopl < 3:
        raise GuestFault(Vector.GP, 0)


def pushf(e: Context, i: Instruction) -> None:
    require_virtual_iopl(e)
    size = -i.stack_pointer_increment
    flags = e.st.rflags & ~(Rflags.VM | Rflags.RF)
    e.push((flags & MASK[size]).to_bytes(size, "little"))


def popf(e: Context, i: Instruction) -> None:
    """At privilege 0 all but VM, VIF and VIP; IOPL only there; IF where CPL <= IOPL. Others stay without a fault."""
    require_virtual_iopl(e)
    st, size = e.st, i.stack_pointer_increment
    stack = e.stack()
    value = stack.pop(size)
    changed = Rflags.STATUS | Rflags.TF | Rflags.DF | Rflags.NT
    if size > 2:
        changed |= Rflags.AC | Rflags.ID
    if not st.cpl:
        changed |= Rflags.IOPL
    if st.cpl <= e.iopl or not st.cr0 & Cr0.PE:
        changed |= Rflags.IF
    before = st.rflags
    st.rsp = stack.rsp
    st.rflags = before & ~changed | value & changed
    if (before ^ st.rflags) & (Rflags.AC | Rflags.TF):
        e.cpu.state_changed()


def lahf(e: Context, i: Instruction) -> None:
    e.put(Register.AH, e.st.rflags & 0xFF)


def sahf(e: Context, i: Instruction) -> None:
    mask = Rflags.STATUS & ~Rflags.OF
    e.set_status(e.get(Register.AH), mask)


# Stack frames


def enter(e: Context, i: Instruction) -> None:
    """Every access is tried, in order, before the first word is stored; then the words go one by one, as one pushed may
    be the next one read."""
    st, size = e.st, _FRAME_SIZE[i.code]
    allocated, level = i.immediate16, i.immediate8_2nd & 31
    mask = e.stack_mask
    frame = st.rsp - size & mask
    sources, targets = [], []
    for n in range(level + 1):
        if 0 < n < level:
            sources.append(e.linear("ss", st.q[RBP] - n * size & mask, size))
            check_alignment(st, sources[-1], size)
            e.cpu.read(sources[-1], size)
        targets.append(e.linear("ss", frame - n * size & mask, size, write=True))
        check_alignment(st, targets[-1], size)
        e.cpu.check_write(targets[-1], size)
    below = frame - level * size - allocated & mask
    e.cpu.check_write(e.linear("ss", below, size, write=True), size)
    e.cpu.write(targets[0], (st.q[RBP] & MASK[size]).to_bytes(size, "little"))
    for source, target in zip(sources, targets[1:], strict=False):
        e.cpu.write(target, e.cpu.read(source, size))
    if level:
        e.cpu.write(targets[-1], (frame & MASK[size]).to_bytes(size, "little"))
    st.rsp = st.rsp & ~mask | below
    e.put_number(RBP, size, frame)


def leave(e: Context, i: Instruction) -> None:
    st, size = e.st, _FRAME_SIZE[i.code]
    mask = e.stack_mask
    stack = e.stack()
    stack.rsp = st.rsp & ~mask | st.q[RBP] & mask
    value = stack.pop(size)
    st.rsp = stack.rsp
    e.put_number(RBP, size, value)


def ret(e: Context, i: Instruction) -> None:
    stack = e.stack()
    target = stack.pop(_FRAME_SIZE[i.code])
    segments.check_code_target(e.cpu, segments.held(e.st, "cs"), target)
    stack.skip(i.immediate16 if i.op_count else 0)
    e.st.rsp = stack.rsp
    e.next_rip = target


def pusha(e: Context, i: Instruction) -> None:
    """Eight pushes, tried in order before the first is done."""
    st, mask, size = e.st, e.stack_mask, -i.stack_pointer_increment // 8
    places = []
    for n in range(8):
        places.append(e.linear("ss", st.rsp - (n + 1) * size & mask, size, write=True))
        check_alignment(st, places[-1], size)
        e.cpu.check_write(places[-1], size)
    for n, address in enumerate(places):
        e.cpu.write(address, (st.q[n] & MASK[size]).to_bytes(size, "little"))
    st.rsp = st.rsp & ~mask | st.rsp - 8 * size & mask


def popa(e: Context, i: Instruction) -> None:
    size = i.stack_pointer_increment // 8
    stack = e.stack()
    values = [stack.pop(size) for _ in range(8)]
    e.st.rsp = stack.rsp
    for number, value in zip(reversed(range(8)), values, strict=True):
        if number != 4:  # the saved stack pointer is skipped
            e.put_number(number, size, value)


def bound(e: Context, i: Instruction) -> None:
    """The upper bound is only read where the lower one is kept."""
    size = RegisterExt.size(i.op0_register)
    address = e.address(i, 2 * size)
    check_alignment(e.st, address, size)
    index = _signed(e.get(i.op0_register), size)
    if index < int.from_bytes(e.cpu.read(address, size), "little", signed=True):
        raise GuestFault(Vector.BR)
    if index > int.from_bytes(e.cpu.read(address + size & M32, size), "little", signed=True):
        raise GuestFault(Vector.BR)


def _signed(value: int, size: int) -> int:
    return value - (1 << 8 * size) if value >> 8 * size - 1 else value


# Decimal arithmetic (SDM 2, DAA to AAD). The flags that the manual leaves undefined are cleared.


def daa(e: Context, i: Instruction) -> None:
    _decimal_adjust(e, 1)


def das(e: Context, i: Instruction) -> None:
    _decimal_adjust(e, -1)


def _decimal_adjust(e: Context, sign: int) -> None:
    old, carry = e.get(Register.AL), e.st.flags & Rflags.CF
    value, flags = old, 0
    if old & 0xF > 9 or e.st.flags & Rflags.AF:
        value += 6 * sign
        flags |= Rflags.AF
        if carry or (sign < 0 and value < 0):
            flags |= Rflags.CF
    if old > 0x99 or carry:
        value += 0x60 * sign
        flags |= Rflags.CF
    value &= 0xFF
    e.put(Register.AL, value)
    e.set_status(flags | result_flags(value, 1))


def aaa(e: Context, i: Instruction) -> None:
    _ascii_adjust(e, 1)


def aas(e: Context, i: Instruction) -> None:
    _ascii_adjust(e, -1)


def _ascii_adjust(e: Context, sign: int) -> None:
    ax = e.get(Register.AX)
    flags = 0
    if ax & 0xF > 9 or e.st.flags & Rflags.AF:
        ax += 0x106 * sign
        flags = Rflags.AF | Rflags.CF
    ax &= 0xFF0F
    e.put(Register.AX, ax)
    e.set_status(flags | result_flags(ax & 0xFF, 1))


def aam(e: Context, i: Instruction) -> None:
    if not i.immediate8:
        raise GuestFault(Vector.DE)
    high, low = divmod(e.get(Register.AL), i.immediate8)
    e.put(Register.AX, high << 8 | low)
    e.set_status(result_flags(low, 1))


def aad(e: Context, i: Instruction) -> None:
    value = e.get(Register.AL) + e.get(Register.AH) * i.immediate8 & 0xFF
    e.put(Register.AX, value)
    e.set_status(result_flags(value, 1))


def salc(e: Context, i: Instruction) -> None:
    e.put(Register.AL, 0xFF if e.st.flags & Rflags.CF else 0)


HANDLERS: dict[int, Handler] = {
    Mnemonic.PUSHF: pushf,
    Mnemonic.PUSHFD: pushf,
    Mnemonic.PUSHFQ: pushf,
    Mnemonic.POPF: popf,
    Mnemonic.POPFD: popf,
    Mnemonic.POPFQ: popf,
    Mnemonic.LAHF: lahf,
    Mnemonic.SAHF: sahf,
    Mnemonic.ENTER: enter,
    Mnemonic.LEAVE: leave,
    Mnemonic.RET: ret,
    Mnemonic.PUSHA: pusha,
    Mnemonic.PUSHAD: pusha,
    Mnemonic.POPA: popa,
    Mnemonic.POPAD: popa,
    Mnemonic.BOUND: bound,
    Mnemonic.DAA: daa,
    Mnemonic.DAS: das,
    Mnemonic.AAA: aaa,
    Mnemonic.AAS: aas,
    Mnemonic.AAM: aam,
    Mnemonic.AAD: aad,
    Mnemonic.SALC: salc,
}
