"""The VM generation identifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.vmgenid import VmGenId
from skep.memory import GuestMemory

PLACE = 0xFF000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(2 << 20)
    yield memory
    memory.close()


class Nothing:
    """The identifier has no registers."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class TestVmGenId(DeviceConformance[VmGenId]):
    accesses = scrambling = 1

    @pytest.fixture(autouse=True)
    def _memory(self, memory: GuestMemory) -> None:
        self.memory = memory

    def make_device(self) -> VmGenId:
        return VmGenId(self.memory, PLACE, lambda: None)

    def regions(self, device: VmGenId) -> Sequence[tuple[IoRegion, int]]:
        return [(Nothing(), 1)]


def test_it_changes_with_a_word_to_the_guest_and_not_otherwise(memory: GuestMemory) -> None:
    told: list[bytes] = []
    device = VmGenId(memory, PLACE, lambda: told.append(memory.read(PLACE, 16)))
    device.place()
    first = memory.read(PLACE, 16)
    assert first == device.guid and not told
    memory.clear()
    device.reset()
    device.place()
    assert memory.read(PLACE, 16) == first
    device.renew()
    assert told == [device.guid] and device.guid != first, "the word comes after the change"
    assert VmGenId(memory, PLACE, lambda: None).guid != VmGenId(memory, PLACE, lambda: None).guid
