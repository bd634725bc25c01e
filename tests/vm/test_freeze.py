"""A guest at work is frozen and thawed, a thousand times: its results are right, and its time knows nothing of it."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from skep.devices.virtio.blk import VirtioBlk
from skep.devices.virtio.pci import VirtioPci
from skep.guest.debian import Guest
from skep.vm import Vm
from tests.linux import Linux
from tests.vm.building import FINISH, START, builder, make_disk, natively

DOING = DISK, SLEEPS, RUNS = "the disk works", "the processor sleeps", "the processor runs"


def the_disk(vm: Vm) -> VirtioBlk:
    devices = [pci.device for pci in vm.board.devices if isinstance(pci, VirtioPci)]
    return next(device for device in devices if isinstance(device, VirtioBlk))


def doing(vm: Vm) -> str:
    """What the guest does at this moment, seen from outside."""
    if not the_disk(vm).worker.idle:
        return DISK
    return SLEEPS if vm._processors[0]._sleeping else RUNS


def still(vm: Vm, disk: Path) -> tuple[object, ...]:
    """What must not change while it is frozen."""
    board: Any = vm.board
    status = disk.stat()
    queue = the_disk(vm).queues[0]
    return (
        board.clock.now_ns(),
        board.clock.tsc(),
        board.lapics[0].save(),
        (queue.next_avail, queue.next_used),
        status.st_mtime_ns,
        vm.state,
    )


@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_build_is_frozen_and_thawed(guest: Guest, tmp_path: Path, times: int) -> None:
    disk = make_disk(tmp_path / "disk.img")
    rng = random.Random(times)
    took: dict[str, list[int]] = {state: [] for state in DOING}
    frozen_ns = 0
    with Linux(builder(guest, tmp_path), disks=[disk]) as linux:
        vm = linux.vm
        linux(START)
        time.sleep(1)
        uptime, now = float(linux("cat /proc/uptime").split()[0]), vm.board.clock.now_ns()
        threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
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
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, fds)
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
    assert len(rounds) >= times // 20
    assert sorted(rounds) == sorted(natively(guest, tmp_path, [int(line.split()[1]) for line in rounds]))
