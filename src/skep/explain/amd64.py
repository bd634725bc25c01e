"""What a processor's registers and its memory tell of it: pages, stacks, and why an exception could not be delivered.

Everything read here was written by the guest, which may have written anything: reads end where RAM ends, walks and
scans have bounds, and nothing raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from skep.engine.amd64.registers import Attr, Cr0, Cr4, Efer, Pte, Rflags, SystemType, Vector, canonical
from skep.explain.symbols import Symbols
from skep.memory import GuestMemory, MemoryFault

EXCEPTIONS = {value: f"#{name}" for name, value in vars(Vector).items() if name.isupper()}
"""Vector -> "#GP" and so on."""

_M64 = 0xFFFF_FFFF_FFFF_FFFF
_M32 = 0xFFFF_FFFF
_STACK = 16 << 10
"""Linux's THREAD_SIZE on amd64, to which its stacks are aligned; of others we read no more than that."""
_FRAMES = 24
_IRET_FRAME = 48
"""Bytes that an exception with an error code pushes."""


class Page(NamedTuple):
    """Where a virtual address leads."""

    gpa: int
    writable: bool
    executable: bool
    user: bool


class AddressSpace:
    """Virtual memory as one processor has it, by its own paging registers. For looking only: no accessed bit is set."""

    def __init__(self, memory: GuestMemory, state: dict[str, Any]) -> None:
        self.memory = memory
        self._paging = bool(state.get("cr0", 0) & Cr0.PG)
        self._long = bool(state.get("efer", 0) & Efer.LMA)
        self._root = state.get("cr3", 0)
        self._cr4 = state.get("cr4", 0)
        self._pages: dict[int, Page | None] = {}

    @property
    def mask(self) -> int:
        return _M64 if self._long else _M32

    def page(self, va: int) -> Page | None:
        """The page that ``va`` is on and its offset in it added; None where nothing is mapped."""
        number = va >> 12
        if number not in self._pages:
            self._pages[number] = self._walk(number << 12)
        page = self._pages[number]
        return None if page is None else page._replace(gpa=page.gpa + (va & 4095))

    def read(self, va: int, n: int) -> bytes:
        """Up to ``n`` bytes, fewer where memory ends; ``n`` is at most a few pages."""
        out = b""
        while len(out) < n:
            at = va + len(out) & self.mask
            page = self.page(at)
            size = min(n - len(out), 4096 - (at & 4095))
            if page is None or not self.memory.is_ram(page.gpa, size):
                break
            out += self.memory.read(page.gpa, size)
        return out

    def word(self, va: int, size: int = 8) -> int | None:
        data = self.read(va, size)
        return int.from_bytes(data, "little") if len(data) == size else None

    def _walk(self, va: int) -> Page | None:
        if not self._paging:
            return Page(va, True, True, True)
        if self._long:
            if not canonical(va) and not self._cr4 & Cr4.LA57:
                return None
            return self._levels(va, self._root & Pte.ADDRESS, 5 if self._cr4 & Cr4.LA57 else 4, 9, 8)
        if self._cr4 & Cr4.PAE:
            return self._levels(va, self._root & ~31 & _M32, 3, 9, 8)
        return self._levels(va, self._root & ~4095 & _M32, 2, 10, 4)

    def _levels(self, va: int, table: int, levels: int, bits: int, size: int) -> Page | None:
        """SDM 3, 4.3 to 4.5: ``bits`` of the address index each table of entries of ``size`` bytes."""
        writable = executable = user = True
        for level in range(levels, 0, -1):
            shift = 12 + (level - 1) * bits
            entry = self._entry(table + (va >> shift & (1 << bits) - 1) * size, size)
            if entry is None or not entry & Pte.P:
                return None
            if not (levels == 3 and level == 3):  # PAE's PDPTEs have no permissions
                writable = writable and bool(entry & Pte.RW)
                user = user and bool(entry & Pte.US)
                executable = executable and not entry & Pte.NX
            large = level in (2, 3) and entry & Pte.PS and (size == 8 or self._cr4 & Cr4.PSE)
            address = entry & (Pte.ADDRESS if size == 8 else 0xFFFF_F000)
            if level == 1 or (large and levels != level):
                inside = (1 << shift) - 1
                return Page(address & ~inside | va & inside, writable, executable, user)
            table = address
        return None

    def _entry(self, gpa: int, size: int) -> int | None:
        try:
            return self.memory.load_u64(gpa) if size == 8 else self.memory.load_u32(gpa)
        except MemoryFault:
            return None


