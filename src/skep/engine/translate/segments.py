"""Descriptors and segment loads (Intel SDM 3, chapters 3 and 5).

A load is two steps: the checks, which may raise, give a :class:`Loaded`; :func:`put` commits it. Whoever loads several
things at once runs all checks first.
"""

from __future__ import annotations

from dataclasses import dataclass

from skep.engine.amd64.registers import Attr, Cr0, Efer, Rflags, SystemType, Vector, canonical
from skep.engine.translate.forms import Legality
from skep.engine.translate.layout import SEGMENTS, Mode, StateBlock
from skep.engine.translate.port import CpuPort, GuestFault

FLAT = 0xFFFF_FFFF
TSS_BUSY = 2
"""In the type of a TSS's descriptor."""
ALIGNMENT = {2: 2, 4: 4, 6: 4, 8: 8, 10: 8, 14: 2, 28: 4, 94: 2, 108: 4, 512: 4, 576: 4, 832: 4}
"""What an operand's address has to be a multiple of, by its size, where alignment is checked (SDM 3, table 6-7): x87's
environments and states by their fields. Others go by a rule of their own, #GP, or by none."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a segment register is about to hold."""

    selector: int
    base: int
    limit: int
    attributes: int
    accessed_at: int | None = None
    """Linear address of the descriptor's type byte, if its accessed bit is still to be set."""

    @property
    def dpl(self) -> int:
        return self.attributes >> Attr.DPL_SHIFT & 3

    @property
    def present(self) -> bool:
        return bool(self.attributes & Attr.P)

    @property
    def is_code(self) -> bool:
        return self.attributes & (Attr.S | Attr.CODE) == Attr.S | Attr.CODE

    @property
    def is_data(self) -> bool:
        return self.attributes & (Attr.S | Attr.CODE) == Attr.S

    @property
    def conforming(self) -> bool:
        return self.is_code and bool(self.attributes & Attr.CONFORMING)

    @property
    def writable_data(self) -> bool:
        return self.is_data and bool(self.attributes & Attr.WRITABLE)

    @property
    def readable(self) -> bool:
        return self.is_data or (self.is_code and bool(self.attributes & Attr.READABLE))

    def with_rpl(self, rpl: int) -> Loaded:
        return Loaded(self.selector & ~3 | rpl, self.base, self.limit, self.attributes, self.accessed_at)


def null(selector: int, dpl: int = 0) -> Loaded:
    """A register that holds a null selector: unusable outside 64-bit mode, base zero."""
    return Loaded(selector, 0, 0, dpl << Attr.DPL_SHIFT)


def paragraph(selector: int) -> Loaded:
    """What virtual-8086 mode makes of a selector (SDM 3, 21.2.1)."""
    return Loaded(selector, selector << 4, 0xFFFF, 0xF3)


def is_null(selector: int) -> bool:
    return selector & 0xFFFC == 0


def long_mode(st: StateBlock) -> bool:
    """IA-32e mode: 64-bit or compatibility mode."""
    return bool(st.efer & Efer.LMA)


def paragraphs(st: StateBlock) -> bool:
    """Real or virtual-8086 mode, where a selector is a sixteenth of the segment's base."""
    return not st.cr0 & Cr0.PE or bool(st.sysfl & Rflags.VM)


def code_bits(st: StateBlock) -> int:
    """The default operand and address size of the current code: 16, 32 or 64."""
    if st.efer & Efer.LMA and st.cs_attr & Attr.L:
        return 64
    return 32 if st.cs_attr & Attr.D else 16


def in_table(cpu: CpuPort, selector: int, size: int = 8) -> int | None:
    """The linear address of the selector's descriptor of ``size`` bytes; None outside its table."""
    st = cpu.st
    index = selector & 0xFFF8
    if selector & 4:
        if not st.ldtr_attr & Attr.P:
            return None
        base, limit = st.ldtr_base, st.ldtr_limit
    else:
        base, limit = st.gdt_base, st.gdt_limit
    if index + size - 1 > limit:
        return None
    return (base + index) & (0xFFFF_FFFF_FFFF_FFFF if long_mode(st) else 0xFFFF_FFFF)


def unpack(selector: int, descriptor: int, address: int | None = None) -> Loaded:
    """The fields of an 8-byte descriptor that lies at ``address``."""
    attributes = (descriptor >> 40 & 0xFF) | (descriptor >> 52 & 0xF) << 12
    limit = (descriptor & 0xFFFF) | (descriptor >> 32 & 0xF0000)
    if attributes & Attr.G:
        limit = limit << 12 | 0xFFF
    base = (descriptor >> 16 & 0xFF_FFFF) | (descriptor >> 56 & 0xFF) << 24
    fresh = address is not None and attributes & Attr.S and not attributes & Attr.ACCESSED
    if fresh:
        attributes |= Attr.ACCESSED
    return Loaded(selector, base, limit, attributes, address + 5 if fresh and address is not None else None)


