"""What a guest's write to a doorbell, and a device's message, cost: no return from KVM_RUN."""

from __future__ import annotations

import os
from collections.abc import Callable

from skep.engine.kvm import uapi
from tests.engine.tiny import MMIO, Tiny

RINGS = """
        mov rax, MMIO
        mov ecx, 50
ring:   mov dword [rax + 0x10], 1
        mov word [rax + 0x10], 2
        loop ring
        mov dword [rax + 0x20], 3
        hlt
"""


def test_a_doorbell_wakes_its_reader_and_no_one_else(boot: Callable[..., Tiny]) -> None:
    guest = boot(RINGS)
    assert guest.vm.doorbells is not None
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        guest.vm.doorbells.add(MMIO + 0x10, bell)
        guest.run()
        assert os.eventfd_read(bell) == 100
        assert guest.io.log == [("write", MMIO + 0x20, 4, 3)]
        assert guest.vcpu.counts[uapi.EXIT_MMIO] == 1  # type: ignore[attr-defined]
        guest.vm.doorbells.remove(MMIO + 0x10, bell)
        guest.set(rip=guest.program.address)
        guest.run()
        assert guest.vcpu.counts[uapi.EXIT_MMIO] == 102  # type: ignore[attr-defined]
    finally:
        os.close(bell)
