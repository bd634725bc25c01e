"""Where a VM's blocks are written down, in memory that machine code reads and writes (block_runtime.py).

- The *block table* finds a block by its key: open addressing, ``HASH_ENTRY`` bytes an entry.
- A *description* of each block, by number; numbers begin at 1. Those of a piece of the code buffer stand together, in
  the order of their code.
- By page frame, the first of a list of the blocks that have bytes on it, and how often it was written.
- One page of words: what the routines work on, and where they are.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from typing import NamedTuple

from skep.engine.translate.layout import HASH_BITS, HASH_ENTRY, TABLE_KEY, Mode

# The page of words
POS = 0  # offset in the code buffer where the next block goes
END = 8  # of what may be used of this piece
NEXT = 16  # number of the next block
LAST = 24  # the last number of this piece
RW, RX = 32, 40  # host addresses of the code buffer
DESCRIPTIONS = 48  # host address of number 0's description
HEADS = 56  # host address of the lists' heads
HASH = 64
RAM, CODE_BYTES, CODE_MASK = 72, 80, 88  # as in the state block
SECOND = 96  # three words: offsets in the code buffer of the stubs second0 to second2
DEAD = 120  # dead0 to dead2
AWAY = 144  # away0 to away2, and away_narrow
BRK_EXIT = 176
LIVE = 184  # blocks
PLACES = 192  # of the block table that are not free
KILLED = 200
KEPT_BITS = 256  # 64 words: which bytes of a page blocks still rest on

# A description
KEY = 0  # u64, 0 where the block is no more
START, ENTRY, STOP = 8, 12, 16  # u32, offsets in the code buffer: checked entry, plain entry, behind the code
MARKS, SIZE = 20, 22  # u16: how many, from STOP on (made even); bytes of guest code
LOOK_LOW, LOOK_HIGH = 24, 26  # u16: between these offsets of its page lies what was looked at ahead
LIVE_FLAGS = 28  # u16: the flags that it reads
SECOND_FRAME = 32  # u32: number of the second page's frame, plus 1
FOLLOWING = 36  # u32 each: the next in the list of its frame, and of its second frame
GONE = 44  # u32, where KEY is 0: number of the frame whose jumps may lead to the block's place, plus 1; or 0
DESCRIPTION = 48

# A head
HEAD = 8  # u32 number, u32 times written

# A record of a block without its place (store.py)
LENGTH = 0  # u32, bytes in all
WHICH = 4  # u16 offset in the page, u16 mode
GUEST_BYTES, CODE_BYTES_OF, COPIED = 8, 10, 12  # u16: COPIED in words of 8 bytes, of the code with its marks
ENTRY_AT, FLAGS, MARKS_OF = 14, 16, 18  # u16
SECOND_AT, BRK_AT, SPAN_AT = 20, 22, 24  # u16: displacements and addresses in the code; SPAN_AT two of them, or 0
RUNS, COPIES, LINKS = 28, 30, 32  # u16: how many
LOOKS = 34  # two u16
RECORD = 40
RUN = 8  # u16 offset in the page, u16 bytes, u16 RUN_MASKED | RUN_SECOND, u16 unused; words; masks of words
RUN_MASKED, RUN_SECOND = 1, 2
COPY = 6  # u16 offset in the code, u16 offset in the page, u16 bytes, COPY_RELATIVE; 4 bytes are added to what is there
COPY_RELATIVE = 1 << 8  # it is relative to RIP, and there are displacements for which the sum would need more bits
LINK = 2  # u16 offset in the code of a key that lacks its page

_ON_DEMAND = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_M64 = (1 << 64) - 1
_START = struct.Struct("<I")
_DESCRIPTION = struct.Struct("<Q3I2H2HHxxI12x")
assert _DESCRIPTION.size == DESCRIPTION


class Block(NamedTuple):
    """One translation. Offsets ``start`` (checked entry), ``entry`` and ``end`` are in the code buffer."""

    number: int
    key: int
    start: int
    entry: int
    end: int
    marks: int
    """How many words of two bytes its marks are."""
    size: int
    looked: tuple[int, int]
    """It rests on what lies between these offsets of its page, besides its own bytes."""
    live: int
    pa2: int | None
    """Its second page."""

    @property
    def pa(self) -> int:
        return self.key >> Mode.BITS

    @property
    def mode(self) -> int:
        return self.key & Mode.ALL


class Tables:
    """The tables of one VM."""

    def __init__(self, frames: int, blocks: int) -> None:
        """For guest memory of so many page frames, and so many blocks."""
        sizes = (4096, HASH_ENTRY << HASH_BITS, (blocks + 1) * DESCRIPTION, frames * HEAD)
        self._maps = [mmap.mmap(-1, size, flags=_ON_DEMAND) for size in sizes]
        self._pins = [ctypes.c_char.from_buffer(m) for m in self._maps]
        self.address, self.hash_address, descriptions, heads = map(ctypes.addressof, self._pins)
        self.words = memoryview(self._maps[0]).cast("Q")
        self._hash = memoryview(self._maps[1]).cast("Q")
        self._descriptions = self._maps[2]
        self._heads = memoryview(self._maps[3]).cast("I")
        self.words[DESCRIPTIONS >> 3] = descriptions
        self.words[HEADS >> 3] = heads
        self.words[HASH >> 3] = self.hash_address

    def close(self) -> None:
        self.words.release()
        self._hash.release()
        self._heads.release()
        self._pins.clear()
        for m in self._maps:
            m.close()

    def __len__(self) -> int:
        return self.words[LIVE >> 3]

    def number(self, key: int) -> int:
        """Of the block that has a key, or 0."""
        at = (key * 0x9E3779B97F4A7C15 & _M64) >> 64 - HASH_BITS << 2
        words = self._hash
        key += TABLE_KEY
        have = words[at]
        while have:
            if have == key:
                return words[at + 3]
            at = at + 4 & (1 << HASH_BITS + 2) - 1
            have = words[at]
        return 0

    def __contains__(self, key: int) -> bool:
        return self.number(key) != 0

    def get(self, key: int) -> Block | None:
        number = self.number(key)
        return self.block(number) if number else None

    def block(self, number: int) -> Block:
        """As it is described, dead (key 0) or alive."""
        fields = _DESCRIPTION.unpack_from(self._descriptions, number * DESCRIPTION)
        key, start, entry, end, marks, size, low, high, live, second = fields
        pa2 = second - 1 << 12 if second else None
        return Block(number, key, start, entry, end, marks, size, (low, high), live, pa2)

    def describe(self, block: Block) -> None:
        """Write a description; the block is on no list yet."""
        low, high = block.looked
        second = 0 if block.pa2 is None else (block.pa2 >> 12) + 1
        _DESCRIPTION.pack_into(
            self._descriptions, block.number * DESCRIPTION, block.key, block.start, block.entry, block.end, block.marks,
            block.size, low, high, block.live, second,
        )  # fmt: skip

    def start(self, number: int) -> int:
        """Where a block's code begins."""
        at: int = _START.unpack_from(self._descriptions, number * DESCRIPTION + START)[0]
        return at

    def values(self) -> Iterator[Block]:
        """All blocks there are, in no order."""
        for at in range(0, len(self._hash), 4):
            if self._hash[at] >= TABLE_KEY:
                yield self.block(self._hash[at + 3])

    def written(self, frame: int) -> int:
        """A page's translated bytes have been written once more: how often by now."""
        count = self._heads[2 * frame + 1] = self._heads[2 * frame + 1] + 1 & 0xFFFFFFFF
        return count

    def empty(self) -> None:
        """The block table is made anew: it finds nothing."""
        self._maps[1].madvise(mmap.MADV_DONTNEED)
        self.words[PLACES >> 3] = 0
