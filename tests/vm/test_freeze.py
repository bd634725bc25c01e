"""A guest at work is frozen and thawed, a thousand times: its results are right, and its time knows nothing of it."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.block.backend import BlockBackend
from skep.devices.virtio.blk import VirtioBlk
from skep.devices.virtio.pci import VirtioPci
from skep.guest.debian import Guest
from skep.vm import State, Vm
from tests.linux import BOOT, ENGINES, Linux
from tests.vm.building import FINISH, START, builder, make_disk, natively

DOING = DISK, SLEEPS, RUNS = "the disk works", "the processor sleeps", "the processor runs"
RING = 4
"""Descriptors that a disk takes when for the first time a request has to wait for the host."""


def the_disk(vm: Vm) -> VirtioBlk:
    devices = [pci.device for pci in vm.board.devices if isinstance(pci, VirtioPci)]
    return next(device for device in devices if isinstance(device, VirtioBlk))


def doing(vm: Vm) -> str:
    """What the guest does at this moment, seen from outside."""
    if not the_disk(vm).worker.idle:
        return DISK
    return SLEEPS if vm._processors[0].doing == "halted" else RUNS


def threads_by_name() -> list[str]:
    """But for those that a disk has for its requests, which come as they are needed."""
    return sorted(thread.name for thread in threading.enumerate() if " i/o " not in thread.name)


def descriptors(vm: Vm) -> int:
    """How many there are while nothing is under way, a disk's taking of its ring for one."""
    vm.freeze()
    count = len(os.listdir("/proc/self/fd"))
    vm.thaw()
    return count


def still(vm: Vm, disk: Path) -> tuple[object, ...]:
    """What must not change while it is frozen."""
    board: Any = vm.board
    status = disk.stat()
    return (
        board.clock.now_ns(),
        [device.save() for device in board.devices],
        [processor._vcpu.get_state() for processor in vm._processors if processor._vcpu],
        vm.board.memory.read(0, 1 << 20),
        status.st_mtime_ns,
        vm.state,
    )


class Gate:
    """A backend whose transfers wait at a gate."""

    def __init__(self, behind: BlockBackend) -> None:
        self.behind = behind
        self.write_cache, self.read_only, self.size = behind.write_cache, behind.read_only, behind.size
        self.entered, self.opened = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        def through(*arguments: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(60)
            return getattr(self.behind, name)(*arguments)

        return through


@pytest.fixture(scope="module", params=ENGINES)
def linux(guest: Guest, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linux]:
    home = tmp_path_factory.mktemp("odd")
    com2 = {"lpc.com2.path": f"unix:{home / 'com2'}"}
    with Linux(guest, engine=request.param, disks=[make_disk(home / "disk.img")], config=com2) as linux:
        linux.home = home
        yield linux
        linux.power_off()


def test_twice_is_once(linux: Linux) -> None:
    vm = linux.vm
    vm.freeze()
    now = vm.board.clock.now_ns()
    vm.freeze()
    assert (vm.state, vm.board.clock.now_ns()) == (State.FROZEN, now)
    vm.thaw()
    vm.thaw()
    assert vm.state is State.RUNNING and linux("echo here") == "here\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("dd if=/dev/vda bs=64k count=4 iflag=direct 2> /dev/null | wc -c", "262144\n"),
        ("dd if=/dev/zero of=/dev/vda bs=512 seek=1 count=1 oflag=direct 2> /dev/null; echo $?", "0\n"),
    ],
)
def test_a_transfer_under_way_ends_before_the_freeze(linux: Linux, command: str, says: str) -> None:
    vm, disk = linux.vm, the_disk(linux.vm)
    behind = disk.backend
    gate = disk.backend = Gate(behind)
    try:
        linux.begin(command)
        assert gate.entered.wait(BOOT)
        freezing = threading.Thread(target=vm.freeze)
        freezing.start()
        time.sleep(0.1)
        assert freezing.is_alive() and vm.state is State.RUNNING
        gate.opened.set()
        freezing.join(60)
        assert vm.state is State.FROZEN and disk.worker.idle
        as_is = still(vm, linux.home / "disk.img")
        time.sleep(0.1)
        assert still(vm, linux.home / "disk.img") == as_is and vm.console.read() == ""
        vm.thaw()
        assert linux.end() == says
    finally:
        gate.opened.set()
        disk.backend = behind


