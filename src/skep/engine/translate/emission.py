"""Emission: the pieces of machine code that blocks are put together of besides templates, and single instructions."""

from __future__ import annotations

import struct
from collections.abc import Callable

from iced_x86 import Decoder

from skep.engine.translate import sheet
from skep.engine.translate.asm import R10, R11, RCX, Assembler, Cond, Mem, gs
from skep.engine.translate.catalog import Catalog
from skep.engine.translate.forms import HOMES, TLB_MASK, Ends
from skep.engine.translate.layout import JC, JC_ARRAY, OFFSETS, SLOTS, TLB, TLB_ARRAY, TLB_EXEC, TLB_HOST, Mode
from skep.engine.translate.lower import Lowering
from skep.engine.translate.narrow import Narrow
from skep.engine.translate.stubs import field as state
from skep.engine.translate.stubs import restore_flags, save_flags

_i32 = struct.Struct("<i").pack_into
Piece = tuple[bytes, tuple[int, ...]]
"""Code, and places in it."""


def _frag(build: Callable[[Assembler], None]) -> bytes:
    a = Assembler()
    build(a)
    return a.code(0)


def _range_start(a: Assembler, number: int) -> None:
    register = HOMES[number]
    if register is None:
        a.mov(R10, gs(number * 8))
        register = R10
    a.lea(R10, Mem(register, disp=0x11111111))


_LINK_CALL = _frag(lambda a: a.call(state("link")))
SLOW_CALL = _frag(lambda a: a.call(state("slow")))
RANGE_CALL = _frag(lambda a: a.call(state("range")))
_BRK_JUMP = _frag(lambda a: a.jmp(state("brk_exit")))
_RESTORE = _frag(restore_flags)
_PAGE_PLUS = _frag(lambda a: a.mov(R10, state("page"))) + b"\x4d\x8d\x92"
"""r10 = the page's address + the 32 bits that follow"""
_SLOW = struct.Struct(f"<Bi{len(SLOW_CALL)}sBi")
_SLOW_CODE = _SLOW.pack(0x68, 0, SLOW_CALL, 0xE9, 0)
"""push descriptor; call slow; jmp back"""
_RANGE_CODE = _SLOW.pack(0x68, 0, RANGE_CALL, 0xE9, 0)
SLOW_SIZE = _SLOW.size
LEAD = [
    _frag(lambda a, n=n: _range_start(a, n))[:-4]  # type: ignore[misc]
    for n in range(16)
]
"""r10 = a guest register plus the 32 bits that follow."""
LEAD_HOST = [_frag(lambda a, n=n: a.lea(R10, Mem(n, disp=0x11111111)))[:-4] for n in range(16)]  # type: ignore[misc]
"""The same for a host register."""
_KEEP = [_frag(lambda a, i=i: a.mov(state(f"slot{i}"), R10)) for i in range(SLOTS)]  # type: ignore[misc]
_TAKE = [_frag(lambda a, i=i: a.mov(R10, state(f"slot{i}"))) for i in range(SLOTS)]  # type: ignore[misc]
RANGE_BIT = 1 << 30
"""In a descriptor: several operands share the check (runtime.fill_range)."""
TABLE_BITS = RANGE_BIT | 1 << 29
"""The same for a table, whose size is told in words of 8 bytes (runtime.fill_table)."""
_LINK_CODE = b"\x49\xbb" + bytes(8) + _LINK_CALL + bytes(4)
"""mov r11, key; call link; where the jump's displacement is, relative to here"""
LINK_SIZE = len(_LINK_CODE)
LINK_KEY = 2
"""Where in a link's stub the target's key stands."""
_CHECK_DEAD = _frag(lambda a: a.cmp(gs(OFFSETS["brk"]), 0, size=32)) + b"\x0f\x85" + bytes(4)  # jne rel32
# the same without touching flags:
# mov r11, rcx; mov ecx, brk; jrcxz over; mov rcx, r11; jmp rel32; over: mov rcx, r11
_CHECK_LIVE = (
    b"\x49\x89\xcb"
    + _frag(lambda a: a.mov(RCX, gs(OFFSETS["brk"]), size=32))
    + b"\xe3\x08\x4c\x89\xd9\xe9"
    + bytes(4)
    + b"\x4c\x89\xd9"
)
CHECK_SIZE = len(_CHECK_LIVE)


