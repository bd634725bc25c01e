"""Drafting: which instructions make a block, and which flags must survive where in it; in the compiled language
(runtime.py). ``s`` is the sheet.

Where an instruction is not known yet, these routines return STUCK, and what is wanted stands on the sheet: when Python
has found out they are called anew.
"""

from __future__ import annotations

from skep.engine.translate import sheet as sh
from skep.engine.translate import tables as tb
from skep.engine.translate.block_runtime import NONE, find, mark
from skep.engine.translate.compiler import copy8, inline, ld8, ld16, ld32, ld64, sar, st8, st16, st64
from skep.engine.translate.forms import ALL_FLAGS, Ends
from skep.engine.translate.layout import Mode
from skep.engine.translate.sheet import Want

MAX_INSTRUCTIONS = 48
MAX_BRANCHES = 6
MAX_BYTES = 192
LOOK = 3
"""Instructions that are looked at behind a jump."""
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
        st64(s + sh.WANT_BYTES, data)
        return 0
    if ((found >> sh.LEAF_LENGTH) & 255) > limit:
        return sh.CUT_OFF
    return found


@inline
def form(s: int, found: int) -> int:
    """The form of a leaf."""
    return ld64(s + sh.FORMS) + (found & 0xFFFFFF) * sh.FORM_SIZE


def fallback(s: int, room: int) -> int:
    """One instruction that is Python's to run, whatever it is."""
    size = 15
    if room < size:
        size = room
    item = s + sh.ITEMS
    st64(item + sh.FORM, ld64(ld64(s + sh.BY_MODE) + sh.M_EMULATED))
    st16(item + sh.AT, ld64(s + sh.OFFSET))
    st16(item + sh.LENGTH_OF, size)
    st64(item + sh.EXTRA, 0)
    st64(s + sh.SIZE, size)
    st64(s + sh.ENDS, Ends.YES)
    st64(s + sh.COUNT, 1)
    return 0


def goes(leaf_: int, data: int, behind: int) -> int:
    """Where a branch goes, or what an operand relative to RIP addresses, relative to the page; ``behind``: the offset
    behind the instruction."""
    target = constant(data + ((leaf_ >> sh.LEAF_AT) & 255), (leaf_ >> sh.LEAF_SIZE) & 255) + behind
    if (leaf_ >> sh.LEAF_FLAGS) & sh.WRAPS16:
        return wide(target, 2)
    if (leaf_ >> sh.LEAF_FLAGS) & sh.WRAPS32:
        return wide(target, 4)
    return target


def draft(s: int) -> int:
    """Which instructions make the block."""
    c = ld64(s + sh.WORDS)
    offset = ld64(s + sh.OFFSET)
    room = 4096 - offset
    data = s + sh.DATA
    limit = ld64(s + sh.GIVEN)
    if limit == 0:
        limit = MAX_BYTES
        if room < limit:
            limit = room
        copy8(data, ld64(c + tb.RAM) + ld64(s + sh.PAGE) + offset, limit)
    st64(s + sh.SHADOW, 0)
    st64(s + sh.LOOP, 0)
    if ld64(s + sh.FALLBACK):
        return fallback(s, room)
    m = ld64(s + sh.BY_MODE)
    mode = ld64(s + sh.KEY_MODE) & ~Mode.PLAIN
    at = 0
    branches = 0
    shadow = 0
    loop = 0
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
            if ld64(s + sh.GIVEN) == 0 and limit < 15:
                return want(s, Want.SECOND, 0, 0)
            if found == sh.CUT_OFF:
                return fallback(s, room)
        n = (found >> sh.LEAF_LENGTH) & 255
        f = form(s, found)
        extra = 0
        if (found >> sh.LEAF_FLAGS) & (sh.BRANCH | sh.RELATIVE):
            extra = goes(found, data + at, offset + at + n)
            if (found >> sh.LEAF_FLAGS) & sh.RELATIVE and not fits(extra):
                f = ld64(m + sh.M_EMULATED)
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
                (found >> sh.LEAF_FLAGS) & sh.BRANCH
                and extra == offset
                and (ends == Ends.JCC or ends == Ends.JMP)
            ):
                loop = count
            if ends == Ends.JCC and branches < MAX_BRANCHES and shadow == 0:
                branches = branches + 1
                ends = Ends.NO
                if find(ld64(c + tb.HASH), ((ld64(s + sh.PAGE) + offset + at) << Mode.BITS) + mode):
                    break
            elif ends == Ends.SHADOW:
                ends = Ends.NO
                if at + 15 > room or shadow:
                    st64(item - sh.ITEM + sh.FORM, ld64(m + sh.M_EMULATED))
                    st64(item - sh.ITEM + sh.EXTRA, 0)
                    ends = Ends.YES
                    break
                shadow = 1
                continue
            else:
                break
        if shadow or count >= MAX_INSTRUCTIONS or ld64(s + sh.SECOND) != NONE:
            break
    if shadow or ld64(s + sh.SECOND) != NONE or mode & Mode.NARROW or ld64(s + sh.KEY_MODE) & Mode.PLAIN:
        loop = 0
    st64(s + sh.SIZE, at)
    st64(s + sh.ENDS, ends)
    st64(s + sh.SHADOW, shadow)
    st64(s + sh.COUNT, count)
    st64(s + sh.LOOP, loop)
    return 0


def noted_constant(look: int, at: int, size: int) -> int:
    """Some bytes that were looked at do not count."""
    count = ld16(look + sh.L_COUNT)
    st8(look + sh.L_CONSTANTS + count * 2, at)
    st8(look + sh.L_CONSTANTS + count * 2 + 1, size)
    st16(look + sh.L_COUNT, count + 1)
    return 0


def live_at(s: int, offset: int) -> int:
    """The flags that code at an offset of the page reads before it writes them, as far as a short look tells."""
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


def near(s: int, target: int, item: int) -> int:
    """Whether going on to ``target``, by the branch ``item`` or (0) behind an instruction, certainly stays on the page:
    EIP neither wraps nor leaves the segment on the way."""
    if target >= 4096:
        return 0
    how = ld64(ld64(s + sh.BY_MODE) + sh.M_NEAR)
    if item == 0 or how == sh.NEAR_ALWAYS:
        return 1
    if how == sh.NEAR_FORWARD:
        return 1 if ld16(item + sh.AT) < target else 0
    return 0 if ld8(ld64(item + sh.FORM) + sh.F_FLAGS) & sh.NARROW_BRANCH else 1


def needs(s: int) -> int:
    """For each instruction whether flags must survive its checks, and which flags the block reads. What the targets of
    jumps read is looked up only where a check lies between the jump and the flags' origin."""
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
                if near(s, ld64(item + sh.EXTRA), item):
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


DRAFTING_ROUTINES = [
    constant, want, leaf, instruction, fallback, goes, draft, noted_constant, live_at, look_at_targets, near, needs,
]  # fmt: skip
