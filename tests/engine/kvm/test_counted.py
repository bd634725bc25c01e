"""What a vCPU under KVM left guest code for, and what it does: by our counts and by the kernel's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from skep.engine.contract import Activity
from skep.engine.kvm import KvmEngine, uapi
from tests.engine.tiny import Tiny


def test_exits_by_cause(boot: Callable[..., Tiny]) -> None:
    guest = boot("mov ecx, 100\nagain: out 0x80, al\nloop again\nmov rax, MMIO\nmov rbx, [rax]\nhlt")
    guest.run()
    told = guest.vcpu.tally()
    assert told["ports"] == 100 and told["devices' memory"] == 1 and told["HLT"] == 1
    statistics = guest.vm.statistics()
    assert statistics["exits: ports"] == 100
    assert statistics["in the kernel: HLT"] >= 1 and "in the kernel: pages mapped" in statistics


def test_a_kvm_that_counts_nothing_for_us(kvm: KvmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.14: what came to us is told all the same."""
    really = uapi.ioctl

    def ioctl(fd: int, number: int, argument: object = 0) -> int:
        old = number == uapi.CHECK_EXTENSION and argument == uapi.CAP_BINARY_STATS_FD
        return 0 if old else really(fd, number, argument)  # type: ignore[arg-type]

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    with Tiny(kvm, "out 0x80, al\nhlt", cpu_model="baseline") as guest:
        guest.run()
        assert guest.vcpu.tally() == {"ports": 1, "HLT": 1}
        assert guest.vcpu.activity is Activity.ACTIVE


def test_it_is_active_while_it_runs_and_can_be_asked_when_it_is_closed(kvm: KvmEngine) -> None:
    with Tiny(kvm, "again: jmp again", cpu_model="baseline") as guest:
        runner = threading.Thread(target=guest.vcpu.run)
        runner.start()
        time.sleep(0.05)
        assert guest.vcpu.activity is Activity.ACTIVE
        guest.vcpu.request_exit()
        runner.join(10)
        guest.vcpu.close()
        assert guest.vcpu.activity is Activity.ACTIVE
        assert set(guest.vcpu.tally()) <= {"asked for"}


def test_its_file_is_nobody_elses(kvm: KvmEngine) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Tiny(kvm, "hlt", cpu_model="baseline"):
        mine = {int(fd) for fd in set(os.listdir("/proc/self/fd")) - before}
        opened = [fd for fd in mine if os.path.exists(f"/proc/self/fd/{fd}")]
        assert opened and not any(os.get_inheritable(fd) for fd in opened)
