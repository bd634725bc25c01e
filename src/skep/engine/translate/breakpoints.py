"""The debug registers' breakpoints (SDM 3, 17.2), or a debugger's in their place.

Translated code knows nothing of them. While one is armed for data, the page it lies in gets no read and no write tag,
so that every access there takes the slow path, which compares addresses (``runtime.watched``); those that hit are
Python's. A page with one for instructions gets no execute tag, and its code runs one instruction at a time. Hits are
collected in ``CpuPort.hits`` and become a #DB behind the instruction, or the debugger's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from skep.engine.amd64.debugregisters import dr7
from skep.engine.amd64.registers import Cr4
from skep.engine.debug import Place
from skep.engine.translate.layout import StateBlock

INSTRUCTION, WRITE, PORT, ACCESS = range(4)
_LENGTHS = (1, 2, 8, 4)


def armed(st: StateBlock) -> Iterator[tuple[int, int, int, int]]:
    """(DR6's bit, what for, first address, length) of those that DR7, or a debugger's, enables."""
    control = st.armed7
    for i, at in enumerate((st.armed0, st.armed1, st.armed2, st.armed3)):
        if control >> 2 * i & 3:
            length = _LENGTHS[control >> 18 + 4 * i & 3]
            yield 1 << i, control >> 16 + 4 * i & 3, at & -length, length


def watch(st: StateBlock, debugger: Sequence[Place]) -> None:
    """Arm the guest's, unless a ``debugger`` has any, and tell machine code. The TLB and the jump cache are to be
    flushed if any was or is."""
    if debugger:
        st.armed7 = dr7(debugger)
        for i, place in enumerate(debugger):
            setattr(st, f"armed{i}", place.address)
    else:
        st.armed0, st.armed1, st.armed2, st.armed3, st.armed7 = st.dr0, st.dr1, st.dr2, st.dr3, st.dr7
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
