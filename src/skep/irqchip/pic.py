"""The PC's pair of 8259A interrupt controllers, the slave on the master's input 2, with the ELCRs.

Intel 8259A data sheet (231468); the ELCR (edge/level control registers) is the chipsets', ICH9 data sheet 13.4.
Two deviations that all PC chipsets share: an edge stays latched in IRR when its line falls before the acknowledge,
and LTIM in ICW1 is replaced by the ELCR's bit per line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.device import Passive
from skep.contracts.io import IoRegion
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus

CASCADE = 2
"""The master's input that carries the slave's output."""


class I8259(Fields):
    """One 8259A. Bit n of ``irr``, ``isr``, ``imr``, ``lines`` and ``elcr`` belongs to input n."""

    state_fields: ClassVar[tuple[str, ...]] = (
        "irr", "isr", "imr", "lines", "elcr", "vector_base", "lowest", "expected_icw", "icw4_follows", "single",
        "auto_eoi", "rotate_in_aeoi", "special_mask", "fully_nested", "poll", "read_isr",
    )  # fmt: skip

    def __init__(self, name: str, changed: Callable[[], None], cascade: int, elcr_mask: int) -> None:
        """``changed`` is called when the INT output may have changed; ``cascade`` has the bits of inputs that carry
        another 8259; ``elcr_mask`` the bits of inputs that may be level-triggered."""
        self.name = name
        self._changed = changed
        self._cascade = cascade
        self._elcr_mask = elcr_mask
        self.lines = 0
        self.reset()

    def reset(self) -> None:
        """As a PC's firmware leaves it: everything masked. The lines belong to those who drive them."""
        self.elcr = 0
        self.vector_base = 0
        self.expected_icw = 0
        self._initialize()
        self.imr = 0xFF

    def _initialize(self) -> None:
        """What ICW1 does (data sheet, "Initialization command words 1 and 2")."""
        self.irr = self.lines & self._level_triggered()
        self.isr = self.imr = 0
        self.lowest = 7
        self.icw4_follows = self.single = False
        self.auto_eoi = self.rotate_in_aeoi = self.special_mask = self.fully_nested = False
        self.poll = self.read_isr = False

    # The wires.

    def set_line(self, number: int, level: bool) -> None:
        bit = 1 << number
        if level:
            if not self.lines & bit:
                self.lines |= bit
                self.irr |= bit
                self._changed()
        elif self.lines & bit:
            self.lines &= ~bit
            if self._level_triggered() & bit:
                self.irr &= ~bit
                self._changed()

    def requested(self) -> int:
        """The input that INT is raised for, or -1."""
        asking = self.irr & ~self.imr
        if not asking:
            return -1
        serving = self.isr
        if self.special_mask:
            serving &= ~self.imr
        if self.fully_nested:
            serving &= ~self._cascade
        rank = self._rank(asking)
        return (self.lowest + 1 + rank) & 7 if rank < self._rank(serving) else -1

    def acknowledge(self) -> int:
        """INTA: the input to be served; 7 where the request went away ("Edge and level triggered modes")."""
        number = self.requested()
        if number < 0:
            return 7
        bit = 1 << number
        if not self._level_triggered() & bit:
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_in_aeoi:
            self.lowest = number
        return number

    def _level_triggered(self) -> int:
        """The inputs whose IRR bit is the line itself; a slave's output behaves so, as it pulses for each request."""
        return self.elcr | self._cascade

    def _rank(self, bits: int) -> int:
        """The priority, 0 the highest, of the most urgent input in ``bits``; 8 if there is none."""
        first = (self.lowest + 1) & 7
        turned = (bits >> first | bits << 8 - first) & 0xFF
        return (turned & -turned).bit_length() - 1 if turned else 8

    # The ports: offset 0 is A0 = 0.

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return self._read(offset) | (self.read(offset + 1, size - 1) << 8 if size > 1 else 0)
        return self._read(offset)

    def _read(self, offset: int) -> int:
        if offset > 1:
            return 0xFF
        if self.poll:
            self.poll = False
            if self.requested() < 0:
                return 0
            number = self.acknowledge()
            self._changed()
            return 0x80 | number
        if offset == 1:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(min(size, 2 - offset)):
            byte = value >> 8 * i & 0xFF
            if offset + i == 1:
                self._write_data(byte)
            elif byte & 0x10:
                self._initialize()
                self.icw4_follows, self.single = bool(byte & 1), bool(byte & 2)
                self.expected_icw = 2
            elif byte & 0x08:
                self._write_ocw3(byte)
            else:
                self._write_ocw2(byte)
        self._changed()

    def _write_data(self, value: int) -> None:
        if self.expected_icw == 0:  # OCW1
            self.imr = value
        elif self.expected_icw == 2:
            self.vector_base = value & 0xF8
            self.expected_icw = 3 if not self.single else 4 if self.icw4_follows else 0
        elif self.expected_icw == 3:  # the cascade is wired, whatever ICW3 says
            self.expected_icw = 4 if self.icw4_follows else 0
        else:
            self.auto_eoi, self.fully_nested = bool(value & 0x02), bool(value & 0x10)
            self.expected_icw = 0

    def _write_ocw2(self, value: int) -> None:
        rotate, specific, eoi = value & 0x80, value & 0x40, value & 0x20
        number = value & 7
        if not eoi and not specific:
            self.rotate_in_aeoi = bool(rotate)
            return
        if eoi and not specific:
            # In special mask mode a masked input's ISR bit is not cleared by a non-specific EOI.
            rank = self._rank(self.isr & ~self.imr if self.special_mask else self.isr)
            if rank == 8:
                return
            number = (self.lowest + 1 + rank) & 7
        if eoi:
            self.isr &= ~(1 << number)
        if rotate:
            self.lowest = number

    def _write_ocw3(self, value: int) -> None:
        if value & 0x40:
            self.special_mask = bool(value & 0x20)
        if value & 0x04:
            self.poll = True
        elif value & 0x02:
            self.read_isr = bool(value & 0x01)

    def write_elcr(self, value: int) -> None:
        self.elcr = value & self._elcr_mask
        level = self._level_triggered()
        self.irr = self.irr & ~level | self.lines & level
        self._changed()


