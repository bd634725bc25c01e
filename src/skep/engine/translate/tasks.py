"""Hardware task switches (SDM 3, chapter 7), by JMP, CALL, INT, exceptions and IRET, between TSSs of 16 and 32 bits.

IA-32e mode has none. What goes wrong up to the switch leaves the old task as it was; from there on it is the new task's
fault, at its EIP (SDM 3, 7.3, steps 11 to 14).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from skep.engine.amd64.registers import Attr, Cr0, Rflags, SystemType, Vector
from skep.engine.translate import segments
from skep.engine.translate.layout import SEGMENTS
from skep.engine.translate.paging import load_cr3
from skep.engine.translate.port import CpuPort, GuestFault
from skep.engine.translate.segments import TSS_BUSY, Loaded

_AVAILABLE = (SystemType.TSS16, SystemType.TSS)
_IN_USE = (SystemType.TSS16_BUSY, SystemType.TSS_BUSY)
DR7_LOCAL = 0x155
DR6_BT = 1 << 15


class By(enum.Enum):
    """What switches, which decides what becomes of the tasks' busy flags, NT and the link."""

    JMP = "jmp"
    CALL = "call"
    """Also interrupts and exceptions through a task gate."""
    IRET = "iret"


@dataclass(frozen=True)
class _Form:
    """How a TSS is laid out (SDM 3, figures 7-2 and 7-10)."""

    least: int
    """Smallest limit."""
    eip: int
    """Offset of (E)IP, behind which lie (E)FLAGS and the eight general registers."""
    selectors: int
    """Offset of ES, CS, SS, DS and, of 32 bits, FS and GS."""
    ldt: int
    word: int


_FORM16 = _Form(least=0x2B, eip=0x0E, selectors=0x22, ldt=0x2A, word=2)
_FORM32 = _Form(least=0x67, eip=0x20, selectors=0x48, ldt=0x60, word=4)
_CR3, _TRAP = 0x1C, 0x64


def _form(attributes: int) -> _Form:
    return _FORM32 if attributes & 8 else _FORM16


def _names(form: _Form) -> tuple[str, ...]:
    return SEGMENTS if form.word == 4 else SEGMENTS[:4]


def switch(cpu: CpuPort, selector: int, by: By, return_eip: int, *, flags: int | None = None, ext: int = 0) -> None:
    """Go to the task of a TSS that the caller may use. ``return_eip`` is where the old one goes on, with ``flags``, or
    else those that it has."""
    st = cpu.st
    new, address = _find(cpu, selector, by, ext)
    form = _form(new.attributes)
    raw = cpu.read(new.base, form.least + 1, True)
    _save(cpu, return_eip, (st.rflags if flags is None else flags) & ~(Rflags.NT if by is By.IRET else 0))
    if by is not By.CALL:
        _clear_busy(cpu, st.tr_sel)
    old = st.tr_sel
    if by is By.CALL:
        cpu.write(new.base, struct.pack("<H", old), True)
    if by is not By.IRET:
        cpu.change(address + 5, to_set=TSS_BUSY)
    segments.put(st, "tr", Loaded(selector, new.base, new.limit, new.attributes | TSS_BUSY))
    st.cr0 |= Cr0.TS
    try:
        _load(cpu, form, raw, by, ext)
    finally:
        cpu.state_changed()


def _find(cpu: CpuPort, selector: int, by: By, ext: int) -> tuple[Loaded, int]:
    """The TSS that a selector names, and where its descriptor lies."""
    vector = Vector.TS if by is By.IRET else Vector.GP
    error = selector & 0xFFFC | ext
    address = None if selector & 4 or segments.is_null(selector) else segments.in_table(cpu, selector)
    if address is None:
        raise GuestFault(vector, error)
    tss = segments.unpack(selector, int.from_bytes(cpu.read(address, 8, True), "little"))
    if tss.attributes & Attr.S or tss.attributes & Attr.TYPE not in (_IN_USE if by is By.IRET else _AVAILABLE):
        raise GuestFault(vector, error)
    if not tss.present:
        raise GuestFault(Vector.NP, error)
    if tss.limit < _form(tss.attributes).least:
        raise GuestFault(Vector.TS, error)
    return tss, address


def _save(cpu: CpuPort, return_eip: int, flags: int) -> None:
    st = cpu.st
    form = _form(st.tr_attr)
    mask = (1 << 8 * form.word) - 1
    values = [return_eip, flags, *st.q[:8]]
    letter = "I" if form.word == 4 else "H"
    cpu.write(st.tr_base + form.eip, struct.pack(f"<10{letter}", *(value & mask for value in values)), True)
    selectors = [getattr(st, f"{name}_sel") for name in _names(form)]
    cpu.write(st.tr_base + form.selectors, struct.pack(f"<{len(selectors)}{letter}", *selectors), True)


