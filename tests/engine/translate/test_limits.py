"""What the translator keeps has bounds, and going over them only costs time."""

from __future__ import annotations

from types import ModuleType

import pytest

from skep.engine.translate import TranslateEngine, blocks, catalog, sheet
from skep.engine.translate.blocks import Cache
from tests.engine.tiny import Tiny

ROUNDS = 600
TEXT = f"""
    start: xor ebx, ebx
    xor ecx, ecx
    again: mov byte [rip + patch + 1], cl   ; the constant of the instruction below
    call function
    inc ecx
    cmp ecx, {ROUNDS}
    jne again
    hlt
    function: xor eax, eax
    patch: mov al, 0x55
    add rbx, rax
    ret
"""
SUM = sum(i & 0xFF for i in range(ROUNDS))


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (blocks, "MAX_USED", 16),
        (sheet, "MAX_FORMS", 80),
        (sheet, "MAX_LEAVES", 80),
        (catalog, "MAX_SHAPES", 4),
        (catalog, "MAX_MODES", 1),
        (blocks, "MAX_SINGLES", 1),
        (blocks, "GIVE_UP", 3),
    ],
)
def test_small_bounds(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, value: int) -> None:
    """A function is rewritten and run 600 times; whatever is dropped on the way is made again."""
    monkeypatch.setattr(module, name, value)
    with Tiny(TranslateEngine(), TEXT) as guest:
        guest.run()
        assert guest.exception is None
        assert guest.reg("rbx") == SUM


@pytest.mark.parametrize("code", [False, True], ids=["descriptions", "code"])
def test_a_small_code_buffer(monkeypatch: pytest.MonkeyPatch, code: bool) -> None:
    """What was translated the longest time ago goes, a piece of the buffer at a time."""
    if code:
        monkeypatch.setattr(blocks, "LARGEST", 118 << 10)
    else:
        monkeypatch.setattr(blocks, "AVERAGE", 40 << 10)  # three blocks
    with Tiny(TranslateEngine(None, 2 << 20), TEXT) as guest:
        cache: Cache = guest.vcpu.cache  # type: ignore[attr-defined]
        guest.run()
        assert guest.reg("rbx") == SUM
        assert cache.again >= 10
        assert len(cache.blocks) == len(list(cache.blocks.values())) < 60
        assert len(cache.stalls) == cache.again


FUNCTIONS = """
    caller: mov ebx, 1
    jmp function
    other: lea rbx, [rbx + rbx]
    lea rbx, [rbx + rbx]
    lea rbx, [rbx + rbx]
    lea rbx, [rbx + rbx]
    hlt
    align 64
    function: mov eax, 0x11
    hlt
"""


def test_a_jump_to_a_block_that_went_before_its_piece() -> None:
    """A function is written anew; what jumps to it, in the same page, was made later, and stays when the function's
    place is used again."""
    with Tiny(TranslateEngine(), FUNCTIONS) as guest:
        cache: Cache = guest.vcpu.cache  # type: ignore[attr-defined]

        def run(where: str, rbx: int = 0) -> tuple[int, int]:
            guest.set(rip=guest.program[where], rax=0, rbx=rbx)
            guest.run()
            assert guest.exception is None
            return guest.reg("rax"), guest.reg("rbx")

        assert run("function") == (0x11, 0)
        cache._next_piece()
        assert run("caller") == (0x11, 1)
        guest.memory.store_u32(guest.program["function"] + 1, 0x22)
        for _ in range(blocks.PIECES - 1):
            cache._next_piece()
        assert run("other", 3) == (0, 48)
        assert run("caller") == (0x22, 1)


@pytest.mark.parametrize("address", [(1 << 63) - 1, 0x7F00_0000_0000_4000 + 8190, 1 << 63, 0xDEAD_BEEF_0000_0000])
def test_a_jump_to_no_address_finds_no_empty_way(address: int) -> None:
    """It was found by random sequences: an empty way of the jump cache had the tag of an address that a guest may well
    jump to, and led to whatever block it had led to before."""
    with Tiny(TranslateEngine(), "start: mov rax, cr3\nmov cr3, rax\njmp rcx") as guest:
        # Jumps that fill each set that such an address may belong in, both ways of it.
        for number in (8189, 8190, 8191, 0, 1):
            for page in (0x140000, 0x150000):
                at = page + (number - (page >> 14) - 1 & 8191)
                at += number - ((at >> 14) + at & 8191)
                guest.memory.write(at, b"\xf4")
                guest.set(rip=guest.program["start"], rcx=at)
                guest.run()
                assert guest.exception is None and guest.reg("rip") == at + 1
        guest.set(rip=guest.program["start"], rcx=address)
        guest.run(3.0)
        frame = guest.exception
        assert frame is not None and frame.vector == 13
