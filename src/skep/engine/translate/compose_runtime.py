"""Composing: most blocks are drafted and written by machine code, in the compiled language (runtime.py).

What :class:`drafting.Drafting` and :class:`emission.Emission` do in Python, for blocks of 64-bit code on one page that
do not jump back to their own start, byte for byte the same. ``s`` is the sheet; sheet.py says what stands where. Where
these routines do not know an instruction, or have no template, they say so and begin again when Python has made it:
before the last step nothing of the block counts.
"""

from __future__ import annotations

from skep.engine.translate import sheet as sh
from skep.engine.translate import tables as tb
from skep.engine.translate.block_runtime import find, mark
from skep.engine.translate.compiler import (
    copy8,
    inline,
    ld8,
    ld16,
    ld32,
    ld64,
    lts,
    sar,
    set8,
    set64,
    st8,
    st16,
    st32,
    st64,
)
from skep.engine.translate.drafting import LOOK, MAX_BRANCHES, MAX_BYTES, MAX_INSTRUCTIONS
from skep.engine.translate.emission import LINK_KEY, LINK_SIZE, RANGE_BIT, SLOW_SIZE
from skep.engine.translate.forms import ALL_FLAGS, HOLE_IP, HOLE_NEXT, HOLE_PLACE, Ends
from skep.engine.translate.layout import SLOTS, Mode
from skep.engine.translate.sharing import REACH
from skep.engine.translate.sheet import Want

STUCK = 1 << 63
"""In place of flags or an address: Python is wanted first."""
NARROWEST = 0xFFFFFFFF80000000
"""As a signed number, the least of 32 bits."""


@inline
def wide(value: int, size: int) -> int:
    """A signed number of ``size`` bytes."""
    return sar(value << (64 - size * 8), 64 - size * 8)


@inline
def fits(value: int) -> int:
    """Whether a signed number has 32 bits."""
    return 1 if value - NARROWEST < 1 << 32 else 0


def constant(at: int, size: int) -> int:
    """A signed constant of a guest's instruction."""
    return wide(ld64(at), size)


def want(s: int, what: int, at: int, of: int) -> int:
    st64(s + sh.WANT, what)
    st64(s + sh.WANT_AT, at)
    st64(s + sh.WANT_OF, of)
    return STUCK


# Drafting


def leaf(s: int, at: int, limit: int) -> int:
    """The leaf of the instruction that begins at host address ``at``, where ``limit`` bytes may be read: CUT_OFF where
    they do not suffice, 0 where it is not known."""
    node = ld64(ld64(s + sh.BY_MODE) + sh.M_ROOT)
    end = at + limit
    while at < end:
        key = (node << 8) + ld8(at) + 1
        number = (key * 0x9E3779B97F4A7C15) >> (64 - sh.TREE_BITS)
        edge = ld64(s + sh.TREE) + number * 8
        while ld32(edge) != key:
            if ld32(edge) == 0:
                return 0
            number = (number + 1) & ((1 << sh.TREE_BITS) - 1)
            edge = ld64(s + sh.TREE) + number * 8
        node = ld32(edge + 4)
        if node & sh.IS_LEAF:
            return ld64(ld64(s + sh.LEAVES) + (node - sh.IS_LEAF) * 8)
        at = at + 1
    return sh.CUT_OFF


def instruction(s: int, at: int, data: int, limit: int) -> int:
    """The leaf of the instruction at offset ``at`` of the page, whose bytes are at host address ``data``: CUT_OFF for
    none, 0 where Python is asked first."""
    found = leaf(s, data, limit)
    if found == 0:
        i = 0
        while i < ld64(s + sh.CUTS):
            if ld64(s + sh.CUT + i * 8) == (at << 16) + limit:
                return sh.CUT_OFF
            i = i + 1
        want(s, Want.FORM, at, limit)
        return 0
    if ((found >> sh.LEAF_LENGTH) & 255) > limit:
        return sh.CUT_OFF
    return found


