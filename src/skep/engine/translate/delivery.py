"""Exceptions and interrupts into the guest, and IRET out of them (Intel SDM 3, chapter 6; SDM 2, INT n and IRET).

Machine code does the common cases by itself; here are all of them: IA-32e mode (64-bit gates, IST, from 64-bit and
compatibility mode), 32-bit protected mode (16- and 32-bit gates, inner stacks, task gates, from and to virtual-8086
mode), real mode. Nothing is committed before
every check has passed and every word is pushed, so a fault in delivery leaves the state of the first event.

What blocks NMIs until IRET is the caller's business.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from skep.engine.amd64.registers import Attr, Cr0, Rflags, SystemType, Vector, canonical
from skep.engine.translate import segments, tasks
from skep.engine.translate.layout import StateBlock
from skep.engine.translate.port import CpuPort, GuestFault, TripleFault
from skep.engine.translate.segments import Loaded

CONTRIBUTORY = frozenset((Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP))
M64 = 0xFFFF_FFFF_FFFF_FFFF
M32 = 0xFFFF_FFFF
PACK = {2: "<H", 4: "<I", 8: "<Q"}


@dataclass(frozen=True, slots=True)
class Event:
    """Something to be delivered through the IDT."""

    vector: int
    error: int | None = None
    return_rip: int | None = None
    """Where IRET goes on; None is rip as it stands."""
    software: bool = False
    """INT n, INT3, INTO: the gate's DPL counts, and faults on the way are not external."""
    resume: bool = False
    """The saved RFLAGS have RF set, as for faults."""

    @property
    def ext(self) -> int:
        """The EXT bit of error codes that arise on the way."""
        return 0 if self.software else 1


def deliver_exception(cpu: CpuPort, fault: GuestFault) -> None:
    """Deliver a fault at rip, with double and triple faults by SDM 3, table 6-5."""
    resume = fault.vector not in (Vector.DB, Vector.BP, Vector.OF)
    _deliver_nesting(cpu, Event(fault.vector, fault.error, resume=resume), fault)


def deliver_interrupt(cpu: CpuPort, vector: int) -> None:
    """Deliver an external interrupt (the caller has looked at IF) or an NMI between two instructions."""
    _deliver_nesting(cpu, Event(vector), None)


def software_interrupt(cpu: CpuPort, vector: int, next_rip: int) -> None:
    """INT n, INT3 and INTO: what faults on the way is raised, and belongs to the instruction."""
    _deliver_once(cpu, Event(vector, return_rip=next_rip, software=True))


def trap(cpu: CpuPort, vector: int, next_rip: int) -> None:
    """INT1: a #DB by instruction, which is neither a fault nor a software interrupt (its gate's DPL does not count)."""
    _deliver_nesting(cpu, Event(vector, return_rip=next_rip), None)


def _deliver_nesting(cpu: CpuPort, event: Event, first: GuestFault | None) -> None:
    faults = [] if first is None else [first]
    while True:
        if first is not None and first.vector == Vector.PF:
            cpu.st.cr2 = first.address or 0
        try:
            _deliver_once(cpu, event)
            return
        except GuestFault as second:
            if first is not None and first.vector == Vector.DF:
                raise TripleFault(faults) from second
            if second.vector == Vector.PF:
                cpu.st.cr2 = second.address or 0
            if first is not None and _doubles(first.vector, second.vector):
                second = GuestFault(Vector.DF, 0)
            first = second
            faults.append(first)
            event = Event(second.vector, second.error, resume=True)


def _doubles(first: int, second: int) -> bool:
    if first == Vector.PF:
        return second == Vector.PF or second in CONTRIBUTORY
    return first in CONTRIBUTORY and second in CONTRIBUTORY


def _deliver_once(cpu: CpuPort, event: Event) -> None:
    st = cpu.st
    if segments.long_mode(st):
        _deliver_long(cpu, event)
    elif st.cr0 & Cr0.PE:
        _deliver_protected(cpu, event)
    else:
        _deliver_real(cpu, event)
    cpu.state_changed()


