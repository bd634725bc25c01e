"""What the translator keeps has bounds, and going over them only costs time."""

from __future__ import annotations

from types import ModuleType

import pytest

from skep.engine.translate import TranslateEngine, blocks, catalog
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
        (blocks, "MAX_BLOCKS", 8),
        (catalog, "MAX_FORMS", 4),
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


def test_a_small_code_buffer() -> None:
    """Translations that do not fit are forgotten all at once."""
    with Tiny(TranslateEngine(), TEXT) as guest:
        cache = guest.vcpu.cache  # type: ignore[attr-defined]
        cache.limit = cache.first + (66 << 10)
        guest.run()
        cache.limit = blocks.CODE_SIZE
        assert cache.generation > 0
        assert guest.reg("rbx") == SUM
