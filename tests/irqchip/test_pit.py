"""The 8254, against its data sheet."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.irqchip.pit import MAX_LOST_TICKS, PIT_HZ, Counter, Pit
from tests.boardtest import Time, Wire

TICK_NS = 1_000_000_000 / PIT_HZ


@pytest.fixture
def time() -> Iterator[Time]:
    time = Time()
    yield time
    time.close()


def pit_of(time: Time) -> tuple[Pit, Wire]:
    wire = Wire()
    return Pit(time.clock, wire), wire


class TestPit(DeviceConformance[Pit]):
    @pytest.fixture(autouse=True)
    def _time(self, time: Time) -> None:
        self.time = time

    def make_device(self) -> Pit:
        return pit_of(self.time)[0]

    def regions(self, device: Pit) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: Pit, rng: random.Random) -> None:
        self.time.pass_ns(rng.choice((0, 100, 1000, 60_000)))


def counter(mode: int, count: int, gate: bool = True, bcd: bool = False) -> Counter:
    made = Counter(gate)
    made.program(3, mode, bcd)
    made.write(count & 0xFF, 0)
    made.write(count >> 8, 0)
    return made


def outputs(one: Counter, ticks: int, start: int = 0) -> str:
    text = ""
    for now in range(start, start + ticks):
        one.settle(now)
        text += "-_"[not one.output(now)]
    return text


def counts(one: Counter, ticks: int) -> list[int]:
    return [one.count(now) for now in range(ticks)]


def test_mode_0_interrupt_on_terminal_count() -> None:
    one = counter(0, 4)
    assert outputs(one, 8) == "____----"
    assert counts(one, 7) == [4, 3, 2, 1, 0, 0xFFFF, 0xFFFE]
    one.set_gate(False, 2)
    assert one.count(50) == 2
    one.set_gate(True, 52)
    assert outputs(one, 4, 52) == "__--", "it went on where it was held"


def test_mode_0_stops_at_the_first_byte_of_a_new_count() -> None:
    one = counter(0, 4)
    assert one.output(4)
    one.write(3, 10)
    assert outputs(one, 20, 10) == "_" * 20
    one.write(0, 30)
    assert outputs(one, 5, 30) == "___--"


def test_mode_1_one_shot() -> None:
    one = counter(1, 3, gate=False)
    assert outputs(one, 5) == "-----", "waits for its trigger"
    one.set_gate(True, 5)
    assert outputs(one, 5, 5) == "___--"
    one.set_gate(False, 11)
    one.set_gate(True, 12)
    assert outputs(one, 2, 12) == "__"
    one.set_gate(False, 14)
    one.set_gate(True, 14)
    assert outputs(one, 4, 14) == "___-", "it can be triggered again"


def test_mode_2_rate_generator() -> None:
    one = counter(2, 3)
    assert outputs(one, 9) == "--_--_--_"
    assert counts(one, 6) == [3, 2, 1, 3, 2, 1]
    one.write(2, 4)
    one.write(0, 4)
    assert outputs(one, 6, 4) == "-_-_-_", "the new count begins after the present cycle"
    one.set_gate(False, 10)
    assert outputs(one, 3, 10) == "---"
    one.set_gate(True, 13)
    assert outputs(one, 4, 13) == "-_-_"


def test_mode_3_square_wave() -> None:
    assert outputs(counter(3, 4), 8) == "--__--__"
    assert outputs(counter(3, 5), 10) == "---__---__"
    assert counts(counter(3, 4), 8) == [4, 2, 4, 2, 4, 2, 4, 2]
    assert counts(counter(3, 5), 5) == [4, 2, 0, 4, 2]


def test_mode_4_software_strobe() -> None:
    one = counter(4, 3)
    assert outputs(one, 7) == "---_---"
    assert one.rise(0) == 4


def test_mode_5_hardware_strobe() -> None:
    one = counter(5, 2, gate=False)
    assert outputs(one, 3) == "---"
    one.set_gate(True, 3)
    assert outputs(one, 4, 3) == "--_-"


def test_modes_6_and_7_are_2_and_3() -> None:
    assert (counter(6, 2).mode, counter(7, 2).mode) == (2, 3)


def test_bcd() -> None:
    one = counter(0, 0x1000, bcd=True)
    assert counts(one, 3) == [0x1000, 0x0999, 0x0998]
    assert one.count(1001) == 0x9999
    assert counter(2, 0, bcd=True).initial == 10_000
    assert counter(2, 0).initial == 0x10000


def test_count_is_latched_until_read_and_bytes_alternate(time: Time) -> None:
    pit, _ = pit_of(time)
    pit.write(3, 1, 0xB0)  # channel 2, mode 0, both bytes
    pit.write(2, 1, 0x34)
    pit.write(2, 1, 0x12)
    pit.write_port_b(1)
    pit.write(3, 1, 0x80)
    time.pass_ns(10_000_000)
    pit.write(3, 1, 0x80)  # a second latch is ignored
    assert (pit.read(2, 1), pit.read(2, 1)) == (0x34, 0x12)
    assert pit.read(2, 1) | pit.read(2, 1) << 8 == (0x1234 - int(10e6 / TICK_NS)) & 0xFFFF


def test_one_byte_accesses(time: Time) -> None:
    pit, _ = pit_of(time)
    pit.write(3, 1, 0x50)  # channel 1, low byte only
    pit.write(1, 1, 0x80)
    assert pit.counters[1].initial == 0x80 and pit.read(1, 1) == 0x80 and pit.read(1, 1) == 0x80
    pit.write(3, 1, 0x60)
    pit.write(1, 1, 0x80)
    assert pit.counters[1].initial == 0x8000 and pit.read(1, 1) == 0x80


def test_read_back_gives_status_then_count(time: Time) -> None:
    pit, _ = pit_of(time)
    pit.write(3, 1, 0x74)  # channel 1, mode 2
    pit.write(3, 1, 0xE4)  # status of channel 1
    assert pit.read(1, 1) == 0x80 | 0x40 | 0x34, "output high, null count"
    pit.write(1, 1, 0x10)
    pit.write(1, 1, 0x00)
    pit.write(3, 1, 0xC4)  # status and count of channel 1
    assert [pit.read(1, 1) for _ in range(3)] == [0x80 | 0x34, 0x10, 0x00]


def test_channel_0_interrupts_at_its_rate(time: Time) -> None:
    pit, wire = pit_of(time)
    pit.write(3, 1, 0x34)
    pit.write(0, 1, 11932 & 0xFF)
    pit.write(0, 1, 11932 >> 8)
    wire.rises = 0
    time.pass_ns(1_000_500_000)
    assert wire.rises == 100


def test_one_shot_interrupts_once(time: Time) -> None:
    pit, wire = pit_of(time)
    pit.write(3, 1, 0x30)
    assert not wire.level
    pit.write(0, 1, 0x00)
    pit.write(0, 1, 0x10)
    time.pass_ns(int(0x1000 * TICK_NS) - 10)
    assert not wire.level
    time.pass_ns(100_000_000)
    assert wire.level and wire.rises == 1


def test_late_ticks_are_made_up_for_but_not_all(time: Time) -> None:
    pit, wire = pit_of(time)
    pit.write(3, 1, 0x34)
    pit.write(0, 1, 11932 & 0xFF)
    pit.write(0, 1, 11932 >> 8)
    wire.rises = 0
    time.counter += 1_000_500_000  # 100 periods during which the host did not run us
    time.pass_ns(0)
    assert wire.rises == 1
    time.pass_ns(400_000_000)
    assert MAX_LOST_TICKS + 40 <= wire.rises <= MAX_LOST_TICKS + 42


def test_a_tiny_count_does_not_storm(time: Time) -> None:
    pit, wire = pit_of(time)
    pit.write(3, 1, 0x14)
    pit.write(0, 1, 1)
    wire.rises = 0
    time.pass_ns(1_000_000)
    assert 10 <= wire.rises <= 21


def test_linux_quick_calibration(time: Time) -> None:
    """pit_expect_msb: the high byte falls by one every 256 ticks, read without a latch."""
    pit, _ = pit_of(time)
    pit.write_port_b(1)
    pit.write(3, 1, 0xB0)
    pit.write(2, 1, 0xFF)
    pit.write(2, 1, 0xFF)
    time.pass_ns(int(100 * TICK_NS))
    for step in range(4):
        assert (pit.read(2, 1), pit.read(2, 1))[1] == 0xFF - step
        time.pass_ns(int(256 * TICK_NS))
    assert not pit.read_port_b() & 0x20
    time.pass_ns(int(65536 * TICK_NS))
    assert pit.read_port_b() & 0x20


def test_refresh_bit_toggles(time: Time) -> None:
    pit, _ = pit_of(time)
    seen = set()
    for _ in range(4):
        seen.add(pit.read_port_b() & 0x10)
        time.pass_ns(15_085)
    assert seen == {0, 0x10}


def test_time_that_stands_still_while_frozen_loses_no_tick(time: Time) -> None:
    pit, wire = pit_of(time)
    pit.write(3, 1, 0x34)
    pit.write(0, 1, 11932 & 0xFF)
    pit.write(0, 1, 11932 >> 8)
    wire.rises = 0
    time.clock.freeze()
    time.counter += 5_000_000_000
    time.clock.thaw()
    time.pass_ns(100_050_000)
    assert wire.rises == 10
