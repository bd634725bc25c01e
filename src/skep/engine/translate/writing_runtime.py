"""Writing: the machine code of a block, from its instructions' templates; in the compiled language (runtime.py).
``s`` is the sheet, ``o`` the host address, writable, where the next byte of the block goes, ``b`` where its first is.

Where a template is not there yet, these routines return STUCK, and what is wanted stands on the sheet: when Python has
made it they are called anew.
"""

from __future__ import annotations

from skep.engine.translate import sheet as sh
from skep.engine.translate import tables as tb
from skep.engine.translate.block_runtime import NONE, find
from skep.engine.translate.compiler import copy8, inline, ld8, ld16, ld32, ld64, lts, st8, st16, st32, st64
from skep.engine.translate.drafting_runtime import STUCK, fits, live_at, near, want
from skep.engine.translate.emission import CHECK_SIZE, LINK_KEY, LINK_SIZE, RANGE_BIT, SLOW_SIZE, TABLE_BITS
from skep.engine.translate.forms import HOLE_IP, HOLE_NEXT, HOLE_PLACE, Ends
from skep.engine.translate.layout import SLOTS, Mode
from skep.engine.translate.sheet import Want


def piece(o: int, p: int) -> int:
    """A piece of code."""
    end = o + ld16(p + sh.P_CODE)
    p = p + sh.P_HEAD
    while o < end:
        st64(o, ld64(p))
        o = o + 8
        p = p + 8
    return end


@inline
def patch(b: int, site: int, to: int) -> int:
    """The displacement at an offset of the code leads to another offset."""
    st32(b + site, to - site - 4)
    return 0


def check_later(s: int, jump: int, back: int, desc: int, saved: int) -> int:
    """A check's way out, and where it comes back."""
    check = s + sh.CHECK_LIST + ld64(s + sh.CHECKS) * sh.CHECK
    st32(check + sh.C_JUMP, jump)
    st32(check + sh.C_BACK, back)
    st32(check + sh.C_DESC, desc)
    st32(check + sh.C_SAVED, saved)
    st64(s + sh.CHECKS, ld64(s + sh.CHECKS) + 1)
    return 0


def copy_later(s: int, to: int, of: int, size: int) -> int:
    """A constant that the code only copies."""
    copied = s + sh.COPY_LIST + ld64(s + sh.COPYING) * sh.CONSTANT
    st16(copied + sh.Y_TO, to)
    st16(copied + sh.Y_OF, of)
    st16(copied + sh.Y_SIZE, size)
    st64(s + sh.COPYING, ld64(s + sh.COPYING) + 1)
    return 0


def way(s: int, which: int, site: int, target: int, item: int) -> int:
    """Note a way out: the displacement's offset, the offset in the page to go on at, and the branch, or 0. ``which``:
    sheet.BREAKS, FARS or OUTS."""
    count = ld64(s + which)
    out = s + sh.WAY_LIST + (which - sh.BREAKS) * sh.WAYS_ROOM + count * sh.WAY
    st64(out + sh.W_SITE, site)
    st64(out + sh.W_TARGET, target)
    st64(out + sh.W_ITEM, item)
    st64(s + which, count + 1)
    return 0


def to_page(s: int, o: int, target: int) -> int:
    """r10 = the page's address plus an offset."""
    o = piece(o, ld64(s + sh.PAGE_CODE))
    st32(o, target)
    return o + 4


