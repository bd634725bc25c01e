"""REP string instructions of 64-bit code, page by page, in the compiled language (runtime.py)."""

from __future__ import annotations

from skep.engine.translate.compiler import (
    copy8,
    copy16,
    copy32,
    copy64,
    inline,
    ld8,
    ld16,
    ld32,
    ld64,
    set8,
    set16,
    set32,
    set64,
    st,
    st8,
    st16,
    st32,
    st64,
)
from skep.engine.translate.layout import (
    BRK,
    TLB,
    TLB_ARRAY,
    TLB_ENTRIES,
    TLB_ENTRY,
    TLB_HOST,
    TLB_READ,
    TLB_WRITE,
    Kind,
)
from skep.engine.translate.runtime import STRING, fill
from skep.engine.translate.walk_runtime import UPPER, WRITE, mask_at, reaches


def operand(va: int, size: int, kind: int, array: int, offset: int) -> int:
    """Host address of a string instruction's next element, TLB first; else as fill, with crossing elements included."""
    entry = st.self_ + TLB + array * TLB_ARRAY + ((va >> 12) & (TLB_ENTRIES - 1)) * TLB_ENTRY
    tag = ld64(entry + TLB_READ)
    if kind:
        tag = ld64(entry + TLB_WRITE)
    if tag ^ va <= 4096 - size:
        return ld64(entry + TLB_HOST) + (va & 4095)
    return fill(va, STRING | (array << 24) | (kind << 22) | (size << 12) | offset)


@inline
def elements(va: int, shift: int) -> int:
    """Whole elements up to the page's end; at least the one that crosses it."""
    n = (4096 - (va & 4095)) >> shift
    if n == 0 or st.watch:
        n = 1
    return n


def interrupted(desc: int) -> int:
    """Somebody wants the vCPU in the middle of a REP instruction, which goes on when it is run again."""
    st.rip = st.page + (desc & 4095)
    st.kind = Kind.BREAK
    return 0


def rep_store(desc: int, array: int) -> int:
    """REP STOS with DF clear; ``desc``: instruction offset, element shift at bit 12. 2: done; else as fill."""
    shift = (desc >> 12) & 3
    size = 1 << shift
    while st.rcx != 0:
        if ld32(st.self_ + BRK):
            return interrupted(desc)
        va = st.rdi
        host = operand(va, size, 1, array, desc & 4095)
        if host < 2:
            return host
        n = elements(va, shift)
        gpa = host - st.ram
        if mask_at_host(gpa):
            n = 1
        if n > st.rcx:
            n = st.rcx
        if shift == 0:
            set8(host, st.rax, n)
        elif shift == 1:
            set16(host, st.rax, n)
        elif shift == 2:
            set32(host, st.rax, n)
        else:
            set64(host, st.rax, n)
        st.rdi = va + (n << shift)
        st.rcx = st.rcx - n
    return 2


def mask_at_host(gpa: int) -> int:
    """The code mask of a frame by its offset in guest memory's window; a pair counts as code: element by element."""
    if reaches(gpa, WRITE) == 0:
        return 1
    return mask_at(gpa)


def rep_move(desc: int, array: int) -> int:
    """REP MOVS with DF clear; like rep_store. The segment override's base, if any, is in ``st.t7``."""
    shift = (desc >> 12) & 3
    size = 1 << shift
    while st.rcx != 0:
        if ld32(st.self_ + BRK):
            return interrupted(desc)
        to = st.rdi
        source_va = st.rsi + st.t7
        source = operand(source_va, size, 0, array, desc & 4095)
        if source < 2:
            return source
        host = operand(to, size, 1, array, desc & 4095)
        if host < 2:
            return host
        n = elements(to, shift)
        if mask_at_host(host - st.ram):
            n = 1
        m = elements(source_va, shift)
        if m < n:
            n = m
        if n > st.rcx:
            n = st.rcx
        if shift == 0:
            copy8(host, source, n)
        elif shift == 1:
            copy16(host, source, n)
        elif shift == 2:
            copy32(host, source, n)
        else:
            copy64(host, source, n)
        st.rdi = to + (n << shift)
        st.rsi = st.rsi + (n << shift)
        st.rcx = st.rcx - n
    return 2


