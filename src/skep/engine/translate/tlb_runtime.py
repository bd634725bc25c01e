"""What TLB and jump cache hold, and what of it stays when, in the compiled language (runtime.py; SDM 3, 4.10).

They hold global pages and those of one PCID. When another is loaded, the latter's are put away in a slot, and come back
when that PCID is loaded with the permission to keep them. A slot is good while its bit in ``kept`` is set: whatever
takes a right away from what may be in it (a flush, a page that becomes code, other legality) clears all of them.

Lists tell what is not global, each entry once.
"""

from __future__ import annotations

from skep.engine.translate.compiler import inline, ld8, ld32, ld64, set64, st, st8, st32, st64
from skep.engine.translate.layout import (
    ARMED,
    EMPTY_JC,
    GIANT_PAGES,
    JC,
    JC_ARRAY,
    JC_GLOBAL,
    JC_GLOBAL_SIZE,
    JC_LIST,
    JC_LISTED,
    JC_PAGES,
    JC_PAGES_SIZE,
    JC_SET,
    JC_SETS,
    KEPT,
    KEPT_JUMP,
    KEPT_JUMPS,
    KEPT_MOST,
    KEPT_PAGE,
    KEPT_PAGES,
    KEPT_SLOT,
    KEPT_SLOTS,
    LARGE_PAGES,
    LARGE_PAGES_SIZE,
    NG_LIST,
    NG_LISTED,
    NO_STACK,
    OFFSETS,
    TLB,
    TLB_ARRAY,
    TLB_ENTRIES,
    TLB_ENTRY,
    TLB_EXEC,
    TLB_HOST,
    TLB_READ,
    TLB_WRITE,
)

STACK = OFFSETS["stack0_page"]
_KEPT = OFFSETS["kept"]
_LISTED, _GLOBAL_NOW = 1, 2
"""In NG_LISTED: the entry is in the list; but a global page has it now."""


def watched(va: int, size: int, write: int) -> int:
    """Whether a data breakpoint is hit by an access to [va, va + size) (SDM 3, 17.2.5)."""
    i = 0
    while i < 4:
        how = (st.armed7 >> (16 + i * 4)) & 3
        if (st.armed7 >> (i * 2)) & 3 and (how == 3 or (how == 1 and write)):
            length = (st.armed7 >> (18 + i * 4)) & 3
            shift = length
            if length == 2:
                shift = 3
            elif length == 3:
                shift = 2
            at = (ld64(st.self_ + ARMED + i * 8) >> shift) << shift
            if at < va + size and va < at + (1 << shift):
                return 1
        i = i + 1
    return 0


@inline
def forget_stacks(block: int) -> int:
    """The pages of stacks that the state block has are to be looked up again."""
    st64(block + STACK, NO_STACK)
    st64(block + STACK + 16, NO_STACK)
    st64(block + STACK + 32, NO_STACK)
    return 0


@inline
def empty_entry(entry: int) -> int:
    """An empty entry must match nothing: it holds a page number that cannot index it."""
    number = ((entry - st.self_ - TLB) >> 5) & (TLB_ENTRIES - 1)
    other = (number ^ 1) << 12
    st64(entry + TLB_READ, other)
    st64(entry + TLB_WRITE, other)
    st64(entry + TLB_EXEC, other)
    return 0


@inline
def jump_set(va: int) -> int:
    """The jump cache's set for a target; the same function stands inline in every indirect jump (stubs.jump_set)."""
    return ((va >> 14) + va) & (JC_SETS - 1)


@inline
def list_page(place: int) -> int:
    """A page that is not global has the TLB entry at ``place`` from here on."""
    mark = st.self_ + NG_LISTED + place // TLB_ENTRY
    if ld8(mark) == 0:
        st32(st.self_ + NG_LIST + st.ng_count * 4, place)
        st.ng_count = st.ng_count + 1
    st8(mark, _LISTED)
    return 0


@inline
def half_of(va: int) -> int:
    """Of all addresses. Above bit 55 a tag has the mode."""
    return (va >> 47) & 1


