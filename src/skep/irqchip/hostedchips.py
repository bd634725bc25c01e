"""The I/O APIC, the pair of 8259s and the 8254 that the engine has: the board keeps their state, under the names of its
own models, as :mod:`skep.irqchip.hosted` does for the local APICs, and passes on the levels of their wires.

The guest's accesses do not come here, but to the engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skep.irqchip.hosted import HostedApic
from skep.irqchip.ioapic import ENTRY, LEVEL, PINS, REMOTE_IRR, IoApic
from skep.irqchip.lines import PIT_PIN
from skep.irqchip.pic import CASCADE, I8259, Pic
from skep.irqchip.pit import Counter, Pit
from skep.irqchip.resampler import Resampler

if TYPE_CHECKING:
    from skep.clock import GuestClock
    from skep.contracts.interrupts import EngineChips, Registers
    from skep.contracts.io import IrqLine
    from skep.irqchip.apicbus import ApicBus
    from skep.locks import Lock


PCI_PIN = 16
"""The first of those that no ISA interrupt has."""


class LinkedApic(HostedApic):
    """A local APIC whose LINT0 is wired to the 8259 pair inside the engine. The board's copy of the wire is for who
    saves it; the NMI button's is the board's own."""

    def pending(self) -> bool:
        return False

    def set_lint(self, pin: int, level: bool) -> None:
        if pin == 0:
            self.lines = self.lines & ~1 | level
        else:
            super().set_lint(pin, level)


class HostedIoApic(IoApic):
    """``lines`` are the wires as the board's devices drive them. Those that are PCI's alone go by eventfd."""

    def __init__(self, apics: ApicBus, ioapic_id: int, lock: Lock) -> None:
        super().__init__(apics, ioapic_id)
        self._lock = lock
        self._engine: EngineChips | None = None
        self._resampler = Resampler(range(PCI_PIN, PINS), self._wanted, lock)
        self._closed = False

    def adopt(self, engine: EngineChips | None) -> None:
        """Whose it is from now on; None: it is nowhere."""
        with self._lock:
            self._engine = engine
            if engine is not None:
                self._resampler.adopt(engine)
            self.resume()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._resampler.close()

    def _wanted(self, pin: int) -> bool:
        return bool(self.lines >> pin & 1)

    def set_line(self, pin: int, level: bool) -> None:
        """For the 8259 pair, too: the engine has one wire to both."""
        bit = 1 << pin
        self.lines = self.lines | bit if level else self.lines & ~bit
        if pin >= PCI_PIN:
            if level and self._engine is not None:
                self._resampler.assert_line(pin)
        elif self._engine is not None:
            self._engine.set_line(0 if pin == PIT_PIN else pin, level)

    def pause(self) -> None:
        with self._lock:
            if self._engine is not None:
                registers = self._engine.ioapic()
                self.id, self.select = registers["id"], registers["select"]
                self.entries = [entry & ENTRY for entry in registers["entries"]]

    def resume(self) -> None:
        """An edge that was there is not one again."""
        with self._lock:
            if self._engine is not None:
                levels = sum(1 << pin for pin, entry in enumerate(self.entries) if entry & LEVEL) & self.lines
                self._engine.set_ioapic({"id": self.id, "select": self.select, "entries": self.entries}, levels)
                served = (pin for pin, entry in enumerate(self.entries) if entry & REMOTE_IRR or levels >> pin & 1)
                self._resampler.hold(served)


class HostedPic(Pic):
    """Its wires are the I/O APIC's."""

    def __init__(self, lock: Lock) -> None:
        super().__init__()
        self._lock = lock
        self._engine: EngineChips | None = None

    def adopt(self, engine: EngineChips | None) -> None:
        self._engine = engine
        self.resume()

    def set_line(self, irq: int, level: bool) -> None:
        """See :meth:`HostedIoApic.set_line`."""

    def pause(self) -> None:
        with self._lock:
            if self._engine is not None:
                for chip, registers in zip((self.master, self.slave), self._engine.pics(), strict=True):
                    for name, value in registers.items():
                        setattr(chip, name, value)
                # The engine pulses the cascade; here it is a level.
                self.master.irr &= ~(1 << CASCADE)
                self.master.lines &= ~(1 << CASCADE)
                self._slave_changed()
                self._master_changed()

    def resume(self) -> None:
        with self._lock:
            if self._engine is not None:
                self._engine.set_pics(_registers(self.master), _registers(self.slave))


def _registers(chip: I8259) -> Registers:
    return {name: getattr(chip, name) for name in chip.state_fields}


class HostedPit(Pit):
    """Ticks go from the engine's 8254 to its own controllers."""

    def __init__(self, clock: GuestClock, irq0: IrqLine, lock: Lock) -> None:
        """``irq0`` gets no ticks."""
        self._lock = lock
        self._engine: EngineChips | None = None
        self._replaced = False
        super().__init__(clock, irq0)

    def adopt(self, engine: EngineChips | None) -> None:
        self._engine = engine
        self.resume()

    def replace(self, replaced: bool) -> None:
        """The HPET's first comparator stands in for channel 0, or no longer. Under the board lock."""
        if replaced != self._replaced:
            self.pause()
            self._replaced = replaced
            self.resume()

    def loaded(self) -> None:
        """Nothing is armed."""

    def pause(self) -> None:
        with self._lock:
            if self._engine is None:
                return
            counters, speaker = self._engine.pit()
            now = self.now()
            for counter, registers in zip(self.counters, counters, strict=True):
                _take(counter, registers, now)
            self.port_b = self.port_b & ~3 | self.counters[2].gate | speaker << 1
            self.ticked = now
            self.tick_due = self.next_tick()

    def resume(self) -> None:
        with self._lock:
            if self._engine is not None:
                counters = [{name: getattr(one, name) for name in one.state_fields} for one in self.counters]
                self._engine.set_pit(counters, speaker=bool(self.port_b & 2), replaced=self._replaced)


def _take(counter: Counter, registers: Registers, now: int) -> None:
    elapsed = counter.to_ticks(registers.pop("elapsed_ns"))
    for name, value in registers.items():
        setattr(counter, name, value)
    counter.initial, counter.load_at = counter.written, None
    counter.start = now - elapsed
    counter.held = elapsed if not counter.gate and counter.mode not in (1, 5) else None
