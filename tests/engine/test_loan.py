"""The timer's interrupts and their end in machine code, with a real local APIC and real time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from skep.clock import GuestClock
from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.contract import ExitReason
from skep.engine.translate.layout import Kind, StateBlock
from skep.irqchip.apicbus import ApicBus, Delivery
from skep.irqchip.lapic import LocalApic
from skep.locks import Lock, Order
from tests.engine.engines import translate
from tests.engine.tiny import Tiny

TIMER, OTHER, URGENT = 0xEC, 0x55, 0xF3
PERIOD = tsc_hz() // 2000
"""Half a millisecond."""
TICKS = 40

PRELUDE = f"""
    start: mov ecx, 0x1B
    mov eax, 0xFEE00D00     ; x2APIC
    xor edx, edx
    wrmsr
    mov ecx, 0x80F
    mov eax, 0x1FF
    wrmsr
    mov ecx, 0x832
    mov eax, 0x40000 | {TIMER}
    wrmsr
    mov ecx, 0x808
    mov eax, 0x10
    wrmsr
    call arm
"""
ARM = f"""
    arm: push rax
    push rcx
    push rdx
    rdtsc
    shl rdx, 32
    lea rax, [rax + rdx]
    add rax, [rip + period]
    mov [rip + deadline], rax
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0x6E0
    wrmsr
    pop rdx
    pop rcx
    pop rax
    ret
    end: push rax
    push rcx
    push rdx
    mov ecx, 0x80B
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    ret
    align 8
    period: dq {PERIOD}
    deadline: dq 0
    ticks: dq 0
    early: dq 0
    others: dq 0
    urgents: dq 0
    nested: dq 0
"""
TICK = """
    tick: push rax
    push rdx
    rdtsc
    shl rdx, 32
    add rax, rdx
    cmp rax, [rip + deadline]
    jae late
    inc qword [rip + early]
    late: inc qword [rip + ticks]
    call arm
    call end
    pop rdx
    pop rax
    iretq
