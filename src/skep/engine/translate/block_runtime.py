"""Making, finding and forgetting blocks, in the compiled language (runtime.py); tables.py says what stands where.

``c`` is the page of words. These routines know no vCPU: any thread may call them that holds the world's lock, and who
forgets blocks has the world stopped. Pages, frames and numbers are 64-bit words.
"""

from __future__ import annotations

from skep.engine.translate.compiler import copy64, inline, ld16, ld32, ld64, set64, st8, st16, st32, st64
from skep.engine.translate.layout import HASH_BITS, HASH_ENTRY, TABLE_KEY, Mode
from skep.engine.translate.tables import (
    AWAY,
    BRK_AT,
    BRK_EXIT,
    CODE_BYTES,
    CODE_BYTES_OF,
    CODE_MASK,
    COPIED,
    COPIES,
    COPY,
    COPY_RELATIVE,
    DEAD,
    DESCRIPTION,
    DESCRIPTIONS,
    END,
    ENTRY,
    ENTRY_AT,
    FLAGS,
    FOLLOWING,
    GONE,
    GUEST_BYTES,
    HASH,
    HEAD,
    HEADS,
    KEPT_BITS,
    KEY,
    KILLED,
    LAST,
    LENGTH,
    LINK,
    LINKS,
    LIVE,
    LIVE_FLAGS,
    LOOK_HIGH,
    LOOK_LOW,
    LOOKS,
    MARKS,
    MARKS_OF,
    NEXT,
    PLACES,
    POS,
    RAM,
    RECORD,
    RUN,
    RUN_MASKED,
    RUN_SECOND,
    RUNS,
    RW,
    RX,
    SECOND,
    SECOND_AT,
    SECOND_FRAME,
    SIZE,
    SPAN_AT,
    START,
    STOP,
    WHICH,
)

UPPER = 0xFFFFFFFFFFFFFFFF
NONE = UPPER
"""In place of a second page: it is not known."""
WANTED = UPPER
"""What ``adopt`` returns where it must know the second page."""
FRAME_SHIFT = Mode.BITS + 12
PAGE_MASK = 0xFFF
FARTHEST = (1 << 31) - 8192
"""From here on a displacement relative to RIP may be one of more than 32 bits relative to the page."""


def find(table: int, key: int) -> int:
    """The block table's entry for a key (physical address << Mode.BITS | mode), or 0."""
    number = (key * 0x9E3779B97F4A7C15) >> (64 - HASH_BITS)
    while True:
        entry = table + number * HASH_ENTRY
        have = ld64(entry)
        if have == key + TABLE_KEY:
            return entry
        if have == 0:
            return 0
        number = (number + 1) & ((1 << HASH_BITS) - 1)


def enter(c: int, number: int) -> int:
    """Enter a described block into the block table. Others may be looking: the key comes last."""
    block = ld64(c + DESCRIPTIONS) + number * DESCRIPTION
    key = ld64(block + KEY)
    at = (key * 0x9E3779B97F4A7C15) >> (64 - HASH_BITS)
    while True:
        entry = ld64(c + HASH) + at * HASH_ENTRY
        have = ld64(entry)
        if have < TABLE_KEY or have == key + TABLE_KEY:
            break
        at = (at + 1) & ((1 << HASH_BITS) - 1)
    if have == 0:
        st64(c + PLACES, ld64(c + PLACES) + 1)
    st64(entry + 8, ld64(c + RX) + ld32(block + START))
    st64(entry + 16, ld64(c + RX) + ld32(block + ENTRY))
    st64(entry + 24, number)
    st64(entry, key + TABLE_KEY)
    return 0


@inline
def following(block: int, frame: int) -> int:
    """Where a block names the next in the list of ``frame``."""
    at = block + FOLLOWING
    if ld64(block + KEY) >> FRAME_SHIFT != frame:
        at = at + 4
    return at


