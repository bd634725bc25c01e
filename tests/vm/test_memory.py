"""What guest memory is made of, from the configuration to the host's accounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from skep.errors import UserError
from skep.vm import Vm
from tests.engine.engines import need
from tests.memory.test_map import MIB, pool, smaps
from tests.vm.test_guests import kernel

__all__ = ["kernel", "pool"]


def test_a_guest_runs_in_huge_pages(kernel: Path, pool: int) -> None:
    need("kvm")
    config = {"memory.hugepages": "2M"}
    with Vm(kernel=kernel, memory=f"{pool * 2}M", cmdline="s", engine="kvm", config=config) as vm:
        vm.start()
        vm.console.expect("Hi\n", timeout=20)
        assert smaps(vm.board.memory)["KernelPageSize"] == 2048
    refused = pytest.raises(UserError, match="the translator sees guest memory by small pages")
    with refused, Vm(kernel=kernel, memory=f"{pool * 2}M", engine="translate", config=config) as vm:
        vm.start()


def test_pages_that_the_host_has_not_got(kernel: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1 pages of 1024 MiB, and this host has 0 free|no pages of 1024 MiB"):
        Vm(kernel=kernel, memory="1G", config={"memory.hugepages": "1G"})
    with pytest.raises(UserError, match="5 MiB are not whole pages of 2 MiB"):
        Vm(kernel=kernel, memory="5M", config={"memory.hugepages": "2M"})


def test_a_guest_in_wired_memory(kernel: Path) -> None:
    with Vm(kernel=kernel, memory="24M", cmdline="s", engine="translate", config={"memory.wired": "true"}) as vm:
        vm.start()
        vm.console.expect("Hi\n", timeout=20)
        assert smaps(vm.board.memory)["Locked"] == 24 * MIB >> 10, "after power-on, too"
