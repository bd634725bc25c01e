"""The memory map that a guest is told, in the terms of a PC's BIOS."""

from __future__ import annotations

import enum
from typing import NamedTuple


class RangeType(enum.IntEnum):
    """What a range of guest-physical addresses is, by the numbers of INT 15h, AX=E820h (ACPI 6.5, table 15.3)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    """Tables; RAM once the guest has read them."""


class E820(NamedTuple):
    """A range of guest-physical addresses, and what the guest may do with it."""

    start: int
    size: int
    type: RangeType