def _saved_flags(st: StateBlock, event: Event) -> int:
    return st.rflags | Rflags.RF if event.resume else st.rflags & ~Rflags.RF


def _return_rip(st: StateBlock, event: Event) -> int:
    return st.rip if event.return_rip is None else event.return_rip


def _enter_flags(st: StateBlock, interrupt_gate: bool) -> None:
    cleared = Rflags.TF | Rflags.NT | Rflags.RF | Rflags.VM | (Rflags.IF if interrupt_gate else 0)
    st.rflags = st.rflags & ~cleared


def _gate_target(cpu: CpuPort, selector: int, ext: int) -> tuple[Loaded, int]:
    """The code segment that a gate names and the privilege its handler runs at."""
    st = cpu.st
    if segments.is_null(selector):
        raise GuestFault(Vector.GP, ext)
    code = segments.fetch(cpu, selector, Vector.GP, ext)
    error = selector & 0xFFFC | ext
    wrong_size = segments.long_mode(st) and code.attributes & (Attr.L | Attr.D) != Attr.L
    if not code.is_code or code.dpl > st.cpl or wrong_size:
        raise GuestFault(Vector.GP, error)
    if not code.present:
        raise GuestFault(Vector.NP, error)
    return code, st.cpl if code.conforming else code.dpl


def push_all(cpu: CpuPort, address: int, words: list[int], size: int, cpl: int) -> None:
    """Store ``words``, the first pushed first, so that they end below ``address``, at the new privilege."""
    data = b"".join(struct.pack(PACK[size], word & ((1 << 8 * size) - 1)) for word in reversed(words))
    cpu.write(address, data, cpl < 3)


def _deliver_long(cpu: CpuPort, event: Event) -> None:
    st, vector, ext = cpu.st, event.vector, event.ext
    idt_error = vector << 3 | 2 | ext
    if 16 * vector + 15 > st.idt_limit:
        raise GuestFault(Vector.GP, idt_error)
    low, high = struct.unpack("<QQ", cpu.read(st.idt_base + 16 * vector & M64, 16, True))
    kind, gate_dpl, ist = low >> 40 & 0x1F, low >> 45 & 3, low >> 32 & 7
    if kind not in (SystemType.INTERRUPT_GATE, SystemType.TRAP_GATE) or high >> 40 & 0x1F:
        raise GuestFault(Vector.GP, idt_error)
    if event.software and gate_dpl < st.cpl:
        raise GuestFault(Vector.GP, idt_error)
    if not low >> 47 & 1:
        raise GuestFault(Vector.NP, idt_error)
    code, cpl = _gate_target(cpu, low >> 16 & 0xFFFF, ext)
    offset = (low & 0xFFFF) | (low >> 32 & 0xFFFF_0000) | (high & M32) << 32
    if ist or cpl != st.cpl:
        rsp = task_stack_long(cpu, 36 + 8 * (ist - 1) if ist else 4 + 8 * cpl, ext)
    else:
        rsp = st.rsp
        if not canonical(rsp):
            raise GuestFault(Vector.SS, ext)
    if not canonical(offset):
        raise GuestFault(Vector.GP, ext)
    words = [st.ss_sel, st.rsp, _saved_flags(st, event), st.cs_sel, _return_rip(st, event)]
    if event.error is not None:
        words.append(event.error)
    rsp = ((rsp & ~0xF) - 8 * len(words)) & M64
    segments.mark_accessed(cpu, code)
    push_all(cpu, rsp, words, 8, cpl)
    if cpl != st.cpl:
        segments.put(st, "ss", segments.null(cpl, cpl))
    segments.put(st, "cs", code.with_rpl(cpl))
    st.rsp, st.rip, st.cpl = rsp, offset, cpl
    _enter_flags(st, kind == SystemType.INTERRUPT_GATE)


def task_stack_long(cpu: CpuPort, at: int, ext: int) -> int:
    """RSP0-2 or IST1-7 from the 64-bit TSS."""
    st = cpu.st
    if at + 7 > st.tr_limit:
        raise GuestFault(Vector.TS, st.tr_sel & 0xFFFC | ext)
    rsp = int.from_bytes(cpu.read(st.tr_base + at & M64, 8, True), "little")
    if not canonical(rsp):
        raise GuestFault(Vector.SS, ext)
    return rsp


