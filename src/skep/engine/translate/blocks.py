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
import json
from array import array
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter_ns

from skep.engine.translate.block_runtime import NONE, WANTED
from skep.engine.translate.catalog import Catalog
from skep.engine.translate.codebuffer import CodeBuffer
from skep.engine.translate.codemap import CodeMap
from skep.engine.translate.compiler import compile_functions
from skep.engine.translate.compose_runtime import COMPOSE_ROUTINES
from skep.engine.translate.composing import Composer
from skep.engine.translate.emission import Emission
from skep.engine.translate.layout import HASH_BITS
from skep.engine.translate.narrow_runtime import NARROW_ROUTINES
from skep.engine.translate.runtime import ROUTINES
from skep.engine.translate.store import Store
from skep.engine.translate.string_runtime import STRING_ROUTINES
from skep.engine.translate.stubs import Stubs
from skep.engine.translate.system_runtime import SYSTEM_ROUTINES
from skep.engine.translate.tables import (
    AWAY,
    BRK_EXIT,
    CODE_BYTES,
    CODE_MASK,
    DEAD,
    END,
    KILLED,
    LAST,
    NEXT,
    PLACES,
    POS,
    RAM,
    RW,
    RX,
    SECOND,
    Block,
    Tables,
)
from skep.engine.translate.walk_runtime import WRITTEN
from skep.engine.translate.world import World
from skep.memory import GuestMemory

CODE_SIZE = 64 << 20
PIECES = 16
"""The code buffer is used again a piece at a time."""
LARGEST = 64 << 10
"""Bytes of code that a block may take; a piece with less room is full."""
AHEAD = 256 << 10
"""Bytes of the buffer whose pages are asked for together."""
AVERAGE = 416
"""A piece has room for a description for so many bytes of it."""
MAX_BLOCKS = (1 << HASH_BITS) * 5 // 8
MAX_USED = (1 << HASH_BITS) * 3 // 4
MAX_SINGLES = 1024
SCRATCH = 4096
"""Bytes of code that a single instruction may take."""
GIVE_UP = 200
"""A code page that is written this often is forgotten whole, so that data beside dead code is cheap again."""
RELAX = 1 << 14
"""Blocks killed until the writable alias of the code buffer is let go."""


@lru_cache(1)
def _routines() -> bytes:
    """What the runtime modules hold, in machine code, the same at any address; before it a line that tells where each
    routine begins."""
    unit = compile_functions(
        [*ROUTINES, *STRING_ROUTINES, *NARROW_ROUTINES, *SYSTEM_ROUTINES, *COMPOSE_ROUTINES], 0
    )
    return json.dumps(unit.entry).encode() + b"\n" + unit.code