def long(s: int, o: int, target: int, item: int) -> int:
    """Go to another page, through the jump cache: by the branch ``item``, or (0) behind an instruction."""
    b = ld64(s + sh.BEGIN)
    m = ld64(s + sh.BY_MODE)
    if ld64(m + sh.M_NEAR) != sh.NEAR_ALWAYS:
        kind = 0
        if item:
            kind = 2
            if ld8(ld64(item + sh.FORM) + sh.F_FLAGS) & sh.NARROW_BRANCH:
                kind = 3
        p = ld64(m + sh.M_WAY + kind * 8)
        here = o - b
        o = piece(o, p)
        st32(b + here + ld16(p + sh.P_ONE), target)
        if ld16(p + sh.P_TWO):
            st32(b + here + ld16(p + sh.P_TWO), ld16(item + sh.AT))
        return o
    if fits(target):
        return piece(to_page(s, o, target), ld64(m + sh.M_DISPATCH))
    p = ld64(s + sh.FAR_CODE)
    st64(piece(o, p) + ld16(p + sh.P_ONE) - ld16(p + sh.P_CODE), target)
    return piece(o + ld16(p + sh.P_CODE), ld64(m + sh.M_DISPATCH))


def direct(s: int, o: int, opcode: int, size: int, target: int, mode: int) -> int:
    """A jump within the page, its displacement aligned: ``opcode`` has ``size`` bytes."""
    b = ld64(s + sh.BEGIN)
    pad = (0 - (o - b + size)) & 3
    if pad == 1:
        st8(o, 0x90)
    elif pad == 2:
        st16(o, 0x9066)
    else:
        st32(o, 0x001F0F)
    o = o + pad
    st32(o, opcode)
    o = o + size
    st32(o, 0)
    site = o - b
    key = ((ld64(s + sh.PAGE) + target) << Mode.BITS) + mode
    own = ((ld64(s + sh.PAGE) + ld64(s + sh.OFFSET)) << Mode.BITS) + ld64(s + sh.KEY_MODE)
    if key == own and ld64(s + sh.SECOND) == NONE:
        patch(b, site, ld64(s + sh.ENTRY_OFFSET))
    else:
        knot = s + sh.LINK_LIST + ld64(s + sh.LINKED) * sh.KNOT
        st32(knot + sh.K_SITE, site)
        st64(knot + sh.K_KEY, key)
        st64(s + sh.LINKED, ld64(s + sh.LINKED) + 1)
    return o + 4


def leave(s: int, o: int, target: int, looks: int, mode: int, item: int) -> int:
    """Go to ``target``, unconditionally: by the branch ``item``, or (0) behind an instruction."""
    if near(s, target, item) == 0:
        return long(s, o, target, item)
    if looks:
        live = live_at(s, target)
        if live & STUCK:
            return STUCK
        o = piece(o, ld64(s + sh.CHECK_CODE + (8 if live else 0)))
        way(s, sh.BREAKS, o - ld64(s + sh.BEGIN) - (7 if live else 4), target, 0)
    return direct(s, o, 0xE9, 1, target, mode)


@inline
def backward(s: int, target: int, item: int) -> int:
    """Whether a jump to ``target`` looks for somebody who wants the vCPU."""
    return 1 if ld64(s + sh.SHADOW) or not lts(ld16(item + sh.AT), target) else 0


def loop_branch(s: int, o: int, item: int, mode: int) -> int:
    """A LOOP or JCXZ: it counts, and jumps over what goes on behind it."""
    f = ld64(item + sh.FORM)
    at = ld16(item + sh.AT)
    n = ld16(item + sh.LENGTH_OF)
    p = ld64(f + sh.F_LOOP)
    if p:
        skip = piece(o, p)
        o = leave(s, skip, at + n, 1, mode, 0)
        if o & STUCK:
            return STUCK
        st32(skip - 4, o - skip)
        return leave(s, o, ld64(item + sh.EXTRA), 1, mode, item)
    copy8(o, s + sh.DATA + at - ld64(s + sh.OFFSET), n - 1)
    skip = o + n
    o = leave(s, skip, at + n, 1, mode, 0)
    if o & STUCK:
        return STUCK
    st8(skip - 1, o - skip)
    return leave(s, o, ld64(item + sh.EXTRA), 1, mode, 0)


