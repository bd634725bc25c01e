"""The debug registers' breakpoints (SDM 3, 17.2).

Translated code knows nothing of them. While one is armed for data, the page it lies in gets no read and no write tag,
so that every access there takes the slow path, which compares addresses (``runtime.watched``); those that hit are
Python's. A page with one for instructions gets no execute tag, and its code runs one instruction at a time. Hits are
collected in ``CpuPort.hits`` and become a #DB behind the instruction.
"""

from __future__ import annotations

from collections.abc import Iterator

from skep.engine.amd64.registers import Cr4
from skep.engine.translate.layout import StateBlock

DR6_BS = 1 << 14
DR6_HITS = 0xF
"""Bits that a #DB sets or clears; the others of DR6 it only sets."""
INSTRUCTION, WRITE, PORT, ACCESS = range(4)
_LENGTHS = (1, 2, 8, 4)


def armed(st: StateBlock) -> Iterator[tuple[int, int, int, int]]:
    """(DR6's bit, what for, first address, length) of those that DR7 enables."""
    dr7 = st.dr7
    for i, at in enumerate((st.dr0, st.dr1, st.dr2, st.dr3)):
        if dr7 >> 2 * i & 3:
            length = _LENGTHS[dr7 >> 18 + 4 * i & 3]
            yield 1 << i, dr7 >> 16 + 4 * i & 3, at & -length, length


def watch(st: StateBlock) -> None:
    """Tell machine code what is armed. The TLB and the jump cache are to be flushed if any was or is."""
    kinds = {kind for _, kind, _, _ in armed(st)}
    st.watch = int(bool(kinds & {WRITE, ACCESS}))
    st.watch_code = int(INSTRUCTION in kinds)


def data_hits(st: StateBlock, address: int, size: int, *, write: bool) -> int:
    """DR6's bits for an access to linear memory."""
    hits = 0
    for bit, kind, at, length in armed(st):
        if (kind == ACCESS or (kind == WRITE and write)) and at < address + size and address < at + length:
            hits |= bit
    return hits


def port_hits(st: StateBlock, port: int, size: int) -> int:
    """DR6's bits for an access to ports; they count with CR4.DE only."""
    hits = 0
    if st.cr4 & Cr4.DE:
        for bit, kind, at, length in armed(st):
            if kind == PORT and at < port + size and port < at + length:
                hits |= bit
    return hits


def code_hits(st: StateBlock, address: int) -> int:
    """DR6's bits for the instruction at a linear address."""
    return sum(bit for bit, kind, at, _ in armed(st) if kind == INSTRUCTION and at == address)


def page_has_code_breakpoint(st: StateBlock, address: int) -> bool:
    return any(kind == INSTRUCTION and at >> 12 == address >> 12 for _, kind, at, _ in armed(st))
