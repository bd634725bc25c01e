"""The PCI transport against virtio 1.2, 4.1, and the life of a device under load."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.block.backend import Buffers
from skep.block.image import open_disk
from skep.block.options import BlockOptions
from skep.bus.pci import COMMAND, COMMAND_MEMORY
from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.virtio.blk import T_FLUSH, T_IN, T_OUT, VirtioBlk
from skep.devices.virtio.pci import REGISTERS_SIZE, VirtioPci
from tests.devices.virtio.disk import ALL, SIZE, Disk, Nowhere, disk
from tests.devices.virtio.driver import F_RING_RESET, NEEDS_RESET, Board, Driver


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "disk.img") as one:
        yield one


@pytest.fixture
def started(made: Disk) -> Disk:
    made.start()
    return made


def test_4_1_2_identity(made: Disk) -> None:
    driver = Driver(made.board, ALL)
    assert (driver.pci_read(0, 2), driver.pci_read(2, 2)) == (0x1AF4, 0x1042)
    assert driver.pci_read(8, 1) >= 1  # revision: not transitional
    assert driver.pci_read(0x2E, 2) >= 0x40
    assert driver.pci_read(9, 3) == 0x01_8000


def test_4_1_4_structures(made: Disk) -> None:
    structures = Driver(made.board, ALL).structures
    assert sorted(structures) == [1, 2, 3, 4, 5]
    assert structures[1].gpa % 4 == 0 and structures[1].length >= 0x38
    assert structures[2].multiplier == 4 and structures[2].length >= 4
    assert structures[4].length >= 60


def test_4_1_4_3_registers(made: Disk) -> None:
    driver = Driver(made.board, ALL)
    assert driver.read(0x12, 2) == 1  # num_queues
    assert driver.offered() >> 32 == 1 | 1 << 8  # VERSION_1, RING_RESET
    driver.write(0x00, 4, 2)
    assert driver.read(0x04, 4) == 0
    assert driver.read(0x18, 2) == 256
    driver.write(0x18, 2, 100)  # no power of 2
    assert driver.read(0x18, 2) == 256
    driver.write(0x18, 2, 64)
    assert driver.read(0x18, 2) == 64
    driver.write(0x20, 4, 0x1234_5000)
    driver.write(0x24, 4, 1)
    assert driver.read(0x20, 8) == 0x1_1234_5000
    assert (driver.read(0x20, 4), driver.read(0x24, 4)) == (0x1234_5000, 1)
    driver.write(0x16, 2, 1)  # no such queue
    assert (driver.read(0x18, 2), driver.read(0x1A, 2), driver.read(0x20, 4)) == (0, 0xFFFF, 0)
    driver.write(0x1C, 2, 1)
    assert driver.read(0x1C, 2) == 0


def test_4_1_5_1_2_vectors(made: Disk) -> None:
    driver = Driver(made.board, ALL)
    for register in (0x10, 0x1A):
        assert driver.read(register, 2) == 0xFFFF
        driver.write(register, 2, 1)
        assert driver.read(register, 2) == 1
        driver.write(register, 2, 2)  # beyond the table: cannot be mapped
        assert driver.read(register, 2) == 0xFFFF
        driver.write(register, 2, 0)
    driver.reset()
    assert (driver.read(0x10, 2), driver.read(0x1A, 2)) == (0xFFFF, 0xFFFF)


def test_3_1_1_features_are_checked(made: Disk) -> None:
    driver = Driver(made.board, ALL)
    driver.reset()
    driver.write(0x14, 1, 1)
    driver.write(0x14, 1, 3)
    driver.write(0x08, 4, 0)
    driver.write(0x0C, 4, 0xFFFF_FFFF)
    assert driver.read(0x0C, 4) == driver.offered() & 0xFFFF_FFFF, "4.1.4.3.1: only valid bits"
    driver.write(0x14, 1, 11)
    assert driver.status == 3, "not without VERSION_1"
    driver.write(0x14, 1, 15)
    assert driver.status == 3, "no DRIVER_OK without FEATURES_OK"
    driver.write(0x08, 4, 1)
    driver.write(0x0C, 4, 1)
    driver.write(0x14, 1, 11)
    assert driver.status == 11
    driver.write(0x0C, 4, 0)
    assert driver.read(0x0C, 4) == 1, "final after FEATURES_OK"


def test_4_1_5_3_msix_vector_or_none(started: Disk) -> None:
    messages, driver = started.board.messages, started.driver
    started.read(0, 512)
    assert messages.wait(driver.QUEUE_DATA)
    before = messages.count(driver.QUEUE_DATA)
    driver.write(0x1A, 2, 0xFFFF)
    started.queue.want_interrupt()
    started.read(0, 512)
    started.function.pause()
    assert messages.count(driver.QUEUE_DATA) == before
    started.function.resume()
    driver.write(0x1A, 2, driver.QUEUE_VECTOR)
    started.queue.want_interrupt()
    started.read(0, 512)
    started.function.pause()
    assert messages.count(driver.QUEUE_DATA) == before + 1
    assert driver.board.bus.mmio_read(driver.structures[3].gpa, 1) == 0, "no ISR with MSI-X"


def test_4_1_4_5_intx_and_isr(made: Disk) -> None:
    made.start(msix=False)
    board, driver = made.board, made.driver
    made.read(0, 512)
    driver.wait(lambda: board.line.level)
    isr = driver.structures[3].gpa
    assert board.bus.mmio_read(isr, 1) == 1
    assert not board.line.level
    assert board.bus.mmio_read(isr, 1) == 0
    made.queue.add([(0x4000, 1, False)])
    made.queue.kick()
    driver.wait(lambda: board.line.level)
    assert board.bus.mmio_read(isr, 1) == 2
    assert driver.status & NEEDS_RESET


def test_4_1_4_9_a_window_in_configuration_space(made: Disk) -> None:
    driver = Driver(made.board, ALL)
    at = next(offset for capability, offset in driver.capabilities() if driver.pci_read(offset + 3, 1) == 5)

    def window(offset: int, length: int) -> None:
        driver.pci_write(at + 4, 1, 0)
        driver.pci_write(at + 8, 4, offset)
        driver.pci_write(at + 12, 4, length)

    window(0x14, 1)
    driver.pci_write(at + 16, 1, 1)
    assert driver.status == 1
    assert driver.pci_read(at + 16, 1) == 1
    window(0x12, 2)
    assert driver.pci_read(at + 16, 2) == 1
    window(0x2000, 4)
    assert driver.pci_read(at + 16, 4) == SIZE // 512
    for offset, length, bar in ((0x14, 3, 0), (0x13, 2, 0), (REGISTERS_SIZE, 4, 0), (0x14, 1, 1)):
        window(offset, length)
        driver.pci_write(at + 4, 1, bar)
        driver.pci_write(at + 16, 4, 0)
        driver.pci_read(at + 16, 4)
    assert driver.status == 1, "a window that is none does nothing"


def test_2_7_a_queue_outside_memory_needs_a_reset(made: Disk) -> None:
    driver = Driver(made.board, ALL)
    driver.negotiate()
    driver.enable_msix()
    driver.write(0x10, 2, driver.CONFIG_VECTOR)
    driver.write(0x20, 4, 0xFFFF_F000)
    driver.write(0x1C, 2, 1)
    driver.write(0x14, 1, 15)
    assert driver.status == 15 | NEEDS_RESET
    assert made.board.messages.count(driver.CONFIG_DATA) == 1
    driver.notify()
    driver.reset()
    assert driver.status == 0


def test_no_dma_without_bus_master(started: Disk) -> None:
    driver = started.driver
    driver.pci_write(COMMAND, 2, COMMAND_MEMORY)
    started.queue.add([(driver.allocate(16), 16, False), (driver.allocate(1), 1, True)])
    driver.notify()
    time.sleep(0.02)
    assert started.queue.take() == []
    driver.find_structures()  # which sets it again
    assert len(started.queue.wait()) == 1


class TestRingReset:
    """2.6.1, over 4.1.4.3."""

    QUEUE_RESET = 0x3A

    def test_a_queue_starts_again_elsewhere(self, made: Disk) -> None:
        made.start(ALL | F_RING_RESET)
        driver = made.driver
        made.read(0, 512)
        driver.write(0x16, 2, 0)
        driver.write(self.QUEUE_RESET, 2, 1)
        driver.wait(lambda: driver.read(self.QUEUE_RESET, 2) == 0)
        assert (driver.read(0x1C, 2), driver.read(0x18, 2), driver.read(0x20, 8)) == (0, 256, 0)
        assert driver.read(0x1A, 2) == 0xFFFF
        made.queue.kick()
        time.sleep(0.01)
        made.queue = driver.make_queue(16)
        assert len(made.read(0, 512)) == 512
        assert driver.status == 15

    def test_only_where_negotiated(self, started: Disk) -> None:
        started.driver.write(self.QUEUE_RESET, 2, 1)
        assert started.driver.read(self.QUEUE_RESET, 2) == 0
        assert len(started.read(0, 512)) == 512

    def test_it_ends_when_what_was_under_way_has(self) -> None:
        backend = Slow()
        made = Disk(BlockOptions(path="none"), backend)
        made.start(ALL | F_RING_RESET)
        driver = made.driver
        header, data, status = driver.allocate(16), driver.allocate(512), driver.allocate(1)
        made.queue.add([(header, 16, False), (data, 512, True), (status, 1, True)])
        made.queue.kick()
        assert backend.entered.acquire(timeout=20)
        driver.write(self.QUEUE_RESET, 2, 1)
        assert driver.read(self.QUEUE_RESET, 2) == 1
        backend.go.release()
        driver.wait(lambda: driver.read(self.QUEUE_RESET, 2) == 0)
        assert driver.read(0x1C, 2) == 0 and driver.status == 15
        assert made.board.messages.count(driver.QUEUE_DATA) == 0, "2.6.1.1.1: nothing is told of it any more"
        made.close()


class Slow(Nowhere):
    """A backend whose reads wait until they are let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.reading = 0

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self.reading += 1
        self.entered.release()
        assert self.go.acquire(timeout=20)
        self.reading -= 1


