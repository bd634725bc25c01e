"""ACPI fixed hardware (ACPI 6.4, 4.8)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from skep.bus import Bus
from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.pm import BASE, GPE0, PM_TIMER_HZ, AcpiPm
from tests.boardtest import Time, Wire


class Machine:
    def __init__(self, time: Time) -> None:
        self.asked: list[str] = []
        self.sci = Wire()
        ask = self.asked.append
        self.pm = AcpiPm(
            time.clock,
            self.sci,
            power_off=lambda: ask("off"),
            reset_machine=lambda: ask("reset"),
            sleep=lambda: ask("sleep"),
            wake=lambda: ask("wake"),
        )
        self.bus = Bus(time.lock)
        self.pm.attach(self.bus)


@pytest.fixture
def time() -> Iterator[Time]:
    time = Time()
    yield time
    time.close()


class TestAcpiPm(DeviceConformance[AcpiPm]):
    survives_reset = frozenset({"timer_high"})

    @pytest.fixture(autouse=True)
    def _time(self, time: Time) -> None:
        self.time = time

    def make_device(self) -> AcpiPm:
        return Machine(self.time).pm

    def regions(self, device: AcpiPm) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: AcpiPm, rng: random.Random) -> None:
        self.time.pass_ns(rng.choice((0, 1000, 10**10)))
        device.press_power_button()


def test_power_button(time: Time) -> None:
    machine = Machine(time)
    bus = machine.bus
    machine.pm.press_power_button()
    assert bus.port_read(BASE, 2) == 0x100 and not machine.sci.level, "not enabled"
    bus.port_write(BASE + 2, 2, 0x100)
    assert machine.sci.level
    bus.port_write(BASE, 2, 0x001)
    assert machine.sci.level, "another bit was cleared"
    bus.port_write(BASE, 2, 0x100)
    assert bus.port_read(BASE, 4) == 0x100 << 16 and not machine.sci.level


def test_all_fixed_events_can_be_enabled(time: Time) -> None:
    """ACPICA reads back what it enables, and complains of an event that stays off."""
    machine = Machine(time)
    machine.bus.port_write(BASE + 2, 2, 0xFFFF)
    assert machine.bus.port_read(BASE + 2, 2) == 0x0721


def test_soft_off_needs_the_right_type_and_the_enable_bit(time: Time) -> None:
    machine = Machine(time)
    for control in (5 << 10, 1 << 13 | 4 << 10):
        machine.bus.port_write(BASE + 4, 2, control)
    assert not machine.asked
    assert machine.bus.port_read(BASE + 4, 2) == 4 << 10 | 1, "SLP_EN reads 0, SCI_EN 1"
    machine.bus.port_write(BASE + 4, 2, 1 << 13 | 5 << 10)
    assert machine.asked == ["off"]


def test_the_power_button_ends_a_sleep(time: Time) -> None:
    machine = Machine(time)
    machine.bus.port_write(BASE + 4, 2, 1 << 13 | 1 << 10)
    assert machine.asked == ["sleep"] and machine.pm.asleep
    machine.pm.press_power_button()
    machine.pm.press_power_button()
    assert machine.asked == ["sleep", "wake"] and not machine.pm.asleep
    assert machine.bus.port_read(BASE, 2) == 0x8100
    machine.bus.port_write(BASE, 2, 0x8100)
    assert machine.bus.port_read(BASE, 2) == 0


def test_an_alarm_ends_a_sleep_where_that_is_enabled(time: Time) -> None:
    machine = Machine(time)
    machine.bus.port_write(BASE + 4, 2, 1 << 13 | 1 << 10)
    machine.pm.note_alarm()
    assert machine.asked == ["sleep"]
    machine.bus.port_write(BASE + 2, 2, 0x400)
    assert machine.asked == ["sleep", "wake"] and machine.bus.port_read(BASE, 2) == 0x8400
    machine.bus.port_write(BASE + 4, 2, 1 << 13 | 1 << 10)
    assert machine.asked == ["sleep", "wake"] * 2, "what is not cleared wakes at once"


def test_timer_runs_at_its_rate_and_wraps_at_32_bits(time: Time) -> None:
    machine = Machine(time)
    time.pass_ns(1_000_000_000)
    assert machine.bus.port_read(BASE + 8, 4) == PM_TIMER_HZ
    assert machine.bus.port_read(BASE + 9, 1) == PM_TIMER_HZ >> 8 & 0xFF
    time.pass_ns((1 << 32) * 1_000_000_000 // PM_TIMER_HZ)
    assert machine.bus.port_read(BASE + 8, 4) in (PM_TIMER_HZ - 1, PM_TIMER_HZ)
    machine.bus.port_write(BASE + 8, 4, 0)
    assert machine.bus.port_read(BASE + 8, 4) >= PM_TIMER_HZ - 1, "read-only"


def test_timer_status_interrupts_when_bit_31_changes(time: Time) -> None:
    machine = Machine(time)
    half = -(-(1 << 31) * 1_000_000_000 // PM_TIMER_HZ)
    time.pass_ns(half - 1)
    assert not machine.bus.port_read(BASE, 2) & 1
    machine.bus.port_write(BASE + 2, 2, 1)
    time.pass_ns(1)
    assert machine.sci.level and machine.bus.port_read(BASE, 2) & 1
    machine.bus.port_write(BASE, 2, 1)
    assert not machine.sci.level
    time.pass_ns(half)
    assert machine.sci.level


@pytest.mark.parametrize("writes", [[0x06], [0x0E], [0x02, 0x06]])
def test_reset_register(time: Time, writes: list[int]) -> None:
    machine = Machine(time)
    for value in writes:
        assert not machine.asked
        machine.pm.reset_control.write(0, 1, value)
    assert machine.asked == ["reset"] and machine.pm.reset_control.read(0, 1) == writes[-1]


def test_general_purpose_events(time: Time) -> None:
    machine = Machine(time)
    status, enable = BASE + GPE0, BASE + GPE0 + 2
    with time.lock:
        machine.pm.raise_event(9)
    assert machine.bus.port_read(status, 2) == 1 << 9 and not machine.sci.level
    machine.bus.port_write(enable + 1, 1, 1 << 1)
    assert machine.sci.level
    machine.bus.port_write(status, 2, 1 << 8)
    assert machine.sci.level, "another event's bit"
    machine.bus.port_write(status, 4, 1 << 9)
    assert machine.bus.port_read(status, 4) == 0 and not machine.sci.level
