"""Blocks: runs of guest instructions translated together, where they lie, and how they hang together.

A block begins at a guest-physical address in a mode and goes on over conditional branches that are not taken, up to a
limit or the end of its page. It has two entries. The *checked* entry is reached through the jump cache with the
target's tag in r10 and the set's offset in r11: it compares, looks whether somebody wants the vCPU, and notes the
page's address. The *plain* entry is reached by jumps that were patched to it from blocks of the same page. Every cycle
of plain jumps has a backward one, and those look, too.

Layout of a block in the code buffer: checked entry, plain entry and body, then what is rarely run: calls of the slow
path, links, long jumps.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from iced_x86 import Decoder, DecoderError, Instruction, OpKind

from skep.engine.translate.asm import R10, R11, RCX, Assembler, Cond, Mem, gs
from skep.engine.translate.compiler import CompiledUnit, compile_functions
from skep.engine.translate.forms import ALL_FLAGS, TLB_MASK, Ends, Form, Open, Template
from skep.engine.translate.layout import (
    HASH_BITS,
    HASH_ENTRY,
    JC,
    JC_ARRAY,
    OFFSETS,
    TLB,
    TLB_ARRAY,
    TLB_EXEC,
    TLB_HOST,
    Mode,
)
from skep.engine.translate.lower import Lowering
from skep.engine.translate.runtime import ROUTINES
from skep.engine.translate.stubs import Stubs, restore_flags, save_flags
from skep.engine.translate.stubs import field as state
from skep.memory import GuestMemory

CODE_SIZE = 64 << 20
MAX_INSTRUCTIONS = 48
MAX_BRANCHES = 6
MAX_BYTES = 192
MAX_BLOCKS = (1 << HASH_BITS) * 5 // 8
MAX_USED = (1 << HASH_BITS) * 3 // 4
MAX_FORMS = 1 << 17
"""Instructions whose bytes are remembered, by mode: what a guest can make us keep has a bound."""
MAX_SINGLES = 1024
GIVE_UP = 200
"""A code page that is written this often is forgotten whole, so that data beside dead code is cheap again."""

_MAP_NORESERVE = 0x4000
_ONES = (1 << 64) - 1
_i32 = struct.Struct("<i").pack_into
_NOPS = (b"", b"\x90", b"\x66\x90", b"\x0f\x1f\x00")


def _frag(build: Callable[[Assembler], None]) -> bytes:
    a = Assembler()
    build(a)
    return a.code(0)


_LINK_CALL = _frag(lambda a: a.call(state("link")))
_SLOW_CALL = _frag(lambda a: a.call(state("slow")))
_LOAD_PAGE = _frag(lambda a: a.mov(R10, state("page")))
_BRK_JUMP = _frag(lambda a: a.jmp(state("brk_exit")))
_RESTORE = _frag(restore_flags)
_SLOW = struct.Struct(f"<Bi{len(_SLOW_CALL)}sBi")
_SLOW_SIZE = _SLOW.size
_slow_pack = _SLOW.pack
# Looking names up in a class costs more than the rest of a step of the loops below.
_NO, _YES, _JCC, _JMP, _CALL, _LOOP = Ends.NO, Ends.YES, Ends.JCC, Ends.JMP, Ends.CALL, Ends.LOOP
_SHADOW, _MODE, _LOOK = Ends.SHADOW, Ends.MODE, Ends.LOOK
_GO_ON = (_NO, _JCC, _LOOP, _MODE, _LOOK)
_NEAR = (OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64)
_JCC_CODE = tuple(bytes((0x0F, 0x80 | cc)) for cc in range(16))
_BRANCH_BYTES = bytes(
    1 if 0x70 <= b < 0x80 or b in (0xE8, 0xE9, 0xEB) else 2 if b == 0x0F else 0 for b in range(256)
)
"""By first byte: how many bytes tell a relative branch, whose form does not depend on its displacement."""
_LINK = struct.Struct(f"<2sQ{len(_LINK_CALL)}si")
_LINK_SITE = 10 + len(_LINK_CALL)
_CHECK_DEAD = _frag(lambda a: a.cmp(gs(OFFSETS["brk"]), 0, size=16)) + b"\x0f\x85"  # jne rel32
# the same without touching flags:
# mov r11, rcx; movzx ecx, word brk; jrcxz over; mov rcx, r11; jmp rel32; over: mov rcx, r11
_CHECK_LIVE = b"\x49\x89\xcb" + _frag(lambda a: a.movzx(1, gs(OFFSETS["brk"]), 16)) + b"\xe3\x08\x4c\x89\xd9\xe9"
_CHECK_LIVE_END = b"\x4c\x89\xd9"


@lru_cache(1)
def _routines() -> CompiledUnit:
    """runtime.py in machine code, the same at any address."""
    return compile_functions(ROUTINES, 0)


_Item = tuple[Form, int, int, int]
"""An instruction: form, offset in its page, length, and where it goes or what it addresses relative to the page."""


class _Draft(NamedTuple):
    """A block as it was decoded."""

    pa: int
    mode: int
    size: int
    items: list[_Item]
    ends: int
    """How the last instruction ends it; NO: it goes on behind it."""
    shadow: bool
    """The last instruction stands in an STI's shadow: interrupts are looked for behind it."""
    pa2: int | None
    lowering: Lowering
    data: bytes