class Cache:
    """A VM's translations."""

    def __init__(self, memory: GuestMemory, store: Store, size: int = CODE_SIZE, vcpus: int = 1) -> None:
        self.memory = memory
        self.store = store
        self.buffer = CodeBuffer(size)
        self.code = self.buffer.view
        self._words = self.code.cast("I")
        self.map = CodeMap(memory)
        entries, _, routines = store.made("routines", _routines).partition(b"\n")
        self.code[: len(routines)] = routines
        self.routines = {name: self.buffer.rx + offset for name, offset in json.loads(entries).items()}
        at = (len(routines) + 63) & ~63
        data, self.stubs = Stubs(self.routines).code(self.buffer.rx + at)
        self.code[at : at + len(data)] = data
        self.world = World(self.stubs)
        self.first = (at + len(data) + 63) & ~63
        self._scratch = size - vcpus * SCRATCH
        self._piece = 0
        self._piece_size = (self._scratch - self.first) // PIECES & ~63
        self._quota = min(self._piece_size // AVERAGE, MAX_BLOCKS // PIECES)
        self._counts = [0] * PIECES
        """By piece: how many blocks it got."""
        self.blocks = Tables(memory.end >> 12, PIECES * self._quota)
        self._state = self.blocks.words
        self.catalog = Catalog()
        self._emission = Emission(self.catalog)
        self._composer = Composer(
            memory, self.blocks, self.catalog, self._emission, self.stubs, self.buffer.rx, self.routines
        )
        self._clear_write_tags = self._routine("clear_write_tags", 2)
        self._forget_pages = self._routine("forget_pages", 1)
        self._take_written = self._routine("take_written", 3)
        self._fence = self._routine("barrier", 0)
        self._publish = self._routine("publish", 3)
        self._rehash = self._routine("rehash", 3)
        self._place = self._routine("adopt", 6)
        self._forget = self._routine("forget", 4)
        self._drop = self._routine("drop", 2)
        self._evict = self._routine("evict", 3)
        self._describe()
        self._singles: dict[tuple[object, ...], bytes] = {}
        self._relaxed = 0
        self.instructions = 0
        self.made = 0
        self.translating = 0
        """Nanoseconds."""
        self.again = 0
        """How often a piece of the code buffer was used again."""
        self.stalls: deque[int] = deque(maxlen=1000)
        """How long that, and making the block table anew, took the last times, in nanoseconds."""

    def _routine(self, name: str, arguments: int) -> Callable[..., int]:
        """A routine that is called with the interpreter's lock held: they are short."""
        word = ctypes.c_uint64
        kinds = [word] * arguments if name != "adopt" else [word, ctypes.c_char_p, word, word, word, word]
        function: Callable[..., int] = ctypes.PYFUNCTYPE(word, *kinds)(self.routines[name])
        return function

    def _describe(self) -> None:
        """Tell the routines where everything is."""
        rx, state = self.buffer.rx, self._state
        places = {
            RW: self.buffer.rw, RX: rx, RAM: self.memory.base,
            CODE_BYTES: self.map.bytes_address, CODE_MASK: self.map.mask_address,
            BRK_EXIT: self.stubs["brk_exit"] - rx, AWAY + 24: self.stubs["away_narrow"] - rx,
        }  # fmt: skip
        for i in range(3):
            for at, name in ((SECOND, "second"), (DEAD, "dead"), (AWAY, "away")):
                places[at + 8 * i] = self.stubs[f"{name}{i}"] - rx
        for at, value in places.items():
            state[at >> 3] = value
        self._begin_piece()

    def close(self) -> None:
        self.map.close()
        self._composer.close()
        self._words.release()
        self.blocks.close()
        self.buffer.close()
        self.store.close()  # last: it may need memory of its own

    @property
    def used(self) -> int:
        """Bytes of the code buffer that were used at least once."""
        if self.again:
            return self._piece_size * PIECES
        return self._state[POS >> 3] - self.first

    @property
    def killed(self) -> int:
        """How many blocks were forgotten."""
        return self._state[KILLED >> 3]

    # Room

    def _begin_piece(self) -> None:
        state, piece = self._state, self._piece
        state[POS >> 3] = self.first + piece * self._piece_size
        state[END >> 3] = self.first + (piece + 1) * self._piece_size - LARGEST
        state[NEXT >> 3] = piece * self._quota + 1
        state[LAST >> 3] = (piece + 1) * self._quota
        self._prepared = state[POS >> 3] & ~4095

    def _next_piece(self) -> None:
        """This piece is full: what is in the next, which was used the longest time ago, goes."""
        began = perf_counter_ns()
        state, piece = self._state, self._piece
        self._counts[piece] = state[NEXT >> 3] - 1 - piece * self._quota
        self._piece = piece = (piece + 1) % PIECES
        if self._counts[piece]:
            self.again += 1
            with self.world.stopped():
                self._evict(self.blocks.address, piece * self._quota + 1, self._counts[piece])
                for st in self.world.blocks:
                    self.world.empty_jumps(st)
                    st.site = 0
            self.buffer.relax()
            self.stalls.append(perf_counter_ns() - began)
        self._begin_piece()

    def _renew_table(self) -> None:
        """Make the block table anew, without the places of blocks that are gone: a search ends at a free one."""
        began = perf_counter_ns()
        with self.world.stopped():
            self.blocks.empty()
            self._counts[self._piece] = self._state[NEXT >> 3] - 1 - self._piece * self._quota
            for piece, count in enumerate(self._counts):
                self._rehash(self.blocks.address, piece * self._quota + 1, count)
        self.stalls.append(perf_counter_ns() - began)

    def _relax(self) -> None:
        """Have the writable alias count no page of code twice for long."""
        where = (self._state[POS >> 3] >> 23) + self._state[KILLED >> 3] // RELAX
        if where != self._relaxed:
            self._relaxed = where
            self.buffer.relax()

    # Making

    def translate(self, pa: int, mode: int, next_page: Callable[[], int]) -> Block:
        """Translate the block at ``pa``. ``next_page``: the physical address of the page behind it for the guest, for
        an instruction on two pages; what it raises goes through. The caller, a vCPU, holds the world's lock and has
        seen that there is no such block.

        Other vCPUs and devices may store to the page while it is read. Who does so says so first, and looks for
        marks of code after that; so when the marks are set and nobody has said anything, the bytes were those.
        """
        state = self._state
        if state[POS >> 3] > state[END >> 3] or state[NEXT >> 3] > state[LAST >> 3]:
            self._next_piece()
        elif state[PLACES >> 3] >= MAX_USED:
            self._renew_table()
        if state[POS >> 3] + LARGEST > self._prepared:
            self.buffer.prepare(self._prepared, min(AHEAD, self.buffer.size - self._prepared))
            self._prepared += AHEAD
        map_ = self.map
        if map_.storable(pa):
            with self.world.stopped():
                self._protect(pa >> 12)
        changes = map_.changes
        first, pos = state[NEXT >> 3], state[POS >> 3]
        adopted, second = self._adopt(pa, mode, next_page) if len(self.store) else (0, NONE)
        if not adopted:
            self._make(pa, mode, next_page)
        if len(self.world.blocks) > 1:
            self._fence()
        block = self.blocks.block(first)
        pa2 = block.pa2 if second == NONE else second
        if map_.storable(pa) or (pa2 is not None and map_.storable(pa2)) or changes is not map_.changes:
            with self.world.stopped():
                for frame in (pa >> 12,) if pa2 is None else (pa >> 12, pa2 >> 12):
                    self._protect(frame)
                    self._written(frame, 0, 4096)
                state[NEXT >> 3], state[POS >> 3] = first, pos
                adopted = 0
                self._make(pa, mode, next_page)
                block = self.blocks.block(first)
        self._publish(self.blocks.address, first, adopted or 1)
        if not adopted and self.store.keeps:
            self.store.note(pa >> 12, self._composer.record(first))
        self._relax()
        return block

    def _adopt(self, pa: int, mode: int, next_page: Callable[[], int]) -> tuple[int, int]:
        """As _make, if the store has the block, and with it whatever else the store has of its page: how many, and
        the page behind where it counts."""
        store = self.store
        offset = pa & 4095
        head = bytes(self.memory.behind(pa, min(17, 4096 - offset)))
        where = pa - offset
        for group in store.find(offset, mode, head):
            data = store.group(group)
            second, which = NONE, mode << 16 | offset
            found = self._place(self.blocks.address, data, len(data), where, second, which)
            if found == WANTED:
                second = next_page()
                found = self._place(self.blocks.address, data, len(data), where, second, which)
            if found:
                store.use(group, found)
                return found, second
        return 0, NONE

    def _make(self, pa: int, mode: int, next_page: Callable[[], int]) -> None:
        """The block at ``pa``, its bytes marked, nothing leading to it."""
        began = perf_counter_ns()
        self._composer.make(pa, mode, next_page)
        self.made += 1
        self.instructions += self._composer.instructions
        self.translating += perf_counter_ns() - began

    def link(self, site: int, block: Block) -> None:
        """Patch the jump whose 32-bit displacement is at host address ``site`` to a block of the same page."""
        rx = self.buffer.rx
        self._words[site - rx >> 2] = rx + block.entry - (site + 4) & 0xFFFFFFFF

    def _protect(self, frame: int) -> None:
        """No vCPU stores to a page any more without asking. They are stopped."""
        host = self.memory.base + (frame << 12)
        for st in self.world.blocks:
            self._clear_write_tags(st.address, host)
        self.map.wmapped[frame] &= WRITTEN

    def take_written(self) -> bytes:
        """The pages that vCPUs could store to since the last time: bit i & 7 of byte i >> 3 is page i."""
        bits = ctypes.create_string_buffer(-(-self.map.frames // 8))
        with self.world.stopped():
            for st in self.world.blocks:
                self._clear_write_tags(st.address, 0)
            self._take_written(self.map.wmapped_address, ctypes.addressof(bits), len(bits))
        return bits.raw

    def forget_pages(self) -> None:
        """No vCPU, which are stopped, knows where any page is, nor any jump's target."""
        for st in self.world.blocks:
            self._forget_pages(st.address)
            self.world.empty_jumps(st)
            st.site = 0

    # A single instruction with operands in bounce buffers

    def scratch(self, index: int) -> int:
        """The place in the code buffer for the single instructions of vCPU ``index``: its offset. No block lies there,
        also of those made before that vCPU was."""
        return self._scratch + index * SCRATCH

    def single(self, data: bytes, offset: int, mode: int, bounce: dict[int, int], at: int) -> int:
        """Host address of code that runs the one instruction in ``data`` (at ``offset`` of its page) and leaves by
        done_exit, written to the scratch ``at``. Its bytes are remembered, for drivers that talk to a device's
        memory."""
        key = (data, offset, mode, *bounce.items())
        with self.world.lock:
            code = self._singles.get(key)
            if code is None:
                if len(self._singles) >= MAX_SINGLES:
                    self._singles.clear()
                code = self._singles[key] = self._emission.single(data, offset, mode, bounce)
        self.code[at : at + len(code)] = code
        return self.buffer.rx + at

    # Forgetting

    def drop(self, block: Block) -> None:
        """Forget one block. The vCPUs are stopped."""
        self._drop(self.blocks.address, block.number)

    def written(self, pa: int, n: int) -> None:
        """[pa, pa + n) has changed or is about to: forget what was translated from it. Any thread may say so."""
        end = pa + n
        with self.world.stopped():
            frame = pa >> 12
            while frame << 12 < end:
                if self.map.mask[frame]:
                    base = frame << 12
                    self._written(frame, max(pa, base) - base, min(end, base + 4096) - base)
                frame += 1
        self._relax()

    def _written(self, frame: int, low: int, high: int) -> None:
        if self.blocks.written(frame) % GIVE_UP == 0:
            low, high = 0, 4096
        self._forget(self.blocks.address, frame, low, high)

    def locate(self, address: int) -> int | None:
        """The guest offset (in its page) of the instruction whose code holds a host address."""
        position = address - self.buffer.rx
        piece = (position - self.first) // self._piece_size
        if not 0 <= piece < PIECES:
            return None
        low = piece * self._quota
        count = self._state[NEXT >> 3] - 1 - low if piece == self._piece else self._counts[piece]
        high = low + count + 1
        while high - low > 1:  # block low begins at or below the position, or is before the first
            middle = low + high >> 1
            if self.blocks.start(middle) <= position:
                low = middle
            else:
                high = middle
        if low == piece * self._quota:
            return None
        block = self.blocks.block(low)
        if position >= block.end:
            return None
        inside = position - block.start
        found = None
        marks = self.marks(block)
        for k in range(0, len(marks), 2):
            if marks[k] <= inside:
                found = marks[k + 1]
        return found

    def marks(self, block: Block) -> array[int]:
        """Offsets in the code and in the guest's page of each of a block's instructions in turn."""
        at = block.end + 1 & ~1
        marks = array("H")
        marks.frombytes(self.code[at : at + 2 * block.marks])
        return marks