class TestInFlight:
    """What is under way when somebody wants the device to stop."""

    @pytest.fixture
    def slow(self) -> Iterator[tuple[Disk, Slow]]:
        backend = Slow()
        made = Disk(BlockOptions(path="none"), backend)
        made.start()
        for _ in range(3):
            self.send(made)
        made.driver.notify()
        for _ in range(3):
            assert backend.entered.acquire(timeout=20), "one does not wait for the other"
        yield made, backend
        for _ in range(10):
            backend.go.release()
        made.close()

    def send(self, made: Disk) -> None:
        driver = made.driver
        header = driver.allocate(16)
        made.board.memory.write(header, T_IN.to_bytes(16, "little"))
        made.queue.add([(header, 16, False), (driver.allocate(512), 512, True), (driver.allocate(1), 1, True)])

    def test_a_guests_reset_does_not_wait_and_reads_0_when_done(self, slow: tuple[Disk, Slow]) -> None:
        made, backend = slow
        driver = made.driver
        begun = time.monotonic()
        driver.write(0x14, 1, 0)
        assert time.monotonic() - begun < 5 and backend.reading == 3
        assert driver.status == 15, "4.1.4.3.1: 0 once that is done"
        driver.write(0x14, 1, 3)
        self.send(made)
        driver.notify()
        backend.go.release(2)
        driver.wait(lambda: made.board.memory.load_u16(made.queue.used + 2) == 2)
        assert driver.status == 15
        backend.go.release()
        driver.wait(lambda: driver.status == 0)
        assert not backend.reading
        assert made.board.memory.load_u16(made.queue.used + 2) == 3, "what came later stays where it is"
        assert driver.read(0x1C, 2) == 0

    @pytest.mark.parametrize("what", ["reset", "pause"])
    def test_the_board_waits(self, slow: tuple[Disk, Slow], what: str) -> None:
        made, backend = slow
        done = threading.Event()

        def stop() -> None:
            getattr(made.function, what)()
            done.set()

        thread = threading.Thread(target=stop)
        thread.start()
        assert not done.wait(0.05)
        self.send(made)
        backend.go.release(3)
        assert done.wait(20) and not backend.reading
        thread.join()
        assert made.board.memory.load_u16(made.queue.used + 2) == 3
        if what == "pause":
            assert made.board.messages.count(made.driver.QUEUE_DATA) >= 1, "their interrupt was sent"
            made.function.resume()
            backend.go.release()
            made.queue.wait(4)

    def test_even_by_a_thread_that_holds_the_board_lock(self, slow: tuple[Disk, Slow]) -> None:
        made, backend = slow
        threading.Timer(0.05, backend.go.release, [3]).start()
        with made.board.lock:
            made.function.pause()
        assert not backend.reading

    def test_a_pause_during_a_guests_reset_ends_it(self, slow: tuple[Disk, Slow]) -> None:
        made, backend = slow
        made.driver.write(0x14, 1, 0)
        backend.go.release(3)
        made.function.pause()
        assert made.function.save()["device"]["status"] == 0
        made.function.resume()


