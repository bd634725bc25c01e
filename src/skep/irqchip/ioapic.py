"""The I/O APIC: 24 pins, each with a redirection entry (Intel 82093AA data sheet).

It says it is of version 0x20, which has the EOI register besides (ICH9 data sheet 13.5.7). An edge at a masked pin is
lost, as the data sheet has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from skep.contracts.device import Passive
from skep.contracts.io import IoRegion
from skep.irqchip.apicbus import ApicBus, Delivery, Message
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus

BASE = 0xFEC0_0000
PINS = 24
_IOREGSEL, _IOWIN, _EOI = 0x00, 0x10, 0x40
_IOAPICID, _IOAPICVER, _IOAPICARB, _IOREDTBL = 0x00, 0x01, 0x02, 0x10

# A redirection entry.
VECTOR, DELIVERY_SHIFT, LOGICAL = 0xFF, 8, 1 << 11
LOW_ACTIVE, REMOTE_IRR, LEVEL, MASKED = 1 << 13, 1 << 14, 1 << 15, 1 << 16
_WRITABLE = 0xFF00_0000_0001_AFFF  # not delivery status and remote IRR
ENTRY = _WRITABLE | REMOTE_IRR
"""All of it that is state."""


class IoApic(Passive, Fields):
    """``lines`` are the wires as their devices drive them, true when asserted: an entry's polarity says how the
    signal looks on the board, of which there is none."""

    name = "ioapic"
    state_fields: ClassVar[tuple[str, ...]] = ("id", "select", "entries", "lines")

    def __init__(self, apics: ApicBus, ioapic_id: int = 0) -> None:
        self._apics = apics
        self._id = ioapic_id
        self.lines = 0
        apics.ioapics.append(self)
        self.reset()

    def reset(self) -> None:
        self.id = self._id
        self.select = 0
        self.entries = [MASKED] * PINS
        self._apics.pins_changed(self.entries)

    def loaded(self) -> None:
        self._apics.pins_changed(self.entries)

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self, 0x1000)]

    def attach(self, bus: Bus) -> None:
        bus.add_mmio(BASE, 0x1000, self)

    def set_line(self, pin: int, level: bool) -> None:
        """Under the board lock."""
        bit = 1 << pin
        if level == bool(self.lines & bit):
            return
        self.lines ^= bit
        if level:
            self._send(pin)

    def end_of_interrupt(self, vector: int) -> None:
        """A level-triggered interrupt ended: every entry of that vector may ask again."""
        for pin, entry in enumerate(self.entries):
            if entry & REMOTE_IRR and entry & VECTOR == vector:
                self.entries[pin] = entry & ~REMOTE_IRR
                self._send_if_level(pin)

    def _send_if_level(self, pin: int) -> None:
        """The entry changed: a level that waited at the pin may be heard now."""
        if self.entries[pin] & LEVEL and self.lines >> pin & 1:
            self._send(pin)

    def _send(self, pin: int) -> None:
        """The pin has an edge, or is asserted and level-triggered."""
        entry = self.entries[pin]
        if entry & MASKED:
            return
        delivery = entry >> DELIVERY_SHIFT & 7
        # Only fixed and lowest priority have an end that would clear remote IRR.
        level = bool(entry & LEVEL) and delivery in (Delivery.FIXED, Delivery.LOWEST_PRIORITY)
        if level:
            if entry & REMOTE_IRR:
                return
            self.entries[pin] = entry | REMOTE_IRR
        self._apics.send(Message(entry >> 56, bool(entry & LOGICAL), delivery, entry & VECTOR, level))

    # Registers: two windows and the EOI register.

    def read(self, offset: int, size: int) -> int:
        register, within = offset & ~0xF, offset & 0xF
        if register == _IOREGSEL:
            value = self.select
        elif register == _IOWIN:
            value = self._read_selected()
        else:
            value = 0
        return value >> 8 * within & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFFFF_FFFF
        if offset == _IOREGSEL:
            self.select = value & 0xFF
        elif offset == _IOWIN and size >= 4:
            self._write_selected(value)
        elif offset == _EOI:
            self.end_of_interrupt(value & 0xFF)

    def _read_selected(self) -> int:
        if self.select == _IOAPICVER:
            return (PINS - 1) << 16 | 0x20
        if self.select in (_IOAPICID, _IOAPICARB):
            return self.id << 24
        pin, high = divmod(self.select - _IOREDTBL, 2)
        return self.entries[pin] >> 32 * high & 0xFFFF_FFFF if 0 <= pin < PINS else 0

    def _write_selected(self, value: int) -> None:
        if self.select == _IOAPICID:
            self.id = value >> 24 & 0xF
            return
        pin, high = divmod(self.select - _IOREDTBL, 2)
        if not 0 <= pin < PINS:
            return
        entry = self.entries[pin]
        if high:
            entry = entry & 0xFFFF_FFFF | (value << 32 & _WRITABLE)
        else:
            entry = entry & ~(_WRITABLE & 0xFFFF_FFFF) | value & _WRITABLE
            if not entry & LEVEL:
                entry &= ~REMOTE_IRR  # as the 82093AA does; Linux's workaround for a stuck one relies on it
        self.entries[pin] = entry
        self._apics.pins_changed(self.entries)
        self._send_if_level(pin)
