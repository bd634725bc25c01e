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
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from time import perf_counter_ns

from skep.engine.translate.catalog import Catalog
from skep.engine.translate.codebuffer import CodeBuffer
from skep.engine.translate.codemap import CodeMap
from skep.engine.translate.compiler import CompiledUnit, compile_functions
from skep.engine.translate.drafting import Drafting
from skep.engine.translate.emission import LINK_KEY, Emission, Emitted
from skep.engine.translate.layout import HASH_BITS, HASH_ENTRY, Mode
from skep.engine.translate.narrow_runtime import NARROW_ROUTINES
from skep.engine.translate.runtime import ROUTINES
from skep.engine.translate.store import Group, Look, Record, Store, Stored, matches
from skep.engine.translate.stubs import Stubs
from skep.engine.translate.system_runtime import SYSTEM_ROUTINES
from skep.engine.translate.world import World
from skep.memory import GuestMemory

CODE_SIZE = 64 << 20
MAX_BLOCKS = (1 << HASH_BITS) * 5 // 8
MAX_USED = (1 << HASH_BITS) * 3 // 4
MAX_SINGLES = 1024
SCRATCH = 4096
"""Bytes of code that a single instruction may take."""
GIVE_UP = 200
"""A code page that is written this often is forgotten whole, so that data beside dead code is cheap again."""

_ON_DEMAND = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE


_i32 = struct.Struct("<i").pack_into
_u64 = struct.Struct("<Q").pack_into


@lru_cache(1)
def _routines() -> CompiledUnit:
    """runtime.py, narrow_runtime.py and system_runtime.py in machine code, the same at any address."""
    return compile_functions([*ROUTINES, *NARROW_ROUTINES, *SYSTEM_ROUTINES], 0)


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
        return self.key & Mode.ALL


