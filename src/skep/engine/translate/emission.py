"""Emission: the machine code of a block, from its instructions' templates."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from typing import NamedTuple

from iced_x86 import Decoder

from skep.engine.translate import sheet
from skep.engine.translate.asm import R10, R11, RCX, Assembler, Cond, Mem, gs
from skep.engine.translate.catalog import Catalog
from skep.engine.translate.drafting import Draft, KnownBlocks
from skep.engine.translate.forms import HOMES, IN_STATE, TLB_MASK, Ends, Form
from skep.engine.translate.hoisting import Table, tables
from skep.engine.translate.layout import JC, JC_ARRAY, OFFSETS, SLOTS, TLB, TLB_ARRAY, TLB_EXEC, TLB_HOST, Mode
from skep.engine.translate.lower import Lowering
from skep.engine.translate.narrow import Narrow
from skep.engine.translate.renaming import rename
from skep.engine.translate.sharing import Share, shares
from skep.engine.translate.stubs import field as state
from skep.engine.translate.stubs import restore_flags, save_flags

_i32 = struct.Struct("<i").pack_into
_u64 = struct.Struct("<Q").pack_into


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
_SLOW_CALL = _frag(lambda a: a.call(state("slow")))
_RANGE_CALL = _frag(lambda a: a.call(state("range")))
_LOAD_PAGE = _frag(lambda a: a.mov(R10, state("page")))
_BRK_JUMP = _frag(lambda a: a.jmp(state("brk_exit")))
_RESTORE = _frag(restore_flags)
_PAGE_PLUS = _LOAD_PAGE + b"\x4d\x8d\x92"  # r10 = the page's address + the 32 bits that follow
_BREAK = struct.Struct(f"<{len(_PAGE_PLUS)}si{len(_BRK_JUMP)}s").pack
_SLOW = struct.Struct(f"<Bi{len(_SLOW_CALL)}sBi")
_SLOW_CODE = _SLOW.pack(0x68, 0, _SLOW_CALL, 0xE9, 0)
"""push descriptor; call slow; jmp back"""
_RANGE_CODE = _SLOW.pack(0x68, 0, _RANGE_CALL, 0xE9, 0)
SLOW_SIZE = _SLOW.size
_SLOW_PUSH = b"\x68"
# Looking names up in a class costs more than the rest of a step of the loops below.
_NO, _JCC, _JMP, _CALL, _LOOP, _MODE, _LOOK = Ends.NO, Ends.JCC, Ends.JMP, Ends.CALL, Ends.LOOP, Ends.MODE, Ends.LOOK
_LEA = [
    _frag(lambda a, n=n: _range_start(a, n))[:-4]  # type: ignore[misc]
    for n in range(16)
]
"""r10 = a guest register plus the 32 bits that follow."""
_LEA_HOST = [_frag(lambda a, n=n: a.lea(R10, Mem(n, disp=0x11111111)))[:-4] for n in range(16)]  # type: ignore[misc]
"""The same for a host register."""
_KEEP = [_frag(lambda a, i=i: a.mov(state(f"slot{i}"), R10)) for i in range(SLOTS)]  # type: ignore[misc]
_TAKE = [_frag(lambda a, i=i: a.mov(R10, state(f"slot{i}"))) for i in range(SLOTS)]  # type: ignore[misc]
_Jumps = tuple[bytes, bytes, bytes, bytes]


def _jumps(opcode: bytes) -> _Jumps:
    """A jump with a displacement of 32 bits, by the low bits of the offset where it is put, behind as many bytes of NOP
    as align the displacement, so that it may be patched."""
    nops = b"", b"\x90", b"\x66\x90", b"\x0f\x1f\x00"
    first, second, third, fourth = (nops[-(at + len(opcode)) & 3] + opcode + bytes(4) for at in range(4))
    return first, second, third, fourth


RANGE_BIT = 1 << 30
"""In a descriptor: several operands share the check (runtime.fill_range)."""
_TABLE = RANGE_BIT | 1 << 29
"""The same for a table, whose size is told in words of 8 bytes (runtime.fill_table)."""
_MOVED = 8
"""With what is said of a check in a template: registers are renamed there."""
_IN_STATE = sum(1 << n for n in IN_STATE)
_JCC_CODE = [bytes((0x0F, 0x80 | cc, 0, 0, 0, 0)) for cc in range(16)]
_JCC_JUMPS = [_jumps(bytes((0x0F, 0x80 | cc))) for cc in range(16)]
_JMP_JUMPS = _jumps(b"\xe9")
_LINK = struct.Struct(f"<2sQ{len(_LINK_CALL)}si")
_LINK_SITE = 10 + len(_LINK_CALL)
LINK_SIZE = _LINK.size
RELATIVE = 4 | 1 << 8
"""In place of bytes: the displacement of a RIP-relative operand."""
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


class Emitted(NamedTuple):
    """A block's machine code for one place."""

    code: bytearray
    entry: int
    """The plain entry's offset in ``code``."""
    marks: array[int]
    """Offsets in the code and in the guest's page, of each instruction in turn."""
    links: list[tuple[int, int, int]]
    """Jumps within the page: offset of the displacement, of the stub that links it, and the target's key."""
    copies: list[tuple[int, int, int]]
    """Constants of 2, 4 and 8 bytes that the code only copies: offset in the code, in the block's bytes, bytes; or
    RELATIVE, where the code has the constant plus something."""


