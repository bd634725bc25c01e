"""String instructions with any prefixes, segments, address sizes and directions.

Machine code does the common REP forms; here is the rest. An element goes at a time, as an access to a device must, but
for REP MOVS and STOS upwards in RAM, which go by the page. What is done is committed before the next is begun, so a
fault or an interrupt finds the registers where SDM 1, 7.3.9.3 wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iced_x86 import Instruction, Mnemonic, OpKind

from skep.engine.amd64.registers import Rflags, Vector
from skep.engine.translate import breakpoints
from skep.engine.translate.context import (
    M32,
    MASK,
    RAX,
    RCX,
    RDI,
    RDX,
    RSI,
    SEGMENT_NAME,
    Context,
    Handler,
    operand_segment,
)
from skep.engine.translate.emulate_integer import subtract_flags
from skep.engine.translate.emulate_system import check_port
from skep.engine.translate.forms import Legality
from skep.engine.translate.layout import Mode
from skep.engine.translate.port import GuestFault
from skep.engine.translate.segments import check_alignment

MAX_ROUNDS = 256
"""How many elements or pages one step does (a few milliseconds), so that interrupts can come in between."""
PAGE = 4096


@dataclass(slots=True)
class Element:
    """What stays the same over the elements of one string instruction."""

    size: int
    address_size: int
    step: int
    source_segment: str

    def source(self, e: Context, length: int | None = None) -> int:
        offset = e.st.q[RSI] & MASK[self.address_size]
        address = e.linear(self.source_segment, offset, length or self.size)
        check_alignment(e.st, address, self.size)
        return address

    def destination(self, e: Context, *, write: bool = True, length: int | None = None) -> int:
        offset = e.st.q[RDI] & MASK[self.address_size]
        address = e.linear("es", offset, length or self.size, write=write)
        check_alignment(e.st, address, self.size)
        return address

    def advance(self, e: Context, number: int, elements: int = 1) -> None:
        value = e.st.q[number] + self.step * elements & MASK[self.address_size]
        e.put_number(number, self.address_size, value)

    def advance_source(self, e: Context) -> None:
        self.advance(e, RSI)

    def advance_destination(self, e: Context) -> None:
        self.advance(e, RDI)

    def on_page(self, e: Context, number: int, address: int, count: int) -> int:
        """Whole elements from ``address`` on that are on its page, at most ``count``, without the offset wrapping."""
        mask = MASK[self.address_size]
        room = min(PAGE - address % PAGE, mask + 1 - (e.st.q[number] & mask))
        return min(count, room // self.size)


def movs(e: Context, element: Element) -> None:
    data = e.cpu.read(element.source(e), element.size)
    e.cpu.write(element.destination(e), data)
    element.advance_source(e)
    element.advance_destination(e)


def stos(e: Context, element: Element) -> None:
    data = (e.st.q[RAX] & MASK[element.size]).to_bytes(element.size, "little")
    e.cpu.write(element.destination(e), data)
    element.advance_destination(e)


def lods(e: Context, element: Element) -> None:
    e.put_number(RAX, element.size, int.from_bytes(e.cpu.read(element.source(e), element.size), "little"))
    element.advance_source(e)


def cmps(e: Context, element: Element) -> None:
    right = int.from_bytes(e.cpu.read(element.destination(e, write=False), element.size), "little")
    left = int.from_bytes(e.cpu.read(element.source(e), element.size), "little")
    element.advance_source(e)
    element.advance_destination(e)
    e.set_status(subtract_flags(left, right, element.size))


def scas(e: Context, element: Element) -> None:
    right = int.from_bytes(e.cpu.read(element.destination(e, write=False), element.size), "little")
    element.advance_destination(e)
    e.set_status(subtract_flags(e.st.q[RAX] & MASK[element.size], right, element.size))


def ins(e: Context, element: Element) -> None:
    """The port is read only when the store cannot fault any more."""
    port = e.st.q[RDX] & 0xFFFF
    address = element.destination(e)
    e.cpu.check_write(address, element.size)
    e.cpu.hits |= breakpoints.port_hits(e.st, port, element.size)
    value = e.io.port_read(port, element.size) & MASK[element.size]
    e.cpu.write(address, value.to_bytes(element.size, "little"))
    element.advance_destination(e)


def outs(e: Context, element: Element) -> None:
    port = e.st.q[RDX] & 0xFFFF
    value = int.from_bytes(e.cpu.read(element.source(e), element.size), "little")
    e.cpu.hits |= breakpoints.port_hits(e.st, port, element.size)
    e.io.port_write(port, element.size, value)
    element.advance_source(e)


# By the page: how many elements were done, or 0 where it has to go by the element


def movs_run(e: Context, element: Element, count: int) -> int:
    source, destination = element.source(e), element.destination(e)
    count = element.on_page(e, RSI, source, element.on_page(e, RDI, destination, count))
    length = count * element.size
    if count < 2:
        return 0
    source, destination = element.source(e, length), element.destination(e, length=length)
    at, to = e.cpu.ram(source, length), e.cpu.ram(destination, length, write=True)
    if at is None or to is None or at < to < at + length:  # overlapping upwards, elements repeat
        return 0
    e.cpu.write(destination, e.cpu.read(source, length))
    element.advance(e, RSI, count)
    element.advance(e, RDI, count)
    return count


def stos_run(e: Context, element: Element, count: int) -> int:
    destination = element.destination(e)
    count = element.on_page(e, RDI, destination, count)
    length = count * element.size
    if count < 2:
        return 0
    destination = element.destination(e, length=length)
    if e.cpu.ram(destination, length, write=True) is None:
        return 0
    value = (e.st.q[RAX] & MASK[element.size]).to_bytes(element.size, "little")
    e.cpu.write(destination, value * count)
    element.advance(e, RDI, count)
    return count


Operation = Callable[[Context, Element], None]

_OPERATIONS: dict[str, Operation] = {
    "MOVS": movs, "STOS": stos, "LODS": lods, "CMPS": cmps, "SCAS": scas, "INS": ins, "OUTS": outs,
}  # fmt: skip
_RUNS: dict[Operation, Callable[[Context, Element, int], int]] = {movs: movs_run, stos: stos_run}
_SIZES = {"B": 1, "W": 2, "D": 4, "Q": 8}
_STRINGS: dict[int, tuple[Operation, int]] = {
    getattr(Mnemonic, name + letter): (operation, size)
    for name, operation in _OPERATIONS.items()
    for letter, size in _SIZES.items()
    if hasattr(Mnemonic, name + letter)
}


def _element(e: Context, i: Instruction, size: int) -> Element:
    operands = (k for k in range(i.op_count) if i.op_kind(k) not in (OpKind.REGISTER,))
    _, address_size = e.string_index(i, next(operands))
    segment = SEGMENT_NAME[operand_segment(i)]
    return Element(size, address_size, -size if e.st.flags & Rflags.DF else size, segment)


def _truncate(e: Context, operation: Operation) -> None:
    """Intel's CPUs clear the upper halves first when REP meets 32-bit addresses in 64-bit mode, even to do nothing."""
    q = e.st.q
    q[RCX] &= M32
    if operation in (movs, stos):
        q[RDI] &= M32
    if operation is movs:
        q[RSI] &= M32


