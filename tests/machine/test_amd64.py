"""The amd64 board: what the guest is told agrees with what is there."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from skep.boot.e820 import RangeType
from skep.boot.linux import ZERO_PAGE
from skep.chardev.null import Null
from skep.config import Tree, check_settings
from skep.devices.virtio.pci import VirtioPci
from skep.machine import Events, amd64
from skep.machine.amd64 import Amd64Board
from skep.machine.amd64map import BIOS_BASE, ECAM_BASE, LOW_RAM_END, PCI_MEMORY, VMGENID_BASE, VMGENID_GPE
from skep.machine.amd64tables import memory_map
from skep.memory import GuestMemory
from tests.boot.bzimage import bzimage

MiB = 1 << 20


class Told:
    """What the board told its VM."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.errors: list[BaseException] = []
        self.said: list[str] = []

    def all(self) -> Events:
        return Events(
            power_off=lambda: self.events.append("power off"),
            leave=lambda status: self.events.append(f"leave {status}"),
            reset=lambda: self.events.append("reset"),
            sleep=lambda: self.events.append("sleep"),
            wake=lambda: self.events.append("wake"),
            start_cpu=lambda index, state: self.events.append(f"start {index}"),
            stop_cpu=lambda index: self.events.append(f"stop {index}"),
            failed=self.errors.append,
            say=self.said.append,
        )


class Made:
    def __init__(self, tmp_path: Path, size: int = 64 * MiB, **leaves: str) -> None:
        """``size`` of memory, which may exceed the host's: it is never touched."""
        kernel = tmp_path / "vmlinuz"
        kernel.write_bytes(bzimage())
        settings = {"boot.kernel": str(kernel), "lpc.com1.path": "none"}
        tree = Tree({**settings, **{key.replace("__", "."): value for key, value in leaves.items()}}).freeze()
        checked = check_settings(tree)
        self.told = Told()
        self.memory = GuestMemory(size)
        self.board = Amd64Board(tree, checked, self.memory, self.told.all(), lambda name, where, key: Null())
        self.board.reset()

    def close(self) -> None:
        self.board.close()
        self.memory.close()
        assert not self.told.errors


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    made = Made(tmp_path, pci__0__2__0__device="virtio-blk", pci__0__2__0__path=str(disk), cpus="2")
    yield made
    made.close()


@pytest.mark.parametrize("size", [64 * MiB, 3 << 30, (3 << 30) + 4096, 5 << 30])
def test_the_memory_map_is_sorted_disjoint_and_all_there(tmp_path: Path, size: int) -> None:
    made = Made(tmp_path, size)
    ranges = memory_map(made.memory)
    assert all(a.start + a.size <= b.start for a, b in pairwise(ranges))
    told = 0
    for start, length, kind in ranges:
        assert length > 0
        if kind is RangeType.RAM:
            assert made.memory.is_ram(start, length)
            told += length
        elif kind is RangeType.ACPI:
            assert made.memory.read(start, 8) == b"RSD PTR "
        elif start == BIOS_BASE:
            assert made.memory.read(start, 4) == b"_MP_"
        else:
            assert not any(made.memory.is_ram(start + i) for i in range(0, length, 4096))
    assert size - told == MiB - LOW_RAM_END, "only what lies below 1 MiB is kept back"
    count = made.memory.read(ZERO_PAGE + 0x1E8, 1)[0]
    table = [struct.unpack("<QQI", made.memory.read(ZERO_PAGE + 0x2D0 + 20 * i, 20)) for i in range(count)]
    assert table == ranges
    made.close()


def config(board: Amd64Board, slot: int, offset: int, size: int, number: int = 0) -> int:
    """A read through ports 0xcf8 and 0xcfc, which has to agree with ECAM."""
    board.io.port_write(0xCF8, 4, 1 << 31 | slot << 11 | number << 8 | offset & 0xFC)
    value = board.io.port_read(0xCFC + (offset & 3), size)
    assert value == board.bus.mmio_read(ECAM_BASE + (slot << 15 | number << 12 | offset), size)
    return value


