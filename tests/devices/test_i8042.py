"""The keyboard controller and its keyboard."""

from __future__ import annotations

import random

import pytest

from skep.bus import Bus
from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.i8042 import I8042
from skep.devices.ps2keyboard import CAPS_LOCK, NUM_LOCK, Ps2Keyboard
from tests.boardtest import Wire, new_bus

A, CAPS, RIGHT = b"\x1c", b"\x58", b"\xe0\x74"
RELEASED_A, RELEASED_RIGHT = b"\xf0\x1c", b"\xe0\xf0\x74"


class Machine:
    def __init__(self) -> None:
        self.bus = new_bus()
        self.irq = Wire()
        self.resets = 0
        self.keyboard = Ps2Keyboard(self.bus.lock)
        self.controller = I8042(self.irq, self.keyboard, self._reset)
        self.controller.attach(self.bus)

    def _reset(self) -> None:
        self.resets += 1

    def command(self, value: int, *parameters: int) -> None:
        self.bus.port_write(0x64, 1, value)
        for parameter in parameters:
            self.bus.port_write(0x60, 1, parameter)

    def read(self) -> list[int]:
        """All that there is to read."""
        found = []
        while self.bus.port_read(0x64, 1) & 1:
            found.append(self.bus.port_read(0x60, 1))
        return found

    def keyboard_says(self, *values: int) -> list[int]:
        """Bytes for the keyboard, and its answer to them."""
        for value in values:
            self.bus.port_write(0x60, 1, value)
        return self.read()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def bus(machine: Machine) -> Bus:
    return machine.bus


class TestI8042(DeviceConformance[I8042]):
    def make_device(self) -> I8042:
        return Machine().controller

    def regions(self, device: I8042) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: I8042, rng: random.Random) -> None:
        device.keyboard.inject(rng.choice((A, RELEASED_A, RIGHT, RELEASED_RIGHT)))


# The controller.


def test_self_tests_pass_but_the_mouses(machine: Machine) -> None:
    for test, result in ((0xAA, 0x55), (0xAB, 0), (0xA9, 1)):
        machine.command(test)
        assert machine.read() == [result]
    assert machine.bus.port_read(0x64, 1) & 0x05 == 0x04, "system flag; the answer was read"
    machine.command(0xD0)
    assert machine.read() == [0x03]


def test_command_byte(machine: Machine) -> None:
    def byte() -> list[int]:
        machine.command(0x20)
        return machine.read()

    assert byte() == [0x65], "as firmware leaves it: translation, interrupts, no mouse"
    machine.command(0x60, 0x47)
    assert byte() == [0x47]
    machine.command(0xAD)
    machine.command(0xA7)
    assert byte() == [0x77]
    machine.command(0xAE)
    machine.command(0xA8)
    assert byte() == [0x47]


def test_loopback_of_the_output_buffer(machine: Machine) -> None:
    """Linux's i8042_controller_check and i8042_check_mux."""
    for value in (0xD2, 0xD3):
        machine.command(value, 0x5A)
        assert machine.read() == [0x5A]


@pytest.mark.parametrize("writes", [[(0x64, 0xFE)], [(0x64, 0xF0)], [(0x92, 1)], [(0x64, 0xD1), (0x60, 0x02)]])
def test_ways_to_reset(machine: Machine, writes: list[tuple[int, int]]) -> None:
    for port, value in writes:
        assert not machine.resets
        machine.bus.port_write(port, 1, value)
    assert machine.resets == 1


def test_what_does_not_reset(machine: Machine) -> None:
    for port, value in ((0x64, 0xFF), (0x92, 2), (0x92, 0), (0x64, 0xD1), (0x60, 0x03), (0x60, 0xFE)):
        machine.bus.port_write(port, 1, value)
    assert not machine.resets and machine.bus.port_read(0x92, 1) == 2, "A20 is always open"


# The keyboard.


