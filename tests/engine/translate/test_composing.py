"""Blocks that machine code makes of forms and templates: what begins like something known, what is cut off, bounds."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from iced_x86 import Code, Decoder

from skep.engine.translate import TranslateEngine
from skep.engine.translate import composing as composing_module
from skep.engine.translate import sheet as sh
from skep.engine.translate.blocks import Cache
from skep.engine.translate.forms import Ends, Form, Legality
from skep.engine.translate.layout import Mode
from skep.engine.translate.tables import LENGTH
from tests.engine.assemble import assemble
from tests.engine.tiny import Tiny
from tests.engine.translate.composed import composed, word

CODE = 0x140000
ALL = Legality.X87 | Legality.SSE | Legality.AVX | Legality.TSC | Legality.OSXSAVE
KERNEL = ALL << Mode.CLASS_SHIFT
MODES = (KERNEL, KERNEL | Mode.CODE32, Mode.CODE16 | Mode.SEGMENTED | Mode.REAL)


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Tiny(TranslateEngine(), "start: hlt\n") as guest:
        yield guest.vcpu.cache  # type: ignore[attr-defined]


def first(cache: Cache, mode: int, data: bytes, offset: int = 0x100) -> tuple[Form, int, int]:
    """Form, length and target of an instruction."""
    cache.memory.write(CODE + offset, data)
    form, at, n, extra = composed(cache, CODE + offset, mode | Mode.PLAIN).items[0]
    assert at == offset
    return form, n, extra


@pytest.mark.parametrize("mode", MODES)
def test_what_begins_alike_is_alike(cache: Cache, mode: int) -> None:
    """Forms that are found by an instruction's first bytes are those that its whole would have got."""
    source = random.Random(mode)
    bits = cache.catalog.mode(mode).lowering.bits
    leaves = found = 0
    for _ in range(1500):
        data = bytearray(source.randbytes(15))
        data[0] = source.choice((data[0], 0x48, 0x0F, 0x81, 0x8B, 0xC7, 0xE8, 0x83, 0x89))
        decoder = Decoder(bits, bytes(data), ip=0x100)
        ins = decoder.decode()
        if ins.code == Code.INVALID:
            continue
        where = decoder.get_constant_offsets(ins)
        first(cache, mode, bytes(data))
        for offset, size in (
            (where.displacement_offset, where.displacement_size), (where.immediate_offset, where.immediate_size)
        ):  # fmt: skip
            data[offset : offset + size] = source.randbytes(size)
        ins = Decoder(bits, bytes(data), ip=0x100).decode()
        leaves = cache._composer._leaf_count
        form, n, extra = first(cache, mode, bytes(data))
        found += cache._composer._leaf_count == leaves
        assert n == ins.len
        cache._composer._forget()
        cache.catalog.mode(mode).shapes.clear()
        other = first(cache, mode, bytes(data))
        assert (form, n, extra) == other, ins
        if form.wrap:
            target = ins.memory_displacement if form.relative else ins.near_branch_target
            assert extra & 2 * form.wrap - 1 == target & 2 * form.wrap - 1 and -form.wrap <= extra < form.wrap
    assert found > 400


def test_an_instruction_that_is_cut_off_is_not_taken_for_one_that_is_not(cache: Cache) -> None:
    """Behind another one, at the end of its page: the block ends before it."""
    whole = bytes.fromhex("e900000000")
    assert first(cache, KERNEL, whole)[0].ends == Ends.JMP
    for n in range(1, len(whole)):
        at = CODE + 4095 - n
        cache.memory.write(at, b"\x90" + whole[:n])
        made = composed(cache, at, KERNEL)
        assert [item[2] for item in made.items] == [1] and made.block.size == 1


@pytest.mark.parametrize("place", ["1c2588130000", "5588"])
def test_a_register_behind_the_displacement_is_no_constant(cache: Cache, place: str) -> None:
    """VBLENDVPS ymm3, ymm2, [m], ymm1 and the same with ymm9."""
    forms = []
    for last in ("10", "90"):
        form, n, _ = first(cache, KERNEL, bytes.fromhex(f"c4e36d4a{place}{last}"))
        assert n == 5 + len(place) // 2
        forms.append(form)
    assert forms[0] is not forms[1]


