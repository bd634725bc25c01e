"""What machine code drafts, read off the sheet."""

from __future__ import annotations

import struct
from typing import NamedTuple

from skep.engine.translate import sheet as sh
from skep.engine.translate.blocks import Cache
from skep.engine.translate.composing import Composer
from skep.engine.translate.forms import Item
from skep.engine.translate.tables import NEXT, POS, Block

Lead = tuple[int, int, int, bool]
"""The check of a range: register, what to add to it, bytes, is it written"""


class Composed(NamedTuple):
    """A block that was made and that nothing knows of."""

    block: Block
    items: list[Item]
    data: bytes
    loop: int
    shares: dict[int, tuple[int, int, Lead | None]]
    """By instruction: slot, place in the range, and the check if it is the first there."""
    links: list[int]
    """Offsets in its code of the displacements of jumps within the page."""
    code: bytes
    record: bytes


def no_page() -> int:
    raise AssertionError("no second page was expected")


def composed(cache: Cache, pa: int, mode: int, at: int | None = None, second: int | None = None) -> Composed:
    """Make the block at ``pa``, at offset ``at`` of the code buffer or where the next one goes."""
    state, composer = cache._state, cache._composer
    pos, number = state[POS >> 3], state[NEXT >> 3]
    if at is not None:
        state[POS >> 3] = at
    composer.make(pa, mode, no_page if second is None else lambda: second)
    block = cache.blocks.block(number)
    code = bytes(cache.code[block.start : block.end])
    record = composer.record(number)
    state[POS >> 3], state[NEXT >> 3] = pos, number
    words = composer.words
    links = [word(composer, sh.LINK_LIST + i * sh.KNOT + sh.K_SITE) for i in range(words[sh.LINKED >> 3])]
    return Composed(block, composer.items(), composer.data, words[sh.LOOP >> 3], _shares(composer), links, code, record)


def word(composer: Composer, at: int, kind: str = "<I") -> int:
    value: int = struct.unpack_from(kind, composer._sheet, at)[0]
    return value


def _shares(composer: Composer) -> dict[int, tuple[int, int, Lead | None]]:
    found: dict[int, tuple[int, int, Lead | None]] = {}
    for i in range(composer.instructions):
        item = sh.ITEMS + i * sh.ITEM
        number = word(composer, item + sh.RANGE, "<B")
        if not number:
            continue
        at = sh.RANGE_LIST + (number - 1) * sh.RANGE_SIZE
        low, high, far = struct.unpack_from("<3q", composer._sheet, at)
        write, _, first, base, slot = struct.unpack_from("<5B", composer._sheet, at + sh.R_WRITE)
        if slot != sh.NO_SLOT:
            lead = (base, low - far, high - low, bool(write)) if first == i else None
            found[i] = slot, word(composer, item + sh.LOW, "<q") - low, lead
    return found