def publish(c: int, number: int, count: int) -> int:
    """Blocks have been made: from now on they are found."""
    while count:
        block = ld64(c + DESCRIPTIONS) + number * DESCRIPTION
        key = ld64(block + KEY)
        if find(ld64(c + HASH), key):  # a group had two that fit
            st64(block + KEY, 0)
            st32(block + GONE, 0)
        else:
            head = ld64(c + HEADS) + (key >> FRAME_SHIFT) * HEAD
            st32(block + FOLLOWING, ld32(head))
            st32(head, number)
            if ld32(block + SECOND_FRAME):
                head = ld64(c + HEADS) + (ld32(block + SECOND_FRAME) - 1) * HEAD
                st32(block + FOLLOWING + 4, ld32(head))
                st32(head, number)
            enter(c, number)
            st64(c + LIVE, ld64(c + LIVE) + 1)
        number = number + 1
        count = count - 1
    return 0


def rehash(c: int, number: int, count: int) -> int:
    """Enter those of ``count`` blocks that are still there into a table that was emptied."""
    while count:
        if ld64(ld64(c + DESCRIPTIONS) + number * DESCRIPTION + KEY):
            enter(c, number)
        number = number + 1
        count = count - 1
    return 0


# Adopting


def shown(c: int, record: int, page: int, second: int) -> int:
    """Whether the guest shows what a record was made from: 0, 1, or WANTED where that depends on an unknown page."""
    run = record + RECORD
    left = ld16(record + RUNS)
    while left:
        start = ld16(run)
        size = ld16(run + 2)
        how = ld16(run + 4)
        base = page
        if how & RUN_SECOND:
            if second == NONE:
                return WANTED
            base = second
        guest = ld64(c + RAM) + base + (start & ~7)
        words = ((start + size + 7) >> 3) - (start >> 3)
        run = run + RUN
        masks = run + words * 8
        mask = UPPER << ((start & 7) * 8)
        i = 0
        while i < words:
            if i + 1 == words:
                mask = mask & (UPPER >> (((0 - (start + size)) & 7) * 8))
            if how & RUN_MASKED:
                mask = ld64(masks + i * 8)
            if (ld64(guest + i * 8) ^ ld64(run + i * 8)) & mask:
                return 0
            mask = UPPER
            i = i + 1
        run = masks
        if how & RUN_MASKED:
            run = run + words * 8
        left = left - 1
    left = ld16(record + COPIES)
    while left:
        if ld16(run + 4) & COPY_RELATIVE and ld32(ld64(c + RAM) + page + ld16(run + 2)) - FARTHEST < 8192:
            return 0
        run = run + COPY
        left = left - 1
    return 1


def mark(c: int, pa: int, size: int) -> int:
    """As CodeMap.mark: [pa, pa + size), in one page, has been translated."""
    line = ld64(c + CODE_BYTES) + (pa >> 6) * 8
    mask = ld64(c + CODE_MASK) + (pa >> 12) * 8
    bit = 1 << ((pa >> 6) & 63)
    lines = 0
    bits = UPPER << (pa & 63)
    left = (pa & 63) + size
    while left > 64:
        st64(line, ld64(line) | bits)
        lines = lines | bit
        bits = UPPER
        line = line + 8
        bit = bit + bit
        left = left - 64
    st64(line, ld64(line) | (bits & (UPPER >> (64 - left))))
    st64(mask, ld64(mask) | lines | bit)
    return 0


