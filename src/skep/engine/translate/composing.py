"""Composing: what machine code needs in order to make blocks (compose_runtime.py), and asks Python for.

A first boot makes 47,000 blocks of 425,000 instructions, but these begin in 17,000 ways only. Python classifies and
lowers each once (catalog.py) and writes it down on the sheet and beside it (sheet.py); putting blocks together of what
is there is done by machine code. Python decides besides what is done for loops (renaming.py, hoisting.py), and reads
the second page of an instruction that lies on two.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Mapping

from iced_x86 import Decoder, DecoderError, Instruction

from skep.engine.translate import sheet as sh
from skep.engine.translate.block_runtime import NONE
from skep.engine.translate.catalog import Catalog, How
from skep.engine.translate.emission import LEAD, LEAD_HOST, Emission
from skep.engine.translate.forms import HOMES, IN_STATE, Form, Item, Template
from skep.engine.translate.hoisting import tables
from skep.engine.translate.layout import Mode
from skep.engine.translate.lower import Lowering
from skep.engine.translate.renaming import rename
from skep.engine.translate.sheet import Want
from skep.engine.translate.tables import Tables
from skep.memory import GuestMemory

_ON_DEMAND = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_M64 = (1 << 64) - 1
_FORM = struct.Struct("<HHBBBB4BHxx4Bi4BiIII4xQ8x")
assert _FORM.size == sh.FORM_SIZE
_HEAD = struct.Struct("<HBBBBxx")
_CHECK = struct.Struct("<HHIIxxxx")
_HOLE = struct.Struct("<HBxi")
_COPY = struct.Struct("<HBB")
_PIECE = struct.Struct("<4H")
_ITEM = struct.Struct("<QHH4xq")
_TABLE = struct.Struct("<QqQQQ")
_IN_STATE = sum(1 << n for n in IN_STATE)
_HOW = {sh.F_LIVE: How.LIVE, sh.F_DEAD: How.DEAD, sh.F_PLACED: How.PLACED}
_WRAPS = {1 << 15: sh.WRAPS16, 1 << 31: sh.WRAPS32, 1 << 63: 0}
MOST_QUESTIONS = 2000
"""About one block: far more than one has, unless another vCPU changes its bytes all the time."""


class Composer:
    """Makes blocks: the sheet and the tables of one VM, and who fills them."""

    def __init__(
        self,
        memory: GuestMemory,
        tables_: Tables,
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
        self._sheet, tree, self._leaves, self._table, self._pool = self._maps
        self._pins = [ctypes.c_char.from_buffer(m) for m in self._maps]
        addresses = [ctypes.addressof(pin) for pin in self._pins]
        self._address, _, _, self._forms_at, self._pool_at = addresses
        self.words = memoryview(self._sheet).cast("Q")
        self._edges = memoryview(tree).cast("Q")
        word = ctypes.c_uint64
        self._compose: Callable[[int], int] = ctypes.PYFUNCTYPE(word, word)(routines["compose"])
        self._record: Callable[[int, int], int] = ctypes.PYFUNCTYPE(word, word, word)(routines["record"])
        self._set(sh.WORDS, tables_.address)
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

    # Making blocks

    def make(self, pa: int, mode: int, next_page: Callable[[], int]) -> None:
        """Make the block at ``pa``, its bytes marked and nothing leading to it. ``next_page``: the physical address of
        the page behind it for the guest, for an instruction on two pages; what it raises goes through."""
        words = self.words
        words[sh.PAGE >> 3] = pa & ~4095
        words[sh.OFFSET >> 3] = pa & 4095
        words[sh.KEY_MODE >> 3] = mode
        words[sh.SECOND >> 3] = NONE
        for at in (sh.GIVEN, sh.FALLBACK, sh.CUTS, sh.LOOP_KNOWN):
            words[at >> 3] = 0
        mode &= ~Mode.PLAIN
        asked = 0
        while True:
            words[sh.BY_MODE >> 3] = self._modes.get(mode) or self._mode(mode)
            wanted = self._compose(self._address)
            if wanted == Want.NOTHING:
                return
            asked += 1
            if not words[sh.FALLBACK >> 3] and (asked > MOST_QUESTIONS or words[sh.CUTS >> 3] == sh.MOST_CUTS):
                words[sh.FALLBACK >> 3] = 1
                words[sh.SECOND >> 3] = NONE
            elif self._full:
                self._forget()
                words[sh.LOOP_KNOWN >> 3] = 0
            elif wanted == Want.FORM:
                self._learn(mode)
            elif wanted == Want.SECOND:
                self._second_page(pa, mode, next_page)
            elif wanted == Want.LOOP:
                self._loop()
            else:
                self._lower(mode, wanted == Want.MOVED)

    def record(self, number: int) -> bytes:
        """Of block ``number``, which was made last, what the store keeps; nothing where that is too long."""
        size = self._record(self._address, number)
        return self._sheet[sh.RECORD_AT : sh.RECORD_AT + size]

    @property
    def instructions(self) -> int:
        """How many the block has that was made last."""
        return self.words[sh.COUNT >> 3]

    def items(self) -> list[Item]:
        """The instructions of the block that was made last, or is being made."""
        found = []
        for i in range(self.instructions):
            address, at, n, extra = _ITEM.unpack_from(self._sheet, sh.ITEMS + sh.ITEM * i)
            found.append((self._forms[(address - self._forms_at) // sh.FORM_SIZE], at, n, extra))
        return found

    @property
    def data(self) -> bytes:
        """The bytes of that block, and some behind it."""
        return self._sheet[sh.DATA : sh.ITEMS]

    # The tables

    def _begin(self) -> None:
        """Nothing is known."""
        self._nodes = self._edge_count = self._leaf_count = 0
        self._forms: list[Form] = []
        self._numbers: dict[int, int] = {}
        """By id() of the forms."""
        self._top = 8
        self._pieces: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self._modes: dict[int, int] = {}
        """Where what is known of a mode stands."""
        self._roots: dict[int, int] = {}
        self._moved: dict[tuple[int, int, tuple[int | None, ...]], int] = {}
        """Templates of forms with registers elsewhere."""
        self._homes = HOMES
        for at, pieces in self._emission.pieces().items():
            for i, piece in enumerate(pieces):
                self._set(at + 8 * i, self._piece(*piece))

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

    def _piece(self, code: bytes, places: tuple[int, ...] = ()) -> int:
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
        lowering = self._catalog.mode(mode).lowering
        emission, piece = self._emission, self._piece
        self._nodes += 1
        self._roots[mode] = self._nodes
        words = [self._nodes]
        words += [piece(*emission.prologue(mode, live)) for live in (False, True)]
        for i in range(8):
            code, jump = lowering.range_check(bool(i & 1), bool(i & 2), bool(i & 4))
            words.append(piece(code, (jump,)))
        words += [piece(*emission.tail(lowering, i)) for i in range(16)]
        words.append(piece(lowering.dispatch_code))
        words.append(self._forms_at + sh.FORM_SIZE * self._form(lowering.emulated))
        near = sh.NEAR_FORWARD if mode & Mode.SEGMENTED else sh.NEAR_WIDE if mode & Mode.NARROW else sh.NEAR_ALWAYS
        words.append(near)
        words += [piece(*emission.way_out(lowering, i)) for i in range(4)]
        words.append(piece(*emission.span(mode)))
        at = self._room(sh.M_SIZE)
        self._pool[at : at + sh.M_SIZE] = struct.pack(f"<{sh.M_SIZE >> 3}Q", *words)
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
                | (sh.NARROW_BRANCH if form.narrow else 0) | (sh.MOVES if form.uses & _IN_STATE else 0)
            )  # fmt: skip
            spoils = 0
            for n in form.spoils:
                spoils |= 1 << n
            o = form.open
            _FORM.pack_into(
                self._table, number * sh.FORM_SIZE, form.keeps, form.reads, form.ends, form.cond, flags, form.behind,
                o.disp, o.disp_size, o.imm, o.imm_size, spoils, base, size, where, k, plus, to, source, step_where,
                step_k, add, 0, 0, 0, self._piece(form.loop) if form.loop else 0,
            )  # fmt: skip
        return number

    def _leaf(self, mode: int, head: bytes, length: int, form: Form, flags: int) -> None:
        """Instructions that begin like this have a form."""
        leaf = self._form(form) | length << sh.LEAF_LENGTH | flags << sh.LEAF_FLAGS
        if flags & sh.BRANCH:
            leaf |= len(head) << sh.LEAF_AT | length - len(head) << sh.LEAF_SIZE
        elif flags & sh.RELATIVE:
            leaf |= length - 4 - form.behind << sh.LEAF_AT | 4 << sh.LEAF_SIZE
        node = self._roots[mode]
        for byte in head[:-1]:
            node = self._edge(node, byte, 0)
        at = self._leaf_count
        self._leaf_count += 1
        self._leaves[8 * at : 8 * at + 8] = leaf.to_bytes(8, "little")
        self._edge(node, head[-1], at | sh.IS_LEAF)

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

    def _template(self, t: Template) -> int:
        """Write a template to the pool: where it stands there."""
        parts = [_HEAD.pack(len(t.code), len(t.checks), len(t.holes), len(t.copies), t.keeps)]
        parts += [_CHECK.pack(*check) for check in t.checks]
        parts += [_HOLE.pack(*hole) for hole in t.holes]
        parts += [_COPY.pack(*copy) for copy in t.copies]
        open_ = b"".join(parts)
        data = open_ + bytes(-len(open_) & 7) + t.code
        at = self._room(len(data) + 8)
        self._pool[at : at + len(data)] = data
        return at

    # What is asked for

    def _learn(self, mode: int) -> None:
        """Find out what instruction stands somewhere on the page."""
        words = self.words
        at, room = words[sh.WANT_AT >> 3], words[sh.WANT_OF >> 3]
        data = ctypes.string_at(words[sh.WANT_BYTES >> 3], min(room, 15))
        seen = self._catalog.mode(mode)
        plain = self._catalog.plain(seen, data)
        if plain is not None:
            form, head, length = plain
            self._leaf(mode, data[:head], length, form, sh.RELATIVE if form.relative else 0)
            return
        decoder = Decoder(seen.lowering.bits, data, ip=at)
        ins = self._ins
        decoder.decode_out(ins)
        name = data[: ins.len]
        if ins:
            form, head = self._catalog.form(seen, name, ins, decoder)
            flags = 0
            if form.wrap:
                flags = sh.RELATIVE if form.relative else sh.BRANCH | _WRAPS[form.wrap]
            self._leaf(mode, name[:head], len(name), form, flags)
        elif decoder.last_error == DecoderError.NO_MORE_BYTES:
            cuts = words[sh.CUTS >> 3]
            words[(sh.CUT >> 3) + cuts] = at << 16 | room
            words[sh.CUTS >> 3] = cuts + 1
        else:
            self._leaf(mode, name, len(name), seen.lowering.emulated, sh.NOT_ONE)

    def _second_page(self, pa: int, mode: int, next_page: Callable[[], int]) -> None:
        """For an instruction that does not decode within its page: give its bytes, with those of the page behind if it
        goes on there."""
        words = self.words
        bits = self._catalog.mode(mode).lowering.bits
        offset = pa & 4095
        room = 4096 - offset
        data = self._sheet[sh.DATA : sh.DATA + room]
        first = Decoder(bits, data, ip=offset)
        ins = first.decode()
        try:
            pa2 = next_page()
        except Exception:
            if not ins.len or first.last_error == DecoderError.NO_MORE_BYTES:
                raise
            words[sh.GIVEN >> 3] = room  # #UD comes before the second page's #PF
            return
        data += bytes(self._memory.behind(pa2, 15))
        self._sheet[sh.DATA : sh.DATA + len(data)] = data
        words[sh.GIVEN >> 3] = len(data)
        words[sh.CUTS >> 3] = 0
        if Decoder(bits, data, ip=offset).decode().len > room:
            words[sh.SECOND >> 3] = pa2

    def _loop(self) -> None:
        """Say what comes before a block that jumps back to its own start."""
        words = self.words
        offset = words[sh.OFFSET >> 3]
        body = self.items()[: words[sh.LOOP >> 3]]
        renaming = rename(body)
        self._homes = homes = HOMES if renaming is None else renaming.homes
        words[sh.MOVING >> 3] = renaming is not None
        words[sh.REDO >> 3] = self._piece(b"" if renaming is None else renaming.do)
        words[sh.UNDO >> 3] = self._piece(b"" if renaming is None else renaming.undo)
        leads = [LEAD[n] if home is None else LEAD_HOST[home] for n, home in enumerate(homes)]
        for n in IN_STATE:
            words[(sh.LEAD_MOVED >> 3) + n - IN_STATE[0]] = self._piece(leads[n])
        found = tables(body, self.data, offset)
        for i, table in enumerate(found):
            readers = sum(1 << reader for reader in table.readers)
            _TABLE.pack_into(
                self._sheet, sh.TABLE_LIST + sh.TABLE * i, self._piece(leads[table.base]), table.disp, table.length,
                readers, table.base == 4,
            )  # fmt: skip
        words[sh.TABLES >> 3] = len(found)
        self._sheet[sh.MOVED_LIST : sh.MOVED_LIST + 16 * len(body)] = bytes(16 * len(body))
        words[sh.LOOP_KNOWN >> 3] = 1

    def _lower(self, mode: int, moved: bool) -> None:
        """Make the template of an instruction of the block."""
        words = self.words
        index, which = words[sh.WANT_AT >> 3], words[sh.WANT_OF >> 3]
        address, at, n, _ = _ITEM.unpack_from(self._sheet, sh.ITEMS + sh.ITEM * index)
        place = address - self._forms_at
        number = place // sh.FORM_SIZE
        first = sh.DATA + at - words[sh.OFFSET >> 3]
        instruction = self._sheet[first : first + n]
        lowering = self._catalog.mode(mode).lowering
        if not moved:
            t = self._lowered(number, lowering, instruction, at, which)
            self._table[place + which : place + which + 4] = t.to_bytes(4, "little")
            return
        known = self._moved.get((number, which, self._homes))
        if known is None:
            known = self._lowered(number, lowering, instruction, at, which, self._homes)
            self._moved[number, which, self._homes] = known
        words[sh.MOVED_LIST + 16 * index >> 3] = address + which
        words[sh.MOVED_LIST + 16 * index + 8 >> 3] = self._pool_at + known

    def _lowered(
        self, number: int, lowering: Lowering, instruction: bytes, at: int, which: int,
        homes: tuple[int | None, ...] = HOMES,
    ) -> int:  # fmt: skip
        return self._template(
            self._catalog.template(self._forms[number], lowering, instruction, at, _HOW[which], homes)
        )