@inline
def form(s: int, found: int) -> int:
    """The form of a leaf."""
    return ld64(s + sh.FORMS) + (found & 0xFFFFFF) * sh.FORM_SIZE


def draft(s: int) -> int:
    """Which instructions make the block: as Drafting.draft."""
    c = ld64(s + sh.WORDS)
    offset = ld64(s + sh.OFFSET)
    room = 4096 - offset
    limit = MAX_BYTES
    if room < limit:
        limit = room
    data = s + sh.DATA
    copy8(data, ld64(c + tb.RAM) + ld64(s + sh.PAGE) + offset, limit)
    mode = ld64(s + sh.KEY_MODE) & ~Mode.PLAIN
    at = 0
    branches = 0
    shadow = 0
    ends = Ends.NO
    count = 0
    item = s + sh.ITEMS
    while at < limit:
        found = instruction(s, offset + at, data + at, limit - at)
        if found == 0:
            return STUCK
        if found == sh.CUT_OFF or (found >> sh.LEAF_FLAGS) & sh.NOT_ONE:
            if count:
                break
            if found == sh.CUT_OFF or (limit < 15 and room <= MAX_BYTES):
                return want(s, Want.RARE, 0, 0)
        n = (found >> sh.LEAF_LENGTH) & 255
        f = form(s, found)
        extra = 0
        flags = found >> sh.LEAF_FLAGS
        if flags & (sh.BRANCH | sh.RELATIVE):
            extra = constant(data + at + ((found >> sh.LEAF_AT) & 255), (found >> sh.LEAF_SIZE) & 255) + offset + at + n
            if flags & sh.RELATIVE and not fits(extra):
                f = ld64(ld64(s + sh.BY_MODE) + sh.M_EMULATED)
        ends = ld8(f + sh.F_ENDS)
        st64(item + sh.FORM, f)
        st16(item + sh.AT, offset + at)
        st16(item + sh.LENGTH_OF, n)
        st64(item + sh.EXTRA, extra)
        item = item + sh.ITEM
        count = count + 1
        at = at + n
        if ends:
            if (
                flags & sh.BRANCH
                and extra == offset
                and (ends == Ends.JCC or ends == Ends.JMP)
                and shadow == 0
                and ld64(s + sh.KEY_MODE) & Mode.PLAIN == 0
            ):
                return want(s, Want.RARE, 0, 0)
            if ends == Ends.JCC and branches < MAX_BRANCHES and shadow == 0:
                branches = branches + 1
                ends = Ends.NO
                if find(ld64(c + tb.HASH), ((ld64(s + sh.PAGE) + offset + at) << Mode.BITS) + mode):
                    break
            elif ends == Ends.SHADOW:
                ends = Ends.NO
                if at + 15 > room or shadow:
                    st64(item - sh.ITEM + sh.FORM, ld64(ld64(s + sh.BY_MODE) + sh.M_EMULATED))
                    st64(item - sh.ITEM + sh.EXTRA, 0)
                    ends = Ends.YES
                    break
                shadow = 1
                continue
            else:
                break
        if shadow or count >= MAX_INSTRUCTIONS:
            break
    st64(s + sh.SIZE, at)
    st64(s + sh.ENDS, ends)
    st64(s + sh.SHADOW, shadow)
    st64(s + sh.COUNT, count)
    return 0


def noted_constant(look: int, at: int, size: int) -> int:
    """Some bytes that were looked at do not count."""
    count = ld16(look + sh.L_COUNT)
    st8(look + sh.L_CONSTANTS + count * 2, at)
    st8(look + sh.L_CONSTANTS + count * 2 + 1, size)
    st16(look + sh.L_COUNT, count + 1)
    return 0