def put(c: int, record: int, page: int, second: int) -> int:
    """Make the block of a record whose bytes the guest shows: its code, its marks, its description. Nothing leads to
    it."""
    run = record + RECORD
    left = ld16(record + RUNS)
    while left:
        start = ld16(run)
        size = ld16(run + 2)
        base = page
        if ld16(run + 4) & RUN_SECOND:
            base = second
        mark(c, base + start, size)
        words = ((start + size + 7) >> 3) - (start >> 3)
        if ld16(run + 4) & RUN_MASKED:
            words = words + words
        run = run + RUN + words * 8
        left = left - 1
    pos = ld64(c + POS)
    code = ld64(c + RW) + pos
    copied = ld16(record + COPIED)
    copy64(code, record + ld32(record + LENGTH) - copied * 8, copied)
    mode = ld16(record + WHICH + 2)
    at = ld16(record + SECOND_AT)
    st32(code + at, ld64(c + SECOND + (mode & 3) * 8) - (pos + at + 4))
    at = ld16(record + BRK_AT)
    st32(code + at, ld64(c + BRK_EXIT) - (pos + at + 4))
    frame = 0
    if ld16(record + SPAN_AT):
        frame = (second >> 12) + 1
        st64(code + ld16(record + SPAN_AT), ld64(c + RAM) + second)
        st64(code + ld16(record + SPAN_AT + 2), ld64(c + RAM) + second)
    left = ld16(record + COPIES)
    while left:
        source = ld64(c + RAM) + page + ld16(run + 2)
        size = ld16(run + 4)
        if size == 8:
            st64(code + ld16(run), ld64(source))
        elif size == 2:
            st16(code + ld16(run), ld16(source))
        else:
            st32(code + ld16(run), ld32(code + ld16(run)) + ld32(source))
        run = run + COPY
        left = left - 1
    left = ld16(record + LINKS)
    while left:
        key = code + ld16(run)
        st64(key, ld64(key) + (page << Mode.BITS))
        run = run + LINK
        left = left - 1
    block = ld64(c + DESCRIPTIONS) + ld64(c + NEXT) * DESCRIPTION
    st64(block + KEY, ((page + ld16(record + WHICH)) << Mode.BITS) + mode)
    st32(block + START, pos)
    st32(block + ENTRY, pos + ld16(record + ENTRY_AT))
    st32(block + STOP, pos + ld16(record + CODE_BYTES_OF))
    st16(block + MARKS, ld16(record + MARKS_OF))
    st16(block + SIZE, ld16(record + GUEST_BYTES))
    st32(block + LOOK_LOW, ld32(record + LOOKS))
    st32(block + LIVE_FLAGS, ld16(record + FLAGS))
    st32(block + SECOND_FRAME, frame)
    st64(c + POS, (pos + copied * 8 + 15) & ~15)
    st64(c + NEXT, ld64(c + NEXT) + 1)
    return 0


def adopt(c: int, records: int, size: int, page: int, second: int, which: int) -> int:
    """Make the block ``which`` (mode << 16 | offset in the page) of a group of records that were made on one page, and
    with it all the others of which the guest shows the bytes: how many; 0 where the wanted one is not among them,
    WANTED where only ``second``, the page behind, would tell."""
    record = records
    end = records + size
    found = 0
    while record < end:
        if ld32(record + WHICH) == which:
            found = shown(c, record, page, second)
            if found:
                break
        record = record + ld32(record + LENGTH)
    if found != 1:
        return found
    count = 1
    put(c, record, page, second)
    record = records
    while record < end:
        length = ld32(record + LENGTH)
        key = (page << Mode.BITS) + (ld16(record + WHICH) << Mode.BITS) + ld16(record + WHICH + 2)
        if ld32(record + WHICH) != which and find(ld64(c + HASH), key) == 0:
            if ld64(c + POS) + length > ld64(c + END) or ld64(c + NEXT) > ld64(c + LAST):
                break
            if shown(c, record, page, second) == 1:
                put(c, record, page, second)
                count = count + 1
        record = record + length
    return count


# Forgetting


def unlist(c: int, number: int, frame: int) -> int:
    """Take a block from the list of ``frame``."""
    place = ld64(c + HEADS) + frame * HEAD
    while ld32(place) != number and ld32(place):
        place = following(ld64(c + DESCRIPTIONS) + ld32(place) * DESCRIPTION, frame)
    st32(place, ld32(following(ld64(c + DESCRIPTIONS) + number * DESCRIPTION, frame)))
    return 0


@inline
def jump(c: int, at: int, target: int) -> int:
    """At one offset of the code buffer, a jump to another."""
    st8(ld64(c + RW) + at, 0xE9)
    st32(ld64(c + RW) + at + 1, target - (at + 5))
    return 0


