"""PCI configuration space, BARs and MSI-X, against PCI Local Bus 3.0; through the ports and ECAM, as a guest."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from skep.bells import answer
from skep.bus.msix import MsiX
from skep.bus.pci import (
    BAR0,
    CAP_MSIX,
    CAP_VENDOR,
    CAPABILITIES,
    COMMAND,
    COMMAND_INTX_OFF,
    COMMAND_IO,
    COMMAND_MEMORY,
    HEADER_TYPE,
    STATUS,
    HostBridge,
    PciBus,
    PciFunction,
    PciIds,
    intx_gsi,
)
from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.errors import UserError
from tests.boardtest import Msis, Wire, new_bus

ECAM = 0xE000_0000
IO, MMIO = range(0xC000, 0x1_0000), range(0xC000_0000, 0xD000_0000)


class Ram:
    """A window that remembers bytes."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


class Card(PciFunction):
    """One of every kind of BAR, a vendor capability, MSI-X, and a pin."""

    def __init__(self, name: str = "card") -> None:
        super().__init__(name, PciIds(0x1234, 0x5678, 0x02_0000, 3, 0xAAAA, 0xBBBB), pin=0)
        self.add_bar(0, 0x1000, Ram(0x1000))
        self.add_bar(1, 0x20, Ram(0x20), io=True)
        self.add_bar(2, 0x10_0000, Ram(0x10_0000), wide=True, prefetchable=True)
        self.vendor = self.add_capability(CAP_VENDOR, b"\x05\x11\x22", b"\x00\xff")
        self.add_msix(4, bar=4)


