"""virtio-rnd against virtio 1.2, 5.4."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.virtio.pci import VirtioPci
from skep.devices.virtio.queue import Chain
from skep.devices.virtio.rnd import VirtioRnd
from tests.devices.virtio.driver import NEEDS_RESET, Board, Driver


class Made:
    def __init__(self) -> None:
        self.board = Board()
        self.function = VirtioPci(VirtioRnd("rnd", self.board.memory, self.board.lock))
        self.board.add(self.function)

    def close(self) -> None:
        self.function.close()
        self.board.memory.close()


@pytest.fixture
def made() -> Iterator[Made]:
    one = Made()
    yield one
    one.close()


def test_5_4_1_identity(made: Made) -> None:
    driver = Driver(made.board, 0)
    assert driver.pci_read(2, 2) == 0x1044
    assert driver.config(0, 4) == 0


def test_5_4_6_random_bytes(made: Made) -> None:
    driver = Driver(made.board, 0)
    queue = driver.start()
    memory = made.board.memory
    seen = set()
    for _ in range(3):
        gpa = driver.allocate(64)
        queue.add([(gpa, 64, True)])
        queue.kick()
        assert [written for _, written in queue.wait()] == [64]
        seen.add(memory.read(gpa, 64))
    assert len(seen) == 3 and bytes(64) not in seen


def test_5_4_6_2_fewer_than_asked_for_and_no_more_written_than_said(made: Made) -> None:
    driver = Driver(made.board, 0)
    queue = driver.start()
    gpa = driver.allocate(0x4000)
    queue.add([(gpa, 0x4000, True), (driver.allocate(16), 16, True)])
    queue.kick()
    ((_, written),) = queue.wait()
    assert 1 <= written < 0x4000
    assert made.board.memory.read(gpa + written, 0x4000 - written) == bytes(0x4000 - written)


def test_5_4_6_1_a_readable_buffer_is_against_the_rules(made: Made) -> None:
    driver = Driver(made.board, 0)
    queue = driver.start()
    queue.add([(driver.allocate(64), 64, False)])
    queue.kick()
    assert made.board.messages.wait(driver.CONFIG_DATA)
    assert driver.status & NEEDS_RESET


class Later(VirtioRnd):
    """Its requests are done when the test says so."""

    def __init__(self, board: Board) -> None:
        super().__init__("later", board.memory, board.lock)
        self.chains: list[Chain] = []

    def serve(self, chain: Chain) -> None:  # type: ignore[override]
        self.chains.append(chain)


def test_what_is_done_while_an_interrupt_is_sent_has_its_own() -> None:
    """By another thread, whose turn comes between the message and the end of the report that sent it."""
    board = Board()
    device = Later(board)
    function = VirtioPci(device)
    board.add(function)
    driver = Driver(board, 0)
    queue = driver.start()
    for _ in range(2):
        queue.add([(driver.allocate(16), 16, True)])
    queue.kick()
    driver.wait(lambda: len(device.chains) == 2)
    other = threading.Thread(target=device.finish, args=((device.chains[1], 0),))
    signal = board.messages.signal

    def meanwhile(address: int, data: int) -> None:
        signal(address, data)
        if not other.ident:
            other.start()
            driver.wait(lambda: device.worker.idle)

    board.messages.signal = meanwhile  # type: ignore[method-assign]
    device.finish((device.chains[0], 0))
    other.join()
    assert len(queue.wait(2)) == 2 and board.messages.count(driver.QUEUE_DATA) == 2
    function.close()
    board.memory.close()


class TestConformance(DeviceConformance[VirtioPci]):
    accesses = 20_000

    def make_device(self) -> VirtioPci:
        board = Board()
        function = VirtioPci(VirtioRnd("rnd", board.memory, board.lock))
        board.pci.add(function, 1)
        return function

    def regions(self, device: VirtioPci) -> Sequence[tuple[IoRegion, int]]:
        return [(bar.region, bar.size) for bar in device.bars.values()]