def branch(s: int, o: int, item: int) -> int:
    """A Jcc, JMP or LOOP."""
    b = ld64(s + sh.BEGIN)
    f = ld64(item + sh.FORM)
    ends = ld8(f + sh.F_ENDS)
    target = ld64(item + sh.EXTRA)
    mode = ld64(s + sh.KEY_MODE) & ~Mode.PLAIN
    jcc = 0x800F + (ld8(f + sh.F_COND) << 8)
    if ld64(s + sh.TOP) and target == ld64(s + sh.OFFSET) and ends != Ends.LOOP:
        if ends == Ends.JMP:
            st8(o, 0xE9)
            o = o + 5
        else:
            st16(o, jcc)
            o = o + 6
        patch(b, o - b - 4, ld64(s + sh.TOP))
        return o
    if ld64(s + sh.MOVED):
        st16(o, jcc)
        way(s, sh.OUTS, o + 2 - b, target, item)
        return o + 6
    if ends == Ends.JMP:
        return leave(s, o, target, backward(s, target, item), mode, item)
    if ends == Ends.LOOP:
        return loop_branch(s, o, item, mode)
    if near(s, target, item) == 0:
        st16(o, jcc)
        st32(o + 2, 0)
        way(s, sh.FARS, o + 2 - b, target, item)
        return o + 6
    if ld16(item + sh.AT) < target and ld64(s + sh.SHADOW) == 0:
        return direct(s, o, jcc, 2, target, mode)
    st16(o, jcc ^ 0x100)
    skip = o + 6
    o = leave(s, skip, target, 1, mode, item)
    if o & STUCK:
        return STUCK
    st32(skip - 4, o - skip)
    return o


def template(s: int, item: int, which: int) -> int:
    """An instruction's template, 0 where Python is asked first."""
    f = ld64(item + sh.FORM)
    number = (item - s - sh.ITEMS) // sh.ITEM
    if ld64(s + sh.MOVED) and ld8(f + sh.F_FLAGS) & sh.MOVES:
        moved = s + sh.MOVED_LIST + number * 16
        if ld64(moved) != f + which:
            want(s, Want.MOVED, number, which)
            return 0
        return ld64(moved + 8)
    t = ld32(f + which)
    if t == 0:
        want(s, Want.TEMPLATE, number, which)
        return 0
    return ld64(s + sh.POOL) + t


def lead(s: int, o: int, item: int, r: int) -> int:
    """The check of a range, before the first instruction with an operand in it."""
    b = ld64(s + sh.BEGIN)
    need = ld8(item + sh.NEED)
    write = ld8(r + sh.R_WRITE)
    register = ld8(r + sh.R_BASE)
    slot = ld8(r + sh.R_SLOT)
    length = ld64(r + sh.R_HIGH) - ld64(r + sh.R_LOW)
    p = ld64(s + sh.LEAD_CODE + register * 8)
    if ld64(s + sh.MOVED) and register - 9 < 3:
        p = ld64(s + sh.LEAD_MOVED + (register - 9) * 8)
    o = piece(o, p)
    st32(o, ld64(r + sh.R_LOW) - ld64(r + sh.R_FAR))
    o = o + 4
    on_stack = 1 if register == 4 else 0
    p = ld64(ld64(s + sh.BY_MODE) + sh.M_CHECK + (write + need * 2 + on_stack * 4) * 8)
    jump = o - b + ld16(p + sh.P_ONE)
    o = piece(o, p)
    st32(b + jump - 6, 4096 - length)
    saved = need
    if on_stack:
        saved = saved + 2
        f = ld64(item + sh.FORM)
        if ld8(f + sh.F_ENDS) or ld8(f + sh.F_FLAGS) & sh.STEPS:
            saved = saved + 4
    desc = RANGE_BIT + ((ld64(s + sh.KEY_MODE) & 3) << 24) + (write << 22) + (length << 12) + ld16(item + sh.AT)
    check_later(s, jump, o - b, desc, saved + ld64(s + sh.MOVED))
    return piece(o, ld64(s + sh.KEEP_CODE + slot * 8))


