"""The MC146818 real-time clock and its battery-backed memory (Motorola data sheet; the PC's additions, ICH9 13.6).

The time of day is the host's, plus an offset that setting the clock changes; it goes on while the VM is frozen, as a
battery makes it. Flags are found from the time when they are asked for, so that host timers run only for interrupts
that are enabled. The periodic interrupt follows guest time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.io import IoRegion, IrqLine
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus
    from skep.clock import GuestClock

IRQ = 8

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
EQUIPMENT, BASE_MEMORY, EXTENDED_MEMORY, EXTENDED_MEMORY_2 = 0x14, 0x15, 0x17, 0x30
CENTURY, MEMORY_ABOVE_16M, MEMORY_ABOVE_4G = 0x32, 0x34, 0x5B

UIP = 1 << 7  # A
SET, PIE, AIE, UIE, SQWE, BINARY, HOURS_24 = (1 << bit for bit in (7, 6, 5, 4, 3, 2, 1))  # B
IRQF, PF, AF, UF = (1 << bit for bit in (7, 6, 5, 4))  # C; the last three match B's enables

_TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
_NS = 1_000_000_000
_UIP_NS = 244_000  # UIP announces an update this long before
_DIVIDER_START_NS = 500_000_000  # from the divider's release to the first update
_CRYSTAL_HZ = 32_768


def _days(year: int, month: int) -> int:
    """From 1970 to the month's first day, in the Gregorian calendar. March begins the year, so that its end has the
    leap day."""
    years, months = (year, month - 3) if month > 2 else (year - 1, month + 9)
    return 365 * years + years // 4 - years // 100 + years // 400 + (153 * months + 2) // 5 - 719_468


_FIRST_DAY, _LAST_DAY = _days(1, 1), _days(9999, 12) + 30


class Rtc(Fields):
    """Ports 0x70 (index) and 0x71 (data)."""

    name = "rtc"
    state_fields: ClassVar[tuple[str, ...]] = ("memory", "index", "offset_ns", "updates_seen", "periods_seen")

    def __init__(
        self,
        clock: GuestClock,
        irq: IrqLine,
        *,
        low_memory: int,
        high_memory: int,
        wall: Callable[[], int] = time.time_ns,
        local_time: bool = False,
        alarm: Callable[[], None] = lambda: None,
    ) -> None:
        """``low_memory`` and ``high_memory`` are the bytes of RAM below and above 4 GiB, told where PCs tell them;
        ``wall`` is the host's time in ns since 1970, UTC. ``alarm`` is called, under the board lock, at an alarm whose
        interrupt is enabled."""
        self._clock = clock
        self._irq = irq
        self._wall = wall
        self._alarm = alarm
        self._update_timer = clock.timer(self._timer_fired)
        self._periodic_timer = clock.timer(self._timer_fired)
        self.offset_ns = 0
        """From the host's time to this clock's."""
        if local_time:
            self.offset_ns = time.localtime(wall() // _NS).tm_gmtoff * _NS
        self.memory = bytearray(128)
        self.memory[A], self.memory[B], self.memory[D] = 0x26, HOURS_24, 0x80
        self._store_memory_sizes(low_memory, high_memory)
        self.reset()

    def _store_memory_sizes(self, low: int, high: int) -> None:
        def store(at: int, size: int, value: int) -> None:
            self.memory[at : at + size] = min(value, (1 << 8 * size) - 1).to_bytes(size, "little")

        store(BASE_MEMORY, 2, 640)
        extended = max(low - (1 << 20), 0) >> 10
        store(EXTENDED_MEMORY, 2, extended)
        store(EXTENDED_MEMORY_2, 2, extended)
        store(MEMORY_ABOVE_16M, 2, max(low - (16 << 20), 0) >> 16)
        store(MEMORY_ABOVE_4G, 3, high >> 16)

    # The life of a device.

    def reset(self) -> None:
        """The RESET pin: interrupts off; time, memory and register A stay."""
        self.index = 0
        self.memory[B] &= ~(PIE | AIE | UIE | SQWE)
        self.memory[C] = 0
        self.updates_seen = self._seconds()
        """Updates until this second are in the flags."""
        self.periods_seen = self._periods()
        self._changed()

    def pause(self) -> None:
        """The guest's clock stands still while the VM is frozen, so the timers do."""

    def resume(self) -> None:
        """The guest's clock goes on; the time of day may have leapt."""
        self._changed()

    def close(self) -> None:
        self._update_timer.close()
        self._periodic_timer.close()

    def loaded(self) -> None:
        self._irq.set(bool(self.memory[C] & IRQF))

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self, 2)]

    def attach(self, bus: Bus) -> None:
        bus.add_ports(0x70, 2, self)
        bus.post_port(0x70)

    # The ports.

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return sum(self.read(offset + i, 1) << 8 * i for i in range(size))
        return self._read(self.index) if offset == 1 else 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            for i in range(size):
                self.write(offset + i, 1, value >> 8 * i & 0xFF)
        elif offset == 0:
            self.index = value & 0x7F  # bit 7 masks NMI, of which there are none
        elif offset == 1:
            self._write(self.index, value)

    def _read(self, index: int) -> int:
        if index in _TIME:
            if not self._stopped():
                self._store_time()
        elif index == A:
            if not self._stopped() and self.now_ns() % _NS >= _NS - _UIP_NS:
                return self.memory[A] | UIP
        elif index == C:
            self._collect()
            value, self.memory[C] = self.memory[C], 0
            self._changed()
            return value
        return self.memory[index]

    def _write(self, index: int, value: int) -> None:
        if index in (C, D):
            return
        was_stopped, fraction = self._stopped(), self.now_ns() % _NS
        if not was_stopped:
            self._collect()
            self._store_time()
        self.memory[index] = value & ~UIP if index == A else value
        if index == B and value & SET:
            self.memory[B] &= ~UIE
        if was_stopped and not self._stopped():
            # Releasing the divider starts a second anew; releasing SET goes on with what runs.
            self._set_time(_NS - _DIVIDER_START_NS if index == A else fraction)
        elif index in _TIME and not was_stopped:
            self._set_time(fraction)
        if index == A:
            self.periods_seen = self._periods()
        if index <= B or index == CENTURY:
            self._changed()

    # The time of day.

    def _stopped(self) -> bool:
        """No updates: SET, or a divider that is held or not the crystal's."""
        return bool(self.memory[B] & SET) or self.memory[A] & 0x70 != 0x20

    def now_ns(self) -> int:
        """What it says, in ns since 1970."""
        return self._wall() + self.offset_ns

    def _seconds(self) -> int:
        return self.now_ns() // _NS

    def _store_time(self) -> None:
        days, second = divmod(self._seconds(), 86_400)
        day = time.gmtime(min(max(days, _FIRST_DAY), _LAST_DAY) * 86_400)
        hour = second // 3600
        if not self.memory[B] & HOURS_24:
            self.memory[HOURS] = self._encode((hour + 11) % 12 + 1) | 0x80 * (hour >= 12)
        else:
            self.memory[HOURS] = self._encode(hour)
        for index, value in (
            (SECONDS, second % 60),
            (MINUTES, second // 60 % 60),
            (WEEKDAY, (day.tm_wday + 1) % 7 + 1),
            (DAY, day.tm_mday),
            (MONTH, day.tm_mon),
            (YEAR, day.tm_year % 100),
        ):
            self.memory[index] = self._encode(value)
        self.memory[CENTURY] = _to_bcd(day.tm_year // 100)  # firmware's, always BCD

    def _set_time(self, fraction_ns: int) -> None:
        """The time registers become the time; what makes no sense in them is taken as arithmetic would."""
        year = _from_bcd(self.memory[CENTURY]) * 100 + self._decode(YEAR)
        month = min(max(self._decode(MONTH), 1), 12)
        days = _days(min(max(year, 1), 9999), month) + self._decode(DAY) - 1
        seconds = days * 86_400 + self._hour(HOURS) * 3600 + self._decode(MINUTES) * 60 + self._decode(SECONDS)
        self.offset_ns = seconds * _NS + fraction_ns - self._wall()
        self.updates_seen = self._seconds()

    def _encode(self, value: int) -> int:
        return value if self.memory[B] & BINARY else _to_bcd(value)

    def _decode(self, index: int) -> int:
        value = self.memory[index]
        return value if self.memory[B] & BINARY else _from_bcd(value)

    def _hour(self, index: int) -> int:
        if self.memory[B] & HOURS_24:
            return self._decode(index)
        value = self.memory[index]
        twelve = value & 0x7F if self.memory[B] & BINARY else _from_bcd(value & 0x7F)
        return twelve % 12 + 12 * (value >> 7)

    # Flags and interrupts.

    def _periods(self) -> int:
        """Periodic interrupts since time began, at the present rate."""
        period = self._period()
        return self._crystal() // period if period else 0

    def _crystal(self) -> int:
        return self._clock.now_ns() * _CRYSTAL_HZ // _NS

    def _period(self) -> int:
        """In ticks of the crystal; 0: none. Rates 1 and 2 are those of 8 and 9 (data sheet, table 3)."""
        rate = self.memory[A] & 0x0F
        if not rate or self.memory[A] & 0x70 != 0x20:
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _next_alarm(self, after: int) -> int | None:
        """The first second after ``after`` that the alarm registers match; the top two bits set match anything."""
        second, minute = (
            None if self.memory[index] >= 0xC0 else self._decode(index) for index in (SECONDS_ALARM, MINUTES_ALARM)
        )
        hour = None if self.memory[HOURS_ALARM] >= 0xC0 else self._hour(HOURS_ALARM)
        if (second or 0) > 59 or (minute or 0) > 59 or (hour or 0) > 23:
            return None
        at = after + 1
        while True:  # each step goes forward to a match of one more register: five at most
            if hour is not None and at // 3600 % 24 != hour:
                at = at - at % 3600 + (hour - at // 3600) % 24 * 3600
            elif minute is not None and at // 60 % 60 != minute:
                at = at - at % 60 + (minute - at // 60) % 60 * 60
            elif second is not None and at % 60 != second:
                at += (second - at) % 60
            else:
                return at

    def _collect(self) -> None:
        """Set the flags of what happened since they were looked at last."""
        periods = self._periods()
        if periods != self.periods_seen:
            self.periods_seen = periods
            self.memory[C] |= PF
        if self._stopped():
            return
        seconds = self._seconds()
        if seconds != self.updates_seen:
            alarm = self._next_alarm(self.updates_seen)
            if alarm is not None and alarm <= seconds:
                self.memory[C] |= AF
                if self.memory[B] & AIE:
                    self._alarm()
            self.updates_seen = seconds
            self.memory[C] |= UF

    def _changed(self) -> None:
        """Drive the interrupt line, and set the host's timers for the next flag that is enabled and not set yet."""
        asserted = bool(self.memory[B] & self.memory[C] & (PF | AF | UF))
        self.memory[C] = self.memory[C] & ~IRQF | IRQF * asserted
        self._irq.set(asserted)
        wanted = self.memory[B] & ~self.memory[C]
        due = None
        if not self._stopped():
            if wanted & UIE:
                due = self.updates_seen + 1
            elif wanted & AIE:
                due = self._next_alarm(self.updates_seen)
        if due is None:
            self._update_timer.cancel()
        else:
            self._update_timer.arm(self._clock.now_ns() + max(due * _NS - self.now_ns(), 0))
        period = self._period()
        if wanted & PIE and period:
            self._periodic_timer.arm(-(-(self.periods_seen + 1) * period * _NS // _CRYSTAL_HZ))
        else:
            self._periodic_timer.cancel()

    def _timer_fired(self) -> None:
        """On the clock's thread, under the board lock."""
        self._collect()
        self._changed()


def _to_bcd(value: int) -> int:
    return value // 10 << 4 | value % 10


def _from_bcd(value: int) -> int:
    return (value >> 4) * 10 + (value & 0x0F)
