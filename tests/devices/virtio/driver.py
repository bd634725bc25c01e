"""The other side: a small, honest virtio driver, which reaches its device as a guest does.

Everything goes through PCI configuration space, BARs and guest memory; where the structures are comes from the
capability list. It follows virtio 1.2, 3.1 and 4.1 for set-up and 2.7 for the queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skep.bus import Bus
from skep.bus.pci import BAR0, CAPABILITIES, COMMAND, COMMAND_MASTER, COMMAND_MEMORY, PciBus, PciFunction
from skep.contracts.io import IrqLine
from skep.locks import Lock, Order
from skep.memory import GuestMemory

F_VERSION_1, F_EVENT_IDX, F_INDIRECT, F_RING_RESET = 1 << 32, 1 << 29, 1 << 28, 1 << 40
NEXT, WRITE, INDIRECT = 1, 2, 4
NEEDS_RESET = 64
PATIENCE = 20.0
"""Seconds; only a failing test waits that long."""


class Messages:
    """An MsiSink that keeps what comes, and whose arrival can be waited for."""

    def __init__(self) -> None:
        self.got: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    def signal(self, address: int, data: int) -> None:
        with self._changed:
            self.got.append((address, data))
            self._changed.notify_all()

    def wait(self, data: int, times: int = 1) -> bool:
        """Messages with this data came so many times, ever, or do so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count(data) >= times, PATIENCE)

    def count(self, data: int) -> int:
        with self._changed:
            return self._count(data)

    def _count(self, data: int) -> int:
        return sum(d == data for _, d in self.got)


class Line:
    """An interrupt wire that remembers its level."""

    level = False

    def set(self, level: bool) -> None:
        self.level = level


class Board:
    """Memory, a bus and a PCI root bus with one function at slot 1."""

    ECAM = 0xE000_0000
    WINDOW = range(0xC000_0000, 0xD000_0000)

    def __init__(self, memory_size: int = 1 << 20) -> None:
        self.lock = Lock("board", Order.BOARD)
        self.memory = GuestMemory(memory_size)
        self.bus = Bus(self.lock)
        self.messages = Messages()
        self.line = Line()
        self.pci = PciBus(self.bus, self.messages, self._wire)
        self.pci.attach(self.ECAM)

    def _wire(self, gsi: int) -> IrqLine:
        return self.line

    def add(self, function: PciFunction) -> None:
        self.pci.add(function, 1)
        self.power_on(function)

    def power_on(self, function: PciFunction) -> None:
        function.reset()
        with self.lock:
            self.pci.assign(range(0x1000, 0x2000), self.WINDOW)


@dataclass(frozen=True)
class Structure:
    gpa: int
    length: int
    multiplier: int