def fetch(cpu: CpuPort, selector: int, vector: int = Vector.GP, ext: int = 0) -> Loaded:
    """The descriptor that a selector, not null, names; ``vector`` (selector) where it names none."""
    address = in_table(cpu, selector)
    if address is None:
        raise GuestFault(vector, selector & 0xFFFC | ext)
    return unpack(selector, int.from_bytes(cpu.read(address, 8, True), "little"), address)


def mark_accessed(cpu: CpuPort, *segments: Loaded) -> None:
    """Set the accessed bit in the table of each that needs it. May fault, so: after the checks, before the commit."""
    for segment in segments:
        if segment.accessed_at is not None:
            cpu.change(segment.accessed_at, to_set=Attr.ACCESSED)


def put(st: StateBlock, name: str, segment: Loaded) -> None:
    """Commit a load to es, cs, ss, ds, fs, gs, ldtr or tr."""
    setattr(st, f"{name}_sel", segment.selector)
    setattr(st, f"{name}_base", segment.base)
    setattr(st, f"{name}_limit", segment.limit)
    setattr(st, f"{name}_attr", segment.attributes)


def held(st: StateBlock, name: str) -> Loaded:
    """What a segment register holds now."""
    selector, base, limit, attributes = (getattr(st, name + part) for part in ("_sel", "_base", "_limit", "_attr"))
    return Loaded(selector, base, limit, attributes)


def window(segment: Loaded, *, rights: bool) -> tuple[int, int, int]:
    """The offsets that may be accessed: from the first number up to, not including, the second (reads) or the third
    (writes). ``rights``: of protected mode; elsewhere only the limit counts."""
    end = segment.limit + 1
    if not rights:
        return 0, end, end
    start = 0
    if segment.is_data and segment.attributes & Attr.EXPAND_DOWN:
        start, end = end, 1 << 32 if segment.attributes & Attr.D else 1 << 16
    usable = segment.present
    return start, end if usable and segment.readable else 0, end if usable and segment.writable_data else 0


def narrow_mode(st: StateBlock) -> int:
    """The mode bits of 16- or 32-bit code under the present segments; what translated code checks is brought up to
    date with them."""
    real = paragraphs(st)
    bits = Mode.CODE32 if st.cs_attr & Attr.D else Mode.CODE16
    flat = bool(st.cs_attr & Attr.D) and not real
    for name in SEGMENTS:
        segment = held(st, name)
        bounds = window(segment, rights=not real)
        for part, value in zip(("_start", "_rend", "_wend"), bounds, strict=True):
            setattr(st, name + part, value)
        if name == "cs":
            flat &= not segment.base and segment.limit == FLAT
        elif name in ("ss", "ds", "es"):
            flat &= not segment.base and bounds == (0, 1 << 32, 1 << 32)
    end = st.cs_limit + 1
    if end <= FLAT:
        end = max(0, end - (st.cs_base + end & 0xFFF))
    if bits == Mode.CODE16:
        end = min(end, 0x10000 - (st.cs_base & 0xFFF))
    st.code_end = end
    if real:
        bits |= Mode.REAL
    if not st.ss_attr & Attr.D:
        bits |= Mode.STACK16
        flat = False
    return bits if flat else bits | Mode.SEGMENTED


def check_stack(cpu: CpuPort, selector: int, cpl: int, *, wide: bool, vector: int = Vector.GP, ext: int = 0) -> Loaded:
    """A load of SS for code at ``cpl``. ``wide``: that code is 64-bit, where SS may be null below privilege 3.

    ``vector`` is #GP, or #TS for a stack that comes from the TSS (SDM 2, MOV and INT n).
    """
    if is_null(selector):
        if wide and cpl != 3 and selector & 3 == cpl:
            return null(selector, cpl)
        raise GuestFault(vector, ext)
    segment = fetch(cpu, selector, vector, ext)
    if selector & 3 != cpl or not segment.writable_data or segment.dpl != cpl:
        raise GuestFault(vector, selector & 0xFFFC | ext)
    if not segment.present:
        raise GuestFault(Vector.SS, selector & 0xFFFC | ext)
    return segment