def _deliver_protected(cpu: CpuPort, event: Event) -> None:
    st, vector, ext = cpu.st, event.vector, event.ext
    idt_error = vector << 3 | 2 | ext
    if 8 * vector + 7 > st.idt_limit:
        raise GuestFault(Vector.GP, idt_error)
    gate = int.from_bytes(cpu.read(st.idt_base + 8 * vector & M32, 8, True), "little")
    kind = gate >> 40 & 0x1F
    if kind & ~8 not in (SystemType.INTERRUPT_GATE16, SystemType.TRAP_GATE16) and kind != SystemType.TASK_GATE:
        raise GuestFault(Vector.GP, idt_error)
    if event.software and gate >> 45 & 3 < st.cpl:
        raise GuestFault(Vector.GP, idt_error)
    if not gate >> 47 & 1:
        raise GuestFault(Vector.NP, idt_error)
    if kind == SystemType.TASK_GATE:
        _switch_task(cpu, gate >> 16 & 0xFFFF, event)
        return
    size = 4 if kind & 8 else 2
    code, cpl = _gate_target(cpu, gate >> 16 & 0xFFFF, ext)
    offset = gate & 0xFFFF
    if size == 4:
        offset |= gate >> 32 & 0xFFFF_0000
    virtual = bool(st.sysfl & Rflags.VM)
    if virtual and cpl:  # the handler has to be the supervisor's
        raise GuestFault(Vector.GP, code.selector & 0xFFFC | ext)
    words = [_saved_flags(st, event), st.cs_sel, _return_rip(st, event)]
    if event.error is not None:
        words.append(event.error)
    if cpl != st.cpl:
        stack, esp = task_stack_protected(cpu, cpl, ext)
        words = [st.ss_sel, st.rsp, *words]
        if virtual:
            words = [st.gs_sel, st.fs_sel, st.ds_sel, st.es_sel, *words]
    else:
        stack, esp = segments.held(st, "ss"), st.rsp
    mask = M32 if stack.attributes & Attr.D else 0xFFFF
    below = (esp - size * len(words)) & mask
    in_limit(stack, below, size * len(words), stack.selector & 0xFFFC | ext if cpl != st.cpl else ext)
    segments.check_code_target(cpu, code, offset, ext)
    if cpl != st.cpl:
        segments.mark_accessed(cpu, stack)
    segments.mark_accessed(cpu, code)
    push_all(cpu, (stack.base + below) & M32, words, size, cpl)
    if cpl != st.cpl:
        segments.put(st, "ss", stack)
    if virtual:
        for name in ("ds", "es", "fs", "gs"):
            segments.put(st, name, segments.null(0))
    segments.put(st, "cs", code.with_rpl(cpl))
    st.rsp, st.rip, st.cpl = (esp & ~mask & M32) | below, offset, cpl
    _enter_flags(st, not kind & 1)


def _switch_task(cpu: CpuPort, selector: int, event: Event) -> None:
    """Through a task gate: the handler is a task, which finds the error code on its stack."""
    st = cpu.st
    tasks.switch(
        cpu, selector, tasks.By.CALL, _return_rip(st, event), flags=_saved_flags(st, event), ext=event.ext
    )
    if event.error is not None:
        size = 4 if st.tr_attr & 8 else 2
        stack = segments.held(st, "ss")
        mask = M32 if stack.attributes & Attr.D else 0xFFFF
        below = st.rsp - size & mask
        in_limit(stack, below, size, event.ext)
        push_all(cpu, stack.base + below & M32, [event.error], size, st.cpl)
        st.rsp = st.rsp & ~mask & M32 | below


