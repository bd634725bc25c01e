"""Interrupt wires of a PC board: one number, the GSI, for an input of both the 8259 pair and the I/O APIC."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from skep.contracts.device import Passive
from skep.irqchip.ioapic import PINS
from skep.state import Fields

if TYPE_CHECKING:
    from skep.irqchip.ioapic import IoApic
    from skep.irqchip.pic import Pic
    from skep.locks import Lock

PIT_PIN = 2
"""The I/O APIC's pin of ISA IRQ 0. IRQ 2 is the 8259 pair's own, so the pin is free (MADT: an override)."""


class GsiLine:
    """One GSI. Several sources may share it, and it is asserted while any of them asserts (a wired OR).

    GSIs 0 to 15 are the ISA IRQs and reach the 8259 pair too; the software uses one of the two controllers.
    """

    def __init__(self, gsi: int, pic: Pic, ioapic: IoApic, lock: Lock) -> None:
        self.gsi = gsi
        self.lock = lock
        self._pic = pic
        self._ioapic = ioapic
        self._pin = PIT_PIN if gsi == 0 else gsi
        self.asserting = 0  # how many sources

    def source(self) -> Source:
        """A new wire to this line, for one device."""
        return Source(self)

    def change(self, level: bool) -> None:
        """One more, or one fewer, source asserts."""
        self.asserting += 1 if level else -1
        if self.asserting == level:  # the first one, or the last
            if self.gsi < 16:
                self._pic.set_line(self.gsi, level)
            self._ioapic.set_line(self._pin, level)


class Source:
    """A device's end of a line. Implements :class:`skep.contracts.io.IrqLine`."""

    __slots__ = ("_level", "_line")

    def __init__(self, line: GsiLine) -> None:
        self._line = line
        self._level = False

    @property
    def level(self) -> bool:
        return self._level

    def load(self, level: bool) -> None:
        self._level = level
        self._line.asserting += level

    def set(self, level: bool) -> None:
        level = bool(level)
        if level == self._level:  # the usual case, on every access to a device; its own thread's last word
            return
        with self._line.lock:
            if level != self._level:
                self._level = level
                self._line.change(level)


class GsiLines(Passive, Fields):
    """All of a board's lines: ``lines.source(4)`` is COM1's IRQ."""

    name = "lines"
    state_fields: ClassVar[tuple[str, ...]] = ("levels",)

    def __init__(self, pic: Pic, ioapic: IoApic, lock: Lock) -> None:
        self._lines = [GsiLine(gsi, pic, ioapic, lock) for gsi in range(PINS)]
        self._sources: list[Source] = []

    def source(self, gsi: int) -> Source:
        self._sources.append(self._lines[gsi].source())
        return self._sources[-1]

    def reset(self) -> None:
        """They belong to those who drive them."""

    @property
    def levels(self) -> list[bool]:
        """What each source says, in the order in which they were made. Loading tells no controller: what these knew of
        their lines is loaded by themselves."""
        return [source.level for source in self._sources]

    @levels.setter
    def levels(self, levels: list[bool]) -> None:
        for line in self._lines:
            line.asserting = 0
        for source, level in zip(self._sources, levels, strict=True):
            source.load(level)
