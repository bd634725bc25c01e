"""The sheet: memory in which machine code drafts and composes a block (compose_runtime.py), and what it knows of
instructions there (composing.py fills it).

- From the bytes of an instruction to its *leaf*: a hashed tree by mode, from one byte to the next, as far as the bytes
  decide what instruction it is. No instruction's bytes begin another's.
- *Forms*, and in the *pool* templates, pieces of code, and by mode what blocks begin and end with.
- What is written down of the block that is being made.

Offsets are in bytes. Host addresses and signed numbers are words of 64 bits.
"""

from __future__ import annotations

from typing import Final

# Words
WORDS = 0  # host address of the page of words (tables.py)
TREE, LEAVES, FORMS, POOL = 8, 16, 24, 32  # host addresses
PAGE = 40  # guest-physical address of the page
OFFSET = 48  # of the block's first byte in it
KEY_MODE = 56  # its mode, as in its key
BY_MODE = 64  # host address of what is known of the mode
CUTS = 72  # how many of CUT are set
WANT = 112  # what Python is asked for: Want
WANT_AT, WANT_OF = 120, 128
SIZE, ENDS, SHADOW, COUNT, LIVE_ = 136, 144, 152, 160, 168  # of the block: bytes, Ends, 0 or 1, instructions, flags
TARGETS = 176  # how many targets of jumps are to be looked at
LOOKED = 184  # how many looks there are
BEGIN = 192  # host address of the block's code, writable
HELD = 200  # the slot whose range's start is in r10, or NO_SLOT
CHECKS, LINKED, BREAKS, FARS, COPYING = 208, 216, 224, 232, 240  # how many there are
ENTRY_OFFSET = 248  # the plain entry's offset in the code
RANGES = 256  # how many
SLOTS_USED = 624  # by ranges that several operands share
LEAD_CODE = 264  # 16 words: pieces that give r10 a register plus a constant
TAKE_CODE = 392  # 8 words: pieces: r10 = a slot
KEEP_CODE = 456  # 8 words
TAILS = 520  # 4 words: pieces, by 1: flags are saved, 2: of a range
CHECK_CODE = 552  # 2 words: the look for somebody who wants the vCPU, by whether flags are read behind it
PAGE_CODE, LINK_CODE, BREAK_CODE = 568, 576, 584  # pieces
STUB_SECOND = 592  # 3 words: offsets in the code buffer
STUB_BREAK = 616

# Areas
CUT = 0x280  # words: offset << 16 | bytes there: the instruction there is cut off
MOST_CUTS = 48
DATA = 0x400  # the bytes of the block
ITEMS = 0x600
LISTS = 0x1000
TARGET_LIST = LISTS  # words: offsets
RANGE_LIST = LISTS + 0x400
LAST_RANGE = LISTS + 0x1400  # u16 by origin: its last range + 1
ORIGINS = LISTS + 0x1C00  # by register: u64 origin, i64 how far
CHECK_LIST = LISTS + 0x2000
LINK_LIST = LISTS + 0x6000
BREAK_LIST = LISTS + 0x7000
FAR_LIST = LISTS + 0x8000
COPY_LIST = LISTS + 0x9000
MARK_LIST = LISTS + 0xA000
LOOK_LIST = LISTS + 0xB000
RECORD_AT = 0x10000
SHEET = 0x20000
MOST_CODE = 48 << 10
"""Bytes of code of a block that is kept on disk."""

# An instruction of the block
FORM = 0  # host address
AT, LENGTH_OF = 8, 10  # u16
NEED = 12  # u8: flags must survive its checks
RANGE = 13  # u8: number of its range, plus 1
EXTRA = 16  # where it goes, or what it addresses, relative to the page
LOW = 24  # where its operand lies relative to its origin
ITEM = 32

# A range
R_LOW, R_HIGH, R_FAR = 0, 8, 16  # R_FAR: its first operand's register's distance from the origin
R_WRITE, R_COUNT, R_FIRST, R_BASE, R_SLOT = 24, 25, 26, 27, 28  # u8
RANGE_SIZE = 32
NO_SLOT = 255

