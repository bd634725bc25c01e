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
SECOND = 72  # guest-physical address of the page behind, where the block goes on there; else block_runtime.NONE
GIVEN = 80  # how many bytes at DATA Python has put there; 0: they are read from the page
FALLBACK = 88  # 1: the block is one instruction that Python runs
CUTS = 96  # how many of CUT are set
WANT = 104  # what Python is asked for: Want
WANT_AT, WANT_OF, WANT_BYTES = 112, 120, 128
SIZE, ENDS, SHADOW, COUNT, LOOP, LIVE_ = 136, 144, 152, 160, 168, 176
"""Of the block: bytes; Ends of its last instruction, NO: it goes on behind it; whether that stands in an STI's shadow;
instructions; those up to the last one that jumps back to the first, 0: none does that may be followed; the flags that
it reads."""
TARGETS = 184  # how many targets of jumps are to be looked at
LOOKED = 192  # how many looks there are
BEGIN = 200  # host address of the block's code, writable
HELD = 208  # the slot whose range's start is in r10, or NO_SLOT
CHECKS, LINKED = 216, 224  # how many there are
BREAKS, FARS, OUTS = 232, 240, 248  # how many of the ways out
COPYING = 256  # how many constants
ENTRY_OFFSET, SPAN, TOP = 264, 272, 280  # in the code: plain entry, look at the second page, where a loop begins or 0
RANGES, SLOTS_USED = 288, 296  # how many; slots of those that several operands share
LOOP_KNOWN = 304  # 1: Python has said what comes next
TABLES, MOVING = 312, 320  # how many tables are checked before the loop; 1: registers are elsewhere in it
REDO, UNDO = 328, 336  # pieces that move them, and bring them home
LEAD_MOVED = 344  # 3 words: LEAD_CODE of r9 to r11 in the loop
MOVED = 368  # IS_MOVED while the loop is written
RECORD_RUNS, RECORD_COPIES = 376, 384
STUB_SECOND, STUB_BREAK = 392, 416  # 3 words, and one: offsets in the code buffer
LEAD_CODE = 424  # 16 words: pieces that give r10 a register plus a constant
TAKE_CODE, KEEP_CODE = 552, 616  # 8 words each: r10 = a slot, a slot = r10
TAILS = 680  # 4 words: pieces, by 1: flags are saved, 2: of a range
CHECK_CODE = 712  # 2 words: the look for somebody who wants the vCPU, by whether flags are read behind it
CALLS = 728  # 2 words: the call of the slow path, of a range's
PAGE_CODE, LINK_CODE, BREAK_CODE, RESTORE_CODE = 744, 752, 760, 768
FAR_CODE = 776  # r10 = the page's address plus 64 bits; ONE: those

# Areas
CUT = 0x400  # words: offset << 16 | bytes there: the instruction there is cut off
MOST_CUTS = 48
MOVED_LIST = 0x600  # by instruction: u64 form + which, u64 host address of its template with registers elsewhere
DATA = 0x900  # the bytes of the block
ITEMS = 0xA00
TARGET_LIST = 0x1000  # words: offsets
TABLE_LIST = 0x1300
RANGE_LIST = 0x1400
LAST_RANGE = 0x2000  # u16 by origin: its last range + 1
ORIGINS = 0x2700  # by register: u64 origin, i64 how far
COPY_LIST = 0x2800
CHECK_LIST = 0x3000
LINK_LIST = 0x7000
WAY_LIST = 0x8000  # three lists
WAYS_ROOM = 0x100  # an eighth of the bytes of each
MARK_LIST = 0xA000
LOOK_LIST = 0xB000
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

# A table: piece of code that gives r10 its base plus a constant, that constant, bytes, which instructions read it, is
# the base the stack's pointer
B_LEAD, B_DISP, B_LENGTH, B_READERS, B_STACK = 0, 8, 16, 24, 32
TABLE = 40

# A check, a link, a way out, a constant
C_JUMP, C_BACK, C_DESC, C_SAVED = 0, 4, 8, 12  # u32
CHECK = 16
K_SITE, K_STUB, K_KEY = 0, 4, 8  # u32, u32, u64
KNOT = 16
W_SITE, W_TARGET, W_ITEM = 0, 8, 16  # words; W_ITEM: the branch, or 0
WAY = 24
Y_TO, Y_OF, Y_SIZE = 0, 2, 4  # u16: in the code, in the page, bytes and COPY_RELATIVE
CONSTANT = 6
L_OFFSET, L_SIZE, L_COUNT, L_CONSTANTS = 0, 2, 4, 6  # u16; L_CONSTANTS: pairs of bytes (offset, bytes)
LOOK_SIZE = 32

# A leaf: form's number, then bytes
LEAF_LENGTH, LEAF_AT, LEAF_SIZE, LEAF_FLAGS = 24, 32, 40, 48  # shifts
BRANCH, RELATIVE, NOT_ONE, WRAPS16, WRAPS32 = 1, 2, 4, 8, 16
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

F_LOOP = 48  # a piece: what counts, and ends in the displacement of the jump if taken; or 0
FORM_SIZE = 64
MEMORY, IS_RELATIVE, REACHES, WRITES, STEPS, MINUS, NARROW_BRANCH, MOVES = 1, 2, 4, 8, 16, 32, 64, 128
"""MOVES: it uses r9, r10 or r11."""

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
M_NEAR = 232  # which branches stay on the page: NEAR_ALWAYS and so on
M_WAY = 240  # 4 words, 16- and 32-bit code: to another page, 1: by a narrow one, 2: branch; ONE: target, TWO: at
M_SPAN = 272  # the look whether the second page is still there; ONE, TWO: its host address, THREE: the block's offset
M_SIZE = 280
NEAR_ALWAYS, NEAR_FORWARD, NEAR_WIDE = 0, 1, 2  # all; those forwards; all but those whose target has 16 bits
IS_MOVED = 8
"""With what is saved at a check: registers are elsewhere there."""

TREE_BITS = 19
MAX_EDGES = (1 << TREE_BITS) * 5 // 8
MAX_LEAVES = 1 << 17
MAX_FORMS = 1 << 16
POOL_SIZE = 24 << 20


class Want:
    """What Python is asked for."""

    NOTHING: Final = 0  # the block is made
    FORM: Final = 1  # of the instruction at offset WANT_AT of the page, which has WANT_OF bytes at most, at WANT_BYTES
    TEMPLATE: Final = 2  # of instruction WANT_AT of the block; WANT_OF: F_LIVE, F_DEAD or F_PLACED
    MOVED: Final = 3  # the same with registers elsewhere
    SECOND: Final = 4  # the bytes of a first instruction that seems to go on on the next page
    LOOP: Final = 5  # what is done before the block, which jumps back to its start