def task_stack_protected(cpu: CpuPort, cpl: int, ext: int) -> tuple[Loaded, int]:
    """SS0-2 and ESP0-2 (SP0-2) from the TSS."""
    st = cpu.st
    wide = st.tr_attr & 8
    at, size = (4 + 8 * cpl, 4) if wide else (2 + 4 * cpl, 2)
    if at + size + 1 > st.tr_limit:
        raise GuestFault(Vector.TS, st.tr_sel & 0xFFFC | ext)
    raw = cpu.read(st.tr_base + at & M32, size + 2, True)
    selector = int.from_bytes(raw[size:], "little")
    stack = segments.check_stack(cpu, selector, cpl, wide=False, vector=Vector.TS, ext=ext)
    return stack, int.from_bytes(raw[:size], "little")


def in_limit(segment: Loaded, offset: int, size: int, error: int = 0, vector: int = Vector.SS) -> None:
    """The limit check of a segment outside 64-bit mode, expand-down ones included."""
    end = offset + size - 1
    if segment.is_data and segment.attributes & Attr.EXPAND_DOWN:
        top = M32 if segment.attributes & Attr.D else 0xFFFF
        inside = offset > segment.limit and end <= top
    else:
        inside = end <= segment.limit or segment.limit == segments.FLAT  # where it goes on at 0
    if not inside:
        raise GuestFault(vector, error)


def _deliver_real(cpu: CpuPort, event: Event) -> None:
    st = cpu.st
    if 4 * event.vector + 3 > st.idt_limit:
        raise GuestFault(Vector.GP)
    ip, cs = struct.unpack("<HH", cpu.read(st.idt_base + 4 * event.vector & M32, 4, True))
    below = (st.rsp - 6) & 0xFFFF
    words = [st.rflags, st.cs_sel, _return_rip(st, event)]
    push_all(cpu, (st.ss_base + below) & M32, words, 2, 0)
    st.rsp = (st.rsp & ~0xFFFF & M64) | below
    st.cs_sel, st.cs_base, st.rip = cs, cs << 4, ip
    st.rflags = st.rflags & ~(Rflags.IF | Rflags.TF | Rflags.AC | Rflags.RF)


def iret(cpu: CpuPort, size: int, next_rip: int) -> None:
    """IRET, IRETD, IRETQ: ``size`` is 2, 4 or 8. Faults leave everything as it was, up to a switch of tasks."""
    st = cpu.st
    if segments.paragraphs(st):
        _iret_real(cpu, size)
        return
    wide = segments.code_bits(st) == 64
    if st.sysfl & Rflags.NT:
        if segments.long_mode(st):
            raise GuestFault(Vector.GP, 0)
        tasks.return_from(cpu, next_rip)
        return
    stack = Stack(cpu)
    rip, cs, flags = stack.pop(size), stack.pop(size) & 0xFFFF, stack.pop(size)
    if flags & Rflags.VM and size == 4 and not st.cpl and not segments.long_mode(st):
        _iret_to_virtual(cpu, stack, rip, cs, flags)
        return
    code = check_return_code(cpu, cs)
    cpl = cs & 3
    outer = cpl > st.cpl
    new_rsp, new_ss = stack.rsp, None
    if wide or outer:
        new_rsp, ss = stack.pop(size), stack.pop(size) & 0xFFFF
        new_ss = check_return_stack(cpu, ss, code)
    segments.check_code_target(cpu, code, rip)
    segments.mark_accessed(cpu, code, *(() if new_ss is None else (new_ss,)))
    changed = Rflags.STATUS | Rflags.TF | Rflags.DF | Rflags.NT
    if size > 2:
        changed |= Rflags.RF | Rflags.AC | Rflags.ID
    if st.cpl <= (st.rflags >> Rflags.IOPL_SHIFT & 3):
        changed |= Rflags.IF
    if st.cpl == 0:
        changed |= Rflags.IOPL
        if size > 2:
            changed |= Rflags.VIF | Rflags.VIP
    segments.put(st, "cs", code)
    st.rip = rip
    st.rflags = st.rflags & ~changed | flags & changed
    return_stack(st, new_rsp, new_ss, outer, cpl)
    cpu.state_changed()


