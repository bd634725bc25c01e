"""What a vCPU last left guest code for: written as it runs, read when somebody asks what the guest did last.

A guest that dies on its serial console does ten thousand port accesses to say so, and a ring of the last hundred would
hold nothing else. So there is one entry for each different thing (this port, that register), and what is
forgotten is what was not used for longest.
"""

from __future__ import annotations

from typing import NamedTuple

KEPT = 64
_SLACK = 64
"""Entries beyond those kept before any is dropped, so that dropping is rare."""


class ExitRecord(NamedTuple):
    """One kind of exit: what it was, how often it happened, and how it went the last time."""

    what: str
    """"in", "out" (ports), "read", "write" (MMIO), "rdmsr", "wrmsr", "cpuid" or "fault"."""
    where: int
    """The port, guest-physical address, MSR, leaf or vector."""
    times: int
    size: int
    """In bytes, of an access to a port or to MMIO; otherwise 0."""
    value: int | None
    """What was read or written; the address of a #PF, the error code of other faults."""
    rip: int | None
    """None where the engine does not know it. After IN and OUT it is behind the instruction."""

    def __str__(self) -> str:
        value = "" if self.value is None else f" {self.value:#x}"
        rip = "" if self.rip is None else f" at {self.rip:#x}"
        return f"{self.what} {self.where:#x}{value}{rip}, {self.times} times"


class _Entry:
    __slots__ = ("count", "rip", "size", "value", "when")

    def __init__(self) -> None:
        self.count = self.when = self.size = 0
        self.value: int | None = None
        self.rip: int | None = None


class Exits:
    """The last different exits of one vCPU. The engine calls ``note`` on its thread; all else is for any thread."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._refused: dict[tuple[str, int], int] = {}
        self._when = 0

    def note(self, what: str, where: int, size: int = 0, value: int | None = None, rip: int | None = None) -> None:
        key = what, where
        entry = self._entries.get(key)
        if entry is None:
            entry = self._new(key)
        self._when = entry.when = self._when + 1
        entry.count += 1
        entry.size = size
        entry.value = value
        entry.rip = rip

    def note_refused(self, what: str, where: int) -> None:
        """An access to an MSR raised #GP. Those are remembered for good, up to a bound."""
        key = what, where
        if key in self._refused or len(self._refused) < KEPT:
            self._refused[key] = self._refused.get(key, 0) + 1

    def last(self) -> list[ExitRecord]:
        """The most recent last."""
        entries = sorted(self._entries.copy().items(), key=lambda item: item[1].when)
        return [ExitRecord(*key, one.count, one.size, one.value, one.rip) for key, one in entries[-KEPT:]]

    def refused(self) -> dict[tuple[str, int], int]:
        """("rdmsr" or "wrmsr", MSR) -> how often it raised #GP."""
        return self._refused.copy()

    def _new(self, key: tuple[str, int]) -> _Entry:
        if len(self._entries) >= KEPT + _SLACK:
            self._entries = dict(sorted(self._entries.items(), key=lambda item: item[1].when)[-KEPT:])
        entry = self._entries[key] = _Entry()
        return entry