"""


class Machine:
    """One vCPU with its local APIC, run until it halts with interrupts off."""

    def __init__(self, text: str, handlers: dict[int, str]) -> None:
        self.lock = Lock("board", Order.BOARD)
        self.clock = GuestClock(read_tsc, tsc_hz(), self.lock)
        self.apic = LocalApic(0, ApicBus(self.lock), self.clock, lambda: 0, bsp=True)
        self.guest = Tiny(translate(), text, handlers=handlers, apic=self.apic)
        self.guest.vm.set_tsc_offset(self.clock.tsc_offset)
        self._woken = threading.Event()
        self.apic.kick = self.kick

    def kick(self) -> None:
        self.guest.vcpu.kick()
        self._woken.set()

    def accept(self, vector: int) -> None:
        with self.lock:
            self.apic.accept(Delivery.FIXED, vector, False)

    def run(self, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        watchdog = threading.Timer(timeout, self.guest.vcpu.request_exit)
        watchdog.start()
        try:
            while time.monotonic() < end:
                left = self.guest.vcpu.run()
                assert left.reason in (ExitReason.HALTED, ExitReason.KICKED), left
                if left.reason is ExitReason.HALTED:
                    if not left.detail["interrupts"]:
                        return
                    while not self.apic.pending():
                        assert self._woken.wait(timeout)
                        self._woken.clear()
        finally:
            watchdog.cancel()
            watchdog.join()
        raise AssertionError(f"still running at {self.guest.reg('rip'):#x}")

    def counter(self, name: str) -> int:
        return self.guest.load(name)

    def close(self) -> None:
        self.guest.close()
        self.apic.close()
        self.clock.close()


Make = Callable[..., Machine]


@pytest.fixture
def make() -> Iterator[Make]:
    machines: list[Machine] = []

    def build(loop: str, handlers: dict[int, str] | None = None, more: str = "") -> Machine:
        text = PRELUDE + loop + "cli\nhlt\n" + TICK + more + ARM
        machines.append(Machine(text, {TIMER: "tick"} | (handlers or {})))
        return machines[-1]

    yield build
    for machine in machines:
        machine.close()


LOOPS = {
    "enabled": "sti\nagain: cmp qword [rip + ticks], TICKS\njb again\n",
    "now and then": """
        again: cli
        mov ecx, 20000
        busy: dec ecx
        jnz busy
        sti
        nop
        cmp qword [rip + ticks], TICKS
        jb again
    """,
    "by POPF": """
        again: push 2
        popfq
        mov ecx, 20000
        busy: dec ecx
        jnz busy
        push 0x202
        popfq
        cmp qword [rip + ticks], TICKS
        jb again
    """,
    "in a string instruction": """
        again: sti
        mov rdi, 0x180000
        mov ecx, 0x8000
        rep stosb
        cmp qword [rip + ticks], TICKS
        jb again
    """,
    "halted": "again: sti\nhlt\ncmp qword [rip + ticks], TICKS\njb again\n",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_ticks(make: Make, loop: str) -> None:
    """None is early, none gets lost, nothing stays in service; Python has little to do with it."""
    machine = make(LOOPS[loop].replace("TICKS", str(TICKS)))
    machine.run()
    assert machine.counter("ticks") >= TICKS and machine.counter("early") == 0
    machine.apic.settle()
    assert machine.apic.isr == 0
    st = machine.guest.vcpu.st  # type: ignore[attr-defined]
    assert machine.counter("ticks") == st.n_irq
    if loop in ("enabled", "now and then", "by POPF"):
        assert st.n_tick >= TICKS - 3
        assert machine.guest.vcpu.counts[Kind.EMULATE] < 10  # type: ignore[attr-defined]


def test_other_interrupts_meanwhile(make: Make) -> None:
    """From another thread: less urgent ones wait until the tick has ended, more urgent ones do not, and all come."""
    handlers = """
        other: inc qword [rip + others]
        call end
        iretq
        urgent: push rax
        inc qword [rip + urgents]
        mov rax, [rsp + 8]
        sub rax, [rip + handler]
        cmp rax, 64
        ja outside
        inc qword [rip + nested]
        outside: call end
        pop rax
        iretq
        align 8
        handler: dq tick
    """
    machine = make(
        "sti\nagain: cmp qword [rip + urgents], 200\njb again\n", {OTHER: "other", URGENT: "urgent"}, handlers
    )
    sent = 0
    stop = threading.Event()

    def send() -> None:
        nonlocal sent
        while not stop.is_set():
            for vector in (OTHER, URGENT):
                while machine.apic.irr >> vector & 1 and not stop.is_set():
                    time.sleep(0.0001)  # one that waits already would swallow it
                machine.accept(vector)
            sent += 1
            time.sleep(0.0003)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        machine.run()
    finally:
        stop.set()
        sender.join()
    assert machine.counter("urgents") >= 200
    waiting = machine.apic.irr >> OTHER & 1
    assert abs(machine.counter("others") + waiting - machine.counter("urgents")) <= 2
    assert machine.counter("early") == 0 and machine.counter("ticks") > 0


def test_a_deadline_is_read_moved_and_taken_back(make: Make) -> None:
    """RDMSR tells what was written; 0 disarms; one in the past comes at once."""
    loop = """
        mov ecx, 0x6E0
        rdmsr
        shl rdx, 32
        add rax, rdx
        mov r12, rax            ; as it was armed
        xor eax, eax
        xor edx, edx
        wrmsr
        rdmsr
        mov r13d, eax           ; 0
        sti
        mov ecx, 3000000
        busy: dec ecx
        jnz busy
        mov r14, [rip + ticks]  ; none
        mov ecx, 0x6E0
        mov eax, 1
        xor edx, edx
        wrmsr
        nop
        mov r15, [rip + ticks]  ; one, or more on a busy host
    """
    machine = make("mov r11, [rip + deadline]\n" + loop)
    machine.guest.memory.store_u64(machine.guest.program["period"], PERIOD * 400)
    machine.run()
    assert machine.guest.reg("r12") == machine.guest.reg("r11")
    assert [machine.guest.reg(r) for r in ("r13", "r14")] == [0, 0] and machine.guest.reg("r15") > 0


def test_a_tick_that_came_stays(make: Make) -> None:
    """With interrupts off its time passes, and then the guest writes another deadline: the first is pending still."""
    loop = """
        cli
        wait: rdtsc
        shl rdx, 32
        add rax, rdx
        cmp rax, [rip + deadline]
        jb wait
        mov rax, -1
        mov edx, 0x7FFFFFFF
        mov ecx, 0x6E0
        wrmsr                   ; far away
        sti
        nop
        nop
        cli
    """
    machine = make(loop)
    machine.run()
    assert machine.counter("ticks") > 0


def test_the_counter_is_moved(make: Make) -> None:
    """IA32_TSC_ADJUST: the deadline that was written is meant by the counter as it was then."""
    loop = """
        mov ecx, 0x3B
        mov eax, 0
        mov edx, 1              ; 2**32 ticks ahead
        wrmsr
        mov ecx, 0x6E0
        rdmsr
        shl rdx, 32
        add rax, rdx
        mov r12, rax
        mov r13, [rip + deadline]
        sti
        again: cmp qword [rip + ticks], 3
        jb again
    """
    machine = make(loop)
    machine.guest.memory.store_u64(machine.guest.program["period"], PERIOD * 200)
    machine.run()
    assert machine.guest.reg("r12") - machine.guest.reg("r13") == 1 << 32
    assert machine.counter("ticks") >= 3 and machine.counter("early") == 0


def test_a_deadline_that_is_moved(make: Make) -> None:
    """An earlier one than the host's timer was set for, and a later one."""
    loop = """
        mov rax, 1 << 40        ; far away
        mov [rip + period], rax
        call arm
        mov rax, [rip + soon]
        mov [rip + period], rax
        call arm
        mov rax, 1 << 40        ; so that no second tick is due before the next deadline is written
        mov [rip + period], rax
        sti
        wait: cmp qword [rip + ticks], 1
        jb wait
        cli
        mov rax, [rip + later]
        mov [rip + period], rax
        call arm
        sti
        last: cmp qword [rip + ticks], 2
        jb last
    """
    more = f"""
        align 8
        soon: dq {PERIOD}
        later: dq {PERIOD * 20}
    """
    machine = make(loop, more=more)
    machine.guest.memory.store_u64(machine.guest.program["period"], PERIOD * 100)
    machine.run()
    assert machine.counter("ticks") >= 2 and machine.counter("early") == 0