def fill_in(s: int, base: int, item: int, t: int, place: int) -> int:
    """What a template leaves open, in the code that begins at offset ``base``."""
    b = ld64(s + sh.BEGIN)
    f = ld64(item + sh.FORM)
    at = ld16(item + sh.AT)
    n = ld16(item + sh.LENGTH_OF)
    inside = at - ld64(s + sh.OFFSET)
    p = t + sh.T_HEAD
    left = ld8(t + sh.T_CHECKS)
    while left:
        check_later(s, base + ld16(p), base + ld16(p + 2), ld32(p + 4) | at, ld32(p + 8) + ld64(s + sh.MOVED))
        p = p + sh.T_CHECK
        left = left - 1
    left = ld8(t + sh.T_HOLES)
    while left:
        what = ld8(p + 2)
        value = ld64(item + sh.EXTRA)
        if what == HOLE_PLACE:
            value = place
        elif what == HOLE_IP:
            value = at
        elif what == HOLE_NEXT:
            value = at + n
        elif ld8(f + sh.F_FLAGS) & sh.IS_RELATIVE:
            copy_later(s, base + ld16(p), inside + n - 4 - ld8(f + sh.F_BEHIND), 4 | tb.COPY_RELATIVE)
        st32(b + base + ld16(p), value + ld32(p + 4))
        p = p + sh.T_HOLE
        left = left - 1
    left = ld8(t + sh.T_COPIES)
    while left:
        size = ld8(p + 3)
        of = inside + ld8(p + 2)
        to = base + ld16(p)
        if size > 1 and (ld8(f + sh.F_FLAGS) & sh.STEPS == 0 or ld64(s + sh.SLOTS_USED) == 0):
            copy_later(s, to, of, size)
        if size == 8:
            st64(b + to, ld64(s + sh.DATA + of))
        elif size == 4:
            st32(b + to, ld32(s + sh.DATA + of))
        elif size == 2:
            st16(b + to, ld16(s + sh.DATA + of))
        else:
            st8(b + to, ld8(s + sh.DATA + of))
        p = p + sh.T_COPY
        left = left - 1
    return 0


@inline
def template_code(t: int) -> int:
    """Where a template's code stands."""
    at = sh.T_HEAD + ld8(t + sh.T_CHECKS) * sh.T_CHECK + ld8(t + sh.T_HOLES) * sh.T_HOLE
    at = at + ld8(t + sh.T_COPIES) * sh.T_COPY
    return t + ((at + 7) & ~7)


def copy_code(o: int, t: int) -> int:
    """A template's code."""
    end = o + ld16(t + sh.T_CODE)
    p = template_code(t)
    while o < end:
        st64(o, ld64(p))
        o = o + 8
        p = p + 8
    return end


def ordinary(s: int, o: int, item: int) -> int:
    """An instruction that is no jump."""
    b = ld64(s + sh.BEGIN)
    f = ld64(item + sh.FORM)
    number = ld8(item + sh.RANGE)
    slot = sh.NO_SLOT
    place = 0
    r = 0
    if number:
        r = s + sh.RANGE_LIST + (number - 1) * sh.RANGE_SIZE
        slot = ld8(r + sh.R_SLOT)
    if slot == sh.NO_SLOT:
        t = template(s, item, sh.F_LIVE if ld8(item + sh.NEED) else sh.F_DEAD)
        if t == 0:
            return STUCK
        if ld8(t + sh.T_KEEPS) == 0:
            st64(s + sh.HELD, sh.NO_SLOT)
    else:
        t = template(s, item, sh.F_PLACED)
        if t == 0:
            return STUCK
        place = ld64(item + sh.LOW) - ld64(r + sh.R_LOW)
        if s + sh.ITEMS + ld8(r + sh.R_FIRST) * sh.ITEM == item:
            o = lead(s, o, item, r)
        elif ld64(s + sh.HELD) != slot:
            o = piece(o, ld64(s + sh.TAKE_CODE + slot * 8))
        st64(s + sh.HELD, slot if ld8(t + sh.T_KEEPS) else sh.NO_SLOT)
    base = o - b
    o = copy_code(o, t)
    fill_in(s, base, item, t, place)
    ends = ld8(f + sh.F_ENDS)
    if ends == Ends.NO:
        return o
    behind = ld16(item + sh.AT) + ld16(item + sh.LENGTH_OF)
    mode = ld64(s + sh.KEY_MODE) & ~Mode.PLAIN
    if ends == Ends.CALL:
        return leave(s, o, ld64(item + sh.EXTRA), backward(s, ld64(item + sh.EXTRA), item), mode, item)
    if ends == Ends.MODE:
        return leave(s, o, behind, 0, (mode & ~Mode.AC) | ld8(f + sh.F_COND), 0)
    if ends == Ends.LOOK:
        return leave(s, o, behind, 1, mode, 0)
    return o