def live_at(s: int, offset: int) -> int:
    """The flags that code at an offset of the page reads before it writes them, as far as a short look tells: as
    Drafting.live_at."""
    c = ld64(s + sh.WORDS)
    data = ld64(c + tb.RAM) + ld64(s + sh.PAGE) + offset
    limit = 20
    if 4096 - offset < limit:
        limit = 4096 - offset
    look = s + sh.LOOK_LIST + ld64(s + sh.LOOKED) * sh.LOOK_SIZE
    st16(look + sh.L_COUNT, 0)
    need = 0
    still = ALL_FLAGS
    at = 0
    left = LOOK
    while left:
        left = left - 1
        if at == limit:
            break
        found = instruction(s, offset + at, data + at, limit - at)
        if found == 0:
            return STUCK
        if found == sh.CUT_OFF or (found >> sh.LEAF_FLAGS) & sh.NOT_ONE:
            break
        f = form(s, found)
        if ld8(f + sh.F_DISP_SIZE) > 1:
            noted_constant(look, at + ld8(f + sh.F_DISP), ld8(f + sh.F_DISP_SIZE))
        if ld8(f + sh.F_IMM_SIZE) > 1:
            noted_constant(look, at + ld8(f + sh.F_IMM), ld8(f + sh.F_IMM_SIZE))
        at = at + ((found >> sh.LEAF_LENGTH) & 255)
        if ld8(f + sh.F_FLAGS) & sh.IS_RELATIVE:
            noted_constant(look, at - 4 - ld8(f + sh.F_BEHIND), 4)
        need = need | (still & ld16(f + sh.F_READS))
        still = still & ld16(f + sh.F_KEEPS)
        if still == 0 or ld8(f + sh.F_ENDS):
            break
    need = need | still
    if need != ALL_FLAGS:
        st16(look + sh.L_OFFSET, offset)
        st16(look + sh.L_SIZE, at)
        st64(s + sh.LOOKED, ld64(s + sh.LOOKED) + 1)
        mark(c, ld64(s + sh.PAGE) + offset, at)
    return need


def look_at_targets(s: int) -> int:
    """What the targets that are noted read."""
    live = 0
    i = 0
    while i < ld64(s + sh.TARGETS):
        live = live | live_at(s, ld64(s + sh.TARGET_LIST + i * 8))
        if live & STUCK:
            return live
        i = i + 1
    st64(s + sh.TARGETS, 0)
    return live


@inline
def noted_target(s: int, offset: int) -> int:
    st64(s + sh.TARGET_LIST + ld64(s + sh.TARGETS) * 8, offset)
    st64(s + sh.TARGETS, ld64(s + sh.TARGETS) + 1)
    return 0


def needs(s: int) -> int:
    """For each instruction whether flags must survive its checks, and which flags the block reads: as
    Drafting.needs."""
    live = ALL_FLAGS
    st64(s + sh.TARGETS, 0)
    ends = ld64(s + sh.ENDS)
    behind = ld64(s + sh.OFFSET) + ld64(s + sh.SIZE)
    if (
        ends == Ends.NO or ends == Ends.JCC or ends == Ends.LOOP or ends == Ends.MODE or ends == Ends.LOOK
    ) and behind < 4096:
        live = 0
        noted_target(s, behind)
    item = s + sh.ITEMS + ld64(s + sh.COUNT) * sh.ITEM
    while item > s + sh.ITEMS:
        item = item - sh.ITEM
        f = ld64(item + sh.FORM)
        ends = ld8(f + sh.F_ENDS)
        if ends:
            if ends == Ends.JMP or ends == Ends.CALL:
                live = 0
                st64(s + sh.TARGETS, 0)
            elif ends == Ends.YES:
                live = ALL_FLAGS
                st64(s + sh.TARGETS, 0)
            if ends == Ends.JCC or ends == Ends.LOOP or ends == Ends.JMP or ends == Ends.CALL:
                if ld64(item + sh.EXTRA) < 4096:
                    noted_target(s, ld64(item + sh.EXTRA))
                else:
                    live = ALL_FLAGS
        if ld16(f + sh.F_KEEPS):
            if ld64(s + sh.TARGETS) and ld8(f + sh.F_FLAGS) & sh.MEMORY and live != ALL_FLAGS:
                live = live | look_at_targets(s)
                if live & STUCK:
                    return STUCK
            live = (live & ld16(f + sh.F_KEEPS)) | ld16(f + sh.F_READS)
        else:
            live = ld16(f + sh.F_READS)
            st64(s + sh.TARGETS, 0)
        st8(item + sh.NEED, 1 if live else 0)
    if live != ALL_FLAGS:
        live = live | look_at_targets(s)
        if live & STUCK:
            return STUCK
    st64(s + sh.LIVE_, live)
    return 0


