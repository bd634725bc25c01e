"""The test device of KVM-unit-tests."""

from __future__ import annotations

from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.pctestdev import PcTestDev
from tests.boardtest import Wire, new_bus


def make() -> tuple[PcTestDev, list[Wire], list[int]]:
    wires = [Wire() for _ in range(24)]
    left: list[int] = []
    return PcTestDev(wires, left.append), wires, left


class TestPcTestDev(DeviceConformance[PcTestDev]):
    def make_device(self) -> PcTestDev:
        return make()[0]

    def regions(self, device: PcTestDev) -> list[tuple[IoRegion, int]]:
        return device.regions()


def test_what_it_answers() -> None:
    device, wires, left = make()
    bus = new_bus()
    device.attach(bus)
    bus.port_write(0xE0, 4, 0x12345678)
    assert [bus.port_read(0xE8 + i, 1) for i in range(4)] == [0x78, 0x56, 0x34, 0x12]
    bus.port_write(0xEA, 1, 0xAB)
    assert bus.port_read(0xE0, 4) == 0x12AB5678 and bus.port_read(0xE2, 2) == 0x12AB
    bus.port_write(0x2000 + 9, 1, 1)
    bus.port_write(0x2000 + 4, 1, 1)
    bus.port_write(0x2000 + 9, 1, 0)
    assert [i for i, wire in enumerate(wires) if wire.level] == [4]
    device.reset()
    assert not any(wire.level for wire in wires) and bus.port_read(0xE0, 4) == 0
    bus.mmio_write(0xFF00FFF8, 8, 0x1122334455667788)
    assert bus.mmio_read(0xFF00FFFC, 4) == 0x11223344
    bus.port_write(0xE4, 4, 0x1000)
    assert left == []
    for value, status in ((0, 1), (1, 3), (0x7F, 255), (0x80, 1)):
        bus.port_write(0xF4, 1, value)
        assert left.pop() == status