def test_random_bytes(cache: Cache) -> None:
    """Mostly no sensible code: prefixes without an instruction, invalid ones, some cut off by the end of their page."""
    second = CODE + 0x20000
    for seed in range(30):
        chance = random.Random(seed)
        page = CODE + (seed & 15) * 4096
        cache.memory.write(page, chance.randbytes(4096))
        cache.memory.write(second, chance.randbytes(4096))
        mode = chance.choice(MODES)
        for _ in range(40):
            offset = chance.choice((chance.randrange(4096), 4096 - chance.randrange(1, 20)))
            made = composed(cache, page + offset, mode, second=second)
            bits = cache.catalog.mode(mode).lowering.bits
            block, count = made.block, len(made.items)
            assert 0 < count <= 48 and sum(item[2] for item in made.items) == block.size
            assert (block.pa2 is None) == (offset + block.size <= 4096)
            at = offset
            guest = cache.memory.read(page + offset, 4096 - offset) + cache.memory.read(second, 15)
            for _, where, n, _ in made.items:
                assert (where, n) == (at, Decoder(bits, guest[at - offset :], ip=at).decode().len)
                at += n
            assert word(cache._composer, sh.RECORD_AT + LENGTH) == len(made.record)


def test_many_looks_at_what_is_cut_off(cache: Cache) -> None:
    """Jumps to instructions that go on on the next page."""
    text = "".join(f"test [rdi], eax\nje 0x{CODE + 4095 - i:x}\n" for i in range(14))
    cache.memory.write(CODE, assemble(text + "hlt", CODE, {}).code)
    cache.memory.write(CODE + 4080, bytes.fromhex("48" * 15 + "0f"))
    assert len(composed(cache, CODE, KERNEL).items) == 14


def test_no_end_of_questions(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another vCPU changes the bytes all the time: then the emulator runs one instruction."""
    monkeypatch.setattr(composing_module, "MOST_QUESTIONS", 3)
    cache.memory.write(CODE, assemble("push rax\nmov rax, [rbx]\nadd rcx, 3\nxor edx, edx\nret", CODE, {}).code)
    made = composed(cache, CODE, KERNEL)
    assert len(made.items) == 1 and made.items[0][0].emulate and made.block.size == 15 and not made.record
    monkeypatch.undo()
    assert len(composed(cache, CODE, KERNEL).items) == 5


@pytest.mark.parametrize("name", ["MAX_LEAVES", "MAX_EDGES", "MAX_FORMS"])
def test_tables_that_are_full(cache: Cache, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What a guest can make us remember has a bound; then everything is learnt anew."""
    monkeypatch.setattr(composing_module.sh, name, 300)
    test_random_bytes(cache)
    composer = cache._composer
    assert {"MAX_LEAVES": composer._leaf_count, "MAX_EDGES": composer._edge_count}.get(name, 0) <= 300
    assert len(composer._forms) <= 300 or name != "MAX_FORMS"


def test_operands_that_are_far_from_their_register(cache: Cache) -> None:
    """Together they would need a displacement of more than 32 bits."""
    text = "mov eax, [rbx - 0x7fffffff]\nlea rbx, [rbx - 0x10]\nmov ecx, [rbx - 0x7fffffff]\nhlt"
    cache.memory.write(CODE, assemble(text, CODE, {}).code)
    assert composed(cache, CODE, KERNEL).shares == {}
    text = "mov eax, [rbx - 0x7ffffff0]\nlea rbx, [rbx - 0x10]\nmov ecx, [rbx - 0x7ffffff0]\nhlt"
    cache.memory.write(CODE, assemble(text, CODE, {}).code)
    assert composed(cache, CODE, KERNEL).shares[0][2] == (3, -0x80000000, 20, False)


def test_a_sheet_has_room_for_everything() -> None:
    """Areas in their order, and the longest lists of a block."""
    areas = [sh.FAR_CODE, sh.CUT, sh.MOVED_LIST, sh.DATA, sh.ITEMS, sh.TARGET_LIST, sh.TABLE_LIST, sh.RANGE_LIST,
             sh.LAST_RANGE, sh.ORIGINS, sh.COPY_LIST, sh.CHECK_LIST, sh.LINK_LIST, sh.WAY_LIST, sh.MARK_LIST,
             sh.LOOK_LIST, sh.RECORD_AT, sh.SHEET]  # fmt: skip
    assert areas == sorted(areas)
    assert sh.CUT + 8 * sh.MOST_CUTS <= sh.MOVED_LIST and sh.MOVED_LIST + 48 * 16 <= sh.DATA
    assert sh.ITEMS + 48 * sh.ITEM <= sh.TARGET_LIST and sh.RANGE_LIST + 50 * sh.RANGE_SIZE <= sh.LAST_RANGE
    assert sh.LAST_RANGE + 2 * (16 + 48 * 16) <= sh.ORIGINS and sh.ORIGINS + 256 <= sh.COPY_LIST
    assert sh.WAY_LIST + 3 * 8 * sh.WAYS_ROOM <= sh.MARK_LIST