# Sharing


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


def shares(s: int) -> int:
    """Which operands share a check: as sharing.shares."""
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
    while i < ld64(s + sh.RANGES) and slot < SLOTS:
        r = s + sh.RANGE_LIST + i * sh.RANGE_SIZE
        if ld8(r + sh.R_COUNT) > 1:
            st8(r + sh.R_SLOT, slot)
            slot = slot + 1
        i = i + 1
    st64(s + sh.SLOTS_USED, slot)
    return 0


# Writing: ``o`` is the host address, writable, where the next byte of the block goes


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


@inline
def way(list_: int, count: int, site: int, target: int) -> int:
    """A way out: the displacement's offset, and the offset in the page to go on at."""
    st32(list_ + count * sh.WAY + sh.B_SITE, site)
    st64(list_ + count * sh.WAY + sh.B_TARGET, target)
    return 0


@inline
def far(s: int, site: int, target: int) -> int:
    """A jump to another page."""
    way(s + sh.FAR_LIST, ld64(s + sh.FARS), site, target)
    st64(s + sh.FARS, ld64(s + sh.FARS) + 1)
    return 0


def to_page(s: int, o: int, target: int) -> int:
    """r10 = the page's address plus an offset."""
    o = piece(o, ld64(s + sh.PAGE_CODE))
    st32(o, target)
    return o + 4


def long(s: int, o: int, target: int) -> int:
    """Go to another page, through the jump cache."""
    if not fits(target):
        return want(s, Want.RARE, 0, 0)
    return piece(to_page(s, o, target), ld64(ld64(s + sh.BY_MODE) + sh.M_DISPATCH))


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
    if key == ((ld64(s + sh.PAGE) + ld64(s + sh.OFFSET)) << Mode.BITS) + ld64(s + sh.KEY_MODE):
        patch(b, site, ld64(s + sh.ENTRY_OFFSET))
    else:
        knot = s + sh.LINK_LIST + ld64(s + sh.LINKED) * sh.KNOT
        st32(knot + sh.K_SITE, site)
        st64(knot + sh.K_KEY, key)
        st64(s + sh.LINKED, ld64(s + sh.LINKED) + 1)
    return o + 4


def leave(s: int, o: int, target: int, looks: int, mode: int) -> int:
    """Go to ``target``, unconditionally."""
    if target >= 4096:
        return long(s, o, target)
    if looks:
        live = live_at(s, target)
        if live & STUCK:
            return STUCK
        o = piece(o, ld64(s + sh.CHECK_CODE + (8 if live else 0)))
        way(s + sh.BREAK_LIST, ld64(s + sh.BREAKS), o - ld64(s + sh.BEGIN) - (7 if live else 4), target)
        st64(s + sh.BREAKS, ld64(s + sh.BREAKS) + 1)
    return direct(s, o, 0xE9, 1, target, mode)


def branch(s: int, o: int, item: int) -> int:
    """A Jcc, JMP or LOOP."""
    b = ld64(s + sh.BEGIN)
    f = ld64(item + sh.FORM)
    ends = ld8(f + sh.F_ENDS)
    at = ld16(item + sh.AT)
    n = ld16(item + sh.LENGTH_OF)
    target = ld64(item + sh.EXTRA)
    mode = ld64(s + sh.KEY_MODE) & ~Mode.PLAIN
    if ends == Ends.JMP:
        return leave(s, o, target, 1 if ld64(s + sh.SHADOW) or not lts(at, target) else 0, mode)
    if ends == Ends.LOOP:
        copy8(o, s + sh.DATA + at - ld64(s + sh.OFFSET), n - 1)
        skip = o + n
        o = leave(s, skip, at + n, 1, mode)
        if o & STUCK:
            return STUCK
        st8(skip - 1, o - skip)
        return leave(s, o, target, 1, mode)
    jcc = 0x800F + (ld8(f + sh.F_COND) << 8)
    if target >= 4096:
        st16(o, jcc)
        st32(o + 2, 0)
        far(s, o + 2 - b, target)
        return o + 6
    if at < target and ld64(s + sh.SHADOW) == 0:
        return direct(s, o, jcc, 2, target, mode)
    st16(o, jcc ^ 0x100)
    skip = o + 6
    o = leave(s, skip, target, 1, mode)
    if o & STUCK:
        return STUCK
    st32(skip - 4, o - skip)
    return o