def _clear_busy(cpu: CpuPort, selector: int) -> None:
    address = segments.in_table(cpu, selector)
    if address is not None:
        cpu.change(address + 5, to_clear=TSS_BUSY)


def _load(cpu: CpuPort, form: _Form, raw: bytes, by: By, ext: int) -> None:
    """Become the new task: registers first, then the segments one by one, whose faults are its own."""
    st = cpu.st
    letter = "I" if form.word == 4 else "H"
    eip, flags, *general = struct.unpack_from(f"<10{letter}", raw, form.eip)
    names = _names(form)
    selectors = dict(zip(names, struct.unpack_from(f"<{len(names)}{letter}", raw, form.selectors), strict=True))
    if form.word == 4 and st.cr0 & Cr0.PG:
        load_cr3(cpu, int.from_bytes(raw[_CR3 : _CR3 + 4], "little"))
    upper = 0 if form.word == 4 else 0xFFFF_0000
    st.rip = eip
    st.rflags = flags & 0x3F_7FD5 | 2 | (Rflags.NT if by is By.CALL else 0)
    for number, value in enumerate(general):
        st.q[number] = value | (st.q[number] & upper if upper else 0)
    if st.dr7 & DR7_LOCAL:
        st.dr7 &= ~DR7_LOCAL
        cpu.breakpoints_changed()
    for name in SEGMENTS:  # until it is loaded, none of them may be used
        segments.put(st, name, segments.null(selectors.get(name, 0) & 0xFFFF))
    segments.put(st, "ldtr", segments.null(0))
    _load_segments(cpu, {name: value & 0xFFFF for name, value in selectors.items()}, raw[form.ldt :][:2], ext)
    segments.check_code_target(cpu, segments.held(st, "cs"), eip, ext)
    if form.word == 4 and raw[_TRAP] & 1:
        cpu.hits |= DR6_BT


def _load_segments(cpu: CpuPort, selectors: dict[str, int], ldt: bytes, ext: int) -> None:
    st = cpu.st
    _load_ldt(cpu, int.from_bytes(ldt, "little"), ext)
    if st.sysfl & Rflags.VM:
        for name in SEGMENTS:
            segments.put(st, name, segments.paragraph(selectors.get(name, 0)))
        st.cpl = 3
        return
    st.cpl = selectors["cs"] & 3
    _load_stack_and_code(cpu, selectors["cs"], selectors["ss"], ext)
    for name in ("ds", "es", "fs", "gs"):
        selector = selectors.get(name, 0)
        if segments.is_null(selector):
            continue
        segment = segments.fetch(cpu, selector, Vector.TS, ext)
        if not segment.readable or (not segment.conforming and max(selector & 3, st.cpl) > segment.dpl):
            raise GuestFault(Vector.TS, selector & 0xFFFC | ext)
        if not segment.present:
            raise GuestFault(Vector.NP, selector & 0xFFFC | ext)
        segments.mark_accessed(cpu, segment)
        segments.put(st, name, segment)


def _load_ldt(cpu: CpuPort, selector: int, ext: int) -> None:
    if segments.is_null(selector):
        return
    address = None if selector & 4 else segments.in_table(cpu, selector)
    if address is None:
        raise GuestFault(Vector.TS, selector & 0xFFFC | ext)
    table = segments.unpack(selector, int.from_bytes(cpu.read(address, 8, True), "little"))
    if table.attributes & (Attr.S | Attr.TYPE) != SystemType.LDT or not table.present:
        raise GuestFault(Vector.TS, selector & 0xFFFC | ext)
    segments.put(cpu.st, "ldtr", table)


def _load_stack_and_code(cpu: CpuPort, cs: int, ss: int, ext: int) -> None:
    if segments.is_null(cs):
        raise GuestFault(Vector.TS, ext)
    code = segments.fetch(cpu, cs, Vector.TS, ext)
    wrong_level = code.dpl > cs & 3 if code.conforming else code.dpl != cs & 3
    if not code.is_code or wrong_level:
        raise GuestFault(Vector.TS, cs & 0xFFFC | ext)
    if not code.present:
        raise GuestFault(Vector.NP, cs & 0xFFFC | ext)
    stack = segments.check_stack(cpu, ss, cs & 3, wide=False, vector=Vector.TS, ext=ext)
    segments.mark_accessed(cpu, code, stack)
    segments.put(cpu.st, "ss", stack)
    segments.put(cpu.st, "cs", code)


def return_from(cpu: CpuPort, next_eip: int) -> None:
    """IRET with NT: back to the task that the current one is linked to. This one goes on at ``next_eip`` some day."""
    switch(cpu, int.from_bytes(cpu.read(cpu.st.tr_base, 2, True), "little"), By.IRET, next_eip)