class Slot:
    """A bus with one card at 0:3.0, and the ways of a guest to it."""

    def __init__(self) -> None:
        self.bus = new_bus()
        self.msis = Msis()
        self.wires: dict[int, Wire] = {}
        self.pci = PciBus(self.bus, self.msis, self.wire)
        self.pci.attach(ECAM)
        self.card = Card()
        self.pci.add(HostBridge(), 0)
        self.pci.add(self.card, 3)
        for function in self.pci.functions.values():
            function.reset()

    def wire(self, gsi: int) -> Wire:
        return self.wires.setdefault(gsi, Wire())

    def read(self, offset: int, size: int = 4, slot: int = 3, function: int = 0) -> int:
        self.bus.port_write(0xCF8, 4, 1 << 31 | slot << 11 | function << 8 | offset & 0xFC)
        return self.bus.port_read(0xCFC + (offset & 3), size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.bus.port_write(0xCF8, 4, 1 << 31 | 3 << 11 | offset & 0xFC)
        self.bus.port_write(0xCFC + (offset & 3), size, value)

    def enable_msix(self, control: int = 0x8000) -> int:
        """Turn MSI-X on; returns the address of the table."""
        self.pci.assign(IO, MMIO)
        offset = self.capability(CAP_MSIX)
        self.write(offset + 2, control, 2)
        return self.card.bar_address(4)

    def capability(self, wanted: int) -> int:
        offset = self.read(CAPABILITIES, 1)
        while self.read(offset, 1) != wanted:
            offset = self.read(offset + 1, 1)
            assert offset, "no such capability"
        return offset


class TestCard(DeviceConformance[Card]):
    def make_device(self) -> Card:
        slot = Slot()
        return slot.card

    def regions(self, device: Card) -> list[tuple[IoRegion, int]]:
        assert device.msix is not None
        return [(_Config(device), 0x1000), (device.msix, device.msix.bar_size)]

    def time_passes(self, device: Card, rng: random.Random) -> None:
        assert device.msix is not None
        device.msix.signal(rng.randrange(5))
        device.set_intx(rng.random() < 0.5)


class TestPciBus(DeviceConformance[PciBus]):
    def make_device(self) -> PciBus:
        return Slot().pci

    def regions(self, device: PciBus) -> list[tuple[IoRegion, int]]:
        return device.regions()


class _Config:
    def __init__(self, function: PciFunction) -> None:
        self.read, self.write = function.config_read, function.config_write


def test_who_is_there() -> None:
    slot = Slot()
    assert slot.read(0) == 0x5678_1234 and slot.read(8) == 0x02_0000_03 and slot.read(0x2C) == 0xBBBB_AAAA
    assert slot.read(0, slot=0) == 0x0D57_8086 and slot.read(0xA, 2, slot=0) == 0x0600
    assert slot.read(0, slot=4) == slot.read(0, function=1) == 0xFFFF_FFFF
    assert slot.read(0x3D, 1) == 1 and slot.read(0x3C, 1) == 0xFF
    slot.bus.port_write(0xCF8, 4, 3 << 11)
    assert slot.bus.port_read(0xCFC, 4) == 0xFFFF_FFFF, "the enable bit is clear"
    slot.bus.port_write(0xCF8, 4, 1 << 31 | 1 << 16)
    assert slot.bus.port_read(0xCFC, 4) == 0xFFFF_FFFF, "there is no bus 1"


def test_linux_finds_configuration_mechanism_1() -> None:
    """pci_check_type1: a byte at 0xcfb is not the address, a dword at 0xcf8 is."""
    slot = Slot()
    slot.bus.port_write(0xCFB, 1, 1)
    slot.bus.port_write(0xCF8, 4, 0x8000_0000)
    assert slot.bus.port_read(0xCF8, 4) == 0x8000_0000
    slot.bus.port_write(0xCF8, 4, 0xFFFF_FFFF)
    assert slot.bus.port_read(0xCF8, 4) == 0x80FF_FFFC


def test_port_cf9_is_the_reset_register() -> None:
    bus, reset = new_bus(), Ram(1)
    PciBus(bus, Msis(), lambda gsi: Wire(), reset).attach(ECAM)
    bus.port_write(0xCF9, 1, 6)
    assert reset.bytes == b"\x06" and bus.port_read(0xCF9, 1) == 6
    bus.port_write(0xCF8, 4, 0x8000_0E00)
    assert reset.bytes == b"\x06" and bus.port_read(0xCF8, 4) == 0x8000_0E00


def test_ecam_is_the_same_space() -> None:
    slot = Slot()
    at = ECAM | 3 << 15
    assert slot.bus.mmio_read(at, 4) == 0x5678_1234 and slot.bus.mmio_read(at + 2, 1) == 0x78
    slot.bus.mmio_write(at + COMMAND, 2, COMMAND_MEMORY)
    assert slot.read(COMMAND, 2) == COMMAND_MEMORY
    assert slot.bus.mmio_read(at + 0x100, 4) == 0, "no extended capabilities"
    assert slot.bus.mmio_read(ECAM | 9 << 15, 2) == 0xFFFF


def test_only_writable_bits_change() -> None:
    slot = Slot()
    for offset in range(0, 0x40, 4):
        if not BAR0 <= offset < BAR0 + 24:
            slot.write(offset, 0xFFFF_FFFF)
    assert slot.read(0) == 0x5678_1234 and slot.read(8) == 0x02_0000_03
    assert slot.read(COMMAND, 2) == 0x0547 and slot.read(STATUS, 2) == 0x10
    assert slot.read(0x0C) == 0xFF and slot.read(0x34) == 0x40 and slot.read(0x3C) == 0x01FF


def test_bars_tell_their_size() -> None:
    slot = Slot()
    sizes = []
    for i in range(6):
        slot.write(BAR0 + 4 * i, 0xFFFF_FFFF)
        sizes.append(slot.read(BAR0 + 4 * i))
    assert sizes == [0xFFFF_F000, 0xFFFF_FFE1, 0xFFF0_000C, 0xFFFF_FFFF, 0xFFFF_F000, 0]


def test_windows_are_where_the_bars_say_while_decoding_is_on() -> None:
    slot = Slot()
    bus = slot.bus
    slot.write(BAR0, 0xC123_4FFF)
    slot.write(BAR0 + 4, 0xC020)
    bus.mmio_write(0xC123_4010, 4, 0x1111)
    slot.write(COMMAND, COMMAND_MEMORY, 2)
    assert bus.mmio_read(0xC123_4010, 4) == 0
    bus.mmio_write(0xC123_4010, 4, 0x2222)
    assert bus.port_read(0xC020, 1) == 0xFF
    slot.write(COMMAND, COMMAND_MEMORY | COMMAND_IO, 2)
    assert bus.port_read(0xC020, 1) == 0
    slot.write(BAR0, 0xC888_8000)
    assert bus.mmio_read(0xC888_8010, 4) == 0x2222 and bus.mmio_read(0xC123_4010, 4) == 0xFFFF_FFFF
    slot.write(BAR0 + 8, 0x10_0000)
    slot.write(BAR0 + 12, 0x12)
    bus.mmio_write(0x12_0010_0000, 4, 0x3333)
    assert bus.mmio_read(0x12_0010_0000, 4) == 0x3333
    slot.write(COMMAND, 0, 2)
    assert bus.mmio_read(0x12_0010_0000, 4) == 0xFFFF_FFFF and bus.port_read(0xC020, 1) == 0xFF


def test_a_window_over_another_devices_stays_hidden() -> None:
    slot = Slot()
    slot.bus.add_mmio(0xFEC0_0000, 0x1000, other := Ram(0x1000))
    slot.write(COMMAND, COMMAND_MEMORY, 2)
    slot.write(BAR0, 0xFEC0_0000)
    slot.bus.mmio_write(0xFEC0_0000, 1, 7)
    assert other.bytes[0] == 7
    slot.write(BAR0, 0xC000_0000)
    assert slot.bus.mmio_read(0xC000_0000, 1) == 0


def test_assign_gives_aligned_places_in_the_windows_and_again_after_reset() -> None:
    slot = Slot()
    second = Card("second")
    slot.pci.add(second, 4)
    second.reset()
    for _ in range(2):
        slot.pci.assign(IO, MMIO)
        taken: list[range] = []
        for card in (slot.card, second):
            assert card.command & 3 == 3
            for index, bar in card.bars.items():
                at = card.bar_address(index)
                assert bar.at == at and at % bar.size == 0 and at in (IO if bar.io else MMIO)
                assert not any(at < other.stop and other.start < at + bar.size for other in taken)
                taken.append(range(at, at + bar.size))
            card.reset()
            assert all(bar.at is None for bar in card.bars.values())
    with pytest.raises(UserError, match="no room"):
        slot.pci.assign(IO, range(0xC000_0000, 0xC010_0000))


def test_multifunction_is_told_by_every_function_of_the_slot() -> None:
    slot = Slot()
    assert slot.read(HEADER_TYPE, 1) == 0
    slot.pci.add(Card("second"), 3, 2)
    assert slot.read(HEADER_TYPE, 1) == slot.read(HEADER_TYPE, 1, function=2) == 0x80
    slot.card.reset()
    assert slot.read(HEADER_TYPE, 1) == 0x80
    with pytest.raises(ValueError, match=r"3\.2"):
        slot.pci.add(Card("third"), 3, 2)


def test_capabilities_are_a_list() -> None:
    slot = Slot()
    assert slot.read(STATUS, 2) & 0x10
    vendor = slot.capability(CAP_VENDOR)
    assert vendor == 0x40 and slot.read(vendor) >> 16 == 0x1105 and slot.read(vendor + 4, 1) == 0x22
    slot.write(vendor, 0xFFFF_FFFF)
    assert slot.read(vendor) >> 16 == 0xFF05
    msix = slot.capability(CAP_MSIX)
    assert slot.read(msix + 2, 2) == 3 and slot.read(msix + 4) == 4 and slot.read(msix + 8) == 0x800 | 4


def test_intx_is_swizzled_and_can_be_turned_off() -> None:
    slot = Slot()
    assert [intx_gsi(3, pin) for pin in range(4)] == [19, 20, 21, 22] and intx_gsi(6, 3) == 17
    wire = slot.wires[19]
    slot.card.set_intx(True)
    assert wire.level and slot.read(STATUS, 2) & 8
    slot.write(COMMAND, COMMAND_INTX_OFF, 2)
    assert not wire.level and slot.read(STATUS, 2) & 8
    slot.write(COMMAND, 0, 2)
    assert wire.level
    slot.enable_msix()
    assert not wire.level
    slot.card.reset()
    assert not wire.level and not slot.read(STATUS, 2) & 8


def program(slot: Slot, table: int, vector: int, address: int, data: int, control: int = 0) -> None:
    entry = table + 16 * vector
    slot.bus.mmio_write(entry, 8, address)
    slot.bus.mmio_write(entry + 8, 4, data)
    slot.bus.mmio_write(entry + 12, 4, control)


def test_msix_sends_what_the_table_says() -> None:
    slot = Slot()
    assert slot.card.msix is not None
    table = slot.enable_msix()
    program(slot, table, 2, 0x1_FEE0_0000, 0x4041)
    slot.card.msix.signal(2)
    assert slot.msis.messages == [(0x1_FEE0_0000, 0x4041)]
    assert slot.bus.mmio_read(table + 32, 4) == 0xFEE0_0000 and slot.bus.mmio_read(table + 44, 4) == 0
    slot.card.msix.signal(1)
    slot.card.msix.signal(99)
    assert len(slot.msis.messages) == 1, "masked from power-on; no such vector"


def test_msix_masks_hold_messages_back_as_pending() -> None:
    slot = Slot()
    msix = slot.card.msix
    assert msix is not None
    table = slot.enable_msix()
    program(slot, table, 0, 0xFEE0_0000, 0x41, control=1)
    program(slot, table, 3, 0xFEE0_0000, 0x44)
    msix.signal(0)
    msix.signal(0)
    assert not slot.msis.messages and slot.bus.mmio_read(table + 0x800, 8) == 1
    slot.bus.mmio_write(table + 12, 4, 0)
    assert slot.msis.messages == [(0xFEE0_0000, 0x41)] and slot.bus.mmio_read(table + 0x800, 8) == 0
    control = slot.capability(CAP_MSIX) + 2
    slot.write(control, 0xC000, 2)
    msix.signal(3)
    assert slot.bus.mmio_read(table + 0x800, 4) == 8
    slot.write(control, 0x8000, 2)
    assert slot.msis.messages[-1] == (0xFEE0_0000, 0x44)
    slot.write(control, 0, 2)
    msix.signal(3)
    assert len(slot.msis.messages) == 2 and not msix.enabled and not msix.pending


class Binding(Msis):
    """A sink that takes messages from eventfds, when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.bound: dict[int, tuple[int, int]] = {}
        self.room = 1

    def bind(self, fd: int, address: int, data: int) -> bool:
        if len(self.bound) >= self.room:
            return False
        self.bound[fd] = address, data
        return True

    def unbind(self, fd: int) -> None:
        del self.bound[fd]

    def take(self) -> None:
        for fd, message in self.bound.items():
            self.messages += [message] * answer(fd)


def steady(slot: Slot, vector: int) -> tuple[MsiX, Binding, int]:
    """A vector whose message is the sink's, and where its table entry is."""
    sink, msix = Binding(), slot.card.msix
    assert msix is not None
    msix.connect(sink, slot.bus.lock)
    entry = slot.enable_msix() + 16 * vector
    program(slot, entry - 16 * vector, vector, 0xFEE0_0000, 0x41)
    for _ in range(16):
        assert not sink.bound
        msix.signal(vector)
    assert list(sink.bound.values()) == [(0xFEE0_0000, 0x41)] and len(sink.messages) == 16
    return msix, sink, entry


def test_msix_messages_that_come_often_take_an_eventfd() -> None:
    slot = Slot()
    msix, sink, _ = steady(slot, 0)
    for _ in range(3):
        msix.signal(0)
    assert len(sink.messages) == 16 and not msix.pending
    sink.take()
    assert len(sink.messages) == 19
    for _ in range(20):
        msix.signal(1)  # masked
    program(slot, slot.enable_msix(), 1, 0xFEE0_0000, 0x42)
    for _ in range(20):
        msix.signal(1)
    assert len(sink.bound) == 1 and sink.messages[-1] == (0xFEE0_0000, 0x42), "the sink has no more room"


@pytest.mark.parametrize("by", ["vector", "function"])
def test_msix_what_the_sink_has_not_taken_waits_behind_a_mask(by: str) -> None:
    slot = Slot()
    msix, sink, entry = steady(slot, 0)
    control = slot.capability(CAP_MSIX) + 2
    mask, unmask = {
        "vector": (lambda: slot.bus.mmio_write(entry + 12, 4, 1), lambda: slot.bus.mmio_write(entry + 12, 4, 0)),
        "function": (lambda: slot.write(control, 0xC000, 2), lambda: slot.write(control, 0x8000, 2)),
    }[by]
    msix.signal(0)
    mask()
    assert not sink.bound and msix.pending == 1 and len(sink.messages) == 16
    unmask()
    assert not msix.pending and len(sink.messages) == 17
    mask()
    msix.signal(0)
    unmask()
    assert len(sink.messages) == 18 and not sink.bound


def test_msix_a_message_that_is_masked_while_it_is_sent_waits() -> None:
    """Between the look for an eventfd and the look whether it still has a reader."""
    slot = Slot()
    msix, sink, entry = steady(slot, 0)

    class Bound(dict[int, int]):
        def get(self, vector: int, default: Any = None) -> Any:
            found = dict(self).get(vector, default)
            slot.bus.mmio_write(entry + 12, 4, 1)
            return found

    msix._bound = Bound(msix._bound)
    msix.signal(0)
    assert not sink.bound and msix.pending == 1
    slot.bus.mmio_write(entry + 12, 4, 0)
    assert len(sink.messages) == 17


def test_msix_an_entry_that_changes_is_the_sinks_no_longer() -> None:
    slot = Slot()
    msix, sink, entry = steady(slot, 0)
    slot.bus.mmio_write(entry + 8, 4, 0x55)
    assert not sink.bound
    msix.signal(0)
    assert sink.messages[-1] == (0xFEE0_0000, 0x55)
    for _ in range(16):
        msix.signal(0)
    assert list(sink.bound.values()) == [(0xFEE0_0000, 0x55)]
    fds = len(os.listdir("/proc/self/fd"))
    slot.card.reset()
    assert not sink.bound and not msix.pending
    slot.card.close()
    assert len(os.listdir("/proc/self/fd")) == fds - 1


def test_msix_ignores_what_the_specification_leaves_undefined() -> None:
    msix = MsiX(2)
    msix.write(0, 2, 0xFFFF)
    msix.write(2, 4, 0xFFFF_FFFF)
    assert msix.read(0, 8) == 0
    msix.write(0x800, 8, 0xFF)
    assert msix.read(0x800, 8) == 0
    assert (MsiX(2048).bar_size, MsiX(1).bar_size) == (0x10000, 0x1000)


def test_saved_functions_come_back_with_their_windows() -> None:
    slot, other = Slot(), Slot()
    slot.enable_msix()
    slot.card.set_intx(True)
    other.card.load(slot.card.save())
    assert [bar.at for bar in other.card.bars.values()] == [bar.at for bar in slot.card.bars.values()]
    other.write(other.capability(CAP_MSIX) + 2, 0, 2)
    assert other.wires[19].level


def test_closing_takes_the_windows_away() -> None:
    slot = Slot()
    slot.pci.assign(IO, MMIO)
    at = slot.card.bar_address(0)
    slot.card.close()
    assert slot.bus.mmio_read(at, 4) == 0xFFFF_FFFF


def test_bars_that_cannot_be() -> None:
    card = PciFunction("card", PciIds(1, 2, 3))
    for index, size, io, wide in ((0, 24, False, False), (0, 0x200, True, False), (5, 0x1000, False, True)):
        with pytest.raises(ValueError, match="no such BAR"):
            card.add_bar(index, size, Ram(size), io=io, wide=wide)
    card.add_bar(2, 0x1000, Ram(0x1000), wide=True)
    with pytest.raises(ValueError, match="taken"):
        card.add_bar(3, 0x1000, Ram(0x1000))
    with pytest.raises(ValueError, match="taken"):
        card.add_bar(1, 0x1000, Ram(0x1000), wide=True)
