"""What is explained: a VM that stands still, and what is known of it from outside."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from skep.config import Tree
    from skep.engine.exits import ExitRecord
    from skep.explain.symbols import SystemMap
    from skep.memory import GuestMemory

PANIC = "Kernel panic - not syncing: "
"""With which a Linux that cannot go on begins to say why."""


class Cause(enum.Enum):
    """What a guest is explained for; the value begins a sentence."""

    TRIPLE_FAULT = "the guest had a triple fault"
    ENGINE_FAILED = "the engine cannot go on with the guest"
    PANIC = "the guest's kernel panicked"
    HALTED = "the guest halted with interrupts off; nothing but a reset will wake it"
    SILENT = "the guest says nothing"
    MUTE = "the guest has not said anything yet"
    """Which may be quite right: it is a failure if there are findings."""
    ASLEEP = "the guest suspended to RAM; its clock's alarm or the power button wakes it"
    ASKED = "the guest, as it is now"


class Activity(enum.Enum):
    """What a processor was doing; the value is said of it."""

    NOT_STARTED = "was not started"
    HALTED = "halted with interrupts off"
    IDLE = "sleeps until an interrupt comes"
    SPINNING = "spins"
    RUNNING = "runs"
    FAULTED = "faulted"
    STOPPED = "was stopped"
    """By its engine, which cannot go on."""


class Seen:
    """One processor as it was found."""

    __slots__ = ("activity", "exits", "index", "places", "refused", "registers")

    def __init__(
        self,
        index: int,
        activity: Activity,
        registers: Mapping[str, Any],
        places: tuple[int, ...] = (),
        exits: tuple[ExitRecord, ...] = (),
        refused: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        self.index = index
        self.activity = activity
        self.registers = registers
        """As :meth:`skep.engine.contract.Vcpu.get_state` gives them; empty where there are none."""
        self.places = places
        """rip at several moments, the last one now."""
        self.exits = exits
        self.refused = refused


class Subject(NamedTuple):
    """A VM that stands still, and what is known of it from outside."""

    cause: Cause
    tree: Tree
    """Frozen."""
    memory: GuestMemory
    processors: Sequence[Seen]
    unanswered: Mapping[tuple[str, int], int]
    """:attr:`skep.bus.Bus.unknown`."""
    owners: Mapping[tuple[str, int], str]
    """("port" or "mmio", address) -> the device there."""
    said: str
    """The end of the consoles' output."""
    silent_for: float = 0.0
    """Seconds since the guest last said anything."""
    system_map: SystemMap | None = None
