"""Blocks that machine code makes, and those of drafting.py and emission.py: byte for byte the same."""

from __future__ import annotations

import random

import pytest

from skep.engine.translate import TranslateEngine
from skep.engine.translate import composing as composing_module
from skep.engine.translate import sheet as sh
from skep.engine.translate.blocks import Cache
from skep.engine.translate.forms import Legality
from skep.engine.translate.layout import Mode
from skep.engine.translate.tables import NEXT, POS, Block
from tests.engine.assemble import assemble
from tests.engine.tiny import Tiny

CODE = 0x140000


def made_both_ways(cache: Cache, pa: int, mode: int) -> Block | None:
    """The block at ``pa`` as machine code makes it, compared with what Python makes; None where it leaves it to
    Python."""
    start, number = cache._state[POS >> 3], cache._state[NEXT >> 3]
    if not cache._composer.make(pa, mode):
        return None
    block = cache.blocks.block(number)
    record = cache._composer.record(number)
    draft = cache._drafting.draft(pa, mode, lambda: 0)
    needs, live = cache._drafting.needs(draft)
    emitted = cache._emission.emit(draft, needs, live, start)
    looked = [(at, at + look[1]) for at, look in cache._drafting.looked]
    hull = (min(low for low, _ in looked), max(high for _, high in looked)) if looked else (0, 0)
    assert cache._composer.instructions == len(draft.items)
    assert (block.size, block.live, block.looked) == (draft.size, live, hull)
    assert bytes(cache.code[block.start : block.end]) == bytes(emitted.code)
    assert block.entry == start + emitted.entry
    assert cache.marks(block) == emitted.marks
    assert record == cache._record(block, draft.data[: draft.size], emitted)
    return block


@pytest.fixture
def cache() -> Cache:
    with Tiny(TranslateEngine(), "start: hlt\n") as guest:
        yield guest.vcpu.cache  # type: ignore[attr-defined, misc]


KERNEL = (Legality.X87 | Legality.SSE | Legality.AVX | Legality.OSXSAVE) << Mode.CLASS_SHIFT


@pytest.mark.parametrize(
    "text",
    [
        "push rbx\npush r12\nsub rsp, 0x20\nmov [rsp + 8], rax\nadd rsp, 0x20\npop r12\npop rbx\nret",
        "mov eax, [rbx]\nmov [rbx + 8], eax\nmov ecx, [rbx + 4]\nmov [rbx + 12], ecx\njmp 0x140800",
        "test eax, eax\nje over\nmov rcx, [rip + 0x1000]\nover: lock xadd [rdi], rcx\njc over\nhlt",
        "sti\nhlt", "sti\nsti\nnop", "stac\nmov al, [rdi]\nclac\nret", "popf\nnop\nhlt", "call 0x150000",
        "again: loop again\nhlt", "again: jrcxz again\njmp 0x13f000", "rep stosq\nhlt", "jmp rax", "syscall", "ud2",
        "mov rax, 0x123456789abcdef0\nmov [rsp - 8], ax\ncmp word [rsi + 0x11223344], 0x55\njne 0x140010\nret",
        "cmp eax, 4\nja far\nlea rbx, [rbx - 8]\nmov rax, [rbx]\nmov rcx, [rbx + 0x30]\nadd rbx, 0x10\n"
        "mov [rbx], rax\nfar: adc eax, 1\nseto al\nret",
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", [0, Mode.USER, Mode.AC, Mode.PLAIN])
def test_texts(cache: Cache, text: str, how: int) -> None:
    mode = KERNEL | how
    cache.memory.write(CODE, assemble(text, CODE, {}).code)
    assert made_both_ways(cache, CODE, mode) is not None


def test_blocks_for_python(cache: Cache) -> None:
    """A loop, an instruction on two pages, code of 32 bits."""
    cache.memory.write(CODE, assemble("again: dec ecx\njnz again\nhlt", CODE, {}).code)
    assert made_both_ways(cache, CODE, KERNEL) is None
    assert made_both_ways(cache, CODE, KERNEL | Mode.CODE32) is None
    assert made_both_ways(cache, CODE, KERNEL | Mode.PLAIN) is not None
    cache.memory.write(CODE + 4095, b"\x48\x01\xd8")
    assert made_both_ways(cache, CODE + 4095, KERNEL) is None


def test_random_bytes(cache: Cache) -> None:
    """Mostly no sensible code: prefixes without an instruction, invalid ones, some cut off by the end of their page."""
    made = 0
    for seed in range(40):
        chance = random.Random(seed)
        page = CODE + (seed & 15) * 4096
        cache.memory.write(page, chance.randbytes(4096))
        for _ in range(40):
            offset = chance.choice((chance.randrange(4096), 4096 - chance.randrange(1, 20)))
            made += made_both_ways(cache, page + offset, KERNEL) is not None
    assert made > 1200


def test_many_looks_at_what_is_cut_off(cache: Cache) -> None:
    """Jumps to instructions that go on on the next page."""
    text = "".join(f"test [rdi], eax\nje 0x{CODE + 4095 - i:x}\n" for i in range(14))
    cache.memory.write(CODE, assemble(text + "hlt", CODE, {}).code)
    cache.memory.write(CODE + 4080, bytes.fromhex("48" * 15 + "0f"))
    assert made_both_ways(cache, CODE, KERNEL) is not None


def test_tables_that_are_full(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a guest can make us remember has a bound; then everything is learnt anew."""
    monkeypatch.setattr(composing_module.sh, "MAX_LEAVES", 200)
    before = cache._composer._leaf_count
    test_random_bytes(cache)
    assert cache._composer._leaf_count <= 200 and before <= 200


def test_a_sheet_has_room_for_everything() -> None:
    """Areas in their order; the longest lists of a block of 48 instructions."""
    areas = [sh.DATA, sh.ITEMS, sh.TARGET_LIST, sh.RANGE_LIST, sh.LAST_RANGE, sh.ORIGINS, sh.CHECK_LIST, sh.LINK_LIST,
             sh.BREAK_LIST, sh.FAR_LIST, sh.COPY_LIST, sh.MARK_LIST, sh.LOOK_LIST, sh.RECORD_AT, sh.SHEET]  # fmt: skip
    assert areas == sorted(areas)
    assert sh.ITEMS + 49 * sh.ITEM <= sh.LISTS and sh.ORIGINS + 256 <= sh.CHECK_LIST
    assert sh.LAST_RANGE + 2 * (16 + 48 * 16) <= sh.ORIGINS
