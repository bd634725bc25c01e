"""The I/O APIC and the board's interrupt lines, with real local APICs at the other end."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.irqchip import lapic as regs
from skep.irqchip.apicbus import ApicBus
from skep.irqchip.ioapic import LEVEL, LOGICAL, MASKED, PINS, REMOTE_IRR, IoApic
from skep.irqchip.lapic import LocalApic
from skep.irqchip.lines import GsiLines
from skep.irqchip.pic import Pic
from tests.boardtest import Time


@pytest.fixture
def time() -> Iterator[Time]:
    time = Time()
    yield time
    time.close()


class Chipset:
    def __init__(self, time: Time, cpus: int = 1) -> None:
        self.lock = time.lock
        self.pic = Pic()
        self.apics = ApicBus(time.lock)
        self.cpus = [LocalApic(i, self.apics, time.clock, self.pic.acknowledge, bsp=i == 0) for i in range(cpus)]
        self.ioapic = IoApic(self.apics)
        self.lines = GsiLines(self.pic, self.ioapic, time.lock)
        for cpu in self.cpus:
            cpu.write(regs.SVR, 4, 0x1FF)
        self.pic.output = lambda level: self.cpus[0].set_lint(0, level)

    def write(self, register: int, value: int) -> None:
        self.ioapic.write(0x00, 4, register)
        self.ioapic.write(0x10, 4, value)

    def read(self, register: int) -> int:
        self.ioapic.write(0x00, 4, register)
        return self.ioapic.read(0x10, 4)

    def route(self, pin: int, low: int, destination: int = 0) -> None:
        self.write(0x11 + 2 * pin, destination << 24)
        self.write(0x10 + 2 * pin, low)


class TestIoApic(DeviceConformance[IoApic]):
    @pytest.fixture(autouse=True)
    def _time(self, time: Time) -> None:
        self.time = time

    def make_device(self) -> IoApic:
        return Chipset(self.time).ioapic

    def regions(self, device: IoApic) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: IoApic, rng: random.Random) -> None:
        pin = rng.randrange(PINS)
        device.set_line(pin, True)
        device.set_line(pin, False)
        device.end_of_interrupt(rng.randrange(256))


def test_registers(time: Time) -> None:
    board = Chipset(time)
    assert board.read(1) == 0x17_0020
    board.write(0, 0x0F00_0000)
    assert board.read(0) == 0x0F00_0000 == board.read(2)
    assert board.read(0x10) == MASKED and board.read(0x11) == 0
    board.route(0, 0xFFFF_FFFF, 0xFF)
    assert board.read(0x10) == 0x1_AFFF and board.read(0x11) == 0xFF00_0000
    assert board.read(0x40) == 0


def test_an_edge_is_sent_once_and_lost_while_masked(time: Time) -> None:
    board = Chipset(time)
    cpu, line = board.cpus[0], board.lines.source(4)
    line.set(True)
    board.route(4, 0x34)
    assert not cpu.pending(), "the edge came before"
    line.set(False)
    line.set(True)
    assert cpu.acknowledge() == 0x34
    cpu.write(regs.EOI, 4, 0)
    assert not cpu.pending()


def test_a_level_comes_again_after_eoi_until_it_falls(time: Time) -> None:
    board = Chipset(time)
    cpu, line = board.cpus[0], board.lines.source(16)
    board.route(16, 0x45 | LEVEL)
    line.set(True)
    assert board.read(0x30) & REMOTE_IRR
    assert cpu.acknowledge() == 0x45
    line.set(False)
    line.set(True)
    assert not cpu.irr, "remote IRR holds it back"
    cpu.write(regs.EOI, 4, 0)
    assert cpu.acknowledge() == 0x45
    line.set(False)
    cpu.write(regs.EOI, 4, 0)
    assert not cpu.pending() and not board.read(0x30) & REMOTE_IRR


def test_a_level_that_waits_is_heard_at_unmasking(time: Time) -> None:
    board = Chipset(time)
    line = board.lines.source(17)
    board.route(17, 0x46 | LEVEL | MASKED)
    line.set(True)
    assert not board.cpus[0].pending()
    board.route(17, 0x46 | LEVEL)
    assert board.cpus[0].acknowledge() == 0x46


def test_eoi_register_and_switching_to_edge_clear_remote_irr(time: Time) -> None:
    board = Chipset(time)
    line = board.lines.source(18)
    board.route(18, 0x47 | LEVEL)
    line.set(True)
    line.set(False)
    board.ioapic.write(0x40, 4, 0x46)
    assert board.read(0x34) & REMOTE_IRR, "another vector's end"
    board.ioapic.write(0x40, 4, 0x47)
    assert not board.read(0x34) & REMOTE_IRR
    line.set(True)
    board.route(18, 0x47 | MASKED)
    assert not board.read(0x34) & REMOTE_IRR


def test_destinations_and_nmi(time: Time) -> None:
    board = Chipset(time, 2)
    line = board.lines.source(5)
    board.route(5, 0x50, destination=1)
    line.set(True)
    assert board.cpus[1].acknowledge() == 0x50 and not board.cpus[0].pending()
    line.set(False)
    board.cpus[0].write(regs.LDR, 4, 1 << 24)
    board.route(5, 0x51 | LOGICAL, destination=1)
    line.set(True)
    assert board.cpus[0].acknowledge() == 0x51
    line.set(False)
    board.route(5, 0x400 | LEVEL)
    line.set(True)
    assert board.cpus[0].take_nmi() and not board.read(0x1A) & REMOTE_IRR


def test_irq_0_is_pin_2(time: Time) -> None:
    board = Chipset(time)
    board.route(2, 0x30)
    board.lines.source(0).set(True)
    assert board.cpus[0].acknowledge() == 0x30
    assert board.pic.master.irr == 1


def test_a_shared_line_is_up_while_anybody_pulls_it(time: Time) -> None:
    board = Chipset(time)
    one, two = board.lines.source(20), board.lines.source(20)
    one.set(True)
    one.set(True)
    two.set(True)
    one.set(False)
    assert board.ioapic.lines == 1 << 20
    two.set(False)
    assert board.ioapic.lines == 0


def test_isa_lines_reach_the_8259_pair_and_through_it_lint0(time: Time) -> None:
    board = Chipset(time)
    chip = board.pic.master
    for offset, value in ((0, 0x11), (1, 0x20), (1, 4), (1, 1)):
        chip.write(offset, 1, value)
    line = board.lines.source(3)
    line.set(True)
    assert board.cpus[0].acknowledge() == 0x23
    assert not board.cpus[0].pending()
    board.lines.source(20).set(True)
    assert chip.lines == 1 << 3
