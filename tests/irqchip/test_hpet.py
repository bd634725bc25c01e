"""The HPET, against its specification."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.irqchip.hpet import (
    ENABLE_CNF,
    GCAP_ID,
    GEN_CONF,
    GINTR_STA,
    INT_ENB,
    INT_TYPE,
    LEG_RT_CNF,
    MAIN_CNT,
    MIN_PERIOD_TICKS,
    MODE32,
    ROUTE_SHIFT,
    TICK_NS,
    TIM_COMP,
    TIM_CONF,
    TYPE,
    VAL_SET,
    Hpet,
)
from tests.boardtest import Time, Wire

MS = 1_000_000 // TICK_NS
"""Ticks of a millisecond."""


@pytest.fixture
def time() -> Iterator[Time]:
    time = Time()
    yield time
    time.close()


class Made:
    """An HPET whose wires, of all timers together, are remembered by GSI."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.wires: dict[int, list[Wire]] = {}
        self.hpet = Hpet(time.clock, self._line)

    def _line(self, gsi: int) -> Wire:
        wire = Wire()
        self.wires.setdefault(gsi, []).append(wire)
        return wire

    def rises(self, gsi: int) -> int:
        return sum(wire.rises for wire in self.wires[gsi])

    def asserted(self, gsi: int) -> bool:
        return any(wire.level for wire in self.wires[gsi])

    def write(self, offset: int, value: int, size: int = 8) -> None:
        with self.time.lock:
            self.hpet.write(offset, size, value)

    def read(self, offset: int, size: int = 8) -> int:
        with self.time.lock:
            return self.hpet.read(offset, size)

    def timer(self, n: int, conf: int, comparator: int, gsi: int = 20) -> None:
        self.write(TIM_CONF + 0x20 * n, conf | gsi << ROUTE_SHIFT)
        self.write(TIM_COMP + 0x20 * n, comparator)


@pytest.fixture
def made(time: Time) -> Made:
    return Made(time)


class TestHpet(DeviceConformance[Hpet]):
    @pytest.fixture(autouse=True)
    def _time(self, time: Time) -> None:
        self.time = time

    def make_device(self) -> Hpet:
        return Made(self.time).hpet

    def regions(self, device: Hpet) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: Hpet, rng: random.Random) -> None:
        self.time.pass_ns(rng.choice((0, 10, 1000, 60_000)))


def test_what_it_is(made: Made) -> None:
    capabilities = made.read(GCAP_ID)
    assert capabilities >> 32 == TICK_NS * 10**6 <= 0x05F5E100, "femtoseconds, at most 100 ns"
    assert capabilities >> 8 & 0x1F == 2 and capabilities & 0xFF == 1, "three timers, revision 1"
    assert capabilities >> 15 & 1 and capabilities >> 13 & 1, "legacy replacement, 64 bits"
    made.write(GCAP_ID, 0)
    assert made.read(GCAP_ID) == capabilities == made.read(4, 4) << 32 | made.read(0, 4)
    assert made.read(TIM_CONF) == 0x00F0_0000_0000_0030
    made.write(TIM_CONF, (1 << 64) - 1)
    assert made.read(TIM_CONF) == 0x00F0_0000_0000_3F7E, "neither reserved bits nor FSB delivery"
    assert made.read(0x3F8) == 0


def test_the_counter_counts_while_enabled(made: Made) -> None:
    made.time.pass_ns(1000)
    assert made.read(MAIN_CNT) == 0
    made.write(MAIN_CNT, 0xFFFF_FFFF_FFFF_FFF0)
    made.write(GEN_CONF, ENABLE_CNF)
    made.time.pass_ns(15 * TICK_NS)
    assert made.read(MAIN_CNT) == 0xFFFF_FFFF_FFFF_FFFF
    made.time.pass_ns(3 * TICK_NS)
    assert made.read(MAIN_CNT) == 2 and made.read(MAIN_CNT + 4, 4) == 0
    made.write(GEN_CONF, 0)
    made.time.pass_ns(1000)
    assert made.read(MAIN_CNT) == 2
    made.write(MAIN_CNT + 4, 7, 4)
    assert made.read(MAIN_CNT) == 7 << 32 | 2


def test_an_edge_comes_once(made: Made) -> None:
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(2, INT_ENB, MS, gsi=21)
    made.time.pass_ns(999_990)
    assert made.rises(21) == 0
    made.time.pass_ns(10)
    assert made.rises(21) == 1 and not made.asserted(21) and made.read(GINTR_STA) == 0
    made.time.pass_ns(10**10)
    assert made.rises(21) == 1
    made.write(TIM_COMP + 0x40, made.read(MAIN_CNT))
    made.time.pass_ns(0)
    assert made.rises(21) == 2, "a count that is there already matches"


def test_32_bits_come_round(made: Made) -> None:
    """A one-shot of 32 bits interrupts at every round of its half of the counter (2.3.9.2.1)."""
    made.write(MAIN_CNT, 0xFFFF_FF00)
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(0, INT_ENB | MODE32, 0x5_0000_0010)
    assert made.read(TIM_COMP) == 0x10
    made.time.pass_ns(0x10F * TICK_NS)
    assert made.rises(20) == 0
    made.time.pass_ns(TICK_NS)
    assert made.rises(20) == 1
    made.time.pass_ns(TICK_NS << 32)
    assert made.rises(20) == 2


