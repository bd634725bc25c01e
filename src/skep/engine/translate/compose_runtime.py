"""Composing: a block is drafted, written and described by machine code; in the compiled language (runtime.py). ``s`` is
the sheet; sheet.py says what stands where. What these routines do not know they ask of Python (composing.py) and begin
again: before the last step nothing of the block counts.
"""

from __future__ import annotations

from skep.engine.translate import sheet as sh
from skep.engine.translate import tables as tb
from skep.engine.translate.block_runtime import NONE, mark
from skep.engine.translate.compiler import copy8, ld16, ld64, st16, st32, st64
from skep.engine.translate.drafting_runtime import DRAFTING_ROUTINES, STUCK, draft, needs
from skep.engine.translate.layout import SLOTS, Mode
from skep.engine.translate.recording_runtime import RECORDING_ROUTINES
from skep.engine.translate.sharing_runtime import SHARING_ROUTINES, shares
from skep.engine.translate.sheet import Want
from skep.engine.translate.writing_runtime import WRITING_ROUTINES, write


def describe(s: int, size: int) -> int:
    """The block has ``size`` bytes of code: its marks behind them, its description, and where the next one goes."""
    c = ld64(s + sh.WORDS)
    pos = ld64(c + tb.POS)
    stop = pos + size
    at = (stop + 1) & ~1
    marks = ld64(s + sh.COUNT) * 4
    copy8(ld64(c + tb.RW) + at, s + sh.MARK_LIST, marks)
    first = 4096 - ld64(s + sh.OFFSET)
    if ld64(s + sh.SIZE) < first:
        first = ld64(s + sh.SIZE)
    mark(c, ld64(s + sh.PAGE) + ld64(s + sh.OFFSET), first)
    second = 0
    if ld64(s + sh.SECOND) != NONE:
        second = (ld64(s + sh.SECOND) >> 12) + 1
        mark(c, ld64(s + sh.SECOND), ld64(s + sh.SIZE) - first)
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
    st32(block + tb.SECOND_FRAME, second)
    st64(c + tb.NEXT, ld64(c + tb.NEXT) + 1)
    st64(c + tb.POS, (at + marks + 15) & ~15)
    return 0


def compose(s: int) -> int:
    """Make the block at offset OFFSET of the page PAGE, its bytes marked and nothing leading to it. Returns
    Want.NOTHING, or what is wanted first."""
    st64(s + sh.WANT, Want.NOTHING)
    st64(s + sh.LOOKED, 0)
    if draft(s) & STUCK:
        return ld64(s + sh.WANT)
    if ld64(s + sh.LOOP) == 0:
        st64(s + sh.TABLES, 0)
        st64(s + sh.MOVING, 0)
    elif ld64(s + sh.LOOP_KNOWN) == 0:
        return Want.LOOP
    if needs(s) & STUCK:
        return ld64(s + sh.WANT)
    shares(s, SLOTS - ld64(s + sh.TABLES))
    o = write(s)
    if o & STUCK:
        return ld64(s + sh.WANT)
    describe(s, o - ld64(s + sh.BEGIN))
    return Want.NOTHING


COMPOSE_ROUTINES = [
    *DRAFTING_ROUTINES, *SHARING_ROUTINES, *WRITING_ROUTINES, *RECORDING_ROUTINES, describe, compose,
]  # fmt: skip