def bits(state: dict[str, Any]) -> int:
    """The size of the code that runs: 16, 32 or 64."""
    attributes = state.get("cs", {}).get("attributes", 0)
    if state.get("efer", 0) & Efer.LMA and attributes & Attr.L:
        return 64
    return 32 if attributes & Attr.D else 16


def mode(state: dict[str, Any]) -> str:
    """In words."""
    if not state.get("cr0", 0) & Cr0.PE:
        return "real mode"
    who = "user code" if int(state.get("cs", {}).get("selector", 0)) & 3 == 3 else "kernel code"
    return f"{bits(state)}-bit {who}"


def interrupts_on(state: dict[str, Any]) -> bool:
    return bool(state.get("rflags", 0) & Rflags.IF)


def linear(state: dict[str, Any], segment: str, offset: int) -> int:
    """The linear address of ``offset`` in a segment."""
    if bits(state) == 64:
        return offset & _M64
    return int(state.get(segment, {}).get("base", 0)) + offset & _M32


def code(space: AddressSpace, state: dict[str, Any], count: int) -> list[str]:
    """The instructions at rip, as text; hexadecimal where there is no disassembler."""
    rip = state.get("rip", 0)
    data = space.read(linear(state, "cs", rip), 15 * count)
    if not data:
        return []
    try:
        from iced_x86 import Decoder, Formatter, FormatterSyntax
    except ImportError:
        return [data[:15].hex(" ")]
    decoder, formatter = Decoder(bits(state), data, ip=rip), Formatter(FormatterSyntax.INTEL)
    formatter.hex_prefix, formatter.hex_suffix, formatter.uppercase_hex = "0x", "", False
    formatter.branch_leading_zeros = formatter.show_branch_size = False
    lines = []
    for _ in range(count):
        if not decoder.can_decode:
            break
        start = decoder.position
        instruction = decoder.decode()
        lines.append(formatter.format(instruction) if instruction else data[start : start + 8].hex(" "))
    return lines


# The stack


def stack(space: AddressSpace, state: dict[str, Any], symbols: Symbols) -> tuple[list[int], bool]:
    """Return addresses, the innermost first, and whether they are a chain of frame pointers.

    Without such a chain, as in most kernels, everything on the stack counts that lies in executable memory behind a
    CALL (and in a function, where symbols are known). Some of that is left from calls that are over.
    """
    width = bits(state) // 8
    if width < 4:
        return [], False
    rsp = linear(state, "ss", state.get("rsp", 0))
    top = (rsp | _STACK - 1) + 1
    data = space.read(rsp & ~(width - 1), min(top - rsp, _STACK))
    words = [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data) - width + 1, width)]
    base = rsp & ~(width - 1)
    chain = _chain(space, words, base, linear(state, "ss", state.get("rbp", 0)), width)
    if len(chain) > 1:
        return chain, True
    found = []
    for word in words:
        if _returns_to(space, word) and (not symbols or symbols.name(word)):
            found.append(word)
            if len(found) == _FRAMES:
                break
    return found, False


def _chain(space: AddressSpace, words: list[int], base: int, frame: int, width: int) -> list[int]:
    found: list[int] = []
    while len(found) < _FRAMES:
        at = (frame - base) // width
        if (frame - base) % width or not 0 <= at < len(words) - 1 or not _returns_to(space, words[at + 1]):
            break
        found.append(words[at + 1])
        if words[at] <= frame:
            break
        frame = words[at]
    return found


