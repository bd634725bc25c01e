"""Sharing: one check for several operands of a block that lie near each other.

Operands that are reached from the same value of a register by constants, such as a function's stack frame or a
structure's fields, mostly lie on one page. The first of them checks the range that they all span and keeps its host
address in a slot of the state block; the others need no check. A block runs straight from its entry, so the first is
always executed first; what other vCPUs or devices do to the page waits until this vCPU leaves the block (world.py).

``shares`` is in the compiled language (runtime.py); ``s`` is the sheet.

A range that is not plain RAM on one page - two pages, a device, code, a fault - is for the block's *plain* twin, which
is translated without sharing and entered at the same instruction (Mode.PLAIN, runtime.fill_range).
"""

from __future__ import annotations

from skep.engine.translate import sheet as sh
from skep.engine.translate.compiler import ld8, ld16, ld32, ld64, lts, set64, st8, st16, st64
from skep.engine.translate.drafting_runtime import constant, fits, wide
from skep.engine.translate.layout import Mode

REACH = 256
"""Bytes that a range may span at most: a longer one would lie on two pages too often."""


def member(s: int, i: int, base: int, low: int, size: int, write: int) -> int:
    """Operand ``i`` lies in a range of its register's origin, or begins one."""
    origin = ld64(s + sh.ORIGINS + base * 16)
    far = ld64(s + sh.ORIGINS + base * 16 + 8)
    low = low + far
    high = low + size
    number = ld16(s + sh.LAST_RANGE + origin * 2)
    if number:
        r = s + sh.RANGE_LIST + (number - 1) * sh.RANGE_SIZE
        if write > ld8(r + sh.R_WRITE):
            number = 0
        elif lts(low, ld64(r + sh.R_LOW)):
            if lts(REACH, ld64(r + sh.R_HIGH) - low) or not fits(low - ld64(r + sh.R_FAR)):
                number = 0
            else:
                st64(r + sh.R_LOW, low)
        elif lts(ld64(r + sh.R_HIGH), high):
            if lts(REACH, high - ld64(r + sh.R_LOW)):
                number = 0
            else:
                st64(r + sh.R_HIGH, high)
    if number == 0:
        number = ld64(s + sh.RANGES) + 1
        st64(s + sh.RANGES, number)
        st16(s + sh.LAST_RANGE + origin * 2, number)
        r = s + sh.RANGE_LIST + (number - 1) * sh.RANGE_SIZE
        st64(r + sh.R_LOW, low)
        st64(r + sh.R_HIGH, high)
        st64(r + sh.R_FAR, far)
        st8(r + sh.R_WRITE, write)
        st8(r + sh.R_COUNT, 0)
        st8(r + sh.R_FIRST, i)
        st8(r + sh.R_BASE, base)
        st8(r + sh.R_SLOT, sh.NO_SLOT)
    r = s + sh.RANGE_LIST + (number - 1) * sh.RANGE_SIZE
    st8(r + sh.R_COUNT, ld8(r + sh.R_COUNT) + 1)
    item = s + sh.ITEMS + i * sh.ITEM
    st8(item + sh.RANGE, number)
    st64(item + sh.LOW, low)
    return 0


def shares(s: int, slots: int) -> int:
    """Which operands share a check; so many slots may be taken."""
    st64(s + sh.RANGES, 0)
    st64(s + sh.SLOTS_USED, 0)
    count = ld64(s + sh.COUNT)
    members = 0
    i = 0
    first = 0
    last = 0
    while i < count:
        item = s + sh.ITEMS + i * sh.ITEM
        st8(item + sh.RANGE, 0)
        if ld8(ld64(item + sh.FORM) + sh.F_FLAGS) & sh.REACHES:
            if members == 0:
                first = i
            members = members + 1
            last = i
        i = i + 1
    if members < 2 or ld64(s + sh.KEY_MODE) & Mode.PLAIN:
        return 0
    set64(s + sh.LAST_RANGE, 0, 4)
    i = 0
    while i < 16:
        st64(s + sh.ORIGINS + i * 16, i)
        st64(s + sh.ORIGINS + i * 16 + 8, 0)
        i = i + 1
    fresh = 16
    data = s + sh.DATA - ld64(s + sh.OFFSET)
    i = first
    while i <= last:
        item = s + sh.ITEMS + i * sh.ITEM
        f = ld64(item + sh.FORM)
        flags = ld8(f + sh.F_FLAGS)
        code = data + ld16(item + sh.AT)
        if flags & sh.REACHES:
            low = wide(ld32(f + sh.F_PLUS), 4)
            if ld8(f + sh.F_BYTES):
                low = low + constant(code + ld8(f + sh.F_WHERE), ld8(f + sh.F_BYTES))
            member(s, i, ld8(f + sh.F_BASE), low, ld8(f + sh.F_SIZE), 1 if flags & sh.WRITES else 0)
        if flags & sh.STEPS:
            add = wide(ld32(f + sh.F_ADD), 4)
            if ld8(f + sh.F_STEP_BYTES):
                more = constant(code + ld8(f + sh.F_STEP_WHERE), ld8(f + sh.F_STEP_BYTES))
                if flags & sh.MINUS:
                    more = 0 - more
                add = add + more
            source = s + sh.ORIGINS + ld8(f + sh.F_FROM) * 16
            to = s + sh.ORIGINS + ld8(f + sh.F_TO) * 16
            st64(to + 8, ld64(source + 8) + add)
            st64(to, ld64(source))
        spoils = ld16(f + sh.F_SPOILS)
        number = 0
        while spoils:
            if spoils & 1:
                st16(s + sh.LAST_RANGE + fresh * 2, 0)
                st64(s + sh.ORIGINS + number * 16, fresh)
                st64(s + sh.ORIGINS + number * 16 + 8, 0)
                fresh = fresh + 1
            spoils = spoils >> 1
            number = number + 1
        i = i + 1
    slot = 0
    i = 0
    while i < ld64(s + sh.RANGES) and slot < slots:
        r = s + sh.RANGE_LIST + i * sh.RANGE_SIZE
        if ld8(r + sh.R_COUNT) > 1:
            st8(r + sh.R_SLOT, slot)
            slot = slot + 1
        i = i + 1
    st64(s + sh.SLOTS_USED, slot)
    return 0


SHARING_ROUTINES = [member, shares]