def check_data(cpu: CpuPort, selector: int) -> Loaded:
    """A load of DS, ES, FS or GS at the current privilege."""
    if is_null(selector):
        return null(selector)
    segment = fetch(cpu, selector)
    if not segment.readable or (not segment.conforming and max(selector & 3, cpu.st.cpl) > segment.dpl):
        raise GuestFault(Vector.GP, selector & 0xFFFC)
    if not segment.present:
        raise GuestFault(Vector.NP, selector & 0xFFFC)
    return segment


def check_register(cpu: CpuPort, name: str, selector: int) -> Loaded:
    """The load that MOV, POP and LDS.. do: of any segment register but CS, in any mode."""
    st = cpu.st
    if paragraphs(st):
        return Loaded(selector, selector << 4, getattr(st, f"{name}_limit"), getattr(st, f"{name}_attr"))
    if name == "ss":
        segment = check_stack(cpu, selector, st.cpl, wide=code_bits(st) == 64)
    else:
        segment = check_data(cpu, selector)
    mark_accessed(cpu, segment)
    return segment


def check_alignment(st: StateBlock, address: int, size: int) -> None:
    """#AC for an operand of a program that asked for it (SDM 3, 6.15): Mode has whether it did."""
    if st.mode >> Mode.CLASS_SHIFT & Legality.ALIGNED and address & ALIGNMENT.get(size, 1) - 1:
        raise GuestFault(Vector.AC, 0)


def check_system(cpu: CpuPort, selector: int, types: tuple[int, ...], ext: int = 0) -> tuple[Loaded, int]:
    """An LDT or TSS descriptor in the GDT, of 16 bytes in IA-32e mode, and the linear address it lies at."""
    wide = long_mode(cpu.st)
    address = None if selector & 4 else in_table(cpu, selector, 16 if wide else 8)
    if address is None:
        raise GuestFault(Vector.GP, selector & 0xFFFC | ext)
    raw = cpu.read(address, 16 if wide else 8, True)
    segment = unpack(selector, int.from_bytes(raw[:8], "little"))
    bad_upper = wide and raw[13] & 0x1F
    if segment.attributes & Attr.S or segment.attributes & Attr.TYPE not in types or bad_upper:
        raise GuestFault(Vector.GP, selector & 0xFFFC | ext)
    if not segment.present:
        raise GuestFault(Vector.NP, selector & 0xFFFC | ext)
    base = segment.base | int.from_bytes(raw[8:12], "little") << 32
    if wide and not canonical(base):
        raise GuestFault(Vector.GP, selector & 0xFFFC | ext)
    return Loaded(selector, base, segment.limit, segment.attributes), address


def load_ldt(cpu: CpuPort, selector: int) -> None:
    """LLDT."""
    if is_null(selector):
        put(cpu.st, "ldtr", null(selector))
        return
    segment, _ = check_system(cpu, selector, (SystemType.LDT,))
    put(cpu.st, "ldtr", segment)


def load_task(cpu: CpuPort, selector: int) -> None:
    """LTR: the TSS becomes busy in its descriptor."""
    if is_null(selector):
        raise GuestFault(Vector.GP, 0)
    types = (SystemType.TSS,) if long_mode(cpu.st) else (SystemType.TSS, SystemType.TSS16)
    segment, address = check_system(cpu, selector, types)
    cpu.change(address + 5, to_set=TSS_BUSY)
    put(cpu.st, "tr", Loaded(selector, segment.base, segment.limit, segment.attributes | TSS_BUSY))


def drop_inaccessible(st: StateBlock) -> None:
    """After a return to an outer level: data segments that it may not use become null (SDM 2, RET). Their bases stay,
    which 64-bit code knows of FS and GS."""
    for name in ("es", "ds", "fs", "gs"):
        segment = held(st, name)
        if segment.present and not segment.conforming and segment.dpl < st.cpl:
            put(st, name, Loaded(0, segment.base, 0, 0))


def check_code_target(cpu: CpuPort, segment: Loaded, offset: int, ext: int = 0) -> None:
    """Where control goes: canonical in 64-bit code, inside the limit elsewhere."""
    if long_mode(cpu.st) and segment.attributes & Attr.L:
        if not (offset < 1 << 47 or offset >= 0xFFFF_8000_0000_0000):
            raise GuestFault(Vector.GP, ext)
    elif offset > segment.limit:
        raise GuestFault(Vector.GP, ext)


def valid_code_size(st: StateBlock, segment: Loaded) -> bool:
    """In IA-32e mode a code segment may not have L and D both."""
    both = Attr.L | Attr.D
    return not (long_mode(st) and segment.attributes & both == both)