def test_nobody_reads_the_console(linux: Linux) -> None:
    """Freezing waits for nobody, and of the output nothing is lost."""
    count = 20000 if linux.vm.engine.name == "translate" else 2000  # each byte is an exit, which in L1 is dear
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(BOOT)
        client.connect(str(linux.home / "com2"))
        linux("stty raw < /dev/ttyS1")
        linux.begin(f"seq 1 {count} > /dev/ttyS1")
        for _ in range(20):
            linux.vm.freeze()
            linux.vm.thaw()
            time.sleep(0.01)
        linux.end()
        expected = b"".join(b"%d\n" % number for number in range(1, count + 1))
        got = b""
        while len(got) < len(expected):
            got += client.recv(1 << 16)
        assert got == expected


def test_input_that_comes_meanwhile_waits(linux: Linux) -> None:
    linux.vm.freeze()
    linux.begin("echo typed")
    time.sleep(0.1)
    assert linux.vm.console.read() == ""
    linux.vm.thaw()
    assert linux.end() == "typed\n"


def test_a_reset_while_frozen(linux: Linux) -> None:
    vm = linux.vm
    vm.freeze()
    vm.reset()
    vm.freeze()
    assert vm.state is State.FROZEN
    vm.console.read()
    time.sleep(0.1)
    assert vm.console.read() == ""
    vm.thaw()
    linux.wait_ready()
    assert linux("echo again") == "again\n"


@pytest.mark.slow
def test_freezes_and_resets_at_any_moment_of_a_boot(guest: Guest, tmp_path: Path) -> None:
    rng = random.Random(20)
    with Linux(guest, disks=[make_disk(tmp_path / "disk.img")], cpus=2) as linux:
        vm = linux.vm
        for _ in range(20):
            vm.reset()
            until = time.monotonic() + rng.uniform(0, 8)
            while time.monotonic() < until:
                vm.freeze()
                if rng.random() < 0.01:
                    vm.reset()
                vm.thaw()
                time.sleep(rng.expovariate(20))
        vm.reset()
        vm.freeze()
        vm.console.read()
        vm.thaw()
        linux.wait_ready()
        assert linux("mount -t ext4 /dev/vda /mnt && nproc") == "2\n"
        linux.power_off()


@pytest.mark.parametrize(
    ("cpus", "times"),
    [(2, 50), pytest.param(1, 1000, marks=pytest.mark.slow), pytest.param(2, 1000, marks=pytest.mark.slow)],
)
def test_a_build_is_frozen_and_thawed(guest: Guest, tmp_path: Path, cpus: int, times: int) -> None:
    disk = make_disk(tmp_path / "disk.img")
    rng = random.Random(times)
    took: dict[str, list[int]] = {state: [] for state in DOING}
    frozen_ns = 0
    with Linux(builder(guest, tmp_path), disks=[disk], cpus=cpus) as linux:
        vm = linux.vm
        linux(START)
        time.sleep(1)
        uptime, now = float(linux("cat /proc/uptime").split()[0]), vm.board.clock.now_ns()
        threads, fds = threads_by_name(), descriptors(vm)
        for number in range(times):
            time.sleep(rng.choice([0, rng.expovariate(1000), rng.expovariate(50)]))
            wanted, patience = rng.choice(DOING), time.monotonic() + 0.1
            while doing(vm) != wanted and time.monotonic() < patience:
                time.sleep(0)
            state, before = doing(vm), time.monotonic_ns()
            vm.freeze()
            stopped = time.monotonic_ns()
            took[state].append(stopped - before)
            as_is = still(vm, disk)
            time.sleep(1 if number % (times // 4) == 1 else rng.expovariate(500))
            assert still(vm, disk) == as_is
            frozen_ns += time.monotonic_ns() - stopped
            vm.thaw()
        assert threads_by_name() == threads
        assert descriptors(vm) - fds in (0, RING)
        gone = float(linux("cat /proc/uptime").split()[0]) - uptime
        assert gone == pytest.approx((vm.board.clock.now_ns() - now) / 1e9, abs=1.5), f"{frozen_ns / 1e9} s frozen"
        clocks, *rounds = linux(FINISH).splitlines()
        linux.power_off()
    assert clocks == "clocks went back 0 times"
    for state in DOING:
        if took[state]:
            ms = [ns / 1e6 for ns in sorted(took[state])]
            median, p99 = ms[len(ms) // 2], ms[len(ms) * 99 // 100]
            print(f"{state}: frozen {len(ms)} times, median {median:.2f} ms, p99 {p99:.2f} ms")
    print(f"{len(rounds)} rounds, {frozen_ns / 1e9:.1f} s frozen")
    assert times < 1000 or all(len(took[state]) >= 20 for state in DOING)
    assert len(rounds) >= max(2, times // 50)
    assert sorted(rounds) == sorted(natively(guest, tmp_path, [int(line.split()[1]) for line in rounds]))