def loop_entry(s: int, o: int) -> int:
    """What comes before a loop, and where jumps back to the block's start go (renaming.py, hoisting.py)."""
    b = ld64(s + sh.BEGIN)
    m = ld64(s + sh.BY_MODE)
    live = 1 if ld64(s + sh.LIVE_) else 0
    o = piece(o, ld64(s + sh.REDO))
    i = 0
    while i < ld64(s + sh.TABLES):
        table = s + sh.TABLE_LIST + i * sh.TABLE
        o = piece(o, ld64(table + sh.B_LEAD))
        st32(o, ld64(table + sh.B_DISP))
        o = o + 4
        on_stack = ld8(table + sh.B_STACK)
        length = ld64(table + sh.B_LENGTH)
        p = ld64(m + sh.M_CHECK + (live * 2 + on_stack * 4) * 8)
        jump = o - b + ld16(p + sh.P_ONE)
        o = piece(o, p)
        st32(b + jump - 6, 4096 - length)
        desc = TABLE_BITS + ((ld64(s + sh.KEY_MODE) & 3) << 24) + ((length >> 3) << 12) + ld64(s + sh.OFFSET)
        check_later(s, jump, o - b, desc, live + on_stack * 2 + ld64(s + sh.MOVED))
        slot = SLOTS - ld64(s + sh.TABLES) + i
        o = piece(o, ld64(s + sh.KEEP_CODE + slot * 8))
        r = s + sh.RANGE_LIST + (ld64(s + sh.RANGES) + i) * sh.RANGE_SIZE
        st64(r + sh.R_LOW, 0)
        st8(r + sh.R_FIRST, 255)
        st8(r + sh.R_SLOT, slot)
        readers = ld64(table + sh.B_READERS)
        item = s + sh.ITEMS
        while readers:
            if readers & 1:
                st8(item + sh.RANGE, ld64(s + sh.RANGES) + i + 1)
                st64(item + sh.LOW, 0)
            readers = readers >> 1
            item = item + sh.ITEM
        i = i + 1
    st64(s + sh.TOP, o - b)
    o = piece(o, ld64(s + sh.CHECK_CODE + live * 8))
    way(s, sh.BREAKS, o - b - (7 if live else 4), ld64(s + sh.OFFSET), 0)
    return o


def moved_way_out(s: int, o: int, check: int) -> int:
    """The way out of a check where registers are elsewhere: they come home, and go there again."""
    desc = ld32(check + sh.C_DESC)
    if ld32(check + sh.C_SAVED) & 1:
        o = piece(o, ld64(s + sh.RESTORE_CODE))
    o = piece(o, ld64(s + sh.UNDO))
    st8(o, 0x68)
    st32(o + 1, desc)
    o = piece(o + 5, ld64(s + sh.CALLS + (8 if desc & RANGE_BIT else 0)))
    o = piece(o, ld64(s + sh.REDO))
    st8(o, 0xE9)
    patch(ld64(s + sh.BEGIN), o + 1 - ld64(s + sh.BEGIN), ld32(check + sh.C_BACK))
    return o + 5


