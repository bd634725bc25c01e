"""DR7 and DR6 (SDM 3, 17.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from skep.engine.debug import On, Place

DR6_HITS: Final = 0xF
DR6_BS: Final = 1 << 14
DR7_FIXED: Final = 1 << 10

_ON = {On.EXECUTE: 0, On.WRITE: 1, On.ACCESS: 3}
_SIZE = {1: 0, 2: 1, 8: 2, 4: 3}


def dr7(places: Iterable[Place | None]) -> int:
    """DR7 with the places of DR0, DR1... enabled, globally, but for those that are None."""
    value = DR7_FIXED
    for number, place in enumerate(places):
        if place is not None:
            value |= 2 << 2 * number | (_ON[place.on] | _SIZE[place.size] << 2) << 16 + 4 * number
    return value


def numbers(dr6: int) -> tuple[int, ...]:
    """Which of DR0 to DR3 were hit."""
    return tuple(number for number in range(4) if dr6 >> number & 1)
