"""The shape of an explanation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from skep.engine.exits import ExitRecord
from skep.explain.findings import Finding
from skep.explain.report import lines
from skep.explain.subject import Activity, Cause


class Frame(NamedTuple):
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
        return "\n".join(lines(self))