class Driver:
    """Set-up and registers. ``features`` is what the driver understands."""

    CONFIG_VECTOR, QUEUE_VECTOR = 0, 1
    CONFIG_DATA, QUEUE_DATA = 0x4041, 0x4042

    def __init__(self, board: Board, features: int) -> None:
        self.board = board
        self.memory = board.memory
        self.understood = features | F_VERSION_1
        self.features = 0
        self.structures: dict[int, Structure] = {}
        self._free = 0x1000
        self.find_structures()

    # PCI.

    def pci_read(self, offset: int, size: int) -> int:
        return self.board.bus.mmio_read(self.board.ECAM + (1 << 15) + offset, size)

    def pci_write(self, offset: int, size: int, value: int) -> None:
        self.board.bus.mmio_write(self.board.ECAM + (1 << 15) + offset, size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """(ID, offset) of each, in the order of the list."""
        found = []
        at = self.pci_read(CAPABILITIES, 1)
        while at:
            found.append((self.pci_read(at, 1), at))
            at = self.pci_read(at + 1, 1)
        return found

    def find_structures(self) -> None:
        self.pci_write(COMMAND, 2, COMMAND_MEMORY | COMMAND_MASTER)
        for capability, at in self.capabilities():
            if capability == 0x09:
                kind, bar = self.pci_read(at + 3, 1), self.pci_read(at + 4, 1)
                base = self.pci_read(BAR0 + 4 * bar, 4) & ~15
                gpa, length = base + self.pci_read(at + 8, 4), self.pci_read(at + 12, 4)
                multiplier = self.pci_read(at + 16, 4) if kind == 2 else 0
                self.structures.setdefault(kind, Structure(gpa, length, multiplier))

    def enable_msix(self) -> None:
        at = next(offset for capability, offset in self.capabilities() if capability == 0x11)
        table = self.pci_read(at + 4, 4)
        base = (self.pci_read(BAR0 + 4 * (table & 7), 4) & ~15) + (table & ~7)
        for vector, data in ((self.CONFIG_VECTOR, self.CONFIG_DATA), (self.QUEUE_VECTOR, self.QUEUE_DATA)):
            for word, value in enumerate((0xFEE0_0000, 0, data, 0)):
                self.board.bus.mmio_write(base + 16 * vector + 4 * word, 4, value)
        self.pci_write(at + 2, 2, 0x8000)

    # Registers.

    def read(self, offset: int, size: int) -> int:
        return self.board.bus.mmio_read(self.structures[1].gpa + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.board.bus.mmio_write(self.structures[1].gpa + offset, size, value)

    def config(self, offset: int, size: int) -> int:
        return self.board.bus.mmio_read(self.structures[4].gpa + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.board.bus.mmio_write(self.structures[4].gpa + offset, size, value)

    @property
    def status(self) -> int:
        return self.read(0x14, 1)

    def offered(self) -> int:
        offered = 0
        for word in (0, 1):
            self.write(0x00, 4, word)
            offered |= self.read(0x04, 4) << 32 * word
        return offered

    # 3.1.1.

    def reset(self) -> None:
        self.write(0x14, 1, 0)
        self.wait(lambda: self.status == 0)

    def negotiate(self) -> None:
        self.reset()
        self.write(0x14, 1, 1)
        self.write(0x14, 1, 1 | 2)
        self.features = self.offered() & self.understood
        for word in (0, 1):
            self.write(0x08, 4, word)
            self.write(0x0C, 4, self.features >> 32 * word & 0xFFFF_FFFF)
        self.write(0x14, 1, 1 | 2 | 8)
        assert self.status == 1 | 2 | 8

    def start(self, *, msix: bool = True, size: int | None = None, indirect: bool = False) -> DriverQueue:
        """Everything up to DRIVER_OK, with queue 0."""
        return self.start_all(1, msix=msix, size=size, indirect=indirect)[0]

    def start_all(
        self, count: int, *, msix: bool = True, size: int | None = None, indirect: bool = False
    ) -> list[DriverQueue]:
        """Everything up to DRIVER_OK, with the first ``count`` queues."""
        self.negotiate()
        if msix:
            self.enable_msix()
            self.write(0x10, 2, self.CONFIG_VECTOR)
            assert self.read(0x10, 2) == self.CONFIG_VECTOR
        queues = [self.make_queue(size, msix=msix, indirect=indirect, index=index) for index in range(count)]
        self.write(0x14, 1, self.status | 4)
        return queues

    def make_queue(
        self, size: int | None = None, *, msix: bool = True, indirect: bool = False, index: int = 0
    ) -> DriverQueue:
        self.write(0x16, 2, index)
        if size is not None:
            self.write(0x18, 2, size)
        queue = DriverQueue(self, self.read(0x18, 2), indirect=indirect, index=index)
        if msix:
            self.write(0x1A, 2, self.QUEUE_VECTOR)
            assert self.read(0x1A, 2) == self.QUEUE_VECTOR
        for offset, gpa in ((0x20, queue.desc), (0x28, queue.avail), (0x30, queue.used)):
            self.write(offset, 4, gpa & 0xFFFF_FFFF)
            self.write(offset + 4, 4, gpa >> 32)
        self.write(0x1C, 2, 1)
        return queue

    def notify(self, index: int = 0) -> None:
        notify = self.structures[2]
        self.write(0x16, 2, index)
        self.board.bus.mmio_write(notify.gpa + self.read(0x1E, 2) * notify.multiplier, 2, index)

    def allocate(self, n: int, align: int = 16) -> int:
        at = (self._free + align - 1) & -align
        self._free = at + n
        assert self._free <= self.memory.size, "the test's guest is out of memory"
        return at

    def free_all(self, mark: int) -> None:
        self._free = mark

    @property
    def mark(self) -> int:
        return self._free

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "the device does not answer"
            time.sleep(0.0002)


class DriverQueue:
    """The driver's side of a split virtqueue (2.7)."""

    def __init__(self, driver: Driver, size: int, *, indirect: bool, index: int = 0) -> None:
        self.driver = driver
        self.index = index
        self.memory = driver.memory
        self.size = size
        self.indirect = indirect
        self.event_idx = bool(driver.features & F_EVENT_IDX)
        self.desc = driver.allocate(16 * size)
        self.avail = driver.allocate(6 + 2 * size, 2)
        self.used = driver.allocate(6 + 8 * size, 4)
        for gpa, n in ((self.desc, 16 * size), (self.avail, 6 + 2 * size), (self.used, 6 + 8 * size)):
            self.memory.write(gpa, bytes(n))
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.avail_idx = 0
        self.kicked = 0
        self.seen_used = 0

    def add(self, buffers: Sequence[tuple[int, int, bool]]) -> int:
        """Make a chain of (gpa, length, device-writable) available; returns its head."""
        taken = [self.free.pop() for _ in range(1 if self.indirect else len(buffers))]
        if self.indirect:
            table = self.driver.allocate(16 * len(buffers))
            self._fill(table, list(range(len(buffers))), buffers)
            self._descriptor(self.desc, taken[0], table, 16 * len(buffers), INDIRECT, 0)
        else:
            self._fill(self.desc, taken, buffers)
        self.chains[taken[0]] = taken
        self.memory.store_u16(self.avail + 4 + 2 * (self.avail_idx % self.size), taken[0])
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.store_u16(self.avail + 2, self.avail_idx)
        return taken[0]

    def _fill(self, table: int, indices: list[int], buffers: Sequence[tuple[int, int, bool]]) -> None:
        for i, (gpa, length, writable) in enumerate(buffers):
            more = i + 1 < len(buffers)
            flags = (NEXT if more else 0) | (WRITE if writable else 0)
            self._descriptor(table, indices[i], gpa, length, flags, indices[i + 1] if more else 0)

    def _descriptor(self, table: int, index: int, gpa: int, length: int, flags: int, following: int) -> None:
        self.memory.store_u64(table + 16 * index, gpa)
        self.memory.store_u64(table + 16 * index + 8, length | flags << 32 | following << 48)

    def kick(self) -> bool:
        """Notify the device, if it wants to be; True if it was."""
        old, self.kicked = self.kicked, self.avail_idx
        if self.event_idx:
            event = self.memory.load_u16(self.used + 4 + 8 * self.size)
            wanted = (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - old) & 0xFFFF
        else:
            wanted = not self.memory.load_u16(self.used) & 1
        if wanted:
            self.driver.notify(self.index)
        return wanted

    def take(self) -> list[tuple[int, int]]:
        """What was used since: (head, written length)."""
        done = []
        while self.seen_used != self.memory.load_u16(self.used + 2):
            element = self.used + 4 + 8 * (self.seen_used % self.size)
            head, written = self.memory.load_u32(element), self.memory.load_u32(element + 4)
            self.free += self.chains.pop(head)
            done.append((head, written))
            self.seen_used = (self.seen_used + 1) & 0xFFFF
        return done

    def want_interrupt(self) -> None:
        """Ask for an interrupt at the next used buffer."""
        if self.event_idx:
            self.memory.store_u16(self.avail + 4 + 2 * self.size, self.seen_used)
        else:
            self.memory.store_u16(self.avail, 0)

    def wait(self, n: int = 1) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []

        def enough() -> bool:
            done.extend(self.take())
            return len(done) >= n

        self.driver.wait(enough)
        return done