def check_way_out(s: int, o: int, check: int) -> int:
    """The way out of a check."""
    b = ld64(s + sh.BEGIN)
    desc = ld32(check + sh.C_DESC)
    saved = ld32(check + sh.C_SAVED)
    kind = saved & 1
    if desc & RANGE_BIT:
        kind = kind + 2
    if saved & 2:
        here = o - b
        if (desc >> 22) & 3:
            kind = kind + 4
        if saved & 4:
            kind = kind + 8
        size = (desc >> 12) & 1023
        if desc & TABLE_BITS == TABLE_BITS:
            size = size * 8
        p = ld64(ld64(s + sh.BY_MODE) + sh.M_TAIL + kind * 8)
        o = piece(o, p)
        patch(b, here + ld16(p + sh.P_ONE), ld32(check + sh.C_BACK))
        st32(b + here + ld16(p + sh.P_TWO), 4096 - size)
    else:
        o = piece(o, ld64(s + sh.TAILS + kind * 8))
    st32(o - SLOW_SIZE + 1, desc)
    patch(b, o - b - 4, ld32(check + sh.C_BACK))
    return o


def ways_out(s: int, o: int) -> int:
    """What is rarely run: behind the block's instructions."""
    b = ld64(s + sh.BEGIN)
    c = ld64(s + sh.WORDS)
    i = 0
    while i < ld64(s + sh.CHECKS):
        check = s + sh.CHECK_LIST + i * sh.CHECK
        patch(b, ld32(check + sh.C_JUMP), o - b)
        o = moved_way_out(s, o, check) if ld32(check + sh.C_SAVED) & sh.IS_MOVED else check_way_out(s, o, check)
        i = i + 1
    out = s + sh.WAY_LIST + (sh.OUTS - sh.BREAKS) * sh.WAYS_ROOM
    i = 0
    while i < ld64(s + sh.OUTS):
        patch(b, ld64(out + sh.W_SITE), o - b)
        o = piece(o, ld64(s + sh.UNDO))
        target = ld64(out + sh.W_TARGET)
        o = leave(s, o, target, 0 if lts(ld16(ld64(out + sh.W_ITEM) + sh.AT), target) else 1, ld64(s + sh.KEY_MODE), 0)
        if o & STUCK:
            return STUCK
        out = out + sh.WAY
        i = i + 1
    i = 0
    while i < ld64(s + sh.LINKED):
        knot = s + sh.LINK_LIST + i * sh.KNOT
        here = o - b
        site = ld32(knot + sh.K_SITE)
        entry = find(ld64(c + tb.HASH), ld64(knot + sh.K_KEY))
        if entry:
            patch(b, site, ld64(entry + 16) - ld64(c + tb.RX) - ld64(c + tb.POS))
        else:
            patch(b, site, here)
        st32(knot + sh.K_STUB, here)
        o = piece(o, ld64(s + sh.LINK_CODE))
        st64(o - LINK_SIZE + LINK_KEY, ld64(knot + sh.K_KEY))
        st32(o - 4, site - (o - b - 4))
        i = i + 1
    out = s + sh.WAY_LIST
    i = 0
    while i < ld64(s + sh.BREAKS):
        site = ld64(out + sh.W_SITE)
        patch(b, site, o - b)
        if ld64(s + sh.TOP) and site - ld64(s + sh.TOP) < CHECK_SIZE:  # it is the loop's, the only one in its body
            o = piece(o, ld64(s + sh.UNDO))
        o = piece(to_page(s, o, ld64(out + sh.W_TARGET)), ld64(s + sh.BREAK_CODE))
        out = out + sh.WAY
        i = i + 1
    out = s + sh.WAY_LIST + (sh.FARS - sh.BREAKS) * sh.WAYS_ROOM
    i = 0
    while i < ld64(s + sh.FARS):
        patch(b, ld64(out + sh.W_SITE), o - b)
        o = long(s, o, ld64(out + sh.W_TARGET), ld64(out + sh.W_ITEM))
        out = out + sh.WAY
        i = i + 1
    return o


