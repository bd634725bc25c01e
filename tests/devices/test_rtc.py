"""The MC146818, against its data sheet."""

from __future__ import annotations

import calendar
import random
from collections.abc import Iterator
from datetime import date

import pytest

from skep.bus import Bus
from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.rtc import AF, AIE, BINARY, CENTURY, HOURS_24, IRQF, PF, PIE, SET, UF, UIE, A, B, C, D, Rtc
from tests.boardtest import Time, Wire

START = calendar.timegm((2024, 2, 29, 23, 59, 57))  # a Thursday
S = 1_000_000_000


class Clock:
    """A clock that shows START when the test begins."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.irq = Wire()
        self.skew = 0
        self.alarms = 0
        self.rtc = Rtc(
            time.clock, self.irq, low_memory=512 << 20, high_memory=5 << 30, wall=self.wall, alarm=self.alarmed
        )
        self.bus = Bus(time.lock)
        self.rtc.attach(self.bus)

    def alarmed(self) -> None:
        self.alarms += 1

    def wall(self) -> int:
        return START * S + self.time.counter + self.skew

    def read(self, index: int) -> int:
        self.bus.port_write(0x70, 1, index)
        return self.bus.port_read(0x71, 1)

    def write(self, index: int, value: int) -> None:
        self.bus.port_write(0x70, 1, index)
        self.bus.port_write(0x71, 1, value)

    def shows(self) -> list[int]:
        """Century, year, month, day, weekday, hours, minutes, seconds."""
        return [self.read(index) for index in (CENTURY, 9, 8, 7, 6, 4, 2, 0)]


@pytest.fixture
def time() -> Iterator[Time]:
    time = Time()
    yield time
    time.close()


@pytest.fixture
def clock(time: Time) -> Clock:
    return Clock(time)


class TestRtc(DeviceConformance[Rtc]):
    survives_reset = frozenset({"memory", "offset_ns", "updates_seen", "periods_seen"})

    @pytest.fixture(autouse=True)
    def _time(self, time: Time) -> None:
        self.time = time

    def make_device(self) -> Rtc:
        return Clock(self.time).rtc

    def regions(self, device: Rtc) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: Rtc, rng: random.Random) -> None:
        self.time.pass_ns(rng.choice((0, 1000, 100_000)))


def test_time_in_bcd_and_over_a_leap_day(clock: Clock, time: Time) -> None:
    assert clock.shows() == [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x57]
    time.pass_ns(3 * S)
    assert clock.shows() == [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00]


def test_every_month_of_the_calendar(clock: Clock) -> None:
    """Set to its first day, the clock shows it, and the weekday that it was."""
    clock.write(B, BINARY | HOURS_24)
    for year in (1, 4, 99, 100, 400, 1582, 1899, 1900, 1970, 1999, 2000, 2023, 2024, 2100, 9996, 9999):
        for month in range(1, 13):
            clock.write(B, SET | BINARY | HOURS_24)
            century = int(f"{year // 100:02}", 16)
            for index, value in ((CENTURY, century), (9, year % 100), (8, month), (7, 1), (4, 0), (2, 0), (0, 0)):
                clock.write(index, value)
            clock.write(B, BINARY | HOURS_24)
            weekday = date(year, month, 1).isoweekday() % 7 + 1
            assert clock.shows()[:5] == [century, year % 100, month, 1, weekday]


def test_formats(clock: Clock) -> None:
    clock.write(B, BINARY | HOURS_24)
    assert clock.shows() == [0x20, 24, 2, 29, 5, 23, 59, 57]
    clock.write(B, 0)
    assert clock.read(4) == 0x91, "11 in the evening"
    clock.write(B, BINARY)
    assert clock.read(4) == 0x80 | 11
    clock.time.pass_ns(3 * S)
    assert clock.read(4) == 12, "midnight is 12 in the morning"


def test_uip_announces_the_update(clock: Clock, time: Time) -> None:
    assert not clock.read(A) & 0x80
    time.pass_ns(S - 244_000)
    assert clock.read(A) & 0x80
    time.pass_ns(244_000)
    assert not clock.read(A) & 0x80


def test_setting_while_set_holds_the_clock(clock: Clock, time: Time) -> None:
    clock.write(B, SET | BINARY | HOURS_24)
    time.pass_ns(5 * S)
    assert clock.read(0) == 57 or clock.read(0) == 0x57
    for index, value in ((CENTURY, 0x19), (9, 99), (8, 12), (7, 31), (4, 23), (2, 59), (0, 58)):
        clock.write(index, value)
    clock.write(B, BINARY | HOURS_24)
    time.pass_ns(2 * S)
    assert clock.shows() == [0x20, 0, 1, 1, 7, 0, 0, 0]


def test_linux_sets_the_time_with_the_divider_held(clock: Clock, time: Time) -> None:
    """mc146818_set_time; the next update comes half a second after the divider's release."""
    clock.write(B, SET | HOURS_24)
    clock.write(A, 0x70 | 0x06)
    for index, value in ((9, 0x30), (8, 0x06), (7, 0x15), (4, 0x12), (2, 0x00), (0, 0x00), (CENTURY, 0x20)):
        clock.write(index, value)
    clock.write(B, HOURS_24)
    time.pass_ns(3 * S)
    assert clock.read(0) == 0
    clock.write(A, 0x26)
    time.pass_ns(S // 2 - 1)
    assert clock.read(0) == 0
    time.pass_ns(1)
    assert clock.shows() == [0x20, 0x30, 0x06, 0x15, 7, 0x12, 0x00, 0x01]


def test_a_single_register_may_be_written_while_it_runs(clock: Clock, time: Time) -> None:
    clock.write(2, 0x30)
    time.pass_ns(4 * S)
    assert clock.shows()[5:] == [0x23, 0x31, 0x01]


def test_update_ended_interrupt(clock: Clock, time: Time) -> None:
    clock.write(B, HOURS_24 | UIE)
    time.pass_ns(S - 1)
    assert not clock.irq.level
    time.pass_ns(1)
    assert clock.irq.level and clock.read(C) & ~PF == IRQF | UF
    assert not clock.irq.level and clock.read(C) == 0
    time.pass_ns(S)
    assert clock.irq.rises == 2


def test_flags_are_set_without_interrupts(clock: Clock, time: Time) -> None:
    time.pass_ns(S)
    assert clock.read(C) & ~PF == UF and clock.irq.rises == 0


def test_alarm(clock: Clock, time: Time) -> None:
    for index, value in ((5, 0x00), (3, 0x01), (1, 0x30)):
        clock.write(index, value)
    clock.write(B, HOURS_24 | AIE)
    time.pass_ns(93 * S - 1)
    assert not clock.irq.level
    time.pass_ns(1)
    assert clock.irq.level and clock.read(C) & ~PF == IRQF | AF | UF
    time.pass_ns(3600 * S)
    assert not clock.irq.level
    time.pass_ns(23 * 3600 * S)
    assert clock.irq.rises == 2, "the next day"
    assert clock.alarms == 2


@pytest.mark.parametrize(
    ("registers", "after"),
    [
        ((0xFF, 0xFF, 0xFF), 1),
        ((0xC0, 0xC0, 0x10), 13),
        ((0xFF, 0x05, 0x00), 303),
        ((0x23, 0xFF, 0x56), 23 * 3600 + 59),
        ((0x23, 0x59, 0x57), 86400),
        ((0x30, 0xFF, 0xFF), None),
    ],
)
def test_alarms_with_wildcards(clock: Clock, registers: tuple[int, int, int], after: int | None) -> None:
    for index, value in zip((5, 3, 1), registers, strict=True):
        clock.write(index, value)
    assert clock.rtc._next_alarm(START) == (None if after is None else START + after)


@pytest.mark.parametrize(("rate", "hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_interrupt(clock: Clock, time: Time, rate: int, hz: int) -> None:
    clock.write(A, 0x20 | rate)
    clock.write(B, HOURS_24 | PIE)
    for _ in range(4):
        time.pass_ns(S // hz + 1)
        assert clock.irq.level and clock.read(C) & (IRQF | PF) == IRQF | PF
    assert not clock.irq.level


def test_missed_periods_are_one(clock: Clock, time: Time) -> None:
    clock.write(B, HOURS_24 | PIE)
    time.counter += S
    time.pass_ns(0)
    clock.read(C)
    assert not clock.irq.level and clock.irq.rises == 1


def test_memory_sizes_and_nvram(clock: Clock) -> None:
    def words(at: int, size: int) -> int:
        return sum(clock.read(at + i) << 8 * i for i in range(size))

    assert words(0x15, 2) == 640 and words(0x17, 2) == words(0x30, 2) == 0xFFFF
    assert words(0x34, 2) == (496 << 20) >> 16 and words(0x5B, 3) == (5 << 30) >> 16
    clock.write(0x40, 0xA5)
    clock.rtc.reset()
    assert clock.read(0x40) == 0xA5, "a battery keeps it"
    assert clock.read(D) == 0x80
    clock.write(D, 0)
    clock.write(C, 0xFF)
    assert clock.read(D) == 0x80


def test_reset_turns_interrupts_off_and_keeps_the_time(clock: Clock, time: Time) -> None:
    clock.write(0, 0x10)
    clock.write(B, HOURS_24 | UIE | AIE | PIE)
    time.pass_ns(S)
    assert clock.irq.level
    clock.rtc.reset()
    assert not clock.irq.level and clock.read(B) == HOURS_24 and clock.read(0) == 0x11


def test_the_clock_goes_on_while_the_vm_is_frozen(clock: Clock, time: Time) -> None:
    clock.write(B, HOURS_24 | UIE)
    time.clock.freeze()
    clock.rtc.pause()
    time.counter += 10 * S
    clock.rtc.resume()
    time.clock.thaw()
    time.pass_ns(0)
    assert clock.irq.level and clock.shows()[5:] == [0x00, 0x00, 0x07]


def test_the_hosts_clock_may_be_set_back(clock: Clock, time: Time) -> None:
    clock.write(B, HOURS_24 | UIE)
    time.pass_ns(2 * S)
    clock.read(C)
    clock.skew = -3600 * S
    time.pass_ns(S)
    clock.read(C)
    time.pass_ns(S)
    assert clock.irq.level, "interrupts go on"


def test_nonsense_is_taken_as_arithmetic(clock: Clock) -> None:
    for index in (CENTURY, 9, 8, 7, 4, 2, 0):
        clock.write(index, 0xFF)
    assert clock.shows()[0] <= 0x99
