"""Writes to ports that may wait: no return from KVM_RUN, the order kept, and none left when the vCPU stands still."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from skep.contracts.constantports import ConstantPorts
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


# Streams: a console's bytes, which somebody waits to see

TEXT, STATUS = 0x3F8, 0x3FD
PRINTS = """
        mov ecx, {times}
again:  mov dx, 0x3fd
wait:   in al, dx
        test al, 0x20
        jz wait
        mov dx, 0x3f8
        mov al, cl
        out dx, al
        loop again
        {end}
"""


def streaming(boot: Callable[..., Tiny], code: str) -> tuple[Tiny, ConstantPorts]:
    """STATUS is known to read 0x60."""
    constants = ConstantPorts()
    constants.set(STATUS, 0x60)
    guest = boot(code, constants=constants)
    assert guest.vm.posted is not None
    guest.vm.posted.add_stream(TEXT)
    return guest, constants


def test_a_stream_is_gathered(boot: Callable[..., Tiny]) -> None:
    """Nothing is lost, nothing overtaken: neither by reads of what is known, nor where the stream begins and ends."""
    guest, constants = streaming(boot, PRINTS.format(times=5000, end="in al, 0x71\n hlt"))
    guest.run()
    assert guest.io.outs(TEXT) == [n & 0xFF for n in range(5000, 0, -1)]
    assert guest.io.log[-1][:2] == ("in", DATA) and not any(where == STATUS for _, where, _, _ in guest.io.log)
    assert 5000 < guest.vcpu.counts[uapi.EXIT_IO] < 6000, "the reads, and few of the writes"  # type: ignore[attr-defined]
    constants.close()


def test_the_end_of_a_stream_is_seen_though_the_guest_does_nothing_more(boot: Callable[..., Tiny]) -> None:
    code = "mov ecx, 100\n again: mov dx, 0x3f8\n mov al, cl\n out dx, al\n loop again\n spin: jmp spin"
    guest, constants = streaming(boot, code)
    runner = threading.Thread(target=guest.vcpu.run)
    runner.start()
    deadline = time.monotonic() + 10
    while len(guest.io.outs(TEXT)) < 100 and time.monotonic() < deadline:
        time.sleep(0.005)
    seen = guest.io.outs(TEXT)
    guest.vcpu.request_exit()
    runner.join()
    assert seen == list(range(100, 0, -1))
    constants.close()


def test_few_bytes_are_an_exit_each(boot: Callable[..., Tiny]) -> None:
    guest, constants = streaming(boot, PRINTS.format(times=20, end="hlt"))
    guest.run()
    assert guest.io.outs(TEXT) == list(range(20, 0, -1))
    assert guest.vcpu.counts[uapi.EXIT_IO] == 40  # type: ignore[attr-defined]
    constants.close()


def test_a_stream_begins_again(boot: Callable[..., Tiny]) -> None:
    """After a while without any, a byte is an exit; and when many come, they are gathered again."""
    lines = PRINTS.format(times=500, end="in al, 0x71").replace("again", "more").replace("wait", "poll")
    guest, constants = streaming(boot, f"mov ebx, 3\n again:\n{lines}\n dec ebx\n jnz again\n hlt")
    exits = []

    def rest(port: int, size: int) -> None:
        exits.append(guest.vcpu.counts[uapi.EXIT_IO])  # type: ignore[attr-defined]
        time.sleep(0.3)

    guest.io.on_read = rest
    guest.run()
    assert guest.io.outs(TEXT) == [n & 0xFF for n in range(500, 0, -1)] * 3
    reads = 501
    for before, after in itertools.pairwise([0, *exits]):
        assert 64 <= after - before - reads < 250, "exits for the first bytes, and few for the others"
    constants.close()