def kill(c: int, number: int, alone: int) -> int:
    """Make sure that nothing enters a block, which is on no list any more: both its entries lead to its successor's, by
    address. ``alone``: its page has others left, whose jumps may have been patched to it."""
    block = ld64(c + DESCRIPTIONS) + number * DESCRIPTION
    key = ld64(block + KEY)
    place = find(ld64(c + HASH), key)
    if place and ld64(place + 24) == number:
        st64(place, 1)
    start = ld32(block + START)
    entry = ld32(block + ENTRY)
    array = (key & 3) * 8
    jump(c, start, ld64(c + DEAD + array))
    if key & Mode.NARROW:
        array = 24
    st8(ld64(c + RW) + entry, 0x68)  # push
    st32(ld64(c + RW) + entry + 1, (key >> Mode.BITS) & PAGE_MASK)
    jump(c, entry + 5, ld64(c + AWAY + array))
    gone = 0
    if alone:
        gone = (key >> FRAME_SHIFT) + 1
    st32(block + GONE, gone)
    st64(block + KEY, 0)
    st64(c + LIVE, ld64(c + LIVE) - 1)
    st64(c + KILLED, ld64(c + KILLED) + 1)
    return 0


def keep_bits(c: int, low: int, high: int) -> int:
    """Bytes [low, high) of a page are still code."""
    while low < high:
        bits = UPPER << (low & 63)
        end = (low | 63) + 1
        if end > high:
            bits = bits & (UPPER >> (end - high))
        word = c + KEPT_BITS + (low >> 6) * 8
        st64(word, ld64(word) | bits)
        low = end
    return 0


def forget(c: int, frame: int, low: int, high: int) -> int:
    """Kill the blocks of a page that rest on its bytes [low, high), and mark as code only what others rest on."""
    set64(c + KEPT_BITS, 0, 64)
    head = ld64(c + HEADS) + frame * HEAD
    number = ld32(head)
    kept = 0
    while number:
        block = ld64(c + DESCRIPTIONS) + number * DESCRIPTION
        key = ld64(block + KEY)
        size = ld16(block + SIZE)
        other = ld32(block + SECOND_FRAME)
        look_low = 0
        look_high = 0
        if key >> FRAME_SHIFT == frame:
            first = (key >> Mode.BITS) & PAGE_MASK
            last = first + size
            if last > 4096:
                last = 4096
            look_low = ld16(block + LOOK_LOW)
            look_high = ld16(block + LOOK_HIGH)
        else:
            first = 0
            last = ((key >> Mode.BITS) & PAGE_MASK) + size - 4096
            other = (key >> FRAME_SHIFT) + 1
        place = following(block, frame)
        following_ = ld32(place)
        if (first < high and low < last) or (look_low < high and low < look_high):
            if other:
                unlist(c, number, other - 1)
            kill(c, number, high - low != 4096 or key >> FRAME_SHIFT != frame)
        else:
            keep_bits(c, first, last)
            keep_bits(c, look_low, look_high)
            st32(place, kept)
            kept = number
        number = following_
    st32(head, kept)
    place = ld64(c + CODE_MASK) + frame * 8
    mask = ld64(place)
    line = ld64(c + CODE_BYTES) + frame * 512
    i = 0
    while i < 64:
        if (mask >> i) & 1:
            bits = ld64(line + i * 8) & ld64(c + KEPT_BITS + i * 8)
            st64(line + i * 8, bits)
            if bits == 0:
                mask = mask & ~(1 << i)
        i = i + 1
    st64(place, mask)
    return 0


def drop(c: int, number: int) -> int:
    """Kill one block; what it was made from counts as code until somebody stores there."""
    block = ld64(c + DESCRIPTIONS) + number * DESCRIPTION
    frame = ld64(block + KEY) >> FRAME_SHIFT
    if ld32(block + SECOND_FRAME):
        unlist(c, number, ld32(block + SECOND_FRAME) - 1)
    unlist(c, number, frame)
    kill(c, number, 1)
    return 0


def evict(c: int, number: int, count: int) -> int:
    """Forget the pages of which a block is among these: where it is, others will lie, and jumps within its page lead
    to it, also when it is no more."""
    while count:
        block = ld64(c + DESCRIPTIONS) + number * DESCRIPTION
        key = ld64(block + KEY)
        if key:
            forget(c, key >> FRAME_SHIFT, 0, 4096)
        elif ld32(block + GONE):
            forget(c, ld32(block + GONE) - 1, 0, 4096)
        number = number + 1
        count = count - 1
    return 0


BLOCK_ROUTINES = [
    find, enter, following, publish, rehash, shown, mark, put, adopt, unlist, jump, kill, keep_bits, forget, drop,
    evict,
]  # fmt: skip
