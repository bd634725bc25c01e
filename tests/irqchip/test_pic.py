"""The 8259 pair, against the 8259A data sheet."""

from __future__ import annotations

import random

from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.irqchip.pic import Pic


def initialized(auto_eoi: bool = False, fully_nested: bool = False) -> Pic:
    """As a PC's software leaves it: vectors 0x20 and 0x28, nothing masked."""
    pic = Pic()
    pic.reset()
    for chip, base, icw3 in ((pic.master, 0x20, 4), (pic.slave, 0x28, 2)):
        chip.write(0, 1, 0x11)
        chip.write(1, 1, base)
        chip.write(1, 1, icw3)
        chip.write(1, 1, 0x01 | 0x02 * auto_eoi | 0x10 * fully_nested)
    return pic


def eoi(pic: Pic, both: bool = False) -> None:
    if both:
        pic.slave.write(0, 1, 0x20)
    pic.master.write(0, 1, 0x20)


class TestPic(DeviceConformance[Pic]):
    def make_device(self) -> Pic:
        return Pic()

    def regions(self, device: Pic) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: Pic, rng: random.Random) -> None:
        device.set_line(rng.choice([irq for irq in range(16) if irq != 2]), rng.random() < 0.5)
        device.acknowledge()

    def let_go(self, device: Pic) -> None:
        for irq in range(16):
            if irq != 2:
                device.set_line(irq, False)


def test_lower_numbers_are_served_first() -> None:
    pic = initialized()
    for irq in (7, 12, 0, 3):
        pic.set_line(irq, True)
    assert pic.acknowledge() == 0x20
    assert not pic._level, "nothing above IRQ 0 waits"
    eoi(pic)
    assert pic.acknowledge() == 0x2C  # the slave's input 4 ranks as the master's input 2
    eoi(pic, both=True)
    assert pic.acknowledge() == 0x23
    eoi(pic)
    assert pic.acknowledge() == 0x27


def test_a_higher_priority_interrupts_a_lower_one() -> None:
    pic = initialized()
    pic.set_line(5, True)
    assert pic.acknowledge() == 0x25
    pic.set_line(6, True)
    assert pic.master.requested() == -1
    pic.set_line(1, True)
    assert pic.acknowledge() == 0x21
    assert pic.master.isr == 1 << 5 | 1 << 1
    eoi(pic)
    assert pic.master.isr == 1 << 5


def test_an_edge_counts_once_and_a_level_until_it_falls() -> None:
    pic = initialized()
    pic.set_line(5, True)
    pic.acknowledge()
    eoi(pic)
    assert pic.master.requested() == -1, "the edge was served"
    pic.elcr.write(0, 1, 0x20)
    assert pic.acknowledge() == 0x25
    eoi(pic)
    assert pic.acknowledge() == 0x25, "the level is still there"
    pic.set_line(5, False)
    eoi(pic)
    assert pic.master.requested() == -1


def test_elcr_keeps_the_timer_keyboard_and_rtc_edge_triggered() -> None:
    pic = Pic()
    pic.elcr.write(0, 2, 0xFFFF)
    assert pic.elcr.read(0, 2) == 0xDEF8


def test_a_request_that_went_away_is_irq_7() -> None:
    pic = initialized()
    assert pic.acknowledge() == 0x27
    assert pic.master.isr == 0, "a spurious interrupt sets no in-service bit"
    pic.elcr.write(1, 1, 0x04)
    pic.set_line(10, True)
    pic.slave.write(1, 1, 0xFF)
    assert pic.master.requested() == -1


def test_output_follows_requests_masks_and_acknowledges() -> None:
    pic = initialized()
    levels: list[bool] = []
    pic.output = levels.append
    pic.set_line(14, True)
    pic.master.write(1, 1, 0x04)  # mask the cascade
    pic.master.write(1, 1, 0x00)
    pic.acknowledge()
    assert levels == [True, False, True, False]


def test_masked_edges_stay_requested() -> None:
    pic = initialized()
    pic.master.write(1, 1, 0x08)
    pic.set_line(3, True)
    pic.set_line(3, False)
    assert pic.master.requested() == -1
    pic.master.write(1, 1, 0x00)
    assert pic.acknowledge() == 0x23


def test_specific_eoi_and_rotation() -> None:
    pic = initialized()
    pic.set_line(4, True)
    assert pic.acknowledge() == 0x24
    pic.master.write(0, 1, 0xE4)  # rotate on specific EOI of 4: 4 is now the lowest
    assert pic.master.isr == 0
    pic.set_line(4, False)
    for irq in (4, 5, 3):
        pic.set_line(irq, True)
    assert pic.acknowledge() == 0x25
    pic.master.write(0, 1, 0xA0)  # rotate on non-specific EOI: 5 is the lowest
    pic.set_line(6, True)
    assert pic.acknowledge() == 0x26
    pic.master.write(0, 1, 0x66)
    assert pic.acknowledge() == 0x23
    pic.master.write(0, 1, 0x63)
    pic.master.write(0, 1, 0xC7)  # set priority: back to 7 the lowest
    assert pic.acknowledge() == 0x24


def test_auto_eoi_leaves_nothing_in_service_and_may_rotate() -> None:
    pic = initialized(auto_eoi=True)
    pic.master.write(0, 1, 0x80)
    pic.set_line(0, True)
    pic.set_line(1, True)
    assert pic.acknowledge() == 0x20 and pic.master.isr == 0
    pic.set_line(0, False)
    pic.set_line(0, True)
    assert pic.acknowledge() == 0x21, "0 was served last"
    assert pic.acknowledge() == 0x20


def test_special_mask_mode_lets_lower_priorities_through() -> None:
    pic = initialized()
    pic.set_line(1, True)
    pic.acknowledge()
    pic.set_line(6, True)
    pic.master.write(1, 1, 0x02)
    assert pic.master.requested() == -1
    pic.master.write(0, 1, 0x68)
    assert pic.acknowledge() == 0x26
    eoi(pic)
    assert pic.master.isr == 0x02, "a masked input's bit is not cleared by a non-specific EOI"


def test_special_fully_nested_mode_hears_the_slave_again() -> None:
    for nested, expected in ((False, -1), (True, 2)):
        pic = initialized(fully_nested=nested)
        pic.set_line(12, True)
        assert pic.acknowledge() == 0x2C
        pic.set_line(8, True)  # of higher priority within the slave
        assert pic.master.requested() == expected


def test_poll_acknowledges() -> None:
    pic = initialized()
    pic.master.write(0, 1, 0x0C)
    assert pic.master.read(0, 1) == 0
    pic.set_line(3, True)
    pic.master.write(0, 1, 0x0C)
    assert pic.master.read(0, 1) == 0x83
    pic.master.write(0, 1, 0x0B)
    assert pic.master.read(0, 1) == 0x08, "ISR"
    pic.master.write(0, 1, 0x0A)
    assert pic.master.read(0, 1) == 0, "IRR"


def test_initialization_without_icw4_and_in_single_mode() -> None:
    pic = initialized(auto_eoi=True)
    pic.master.write(0, 1, 0x12)  # single, no ICW4
    pic.master.write(1, 1, 0x47)
    pic.master.write(1, 1, 0xFE)  # OCW1 already
    assert (pic.master.vector_base, pic.master.imr, pic.master.auto_eoi) == (0x40, 0xFE, False)


def test_linux_finds_it() -> None:
    """probe_8259A: the mask register holds what was written."""
    pic = Pic()
    pic.reset()
    pic.slave.write(1, 1, 0xFF)
    pic.master.write(1, 1, 0xFB)
    assert pic.master.read(1, 1) == 0xFB