class _Elcr:
    """Ports 0x4d0 and 0x4d1."""

    def __init__(self, chips: Sequence[I8259]) -> None:
        self._chips = chips

    def read(self, offset: int, size: int) -> int:
        value = 0
        for i in range(size):
            value |= (self._chips[offset + i].elcr if offset + i < 2 else 0xFF) << 8 * i
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(min(size, 2 - offset)):
            self._chips[offset + i].write_elcr(value >> 8 * i & 0xFF)


class Pic(Passive, Fields):
    """Both chips. ``output`` is called, under the board lock, with every change of the master's INT."""

    name = "pic"
    state_fields: ClassVar[tuple[str, ...]] = ("master", "slave")

    def __init__(self) -> None:
        self.output: Callable[[bool], None] = lambda level: None
        self._level = False
        self.slave = I8259("pic.slave", self._slave_changed, 0, 0xDE)  # not 8 (RTC), not 13 (FPU)
        self.master = I8259("pic.master", self._master_changed, 1 << CASCADE, 0xF8)  # not 0 (PIT), 1 (keyboard), 2
        self.elcr = _Elcr((self.master, self.slave))

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self.master, 2), (self.slave, 2), (self.elcr, 2)]

    def attach(self, bus: Bus) -> None:
        bus.add_ports(0x20, 2, self.master)
        bus.add_ports(0xA0, 2, self.slave)
        bus.add_ports(0x4D0, 2, self.elcr, self.name)

    def set_line(self, irq: int, level: bool) -> None:
        """IRQ 0 to 15, under the board lock; 2 is the cascade and not to be had."""
        if irq < 8:
            self.master.set_line(irq, level)
        else:
            self.slave.set_line(irq - 8, level)

    def acknowledge(self) -> int:
        """The vector of the request that INT stands for; a spurious one if it went away."""
        number = self.master.acknowledge()
        chip = self.master
        if number == CASCADE:
            chip = self.slave
            number = chip.acknowledge()
            self._slave_changed()
        self._master_changed()
        return chip.vector_base + number

    def _slave_changed(self) -> None:
        self.master.set_line(CASCADE, self.slave.requested() >= 0)

    def _master_changed(self) -> None:
        level = self.master.requested() >= 0
        if level != self._level:
            self._level = level
            self.output(level)

    def reset(self) -> None:
        self.slave.reset()
        self.master.reset()
        self._slave_changed()
        self._master_changed()

    def loaded(self) -> None:
        self._master_changed()
