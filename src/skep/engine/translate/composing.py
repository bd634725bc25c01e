"""Composing: what machine code needs in order to make blocks by itself (compose_runtime.py), and asks Python for.

A first boot makes 47,000 blocks of 425,000 instructions, but these begin in 17,000 ways only. Python classifies and
lowers each once (catalog.py) and writes it down on the sheet; putting blocks together of what is there is done by
machine code. What is rare - code of 16 and 32 bits, instructions on two pages, blocks that jump back to their own
start - goes through drafting.py and emission.py.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Mapping

from iced_x86 import Decoder, DecoderError, Instruction

from skep.engine.translate import sheet as sh
from skep.engine.translate.catalog import Catalog
from skep.engine.translate.emission import Emission
from skep.engine.translate.forms import Form, Template
from skep.engine.translate.layout import Mode
from skep.engine.translate.sheet import Want
from skep.engine.translate.tables import Tables
from skep.memory import GuestMemory

_ON_DEMAND = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_M64 = (1 << 64) - 1
_FORM = struct.Struct("<HHBBBB4BHxx4Bi4BiIII4x")
assert _FORM.size == sh.FORM_SIZE
_HEAD = struct.Struct("<HBBBBxx")
_CHECK = struct.Struct("<HHIIxxxx")
_HOLE = struct.Struct("<HBxi")
_COPY = struct.Struct("<HBB")
_PIECE = struct.Struct("<4H")
MOST_QUESTIONS = 2000
"""About one block: far more than one has, unless another vCPU changes its bytes all the time."""


class Composer:
    """Makes straight blocks of 64-bit code."""

    def __init__(
        self,
        memory: GuestMemory,
        tables: Tables,
        catalog: Catalog,
        emission: Emission,
        stubs: Mapping[str, int],
        executable: int,
        routines: Mapping[str, int],
    ) -> None:
        """``executable``: where the code buffer is executed; ``stubs``, ``routines``: host addresses."""
        self._memory = memory
        self._catalog = catalog
        self._emission = emission
        sizes = (sh.SHEET, 8 << sh.TREE_BITS, 8 * sh.MAX_LEAVES, sh.FORM_SIZE * sh.MAX_FORMS, sh.POOL_SIZE)
        self._maps = [mmap.mmap(-1, size, flags=_ON_DEMAND) for size in sizes]
        self._sheet, self._tree, self._leaves, self._table, self._pool = self._maps
        self._pins = [ctypes.c_char.from_buffer(m) for m in self._maps]
        addresses = [ctypes.addressof(pin) for pin in self._pins]
        self._address = addresses[0]
        self._forms_at = addresses[3]
        self._pool_at = addresses[4]
        self.words = memoryview(self._sheet).cast("Q")
        self._edges = memoryview(self._tree).cast("Q")
        word = ctypes.c_uint64
        self._compose: Callable[[int], int] = ctypes.PYFUNCTYPE(word, word)(routines["compose"])
        self._record: Callable[[int, int], int] = ctypes.PYFUNCTYPE(word, word, word)(routines["record"])
        self._set(sh.WORDS, tables.address)
        for at, address in zip((sh.TREE, sh.LEAVES, sh.FORMS, sh.POOL), addresses[1:], strict=True):
            self._set(at, address)
        for i in range(3):
            self._set(sh.STUB_SECOND + 8 * i, stubs[f"second{i}"] - executable)
        self._set(sh.STUB_BREAK, stubs["brk_exit"] - executable)
        self._ins = Instruction()
        self._begin()

    def close(self) -> None:
        self.words.release()
        self._edges.release()
        self._pins.clear()
        for m in self._maps:
            m.close()

    def _set(self, at: int, value: int) -> None:
        self.words[at >> 3] = value & _M64

    # The tables

    def _begin(self) -> None:
        """Nothing is known."""
        self._nodes = self._edge_count = 0
        self._leaf_count = 0
        self._forms: list[Form] = []
        self._numbers: dict[int, int] = {}
        """By id() of the forms."""
        self._top = 8
        self._pieces: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self._modes: dict[int, int] = {}
        """Where what is known of a mode stands."""
        self._roots: dict[int, int] = {}
        for at, codes in self._emission.pieces().items():
            for i, code in enumerate(codes):
                self._set(at + 8 * i, self._piece(code))

    def _forget(self) -> None:
        """The tables are full of what a guest has had in mind for them."""
        for m in self._maps[1:]:
            m.madvise(mmap.MADV_DONTNEED)
        self._begin()

    @property
    def _full(self) -> bool:
        return (
            self._edge_count > sh.MAX_EDGES - 64
            or self._leaf_count > sh.MAX_LEAVES - 64
            or len(self._forms) > sh.MAX_FORMS - 64
            or self._top > sh.POOL_SIZE - (1 << 18)
        )

    def _room(self, size: int) -> int:
        at = self._top
        self._top = at + size + 7 & ~7
        return at

    def _piece(self, code: bytes, *places: int) -> int:
        """The host address of a piece of code."""
        known = self._pieces.get((code, places))
        if known is None:
            at = self._room(sh.P_HEAD + len(code) + 8)
            one, two, three = (*places, 0, 0, 0)[:3]
            self._pool[at : at + sh.P_HEAD + len(code)] = _PIECE.pack(len(code), one, two, three) + code
            known = self._pieces[code, places] = self._pool_at + at
        return known

    def _mode(self, mode: int) -> int:
        """The host address of what is known of a mode."""
        known = self._modes.get(mode)
        if known is None:
            lowering = self._catalog.mode(mode).lowering
            self._nodes += 1
            self._roots[mode] = self._nodes
            words = [self._nodes]
            words += [self._piece(*self._emission.prologue(mode, live)) for live in (False, True)]
            words += [
                self._piece(*lowering.range_check(bool(i & 1), bool(i & 2), bool(i & 4))) for i in range(8)
            ]
            words += [
                self._piece(*self._emission.stack_tail(lowering, i)) for i in range(16)
            ]
            words.append(self._piece(lowering.dispatch_code))
            words.append(self._forms_at + sh.FORM_SIZE * self._form(lowering.emulated))
            at = self._room(sh.M_SIZE)
            self._pool[at : at + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)
            known = self._modes[mode] = self._pool_at + at
        return known

    def _form(self, form: Form) -> int:
        """The number of a form."""
        number = self._numbers.get(id(form))
        if number is None:
            number = self._numbers[id(form)] = len(self._forms)
            self._forms.append(form)
            base, plus, size, write, where, k = form.reach or (0, 0, 0, False, 0, 0)
            to, source, add, sign, step_where, step_k = form.step or (0, 0, 0, 0, 0, 0)
            flags = (
                (sh.MEMORY if form.memory else 0) | (sh.IS_RELATIVE if form.relative else 0)
                | (sh.REACHES if form.reach is not None else 0) | (sh.WRITES if write else 0)
                | (sh.STEPS if form.step is not None else 0) | (sh.MINUS if sign < 0 else 0)
            )  # fmt: skip
            spoils = sum(1 << n for n in form.spoils)
            o = form.open
            _FORM.pack_into(
                self._table, number * sh.FORM_SIZE, form.keeps, form.reads, form.ends, form.cond, flags, form.behind,
                o.disp, o.disp_size, o.imm, o.imm_size, spoils, base, size, where, k, plus, to, source, step_where,
                step_k, add, 0, 0, 0,
            )  # fmt: skip
        return number

    def _lead_to(self, root: int, name: bytes, leaf: int) -> None:
        """From a mode's root, along these bytes, to a new leaf."""
        node = root
        for byte in name[:-1]:
            node = self._edge(node, byte, 0)
        at = self._leaf_count
        self._leaf_count += 1
        self._leaves[8 * at : 8 * at + 8] = leaf.to_bytes(8, "little")
        self._edge(node, name[-1], at | sh.IS_LEAF)

    def _edge(self, node: int, byte: int, leaf: int) -> int:
        """Where an edge leads, which is made if it is not there: to a leaf, or (0) to a new node."""
        key = (node << 8) + byte + 1
        at = (key * 0x9E3779B97F4A7C15 & _M64) >> 64 - sh.TREE_BITS
        edges = self._edges
        while True:
            edge = edges[at]
            if not edge:
                if not leaf:
                    self._nodes += 1
                    leaf = self._nodes
                edges[at] = leaf << 32 | key
                self._edge_count += 1
                return leaf
            if edge & 0xFFFFFFFF == key:
                return edge >> 32
            at = at + 1 & (1 << sh.TREE_BITS) - 1

    def record(self, number: int) -> bytes:
        """Of block ``number``, which was just made here, what the store keeps; nothing where that is too long."""
        size = self._record(self._address, number)
        return self._sheet[sh.RECORD_AT : sh.RECORD_AT + size]

    @property
    def instructions(self) -> int:
        """How many the block has that was made last."""
        return self.words[sh.COUNT >> 3]

    # What is asked for

    def make(self, pa: int, mode: int) -> bool:
        """Make the block at ``pa``, its bytes marked and nothing leading to it; False: it is none of those that can be
        made here."""
        if mode & Mode.NARROW:
            return False
        words = self.words
        words[sh.PAGE >> 3] = pa & ~4095
        words[sh.OFFSET >> 3] = pa & 4095
        words[sh.KEY_MODE >> 3] = mode
        words[sh.CUTS >> 3] = 0
        mode &= ~Mode.PLAIN
        for _ in range(MOST_QUESTIONS):
            words[sh.BY_MODE >> 3] = self._mode(mode)
            wanted = self._compose(self._address)
            if wanted == Want.NOTHING:
                return True
            if wanted == Want.RARE or words[sh.CUTS >> 3] == sh.MOST_CUTS:
                break
            if self._full:
                self._forget()
            elif wanted == Want.FORM:
                self._learn(mode)
            else:
                self._lower(mode)
        return False

    def _learn(self, mode: int) -> None:
        """Find out what instruction stands somewhere on the page."""
        words = self.words
        at, room = words[sh.WANT_AT >> 3], words[sh.WANT_OF >> 3]
        data = bytes(self._memory.view(words[sh.PAGE >> 3] + at, min(room, 15)))
        seen = self._catalog.mode(mode)
        decoder = Decoder(64, data, ip=at)
        ins = self._ins
        decoder.decode_out(ins)
        if not ins and decoder.last_error == DecoderError.NO_MORE_BYTES:
            cuts = words[sh.CUTS >> 3]
            words[(sh.CUT >> 3) + cuts] = at << 16 | room
            words[sh.CUTS >> 3] = cuts + 1
            return
        if not ins:
            self._leaf(mode, data[: ins.len], ins.len, seen.lowering.emulated, sh.NOT_ONE)
            return
        name = data[: ins.len]
        form, known = self._catalog.known(seen, name, ins, decoder)
        flags = (sh.RELATIVE if form.relative else sh.BRANCH) if form.wrap else 0
        self._leaf(mode, name[:known], len(name), form, flags)

    def _leaf(self, mode: int, head: bytes, length: int, form: Form, flags: int) -> None:
        leaf = self._form(form) | length << sh.LEAF_LENGTH | flags << sh.LEAF_FLAGS
        if flags == sh.BRANCH:
            leaf |= len(head) << sh.LEAF_AT | length - len(head) << sh.LEAF_SIZE
        elif flags == sh.RELATIVE:
            leaf |= length - 4 - form.behind << sh.LEAF_AT | 4 << sh.LEAF_SIZE
        root = self._roots[mode]
        self._lead_to(root, head, leaf)

    def _lower(self, mode: int) -> None:
        """Make the template of an instruction of the block."""
        words = self.words
        item = sh.ITEMS + sh.ITEM * words[sh.WANT_AT >> 3]
        which = words[sh.WANT_OF >> 3]
        number = (words[item >> 3] - self._forms_at) // sh.FORM_SIZE
        form = self._forms[number]
        at = int.from_bytes(self._sheet[item + sh.AT : item + sh.AT + 2], "little")
        n = int.from_bytes(self._sheet[item + sh.LENGTH_OF : item + sh.LENGTH_OF + 2], "little")
        index = at - words[sh.OFFSET >> 3]
        data = self._sheet[sh.DATA : sh.DATA + 256]
        lowering = self._catalog.mode(mode).lowering
        t: Template | None
        if which == sh.F_PLACED:
            t = form.placed or self._catalog.placed(form, lowering, data, index, at, n)
        else:
            live = which == sh.F_LIVE
            t = (form.live if live else form.dead) or self._catalog.template(form, lowering, data, index, at, n, live)
        place = number * sh.FORM_SIZE + which
        self._table[place : place + 4] = self._template(t).to_bytes(4, "little")

    def _template(self, t: Template) -> int:
        """Where a template stands in the pool."""
        parts = [_HEAD.pack(len(t.code), len(t.checks), len(t.holes), len(t.copies), t.keeps)]
        parts += [_CHECK.pack(*check) for check in t.checks]
        parts += [_HOLE.pack(*hole) for hole in t.holes]
        parts += [_COPY.pack(*copy) for copy in t.copies]
        open_ = b"".join(parts)
        data = open_ + bytes(-len(open_) & 7) + t.code
        at = self._room(len(data) + 8)
        self._pool[at : at + len(data)] = data
        return at
