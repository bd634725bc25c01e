"""Recording: what the store keeps of a block that was just made (tables.py, "A record"); in the compiled language
(runtime.py). ``s`` is the sheet, which has everything but the code.
"""

from __future__ import annotations

from skep.engine.translate import sheet as sh
from skep.engine.translate import tables as tb
from skep.engine.translate.block_runtime import NONE
from skep.engine.translate.compiler import (
    copy8,
    inline,
    ld8,
    ld16,
    ld32,
    ld64,
    set8,
    set64,
    st8,
    st16,
    st32,
    st64,
)
from skep.engine.translate.emission import LINK_KEY
from skep.engine.translate.layout import Mode
from skep.engine.translate.writing_runtime import patch


def run(r: int, offset: int, data: int, size: int, how: int) -> int:
    """Write at ``r`` a run of a record: bytes that stand at an offset of the page, and (RUN_MASKED) a mask that has
    them all. Returns what follows."""
    words = ((offset + size + 7) >> 3) - (offset >> 3)
    st16(r, offset)
    st16(r + 2, size)
    st32(r + 4, how)
    r = r + tb.RUN
    set64(r, 0, words)
    copy8(r + (offset & 7), data, size)
    r = r + words * 8
    if how & tb.RUN_MASKED:
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


@inline
def counts(s: int, copied: int) -> int:
    """Whether a constant stands on the block's own page: what lies on the second is compared."""
    room = 4096 - ld64(s + sh.OFFSET)
    return 1 if ld16(copied + sh.Y_OF) + (ld16(copied + sh.Y_SIZE) & 15) <= room else 0


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
        if counts(s, copied) == 0:
            pass
        elif size == 8:
            st64(at, ld64(at) - ld64(data))
        elif size == 2:
            st16(at, ld16(at) - ld16(data))
        else:
            st32(at, ld32(at) - ld32(data))
        i = i + 1
    if ld64(s + sh.SECOND) != NONE:
        p = ld64(ld64(s + sh.BY_MODE) + sh.M_SPAN)
        st64(code + ld64(s + sh.SPAN) + ld16(p + sh.P_ONE), 0)
        st64(code + ld64(s + sh.SPAN) + ld16(p + sh.P_TWO), 0)
    return 0


def runs(s: int, r: int) -> int:
    """The runs of a record: the block's own bytes, and what was looked at. Returns what follows."""
    c = ld64(s + sh.WORDS)
    offset = ld64(s + sh.OFFSET)
    size = ld64(s + sh.SIZE)
    if size > 4096 - offset:
        size = 4096 - offset
    copies = 0
    i = 0
    while i < ld64(s + sh.COPYING):
        copies = copies + counts(s, s + sh.COPY_LIST + i * sh.CONSTANT)
        i = i + 1
    st64(s + sh.RECORD_COPIES, copies)
    mask = r + tb.RUN + (((offset + size + 7) >> 3) - (offset >> 3)) * 8 + (offset & 7)
    r = run(r, offset, s + sh.DATA, size, tb.RUN_MASKED if copies else 0)
    i = 0
    while i < ld64(s + sh.COPYING):
        copied = s + sh.COPY_LIST + i * sh.CONSTANT
        if counts(s, copied):
            unmask(mask + ld16(copied + sh.Y_OF), ld16(copied + sh.Y_SIZE) & 15)
        i = i + 1
    count = 1
    if ld64(s + sh.SECOND) != NONE:
        r = run(r, 0, s + sh.DATA + size, ld64(s + sh.SIZE) - size, tb.RUN_SECOND)
        count = 2
    i = 0
    while i < ld64(s + sh.LOOKED):
        if looked_before(s, i) == 0:
            look = s + sh.LOOK_LIST + i * sh.LOOK_SIZE
            at = ld16(look + sh.L_OFFSET)
            n = ld16(look + sh.L_SIZE)
            mask = r + tb.RUN + (((at + n + 7) >> 3) - (at >> 3)) * 8 + (at & 7)
            how = tb.RUN_MASKED if ld16(look + sh.L_COUNT) else 0
            r = run(r, at, ld64(c + tb.RAM) + ld64(s + sh.PAGE) + at, n, how)
            k = 0
            while k < ld16(look + sh.L_COUNT):
                unmask(mask + ld8(look + sh.L_CONSTANTS + k * 2), ld8(look + sh.L_CONSTANTS + k * 2 + 1))
                k = k + 1
            count = count + 1
        i = i + 1
    st64(s + sh.RECORD_RUNS, count)
    return r


def record(s: int, number: int) -> int:
    """Write down for the store the block ``number``, which compose has just made: bytes of the record at RECORD_AT, 0
    where it is too long."""
    c = ld64(s + sh.WORDS)
    block = ld64(c + tb.DESCRIPTIONS) + number * tb.DESCRIPTION
    size = ld32(block + tb.STOP) - ld32(block + tb.START)
    if size > sh.MOST_CODE or ld64(s + sh.FALLBACK):
        return 0
    head = s + sh.RECORD_AT
    r = runs(s, head + tb.RECORD)
    i = 0
    while i < ld64(s + sh.COPYING):
        copied = s + sh.COPY_LIST + i * sh.CONSTANT
        if counts(s, copied):
            st16(r, ld16(copied + sh.Y_TO))
            st16(r + 2, ld64(s + sh.OFFSET) + ld16(copied + sh.Y_OF))
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
    st16(head + tb.WHICH, ld64(s + sh.OFFSET))
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
    if ld64(s + sh.SECOND) != NONE:
        p = ld64(ld64(s + sh.BY_MODE) + sh.M_SPAN)
        st16(head + tb.SPAN_AT, ld64(s + sh.SPAN) + ld16(p + sh.P_ONE))
        st16(head + tb.SPAN_AT + 2, ld64(s + sh.SPAN) + ld16(p + sh.P_TWO))
    st16(head + tb.RUNS, ld64(s + sh.RECORD_RUNS))
    st16(head + tb.COPIES, ld64(s + sh.RECORD_COPIES))
    st16(head + tb.LINKS, ld64(s + sh.LINKED))
    st32(head + tb.LOOKS, ld32(block + tb.LOOK_LOW))
    st16(head + tb.LOOKS + 4, 0)
    return length


RECORDING_ROUTINES = [run, unmask, looked_before, unplaced, runs, record]