def test_a_level_lasts_until_its_status_is_cleared(made: Made) -> None:
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(1, INT_ENB | INT_TYPE, MS)
    made.time.pass_ns(10**6)
    assert made.asserted(20) and made.read(GINTR_STA) == 2
    made.write(TIM_CONF + 0x20, INT_TYPE | 20 << ROUTE_SHIFT)
    assert not made.asserted(20)
    made.write(TIM_CONF + 0x20, INT_TYPE | INT_ENB | 23 << ROUTE_SHIFT)
    assert made.asserted(23) and not made.asserted(20), "the route moved"
    made.write(GINTR_STA, 5)
    assert made.asserted(23)
    made.write(GINTR_STA, 2)
    assert not made.asserted(23) and made.read(GINTR_STA) == 0


def test_a_periodic_comparator(made: Made) -> None:
    """As Linux programs it: the first count with VAL_SET, then the period."""
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(0, INT_ENB | TYPE | VAL_SET | MODE32, 5 * MS)
    made.write(TIM_COMP, MS)
    assert not made.read(TIM_CONF) & VAL_SET
    for milliseconds, rises in ((4, 0), (1, 1), (1, 2), (10, 12)):
        made.time.pass_ns(milliseconds * 10**6)
        assert made.rises(20) == rises
    assert made.read(TIM_COMP) == 17 * MS, "the comparator is the next match"
    made.write(TIM_COMP, 2 * MS)
    made.time.pass_ns(10**6)
    assert made.rises(20) == 13, "a new period begins with the next match"
    made.time.pass_ns(10**6)
    assert made.rises(20) == 13
    made.time.pass_ns(10**6)
    assert made.rises(20) == 14


def test_a_period_of_nothing_does_not_keep_us_busy(made: Made) -> None:
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(0, INT_ENB | TYPE | VAL_SET, 10)
    made.write(TIM_COMP, 1)
    made.time.pass_ns(10**7)
    assert 10 <= made.rises(20) <= 10**7 // (MIN_PERIOD_TICKS * TICK_NS) + 1


def test_what_came_while_nobody_looked_is_one_interrupt(time: Time, made: Made) -> None:
    """The host was late: the guest's next access finds the match that had come, and no more than one."""
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(0, INT_ENB | INT_TYPE | TYPE | VAL_SET, MS)
    made.write(TIM_COMP, MS)
    time.clock.freeze()
    time.clock.thaw()
    with time.lock:  # the clock's thread waits for it
        time.counter += 7_500_000
        assert made.hpet.read(GINTR_STA, 8) == 1
        assert made.hpet.read(TIM_COMP, 8) == 8 * MS
    assert made.rises(20) == 1


def test_another_timers_registers_do_not_lose_a_match(time: Time, made: Made) -> None:
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(0, INT_ENB, MS, gsi=20)
    with time.lock:
        time.counter += 10**6
        made.hpet.write(TIM_COMP + 0x20, 8, 5)
        made.hpet.write(TIM_CONF, 8, 0)
    assert made.rises(20) == 1


def test_legacy_replacement(made: Made) -> None:
    """The first two comparators are IRQ 0 and 8, whatever their routes; who was there before is cut off."""
    pit = Wire()
    wire = made.hpet.replaceable(pit)
    wire.set(True)
    made.write(GEN_CONF, ENABLE_CNF | LEG_RT_CNF)
    assert not pit.level
    for n in range(3):
        made.timer(n, INT_ENB, MS, gsi=22)
    made.time.pass_ns(10**6)
    assert (made.rises(0), made.rises(8), made.rises(22)) == (1, 1, 1)
    wire.set(False)
    wire.set(True)
    assert pit.rises == 1
    made.write(GEN_CONF, ENABLE_CNF)
    assert pit.level and pit.rises == 2, "connected again, and asserted still"
    made.write(GEN_CONF, LEG_RT_CNF)
    with made.time.lock:
        made.hpet.reset()
    assert pit.level and pit.rises == 3


def test_a_route_that_is_not_there_leads_nowhere(made: Made) -> None:
    made.write(GEN_CONF, ENABLE_CNF)
    made.timer(0, INT_ENB, MS, gsi=5)
    made.timer(1, INT_ENB | INT_TYPE, MS, gsi=31)
    made.time.pass_ns(10**6)
    assert not any(wire.rises for wires in made.wires.values() for wire in wires)
    assert made.read(GINTR_STA) == 2


def test_a_saved_timer_goes_on_where_it_was(time: Time) -> None:
    first, second = Made(time), Made(time)
    first.write(GEN_CONF, ENABLE_CNF | LEG_RT_CNF)
    first.timer(0, INT_ENB | TYPE | VAL_SET, 3 * MS)
    time.pass_ns(10**6)
    second.hpet.load(first.hpet.save())
    first.hpet.close()
    time.pass_ns(2 * 10**6)
    assert second.rises(0) == 1 and first.rises(0) == 0