class Block:
    """One translation. Offsets ``start`` (checked entry), ``entry`` and ``end`` are in the code buffer."""

    __slots__ = ("end", "entry", "key", "live", "marks", "pa", "pa2", "size", "start")

    def __init__(
        self,
        key: int,
        pa: int,
        size: int,
        pa2: int | None,
        start: int,
        entry: int,
        end: int,
        live: int,
        marks: array[int],
    ) -> None:
        self.key = key
        self.pa = pa
        self.size = size
        self.pa2 = pa2
        self.start = start
        self.entry = entry
        self.end = end
        self.live = live
        self.marks = marks

    @property
    def mode(self) -> int:
        return self.key & 4095


class CodeBuffer:
    """Memory for code, seen twice: writable, and executable; never both at one address."""

    def __init__(self, size: int) -> None:
        self.size = size
        fd = os.memfd_create("skep-code")
        try:
            os.ftruncate(fd, size)
            self._rw = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._rx = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        finally:
            os.close(fd)
        self.view = memoryview(self._rw)
        self._pin = ctypes.c_char.from_buffer(self._rw)
        self.rw = ctypes.addressof(self._pin)
        self.rx = _address_of(self._rx)

    def relax(self) -> None:
        """Let go of the writable alias's page-table entries: else every page of code counts twice as resident."""
        self._rw.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.view.release()
        del self._pin
        self._rw.close()
        self._rx.close()


def _address_of(mapping: mmap.mmap) -> int:
    """The address of a read-only mapping, which ctypes will not tell."""
    buffer = (ctypes.c_char * 80)()  # Py_buffer: void *buf is its first field
    api = ctypes.pythonapi
    if api.PyObject_GetBuffer(ctypes.py_object(mapping), buffer, 0):
        raise OSError("cannot take the address of a mapping")
    address: int = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint64))[0]
    api.PyBuffer_Release(buffer)
    return address


