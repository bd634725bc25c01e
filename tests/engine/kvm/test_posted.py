"""Writes to ports that may wait: no return from KVM_RUN, the order kept, and none left when the vCPU stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable

from skep.engine.contract import ExitReason
from skep.engine.kvm import uapi
from tests.engine.tiny import Tiny

INDEX, DATA = 0x70, 0x71
WRITES = """
        mov ecx, {times}
again:  mov al, cl
        out 0x70, al
        loop again
        in al, 0x71
        mov al, 0x55
        out 0x70, al
        {end}
"""


def posting(guest: Tiny) -> Tiny:
    assert guest.vm.posted is not None
    guest.vm.posted.add(INDEX)
    return guest


def accesses(guest: Tiny) -> list[tuple[str, int, int]]:
    return [(kind, where, value) for kind, where, _, value in guest.io.log if kind == "out" or where == DATA]


def test_writes_wait_for_the_next_exit(boot: Callable[..., Tiny]) -> None:
    guest = posting(boot(WRITES.format(times=50, end="hlt")))
    guest.run()
    log = accesses(guest)
    assert [value for _, _, value in log[:50]] == list(range(50, 0, -1))
    assert log[50][:2] == ("in", DATA) and log[51:] == [("out", INDEX, 0x55)]
    assert guest.vcpu.counts[uapi.EXIT_IO] == 1  # type: ignore[attr-defined]


def test_more_than_there_is_room_for(boot: Callable[..., Tiny]) -> None:
    guest = posting(boot(WRITES.format(times=1000, end="hlt")))
    guest.run()
    assert guest.io.outs(INDEX) == [n & 0xFF for n in range(1000, 0, -1)] + [0x55]
    assert 1 < guest.vcpu.counts[uapi.EXIT_IO] < 20  # type: ignore[attr-defined]


def test_none_is_left_when_it_stands_still(boot: Callable[..., Tiny]) -> None:
    guest = posting(boot(WRITES.format(times=1, end="inc rbx\nspin: jmp spin")))
    while not guest.reg("rbx"):
        threading.Timer(0.01, guest.vcpu.request_exit).start()
        assert guest.vcpu.run().reason is ExitReason.KICKED
    assert guest.io.outs(INDEX) == [1, 0x55]


def test_a_write_of_two_bytes_does_not_wait(boot: Callable[..., Tiny]) -> None:
    """Its second byte is another register's."""
    guest = posting(boot("mov ax, 0x1234\n out 0x70, ax\n hlt"))
    guest.run()
    assert [entry[:3] for entry in guest.io.log] == [("out", INDEX, 2)]
    assert guest.vcpu.counts[uapi.EXIT_IO] == 1  # type: ignore[attr-defined]