def string(e: Context, i: Instruction) -> None:
    if not i.is_string_instruction:  # SSE2 has a MOVSD and a CMPSD too, which are translated, never emulated
        raise GuestFault(Vector.UD)
    operation, size = _STRINGS[i.mnemonic]
    element = _element(e, i, size)
    if operation in (ins, outs):  # even where the count is 0
        check_port(e, e.st.q[RDX] & 0xFFFF, size)
    if not (i.has_rep_prefix or i.has_repne_prefix):
        operation(e, element)
        return
    st = e.st
    compares = operation in (cmps, scas)
    wanted = Rflags.ZF if i.has_rep_prefix else 0
    flags_before = st.flags
    if element.address_size == 4 and e.bits == 64 and not e.cpuid.is_amd:
        _truncate(e, operation)
    one_by_one = element.step < 0 or st.watch or st.mode >> Mode.CLASS_SHIFT & Legality.ALIGNED
    run = None if one_by_one else _RUNS.get(operation)
    for _ in range(MAX_ROUNDS):
        count = st.q[RCX] & MASK[element.address_size]
        if not count:
            return
        if run is not None and (done := run(e, element, count)):
            e.put_number(RCX, element.address_size, count - done)
            continue
        try:
            operation(e, element)
        except GuestFault:
            st.flags = flags_before  # SDM 2, REP: as before the instruction
            raise
        e.put_number(RCX, element.address_size, count - 1)
        if compares and st.flags & Rflags.ZF != wanted:
            return
        if e.cpu.hits:
            break
    if st.q[RCX] & MASK[element.address_size]:
        e.next_rip = st.rip  # more to do, after a look at what is pending
        st.flags = flags_before  # which a fault further on is to find


HANDLERS: dict[int, Handler] = dict.fromkeys(_STRINGS, string)