def _places(code: bytes, *values: bytes) -> Piece:
    """Code with these in it, and where they stand."""
    return code, tuple(code.index(value) for value in values)


class Emission:
    """Makes pieces of blocks."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def pieces(self) -> dict[int, list[Piece]]:
        """Those that are the same in all modes, by their place on the sheet."""
        tails = [(_RESTORE if i & 1 else b"") + (_RANGE_CODE if i & 2 else _SLOW_CODE) for i in range(4)]
        far = Assembler()
        far.mov(R11, 0x1122334455667788)
        far.mov(R10, state("page"))
        far.lea(R10, Mem(R10, R11))
        codes = {
            sheet.LEAD_CODE: LEAD, sheet.LEAD_MOVED: LEAD[9:12], sheet.TAKE_CODE: _TAKE, sheet.KEEP_CODE: _KEEP,
            sheet.TAILS: tails, sheet.CHECK_CODE: [_CHECK_DEAD, _CHECK_LIVE], sheet.CALLS: [SLOW_CALL, RANGE_CALL],
            sheet.PAGE_CODE: [_PAGE_PLUS], sheet.LINK_CODE: [_LINK_CODE], sheet.BREAK_CODE: [_BRK_JUMP],
            sheet.RESTORE_CODE: [_RESTORE], sheet.REDO: [b""], sheet.UNDO: [b""],
        }  # fmt: skip
        found: dict[int, list[Piece]] = {at: [(code, ()) for code in some] for at, some in codes.items()}
        found[sheet.FAR_CODE] = [_places(far.code(0), (0x1122334455667788).to_bytes(8, "little"))]
        return found

    def tail(self, lowering: Lowering, index: int) -> Piece:
        """Where a check of the stack goes on when it fails, by sheet.M_TAIL. Places: another displacement of a jump
        back, and the size's complement to 4096."""
        restore = _RESTORE if index & 1 else b""
        code, jump = lowering.fallback(1, bool(index & 4), bool(index & 8))
        out = bytearray(code + restore + b"\xe9" + bytes(4))
        again = len(out) - 4
        _i32(out, jump, len(out) - jump - 4)
        return bytes(out + restore + (_RANGE_CODE if index & 2 else _SLOW_CODE)), (again, jump - 6)

    def way_out(self, lowering: Lowering, index: int) -> Piece:
        """Of code of 16 and 32 bits, to another page, by sheet.M_WAY. Places: target, and the branch's offset or 0."""
        if not isinstance(lowering, Narrow):
            return b"", ()
        code = lowering.way_out(0x11111111, 0x22222222 if index & 2 else -1, bool(index & 1))
        branch = code.find(b"\x22" * 4)
        return code, (code.index(b"\x11" * 4), max(branch, 0))

    def prologue(self, mode: int, live: bool) -> Piece:
        """The checked entry. Places: the displacements of `second`, `brk` and the block's negated offset."""
        a = Assembler()
        # r11 = target - tag, without a flag changed: the flags may be wanted where this entry was not meant.
        a.mov(R11, Mem(R11, disp=JC + (mode & 3) * JC_ARRAY, gs=True))
        a.lea(R11, Mem(R11, R10))
        a.xchg(RCX, R11)
        meant = a.label()
        a.jrcxz(meant)
        a.xchg(RCX, R11)
        a.raw(b"\xe9")
        second = len(a)
        a.raw(bytes(4))
        a.bind(meant)
        if mode & Mode.NARROW:
            a.mov(R10, R10, size=32)  # tag to linear address
        if mode & Mode.SEGMENTED:  # to offset in CS
            a.mov(RCX, state("cs_base"))
            a.not_(RCX)
            a.lea(R10, Mem(R10, RCX, disp=1), size=32)
        if live:
            a.mov(RCX, gs(OFFSETS["brk"]), size=32)
            go = a.label()
            a.jrcxz(go)
            a.mov(RCX, R11)
            a.raw(b"\xe9")
            brk = len(a)
            a.raw(bytes(4))
            a.bind(go)
            a.mov(RCX, R11)
        else:
            a.mov(RCX, R11)
            a.cmp(gs(OFFSETS["brk"]), 0, size=32)
            a.raw(b"\x0f\x85")
            brk = len(a)
            a.raw(bytes(4))
        a.raw(b"\x45\x8d\x92" if mode & Mode.NARROW else b"\x4d\x8d\x92")  # lea r10, [r10 + disp32]
        page = len(a)
        a.raw(bytes(4))
        a.mov(state("page"), R10)
        return a.code(0), (second, brk, page)

    def span(self, mode: int) -> Piece:
        """Make sure that the second page is still mapped where it was; the TLB's execute tag knows. Places: its host
        address twice, and the block's offset."""
        address, offset = 0x1122334455667788, 0x12345678
        a = Assembler()
        bad, good, over = a.label(), a.label(), a.label()
        base = TLB + (mode & 3) * TLB_ARRAY
        save_flags(a)
        a.mov(R10, state("page"))
        a.lea(R10, Mem(R10, disp=4096), size=32 if mode & Mode.NARROW else 64)
        if mode & Mode.SEGMENTED:
            a.cmp(R10, state("code_end"))
            a.jcc(Cond.AE, bad)
            a.add(R10, state("cs_base"), size=32)
        a.mov(R11, R10, size=32)
        a.shr(R11, 7, size=32)
        a.and_(R11, TLB_MASK, size=32)
        a.xor(R10, Mem(R11, disp=base + TLB_EXEC, gs=True))
        a.shr(R10, 1)  # the lowest bit says global
        a.jcc(Cond.NE, bad)
        a.mov(R10, Mem(R11, disp=base + TLB_HOST, gs=True))
        a.mov(R11, address)
        a.cmp(R10, R11)
        a.jcc(Cond.E, good)
        a.bind(bad)
        restore_flags(a)
        a.mov(R10, address)
        a.raw(b"\x68" + offset.to_bytes(4, "little"))
        a.call(state("span"))
        a.jmp(over)
        a.bind(good)
        restore_flags(a)
        a.bind(over)
        code = a.code(0)
        word = address.to_bytes(8, "little")
        first = code.index(word)
        return code, (first, code.index(word, first + 1), code.index(offset.to_bytes(4, "little")))

    def single(self, data: bytes, offset: int, mode: int, bounce: dict[int, int]) -> bytes:
        """Code that runs the one instruction in ``data`` (at ``offset`` of its page), with its operands in bounce
        buffers, and leaves by done_exit; it may lie anywhere."""
        lowering = self._catalog.mode(mode).lowering
        ins = Decoder(lowering.bits, data, ip=offset).decode()
        form = lowering.form(ins, False)
        t = lowering.template(ins, data[: ins.len], True, bounce)
        out = bytearray()
        if form.ends not in (Ends.JCC, Ends.LOOP, Ends.JMP):
            out += t.code
        target = 0
        if form.ends in (Ends.JCC, Ends.JMP, Ends.LOOP, Ends.CALL):
            target = ins.near_branch_target
        elif ins.is_ip_rel_memory_operand:
            target = ins.memory_displacement
        for hole, what, add in t.holes:
            value = add + (offset if what == 0 else offset + ins.len if what == 1 else target)
            _i32(out, hole, (value + (1 << 31) & 0xFFFFFFFF) - (1 << 31))
        done = lowering.done_code
        n32 = offset + ins.len

        def leave(to: int) -> bytes:
            return _PAGE_PLUS + (to & 0xFFFFFFFF).to_bytes(4, "little") + done

        if form.ends == Ends.JCC:
            other = leave(n32)
            out.extend(bytes((0x0F, 0x80 | form.cond)) + len(other).to_bytes(4, "little") + other + leave(target))
        elif form.ends == Ends.LOOP:
            other = leave(n32)
            out.extend(data[: ins.len - 1] + bytes((len(other),)) + other + leave(target))
        elif form.ends == Ends.JMP:
            out.extend(leave(target))
        elif form.ends not in (Ends.YES, Ends.CALL):
            out.extend(leave(n32))
        for jump, back, desc, saved in t.checks:
            here = len(out)
            _i32(out, jump, here - jump - 4)
            if saved & 1:
                out.extend(_RESTORE)
                here += len(_RESTORE)
            out.extend(_SLOW.pack(0x68, desc | offset, SLOW_CALL, 0xE9, back - (here + SLOW_SIZE)))
        return bytes(out)

