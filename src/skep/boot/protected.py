"""Segments of the processor state that 32-bit boot protocols begin with."""

from __future__ import annotations

from skep.engine.amd64.registers import Attr, Segment


def flat_segments(code: int, data: int) -> tuple[Segment, Segment]:
    """CS, and what the others are, of 4 GiB from 0, under these selectors."""
    flat = Attr.P | Attr.S | Attr.G | Attr.D | Attr.ACCESSED
    return (
        {"selector": code, "base": 0, "limit": 0xFFFFFFFF, "attributes": flat | Attr.CODE | Attr.READABLE},
        {"selector": data, "base": 0, "limit": 0xFFFFFFFF, "attributes": flat | Attr.WRITABLE},
    )
