"""The keyboard controller without a keyboard."""

from __future__ import annotations

import pytest

from skep.bus import Bus
from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.i8042 import I8042
from tests.boardtest import new_bus


class TestI8042(DeviceConformance[I8042]):
    def make_device(self) -> I8042:
        return I8042(lambda: None)

    def regions(self, device: I8042) -> list[tuple[IoRegion, int]]:
        return device.regions()


@pytest.fixture
def resets() -> list[int]:
    return []


@pytest.fixture
def bus(resets: list[int]) -> Bus:
    bus = new_bus()
    I8042(lambda: resets.append(1)).attach(bus)
    return bus


def command(bus: Bus, value: int) -> int | None:
    """The answer, if there is one."""
    bus.port_write(0x64, 1, value)
    return bus.port_read(0x60, 1) if bus.port_read(0x64, 1) & 1 else None


def test_self_test_passes_and_there_is_no_keyboard(bus: Bus) -> None:
    assert command(bus, 0xAA) == 0x55
    assert bus.port_read(0x64, 1) & 0x05 == 0x04, "system flag; the answer was read"
    assert command(bus, 0xAB) == command(bus, 0xA9) == 1
    assert command(bus, 0xD0) == 0x03
    bus.port_write(0x60, 1, 0xFF)  # reset the keyboard: no acknowledge comes
    assert not bus.port_read(0x64, 1) & 1


def test_command_byte(bus: Bus) -> None:
    bus.port_write(0x64, 1, 0x60)
    bus.port_write(0x60, 1, 0x47)
    assert command(bus, 0x20) == 0x47
    assert command(bus, 0xAD) is None and command(bus, 0xA7) is None
    assert command(bus, 0x20) == 0x77
    assert command(bus, 0xAE) is None and command(bus, 0xA8) is None
    assert command(bus, 0x20) == 0x47


def test_loopback_of_the_output_buffer(bus: Bus) -> None:
    """Linux's i8042_controller_check and i8042_check_mux."""
    for value in (0xD2, 0xD3):
        bus.port_write(0x64, 1, value)
        bus.port_write(0x60, 1, 0x5A)
        assert bus.port_read(0x60, 1) == 0x5A


@pytest.mark.parametrize("writes", [[(0x64, 0xFE)], [(0x64, 0xF0)], [(0x92, 1)], [(0x64, 0xD1), (0x60, 0x02)]])
def test_ways_to_reset(bus: Bus, resets: list[int], writes: list[tuple[int, int]]) -> None:
    for port, value in writes:
        assert not resets
        bus.port_write(port, 1, value)
    assert resets == [1]


def test_what_does_not_reset(bus: Bus, resets: list[int]) -> None:
    for port, value in ((0x64, 0xFF), (0x92, 2), (0x92, 0), (0x64, 0xD1), (0x60, 0x03), (0x60, 0xFE)):
        bus.port_write(port, 1, value)
    assert not resets and bus.port_read(0x92, 1) == 2, "A20 is always open"
