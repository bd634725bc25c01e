"""Drafting: which instructions make a block, and which flags must survive where in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from iced_x86 import Code, Decoder, DecoderError, Instruction

from skep.engine.translate.catalog import Catalog
from skep.engine.translate.forms import ALL_FLAGS, Ends, Form
from skep.engine.translate.layout import Mode
from skep.engine.translate.lower import Lowering
from skep.memory import GuestMemory

MAX_INSTRUCTIONS = 48
MAX_BRANCHES = 6
MAX_BYTES = 192

# Looking names up in a class costs more than the rest of a step of the loops below.
_NO, _YES, _JCC, _JMP, _CALL, _LOOP = Ends.NO, Ends.YES, Ends.JCC, Ends.JMP, Ends.CALL, Ends.LOOP
_SHADOW, _MODE, _LOOK = Ends.SHADOW, Ends.MODE, Ends.LOOK
_GO_ON = (_NO, _JCC, _LOOP, _MODE, _LOOK)
Item = tuple[Form, int, int, int]
"""An instruction: form, offset in its page, length, and where it goes or what it addresses relative to the page."""


class Draft(NamedTuple):
    """A block as it was decoded."""

    pa: int
    mode: int
    size: int
    items: list[Item]
    ends: int
    """How the last instruction ends it; NO: it goes on behind it."""
    shadow: bool
    """The last instruction stands in an STI's shadow: interrupts are looked for behind it."""
    pa2: int | None
    lowering: Lowering
    data: bytes
    plain: bool
    """No checks are shared."""
    loop: int
    """How many instructions there are up to the last one that jumps back to the first, and may be followed; 0: none."""


LOOK = 3
"""Instructions that are looked at behind a jump."""
Peek = tuple[int, int, tuple[tuple[int, int], ...]]
"""Flags that code reads before it writes them; the bytes looked at, 0 where nothing rests on them; and where among
those constants stand (offset, bytes), which do not count."""


class KnownBlocks(Protocol):
    """The blocks there are, by their keys."""

    def __contains__(self, key: int) -> bool: ...

    def entry(self, key: int) -> int:
        """The plain entry's offset in the code buffer, or 0."""


class Drafting:
    """Reads guest code."""

    def __init__(
        self, memory: GuestMemory, catalog: Catalog, mark: Callable[[int, int], None], known: KnownBlocks
    ) -> None:
        """``mark``: told of bytes that a block rests on; ``known``: the blocks there are, by their keys."""
        self._memory = memory
        self._catalog = catalog
        self._mark = mark
        self._known = known
        self._peeks: dict[int, Peek] = {}
        self.looked: list[tuple[int, Peek]] = []
        """What has been looked at since ``draft``: page offsets, and what was seen there."""
        self._ins = Instruction()

    def changed(self) -> None:
        """Some page of code has changed: what was seen by looking ahead may be wrong now."""
        self._peeks.clear()

    def live_at(self, page: int, offset: int, mode: int) -> int:
        """The flags that code at ``offset`` of the page reads before it writes them, as far as a short look tells."""
        key = (page | offset) << Mode.BITS | mode
        known = self._peeks.get(key)
        if known is not None:
            if known[1]:
                self.looked.append((offset, known))
            return known[0]
        seen = self._catalog.mode(mode)
        pa = page | offset
        data = bytes(self._memory.view(pa, min(4096 - offset, 20)))
        decoder = Decoder(seen.lowering.bits, data, ip=offset)
        ins = self._ins
        need = 0
        open_ = ALL_FLAGS
        at = 0
        other: list[tuple[int, int]] = []
        for _ in range(LOOK):
            decoder.decode_out(ins)
            n = ins.len
            name = data[at : at + n]
            form = seen.forms.get(name)
            if form is None:
                if ins.code == Code.INVALID:
                    break
                form = self._catalog.form(seen, name, ins, decoder)
            constants = form.open
            if constants.disp_size > 1:
                other.append((at + constants.disp, constants.disp_size))
            if constants.imm_size > 1:
                other.append((at + constants.imm, constants.imm_size))
            at += n
            if form.relative:
                other.append((at - 4 - form.behind, 4))
            need |= open_ & form.reads
            open_ &= form.keeps
            if not open_ or form.ends:
                break
        need |= open_
        if len(self._peeks) > 20000:
            self._peeks.clear()
        look = (need, 0 if need == ALL_FLAGS else at, tuple(other))
        self._peeks[key] = look
        if need != ALL_FLAGS:  # blocks rest on these bytes too
            self.looked.append((offset, look))
            self._mark(pa, at)
        return need

    def draft(self, pa: int, mode: int, next_page: Callable[[], int]) -> Draft:
        """The block at ``pa``. ``next_page``: the physical address of the page behind it for the guest, for an
        instruction on two pages; what it raises goes through."""
        self.looked = []
        plain = bool(mode & Mode.PLAIN)
        mode &= ~Mode.PLAIN
        offset = pa & 4095
        room = 4096 - offset
        data = bytes(self._memory.view(pa, room if room < MAX_BYTES else MAX_BYTES))
        seen = self._catalog.mode(mode)
        lowering = seen.lowering
        bits = lowering.bits
        decoder = Decoder(bits, data, ip=offset)
        decode = decoder.decode_out
        ins = self._ins
        get = seen.forms.get
        end = len(data)
        items: list[Item] = []
        at = 0
        branches = 0
        pa2: int | None = None
        ends = _NO
        shadow = False
        loop = 0
        while at < end:
            decode(ins)
            n = ins.len
            key = data[at : at + n]
            form = get(key)
            if form is None:
                if ins.code == Code.INVALID:
                    if items:
                        break
                    if end - at < 15 and room <= MAX_BYTES:
                        pa2, data = self._with_second_page(data, room, bits, offset, next_page)
                        decoder = Decoder(bits, data, ip=offset)
                        decoder.decode_out(ins)
                        end = n = ins.len
                        key = data[:n]
                form = self._catalog.form(seen, key, ins, decoder)
            extra = 0
            wrap = form.wrap
            if wrap:
                extra = ins.memory_displacement if form.relative else ins.near_branch_target
                if extra >= wrap:
                    extra -= wrap << 1
                if form.relative and not -(1 << 31) <= extra < 1 << 31:
                    form = lowering.emulated
            ends = form.ends
            items.append((form, offset + at, n, extra))
            at += n
            if ends:
                if extra == offset and (ends == _JCC or ends == _JMP) and form.wrap:
                    loop = len(items)
                if ends == _JCC and branches < MAX_BRANCHES and not shadow:
                    branches += 1
                    ends = _NO
                    if (pa + at) << Mode.BITS | mode in self._known:
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
        if plain or shadow or pa2 is not None or bits != 64:
            loop = 0
        return Draft(pa, mode, at, items, ends, shadow, pa2, lowering, data, plain, loop)

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
        data += bytes(self._memory.view(pa2, 15))
        n = Decoder(bits, data, ip=offset).decode().len
        return (pa2 if n > room else None), data

    def needs(self, draft: Draft) -> tuple[list[bool], int]:
        """For each instruction whether flags must survive its checks; and which flags the block reads.

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
        wide = draft.lowering.wide
        for form, at, _, extra in reversed(draft.items):
            e = form.ends
            if e:
                if e == _JMP or e == _CALL:
                    live = 0
                    open_ = []
                elif e == _YES:
                    live = ALL_FLAGS
                    open_ = []
                if e == _JCC or e == _LOOP or e == _JMP or e == _CALL:
                    if 0 <= extra < 4096 and (wide or draft.lowering.near(extra, at, form.narrow)):
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
        needs.reverse()
        return needs, live
