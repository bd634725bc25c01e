"""The string instructions of 16- and 32-bit code, in the compiled language (runtime.py): by the page where they can.

Offsets wrap at 16 or 32 bits and are held against their segments' bounds, which stand in the state block
(``segments.window``). ``desc`` is what narrow.py pushes:

======  ====================================================
bits    descriptor
======  ====================================================
0-11    the instruction's offset in its page
12-13   the element's size, as a shift
14-16   the operation: MOVS, STOS, CMPS, SCAS, LODS
17      repeated
18      repeated until equal (REPNE)
19      16-bit addresses
20-22   the source's segment: ES, CS, SS, DS, FS, GS
24-25   TLB array
======  ====================================================
"""

from __future__ import annotations

from skep.engine.amd64.registers import Rflags, Vector
from skep.engine.translate.compiler import (
    copy8,
    copy16,
    copy32,
    inline,
    ld32,
    ld64,
    set8,
    set16,
    set32,
    st,
)
from skep.engine.translate.layout import BRK, OFFSETS, Kind
from skep.engine.translate.string_runtime import (
    element,
    elements,
    interrupted,
    mask_at_host,
    operand,
    subtract_flags,
)

MOVS, STOS, CMPS, SCAS, LODS = range(5)
REPEATED, UNTIL_EQUAL, SIXTEEN = 1 << 17, 1 << 18, 1 << 19
SEGMENT_SHIFT = 20
DF = Rflags.DF
SS_VECTOR, GP_VECTOR = Vector.SS, Vector.GP
ES, SS = 0, 2
BASE, START, READ_END, WRITE_END = (OFFSETS["es" + part] for part in ("_base", "_start", "_rend", "_wend"))
"""Of ES; those of the other segments follow in order."""


def index(offset: int, desc: int, segment: int, end: int) -> int:
    """Host address of the element at an offset of a segment, 0 or 1 as runtime.fill; ``st.room``: how many elements lie
    from there on in its page, within the segment and without a wrap of the offset."""
    shift = (desc >> 12) & 3
    size = 1 << shift
    me = st.self_ + segment * 8
    last = ld64(me + end)
    if offset < ld64(me + START) or offset + size > last:
        st.kind = Kind.SEGMENT
        st.info = GP_VECTOR
        if segment == SS:
            st.info = SS_VECTOR
        st.rip = st.page + (desc & 4095)
        return 0
    va = (ld64(me + BASE) + offset) & 0xFFFFFFFF
    kind = 0
    if end == WRITE_END:
        kind = 1
    host = operand(va, size, kind, (desc >> 24) & 3, desc & 4095)
    room = elements(va, shift)
    if room > (last - offset) >> shift:
        room = (last - offset) >> shift
    if desc & SIXTEEN:
        if room > (0x10000 - offset) >> shift:
            room = (0x10000 - offset) >> shift
    elif room > (0x100000000 - offset) >> shift:
        room = (0x100000000 - offset) >> shift
    if room == 0:
        room = 1
    st.room = room
    return host


@inline
def advanced(register: int, step: int, desc: int) -> int:
    """An index or count register after an addition that wraps as its address size says."""
    value = (register + step) & 0xFFFFFFFF
    if desc & SIXTEEN:
        value = (register & ~0xFFFF) | ((register + step) & 0xFFFF)
    return value


def narrow_string(desc: int) -> int:
    """One string instruction. 2: done; 0 and 1 as runtime.fill, with what was done committed."""
    shift = (desc >> 12) & 3
    size = 1 << shift
    operation = (desc >> 14) & 7
    segment = (desc >> SEGMENT_SHIFT) & 7
    mask = 0xFFFFFFFF
    if desc & SIXTEEN:
        mask = 0xFFFF
    down = st.flags & DF
    a = 0
    b = 0
    while True:
        n = 1
        if desc & REPEATED:
            n = st.rcx & mask
            if n == 0:
                return 2
            if ld32(st.self_ + BRK):
                return interrupted(desc)
        source = 0
        host = 0
        if operation == MOVS or operation == LODS:
            source = index(st.rsi & mask, desc, segment, READ_END)
            if source < 2:
                return source
            if n > st.room:
                n = st.room
        if operation == MOVS or operation == STOS:
            host = index(st.rdi & mask, desc, ES, WRITE_END)
            if host < 2:
                return host
            if n > st.room:
                n = st.room
            if down or mask_at_host(host - st.ram):
                n = 1
            if operation == MOVS:
                if shift == 0:
                    copy8(host, source, n)
                elif shift == 1:
                    copy16(host, source, n)
                else:
                    copy32(host, source, n)
            elif shift == 0:
                set8(host, st.rax, n)
            elif shift == 1:
                set16(host, st.rax, n)
            else:
                set32(host, st.rax, n)
        elif operation == LODS:
            n = 1
            if shift == 0:
                st.rax = (st.rax & ~0xFF) | element(source, shift)
            elif shift == 1:
                st.rax = (st.rax & ~0xFFFF) | element(source, shift)
            else:
                st.rax = element(source, shift)
        else:
            n = 1
            host = index(st.rdi & mask, desc, ES, READ_END)
            if host < 2:
                return host  # the flags are those from before the instruction (SDM 2, REP)
            b = element(host, shift)
            a = st.rax & ((1 << (size * 8)) - 1)
            if operation == CMPS:
                source = index(st.rsi & mask, desc, segment, READ_END)
                if source < 2:
                    return source
                a = element(source, shift)
        step = n << shift
        if down:
            step = 0 - step
        if operation != LODS:
            st.rdi = advanced(st.rdi, step, desc)
        if operation != STOS and operation != SCAS:
            st.rsi = advanced(st.rsi, step, desc)
        if desc & REPEATED == 0:
            break
        st.rcx = advanced(st.rcx, 0 - n, desc)
        if operation == CMPS or operation == SCAS:
            if st.rcx & mask == 0:
                break
            if desc & UNTIL_EQUAL:
                if a == b:
                    break
            elif a != b:
                break
    if operation == CMPS or operation == SCAS:
        return subtract_flags(a, b, size * 8)
    return 2


NARROW_ROUTINES = [index, advanced, narrow_string]