class Cache:
    """A VM's translations."""

    def __init__(self, memory: GuestMemory, size: int = CODE_SIZE) -> None:
        self.memory = memory
        self.buffer = CodeBuffer(size)
        self.code = self.buffer.view
        frames = (memory.top + 4095) >> 12
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        sizes = (HASH_ENTRY << HASH_BITS, frames * 8, frames, frames * 512)
        self._tables = [mmap.mmap(-1, size, flags=flags) for size in sizes]
        self._pins = [ctypes.c_char.from_buffer(t) for t in self._tables]
        self.hash_address, self.mask_address, self.wmapped_address, self.bytes_address = map(
            ctypes.addressof, self._pins
        )
        self._hash = memoryview(self._tables[0]).cast("B").cast("Q")
        self.mask = memoryview(self._tables[1]).cast("B").cast("Q")
        self.wmapped = memoryview(self._tables[2])
        self._bytes = memoryview(self._tables[3]).cast("B").cast("Q")
        """A word for each line of 64 bytes: which of them were translated."""
        unit = _routines()
        self.code[: len(unit.code)] = unit.code
        self.routines = {name: self.buffer.rx + offset for name, offset in unit.entry.items()}
        at = (len(unit.code) + 63) & ~63
        data, self.stubs = Stubs(self.routines).code(self.buffer.rx + at)
        self.code[at : at + len(data)] = data
        self.first = self.pos = (at + len(data) + 63) & ~63
        self.blocks: dict[int, Block] = {}
        self._pages: dict[int, list[Block]] = {}
        self._starts: list[int] = []
        self._order: list[Block] = []
        self._writes: dict[int, int] = {}
        self._modes: dict[int, tuple[Lowering, dict[bytes, Form]]] = {}
        self._shapes: dict[int, dict[tuple[bytes, Open], Form]] = {}
        self._general: dict[tuple[tuple[bytes, Open], int], Form] = {}
        """Forms that no legality class changes."""
        self._prologues: dict[tuple[int, bool], tuple[bytes, int, int, int]] = {}
        self._peeks: dict[int, int] = {}
        self._peeked: dict[int, int] = {}
        """By frame: the bytes that live_at looked at for blocks of the page, as bits."""
        self._ins = Instruction()
        word = ctypes.c_uint64
        self._insert = ctypes.CFUNCTYPE(word, word, word, word)(self.routines["insert"])
        self._clear_write_tags = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(self.routines["clear_write_tags"])
        self._used = 0
        """Places of the block table that are not free, at most."""
        self._singles: dict[tuple[object, ...], bytes] = {}
        self._second = [self.stubs[f"second{array_}"] for array_ in range(3)]
        self._brk_exit = self.stubs["brk_exit"]
        self.instructions = 0
        self.killed = 0

    def close(self) -> None:
        self.mask.release()
        self.wmapped.release()
        self._bytes.release()
        self._hash.release()
        self._pins.clear()
        for t in self._tables:
            t.close()
        self.buffer.close()

    # Forms

    def mode(self, mode: int) -> tuple[Lowering, dict[bytes, Form]]:
        known = self._modes.get(mode)
        if known is None:
            known = self._modes[mode] = (Lowering(mode), {})
            self._shapes[mode] = {}
        return known

    def _shape(self, lowering: Lowering, key: bytes, ins: Instruction, decoder: Decoder, relative: bool) -> Form:
        """The form of an instruction seen for the first time: that of its bytes without the constants left open."""
        open_ = lowering.opens(ins, decoder)
        shape = bytearray(key)
        if open_.disp_size:
            shape[open_.disp : open_.disp + open_.disp_size] = b"displace"[: open_.disp_size]
        if open_.imm_size:
            shape[open_.imm : open_.imm + open_.imm_size] = b"immediat"[: open_.imm_size]
        if relative:
            where = decoder.get_constant_offsets(ins)
            shape[where.displacement_offset : where.displacement_offset + 4] = b"rip!"
        shapes = self._shapes[lowering.mode]
        forms = self._modes[lowering.mode][1]
        if len(forms) >= MAX_FORMS or len(shapes) >= MAX_FORMS or len(self._general) >= MAX_FORMS:
            forms.clear()
            shapes.clear()
            self._general.clear()
        name = (bytes(shape), open_)
        form = shapes.get(name)
        if form is None:
            general = (name, lowering.mode & 15)
            form = self._general.get(general)
            if form is None:
                form = lowering.form(ins, relative)
                if not form.emulate:
                    form.open = open_
                    form.plain = relative and not where.has_immediate
                    if lowering.is_general(ins):
                        self._general[general] = form
            shapes[name] = form
        return form

    def live_at(self, page: int, offset: int, mode: int) -> int:
        """The flags that code at ``offset`` of the page reads before it writes them, as far as a short look tells."""
        key = (page | offset) << 12 | mode
        block = self.blocks.get(key)
        if block is not None:
            return block.live
        known = self._peeks.get(key)
        if known is not None:
            return known
        lowering, forms = self.mode(mode)
        pa = page | offset
        data = bytes(self.memory.view(pa, min(4096 - offset, 20)))
        decoder = Decoder(64 if lowering.wide else 32, data, ip=offset)
        ins = self._ins
        need = 0
        open_ = ALL_FLAGS
        at = 0
        for _ in range(3):
            decoder.decode_out(ins)
            if ins.code == 0:
                break
            n = ins.len
            b = data[at]
            shape = data[at : at + n]
            if 0x70 <= b < 0x80 or b == 0xE9 or b == 0xEB or b == 0xE8 or (b == 0x0F and data[at + 1] & 0xF0 == 0x80):
                shape = shape[: 1 + (b == 0x0F)]
            form = forms.get(shape)
            if form is None:
                relative = ins.is_ip_rel_memory_operand
                form = self._shape(lowering, data[at : at + n], ins, decoder, relative)
                if not relative:
                    forms[shape] = form
            at += n
            need |= open_ & form.reads
            open_ &= form.keeps
            if not open_ or form.ends:
                break
        need |= open_
        if len(self._peeks) > 20000:
            self._peeks.clear()
        self._peeks[key] = need
        if need != ALL_FLAGS:  # blocks rest on these bytes too
            frame = pa >> 12
            self._peeked[frame] = self._peeked.get(frame, 0) | (1 << at) - 1 << offset
            self._mark(pa, min(at, 4096 - offset))
        return need

    # Translation

    def translate(self, pa: int, mode: int, next_page: Callable[[], int]) -> Block:
        """Translate the block at ``pa``. ``next_page``: the physical address of the page behind it for the guest, for
        an instruction on two pages; what it raises goes through. The caller has seen that there is no such block."""
        if self.pos + (64 << 10) > self.buffer.size or len(self.blocks) >= MAX_BLOCKS:
            self.forget_all()
        elif self._used >= MAX_USED:
            self._rehash()
        offset = pa & 4095
        page = pa - offset
        if self.wmapped[pa >> 12]:
            self._clear_write_tags(page)
        room = 4096 - offset
        data = bytes(self.memory.view(pa, room if room < MAX_BYTES else MAX_BYTES))
        lowering, forms = self.mode(mode)
        bits = 64 if lowering.wide else 32
        decoder = Decoder(bits, data, ip=offset)
        decode = decoder.decode_out
        ins = self._ins
        get = forms.get
        end = len(data)
        items: list[_Item] = []
        at = 0
        branches = 0
        pa2: int | None = None
        ends = _NO
        shadow = False
        half = 1 << bits - 1
        while at < end:
            decode(ins)
            n = ins.len
            if ins.code == 0:
                if items:
                    break
                if end - at < 15 and room <= MAX_BYTES:
                    pa2, data = self._with_second_page(data, room, bits, offset, next_page)
                    decoder = Decoder(bits, data, ip=offset)
                    decoder.decode_out(ins)
                    end = n = ins.len
            b = data[at]
            kind = _BRANCH_BYTES[b]
            if kind and (kind == 1 or data[at + 1] & 0xF0 == 0x80):
                key = data[at : at + kind]
                form = get(key)
                if form is None:
                    form = forms[key] = lowering.form(ins, False)
                extra = ins.near_branch_target
                if extra >= half:
                    extra -= half << 1
                ends = form.ends
            else:
                key = data[at : at + n]
                extra = 0
                form = get(key)
                if form is None:
                    relative = ins.is_ip_rel_memory_operand
                    if relative:
                        form = get(b"rip" + key[:-4])
                    if form is None:
                        form = self._shape(lowering, key, ins, decoder, relative)
                        if relative and form.plain:
                            forms[b"rip" + key[:-4]] = form
                    if relative:
                        extra = ins.memory_displacement
                        if extra >= half:
                            extra -= half << 1
                        if not -(1 << 31) <= extra < 1 << 31:
                            form = lowering.emulated
                    elif n <= 7:
                        forms[key] = form
                ends = form.ends
                if ends and (ends == _LOOP or (ends <= _CALL and ins.op_count and ins.op0_kind in _NEAR)):
                    extra = ins.near_branch_target
                    if extra >= half:
                        extra -= half << 1
            items.append((form, offset + at, n, extra))
            at += n
            if ends:
                if ends == _JCC and branches < MAX_BRANCHES and not shadow:
                    branches += 1
                    ends = _NO
                    if (pa + at) << 12 | mode in self.blocks:
                        break
                elif ends == _SHADOW:
                    if at + 15 > room or shadow:
                        items[-1] = (lowering.emulated, offset + at - n, n, 0)
                        ends = _YES
                        break
                    shadow = True
                    ends = _NO
                    continue
                else:
                    break
            if shadow or pa2 is not None or len(items) >= MAX_INSTRUCTIONS:
                break
        return self._emit(_Draft(pa, mode, at, items, ends, shadow, pa2, lowering, data))

    def _with_second_page(
        self, data: bytes, room: int, bits: int, offset: int, next_page: Callable[[], int]
    ) -> tuple[int | None, bytes]:
        """For an instruction that does not decode within its page: the page behind it if the instruction goes on there,
        and the bytes with those of that page."""
        pa2: int | None
        first = Decoder(bits, data, ip=offset)
        ins = first.decode()
        try:
            pa2 = next_page()
        except Exception:
            if ins.len and first.last_error != DecoderError.NO_MORE_BYTES:  # #UD comes before the second page's #PF
                return None, data
            raise
        data += bytes(self.memory.view(pa2, 15))
        n = Decoder(bits, data, ip=offset).decode().len
        return (pa2 if n > room else None), data

    def _needs(self, draft: _Draft) -> tuple[list[bool], int]:
        """For each instruction, last first, whether flags must survive its checks; and which flags the block reads.

        What the targets of jumps read is looked up only where a check lies between the jump and the flags' origin.
        """
        mode = draft.mode
        page = draft.pa & ~4095
        live = ALL_FLAGS
        open_: list[int] = []  # targets on this page whose wishes count, and are not looked up yet
        follow = (draft.pa & 4095) + draft.size
        if draft.ends in _GO_ON and follow < 4096:
            live = 0
            open_.append(follow)
        needs: list[bool] = []
        for form, _, _, extra in reversed(draft.items):
            e = form.ends
            if e:
                if e == _JMP or e == _CALL:
                    live = 0
                    open_ = []
                elif e == _YES:
                    live = ALL_FLAGS
                    open_ = []
                if e == _JCC or e == _LOOP or e == _JMP or e == _CALL:
                    if 0 <= extra < 4096:
                        open_.append(extra)
                    else:
                        live = ALL_FLAGS
            keeps = form.keeps
            if keeps:
                if open_ and form.memory and live != ALL_FLAGS:
                    for target in open_:
                        live |= self.live_at(page, target, mode)
                    open_ = []
                live = (live & keeps) | form.reads
            else:
                live = form.reads
                open_ = []
            needs.append(live != 0)
        if live != ALL_FLAGS:
            for target in open_:
                live |= self.live_at(page, target, mode)
        return needs, live

    def _emit(self, draft: _Draft) -> Block:
        pa, mode, lowering, data = draft.pa, draft.mode, draft.lowering, draft.data
        offset = pa & 4095
        page = pa - offset
        blocks = self.blocks
        needs, live = self._needs(draft)
        start = self.pos
        rx = self.buffer.rx + start
        prologue, fix_second, fix_brk, fix_page = self._prologue(mode, bool(live))
        out = bytearray(prologue)
        _i32(out, fix_second, self._second[mode & 3] - (rx + fix_second + 4))
        _i32(out, fix_brk, self._brk_exit - (rx + fix_brk + 4))
        _i32(out, fix_page, -offset)
        entry = len(out)
        extend = out.extend
        slow: list[tuple[int, int, int, bool]] = []
        links: list[tuple[int, int]] = []  # (position of a displacement, key)
        breaks: list[tuple[int, int]] = []  # (position of a displacement, offset to go on at)
        far: list[tuple[int, int]] = []  # (position of a displacement, target)
        marks = array("H")
        mark = marks.append
        own = pa << 12 | mode
        shadow = draft.shadow
        if draft.pa2 is not None:
            self._span(out, mode, offset, draft.pa2)

        def direct(prefix: bytes, target: int, mode_: int) -> None:
            """A jump within the page whose displacement may be patched: it is aligned."""
            extend(_NOPS[-(len(out) + len(prefix)) & 3])
            extend(prefix)
            key = (page | target) << 12 | mode_
            known = blocks.get(key)
            here = len(out)
            extend(b"\0\0\0\0")
            if known is not None:
                _i32(out, here, known.entry - (start + here + 4))
            elif key == own and draft.pa2 is None:
                _i32(out, here, entry - (here + 4))
            else:
                links.append((here, key))

        def leave(target: int, looks: bool, mode_: int) -> None:
            """Go to ``target``, unconditionally."""
            if 0 <= target < 4096:
                if looks:
                    if self.live_at(page, target, mode_):
                        extend(_CHECK_LIVE)
                        breaks.append((len(out), target))
                        extend(b"\0\0\0\0" + _CHECK_LIVE_END)
                    else:
                        extend(_CHECK_DEAD)
                        breaks.append((len(out), target))
                        extend(b"\0\0\0\0")
                direct(b"\xe9", target, mode_)
            else:
                extend(self._long(lowering, target))

        i = len(draft.items)
        for form, at, n, extra in draft.items:
            i -= 1
            base = len(out)
            mark(base)
            mark(at)
            e = form.ends
            if e == _JCC:
                cc = form.cond
                if at < extra < 4096 and not shadow:
                    direct(_JCC_CODE[cc], extra, mode)
                elif 0 <= extra < 4096:
                    extend(_JCC_CODE[cc ^ 1] + b"\0\0\0\0")
                    skip = len(out)
                    leave(extra, True, mode)
                    _i32(out, skip - 4, len(out) - skip)
                else:
                    extend(_JCC_CODE[cc] + b"\0\0\0\0")
                    far.append((base + 2, extra))
                continue
            if e == _LOOP:
                if not lowering.wide:
                    out.append(0x67)  # counts in ECX
                extend(data[at - offset : at - offset + n - 1] + b"\0")
                skip = len(out)
                leave(at + n, True, mode)
                out[skip - 1] = len(out) - skip
                leave(extra, True, mode)
                continue
            if e == _JMP:
                leave(extra, extra <= at or shadow, mode)
                continue
            t = form.templates[needs[i]]
            if t is None:
                t = self._template(form, lowering, data, at - offset, at, n, needs[i])
            extend(t.code)
            if t.open:
                for jump, back, desc, saved in t.checks:
                    slow.append((base + jump, base + back, desc | at, saved))
                for hole, what, add in t.holes:
                    _i32(out, base + hole, add + (at if what == 0 else at + n if what == 1 else extra))
                for to, of, k in t.copies:
                    of += at - offset
                    out[base + to : base + to + k] = data[of : of + k]
            if e:
                if e == _CALL:
                    leave(extra, extra <= at or shadow, mode)
                elif e == _MODE:
                    leave(at + n, False, mode ^ Mode.AC)
                elif e == _LOOK:
                    leave(at + n, True, mode)
        if draft.ends == _NO or draft.ends == _JCC:
            leave(offset + draft.size, shadow, mode)
        # What is rarely run
        for jump, back, desc, saved in slow:
            here = len(out)
            _i32(out, jump, here - jump - 4)
            if saved:
                extend(_RESTORE)
                here += len(_RESTORE)
            extend(_slow_pack(0x68, desc, _SLOW_CALL, 0xE9, back - (here + _SLOW_SIZE)))
        for site, key in links:
            here = len(out)
            _i32(out, site, here - site - 4)
            extend(_LINK.pack(b"\x49\xbb", key, _LINK_CALL, site - (here + _LINK_SITE)))
        for site, target in breaks:
            _i32(out, site, len(out) - site - 4)
            extend(_LOAD_PAGE + b"\x4d\x8d\x92" + target.to_bytes(4, "little") + _BRK_JUMP)
        for site, target in far:
            _i32(out, site, len(out) - site - 4)
            extend(self._long(lowering, target))
        total = len(out)
        self.code[start : start + total] = out
        self.pos = start + (total + 15 & ~15)
        if start >> 20 != self.pos >> 20:
            self.buffer.relax()
        block = Block(own, pa, draft.size, draft.pa2, start, start + entry, start + total, live, marks)
        self._register(block)
        self.instructions += len(draft.items)
        return block

    def _template(
        self, form: Form, lowering: Lowering, data: bytes, index: int, at: int, n: int, live: bool
    ) -> Template:
        decoder = Decoder(64 if lowering.wide else 32, data[index : index + n], ip=at)
        ins = decoder.decode()
        if form.emulate:
            t = lowering.emulated_template
        else:
            t = lowering.template(ins, data[index : index + n], live, None, form.open)
        form.templates[1 if live else 0] = t
        return t

    def _long(self, lowering: Lowering, target: int) -> bytes:
        """Go to another page: its address relative to this one's, through the jump cache."""
        if not -(1 << 31) <= target < 1 << 31:
            a = Assembler()
            a.mov(R11, target)
            a.mov(R10, state("page"))
            a.lea(R10, Mem(R10, R11))
            return a.code(0) + lowering.dispatch_code
        return _LOAD_PAGE + b"\x4d\x8d\x92" + (target & 0xFFFFFFFF).to_bytes(4, "little") + lowering.dispatch_code

    def _prologue(self, mode: int, live: bool) -> tuple[bytes, int, int, int]:
        """The checked entry, and where it wants the displacements of `second`, `brk` and the block's negated offset."""
        known = self._prologues.get((mode & 15, live))
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
        if live:
            a.movzx(RCX, gs(OFFSETS["brk"]), 16)
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
            a.cmp(gs(OFFSETS["brk"]), 0, size=16)
            a.raw(b"\x0f\x85")
            brk = len(a)
            a.raw(bytes(4))
        if mode & (Mode.CODE32 | Mode.CODE16):
            a.mov(R10, R10, size=32)
        a.raw(b"\x4d\x8d\x92")  # lea r10, [r10 + disp32]
        page = len(a)
        a.raw(bytes(4))
        a.mov(state("page"), R10)
        known = self._prologues[mode & 15, live] = (a.code(0), second, brk, page)
        return known

    def _span(self, out: bytearray, mode: int, offset: int, pa2: int) -> None:
        """Make sure that the second page is still mapped where it was; the TLB's execute tag knows."""
        a = Assembler()
        bad, good = a.label(), a.label()
        base = TLB + (mode & 3) * TLB_ARRAY
        save_flags(a)
        a.mov(R10, state("page"))
        a.lea(R10, Mem(R10, disp=4096), size=32 if mode & (Mode.CODE32 | Mode.CODE16) else 64)
        a.mov(R11, R10, size=32)
        a.shr(R11, 7, size=32)
        a.and_(R11, TLB_MASK, size=32)
        a.xor(R10, Mem(R11, disp=base + TLB_EXEC, gs=True))
        a.shr(R10, 1)  # the lowest bit says global
        a.jcc(Cond.NE, bad)
        a.mov(R10, Mem(R11, disp=base + TLB_HOST, gs=True))
        a.mov(R11, self.memory.base + pa2)
        a.cmp(R10, R11)
        a.jcc(Cond.E, good)
        a.bind(bad)
        restore_flags(a)
        a.mov(R10, state("page"))
        a.lea(R10, Mem(R10, disp=offset))
        a.jmp(state("span_exit"))
        a.bind(good)
        restore_flags(a)
        out.extend(a.code(0))

    def _register(self, block: Block) -> None:
        self.blocks[block.key] = block
        self._starts.append(block.start)
        self._order.append(block)
        rx = self.buffer.rx
        self._insert(block.key, rx + block.start, rx + block.entry)
        self._used += 1
        pa = block.pa
        first = min(block.size, 4096 - (pa & 4095))
        self._cover(pa, first, block)
        if block.pa2 is not None:
            self._cover(block.pa2, block.size - first, block)

    def _cover(self, pa: int, n: int, block: Block) -> None:
        frame = pa >> 12
        if self.wmapped[frame]:
            self._clear_write_tags(pa & ~4095)
        self._mark(pa, n)
        page = self._pages.get(frame)
        if page is None:
            self._pages[frame] = [block]
        else:
            page.append(block)

    def _mark(self, pa: int, n: int) -> None:
        """[pa, pa + n), in one page, has been translated."""
        line = pa >> 6
        last = pa + n - 1 >> 6
        words = self._bytes
        first = pa & 63
        while line < last:
            words[line] |= _ONES << first & _ONES
            first = 0
            line += 1
        words[line] |= (1 << (pa + n - 1 & 63) + 1) - (1 << first)
        self.mask[pa >> 12] |= _lines(pa, n)

    # A single instruction with operands in bounce buffers

    def single(self, data: bytes, offset: int, mode: int, bounce: dict[int, int]) -> int:
        """Host address of code that runs the one instruction in ``data`` (at ``offset`` of its page) and leaves by
        done_exit. It lies behind the last block and is overwritten by what comes next; its bytes are remembered, for
        drivers that talk to a device's memory."""
        if self.pos + (64 << 10) > self.buffer.size:
            self.forget_all()
        key = (data, offset, mode, *bounce.items())
        code = self._singles.get(key)
        if code is None:
            if len(self._singles) >= MAX_SINGLES:
                self._singles.clear()
            code = self._singles[key] = self._single(data, offset, mode, bounce)
        at = self.pos
        self.code[at : at + len(code)] = code
        return self.buffer.rx + at

    def _single(self, data: bytes, offset: int, mode: int, bounce: dict[int, int]) -> bytes:
        lowering, _ = self.mode(mode)
        ins = Decoder(64 if lowering.wide else 32, data, ip=offset).decode()
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
            return _LOAD_PAGE + b"\x4d\x8d\x92" + (to & 0xFFFFFFFF).to_bytes(4, "little") + done

        if form.ends == Ends.JCC:
            other = leave(n32)
            out.extend(bytes((0x0F, 0x80 | form.cond)) + len(other).to_bytes(4, "little") + other + leave(target))
        elif form.ends == Ends.LOOP:
            other = leave(n32)
            narrow = b"" if lowering.wide else b"\x67"
            out.extend(narrow + data[: ins.len - 1] + bytes((len(other),)) + other + leave(target))
        elif form.ends == Ends.JMP:
            out.extend(leave(target))
        elif form.ends not in (Ends.YES, Ends.CALL):
            out.extend(leave(n32))
        for jump, back, desc, saved in t.checks:
            here = len(out)
            _i32(out, jump, here - jump - 4)
            if saved:
                out.extend(_RESTORE)
                here += len(_RESTORE)
            out.extend(_SLOW.pack(0x68, desc | offset, _SLOW_CALL, 0xE9, back - (here + _SLOW_SIZE)))
        return bytes(out)

    # Forgetting

    def kill(self, block: Block) -> None:
        """Make sure that nothing enters a block any more; its frames' masks are the caller's."""
        if self.blocks.get(block.key) is not block:
            return
        del self.blocks[block.key]
        self._unhash(block.key)
        if self.pos + 4096 > self.buffer.size:
            self.forget_all()
            return
        lowering, _ = self.mode(block.mode)
        tail = self._long(lowering, block.pa & 4095)
        at = self.pos
        self.code[at : at + len(tail)] = tail
        self.pos = at + (len(tail) + 15 & ~15)
        rx = self.buffer.rx
        self._jump(block.entry, rx + at)
        self._jump(block.start, self.stubs[f"dead{block.mode & 3}"])
        self.killed += 1

    def _rehash(self) -> None:
        """Make the block table anew, without the places of blocks that are gone: a search ends at a free one."""
        self._tables[0].madvise(mmap.MADV_DONTNEED)
        rx = self.buffer.rx
        for block in self.blocks.values():
            self._insert(block.key, rx + block.start, rx + block.entry)
        self._used = len(self.blocks)

    def _unhash(self, key: int) -> None:
        """As runtime.remove, which needs the GS of a vCPU's thread."""
        number = (key * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 64 - HASH_BITS
        words = HASH_ENTRY >> 3
        table = self._hash
        while table[number * words]:
            if table[number * words] == key:
                table[number * words] = 1
                return
            number = number + 1 & (1 << HASH_BITS) - 1

    def _jump(self, position: int, target: int) -> None:
        distance = target - (self.buffer.rx + position + 5)
        self.code[position : position + 5] = b"\xe9" + distance.to_bytes(4, "little", signed=True)

    def written(self, pa: int, n: int) -> None:
        """[pa, pa + n) has changed or is about to: forget what was translated from it. No guest code is running."""
        end = pa + n
        frame = pa >> 12
        while frame << 12 < end:
            if self.mask[frame]:
                self._written(frame, max(pa, frame << 12), min(end, (frame + 1) << 12))
            frame += 1

    def _written(self, frame: int, low: int, high: int) -> None:
        self._peeks.clear()
        blocks = self._pages.get(frame, [])
        count = self._writes.get(frame, 0) + 1
        self._writes[frame] = count
        peeked = self._peeked.get(frame, 0)
        everything = count % GIVE_UP == 0 or peeked >> (low & 4095) & (1 << high - low) - 1 != 0
        keep: list[Block] = []
        base = frame << 12
        words = self._bytes
        mask = self.mask[frame]
        index = base >> 6
        while mask:  # the page's words anew, from the blocks that stay
            bit = mask & -mask
            words[index + bit.bit_length() - 1] = 0
            mask ^= bit
        self.mask[frame] = 0
        for block in blocks:
            if block.pa >> 12 == frame:
                first, last = block.pa, min(block.pa + block.size, base + 4096)
            else:
                first, last = base, base + block.size - (4096 - (block.pa & 4095))
            if everything or (first < high and low < last) or self.blocks.get(block.key) is not block:
                self.kill(block)
            else:
                keep.append(block)
                self._mark(first, last - first)
        if keep:
            self._pages[frame] = keep
        else:
            self._pages.pop(frame, None)
        if everything:
            self._peeked.pop(frame, None)
        elif peeked:
            for line in range(64):
                bits = peeked >> 64 * line & _ONES
                if bits:
                    words[index + line] |= bits
                    self.mask[frame] |= 1 << line

    def forget_all(self) -> None:
        """Drop every translation. No guest code is running; who sees ``generation`` change drops its jump cache."""
        self.blocks.clear()
        self._peeks.clear()
        self._peeked.clear()
        self._tables[1].madvise(mmap.MADV_DONTNEED)
        self._tables[3].madvise(mmap.MADV_DONTNEED)
        self._pages.clear()
        self._writes.clear()
        self._starts.clear()
        self._order.clear()
        self._tables[0].madvise(mmap.MADV_DONTNEED)
        self.pos = self.first
        self._used = 0
        self.generation += 1

    generation = 0

    def locate(self, address: int) -> int | None:
        """The guest offset (in its page) of the instruction whose code holds a host address."""
        position = address - self.buffer.rx
        i = bisect_right(self._starts, position) - 1
        if i < 0:
            return None
        block = self._order[i]
        if position >= block.end:
            return None
        inside = position - block.start
        found = None
        for k in range(0, len(block.marks), 2):
            if block.marks[k] <= inside:
                found = block.marks[k + 1]
        return found


def _lines(pa: int, n: int) -> int:
    """The code-mask bits of [pa, pa + n), which lies in one page."""
    first = pa >> 6 & 63
    last = pa + n - 1 >> 6 & 63
    return (1 << last + 1) - (1 << first)


__all__ = ["Block", "Cache"]
