"""What a debugger outside the guest asks of one vCPU: where to leave guest code. The guest sees nothing of it."""

from __future__ import annotations

import enum

MOST = 4
"""Places at a time: what processors have registers for."""


class On(enum.Enum):
    """What stops a vCPU at a place."""

    EXECUTE = "execute"
    """The instruction that begins there, before it."""
    WRITE = "write"
    """A write to any of its bytes, behind the instruction that did it."""
    ACCESS = "access"
    """A read or a write; likewise."""


class Place:
    """Does not change."""

    __slots__ = ("address", "on", "size")

    def __init__(self, address: int, on: On, size: int = 1) -> None:
        """``address`` is linear, and a multiple of ``size``: 1, 2, 4 or 8 bytes; 1 for EXECUTE. Raises ValueError."""
        sizes = (1,) if on is On.EXECUTE else (1, 2, 4, 8)
        if size not in sizes or address % size or not 0 <= address < 1 << 64:
            raise ValueError(f"no place that a processor can watch: {size} bytes at {address:#x}, {on.value}")
        self.address = address
        self.on = on
        self.size = size


class Debug:
    """What is asked for; false if nothing is. Does not change."""

    __slots__ = ("instruction", "places", "step")

    def __init__(self, step: bool = False, instruction: bool = False, places: tuple[Place, ...] = ()) -> None:
        """Raises ValueError for more than ``MOST`` places."""
        if len(places) > MOST:
            raise ValueError(f"{len(places)} places, and processors watch {MOST}")
        self.step = step
        """After one instruction, or some iterations of a repeated one; no interrupt comes before it. Where it raises an
        exception, the translator stops at its handler; KVM, which knows only RFLAGS.TF, where the handler has
        returned."""
        self.instruction = instruction
        """Before the guest executes the breakpoint instruction (on amd64 INT3, of one byte), whoever put it there."""
        self.places = places
        """While there are any, breakpoints of the guest's own do nothing."""

    def __bool__(self) -> bool:
        return self.step or self.instruction or bool(self.places)