class Cache:
    """A VM's translations."""

    def __init__(self, memory: GuestMemory, store: Store, size: int = CODE_SIZE) -> None:
        self.memory = memory
        self.store = store
        self._made: tuple[bytes, Emitted] | None = None
        """What _make made last, for _keep."""
        self.buffer = CodeBuffer(size)
        self.code = self.buffer.view
        self._words = self.code.cast("I")
        self.map = CodeMap(memory)
        self._table = mmap.mmap(-1, HASH_ENTRY << HASH_BITS, flags=_ON_DEMAND)
        self._pin = ctypes.c_char.from_buffer(self._table)
        self.hash_address = ctypes.addressof(self._pin)
        self._hash = memoryview(self._table).cast("B").cast("Q")
        unit = _routines()
        self.code[: len(unit.code)] = unit.code
        self.routines = {name: self.buffer.rx + offset for name, offset in unit.entry.items()}
        at = (len(unit.code) + 63) & ~63
        data, self.stubs = Stubs(self.routines).code(self.buffer.rx + at)
        self.code[at : at + len(data)] = data
        self.world = World(self.stubs)
        self.first = self.pos = (at + len(data) + 63) & ~63
        self.limit = size
        self.blocks: dict[int, Block] = {}
        self._pages: dict[int, list[Block]] = {}
        self._starts: list[int] = []
        self._order: list[Block] = []
        self._writes: dict[int, int] = {}
        self.catalog = Catalog()
        self._drafting = Drafting(memory, self.catalog, self.map.mark, self.blocks)
        self._emission = Emission(
            self.buffer.rx, memory.base, self.catalog, self.stubs, self._drafting.live_at, self.blocks
        )
        word = ctypes.c_uint64
        self._insert = ctypes.CFUNCTYPE(word, word, word, word)(self.routines["insert"])
        self._clear_write_tags = ctypes.CFUNCTYPE(word, word, word)(self.routines["clear_write_tags"])
        self._fence = ctypes.CFUNCTYPE(word)(self.routines["barrier"])
        self._used = 0
        """Places of the block table that are not free, at most."""
        self._singles: dict[tuple[object, ...], bytes] = {}
        self.instructions = 0
        self.made = 0
        self.killed = 0
        self.translating = 0
        """Nanoseconds."""

    def close(self) -> None:
        self.blocks.clear()
        self._pages.clear()
        self._order.clear()
        self.map.close()
        self._hash.release()
        self._words.release()
        del self._pin
        self._table.close()
        self.buffer.close()
        self.store.close()  # last: it may need memory of its own

    # Making

    def translate(self, pa: int, mode: int, next_page: Callable[[], int]) -> Block:
        """Translate the block at ``pa``. ``next_page``: the physical address of the page behind it for the guest, for
        an instruction on two pages; what it raises goes through. The caller, a vCPU, holds the world's lock and has
        seen that there is no such block.

        Other vCPUs and devices may store to the page while it is read. Who does so says so first, and looks for
        marks of code after that; so when the marks are set and nobody has said anything, the bytes were those.
        """
        if self.pos + (64 << 10) > self.limit or len(self.blocks) >= MAX_BLOCKS:
            self.forget_all()
        elif self._used >= MAX_USED:
            self._rehash()
        map_ = self.map
        if map_.wmapped[pa >> 12]:
            with self.world.stopped():
                self._protect(pa >> 12)
        changes = map_.changes
        adopted = self._adopt(pa, mode) if len(self.store) and not mode & Mode.PLAIN else []
        block = adopted[0] if adopted else self._make(pa, mode, next_page)
        if len(self.world.blocks) > 1:
            self._fence()
        pa2 = block.pa2
        if map_.wmapped[pa >> 12] or (pa2 is not None and map_.wmapped[pa2 >> 12]) or changes is not map_.changes:
            with self.world.stopped():
                for frame in (pa >> 12,) if pa2 is None else (pa >> 12, pa2 >> 12):
                    self._protect(frame)
                    self._forget_page(frame)
                adopted = []
                block = self._make(pa, mode, next_page)
        if adopted:
            for one in adopted:
                self._register(one)
        else:
            self._register(block)
            self._keep(block)
        return block

    def _adopt(self, pa: int, mode: int) -> list[Block]:
        """The block at ``pa`` if the store has it, and whatever else the store has of its page: made as by _make."""
        store = self.store
        offset = pa & 4095
        head = bytes(self.memory.view(pa, min(17, 4096 - offset)))
        page = pa - offset
        for group in store.find(offset, mode, head):
            records = store.records(group)
            for stored in records:
                if stored.offset == offset and stored.mode == mode:
                    block = self._place(stored, page)
                    if block is not None:
                        store.use(group)
                        return [block, *self._others(group, records, page, block.key)]
        return []

    def _others(self, group: Group, records: list[Stored], page: int, key: int) -> Iterator[Block]:
        """What else the store has of a page."""
        taken = {key}
        for stored in records:
            if self.pos + (64 << 10) > self.limit or len(self.blocks) + len(taken) >= MAX_BLOCKS:
                break
            key = (page | stored.offset) << Mode.BITS | stored.mode
            if key not in taken and key not in self.blocks:
                block = self._place(stored, page)
                if block is not None:
                    self.store.use(group)
                    taken.add(key)
                    yield block

    def _place(self, stored: Stored, page: int) -> Block | None:
        """The block of a record, on this page, if the guest shows the same bytes."""
        pa = page | stored.offset
        memory = self.memory
        guest = memory.view(pa, stored.size)
        if not stored.same(guest):
            return None
        looks = list(stored.each_look()) if stored.looks < stored.marks else ()
        for look in looks:
            if not matches(look, memory.view(page | look.offset, len(look.data))):
                return None
        for look in looks:
            self._drafting.rest(page | look.offset, len(look.data))
        start = self.pos
        size = stored.end - stored.code
        end = start + size
        code = self.code
        code[start:end] = stored.blob[stored.code : stored.end]
        self._emission.move(code[start:end], start, stored.offset, stored.mode, stored.live)
        for to, of, k in stored.each_copy():
            code[start + to : start + to + k] = guest[of : of + k]
        for site, stub, target, other in stored.each_link():
            key = (page | target) << Mode.BITS | (stored.mode ^ Mode.AC if other else stored.mode)
            known = self.blocks.get(key)
            _u64(code, start + stub + LINK_KEY, key)
            _i32(code, start + site, (stub if known is None else known.entry - start) - site - 4)
        self.pos = end + 15 & ~15
        if start >> 20 != self.pos >> 20:
            self.buffer.relax()
        self.map.mark(pa, stored.size)
        marks = array("H")
        marks.frombytes(stored.blob[stored.marks : stored.code])
        key = pa << Mode.BITS | stored.mode
        return Block(key, pa, stored.size, None, start, start + stored.entry, end, stored.live, marks)

    def _keep(self, block: Block) -> None:
        """Have the store keep a block that was just made."""
        made = self._made
        if block.pa2 is not None or block.key & Mode.PLAIN or made is None or not self.store.keeps:
            return
        data, emitted = made
        page = block.pa & ~4095
        code = self._emission.unplaced(emitted, block.mode, block.live)
        links = []
        for site, stub, key in emitted.links:
            links.append((site, stub, key >> Mode.BITS & 4095, (key ^ block.key) & Mode.AC != 0))
        looks = {}
        for offset, (_, n, constants) in self._drafting.looked:
            mask = bytearray()
            if constants:
                mask += b"\xff" * n
                for at, k in constants:
                    mask[at : at + k] = bytes(k)
            looks[offset] = Look(offset, bytes(self.memory.view(page | offset, n)), bytes(mask))
        self.store.put(
            block.pa >> 12,
            Record(
                block.pa & 4095, block.mode, data, code, emitted.entry, block.live, links,
                emitted.copies, list(looks.values()), block.marks,
            ),
        )  # fmt: skip

    def _make(self, pa: int, mode: int, next_page: Callable[[], int]) -> Block:
        """The block at ``pa``, its bytes marked, nothing leading to it."""
        began = perf_counter_ns()
        draft = self._drafting.draft(pa, mode, next_page)
        needs, live = self._drafting.needs(draft)
        start = self.pos
        emitted = self._emission.emit(draft, needs, live, start)
        code, entry, marks = emitted.code, emitted.entry, emitted.marks
        self._made = (draft.data[: draft.size], emitted)
        end = start + len(code)
        self.code[start:end] = code
        self.pos = end + 15 & ~15
        if start >> 20 != self.pos >> 20:
            self.buffer.relax()
        self.made += 1
        self.instructions += len(draft.items)
        self.translating += perf_counter_ns() - began
        first = min(draft.size, 4096 - (pa & 4095))
        self.map.mark(pa, first)
        if draft.pa2 is not None:
            self.map.mark(draft.pa2, draft.size - first)
        return Block(pa << Mode.BITS | mode, pa, draft.size, draft.pa2, start, start + entry, end, live, marks)

    def link(self, site: int, block: Block) -> None:
        """Patch the jump whose 32-bit displacement is at host address ``site`` to a block of the same page."""
        rx = self.buffer.rx
        self._words[site - rx >> 2] = rx + block.entry - (site + 4) & 0xFFFFFFFF

    def _protect(self, frame: int) -> None:
        """No vCPU stores to a page any more without asking. They are stopped."""
        host = self.memory.base + (frame << 12)
        for st in self.world.blocks:
            self._clear_write_tags(st.address, host)
        self.map.wmapped[frame] = 0

    def _register(self, block: Block) -> None:
        self.blocks[block.key] = block
        self._starts.append(block.start)
        self._order.append(block)
        rx = self.buffer.rx
        self._insert(block.key, rx + block.start, rx + block.entry)
        self._used += 1
        for pa in (block.pa,) if block.pa2 is None else (block.pa, block.pa2):
            page = self._pages.get(pa >> 12)
            if page is None:
                self._pages[pa >> 12] = [block]
            else:
                page.append(block)

    # A single instruction with operands in bounce buffers

    def scratch(self) -> int:
        """A place in the code buffer for a vCPU's single instructions: its offset."""
        with self.world.lock:
            self.limit -= SCRATCH
            return self.limit

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

    def kill(self, block: Block) -> None:
        """Make sure that nothing enters a block any more; its frames' masks are the caller's. The vCPUs are stopped."""
        if self.blocks.get(block.key) is not block:
            return
        del self.blocks[block.key]
        self._unhash(block.key)
        if self.pos + 4096 > self.limit:
            self.forget_all()
            return
        lowering = self.catalog.mode(block.mode).lowering
        tail = self._emission.long(lowering, block.pa & 4095)
        at = self.pos
        self.code[at : at + len(tail)] = tail
        self.pos = at + (len(tail) + 15 & ~15)
        rx = self.buffer.rx
        self._jump(block.entry, rx + at)
        self._jump(block.start, self.stubs[f"dead{block.mode & 3}"])
        self.killed += 1

    def _rehash(self) -> None:
        """Make the block table anew, without the places of blocks that are gone: a search ends at a free one."""
        with self.world.stopped():
            self._table.madvise(mmap.MADV_DONTNEED)
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
        """[pa, pa + n) has changed or is about to: forget what was translated from it. Any thread may say so."""
        end = pa + n
        with self.world.stopped():
            frame = pa >> 12
            while frame << 12 < end:
                if self.map.mask[frame]:
                    self._written(frame, max(pa, frame << 12), min(end, (frame + 1) << 12))
                frame += 1

    def _forget_page(self, frame: int) -> None:
        self._written(frame, frame << 12, (frame + 1) << 12)

    def _written(self, frame: int, low: int, high: int) -> None:
        self._drafting.changed()
        blocks = self._pages.get(frame, [])
        count = self._writes.get(frame, 0) + 1
        self._writes[frame] = count
        peeked = self._drafting.peeked(frame)
        everything = count % GIVE_UP == 0 or peeked >> (low & 4095) & (1 << high - low) - 1 != 0
        keep: list[Block] = []
        again: list[tuple[int, int]] = []
        gone, gone_end = low, high  # what blocks that go were made from, and others perhaps
        for block in blocks:
            first = block.pa
            last = first + block.size
            if block.pa2 is not None:
                first, last = self._part(block, frame)
            if everything or (first < high and low < last) or self.blocks.get(block.key) is not block:
                self.kill(block)
                if first < gone:
                    gone = first
                if last > gone_end:
                    gone_end = last
            else:
                keep.append(block)
                again.append((first, last))
        if keep:
            self._pages[frame] = keep
        else:
            self._pages.pop(frame, None)
        if everything:
            self._drafting.forget_page(frame)
            self.map.clear_page(frame)
            return
        self.map.clear(gone, gone_end - gone)
        for first, last in again:
            if first < gone_end and gone < last:
                self.map.mark(first, last - first)
        base = frame << 12
        self.map.mark_bits(frame, peeked & (1 << gone_end - base) - (1 << gone - base))

    @staticmethod
    def _part(block: Block, frame: int) -> tuple[int, int]:
        """From where to where a block on two pages was made in one frame."""
        if block.pa >> 12 == frame:
            return block.pa, min(block.pa + block.size, frame + 1 << 12)
        return frame << 12, (frame << 12) + block.size - (4096 - (block.pa & 4095))

    def forget_all(self) -> None:
        """Drop every translation."""
        with self.world.stopped():
            self.blocks.clear()
            self._drafting.forget()
            self.map.clear_all()
            self._pages.clear()
            self._writes.clear()
            self._starts.clear()
            self._order.clear()
            self._table.madvise(mmap.MADV_DONTNEED)
            self.pos = self.first
            self._used = 0
            self.generation += 1
            for st in self.world.blocks:
                self.world.empty_jumps(st)
                st.site = 0

    generation = 0
    """How often everything was dropped."""

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