def beginning(s: int) -> int:
    """The checked entry, and for a block on two pages the look whether the second is still there."""
    c = ld64(s + sh.WORDS)
    m = ld64(s + sh.BY_MODE)
    b = ld64(s + sh.BEGIN)
    p = ld64(m + sh.M_PROLOGUE + (8 if ld64(s + sh.LIVE_) else 0))
    o = piece(b, p)
    st64(s + sh.ENTRY_OFFSET, o - b)
    patch(b, ld16(p + sh.P_ONE), ld64(s + sh.STUB_SECOND + (ld64(s + sh.KEY_MODE) & 3) * 8) - ld64(c + tb.POS))
    patch(b, ld16(p + sh.P_TWO), ld64(s + sh.STUB_BREAK) - ld64(c + tb.POS))
    st32(b + ld16(p + sh.P_THREE), 0 - ld64(s + sh.OFFSET))
    if ld64(s + sh.SECOND) != NONE:
        p = ld64(m + sh.M_SPAN)
        address = ld64(c + tb.RAM) + ld64(s + sh.SECOND)
        st64(s + sh.SPAN, o - b)
        st64(piece(o, p) - ld16(p + sh.P_CODE) + ld16(p + sh.P_ONE), address)
        st64(o + ld16(p + sh.P_TWO), address)
        st32(o + ld16(p + sh.P_THREE), ld64(s + sh.OFFSET))
        o = o + ld16(p + sh.P_CODE)
    return o


def write(s: int) -> int:
    """The block's code; returns where it ends."""
    c = ld64(s + sh.WORDS)
    b = ld64(c + tb.RW) + ld64(c + tb.POS)
    st64(s + sh.BEGIN, b)
    st64(s + sh.CHECKS, 0)
    st64(s + sh.LINKED, 0)
    st64(s + sh.BREAKS, 0)
    st64(s + sh.FARS, 0)
    st64(s + sh.OUTS, 0)
    st64(s + sh.COPYING, 0)
    st64(s + sh.TOP, 0)
    st64(s + sh.MOVED, 0)
    st64(s + sh.HELD, sh.NO_SLOT)
    o = beginning(s)
    if ld64(s + sh.LOOP):
        if ld64(s + sh.MOVING):
            st64(s + sh.MOVED, sh.IS_MOVED)
        o = loop_entry(s, o)
    noted = s + sh.MARK_LIST
    item = s + sh.ITEMS
    end = item + ld64(s + sh.COUNT) * sh.ITEM
    behind = item + ld64(s + sh.LOOP) * sh.ITEM
    while item < end:
        if item == behind and ld64(s + sh.MOVED):
            o = piece(o, ld64(s + sh.UNDO))
            st64(s + sh.MOVED, 0)
        st16(noted, o - b)
        st16(noted + 2, ld16(item + sh.AT))
        noted = noted + 4
        o = branch(s, o, item) if ld8(ld64(item + sh.FORM) + sh.F_ENDS) >= Ends.JCC else ordinary(s, o, item)
        if o & STUCK:
            return STUCK
        item = item + sh.ITEM
    if ld64(s + sh.ENDS) == Ends.NO or ld64(s + sh.ENDS) == Ends.JCC:
        if ld64(s + sh.MOVED):
            o = piece(o, ld64(s + sh.UNDO))
        mode = ld64(s + sh.KEY_MODE) & ~Mode.PLAIN
        o = leave(s, o, ld64(s + sh.OFFSET) + ld64(s + sh.SIZE), ld64(s + sh.SHADOW), mode, 0)
        if o & STUCK:
            return STUCK
    return ways_out(s, o)


WRITING_ROUTINES = [
    piece, check_later, copy_later, way, to_page, long, direct, leave, loop_branch, branch, template, lead, fill_in,
    copy_code, ordinary, loop_entry, moved_way_out, check_way_out, ways_out, beginning, write,
]  # fmt: skip
