"""What every engine promises, with tiny guests. Interrupts and accesses to devices have files of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from skep.engine.amd64.msrs import IA32_TSC_DEADLINE, LSTAR
from skep.engine.amd64.tsc import read_tsc
from skep.engine.contract import ExitReason, Vcpu
from skep.engine.exits import ExitRecord
from skep.machine.amd64 import why_not_kvm
from skep.memory import GuestMemory
from tests.engine.engines import EVERYWHERE, Machines
from tests.engine.tiny import MMIO, NULL_SEGMENT, PROGRAM, RAM, RecordingIo, TestInterrupts, Tiny

pytestmark = EVERYWHERE
HARDWARE = why_not_kvm() is None
TIMES = 1000
"""That something is tried whose moment matters."""


# Accesses that leave the guest


def test_device_memory(boot: Machines) -> None:
    guest = boot("""
        mov rbx, MMIO
        mov byte [rbx + 1], 0x5a
        mov rax, 0x1122334455667788
        mov [rbx + 8], rax
        movzx ecx, word [rbx + 8]
        add dword [rbx + 16], 7
        hlt""")
    guest.io.device[16] = 3
    guest.run()
    assert guest.io.log == [
        ("write", MMIO + 1, 1, 0x5A), ("write", MMIO + 8, 8, 0x1122334455667788), ("read", MMIO + 8, 2, 0x7788),
        ("read", MMIO + 16, 4, 3), ("write", MMIO + 16, 4, 10),
    ]  # fmt: skip
    assert guest.reg("rcx") == 0x7788


def test_the_local_apics_msrs_are_ours(boot: Machines) -> None:
    guest = boot(f"""
        mov ecx, 0x1b
        rdmsr
        mov [rip + base], eax
        mov ecx, {IA32_TSC_DEADLINE:#x}
        mov eax, 0x1234
        mov edx, 1
        wrmsr
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
        wrmsr
        hlt
        base: dq 0""")
    guest.interrupts.msrs |= {IA32_TSC_DEADLINE: 0, 0x80B: 99}
    guest.run()
    assert guest.exception is None
    assert guest.load("base") == 0xFEE00900
    assert guest.interrupts.msrs[IA32_TSC_DEADLINE] == 0x1_0000_1234 and guest.interrupts.msrs[0x80B] == 0


def test_an_msr_that_nobody_knows_faults(boot: Machines) -> None:
    guest = boot("mov ecx, 0x12345\n rdmsr\n hlt")
    guest.run()
    assert guest.exception is not None and guest.exception.vector == 13


def test_task_priority_goes_both_ways(boot: Machines) -> None:
    guest = boot("mov rax, cr8\n mov rbx, rax\n mov eax, 3\n mov cr8, rax\n out 0x80, al\n hlt")
    guest.interrupts.tpr = 9
    guest.run()
    assert guest.reg("rbx") == 9 and guest.interrupts.tpr == 3


# Interrupts


HANDLED = """
    start:  {before}
            hlt
            cli
            hlt
    handler: inc qword [rip + count]
            iretq
    count:  dq 0"""


def test_an_interrupt_wakes_a_halted_guest(boot: Machines) -> None:
    guest = boot(HANDLED.format(before="sti"), handlers={0x40: "handler"})
    left = guest.vcpu.run()
    assert left.reason is ExitReason.HALTED and left.detail == {"interrupts": True}
    assert guest.vcpu.run().reason is ExitReason.HALTED, "nothing waits: it stays halted"
    assert guest.load("count") == 0
    guest.interrupts.raise_vector(0x40)
    left = guest.vcpu.run()
    assert left.detail == {"interrupts": False} and guest.load("count") == 1


def test_an_interrupt_waits_for_its_window(boot: Machines) -> None:
    guest = boot(
        """
        mov eax, 1
        out 0x80, al
        mov rbx, [rip + count]
        sti
        wait: cmp qword [rip + count], 2
        jne wait
        cli
        hlt
        handler: inc qword [rip + count]
        iretq
        count: dq 0""",
        handlers={0x41: "handler", 0x52: "handler"},
    )

    def on_write(port: int, size: int, value: int) -> None:
        if value == 1:
            guest.interrupts.raise_vector(0x41)
            guest.interrupts.raise_vector(0x52)

    guest.io.on_write = on_write
    guest.run()
    assert guest.reg("rbx") == 0, "not before STI"
    assert guest.load("count") == 2


def test_an_interrupt_under_way_is_part_of_the_state(boot: Machines) -> None:
    guest = boot(HANDLED.format(before="sti"), handlers={0x40: "handler"})
    guest.vcpu.run()
    guest.set(**(guest.state | {"interrupt": 0x40, "rflags": 0x202}))
    assert guest.state["interrupt"] == 0x40
    guest.run()
    assert guest.load("count") == 1 and "interrupt" not in guest.state


@pytest.mark.parametrize("blocked", [0, 1])
def test_an_nmi_that_waits_is_part_of_the_state(boot: Machines, blocked: int) -> None:
    """Also one that waits for the end of another's handler."""
    guest = boot(HANDLED.format(before="cli"), handlers={2: "handler"})
    guest.vcpu.run()
    guest.set(**(guest.state | {"nmi_pending": 1, "nmi_blocked": blocked}))
    assert guest.state["nmi_pending"] == 1
    guest.run()
    assert guest.load("count") == 1 - blocked and guest.state.get("nmi_pending", 0) == blocked


# Leaving


LOOPS = {"in the guest": "pause", "leaving it": "out 0x80, al", "reading": "in al, 0x80", "a device": "mov al, [rbx]"}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("what", ["interrupt", "NMI"])
def test_no_kick_is_lost(boot: Machines, what: str, loop: str) -> None:
    """Each is raised at whatever moment the one before was seen to have come."""
    text = f"""
start:  mov rbx, {MMIO}
        sti
again:  {loop}
        jmp again
counts: inc qword [rip + count]
        iretq
ends:   cli
        hlt
count:  dq 0
"""
    guest = boot(text, handlers={2: "counts", 0x40: "counts", 0x41: "ends"})
    where, lost = guest.program["count"], []

    def ask() -> None:
        for number in range(1, TIMES + 1):
            if what == "NMI":
                guest.interrupts.raise_nmi()
            else:
                guest.interrupts.raise_vector(0x40)
            end = time.monotonic() + 10
            while guest.memory.load_u64(where) != number and not lost:
                time.sleep(0)
                if time.monotonic() > end:
                    lost.append(number)
        guest.interrupts.raise_vector(0x41)

    asker = threading.Thread(target=ask)
    asker.start()
    guest.run(timeout=60)
    asker.join()
    assert not lost and guest.load("count") == TIMES


@pytest.mark.parametrize("access", ["out 0x80, al", "mov [rbx], al"])
def test_an_exit_asked_for_in_an_access_comes_right_behind_it(boot: Machines, access: str) -> None:
    """What sends a machine to sleep is the last that it does."""
    guest = boot(f"mov rbx, {MMIO}\n {access}\n behind: inc qword [rip + count]\n hlt\n count: dq 0")
    guest.io.on_write = lambda port, size, value: guest.vcpu.request_exit()
    write = guest.io.mmio_write

    def mmio_write(gpa: int, size: int, value: int) -> None:
        guest.vcpu.request_exit()
        write(gpa, size, value)

    guest.io.mmio_write = mmio_write  # type: ignore[method-assign]
    assert guest.vcpu.run().reason is ExitReason.KICKED
    assert guest.load("count") == 0 and guest.reg("rip") == guest.program["behind"]


def test_a_triple_fault_tells_the_last_exits(boot: Machines) -> None:
    guest = boot("mov al, 7\n out 0x80, al\n ud2")
    guest.set(idtr={"base": 0, "limit": 0})
    left = guest.run()
    assert left.reason is ExitReason.SHUTDOWN
    last = [record._replace(rip=None) for record in guest.vcpu.exits.last() if record.what != "fault"]
    assert last == [ExitRecord("out", 0x80, 1, 1, 7, None)], "not every engine tells where, nor what faults there were"


# State


def test_state_out_and_in_is_the_same(boot: Machines) -> None:
    guest = boot("mov eax, 1\n hlt")
    guest.set(
        r9=0xFFFF_FFFF_FFFF_FFFF, dr0=0x1000, cr2=0x1234, xsave=guest.state["xsave"],
        gs={"selector": 0x18, "base": 0x7000_0000_0000, "limit": 0xFFFFF, "attributes": 0x4093},
        fs=NULL_SEGMENT, msrs={LSTAR: 0xFFFF_8000_0000_1000},
    )  # fmt: skip
    before = guest.state
    assert before["r9"] == 0xFFFF_FFFF_FFFF_FFFF and before["dr0"] == 0x1000 and before["cr2"] == 0x1234
    assert before["msrs"][LSTAR] == 0xFFFF_8000_0000_1000
    assert before["gs"] == {"selector": 0x18, "base": 0x7000_0000_0000, "limit": 0xFFFFF, "attributes": 0x4093}
    assert not before["fs"]["attributes"] & 0x80
    guest.set(**before)
    assert guest.state == before
    other = boot("hlt")
    other.set(**before)
    assert other.state == before


def test_state_taken_within_an_access_has_it_done(boot: Machines) -> None:
    guest = boot("in al, 0x60\n again: jmp again")

    guest.io.inputs[0x60] = 0x77
    guest.io.on_read = lambda port, size: guest.vcpu.request_exit()
    with guest.watched(10):
        assert guest.vcpu.run().reason is ExitReason.KICKED
    assert guest.io.log == [("in", 0x60, 1, 0x77)]
    state = guest.state
    assert state["rax"] & 0xFF == 0x77 and state["rip"] == PROGRAM + 2


@contextmanager
def bare(boot: Machines, memory: GuestMemory, io: RecordingIo) -> Iterator[Vcpu]:
    """A processor in a machine that has nothing else."""
    vm = boot.engine.create_vm(memory, io, 1, "baseline", 0)
    vcpu = vm.create_vcpu(0, TestInterrupts())
    try:
        yield vcpu
    finally:
        vcpu.close()
        vm.close()
        memory.close()


def test_real_mode(boot: Machines) -> None:
    memory = GuestMemory(RAM)
    io = RecordingIo()
    # mov al, [0x700]; inc al; out 0x80, al; hlt
    memory.write(0x7C00, bytes.fromhex("a00007 fec0 e680 f4"))
    memory.store_u8(0x700, 41)
    with bare(boot, memory, io) as vcpu:
        code = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": 0x9B}
        data = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": 0x93}
        vcpu.set_state({"cs": code, "ds": data, "es": data, "ss": data, "cr0": 0x10, "rip": 0x7C00, "rflags": 2})
        assert vcpu.run().reason is ExitReason.HALTED
        assert io.outs(0x80) == [42]
        assert vcpu.get_state()["rip"] == 0x7C08


def test_the_tsc_is_the_hosts_plus_the_offset(boot: Machines) -> None:
    guest = boot("rdtsc\n shl rdx, 32\n or rax, rdx\n mov [rip + t], rax\n hlt\n t: dq 0")
    offset = 1 << 50 if HARDWARE else 0  # the emulation accepts any and knows only this one
    guest.vm.set_tsc_offset(offset)
    before = read_tsc() + offset
    guest.run()
    assert before <= guest.load("t") <= read_tsc() + offset


def test_cpuid_is_the_models(boot: Machines) -> None:
    guest = boot("mov eax, 0x40000000\n cpuid\n mov [rip + id], ebx\n mov eax, 1\n cpuid\n hlt\n id: dq 0")
    guest.run()
    assert guest.read("id", 4) == b"KVMK"
    avx, hypervisor, tsc_deadline = 1 << 28, 1 << 31, 1 << 24
    assert guest.reg("rcx") & hypervisor and guest.reg("rcx") & tsc_deadline
    assert not (HARDWARE and guest.reg("rcx") & avx)  # the emulation shows the host's features


def test_memory_above_the_hole(boot: Machines) -> None:
    memory = GuestMemory(64 << 20, low_limit=32 << 20, high_base=48 << 20)
    io = RecordingIo()
    # mov al, [0x300_0010]; out 0x80, al; hlt, in flat 32-bit mode
    memory.write(0x7C00, bytes.fromhex("a010000003 e680 f4"))
    memory.store_u8((48 << 20) + 0x10, 77)
    with bare(boot, memory, io) as vcpu:
        code = {"selector": 8, "base": 0, "limit": 0xFFFFFFFF, "attributes": 0xC09B}
        data = {"selector": 16, "base": 0, "limit": 0xFFFFFFFF, "attributes": 0xC093}
        vcpu.set_state({"cs": code, "ds": data, "es": data, "ss": data, "cr0": 0x11, "rip": 0x7C00, "rflags": 2})
        assert vcpu.run().reason is ExitReason.HALTED
        assert io.outs(0x80) == [77]


def test_nothing_is_left_behind(boot: Machines) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with Tiny(boot.engine, "hlt", cpu_model="baseline") as guest:
            guest.run()
            guest.vcpu.close()
            guest.vcpu.kick()  # a late one
    assert os.listdir("/proc/self/fd") == before


def test_a_busy_guest_does_not_hold_the_interpreter(boot: Machines) -> None:
    guest = boot("again: jmp again")
    runner = threading.Thread(target=guest.vcpu.run)
    runner.start()
    began = time.monotonic()
    for _ in range(20):
        time.sleep(0.001)
    took = time.monotonic() - began
    guest.vcpu.request_exit()
    runner.join(10)
    assert not runner.is_alive() and took < 5


def test_64_processors(boot: Machines) -> None:
    text = """
        lea rax, [rip + there]
        lock inc dword [rax + rdi*4]
        lock inc dword [rax + 256]
        hlt
        there: space 264"""
    with Tiny(boot.engine, text, cpu_model="baseline", cpus=64) as guest:
        guest.run_together(120)
        each, together = guest.read("there", 256), guest.load(guest.program["there"] + 256, 4)
        assert each == (1).to_bytes(4, "little") * 64 and together == 64