def rep_down(desc: int, array: int) -> int:
    """REP MOVS (bit 14 of ``desc``) and REP STOS with DF set, element by element within their pages."""
    shift = (desc >> 12) & 3
    moving = (desc >> 14) & 1
    size = 1 << shift
    while st.rcx != 0:
        if ld32(st.self_ + BRK):
            return interrupted(desc)
        host = 0
        source = 0
        n = st.rcx
        if moving:
            va = st.rsi + st.t7
            source = operand(va, size, 0, array, desc & 4095)
            if source < 2:
                return source
            n = down_elements(va, shift, n)
        va = st.rdi
        host = operand(va, size, 1, array, desc & 4095)
        if host < 2:
            return host
        n = down_elements(va, shift, n)
        if mask_at_host(host - st.ram):
            n = 1
        step = n << shift
        st.rdi = va - step
        if moving:
            st.rsi = st.rsi - step
        st.rcx = st.rcx - n
        value = st.rax
        while n != 0:
            if shift == 3:
                if moving:
                    value = ld64(source)
                st64(host, value)
            elif shift == 2:
                if moving:
                    value = ld32(source)
                st32(host, value)
            elif shift == 1:
                if moving:
                    value = ld16(source)
                st16(host, value)
            else:
                if moving:
                    value = ld8(source)
                st8(host, value)
            host = host - size
            source = source - size
            n = n - 1
    return 2


@inline
def element(host: int, shift: int) -> int:
    if shift == 0:
        value = ld8(host)
    elif shift == 1:
        value = ld16(host)
    elif shift == 2:
        value = ld32(host)
    else:
        value = ld64(host)
    return value


def subtract_flags(a: int, b: int, bits: int) -> int:
    """The arithmetic flags of ``a - b`` in ``bits`` bits, to ``st.flags``."""
    result = (a - b) & (UPPER >> (64 - bits))
    flags = (a ^ b ^ result) & 0x10
    if a < b:
        flags = flags | 1
    parity = result & 0xFF
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    if parity & 1 == 0:
        flags = flags | 4
    if result == 0:
        flags = flags | 0x40
    flags = flags | ((result >> (bits - 1)) << 7)
    flags = flags | ((((a ^ b) & (a ^ result)) >> (bits - 1)) << 11)
    st.flags = (st.flags & ~0x8D5) | flags
    return 2


def rep_compare(desc: int, array: int) -> int:
    """CMPS and (bit 14 of ``desc``) SCAS: repeated while equal, while not equal (bit 15), or done once (bit 16)."""
    shift = (desc >> 12) & 3
    size = 1 << shift
    scan = (desc >> 14) & 1
    until = (desc >> 15) & 1
    once = (desc >> 16) & 1
    step = size
    if st.flags & 0x400:
        step = 0 - size
    if once == 0 and st.rcx == 0:
        return 2
    a = 0
    b = 0
    while True:
        if once == 0 and ld32(st.self_ + BRK):
            return interrupted(desc)
        host = operand(st.rdi, size, 0, array, desc & 4095)
        if host < 2:
            return host  # the flags are those from before the instruction (SDM 2, REP)
        b = element(host, shift)
        a = st.rax & (UPPER >> (64 - size * 8))
        if scan == 0:
            source = operand(st.rsi + st.t7, size, 0, array, desc & 4095)
            if source < 2:
                return source
            a = element(source, shift)
        st.rdi = st.rdi + step
        if scan == 0:
            st.rsi = st.rsi + step
        if once:
            break
        st.rcx = st.rcx - 1
        if st.rcx == 0:
            break
        if until:
            if a == b:
                break
        elif a != b:
            break
    return subtract_flags(a, b, size * 8)


@inline
def down_elements(va: int, shift: int, most: int) -> int:
    """Whole elements from ``va`` down to the page's start, at least one and ``most`` at most."""
    n = ((va & 4095) >> shift) + 1
    if (va & 4095) + (1 << shift) > 4096 or st.watch:
        n = 1
    if n > most:
        n = most
    return n


STRING_ROUTINES = [
    operand, elements, interrupted, rep_store, mask_at_host, rep_move, rep_down, element, subtract_flags, rep_compare,
    down_elements,
]  # fmt: skip