def _returns_to(space: AddressSpace, va: int) -> bool:
    """``va`` lies in executable memory, and what is before it is a CALL (SDM 2, CALL: E8, FF /2)."""
    page = space.page(va - 1) if va > 4096 else None
    if page is None or not page.executable:
        return False
    before = space.read(va - 7, 7)
    if len(before) < 7:
        return False
    return before[2] == 0xE8 or any(_is_indirect_call(before[-size:]) for size in (2, 3, 4, 6, 7))


def _is_indirect_call(code: bytes) -> bool:
    if code[0] != 0xFF or code[1] >> 3 & 7 != 2:
        return False
    mode, rm = code[1] >> 6, code[1] & 7
    if mode == 3:
        return len(code) == 2
    size = 2 + (rm == 4)
    if mode == 1:
        size += 1
    elif mode == 2 or rm == 5:
        size += 4
    return len(code) == size


# Why an exception could not be delivered


def broken(space: AddressSpace, state: dict[str, Any]) -> Iterator[str]:
    """What of the processor's state keeps exceptions from being delivered, in words."""
    where = linear(state, "cs", state.get("rip", 0))
    page = space.page(where)
    if page is None:
        yield f"the code at {where:#x} is not mapped"
    elif not space.memory.is_ram(page.gpa):
        yield f"the code at {where:#x} is at guest-physical address {page.gpa:#x}, where there is no memory"
    elif not page.executable:
        yield f"the page of the code at {where:#x} is not executable"
    yield from _broken_idt(space, state)
    sp = linear(state, "ss", state.get("rsp", 0))
    pushed = space.page(sp - _IRET_FRAME & space.mask)
    if bits(state) == 64 and not canonical(state.get("rsp", 0)):
        yield f"the stack pointer {sp:#x} is not canonical"
    elif pushed is None or not space.memory.is_ram(pushed.gpa):
        yield f"there is no memory below the stack pointer {sp:#x}"
    elif not pushed.writable and state.get("cr0", 0) & Cr0.WP:
        yield f"the memory below the stack pointer {sp:#x} is read-only"


def _broken_idt(space: AddressSpace, state: dict[str, Any]) -> Iterator[str]:
    table = state.get("idtr", {})
    base, limit = int(table.get("base", 0)), int(table.get("limit", 0))
    if not state.get("cr0", 0) & Cr0.PE:
        return
    long = bool(state.get("efer", 0) & Efer.LMA)
    size = 16 if long else 8
    if limit < size * (Vector.PF + 1) - 1:
        yield f"the IDT has room for {(limit + 1) // size} of the CPU's exceptions (limit {limit:#x})"
        return
    for vector in (Vector.PF, Vector.GP, Vector.DF):
        name = EXCEPTIONS[vector]
        data = space.read(base + vector * size & space.mask, size)
        if len(data) < size:
            yield f"the IDT at {base:#x} is not in memory"
            return
        gate = int.from_bytes(data, "little")
        kind = gate >> 40 & 0x1F
        kinds = (SystemType.INTERRUPT_GATE, SystemType.TRAP_GATE)
        if kind not in kinds and not (not long and kind in (6, 7, SystemType.TASK_GATE)):
            yield f"the IDT's entry for {name} is no gate"
        elif not gate >> 47 & 1:
            yield f"the IDT's gate for {name} is not present"
        elif kind != SystemType.TASK_GATE:
            handler = (gate & 0xFFFF) | (gate >> 32 & 0xFFFF_0000) | ((gate >> 64 & _M32) << 32 if long else 0)
            yield from _broken_gate(space, state, name, gate >> 16 & 0xFFFF, handler)


def _broken_gate(space: AddressSpace, state: dict[str, Any], name: str, selector: int, handler: int) -> Iterator[str]:
    gdt = state.get("gdtr", {})
    if not selector & 4 and not 8 <= selector & ~7 <= int(gdt.get("limit", 0)) - 7:
        yield f"the code segment {selector:#x} of {name}'s gate is not in the GDT"
    elif not selector & 4 and space.word(int(gdt.get("base", 0)) + (selector & ~7)) is None:
        yield f"the GDT at {int(gdt.get('base', 0)):#x} is not in memory"
    page = space.page(handler)
    if page is None or not page.executable:
        yield f"the handler of {name} at {handler:#x} is not executable memory"