def test_pci_functions_are_where_the_tree_says(made: Made) -> None:
    board = made.board
    found = {slot: config(board, slot, 0, 4) for slot in range(32)}
    present = {slot for slot, ids in found.items() if ids != 0xFFFFFFFF}
    assert present == {0, 2}
    assert config(board, 0, 8, 4) >> 8 == 0x060000
    assert found[2] == 0x1042_1AF4
    assert config(board, 2, 0x3D, 1) == 1  # INTA


def test_a_device_that_fails_is_one_line_and_the_board_goes_on(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    device = made.board.pci.functions[2, 0]
    assert isinstance(device, VirtioPci)
    worker = device.device.worker

    def turn(visiting: bool) -> bool:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(worker, "_turn", turn)
    worker.release()
    deadline = time.monotonic() + 10
    while not made.told.said:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert made.told.said == ["virtio-blk 0.2.0: it stops, and needs a reset: RuntimeError: a mistake of ours"]
    assert worker.held and not made.told.errors


def test_what_devices_complain_of_is_kept(made: Made) -> None:
    device = made.board.pci.functions[2, 0]
    assert isinstance(device, VirtioPci)
    assert made.board.complaints() == []
    for _ in range(100):
        device.device.complain("the driver is lost")
    assert made.board.complaints() == ["virtio-blk 0.2.0: the driver is lost"] * 8


def test_windows_are_assigned_and_decoded(made: Made) -> None:
    board = made.board
    assert config(board, 2, 4, 2) & 2
    seen = []
    for index in range(6):
        bar = config(board, 2, 0x10 + 4 * index, 4)
        if bar and not bar & 1:
            address = bar & ~15
            assert address in PCI_MEMORY
            assert board.bus.mmio_read(address, 4) != 0xFFFFFFFF
            seen.append(address)
    assert len(seen) == 2 and not board.bus.unknown


def test_writing_the_acpi_registers_that_the_fadt_names(made: Made) -> None:
    board = made.board
    made.board.io.port_write(0x604, 2, 5 << 10 | 1 << 13)
    assert made.told.events == ["power off"]
    board.io.port_write(0xCF9, 1, 6)
    assert made.told.events == ["power off", "reset"]
    board.power_button()
    assert board.io.port_read(0x600, 2) & 1 << 8


def test_the_pit_interrupts_through_pin_2(made: Made) -> None:
    """As MADT's override says: a guest in APIC mode programs the I/O APIC's pin 2 for ISA IRQ 0."""
    board = made.board
    board.enter_cpu(0)
    io = board.io
    io.mmio_write(0xFEE000F0, 4, 0x1FF)
    for register, value in ((0x14, 0x30), (0x15, 0)):
        io.mmio_write(0xFEC00000, 4, register)
        io.mmio_write(0xFEC00010, 4, value)
    for port, value in ((0x43, 0x30), (0x40, 0x10), (0x40, 0)):
        io.port_write(port, 1, value)
    deadline = time.monotonic() + 10
    while not board.interrupts(0).pending():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert board.interrupts(0).acknowledge() == 0x30
    assert board.wakes(0, True) is False


def test_each_processor_sees_its_own_apic(made: Made) -> None:
    board, ids = made.board, {}

    def look(index: int) -> None:
        board.enter_cpu(index)
        ids[index] = board.io.mmio_read(0xFEE00020, 4) >> 24

    for index in (1, 0):
        thread = threading.Thread(target=look, args=(index,))
        thread.start()
        thread.join()
    assert ids == {0: 0, 1: 1}


def test_starting_another_processor_is_told(made: Made) -> None:
    board = made.board
    board.enter_cpu(0)
    board.io.mmio_write(0xFEE00310, 4, 1 << 24)
    board.io.mmio_write(0xFEE00300, 4, 0x4500)
    board.io.mmio_write(0xFEE00300, 4, 0x4608)
    assert made.told.events == ["stop 1", "start 1"]


def test_the_nmi_button_is_heard_by_who_listens_at_lint1(made: Made) -> None:
    board = made.board
    board.nmi()
    assert board.wakes(0, False) and not board.wakes(1, False), "the others leave reset with LINT1 masked"
    assert board.interrupts(0).take_nmi() and not board.interrupts(0).take_nmi()
    board.lapics[0].write(0x360, 4, 0x1_0400)
    board.nmi()
    assert not board.wakes(0, False)


def test_a_new_generation_is_told_by_an_event(made: Made) -> None:
    board, memory = made.board, made.memory
    first = memory.read(VMGENID_BASE, 16)
    assert any(first)
    board.reset()
    assert memory.read(VMGENID_BASE, 16) == first, "a reset is no fork"
    board.io.port_write(0x60E, 2, 1 << VMGENID_GPE)
    board.pause()
    board.new_generation()
    board.new_generation()
    assert memory.read(VMGENID_BASE, 16) == first and not board.io.port_read(0x60C, 2)
    board.resume()
    assert memory.read(VMGENID_BASE, 16) != first and board.io.port_read(0x60C, 2) == 1 << VMGENID_GPE


def test_time_and_devices_stand_still_while_paused(made: Made) -> None:
    board = made.board
    board.pause()
    before = board.io.port_read(0x608, 4)
    time.sleep(0.01)
    assert board.io.port_read(0x608, 4) == before
    board.resume()
    time.sleep(0.01)
    assert board.io.port_read(0x608, 4) != before


def test_reset_brings_everything_back(made: Made) -> None:
    board = made.board
    before = {device.name: device.save() for device in board.devices}
    assert len(before) == len(board.devices), "names are unique"
    state = board.reset()
    rng = random.Random(1)
    for _ in range(3000):
        port = rng.choice((0x20, 0x40, 0x43, 0x60, 0x64, 0x3F9, 0x3FB, 0xCF8, 0x600, 0x60E))
        board.io.port_write(port, 1, rng.randrange(256))
        board.bus.mmio_write(0xFEC00000 + rng.choice((0, 16)), 4, rng.randrange(1 << 32))
        board.bus.mmio_write(0xFED00000 + rng.randrange(0x160), 4, rng.randrange(1 << 32))
        board.bus.mmio_write(ECAM_BASE + (2 << 15) + rng.randrange(64), 1, rng.randrange(256))
    assert board.reset() == state
    after = {device.name: device.save() for device in board.devices}
    moving = {"rtc", "acpi-pm"}  # battery-backed; counts with the clock
    for name in before:
        if name not in moving:
            assert after[name] == before[name], name


def test_random_traffic_over_the_whole_board_raises_nothing(made: Made) -> None:
    board = made.board
    board.enter_cpu(0)
    rng = random.Random(2)
    windows = [(0xFEC00000, 0x1000), (0xFED00000, 0x400), (0xFEE00000, 0x1000)]
    windows += [(ECAM_BASE, 0x20000), (PCI_MEMORY[0], 0x10000)]
    for i in range(30_000):
        size = rng.choice((1, 2, 4))
        port = rng.choice((rng.randrange(0x10000), rng.choice((0x20, 0x40, 0x60, 0x70, 0x3F8, 0x600, 0xCF8)) + i % 8))
        base, length = rng.choice(windows)
        gpa = base + rng.randrange(length)
        if rng.random() < 0.5:
            board.io.port_write(port, size, rng.getrandbits(8 * size))
            board.io.mmio_write(gpa, size, rng.getrandbits(8 * size))
        else:
            value = board.io.port_read(port, size)
            assert 0 <= value < 1 << 8 * size
            assert 0 <= board.io.mmio_read(gpa, size) < 1 << 8 * size
    assert set(made.told.events) <= {"power off", "reset", "sleep", "wake", "stop 1", "start 1"}


def test_why_not_kvm_is_a_sentence() -> None:
    """On a host without VMX and SVM it is never KVM, whatever /dev/kvm says."""
    why = amd64.why_not_kvm()
    with open("/proc/cpuinfo") as info:
        flags = next(line for line in info if line.startswith("flags")).split()
    if not {"vmx", "svm"} & set(flags):
        assert why == "the CPU has neither vmx nor svm"
    else:
        assert (why is None) == os.access("/dev/kvm", os.R_OK | os.W_OK)


def test_startup_state_is_real_mode_at_the_vectors_page() -> None:
    state = amd64.startup_state(0x9A)
    assert (state["cs"]["selector"], state["cs"]["base"], state["rip"]) == (0x9A00, 0x9A000, 0)
    assert not state["cr0"] & 0x80000001 and state["rflags"] == 2