def template(s: int, item: int, which: int) -> int:
    """An instruction's template, 0 where Python is asked first."""
    t = ld32(ld64(item + sh.FORM) + which)
    if t == 0:
        want(s, Want.TEMPLATE, (item - s - sh.ITEMS) // sh.ITEM, which)
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
    o = piece(o, ld64(s + sh.LEAD_CODE + register * 8))
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
    check_later(s, jump, o - b, desc, saved)
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
        check_later(s, base + ld16(p), base + ld16(p + 2), ld32(p + 4) | at, ld32(p + 8))
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
    at = ld16(item + sh.AT)
    behind = at + ld16(item + sh.LENGTH_OF)
    mode = ld64(s + sh.KEY_MODE) & ~Mode.PLAIN
    if ends == Ends.CALL:
        target = ld64(item + sh.EXTRA)
        return leave(s, o, target, 1 if ld64(s + sh.SHADOW) or not lts(at, target) else 0, mode)
    if ends == Ends.MODE:
        return leave(s, o, behind, 0, (mode & ~Mode.AC) | ld8(f + sh.F_COND))
    if ends == Ends.LOOK:
        return leave(s, o, behind, 1, mode)
    return o


def ways_out(s: int, o: int) -> int:
    """What is rarely run: behind the block's instructions."""
    b = ld64(s + sh.BEGIN)
    c = ld64(s + sh.WORDS)
    m = ld64(s + sh.BY_MODE)
    i = 0
    while i < ld64(s + sh.CHECKS):
        check = s + sh.CHECK_LIST + i * sh.CHECK
        desc = ld32(check + sh.C_DESC)
        saved = ld32(check + sh.C_SAVED)
        kind = saved & 1
        if desc & RANGE_BIT:
            kind = kind + 2
        here = o - b
        patch(b, ld32(check + sh.C_JUMP), here)
        if saved & 2:
            if (desc >> 22) & 3:
                kind = kind + 4
            if saved & 4:
                kind = kind + 8
            p = ld64(m + sh.M_TAIL + kind * 8)
            o = piece(o, p)
            patch(b, here + ld16(p + sh.P_ONE), ld32(check + sh.C_BACK))
            st32(b + here + ld16(p + sh.P_TWO), 4096 - ((desc >> 12) & 1023))
        else:
            o = piece(o, ld64(s + sh.TAILS + kind * 8))
        st32(o - SLOW_SIZE + 1, desc)
        patch(b, o - b - 4, ld32(check + sh.C_BACK))
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
    i = 0
    while i < ld64(s + sh.BREAKS):
        out = s + sh.BREAK_LIST + i * sh.WAY
        patch(b, ld32(out + sh.B_SITE), o - b)
        o = piece(to_page(s, o, ld64(out + sh.B_TARGET)), ld64(s + sh.BREAK_CODE))
        i = i + 1
    i = 0
    while i < ld64(s + sh.FARS):
        out = s + sh.FAR_LIST + i * sh.WAY
        patch(b, ld32(out + sh.B_SITE), o - b)
        o = long(s, o, ld64(out + sh.B_TARGET))
        if o & STUCK:
            return STUCK
        i = i + 1
    return o


def write(s: int) -> int:
    """The block's code: as Emission.emit."""
    c = ld64(s + sh.WORDS)
    b = ld64(c + tb.RW) + ld64(c + tb.POS)
    st64(s + sh.BEGIN, b)
    st64(s + sh.CHECKS, 0)
    st64(s + sh.LINKED, 0)
    st64(s + sh.BREAKS, 0)
    st64(s + sh.FARS, 0)
    st64(s + sh.COPYING, 0)
    st64(s + sh.HELD, sh.NO_SLOT)
    mode = ld64(s + sh.KEY_MODE)
    p = ld64(ld64(s + sh.BY_MODE) + sh.M_PROLOGUE + (8 if ld64(s + sh.LIVE_) else 0))
    o = piece(b, p)
    st64(s + sh.ENTRY_OFFSET, o - b)
    patch(b, ld16(p + sh.P_ONE), ld64(s + sh.STUB_SECOND + (mode & 3) * 8) - ld64(c + tb.POS))
    patch(b, ld16(p + sh.P_TWO), ld64(s + sh.STUB_BREAK) - ld64(c + tb.POS))
    st32(b + ld16(p + sh.P_THREE), 0 - ld64(s + sh.OFFSET))
    noted = s + sh.MARK_LIST
    item = s + sh.ITEMS
    end = item + ld64(s + sh.COUNT) * sh.ITEM
    while item < end:
        st16(noted, o - b)
        st16(noted + 2, ld16(item + sh.AT))
        noted = noted + 4
        o = branch(s, o, item) if ld8(ld64(item + sh.FORM) + sh.F_ENDS) >= Ends.JCC else ordinary(s, o, item)
        if o & STUCK:
            return STUCK
        item = item + sh.ITEM
    if ld64(s + sh.ENDS) == Ends.NO or ld64(s + sh.ENDS) == Ends.JCC:
        o = leave(s, o, ld64(s + sh.OFFSET) + ld64(s + sh.SIZE), ld64(s + sh.SHADOW), mode & ~Mode.PLAIN)
        if o & STUCK:
            return STUCK
    return ways_out(s, o)


def describe(s: int, size: int) -> int:
    """The block has ``size`` bytes of code: its marks behind them, its description, and where the next one goes."""
    c = ld64(s + sh.WORDS)
    pos = ld64(c + tb.POS)
    stop = pos + size
    at = (stop + 1) & ~1
    marks = ld64(s + sh.COUNT) * 4
    copy8(ld64(c + tb.RW) + at, s + sh.MARK_LIST, marks)
    mark(c, ld64(s + sh.PAGE) + ld64(s + sh.OFFSET), ld64(s + sh.SIZE))
    low = 0
    high = 0
    i = 0
    while i < ld64(s + sh.LOOKED):
        look = s + sh.LOOK_LIST + i * sh.LOOK_SIZE
        if i == 0 or ld16(look + sh.L_OFFSET) < low:
            low = ld16(look + sh.L_OFFSET)
        if ld16(look + sh.L_OFFSET) + ld16(look + sh.L_SIZE) > high:
            high = ld16(look + sh.L_OFFSET) + ld16(look + sh.L_SIZE)
        i = i + 1
    block = ld64(c + tb.DESCRIPTIONS) + ld64(c + tb.NEXT) * tb.DESCRIPTION
    st64(block + tb.KEY, ((ld64(s + sh.PAGE) + ld64(s + sh.OFFSET)) << Mode.BITS) + ld64(s + sh.KEY_MODE))
    st32(block + tb.START, pos)
    st32(block + tb.ENTRY, pos + ld64(s + sh.ENTRY_OFFSET))
    st32(block + tb.STOP, stop)
    st16(block + tb.MARKS, marks >> 1)
    st16(block + tb.SIZE, ld64(s + sh.SIZE))
    st16(block + tb.LOOK_LOW, low)
    st16(block + tb.LOOK_HIGH, high)
    st32(block + tb.LIVE_FLAGS, ld64(s + sh.LIVE_))
    st32(block + tb.SECOND_FRAME, 0)
    st64(c + tb.NEXT, ld64(c + tb.NEXT) + 1)
    st64(c + tb.POS, (at + marks + 15) & ~15)
    return 0


def compose(s: int) -> int:
    """Make the block at offset OFFSET of the page PAGE, as Cache._make: nothing leads to it. Returns Want.NOTHING, or
    what is wanted first."""
    st64(s + sh.WANT, Want.NOTHING)
    st64(s + sh.LOOKED, 0)
    if draft(s) & STUCK:
        return ld64(s + sh.WANT)
    if needs(s) & STUCK:
        return ld64(s + sh.WANT)
    shares(s)
    o = write(s)
    if o & STUCK:
        return ld64(s + sh.WANT)
    describe(s, o - ld64(s + sh.BEGIN))
    return Want.NOTHING


# For the store


def run(r: int, offset: int, data: int, size: int, masked: int) -> int:
    """Write at ``r`` a run of a record: bytes that stand at an offset of the page, and a mask that has them all.
    Returns what follows."""
    words = ((offset + size + 7) >> 3) - (offset >> 3)
    st16(r, offset)
    st16(r + 2, size)
    st32(r + 4, tb.RUN_MASKED if masked else 0)
    r = r + tb.RUN
    set64(r, 0, words)
    copy8(r + (offset & 7), data, size)
    r = r + words * 8
    if masked:
        set64(r, 0, words)
        set8(r + (offset & 7), 255, size)
        r = r + words * 8
    return r


def unmask(mask: int, size: int) -> int:
    """So many bytes do not count."""
    while size:
        st8(mask, 0)
        mask = mask + 1
        size = size - 1
    return 0


def looked_before(s: int, i: int) -> int:
    """Whether a look at the same place was noted before."""
    offset = ld16(s + sh.LOOK_LIST + i * sh.LOOK_SIZE + sh.L_OFFSET)
    while i:
        i = i - 1
        if ld16(s + sh.LOOK_LIST + i * sh.LOOK_SIZE + sh.L_OFFSET) == offset:
            return 1
    return 0


def unplaced(s: int, code: int) -> int:
    """Take from the copy of a block's code what depends on its place, and on which other blocks there are."""
    p = ld64(ld64(s + sh.BY_MODE) + sh.M_PROLOGUE + (8 if ld64(s + sh.LIVE_) else 0))
    st32(code + ld16(p + sh.P_ONE), 0)
    st32(code + ld16(p + sh.P_TWO), 0)
    i = 0
    while i < ld64(s + sh.LINKED):
        knot = s + sh.LINK_LIST + i * sh.KNOT
        patch(code, ld32(knot + sh.K_SITE), ld32(knot + sh.K_STUB))
        st64(code + ld32(knot + sh.K_STUB) + LINK_KEY, ld64(knot + sh.K_KEY) & ((1 << (Mode.BITS + 12)) - 1))
        i = i + 1
    i = 0
    while i < ld64(s + sh.COPYING):
        copied = s + sh.COPY_LIST + i * sh.CONSTANT
        at = code + ld16(copied + sh.Y_TO)
        data = s + sh.DATA + ld16(copied + sh.Y_OF)
        size = ld16(copied + sh.Y_SIZE)
        if size == 8:
            st64(at, ld64(at) - ld64(data))
        elif size == 2:
            st16(at, ld16(at) - ld16(data))
        else:
            st32(at, ld32(at) - ld32(data))
        i = i + 1
    return 0


def record(s: int, number: int) -> int:
    """Write down for the store the block ``number``, which compose has just made: bytes of the record at RECORD_AT, 0
    where it is too long."""
    c = ld64(s + sh.WORDS)
    block = ld64(c + tb.DESCRIPTIONS) + number * tb.DESCRIPTION
    size = ld32(block + tb.STOP) - ld32(block + tb.START)
    if size > sh.MOST_CODE:
        return 0
    offset = ld64(s + sh.OFFSET)
    head = s + sh.RECORD_AT
    r = run(head + tb.RECORD, offset, s + sh.DATA, ld64(s + sh.SIZE), ld64(s + sh.COPYING))
    words = ((offset + ld64(s + sh.SIZE) + 7) >> 3) - (offset >> 3)
    mask = r - words * 8 + (offset & 7)
    i = 0
    while i < ld64(s + sh.COPYING):
        copied = s + sh.COPY_LIST + i * sh.CONSTANT
        unmask(mask + ld16(copied + sh.Y_OF), ld16(copied + sh.Y_SIZE) & 15)
        i = i + 1
    runs = 1
    i = 0
    while i < ld64(s + sh.LOOKED):
        if looked_before(s, i) == 0:
            look = s + sh.LOOK_LIST + i * sh.LOOK_SIZE
            at = ld16(look + sh.L_OFFSET)
            n = ld16(look + sh.L_SIZE)
            words = ((at + n + 7) >> 3) - (at >> 3)
            r = run(r, at, ld64(c + tb.RAM) + ld64(s + sh.PAGE) + at, n, ld16(look + sh.L_COUNT))
            mask = r - words * 8 + (at & 7)
            k = 0
            while k < ld16(look + sh.L_COUNT):
                unmask(mask + ld8(look + sh.L_CONSTANTS + k * 2), ld8(look + sh.L_CONSTANTS + k * 2 + 1))
                k = k + 1
            runs = runs + 1
        i = i + 1
    i = 0
    while i < ld64(s + sh.COPYING):
        copied = s + sh.COPY_LIST + i * sh.CONSTANT
        st16(r, ld16(copied + sh.Y_TO))
        st16(r + 2, offset + ld16(copied + sh.Y_OF))
        st16(r + 4, ld16(copied + sh.Y_SIZE))
        r = r + tb.COPY
        i = i + 1
    i = 0
    while i < ld64(s + sh.LINKED):
        st16(r, ld32(s + sh.LINK_LIST + i * sh.KNOT + sh.K_STUB) + LINK_KEY)
        r = r + tb.LINK
        i = i + 1
    while (r - head) & 7:
        st8(r, 0)
        r = r + 1
    marks = ld16(block + tb.MARKS) * 2
    words = (((size + 1) & ~1) + marks + 7) >> 3
    st64(r + (words - 1) * 8, 0)
    copy8(r, ld64(c + tb.RW) + ld32(block + tb.START), size)
    if size & 1:
        st8(r + size, 0)
    copy8(r + ((size + 1) & ~1), s + sh.MARK_LIST, marks)
    unplaced(s, r)
    length = r - head + words * 8
    st32(head, length)
    st16(head + tb.WHICH, offset)
    st16(head + tb.WHICH + 2, ld64(s + sh.KEY_MODE))
    st16(head + tb.GUEST_BYTES, ld64(s + sh.SIZE))
    st16(head + tb.CODE_BYTES_OF, size)
    st16(head + tb.COPIED, words)
    st16(head + tb.ENTRY_AT, ld64(s + sh.ENTRY_OFFSET))
    st16(head + tb.FLAGS, ld64(s + sh.LIVE_))
    st16(head + tb.MARKS_OF, marks >> 1)
    p = ld64(ld64(s + sh.BY_MODE) + sh.M_PROLOGUE + (8 if ld64(s + sh.LIVE_) else 0))
    st16(head + tb.SECOND_AT, ld16(p + sh.P_ONE))
    st16(head + tb.BRK_AT, ld16(p + sh.P_TWO))
    st32(head + tb.SPAN_AT, 0)
    st16(head + tb.RUNS, runs)
    st16(head + tb.COPIES, ld64(s + sh.COPYING))
    st16(head + tb.LINKS, ld64(s + sh.LINKED))
    st32(head + tb.LOOKS, ld32(block + tb.LOOK_LOW))
    st16(head + tb.LOOKS + 4, 0)
    return length


COMPOSE_ROUTINES = [
    constant, want, leaf, instruction, draft, noted_constant, live_at, look_at_targets, needs, member, shares, piece,
    check_later, copy_later, to_page, long, direct, leave, branch, template, lead, fill_in, copy_code, ordinary,
    ways_out, write, describe, compose, run, unmask, looked_before, unplaced, record,
]  # fmt: skip