class _Block:
    """A block that is being written."""

    __slots__ = (
        "breaks", "draft", "entry", "far", "homes", "links", "out", "outs", "own", "page", "top", "undo", "wide",
    )  # fmt: skip

    def __init__(self, draft: Draft, out: bytearray) -> None:
        self.draft = draft
        self.out = out
        self.entry = len(out)
        self.page = draft.pa & ~4095
        self.wide = draft.lowering.wide
        self.own = -1 if draft.plain or draft.pa2 is not None else draft.pa << Mode.BITS | draft.mode
        """The key for which jumps go to this block's plain entry."""
        self.links: list[tuple[int, int]] = []
        """Jumps within the page: the displacement's position, and the target's key."""
        self.breaks: list[tuple[int, int]] = []
        """Ways out when somebody wants the vCPU: the displacement's position, and the offset to go on at."""
        self.top = 0
        """Where jumps back to the first instruction go, which look for somebody there; 0: there are none."""
        self.homes: tuple[int | None, ...] | None = None
        """While a loop's body with renamed registers is written: where they are."""
        self.undo = b""
        """What puts them back (renaming.py)."""
        self.outs: list[tuple[int, int, int]] = []
        """Jumps out of the body: the displacement's position, the target, the branch's offset."""
        self.far: list[tuple[int, int, int, bool]] = []
        """Jumps to other pages: the displacement's position, the target, the branch's offset, is it narrow"""