class SlowFlush(Nowhere):
    """A backend whose flushes wait until they are let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        self.entered.release()
        assert self.go.acquire(timeout=20)


class TestFlushUnderWay:
    @pytest.fixture
    def slow(self) -> Iterator[tuple[Disk, SlowFlush]]:
        backend = SlowFlush()
        made = Disk(BlockOptions(path="none"), backend)
        made.start()
        self.statuses: list[int] = []
        self.submit(made, T_FLUSH)
        assert backend.entered.acquire(timeout=20)
        yield made, backend
        for _ in range(10):
            backend.go.release()
        made.close()

    def submit(self, made: Disk, kind: int, data: int = 0) -> int:
        driver = made.driver
        header, status = driver.allocate(16), driver.allocate(1)
        made.board.memory.write(header, kind.to_bytes(16, "little"))
        made.board.memory.write(status, b"\xaa")
        middle = [(driver.allocate(data), data, kind == T_IN)] if data else []
        head = made.queue.add([(header, 16, False), *middle, (status, 1, True)])
        made.queue.kick()
        self.statuses.append(status)
        return head

    def test_reads_do_not_wait_for_it(self, slow: tuple[Disk, SlowFlush]) -> None:
        made, backend = slow
        read = self.submit(made, T_IN, 512)
        assert made.queue.wait() == [(read, 513)]
        assert made.board.memory.load_u8(self.statuses[0]) == 0xAA
        backend.go.release()
        assert [written for _, written in made.queue.wait()] == [1]
        assert made.board.memory.load_u8(self.statuses[0]) == 0

    def test_those_that_come_meanwhile_share_the_next(self, slow: tuple[Disk, SlowFlush]) -> None:
        made, backend = slow
        for _ in range(5):
            self.submit(made, T_FLUSH)
        read = self.submit(made, T_IN, 512)
        assert made.queue.wait() == [(read, 513)]  # so all before it were taken
        backend.go.release()
        assert len(made.queue.wait(1)) == 1, "a flush does not cover what came after it began"
        backend.go.release()
        assert len(made.queue.wait(5)) == 5
        assert backend.flushes == 2

    def test_a_durable_write_completes_with_it(self, slow: tuple[Disk, SlowFlush]) -> None:
        made, backend = slow
        made.driver.set_config(32, 1, 0)
        self.submit(made, T_OUT, 512)
        read = self.submit(made, T_IN, 512)
        assert made.queue.wait() == [(read, 513)]
        backend.go.release()
        made.queue.wait(1)
        assert made.board.memory.load_u8(self.statuses[1]) == 0xAA, "it was written after that flush began"
        backend.go.release()
        made.queue.wait(1)
        assert made.board.memory.load_u8(self.statuses[1]) == 0

    def test_a_guests_reset_ends_after_it(self, slow: tuple[Disk, SlowFlush]) -> None:
        made, backend = slow
        made.driver.write(0x14, 1, 0)
        time.sleep(0.02)
        assert made.driver.status == 15
        backend.go.release()
        made.driver.wait(lambda: made.driver.status == 0)
        made.start()
        made.request(T_IN, room=[512])

    def test_a_pause_waits_for_it_and_nothing_new_begins(self, slow: tuple[Disk, SlowFlush]) -> None:
        made, backend = slow
        paused = threading.Thread(target=made.function.pause)
        paused.start()
        made.driver.wait(lambda: made.blk.worker.held)
        read = self.submit(made, T_IN, 512)
        made.blk.worker.ring()
        paused.join(0.05)
        assert paused.is_alive()
        backend.go.release()
        paused.join(20)
        assert not paused.is_alive()
        assert len(made.queue.take()) == 1
        made.function.resume()
        assert made.queue.wait() == [(read, 513)]


class Buggy(Nowhere):
    def read_now(self, buffers: Buffers, offset: int) -> bool:
        raise ZeroDivisionError("one mistake")


class BuggyLater(Nowhere):
    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def preadv(self, buffers: Buffers, offset: int) -> None:
        raise ZeroDivisionError("one mistake")


@pytest.mark.parametrize("backend", [Buggy, BuggyLater])
def test_an_error_of_ours_is_told_and_hangs_nobody(backend: type[Nowhere]) -> None:
    """It asks for a reset, and works after it."""
    told: list[str] = []
    board = Board()
    blk = VirtioBlk("disk", board.memory, board.lock, backend(), BlockOptions(path="none"), say=told.append)
    function = VirtioPci(blk)
    board.add(function)
    for times in (1, 2):
        driver = Driver(board, ALL)
        queue = driver.start()
        queue.add([(driver.allocate(16), 16, False), (driver.allocate(512), 512, True), (driver.allocate(1), 1, True)])
        queue.kick()
        assert board.messages.wait(driver.CONFIG_DATA, times)
        assert driver.status & NEEDS_RESET
        assert list(blk.complaints) == ["it stops, and needs a reset: ZeroDivisionError: one mistake"] * times
    assert told == [f"disk: {blk.complaints[0]}"], "said once, though it happened twice"
    function.pause()
    function.close()
    board.memory.close()


def test_saved_under_load_it_goes_on_elsewhere(tmp_path: Path) -> None:
    """Pause in the middle of a stream of requests, save, load into a second device over the same memory, go on."""
    path = tmp_path / "disk.img"
    with disk(path) as made:
        made.start()
        content = path.read_bytes()
        driver, memory, board = made.driver, made.board.memory, made.board
        places = []
        for sector in range(60):
            header, data, status = driver.allocate(16), driver.allocate(512), driver.allocate(1)
            memory.write(header, T_IN.to_bytes(8, "little") + sector.to_bytes(8, "little"))
            memory.write(status, b"\xaa")
            made.queue.add([(header, 16, False), (data, 512, True), (status, 1, True)])
            places.append((data, status))
            if sector == 30:
                made.queue.kick()
        made.queue.kick()
        made.function.pause()
        state = made.function.save()
        made.function.close()
        del board.pci.functions[1, 0]
        options = BlockOptions(path=str(path))
        second = VirtioPci(VirtioBlk("disk", memory, board.lock, open_disk(options), options))
        made.function = second
        board.add(second)
        second.pause()
        second.load(state)
        second.resume()
        made.queue.wait(60)
        for sector, (data, status) in enumerate(places):
            assert memory.load_u8(status) == 0
            assert memory.read(data, 512) == content[sector * 512 : sector * 512 + 512]
        assert driver.status == 15


@pytest.mark.parametrize("event_idx", [False, True])
def test_2_7_no_wakeup_is_lost(tmp_path: Path, event_idx: bool) -> None:
    """A driver that notifies only when asked, and sleeps until it is interrupted: 1000 bursts."""
    with disk(tmp_path / "disk.img") as made:
        made.start(ALL if event_idx else ALL & ~(1 << 29), size=16)
        driver, messages = made.driver, made.board.messages
        header, data, status = driver.allocate(16), driver.allocate(512), driver.allocate(1)
        made.board.memory.write(header, bytes(16))
        rng = random.Random(7)
        for _ in range(1000):
            burst = rng.randint(1, 5)
            for _ in range(burst):
                made.queue.add([(header, 16, False), (data, 512, True), (status, 1, True)])
                if rng.random() < 0.5:
                    made.queue.kick()
            made.queue.kick()
            done = 0
            while done < burst:
                seen = messages.count(driver.QUEUE_DATA)
                done += len(made.queue.take())
                made.queue.want_interrupt()
                done += len(made.queue.take())  # what came before it could be asked for
                if done < burst:
                    assert messages.wait(driver.QUEUE_DATA, seen + 1), "neither side wakes the other"
            messages.got.clear()


garbage = st.binary(min_size=64, max_size=512)


@settings(max_examples=60, deadline=None)
@given(desc=garbage, avail=garbage, used=garbage, kicks=st.integers(1, 3))
def test_2_1_2_garbage_in_the_queue_ends_in_requests_or_a_reset(
    hostile: Disk, desc: bytes, avail: bytes, used: bytes, kicks: int
) -> None:
    hostile.start(size=16)
    queue, memory, driver = hostile.queue, hostile.board.memory, hostile.driver
    memory.write(queue.desc, desc[:256])
    memory.write(queue.avail, avail[: 6 + 2 * 16])
    memory.write(queue.used, used[: 6 + 8 * 16])
    for _ in range(kicks):
        driver.notify()
    hostile.function.pause()
    hostile.function.resume()
    driver.reset()
    hostile.start(size=16)
    assert len(hostile.read(0, 512)) == 512


def test_2_1_2_a_driver_that_scribbles_while_the_device_reads(tmp_path: Path) -> None:
    """Descriptors, rings and headers change under the device, thousands of times; the worker survives all of it."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    board = Board()
    options = BlockOptions(path=str(path))
    blk = VirtioBlk("disk", board.memory, board.lock, open_disk(options), options)
    function = VirtioPci(blk)
    board.add(function)
    rng = random.Random(1)
    end = time.monotonic() + 20
    resets = served = 0
    while resets < 6 and time.monotonic() < end:
        driver = Driver(board, ALL)
        queue = driver.start(size=16)
        header, data, status = driver.allocate(16), driver.allocate(512), driver.allocate(1)
        board.memory.write(header, bytes(16))
        while time.monotonic() < end and not driver.status & NEEDS_RESET:
            for _ in range(10):
                if len(queue.free) < 3:
                    queue.free = list(range(16))  # whatever the device still does with them
                queue.add([(header, 16, False), (data, 512, True), (status, 1, True)])
                queue.kick()
                if rng.random() < 0.1:
                    board.memory.store_u8(queue.desc + rng.randrange(256), rng.choice((0, 1, 2, 4, 0xFF)))
                if rng.random() < 0.02:
                    board.memory.store_u8(queue.avail + rng.randrange(38), rng.getrandbits(8))
                board.memory.store_u8(header, rng.choice((0, 1, 4, 8)))
            time.sleep(0.0005)
            served += board.memory.load_u16(queue.used + 2)
        resets += 1
    function.close()
    board.memory.close()
    assert all("the driver broke the rules" in complaint for complaint in blk.complaints)
    assert resets > 3 and served > 0


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with disk(tmp_path_factory.mktemp("hostile") / "disk.img") as one:
        yield one


class TestConformance(DeviceConformance[VirtioPci]):
    """Two devices at once over one image, so without locks."""

    accesses = 100_000

    @pytest.fixture(autouse=True)
    def _image(self, tmp_path: Path) -> None:
        self.path = tmp_path / "disk.img"
        self.path.write_bytes(bytes(SIZE))

    def make_device(self) -> VirtioPci:
        board = Board()
        options = BlockOptions(path=str(self.path), lock=False)
        function = VirtioPci(VirtioBlk("disk", board.memory, board.lock, open_disk(options), options))
        board.pci.add(function, 1)
        return function

    def regions(self, device: VirtioPci) -> Sequence[tuple[IoRegion, int]]:
        windows: list[tuple[IoRegion, int]] = [(bar.region, bar.size) for bar in device.bars.values()]
        return [*windows, *(4 * [(_ConfigSpace(device), 0x100)])]


class _ConfigSpace:
    def __init__(self, device: VirtioPci) -> None:
        self.device = device

    def read(self, offset: int, size: int) -> int:
        return self.device.config_read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.device.config_write(offset, size, value)
