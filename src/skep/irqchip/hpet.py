"""The High Precision Event Timer: one counter, three comparators (IA-PC HPET Specification 1.0a).

The counter is a function of guest time, of 64 bits and 100 MHz. Every comparator can be periodic, and interrupts
through the I/O APIC's pins of PCI, or as legacy replacement: then the first stands in for the 8254's IRQ 0 and the
second for the RTC's IRQ 8, whose own wires are cut (:meth:`Hpet.replaceable`). There is no FSB (MSI) delivery.
Registers and fields are named as in the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.io import IoRegion, IrqLine
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus
    from skep.clock import GuestClock

BASE, SIZE = 0xFED0_0000, 0x400
TIMERS = 3
TICK_NS = 10
MIN_PERIOD_TICKS = 5_000
"""A comparator interrupts no oftener, whatever its period: the minimum clock tick that the ACPI table tells."""
ROUTES = (20, 21, 22, 23)
"""GSIs that a comparator may be wired to."""
LEGACY_GSIS = (0, 8)
"""Of the first two comparators under legacy replacement."""

# Registers; those of timer n are 0x20 * n further.
GCAP_ID, GEN_CONF, GINTR_STA, MAIN_CNT, TIM_CONF, TIM_COMP = 0x00, 0x10, 0x20, 0xF0, 0x100, 0x108

LEG_RT_CAP, COUNT_SIZE_CAP = 1 << 15, 1 << 13
CAPABILITIES = TICK_NS * 1_000_000 << 32 | 0x8086 << 16 | LEG_RT_CAP | COUNT_SIZE_CAP | TIMERS - 1 << 8 | 1
"""GCAP_ID: the period in femtoseconds, a vendor, what it can, how many timers (less one), revision 1."""
ENABLE_CNF, LEG_RT_CNF = 1 << 0, 1 << 1

INT_TYPE, INT_ENB, TYPE, PER_INT_CAP, SIZE_CAP, VAL_SET, MODE32 = (1 << bit for bit in (1, 2, 3, 4, 5, 6, 8))
ROUTE_SHIFT, ROUTE = 9, 0x1F << 9
_CONF_WRITABLE = INT_TYPE | INT_ENB | TYPE | VAL_SET | MODE32 | ROUTE
_CONF_READ_ONLY = sum(1 << gsi for gsi in ROUTES) << 32 | PER_INT_CAP | SIZE_CAP

_ALL = (1 << 64) - 1


class Comparator(Fields):
    """One timer's registers."""

    state_fields: ClassVar[tuple[str, ...]] = ("conf", "comparator", "period", "expected")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.conf = 0
        """The writable bits of TIM_CONF."""
        self.comparator = _ALL
        self.period = 0
        """What a periodic comparator moves on by: the last value written to it."""
        self.expected = 0
        """The count at which it matches next, while the counter runs. Like the counter itself it is not cut to 64 bits,
        so that the counter's coming round is no special case."""

    @property
    def mask(self) -> int:
        return 0xFFFF_FFFF if self.conf & MODE32 else _ALL

    def match_after(self, count: int) -> int:
        """The first count from ``count`` on that matches."""
        return count + (self.comparator - count & self.mask)