@inline
def large_mark(va: int) -> int:
    """Where it says that there may be TLB entries of a page of 2 MiB. A kernel maps all memory by large pages, which no
    program's page is to meet."""
    half = LARGE_PAGES_SIZE // 2
    return st.self_ + LARGE_PAGES + ((va >> 21) & (half - 1)) + half_of(va) * half


@inline
def giant_mark(va: int) -> int:
    """The same of 1 GiB."""
    half = LARGE_PAGES_SIZE // 2
    return st.self_ + GIANT_PAGES + ((va >> 30) & (half - 1)) + half_of(va) * half


@inline
def page_mark(va: int) -> int:
    """Where it says that there may be jumps to a page that is not global."""
    return st.self_ + JC_PAGES + ((va >> 12) & (JC_PAGES_SIZE - 1))


@inline
def global_mark(va: int) -> int:
    """The same of a global one. A kernel's own code stays here for good, so programs' pages are not to meet it."""
    half = JC_GLOBAL_SIZE // 2
    return st.self_ + JC_GLOBAL + ((va >> 12) & (half - 1)) + half_of(va) * half


@inline
def list_jumps(place: int) -> int:
    """A way of the jump-cache set at ``place`` leads to a page that is not global."""
    mark = st.self_ + JC_LISTED + place // JC_SET
    if ld8(mark) == 0:
        st8(mark, 1)
        st32(st.self_ + JC_LIST + st.jl_count * 4, place)
        st.jl_count = st.jl_count + 1
    return 0


def enter_page(va: int, array: int, kind: int) -> int:
    """Put the page that walk just found (``st.w_pa``) into the TLB; ``kind``: the tag to set besides what follows."""
    me = st.self_
    page = va & ~4095
    entry = me + TLB + array * TLB_ARRAY + ((va >> 12) & (TLB_ENTRIES - 1)) * TLB_ENTRY
    host = st.ram + (st.w_pa & ~4095)
    fresh = 1
    if ld64(entry + TLB_HOST) == host and (ld64(entry + TLB_READ) == page or ld64(entry + TLB_EXEC) & ~1 == page):
        fresh = 0
    if fresh:
        empty_entry(entry)
        st64(entry + TLB_HOST, host)
        if st.w_flags & 1 == 0:
            list_page(entry - me - TLB)
        else:
            mark = me + NG_LISTED + (entry - me - TLB) // TLB_ENTRY
            if ld8(mark):
                st8(mark, _GLOBAL_NOW)
        if st.w_flags & 2:
            if st.w_flags & 4:
                st8(giant_mark(va), 1)
            else:
                st8(large_mark(va), 1)
    if kind == TLB_EXEC:
        st64(entry + TLB_EXEC, page | (st.w_flags & 1))
    elif st.watch == 0 or watched(page, 4096, 1) == 0:
        st64(entry + TLB_READ, page)
        if kind == TLB_WRITE:
            st64(entry + TLB_WRITE, page)
    return entry


