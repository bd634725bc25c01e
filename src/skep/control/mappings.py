"""What a guest's page tables map, as long runs: the virtual addresses of a core (Intel SDM 3, 4.5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte
from skep.memory import PAGE, GuestMemory

_ENTRIES = struct.Struct("<512Q")
_TABLES = 1 << 14
"""Tables read at most, a second's work; a guest may have built them to lead in circles."""


class Run(NamedTuple):
    """``size`` bytes at virtual ``va`` are those at guest-physical ``gpa``, all of them RAM."""

    va: int
    gpa: int
    size: int


def runs(memory: GuestMemory, state: dict[str, Any], most: int) -> list[Run]:
    """What a processor in 64-bit mode maps, the upper half (the kernel) first; of more than ``most`` runs, the first.

    A processor without paging, or with that of 32-bit systems, maps none.
    """
    if not (state.get("cr0", 0) & Cr0.PG and state.get("efer", 0) & Efer.LMA):
        return []
    levels = 5 if state.get("cr4", 0) & Cr4.LA57 else 4
    found: list[Run] = []
    for piece in _Walk(memory).table(state.get("cr3", 0) & Pte.ADDRESS, levels, 0):
        if found and found[-1].va + found[-1].size == piece.va and found[-1].gpa + found[-1].size == piece.gpa:
            found[-1] = found[-1]._replace(size=found[-1].size + piece.size)
        elif len(found) < most:
            found.append(piece)
        else:
            break
    return found


class _Walk:
    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._left = _TABLES

    def table(self, gpa: int, level: int, va: int) -> Iterator[Run]:
        """What the table at ``gpa`` maps, from ``va`` on; at the root, the upper half before the lower."""
        if self._left <= 0 or not self._memory.is_ram(gpa, PAGE):
            return
        self._left -= 1
        shift = 12 + 9 * (level - 1)
        entries = _ENTRIES.unpack(self._memory.read(gpa, PAGE))
        root = not va and level >= 4
        for index in (*range(256, 512), *range(256)) if root else range(512):
            entry = entries[index]
            if not entry & Pte.P:
                continue
            at = va | index << shift
            if root and index >= 256:
                at |= -1 << shift + 9 & 0xFFFF_FFFF_FFFF_FFFF
            if level > 1 and not (entry & Pte.PS and level <= 3):
                yield from self.table(entry & Pte.ADDRESS, level - 1, at)
                continue
            size = 1 << shift
            page = entry & Pte.ADDRESS & -size
            if self._memory.is_ram(page, size):
                yield Run(at, page, size)