def _iret_to_virtual(cpu: CpuPort, stack: Stack, eip: int, cs: int, flags: int) -> None:
    """Into virtual-8086 mode."""
    st = cpu.st
    esp, *selectors = (stack.pop(4) for _ in range(6))
    if eip > 0xFFFF:
        raise GuestFault(Vector.GP, 0)
    for name, selector in zip(("cs", "ss", "es", "ds", "fs", "gs"), (cs, *selectors), strict=True):
        segments.put(st, name, segments.paragraph(selector & 0xFFFF))
    st.rip, st.rsp, st.cpl = eip, esp, 3
    st.rflags = flags & 0x3F_7FD5 | 2
    cpu.state_changed()


def _iret_real(cpu: CpuPort, size: int) -> None:
    """In real mode, and in virtual-8086 mode with IOPL 3, where IOPL, VM and what the host sees of IF stay."""
    st = cpu.st
    virtual = bool(st.sysfl & Rflags.VM)
    if virtual and st.sysfl >> Rflags.IOPL_SHIFT & 3 < 3:
        raise GuestFault(Vector.GP, 0)
    stack = Stack(cpu)
    rip, cs, flags = stack.pop(size), stack.pop(size) & 0xFFFF, stack.pop(size)
    if rip > st.cs_limit:
        raise GuestFault(Vector.GP, 0)
    kept = (Rflags.VM | Rflags.VIF | Rflags.VIP) if size > 2 else ~0xFFFF
    if virtual:
        kept |= Rflags.IOPL
    st.rip, st.cs_sel, st.cs_base, st.rsp = rip, cs, cs << 4, stack.rsp
    st.rflags = st.rflags & kept | flags & ~kept
    cpu.state_changed()


class Stack:
    """Pops that are not yet committed: ``rsp`` is the value to commit."""

    def __init__(self, cpu: CpuPort) -> None:
        self._cpu = cpu
        st = cpu.st
        self.rsp = st.rsp
        self._wide = segments.code_bits(st) == 64
        self._segment = segments.held(st, "ss")
        self._mask = M64 if self._wide else M32 if self._segment.attributes & Attr.D else 0xFFFF

    def pop(self, size: int) -> int:
        offset = self.rsp & self._mask
        if self._wide:
            if not canonical(offset):
                raise GuestFault(Vector.SS, 0)
            address = offset
        else:
            in_limit(self._segment, offset, size)
            address = (self._segment.base + offset) & M32
        segments.check_alignment(self._cpu.st, address, size)
        value = int.from_bytes(self._cpu.read(address, size), "little")
        self.skip(size)
        return value

    def skip(self, count: int) -> None:
        self.rsp = self.rsp & ~self._mask | (self.rsp + count) & self._mask


def check_return_code(cpu: CpuPort, selector: int) -> Loaded:
    """The code segment of a far return or IRET: to the same level or an outer one."""
    if segments.is_null(selector):
        raise GuestFault(Vector.GP, 0)
    code = segments.fetch(cpu, selector)
    rpl, error = selector & 3, selector & 0xFFFC
    wrong_level = code.dpl > rpl if code.conforming else code.dpl != rpl
    if not code.is_code or rpl < cpu.st.cpl or wrong_level or not segments.valid_code_size(cpu.st, code):
        raise GuestFault(Vector.GP, error)
    if not code.present:
        raise GuestFault(Vector.NP, error)
    return code


def check_return_stack(cpu: CpuPort, selector: int, code: Loaded) -> Loaded:
    """The stack segment that goes with the code segment of a far return or IRET."""
    wide = segments.long_mode(cpu.st) and bool(code.attributes & Attr.L)
    return segments.check_stack(cpu, selector, code.selector & 3, wide=wide)


def return_stack(st: StateBlock, rsp: int, ss: Loaded | None, outer: bool, cpl: int) -> None:
    """The last part of a far return or IRET, when CS is the new one: commit the stack and the privilege."""
    st.cpl = cpl
    if ss is None:
        st.rsp = rsp
        return
    segments.put(st, "ss", ss)
    if segments.code_bits(st) == 64:
        st.rsp = rsp
    elif ss.attributes & Attr.D:
        st.rsp = rsp & M32
    else:
        st.rsp = st.rsp & ~0xFFFF | rsp & 0xFFFF
    if outer:
        segments.drop_inaccessible(st)
