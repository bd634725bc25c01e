"""More vCPUs than the host has CPUs take turns."""

from __future__ import annotations

import threading
import time

from skep.engine.contract import ExitReason, Vcpu
from skep.engine.translate import TranslateEngine
from skep.engine.translate.engine import TranslateVm
from skep.engine.translate.turns import Turns, host_cpus
from skep.engine.translate.vcpu import TranslateVcpu
from tests.engine.tiny import Tiny

CPUS = 4 * host_cpus()
LIMIT = host_cpus() + 1


def turns_of(guest: Tiny) -> Turns:
    assert isinstance(guest.vm, TranslateVm)
    turns = guest.vm.shared.turns
    assert turns is not None
    return turns


def test_all_come_on_and_few_run() -> None:
    """No vCPU gives way by itself here, so each has slices of about the same length."""
    text = """
        start: lea rbx, [rdi * 8 + 0x180000]
        again: inc qword [rbx]
        cmp dword [0x181000], 0
        je again
        hlt
    """
    with Tiny(TranslateEngine(), text, cpus=CPUS) as guest:
        everyone = [guest.vcpu, *guest.others]
        turns = turns_of(guest)
        ran = threading.Thread(target=guest.run_together, args=(120,))
        ran.start()
        try:
            end = time.monotonic() + 60
            for least in (1, 100_000, 1_000_000):
                while min(guest.load(0x180000 + 8 * i) for i in range(CPUS)) < least:
                    assert time.monotonic() < end
                    guest.vm.freeze()
                    while not all(vcpu.frozen() for vcpu in everyone):
                        assert time.monotonic() < end
                    assert turns.free() == 0 and turns.taken() == LIMIT
                    guest.vm.thaw()
                    time.sleep(0.001)
        finally:
            guest.vm.thaw()
            guest.memory.store_u32(0x181000, 1)
            ran.join()
        assert turns.free() == LIMIT and turns.taken() == 0


def test_turns_are_neither_lost_nor_made() -> None:
    """vCPUs that halt and come again, spin, ask Python for something, and are stopped or frozen at any time."""
    text = """
        start: mov r8d, edi
        imul r8d, r8d, 77
        round: mov ecx, r8d
        and ecx, 0x1ff
        inc ecx
        spin: pause
        dec ecx
        jne spin
        out 0x80, al
        imul r8d, r8d, 1103515245
        add r8d, 12345
        lock inc qword [0x180000]
        test r8d, 0x30000
        jne round
        hlt
        jmp round
    """
    with Tiny(TranslateEngine(), text, cpus=CPUS) as guest:
        rounds = 100
        halts = [0] * CPUS
        problems: list[str] = []

        def run(vcpu: Vcpu, index: int) -> None:
            while halts[index] < rounds and not problems:
                left = vcpu.run()
                if left.reason is not ExitReason.HALTED:
                    problems.append(f"vCPU {index}: {left}")
                halts[index] += 1

        everyone = [guest.vcpu, *guest.others]
        threads = [threading.Thread(target=run, args=(v, i)) for i, v in enumerate(everyone)]
        for thread in threads:
            thread.start()
        assert isinstance(guest.vcpu, TranslateVcpu)
        world = guest.vcpu.cache.world
        while any(thread.is_alive() for thread in threads):
            guest.vm.freeze()
            before = guest.load(0x180000)
            assert guest.load(0x180000) == before
            guest.vm.thaw()
            with world.stopped():
                assert not any(vcpu.st.where for vcpu in everyone if isinstance(vcpu, TranslateVcpu))
            time.sleep(0.002)
        for thread in threads:
            thread.join()
        assert problems == [] and halts == [rounds] * CPUS
        assert turns_of(guest).free() == LIMIT


def test_none_are_taken_where_there_is_room() -> None:
    with Tiny(TranslateEngine(), "start: hlt", cpus=host_cpus()) as guest:
        assert isinstance(guest.vm, TranslateVm) and guest.vm.shared.turns is None
        guest.run_together()


def test_the_thread_goes_with_the_vm() -> None:
    before = threading.active_count()
    with Tiny(TranslateEngine(), "start: hlt", cpus=CPUS) as guest:
        assert any(thread.name == "skep-turns" for thread in threading.enumerate())
        guest.run_together()
    assert threading.active_count() == before