def test_a_vm_leaves_nothing_of_it_behind() -> None:
    """Neither the thread that sleeps on the timers nor their files."""
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    machine = Machine(PRELUDE + "cli\nhlt\n" + TICK + ARM, {TIMER: "tick"})
    machine.run()
    assert "skep-ticks" in [thread.name for thread in threading.enumerate()]
    machine.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


def test_whose_timer_it_was() -> None:
    with Tiny(translate(), "start: hlt") as guest:
        ticker = guest.vcpu._shared.ticker  # type: ignore[attr-defined]
        blocks = [StateBlock() for _ in range(20)]
        alarms = [ticker.alarm(st) for st in blocks]
        rung = blocks[3::5]
        for st, alarm in zip(blocks, alarms, strict=True):
            st.apic_armed = 7
            alarm.set(1 if st in rung else 10**12)
        alarms[0].set(1)
        alarms[0].cancel()  # perhaps too late
        end = time.monotonic() + 10
        while not all(st.brk for st in rung):
            assert time.monotonic() < end
            time.sleep(0.001)
        for st in blocks[1:]:
            assert (st.brk, st.apic_armed) == ((1, 0) if st in rung else (0, 7))
        for st, alarm in zip(blocks, alarms, strict=True):
            alarm.close()
            st.close()