class Hpet(Fields):
    """Implements Device and IoRegion. ``line(gsi)`` makes a new wire to an interrupt line."""

    name = "hpet"
    state_fields: ClassVar[tuple[str, ...]] = ("gen_conf", "gintr_sta", "count", "since", "timers")

    def __init__(self, clock: GuestClock, line: Callable[[int], IrqLine]) -> None:
        self._clock = clock
        self.timers = [Comparator() for _ in range(TIMERS)]
        self._alarms = [clock.timer(self._settle) for _ in range(TIMERS)]
        self._wires = [{gsi: line(gsi) for gsi in (*ROUTES, *LEGACY_GSIS[n : n + 1])} for n in range(TIMERS)]
        self._replaced: list[_Replaceable] = []
        self.on_replacement: Callable[[bool], None] = lambda replaces: None
        """Told whether legacy replacement is on, as often as it may have changed."""
        self.reset()

    def replaceable(self, line: IrqLine) -> IrqLine:
        """A wire for one whom legacy replacement cuts off from ``line``."""
        wire = _Replaceable(line)
        self._replaced.append(wire)
        return wire

    # The life of a device.

    def reset(self) -> None:
        self.gen_conf = self.gintr_sta = 0
        self.count = 0
        """MAIN_CNT when it was halted, started or set last."""
        self.since = 0
        """When that was, in ns of guest time; 0 while it is halted."""
        for timer in self.timers:
            timer.reset()
        self._expect_all()

    def pause(self) -> None:
        """The clock stands still while the VM is frozen, so the counter does."""

    def resume(self) -> None:
        """The clock goes on."""

    def loaded(self) -> None:
        for n in range(TIMERS):
            self._arm(n)
        self._drive()

    def close(self) -> None:
        for alarm in self._alarms:
            alarm.close()

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self, SIZE)]

    def attach(self, bus: Bus) -> None:
        bus.add_mmio(BASE, SIZE, self)

    # Counting.

    def _running_count(self) -> int:
        if not self.gen_conf & ENABLE_CNF:
            return self.count
        return self.count + (self._clock.now_ns() - self.since) // TICK_NS

    def _set_count(self, count: int) -> None:
        self.count = count & _ALL
        self.since = self._clock.now_ns() if self.gen_conf & ENABLE_CNF else 0

    def _expect(self, n: int) -> None:
        """Find timer ``n``'s next match, from now on."""
        timer = self.timers[n]
        timer.expected = timer.match_after(self._running_count()) if self.gen_conf & ENABLE_CNF else 0
        self._arm(n)

    def _expect_all(self) -> None:
        for n in range(TIMERS):
            self._expect(n)
        self._drive()

    def _arm(self, n: int) -> None:
        timer = self.timers[n]
        if self.gen_conf & ENABLE_CNF and timer.conf & INT_ENB:
            self._alarms[n].arm(self.since + (timer.expected - self.count) * TICK_NS)
        else:
            self._alarms[n].cancel()

    def _settle(self) -> None:
        """Every match that has come is an interrupt, also where the host's timer is late: before anything changes."""
        if self.gen_conf & ENABLE_CNF:
            now = self._running_count()
            for n, timer in enumerate(self.timers):
                if timer.expected <= now:
                    self._match(n, now)

    def _match(self, n: int, now: int) -> None:
        timer = self.timers[n]
        if timer.conf & TYPE and timer.period:
            periods = (now - timer.expected) // timer.period + 1  # those that were missed are one interrupt
            timer.comparator = timer.comparator + periods * timer.period & timer.mask
            timer.expected += max(periods * timer.period, MIN_PERIOD_TICKS)
        else:
            timer.expected += timer.mask + 1
        self._arm(n)
        if timer.conf & INT_ENB:
            self._interrupt(n)

    # Interrupts.

    def _interrupt(self, n: int) -> None:
        if self.timers[n].conf & INT_TYPE:
            self.gintr_sta |= 1 << n
            self._drive()
        else:
            wire = self._wire(n)
            if wire is not None:
                wire.set(True)
                wire.set(False)

    def _wire(self, n: int) -> IrqLine | None:
        if self.gen_conf & LEG_RT_CNF and n < len(LEGACY_GSIS):
            return self._wires[n][LEGACY_GSIS[n]]
        gsi = (self.timers[n].conf & ROUTE) >> ROUTE_SHIFT
        return self._wires[n][gsi] if gsi in ROUTES else None

    def _drive(self) -> None:
        """Levels, and who owns the legacy wires."""
        replaces = bool(self.gen_conf & LEG_RT_CNF)
        for replaced in self._replaced:
            replaced.connect(not replaces)
        self.on_replacement(replaces)
        for n, timer in enumerate(self.timers):
            asserted = self.gintr_sta >> n & 1 and timer.conf & INT_ENB and self.gen_conf & ENABLE_CNF
            mine = self._wire(n) if asserted else None
            for wire in self._wires[n].values():
                wire.set(wire is mine)

    # Registers. Accesses are of 4 or 8 bytes, aligned (2.3.1); others get the bytes that are there.

    def read(self, offset: int, size: int) -> int:
        self._settle()
        return self._register(offset & ~7) >> 8 * (offset & 7) & (1 << 8 * size) - 1

    def _register(self, offset: int) -> int:
        if offset == MAIN_CNT:
            return self._running_count() & _ALL
        if offset == GCAP_ID:
            return CAPABILITIES
        if offset == GEN_CONF:
            return self.gen_conf
        if offset == GINTR_STA:
            return self.gintr_sta
        n, register = divmod(offset - TIM_CONF, 0x20)
        if not 0 <= n < TIMERS:
            return 0
        timer = self.timers[n]
        if register == TIM_CONF - TIM_CONF:
            return timer.conf | _CONF_READ_ONLY
        if register == TIM_COMP - TIM_CONF:
            return timer.comparator & timer.mask
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._settle()
        shift = 8 * (offset & 7)
        written = ((1 << 8 * size) - 1) << shift & _ALL
        bits = value << shift & _ALL
        offset &= ~7
        if offset == GINTR_STA:  # write 1 to clear
            self.gintr_sta &= ~bits
            self._drive()
        elif offset == GEN_CONF:
            self._write_gen_conf(self.gen_conf & ~written | bits)
        elif offset == MAIN_CNT:
            self._set_count(self._running_count() & ~written | bits)
            self._expect_all()
        else:
            n, register = divmod(offset - TIM_CONF, 0x20)
            if not 0 <= n < TIMERS:
                return
            timer = self.timers[n]
            if register == TIM_CONF - TIM_CONF:
                self._write_conf(n, timer.conf & ~written | bits)
            elif register == TIM_COMP - TIM_CONF:
                self._write_comparator(n, bits, written)

    def _write_gen_conf(self, value: int) -> None:
        count, before = self._running_count(), self.gen_conf
        self.gen_conf = value & (ENABLE_CNF | LEG_RT_CNF)
        if (before ^ value) & ENABLE_CNF:
            self._set_count(count)
            self._expect_all()
        self._drive()

    def _write_conf(self, n: int, value: int) -> None:
        timer = self.timers[n]
        before, timer.conf = timer.conf, value & _CONF_WRITABLE
        if not timer.conf & INT_TYPE:
            self.gintr_sta &= ~(1 << n)  # always 0 for edges
        if (before ^ timer.conf) & MODE32:
            timer.comparator &= timer.mask
            timer.period &= timer.mask
            self._expect(n)
        else:
            self._arm(n)
        self._drive()

    def _write_comparator(self, n: int, bits: int, written: int) -> None:
        """A periodic one takes its period; with VAL_SET, which lasts for one write, the count to begin with too."""
        timer = self.timers[n]
        if not timer.conf & TYPE or timer.conf & VAL_SET:
            timer.comparator = (timer.comparator & ~written | bits) & timer.mask
            self._expect(n)
        if timer.conf & TYPE:
            timer.period = (timer.period & ~written | bits) & timer.mask
        timer.conf &= ~VAL_SET


class _Replaceable:
    """An interrupt line's user that can be cut off. Implements IrqLine; used under the board lock."""

    def __init__(self, line: IrqLine) -> None:
        self._line = line
        self._level = False
        self._connected = True

    def set(self, level: bool) -> None:
        self._level = level
        self._line.set(level and self._connected)

    def connect(self, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            self._line.set(self._level and connected)