# A check, a link, a break, a jump to another page: offsets in the code
C_JUMP, C_BACK, C_DESC, C_SAVED = 0, 4, 8, 12  # u32
CHECK = 16
K_SITE, K_STUB, K_KEY = 0, 4, 8  # u32, u32, u64
KNOT = 16
B_SITE, B_TARGET = 0, 8  # u32, i64
WAY = 16
Y_TO, Y_OF, Y_SIZE = 0, 2, 4  # u16: in the code, in the page, bytes and COPY_RELATIVE
CONSTANT = 6
L_OFFSET, L_SIZE, L_COUNT, L_CONSTANTS = 0, 2, 4, 6  # u16; L_CONSTANTS: pairs of bytes (offset, bytes)
LOOK_SIZE = 32

# A leaf: form's number, then bytes
LEAF_LENGTH, LEAF_AT, LEAF_SIZE, LEAF_FLAGS = 24, 32, 40, 48  # shifts
BRANCH, RELATIVE, NOT_ONE = 1, 2, 4
CUT_OFF = 1
"""In place of a leaf: the bytes end within the instruction. 0: it is not known yet."""
IS_LEAF = 1 << 31

# A form
F_KEEPS, F_READS, F_ENDS, F_COND, F_FLAGS = 0, 2, 4, 5, 6  # u16, u16, u8, u8, u8
F_BEHIND = 7  # u8
F_DISP, F_DISP_SIZE, F_IMM, F_IMM_SIZE = 8, 9, 10, 11  # u8
F_SPOILS = 12  # u16, a bit for each register
F_BASE, F_SIZE, F_WHERE, F_BYTES = 16, 17, 18, 19  # u8: of reach
F_PLUS = 20  # i32: of reach
F_TO, F_FROM, F_STEP_WHERE, F_STEP_BYTES = 24, 25, 26, 27  # u8: of step
F_ADD = 28  # i32: of step
F_LIVE, F_DEAD, F_PLACED = 32, 36, 40  # u32, in the pool; 0: not made yet

FORM_SIZE = 48
MEMORY, IS_RELATIVE, REACHES, WRITES, STEPS, MINUS = 1, 2, 4, 8, 16, 32

# A template
T_CODE, T_CHECKS, T_HOLES, T_COPIES, T_KEEPS = 0, 2, 3, 4, 5  # u16, u8, u8, u8, u8
T_HEAD = 8
"""Behind it checks (u16 jump, u16 back, u32 descriptor, u32 saved, u32 0), holes (u16 at, u8 what, u8 0, i32 add),
copies (u16 to, u8 of, u8 bytes), made a multiple of 8, code."""
T_CHECK, T_HOLE, T_COPY = 16, 8, 4

# A piece: u16 bytes of code, u16 each: places in it
P_CODE, P_ONE, P_TWO, P_THREE = 0, 2, 4, 6
P_HEAD = 8

# By mode
M_ROOT = 0  # the tree's root
M_PROLOGUE = 8  # 2 words: pieces, by whether flags are read; ONE, TWO, THREE: `second`, `brk`, the page
M_CHECK = 24  # 8 words: the check of a range: 1: it is written, 2: flags live, 4: stack; ONE: the jump's displacement
M_TAIL = 88  # 16 words: for the stack: 1: flags are saved, 2: of a range, 4: written, 8: moves; ONE: the way back
M_DISPATCH = 216  # a piece
M_EMULATED = 224  # host address of the form
M_SIZE = 256

TREE_BITS = 19
MAX_EDGES = (1 << TREE_BITS) * 5 // 8
MAX_LEAVES = 1 << 17
MAX_FORMS = 1 << 16
POOL_SIZE = 24 << 20


class Want:
    """What Python is asked for."""

    NOTHING: Final = 0  # the block is made
    FORM: Final = 1  # of the instruction at offset WANT_AT of the page, which has WANT_OF bytes at most
    TEMPLATE: Final = 2  # instruction WANT_AT of the block; WANT_OF: F_LIVE, F_DEAD or F_PLACED
    RARE: Final = 3  # to make the block, which is not straight
