"""The shape of an explanation, and of what it is made from."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skep.config import Tree
from skep.engine.exits import ExitRecord
from skep.explain.findings import Finding
from skep.explain.symbols import SystemMap
from skep.memory import GuestMemory


class Cause(enum.Enum):
    """What a guest is explained for; the value begins a sentence."""

    TRIPLE_FAULT = "the guest had a triple fault"
    PANIC = "the guest's kernel panicked"
    HALTED = "the guest halted with interrupts off; nothing but a reset will wake it"
    SILENT = "the guest says nothing"
    MUTE = "the guest has not said anything yet"
    """Which may be quite right: it is a failure if there are findings."""
    ASKED = "the guest, as it is now"


class Activity(enum.Enum):
    """What a processor was doing; the value is said of it."""

    NOT_STARTED = "was not started"
    HALTED = "halted with interrupts off"
    IDLE = "sleeps until an interrupt comes"
    SPINNING = "spins"
    RUNNING = "runs"
    FAULTED = "faulted"
    DEAF = "does not stop"
    """For us to look at; ours to explain."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One processor as it was found."""

    index: int
    activity: Activity
    registers: Mapping[str, Any]
    """As :meth:`skep.engine.contract.Vcpu.get_state` gives them; empty where there are none."""
    places: tuple[int, ...] = ()
    """rip at several moments, the last one now."""
    exits: tuple[ExitRecord, ...] = ()
    refused: Mapping[tuple[str, int], int] | None = None


@dataclass(frozen=True, slots=True)
class Subject:
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


@dataclass(frozen=True, slots=True)
class Frame:
    """An address in the code, and its name."""

    address: int
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.address:#x}" if self.name is None else f"{self.name} ({self.address:#x})"


@dataclass(frozen=True, slots=True)
class Processor:
    """One processor, explained."""

    index: int
    activity: Activity
    registers: Mapping[str, Any]
    at: Frame
    """Where it is."""
    mode: str
    """"64-bit kernel", "32-bit user", "real mode" and so on."""
    interrupts_on: bool
    places: tuple[str, ...]
    """The functions (or addresses) in which it was at several moments."""
    code: tuple[str, ...]
    """The instructions from ``at`` on."""
    stack: tuple[Frame, ...]
    """Where it was called from, the innermost first."""
    stack_is_sure: bool
    """A chain of frame pointers; otherwise it is all that looks like a return address, some of it left over."""
    broken: tuple[str, ...]
    """What keeps exceptions from being delivered to it."""
    exits: tuple[ExitRecord, ...]
    """What it last left guest code for, the most recent last."""
    refused: Mapping[tuple[str, int], int]
    """("rdmsr" or "wrmsr", MSR) -> how often it got #GP for it."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a guest does not go on, as far as can be told. Its ``str`` is a report of at most 40 lines."""

    cause: Cause
    summary: str
    """One line."""
    findings: tuple[Finding, ...]
    """What is probably wrong and what to do, the most telling first."""
    processors: tuple[Processor, ...]
    culprit: int
    """The index of the processor to look at first."""
    unanswered: Mapping[tuple[str, int], int]
    """("port" or "mmio", address) that no device answered -> times."""
    owners: Mapping[tuple[str, int], str]
    """Whose the addresses in ``exits`` are."""
    functions: Mapping[int, str]
    """Names of the addresses in ``exits``."""
    said: tuple[str, ...]
    """The last lines on the guest's consoles."""
    log: tuple[str, ...]
    """The kernel's log, read from the guest's memory."""
    symbols: str
    """Where the names of functions come from, or why there are none."""

    def __str__(self) -> str:
        from skep.explain.report import lines

        return "\n".join(lines(self))
