"""The 8254 interval timer, and port 0x61 that goes with it (Intel data sheets: 8254; ICH9, 13.3 and 13.7.1).

Nothing decrements a counter: its count and its output are functions of guest time since its count was loaded.
Channel 0 drives IRQ 0 through a host timer; channel 2 is polled through port 0x61. Two deviations: a count is loaded
at once, not with the next clock; and in mode 3 a new count waits for the end of the cycle, not of its half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from skep.contracts.io import IoRegion, IrqLine
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus
    from skep.clock import GuestClock

PIT_HZ = 1_193_182
MAX_LOST_TICKS = 20
"""Ticks of channel 0 that are made up for when the host was late; more would only pile up, and are dropped."""
MIN_PERIOD_NS = 50_000
"""Channel 0 interrupts no oftener, whatever its count."""

_NS = 1_000_000_000
_REFRESH_NS = 15_085  # half a period of port 0x61's refresh bit

_LATCH, _LOW, _HIGH, _BOTH = range(4)  # RW: bits 5:4 of a control word


class Counter(Fields):
    """One of the three. Times are in ticks of the counter's clock."""

    state_fields: ClassVar[tuple[str, ...]] = (
        "mode", "access", "bcd", "gate", "written", "initial", "start", "held", "load_at",
        "low_byte", "write_high", "read_high", "latched_count", "latched_status",
    )  # fmt: skip

    def __init__(self, gate: bool) -> None:
        self._gate_at_reset = gate
        self.reset()

    def reset(self) -> None:
        """The data sheet leaves it undefined. Here: as after a control word, no count written."""
        self.gate = self._gate_at_reset
        self.latched_count: int | None = None
        self.latched_status: int | None = None
        self.program(_BOTH, 3, False)

    def program(self, access: int, mode: int, bcd: bool) -> None:
        """A control word: the counter stops until a count is written."""
        self.access = access
        self.mode = mode if mode < 6 else mode - 4
        self.bcd = bcd
        self.written = 0
        """The count in the count register, 1 to 0x10000; 0: none was written since the control word."""
        self.initial = 0
        """The count that was loaded into the counting element last; 0: none yet."""
        self.start = 0
        """When it was loaded."""
        self.held: int | None = None
        """How long it had counted when its gate fell."""
        self.load_at: int | None = None
        """Modes 2 and 3: the end of the cycle, when what was written meanwhile is loaded."""
        self.low_byte = 0
        self.write_high = self.read_high = False

    @staticmethod
    def to_ticks(ns: int) -> int:
        return ns * PIT_HZ // _NS

    def _load(self, now: int) -> None:
        self.initial, self.start, self.load_at = self.written, now, None
        self.held = 0 if not self.gate and self.mode not in (1, 5) else None

    def settle(self, now: int) -> None:
        """Load what waited for the end of a cycle, if that is past. Before any question about ``now``."""
        if self.load_at is not None and now >= self.load_at:
            self._load(self.load_at)

    def elapsed(self, now: int) -> int:
        return self.held if self.held is not None else now - self.start

    def count(self, now: int) -> int:
        """The counting element as it is read: 16 bits, or four digits."""
        n, elapsed = self.initial, self.elapsed(now)
        if not n:
            value = 0
        elif self.mode == 2:
            value = n - elapsed % n
        elif self.mode == 3:  # by two, from an even number, twice a cycle
            within, half = elapsed % n, (n + 1) // 2
            value = (n & ~1) - 2 * (within if within < half else within - half)
        else:
            value = n - elapsed
        return _to_bcd(value % 10_000) if self.bcd else value & 0xFFFF

    def output(self, now: int) -> bool:
        n, elapsed = self.initial, self.elapsed(now)
        if self.mode == 0:
            return bool(n) and elapsed >= n
        if not n:
            return True
        if self.mode == 1:
            return elapsed >= n
        if self.mode == 2:
            return not self.gate or elapsed % n != n - 1
        if self.mode == 3:
            return not self.gate or elapsed % n < (n + 1) // 2
        return elapsed != n

    def set_gate(self, level: bool, now: int) -> None:
        if level == self.gate:
            return
        self.gate = level
        if self.mode in (1, 5):
            if level and self.written:
                self._load(now)
        elif not level:
            self.held = self.elapsed(now)
        elif self.mode in (0, 4):  # goes on
            self.start, self.held = now - self.elapsed(now), None
        elif self.written:  # begins anew
            self._load(now)

    # The port.

    def read(self, now: int) -> int:
        if self.latched_status is not None:
            status, self.latched_status = self.latched_status, None
            return status
        value = self.count(now) if self.latched_count is None else self.latched_count
        high = self.access == _HIGH or (self.access == _BOTH and self.read_high)
        if self.access == _BOTH:
            self.read_high = not self.read_high
        if not self.read_high:
            self.latched_count = None
        return value >> 8 if high else value & 0xFF

    def write(self, value: int, now: int) -> None:
        if self.access == _BOTH and not self.write_high:
            self.low_byte, self.write_high = value, True
            if self.mode == 0:  # the first byte stops it
                self.initial = 0
            return
        if self.access == _BOTH:
            value = value << 8 | self.low_byte
        elif self.access == _HIGH:
            value <<= 8
        self.write_high = False
        self.written = (_from_bcd(value) or 10_000) if self.bcd else value or 0x10000
        if self.mode in (2, 3) and self.initial and self.held is None:
            self.load_at = now + self.initial - self.elapsed(now) % self.initial
        elif self.mode not in (1, 5):  # those wait for the gate
            self._load(now)

    def latch_count(self, now: int) -> None:
        if self.latched_count is None:
            self.latched_count = self.count(now)

    def latch_status(self, now: int) -> None:
        if self.latched_status is None:
            null_count = not self.initial or self.initial != self.written
            self.latched_status = (
                self.output(now) << 7 | null_count << 6 | self.access << 4 | self.mode << 1 | int(self.bcd)
            )

    def rise(self, after: int) -> int | None:
        """When the output of a counter whose gate is high goes high next, later than ``after``; None: never."""
        n = self.initial
        if not n or self.mode in (1, 5):
            return None
        if self.mode in (2, 3):
            rise = self.start + ((after - self.start) // n + 1) * n
            return rise if self.load_at is None else min(rise, self.load_at)
        rise = self.start + n + (self.mode == 4)
        return rise if rise > after else None


class Pit(Fields):
    """The chip. ``irq0`` is channel 0's output, which rises for each tick."""

    name = "pit"
    state_fields: ClassVar[tuple[str, ...]] = ("counters", "port_b", "ticked", "tick_due")

    def __init__(self, clock: GuestClock, irq0: IrqLine) -> None:
        self._clock = clock
        self._irq0 = irq0
        self._timer = clock.timer(self._tick)
        self.counters = [Counter(gate=True), Counter(gate=True), Counter(gate=False)]
        self.speaker = _PortB(self)
        self.reset()

    def reset(self) -> None:
        for counter in self.counters:
            counter.reset()
        self.port_b = 0
        """Port 0x61's writable bits."""
        self.ticked = 0
        """Until when channel 0's ticks were given."""
        self.tick_due: int | None = None
        """When the next is due, in ns."""
        self._timer.cancel()
        self._irq0.set(False)

    def pause(self) -> None:
        """The clock stands still while the VM is frozen, so the counters do."""

    def resume(self) -> None:
        """The clock goes on."""

    def close(self) -> None:
        self._timer.close()

    def loaded(self) -> None:
        self._irq0.set(self.counters[0].output(self.now()))
        self._arm(self.tick_due)

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self, 4), (self.speaker, 1)]

    def attach(self, bus: Bus) -> None:
        bus.add_ports(0x40, 4, self)
        bus.add_ports(0x61, 1, self.speaker, self.name)

    def now(self) -> int:
        """Guest time in ticks."""
        return self._clock.now_ns() * PIT_HZ // _NS

    # Ports 0x40-0x43.

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return sum(self.read(offset + i, 1) << 8 * i for i in range(size))
        if offset > 2:
            return 0xFF
        now = self.now()
        counter = self.counters[offset]
        counter.settle(now)
        return counter.read(now)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            for i in range(size):
                self.write(offset + i, 1, value >> 8 * i & 0xFF)
        elif offset < 3:
            now = self.now()
            counter = self.counters[offset]
            counter.settle(now)
            counter.write(value, now)
            if offset == 0:
                self._restart(now)
        elif offset == 3:
            self._write_control(value)

    def _write_control(self, value: int) -> None:
        select, access = value >> 6, value >> 4 & 3
        now = self.now()
        for number, counter in enumerate(self.counters):
            counter.settle(now)
            if select == 3:  # read-back: bits 5 and 4 are low for what is wanted
                if value >> number & 2:
                    if not value & 0x20:
                        counter.latch_count(now)
                    if not value & 0x10:
                        counter.latch_status(now)
            elif select == number:
                if access == _LATCH:
                    counter.latch_count(now)
                else:
                    counter.program(access, value >> 1 & 7, bool(value & 1))
                    if number == 0:
                        self._restart(now)

    # Channel 0's interrupt.

    def _restart(self, now: int) -> None:
        """Channel 0 was programmed: what it owed is forgotten."""
        self.ticked = now
        self._irq0.set(self.counters[0].output(now))
        self._arm(_to_ns(self.counters[0].rise(now)))

    def _tick(self) -> None:
        """On the clock's thread, under the board lock."""
        now, now_ns = self.now(), self._clock.now_ns()
        counter = self.counters[0]
        due = counter.rise(self.ticked)
        if due is None or due > now:
            self._arm(_to_ns(due))
            return
        if counter.mode in (2, 3):
            self.ticked = max(due, now - MAX_LOST_TICKS * counter.initial)
        else:
            self.ticked = due
        counter.settle(self.ticked)
        self._irq0.set(False)
        self._irq0.set(True)
        following = _to_ns(counter.rise(self.ticked))
        if following is not None:
            # Late ticks come at four times their rate, so that the guest can take each.
            spacing = max(counter.initial * _NS // PIT_HZ // 4, MIN_PERIOD_NS)
            following = max(following, now_ns + spacing)
        self._arm(following)

    def next_tick(self) -> int | None:
        """When channel 0 ticks next after ``ticked``, in ns."""
        return _to_ns(self.counters[0].rise(self.ticked))

    def _arm(self, due: int | None) -> None:
        self.tick_due = due
        if due is None:
            self._timer.cancel()
        else:
            self._timer.arm(due)

    # Port 0x61.

    def read_port_b(self) -> int:
        now_ns = self._clock.now_ns()
        counter = self.counters[2]
        now = now_ns * PIT_HZ // _NS
        counter.settle(now)
        return self.port_b | (now_ns // _REFRESH_NS & 1) << 4 | counter.output(now) << 5

    def write_port_b(self, value: int) -> None:
        self.port_b = value & 0x0F
        now = self.now()
        self.counters[2].settle(now)
        self.counters[2].set_gate(bool(value & 1), now)


class _PortB:
    """NMI status and control: gate and output of channel 2, the speaker (nobody hears it), the refresh bit."""

    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read(self, offset: int, size: int) -> int:
        return self._pit.read_port_b()

    def write(self, offset: int, size: int, value: int) -> None:
        self._pit.write_port_b(value)


def _to_ns(tick: int | None) -> int | None:
    """The first nanosecond of a tick."""
    return None if tick is None else -(-tick * _NS // PIT_HZ)


def _to_bcd(value: int) -> int:
    return sum(value // 10**i % 10 << 4 * i for i in range(4))


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * i & 0xF) * 10**i for i in range(4))
