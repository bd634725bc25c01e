"""Between the APICs: messages by destination, end of interrupt, and MSIs (Intel SDM 3, 11.6.2, 11.11)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from skep.locks import Lock

MSI_BASE = 0xFEE0_0000
"""Writes of devices to this MiB are messages to the local APICs."""


class Delivery(enum.IntEnum):
    """Delivery mode: bits 10:8 of the ICR, of redirection entries, of LVT entries and of MSI data."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


class Message(NamedTuple):
    """What one APIC says to others."""

    destination: int
    logical: bool
    delivery: int
    """A :class:`Delivery`; 3 is reserved, and nobody listens to it."""
    vector: int
    level: bool = False
    """Trigger mode: level, so that the end of the interrupt is told to the IOAPICs."""
    wide: bool = False
    """A 32-bit destination, from an x2APIC; all others have 8 bits."""


class Listener(Protocol):
    """A local APIC, as the bus sees it. Everything is called under the board lock."""

    @property
    def enabled(self) -> bool:
        """By IA32_APIC_BASE."""

    def is_addressed(self, message: Message) -> bool: ...

    def processor_priority(self) -> int: ...

    def accept(self, delivery: int, vector: int, level: bool) -> None: ...


class EoiListener(Protocol):
    """An IOAPIC, as the bus sees it."""

    def end_of_interrupt(self, vector: int) -> None: ...


class ApicBus:
    """All APICs of a board. Implements :class:`skep.contracts.io.MsiSink`."""

    def __init__(self, lock: Lock) -> None:
        self.lock = lock
        self.locals: list[Listener] = []
        self.ioapics: list[EoiListener] = []

    def signal(self, address: int, data: int) -> None:
        """A device's MSI, from any thread. What is not addressed to the APICs is lost, as on a board."""
        if address & ~0xF_FFFF != MSI_BASE:
            return
        level = bool(data & 1 << 15)
        if level and not data & 1 << 14:  # deassertion of a level: the APICs act on assertions only
            return
        delivery = data >> 8 & 7
        with self.lock:
            # The redirection hint only says that one processor may be chosen; it acts with lowest priority.
            self.send(Message(address >> 12 & 0xFF, bool(address & 4), delivery, data & 0xFF, level))

    def send(self, message: Message) -> None:
        """To every local APIC that the destination names; lowest priority to one of them. Under the board lock."""
        targets = [apic for apic in self.locals if apic.is_addressed(message)]
        if message.delivery == Delivery.LOWEST_PRIORITY and targets:
            targets = [min(targets, key=lambda apic: apic.processor_priority())]
        for apic in targets:
            apic.accept(message.delivery, message.vector, message.level)

    def pins_changed(self, entries: list[int]) -> None:
        """The I/O APIC's redirection entries have changed. Under the board lock."""

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC ended a level-triggered interrupt: broadcast to the IOAPICs. Under the board lock."""
        for ioapic in self.ioapics:
            ioapic.end_of_interrupt(vector)