@pytest.mark.parametrize(
    ("codes", "translated"),
    [
        (A, [0x1E]),
        (RELEASED_A, [0x9E]),
        (RIGHT, [0xE0, 0x4D]),
        (RELEASED_RIGHT, [0xE0, 0xCD]),
        (b"\x83\xf0\x83", [0x41, 0xC1]),  # F7, the one code beyond 0x7f
        (b"\xe1\x14\x77\xe1\xf0\x14\xf0\x77", [0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5]),  # Pause
    ],
)
def test_keys_arrive_in_scan_code_set_1(machine: Machine, codes: bytes, translated: list[int]) -> None:
    assert machine.keyboard.inject(codes)
    assert machine.read() == translated
    machine.command(0x60, 0x05)
    machine.keyboard.inject(codes)
    assert machine.read() == list(codes), "without translation as the keyboard sends them"


def test_every_byte_is_an_edge(machine: Machine) -> None:
    machine.keyboard.inject(RIGHT)
    assert machine.irq.level and machine.irq.rises == 1
    machine.bus.port_read(0x60, 1)
    assert machine.irq.level and machine.irq.rises == 2
    machine.bus.port_read(0x60, 1)
    assert not machine.irq.level
    machine.command(0x60, 0x64)
    machine.keyboard.inject(A)
    assert not machine.irq.level and machine.bus.port_read(0x64, 1) & 1, "no interrupt, but a byte"
    machine.command(0x60, 0x65)
    assert machine.irq.level, "it is still there when they are enabled"


def test_a_disabled_keyboard_keeps_its_keys(machine: Machine) -> None:
    machine.command(0xAD)
    machine.keyboard.inject(A)
    assert machine.read() == []
    machine.command(0xAE)
    assert machine.read() == [0x1E]


def test_an_answer_of_the_controller_waits_for_the_buffer(machine: Machine) -> None:
    machine.keyboard.inject(RIGHT)
    machine.command(0x20)
    assert machine.read() == [0xE0, 0x65, 0x4D]


def test_commands_of_the_keyboard(machine: Machine) -> None:
    says = machine.keyboard_says
    assert says(0xFF) == [0xFA, 0xAA]
    assert says(0xF2) == [0xFA, 0xAB, 0x41], "its second byte comes translated"
    assert says(0xEE) == [0xEE]
    assert says(0xED, CAPS_LOCK | NUM_LOCK) == [0xFA, 0xFA] and machine.keyboard.leds == CAPS_LOCK | NUM_LOCK
    assert says(0xF3, 0) == [0xFA, 0xFA] and machine.keyboard.rate == 0
    assert says(0xF0, 0) == [0xFA, 0xFA, 0x41], "set 2, translated"
    assert says(0xF0, 2) == [0xFA, 0xFA] and says(0xF0, 3) == [0xFA, 0xFE], "set 2 and no other"
    assert says(0x01) == [0xFE] and says(0xFE) == [0xFE], "what it does not know; and once more"
    assert says(0xED, 0xF4) == [0xFA, 0xFA] and machine.keyboard.leds, "a command is no parameter"
    assert says(0xF6) == [0xFA] and not machine.keyboard.leds


def test_scanning_stops_and_starts(machine: Machine) -> None:
    assert machine.keyboard_says(0xF5) == [0xFA]
    assert machine.keyboard.inject(A) and machine.read() == []
    assert machine.keyboard_says(0xF4) == [0xFA]
    assert machine.keyboard.inject(A) and machine.read() == [0x1E]


def test_a_byte_for_the_keyboard_opens_its_line(machine: Machine) -> None:
    machine.command(0xAD)
    assert machine.keyboard_says(0xEE) == [0xEE]


def test_nothing_grows_without_bound(machine: Machine) -> None:
    accepted = 0
    while machine.keyboard.inject(RELEASED_A):
        accepted += 1
    assert 8 <= accepted <= 9
    assert machine.read() == [0x9E] * accepted, "whole keys, none torn"
    for _ in range(100):
        machine.bus.port_write(0x60, 1, 0xF2)
    assert len(machine.read()) <= 17


def test_a_frozen_keyboard_takes_nothing(machine: Machine) -> None:
    machine.controller.pause()
    assert not machine.keyboard.inject(A)
    machine.controller.resume()
    assert machine.keyboard.inject(A)
