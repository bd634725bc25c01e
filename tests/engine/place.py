"""Where a random case lives, in the native process and in the guest alike, and what a case and its outcome are.

The same virtual addresses hold the same things on both sides, so that pointers, return addresses and fault addresses
can be compared as plain numbers. Nothing here knows how either side runs a case.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

PAGE = 4096

CODE = 0x2000_0000_0000
"""Executable area. A case occupies a few hundred bytes of it."""
CODE_SIZE = 64 * PAGE
FILLER = b"\xcc" * CODE_SIZE
"""What stands between the cases: INT3, for one that loses its way."""
LOW_CODE = 0x6000_0000
"""The same again, for 32-bit code; 16-bit code has a segment that begins there."""
DATA = 0x2000_0100_0000
"""Data area, within reach of RIP-relative operands of the code."""
LOW_DATA = 0x7000_0000
"""The same bytes again, within reach of 32-bit addresses."""


class Access(enum.Enum):
    NONE = "none"
    READ = "read"
    WRITE = "write"


PAGES = (
    Access.NONE,
    Access.WRITE, Access.WRITE, Access.WRITE, Access.WRITE,
    Access.READ,
    Access.NONE,
    Access.WRITE, Access.WRITE,
    Access.NONE,
    Access.WRITE,
    Access.NONE,
)  # fmt: skip
"""Protection of each page of the data area: data, a read-only page, the stack, and a page for FXSAVE and its like,
with nothing mapped between them."""
DATA_SIZE = len(PAGES) * PAGE
FIRST_DATA, LAST_DATA = 1 * PAGE, 5 * PAGE
READ_ONLY = 5 * PAGE
STACK, STACK_END = 7 * PAGE, 9 * PAGE
SAVE = 10 * PAGE
"""The page that only save instructions write: their images hold fields that no two machines agree on."""

ARITHMETIC = 0x8D5
"""CF, PF, AF, ZF, SF, OF."""
DF = 0x400
RF = 0x10000
AC = 0x40000

GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
XSAVE_SIZE = 832
"""XSAVE's standard format with x87, SSE and AVX (SDM 1, 13.4)."""


def code_start(bits: int) -> int:
    """Where the code area is for code of this size."""
    return {64: CODE, 32: LOW_CODE, 16: 0}[bits]


@dataclass(frozen=True, slots=True)
class Case:
    """Registers and code. The code ends with UD2, so that every case ends by an exception.

    32-bit code has flat segments; 16-bit code has one that begins at LOW_CODE, and DS, ES and SS have one of 16 bits
    that is the data area at LOW_DATA."""

    address: int
    code: bytes
    registers: tuple[int, ...]
    """In encoding order: rax, rcx, rdx, rbx, rsp, ..."""
    rflags: int
    fs_base: int
    gs_base: int
    xsave: bytes
    bits: int = 64
    writable: bool = False
    """Its code may be stored to."""

    @property
    def offset(self) -> int:
        """Of its first byte in the code area."""
        return self.address - code_start(self.bits)


@dataclass(frozen=True, slots=True)
class Batch:
    """Cases that share the initial contents of the data area; their codes do not overlap."""

    data: bytes
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """State at the exception that ended a case."""

    registers: tuple[int, ...]
    rip: int
    rflags: int
    vector: int
    error: int
    """Error code, 0 where the vector has none."""
    cr2: int
    """The faulting address, 0 but for page faults."""
    fpu: bytes
    """See :func:`comparable_fpu`."""
    pages: dict[int, bytes] = field(default_factory=dict)
    """Pages of the data area that changed, by index."""


_INITIAL_LEGACY = struct.pack("<HHBxHQQII", 0x37F, 0, 0, 0, 0, 0, 0x1F80, 0)


def comparable_fpu(xsave: bytes) -> bytes:
    """x87, SSE and AVX state out of an XSAVE image of standard format, made comparable.

    A component that XSTATE_BV calls initial is written out; the x87 instruction and data pointers, which differ even
    between two runs of one machine, and the reserved fields are dropped (SDM 1, 13.5). The result is FCW, FSW, abridged
    FTW, MXCSR, ST0-7 of 10 bytes, XMM0-15, the upper halves of YMM0-15.
    """
    (present,) = struct.unpack_from("<Q", xsave, 512)
    legacy = xsave if present & 1 else _INITIAL_LEGACY + bytes(136)
    fcw, fsw, ftw = struct.unpack_from("<HHB", legacy)
    (mxcsr,) = struct.unpack_from("<I", xsave, 24)
    registers = b"".join(legacy[32 + 16 * i : 42 + 16 * i] for i in range(8))
    sse = xsave[160:416] if present & 2 else bytes(256)
    avx = xsave[576:832] if present & 4 else bytes(256)
    return struct.pack("<HHBI", fcw, fsw, ftw, mxcsr) + registers + sse + avx


def status_word(fpu: bytes) -> int:
    """The x87 status word in :func:`comparable_fpu`'s result."""
    return int.from_bytes(fpu[2:4], "little")


def fpu_field(offset: int) -> str:
    """What stands at ``offset`` of :func:`comparable_fpu`'s result, for messages."""
    if offset < 9:
        return "fcw" if offset < 2 else "fsw" if offset < 4 else "ftw" if offset < 5 else "mxcsr"
    if offset < 89:
        return f"st{(offset - 9) // 10}"
    if offset < 345:
        return f"xmm{(offset - 89) // 16}"
    return f"ymm{(offset - 345) // 16}'s upper half"


def changed_pages(before: bytes, after: bytes) -> dict[int, bytes]:
    """Pages of the data area that differ."""
    if before == after:
        return {}
    pages = {}
    for i in range(len(PAGES)):
        page = after[i * PAGE : (i + 1) * PAGE]
        if page != before[i * PAGE : (i + 1) * PAGE]:
            pages[i] = page
    return pages
