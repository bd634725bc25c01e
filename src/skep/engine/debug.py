"""What a debugger outside the guest asks of one vCPU: where to leave guest code. The guest sees nothing of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Place:
    address: int
    """Linear, and a multiple of ``size``."""
    on: On
    size: int = 1
    """1, 2, 4 or 8 bytes; 1 for EXECUTE."""

    def __post_init__(self) -> None:
        sizes = (1,) if self.on is On.EXECUTE else (1, 2, 4, 8)
        if self.size not in sizes or self.address % self.size or not 0 <= self.address < 1 << 64:
            raise ValueError(f"no place that a processor can watch: {self}")


@dataclass(frozen=True, slots=True)
class Debug:
    """Nothing, unless said otherwise."""

    step: bool = False
    """After one instruction, or some iterations of a repeated one; no interrupt comes before it. Where it raises an
    exception, the translator stops at its handler; KVM, which knows only RFLAGS.TF, where the handler has returned."""
    instruction: bool = False
    """Before the guest executes the breakpoint instruction (on amd64 INT3, of one byte), whoever put it there."""
    places: tuple[Place, ...] = ()
    """While there are any, breakpoints of the guest's own do nothing."""

    def __post_init__(self) -> None:
        if len(self.places) > MOST:
            raise ValueError(f"{len(self.places)} places, and processors watch {MOST}")