def flush_tlb(everything: int) -> int:
    """Drop the TLB entries of non-global pages, or all of them, and the jump-cache sets that rest on them; of every
    PCID."""
    me = st.self_
    st.kept = 0
    if everything == 0:
        return leave_space(0, 0)
    forget_stacks(me)
    entry = me + TLB
    end = entry + 3 * TLB_ARRAY
    while entry < end:
        empty_entry(entry)
        entry = entry + TLB_ENTRY
    set64(me + NG_LISTED, 0, 3 * TLB_ENTRIES // 8)
    st.ng_count = 0
    flush_jumps()
    set64(me + LARGE_PAGES, 0, 2 * LARGE_PAGES_SIZE // 8)
    return 0


@inline
def empty_set(jc: int, empty: int) -> int:
    """Forget a set of the jump cache, in all three arrays."""
    st64(jc, empty)
    st64(jc + 16, empty)
    st64(jc + JC_ARRAY, empty)
    st64(jc + JC_ARRAY + 16, empty)
    st64(jc + 2 * JC_ARRAY, empty)
    st64(jc + 2 * JC_ARRAY + 16, empty)
    return 0


@inline
def forget_page(way: int, page: int, empty: int) -> int:
    """Forget a way of the jump cache if it leads to a page; the topmost bits of its tag are the mode."""
    if (((0 - ld64(way)) ^ page) << 8) >> 20 == 0:
        st64(way, empty)
    return 0


def flush_jumps() -> int:
    """Forget every jump target."""
    st.kept = 0
    jc = st.self_ + JC
    end = jc + JC_ARRAY
    empty = EMPTY_JC
    while jc < end:
        empty_set(jc, empty)
        jc = jc + JC_SET
        empty = empty - 1
    set64(st.self_ + JC_PAGES, 0, (JC_PAGES_SIZE + JC_GLOBAL_SIZE) // 8)
    set64(st.self_ + JC_LISTED, 0, 3 * JC_SETS // 8)
    st.jl_count = 0
    return 0


def invalidate(va: int) -> int:
    """INVLPG: drop what one page, however large, of this PCID or global, left in the TLB and in the jump cache."""
    me = st.self_
    forget_stacks(me)
    page = va & ~4095
    region = 0
    if ld8(large_mark(va)):
        region = 21
    if ld8(giant_mark(va)):
        region = 30
    if region:
        entry = me + TLB
        end = entry + 3 * TLB_ARRAY
        while entry < end:
            if (ld64(entry + TLB_READ) ^ va) >> region == 0 or (ld64(entry + TLB_EXEC) ^ va) >> region == 0:
                empty_entry(entry)
            entry = entry + TLB_ENTRY
        flush_jumps()
    else:
        entry = me + TLB + ((va >> 12) & (TLB_ENTRIES - 1)) * TLB_ENTRY
        end = entry + 3 * TLB_ARRAY
        while entry < end:
            empty_entry(entry)
            entry = entry + TLB_ARRAY
        if ld8(page_mark(va)) | ld8(global_mark(va)):
            number = jump_set(page)
            left = 4096
            while left != 0:
                jc = me + JC + number * JC_SET
                end = jc + 3 * JC_ARRAY
                while jc < end:
                    forget_page(jc, page, EMPTY_JC - number)
                    forget_page(jc + 16, page, EMPTY_JC - number)
                    jc = jc + JC_ARRAY
                number = (number + 1) & (JC_SETS - 1)
                left = left - 1
    return 0


def clear_write_tags(block: int, host: int) -> int:
    """The page at ``host`` becomes code, or (0) stores to any page are to be seen: no entry of the TLB in a state block
    may let one through."""
    forget_stacks(block)
    st64(block + _KEPT, 0)
    entry = block + TLB
    end = entry + 3 * TLB_ARRAY
    number = 0
    while entry < end:
        if host == 0 or ld64(entry + TLB_HOST) == host:
            st64(entry + TLB_WRITE, ((number & (TLB_ENTRIES - 1)) ^ 1) << 12)
        entry = entry + TLB_ENTRY
        number = number + 1
    return 0


def forget_pages(block: int) -> int:
    """No page is in the TLB of a state block."""
    clear_write_tags(block, 0)
    entry = block + TLB
    end = entry + 3 * TLB_ARRAY
    while entry < end:
        st64(entry + TLB_READ, ld64(entry + TLB_WRITE))
        st64(entry + TLB_EXEC, ld64(entry + TLB_WRITE))
        entry = entry + TLB_ENTRY
    return 0


def take_written(marks: int, bits: int, size: int) -> int:
    """A bit for each of ``size`` * 8 marks of pages (walk_runtime.WRITTEN); there are none then. Whether there was
    one."""
    found = 0
    while size:
        eight = ld64(marks)
        if eight:
            st64(marks, 0)
            # Bit 8i of the factor's left side goes to bit 56 + i.
            eight = (((eight >> 1) & 0x0101010101010101) * 0x0102040810204080) >> 56
            st8(bits, eight)
            found = found | eight
        marks = marks + 8
        bits = bits + 1
        size = size - 1
    return found


@inline
def slot_of(pcid: int) -> int:
    return st.self_ + KEPT + (pcid & (KEPT_SLOTS - 1)) * KEPT_SLOT


def leave_space(slot: int, pcid: int) -> int:
    """Drop what is not global, after it has been put away in ``slot``, unless that is 0."""
    me = st.self_
    forget_stacks(me)
    number = 0
    i = 0
    while i < st.jl_count:
        place = ld32(me + JC_LIST + i * 4)
        st8(me + JC_LISTED + place // JC_SET, 0)
        end = place + JC_SET
        array = place // JC_ARRAY
        while place < end:
            way = me + JC + place
            tag = 0 - ld64(way)
            page = tag & ~4095
            tlb = ld64(me + TLB + array * TLB_ARRAY + ((tag >> 12) & (TLB_ENTRIES - 1)) * TLB_ENTRY + TLB_EXEC)
            if tlb != page | 1:
                if slot and tlb == page and number < KEPT_MOST:
                    to = slot + KEPT_JUMPS + number * KEPT_JUMP
                    st64(to, place)
                    st64(to + 8, tag)
                    st64(to + 16, ld64(way + 8))
                    number = number + 1
                st64(way, EMPTY_JC - (place & (JC_ARRAY - 1)) // JC_SET)
            else:
                st8(global_mark(tag), 1)  # which it may not have been when the jump was noted
            place = place + 16
        i = i + 1
    st.jl_count = 0
    set64(me + JC_PAGES, 0, JC_PAGES_SIZE // 8)
    if slot:
        st64(slot, pcid)
        st64(slot + 16, number)
    number = 0
    i = 0
    while i < st.ng_count:
        place = ld32(me + NG_LIST + i * 4)
        entry = me + TLB + place
        mark = me + NG_LISTED + place // TLB_ENTRY
        if ld8(mark) != _GLOBAL_NOW:
            if slot and number < KEPT_MOST:
                none = (((place // TLB_ENTRY) & (TLB_ENTRIES - 1)) ^ 1) << 12
                if ld64(entry + TLB_READ) != none or ld64(entry + TLB_EXEC) != none:
                    to = slot + KEPT_PAGES + number * KEPT_PAGE
                    st64(to, place)
                    st64(to + 8, ld64(entry + TLB_READ))
                    st64(to + 16, ld64(entry + TLB_WRITE))
                    st64(to + 24, ld64(entry + TLB_EXEC))
                    st64(to + 32, ld64(entry + TLB_HOST))
                    number = number + 1
            empty_entry(entry)
        st8(mark, 0)
        i = i + 1
    st.ng_count = 0
    if slot:
        st64(slot + 8, number)
    return 0


def enter_space(slot: int, pcid: int) -> int:
    """Bring back what was put away of a PCID, if the slot has it still."""
    me = st.self_
    if (st.kept >> (pcid & (KEPT_SLOTS - 1))) & 1 == 0 or ld64(slot) != pcid:
        return 0
    left = ld64(slot + 8)
    at = slot + KEPT_PAGES
    while left != 0:
        place = ld64(at)
        entry = me + TLB + place
        st64(entry + TLB_READ, ld64(at + 8))
        st64(entry + TLB_WRITE, ld64(at + 16))
        st64(entry + TLB_EXEC, ld64(at + 24))
        st64(entry + TLB_HOST, ld64(at + 32))
        list_page(place)
        at = at + KEPT_PAGE
        left = left - 1
    left = ld64(slot + 16)
    at = slot + KEPT_JUMPS
    while left != 0:
        place = ld64(at)
        tag = ld64(at + 8)
        st64(me + JC + place, 0 - tag)
        st64(me + JC + place + 8, ld64(at + 16))
        st8(page_mark(tag), 1)
        list_jumps(place & ~(JC_SET - 1))
        at = at + KEPT_JUMP
        left = left - 1
    return 0


TLB_ROUTINES = [
    watched, forget_stacks, empty_entry, jump_set, list_page, half_of, large_mark, giant_mark, page_mark, global_mark,
    forget_page, list_jumps, enter_page, flush_tlb, flush_jumps, invalidate, clear_write_tags, forget_pages,
    take_written, slot_of, leave_space, enter_space,
]  # fmt: skip