class Emission:
    """Writes blocks for one code buffer."""

    def __init__(
        self,
        executable: int,
        base: int,
        catalog: Catalog,
        stubs: Mapping[str, int],
        live_at: Callable[[int, int, int], int],
        known: KnownBlocks,
    ) -> None:
        """``executable``: where the code buffer is executed; ``base``: host address of guest-physical 0; ``live_at``:
        :meth:`Drafting.live_at`; ``known``: the blocks there are, by their keys."""
        self._executable = executable
        self._base = base
        self._catalog = catalog
        self._live_at = live_at
        self._known = known
        self._prologues: dict[tuple[int, bool], tuple[bytes, int, int, int]] = {}
        self._second = [stubs[f"second{array_}"] for array_ in range(3)]
        self._brk_exit = stubs["brk_exit"]

    def emit(self, draft: Draft, needs: list[bool], live: int, start: int) -> Emitted:
        """The code of ``draft`` for offset ``start`` of the buffer; ``needs`` and ``live`` are Drafting.needs'."""
        mode, lowering, data = draft.mode, draft.lowering, draft.data
        offset = draft.pa & 4095
        rx = self._executable + start
        prologue, fix_second, fix_brk, fix_page = self.prologue(mode, bool(live))
        out = bytearray(prologue)
        _i32(out, fix_second, self._second[mode & 3] - (rx + fix_second + 4))
        _i32(out, fix_brk, self._brk_exit - (rx + fix_brk + 4))
        _i32(out, fix_page, -offset)
        block = _Block(draft, out)
        slow: list[tuple[int, int, int, int]] = []
        copies: list[tuple[int, int, int]] = []
        items = draft.items
        loop = draft.loop
        hoisted = tables(items[:loop], data, offset) if loop else []
        slots = SLOTS - len(hoisted)
        shared: list[Share | None] = [None] * len(items)
        if block.wide and not draft.plain:
            shared = shares(items, data, offset, slots)
        sharing = any(shared)
        held = -1  # the range whose start is in r10
        marks = array("H")
        mark = marks.append
        shadow = draft.shadow
        if draft.pa2 is not None:
            self._span(out, mode, offset, draft.pa2)
        redo = self._loop(block, live, hoisted, slow) if loop else b""
        for slot, table in enumerate(hoisted, slots):
            for i in table.readers:
                shared[i] = slot, 0, None
        homes = block.homes
        moved = _MOVED if redo else 0
        for (form, at, n, extra), flags, share in zip(items, needs, shared, strict=True):
            if moved and len(marks) == 2 * loop:
                out += block.undo
                homes = block.homes = None
                moved = 0
            base = len(out)
            mark(base)
            mark(at)
            e = form.ends
            if e >= _JCC:
                self._branch(block, form, at, n, extra)
                continue
            place = 0
            if share is None:
                t = form.live if flags else form.dead
                if homes is not None and form.uses & _IN_STATE:
                    t = self._catalog.renamed(form, lowering, data, at - offset, at, n, flags, False, homes)
                elif t is None:
                    t = self._catalog.template(form, lowering, data, at - offset, at, n, flags)
                if not t.keeps:
                    held = -1
            else:
                slot, place, lead = share
                if lead is not None:
                    register, disp, length, write = lead
                    host = None if homes is None else homes[register]
                    out += _LEA[register] if host is None else _LEA_HOST[host]
                    out += disp.to_bytes(4, "little", signed=True)
                    base = len(out)
                    code, jump = lowering.range_check(write, flags, register == 4)
                    out += code
                    _i32(out, base + jump - 6, 4096 - length)
                    desc = RANGE_BIT | (mode & 3) << 24 | write << 22 | length << 12 | at
                    stack = 0
                    if register == 4:
                        stack = 6 if e or form.step is not None else 2
                    slow.append((base + jump, len(out), desc, flags | stack | moved))
                    out += _KEEP[slot]
                    base = len(out)
                elif held != slot:
                    out += _TAKE[slot]
                    base = len(out)
                t = form.placed
                if homes is not None and form.uses & _IN_STATE:
                    t = self._catalog.renamed(form, lowering, data, at - offset, at, n, False, True, homes)
                elif t is None:
                    t = self._catalog.placed(form, lowering, data, at - offset, at, n)
                held = slot if t.keeps else -1
            out += t.code
            if t.open:
                for jump, back, desc, saved in t.checks:
                    slow.append((base + jump, base + back, desc | at, saved | moved))
                for hole, what, add in t.holes:
                    value = place if what == 3 else at if what == 0 else at + n if what == 1 else extra
                    _i32(out, base + hole, add + value)
                    if what == 2 and form.relative:
                        copies.append((base + hole, at - offset + n - 4 - form.behind, RELATIVE))
                for to, of, k in t.copies:
                    to += base
                    of += at - offset
                    if k > 1 and (form.step is None or not sharing):
                        copies.append((to, of, k))
                    out[to : to + k] = data[of : of + k]
            if e:
                if e == _CALL:
                    self._leave(block, extra, extra <= at or shadow, mode, at, form.narrow)
                elif e == _MODE:
                    self._leave(block, at + n, False, mode & ~Mode.AC | form.cond, -1, False)
                elif e == _LOOK:
                    self._leave(block, at + n, True, mode, -1, False)
        if draft.ends == _NO or draft.ends == _JCC:
            if moved:
                out += block.undo
            self._leave(block, offset + draft.size, shadow, mode, -1, False)
        # What is rarely run
        for jump, back, desc, saved in slow:
            here = len(out)
            _i32(out, jump, here - jump - 4)
            if saved & _MOVED:
                out += _RESTORE if saved & 1 else b""
                out += block.undo + _SLOW_PUSH + desc.to_bytes(4, "little")
                out += (_RANGE_CALL if desc & RANGE_BIT else _SLOW_CALL) + redo + b"\xe9"
                out += (back - len(out) - 4).to_bytes(4, "little", signed=True)
                continue
            code, again = self._tail(lowering, desc, saved)
            out += code
            end = len(out)
            if again:
                _i32(out, here + again, back - (here + again + 4))
            _i32(out, end - SLOW_SIZE + 1, desc)
            _i32(out, end - 4, back - end)
        for site, target, at in block.outs:
            _i32(out, site, len(out) - site - 4)
            out += block.undo
            self._leave(block, target, target <= at, mode, at, False)
        links: list[tuple[int, int, int]] = []
        for site, key in block.links:
            here = len(out)
            entry = self._known.entry(key)
            _i32(out, site, (entry - start if entry else here) - site - 4)
            links.append((site, here, key))
            out += _LINK.pack(b"\x49\xbb", key, _LINK_CALL, site - (here + _LINK_SITE))
        for site, target in block.breaks:
            _i32(out, site, len(out) - site - 4)
            if 0 < site - block.top < len(_CHECK_LIVE):  # it is the loop's, the only one in its body
                out += block.undo
            out += _BREAK(_PAGE_PLUS, target, _BRK_JUMP)
        for site, target, at, narrow in block.far:
            _i32(out, site, len(out) - site - 4)
            out += self.long(lowering, target, at, narrow)
        return Emitted(out, block.entry, marks, links, copies)

    def _loop(
        self, block: _Block, live: int, hoisted: list[Table], slow: list[tuple[int, int, int, int]]
    ) -> bytes:
        """What comes before a loop, and where jumps back to the block's start go. Adds the checks of its tables to
        ``slow``. Returns what renames registers, none if none are."""
        draft, out = block.draft, block.out
        renaming = rename(draft.items[: draft.loop])
        redo = b""
        if renaming is not None:
            block.homes, redo, block.undo = renaming
            out += redo
        for slot, table in enumerate(hoisted, SLOTS - len(hoisted)):
            host = None if block.homes is None else block.homes[table.base]
            out += _LEA[table.base] if host is None else _LEA_HOST[host]
            out += table.disp.to_bytes(4, "little", signed=True)
            base = len(out)
            code, jump = draft.lowering.range_check(False, live != 0, table.base == 4)
            out += code
            _i32(out, base + jump - 6, 4096 - table.length)
            desc = _TABLE | (draft.mode & 3) << 24 | table.length >> 3 << 12 | draft.pa & 4095
            how = (1 if live else 0) | (2 if table.base == 4 else 0) | (_MOVED if redo else 0)
            slow.append((base + jump, len(out), desc, how))
            out += _KEEP[slot]
        top = len(out)
        out += _CHECK_LIVE if live else _CHECK_DEAD
        block.breaks.append((len(out) - (7 if live else 4), draft.pa & 4095))
        block.top = top
        return redo

    def _branch(self, block: _Block, form: Form, at: int, n: int, target: int) -> None:
        """A Jcc, JMP or LOOP of ``n`` bytes at offset ``at``."""
        out = block.out
        draft = block.draft
        mode = draft.mode
        e = form.ends
        if block.top and target == draft.pa & 4095 and e != _LOOP:
            out += b"\xe9\0\0\0\0" if e == _JMP else _JCC_CODE[form.cond]
            _i32(out, len(out) - 4, block.top - len(out))
        elif block.homes is not None:
            out += _JCC_CODE[form.cond]
            block.outs.append((len(out) - 4, target, at))
        elif e == _JMP:
            self._leave(block, target, target <= at or draft.shadow, mode, at, form.narrow)
        elif e == _LOOP:
            if form.loop:
                out += form.loop
            else:
                first = at - (draft.pa & 4095)
                out += draft.data[first : first + n - 1] + b"\0"
            skip = len(out)
            self._leave(block, at + n, True, mode, -1, False)
            if form.loop:
                _i32(out, skip - 4, len(out) - skip)
                self._leave(block, target, True, mode, at, form.narrow)
            else:
                out[skip - 1] = len(out) - skip
                self._leave(block, target, True, mode, -1, False)
        elif not 0 <= target < 4096 or not (block.wide or draft.lowering.near(target, at, form.narrow)):
            block.far.append((len(out) + 2, target, at, form.narrow))
            out += _JCC_CODE[form.cond]
        elif at < target and not draft.shadow:
            self._direct(block, _JCC_JUMPS[form.cond], target, mode)
        else:
            out += _JCC_CODE[form.cond ^ 1]
            skip = len(out)
            self._leave(block, target, True, mode, at, form.narrow)
            _i32(out, skip - 4, len(out) - skip)

    def _direct(self, block: _Block, jumps: _Jumps, target: int, mode: int) -> None:
        """A jump within the page."""
        out = block.out
        out += jumps[len(out) & 3]
        site = len(out) - 4
        key = (block.page | target) << Mode.BITS | mode
        if key == block.own:
            _i32(out, site, block.entry - (site + 4))
        else:
            block.links.append((site, key))

    def _leave(self, block: _Block, target: int, looks: bool, mode: int, at: int, narrow: bool) -> None:
        """Go to ``target``, unconditionally: by the branch at offset ``at``, or (-1) behind an instruction."""
        out = block.out
        if 0 <= target < 4096 and (block.wide or block.draft.lowering.near(target, at, narrow)):
            if looks:
                if self._live_at(block.page, target, mode):
                    out += _CHECK_LIVE
                    block.breaks.append((len(out) - 7, target))
                else:
                    out += _CHECK_DEAD
                    block.breaks.append((len(out) - 4, target))
            self._direct(block, _JMP_JUMPS, target, mode)
        else:
            out += self.long(block.draft.lowering, target, at, narrow)

    def _tail(self, lowering: Lowering, desc: int, saved: int) -> tuple[bytes, int]:
        """Where a check with the descriptor ``desc`` goes on when it fails: ends in _SLOW_CODE or
        _RANGE_CODE. With it, where another displacement of a jump back stands, or 0."""
        restore = _RESTORE if saved & 1 else b""
        call = _RANGE_CODE if desc & RANGE_BIT else _SLOW_CODE
        if not saved & 2:
            return restore + call, 0
        size = desc >> 12 & 1023
        if desc & _TABLE == _TABLE:
            size *= 8
        code, jump = lowering.fallback(size, desc >> 22 & 3 != 0, saved & 4 != 0)
        out = bytearray(code + restore + b"\xe9" + bytes(4))
        again = len(out) - 4
        _i32(out, jump, len(out) - jump - 4)
        return bytes(out + restore + call), again

    def pieces(self) -> dict[int, list[bytes]]:
        """What machine code puts blocks together of (composing.py), by its place on the sheet."""
        tails = [(_RESTORE if i & 1 else b"") + (_RANGE_CODE if i & 2 else _SLOW_CODE) for i in range(4)]
        link = _LINK.pack(b"\x49\xbb", 0, _LINK_CALL, 0)
        return {
            sheet.LEAD_CODE: _LEA, sheet.TAKE_CODE: _TAKE, sheet.KEEP_CODE: _KEEP, sheet.TAILS: tails,
            sheet.CHECK_CODE: [_CHECK_DEAD, _CHECK_LIVE], sheet.PAGE_CODE: [_PAGE_PLUS], sheet.LINK_CODE: [link],
            sheet.BREAK_CODE: [_BRK_JUMP],
        }  # fmt: skip

    def stack_tail(self, lowering: Lowering, index: int) -> tuple[bytes, int, int]:
        """One of _tail's for the stack, by sheet.M_TAIL, and where the other displacement of a jump back and the
        size's complement to 4096 stand."""
        desc = (RANGE_BIT if index & 2 else 0) | (1 << 22 if index & 4 else 0) | 1 << 12
        code, again = self._tail(lowering, desc, index & 1 | 2 | (4 if index & 8 else 0))
        _, jump = lowering.fallback(1, bool(index & 4), bool(index & 8))
        return code, again, jump - 6

    def unplaced(
        self, made: bytes, links: list[tuple[int, int, int]], mode: int, live: int, pa2: int | None
    ) -> tuple[bytes, int, int, int, int]:
        """The code ``made`` for a block, with such ``links``, without what depends on its place, and on which other
        blocks there are; and where it wants the displacements of `second` and `brk`, and twice the host address of its
        second page."""
        code = bytearray(made)
        _, second, brk, page = self.prologue(mode & ~Mode.PLAIN, bool(live))
        _i32(code, second, 0)
        _i32(code, brk, 0)
        for site, stub, key in links:
            _i32(code, site, stub - site - 4)
            _u64(code, stub + LINK_KEY, key & (1 << Mode.BITS + 12) - 1)
        spans = [0, 0]
        if pa2 is not None:
            address = (self._base + pa2).to_bytes(8, "little")
            at = page
            for i in range(2):
                at = spans[i] = code.index(address, at)
                _u64(code, at, 0)
        return bytes(code), second, brk, spans[0], spans[1]

    def long(self, lowering: Lowering, target: int, at: int = -1, narrow: bool = False) -> bytes:
        """Go to another page: its address relative to this one's, through the jump cache."""
        if isinstance(lowering, Narrow):
            return lowering.way_out(target, at, narrow)
        if not -(1 << 31) <= target < 1 << 31:
            a = Assembler()
            a.mov(R11, target)
            a.mov(R10, state("page"))
            a.lea(R10, Mem(R10, R11))
            return a.code(0) + lowering.dispatch_code
        return _PAGE_PLUS + (target & 0xFFFFFFFF).to_bytes(4, "little") + lowering.dispatch_code

    def prologue(self, mode: int, live: bool) -> tuple[bytes, int, int, int]:
        """The checked entry, and where it wants the displacements of `second`, `brk` and the block's negated offset."""
        known = self._prologues.get((mode & Mode.SHAPE, live))
        if known is not None:
            return known
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
        known = self._prologues[mode & Mode.SHAPE, live] = (a.code(0), second, brk, page)
        return known

    def _span(self, out: bytearray, mode: int, offset: int, pa2: int) -> None:
        """Make sure that the second page is still mapped where it was; the TLB's execute tag knows."""
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
        a.mov(R11, self._base + pa2)
        a.cmp(R10, R11)
        a.jcc(Cond.E, good)
        a.bind(bad)
        restore_flags(a)
        a.mov(R10, self._base + pa2)
        a.raw(b"\x68" + offset.to_bytes(4, "little"))
        a.call(state("span"))
        a.jmp(over)
        a.bind(good)
        restore_flags(a)
        a.bind(over)
        out.extend(a.code(0))

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
            out.extend(_SLOW.pack(0x68, desc | offset, _SLOW_CALL, 0xE9, back - (here + SLOW_SIZE)))
        return bytes(out)

