"""Interrupts from one vCPU to another, and HLT, in machine code, with real local APICs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from skep.clock import GuestClock
from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.contract import Activity, ExitReason
from skep.engine.translate.layout import Kind, StateBlock
from skep.irqchip.apicbus import ApicBus, Delivery
from skep.irqchip.lapic import LocalApic
from skep.locks import Lock, Order
from tests.engine.engines import translate
from tests.engine.tiny import Tiny

PING, PONG, HIGH, STOP = 0x41, 0x51, 0xF1, 0xF8
PRELUDE = """
    start: mov r15, rdi             ; the vCPU's number
    mov ecx, 0x1B
    rdmsr
    or eax, 0xC00                   ; x2APIC
    wrmsr
    mov ecx, 0x80F
    mov eax, 0x1FF
    xor edx, edx
    wrmsr
    lock inc qword [rip + here]
    all: pause
    cmp qword [rip + here], CPUS
    jb all
    test r15, r15
    jnz other
"""
END = """
    send: mov ecx, 0x830            ; edx:eax to the interrupt command register
    wrmsr
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
    iretq
    ping: lock inc qword [rip + pings]
    inc r14
    jmp end
    pong: inc qword [rip + pongs]
    jmp end
    high: mov r13, 1
    inc qword [rip + highs]
    jmp end
    stop: cli
    lock inc qword [rip + stopped]
    hlt
    align 8
    here: dq 0
    pings: dq 0
    pongs: dq 0
    highs: dq 0
    stopped: dq 0
"""
NMI = """
    nmi: push rax
    push rcx
    push rdx
    inc qword [rip + nmis]
    test rbp, rbp
    jz over
    xor ebp, ebp
    mov ebx, 10
    more: mov ecx, 0x830            ; ten, to itself
    mov eax, 0x4400
    xor edx, edx
    wrmsr
    dec ebx
    jnz more
    over: pop rdx
    pop rcx
    pop rax
    iretq
    align 8
    nmis: dq 0
"""
HANDLERS = {PING: "ping", PONG: "pong", HIGH: "high", STOP: "stop"}


class Machine:
    """vCPUs with their local APICs, each on a thread, until all have halted with interrupts off."""

    def __init__(self, text: str, cpus: int) -> None:
        self.cpus = cpus
        self.lock = Lock("board", Order.BOARD)
        self.clock = GuestClock(read_tsc, tsc_hz(), self.lock)
        self.bus = ApicBus(self.lock)
        self.apics = [LocalApic(i, self.bus, self.clock, lambda: 0, bsp=i == 0) for i in range(cpus)]
        text = PRELUDE.replace("CPUS", str(cpus)) + text + END
        handlers = HANDLERS | ({2: "nmi"} if "nmi:" in text else {})
        self.guest = Tiny(
            translate(), text, handlers=handlers, cpus=cpus, apic=self.apics[0], other_apics=self.apics[1:]
        )
        self.guest.vm.set_tsc_offset(self.clock.tsc_offset)
        self.vcpus = [self.guest.vcpu, *self.guest.others]
        self._woken = [threading.Event() for _ in self.vcpus]
        for i, apic in enumerate(self.apics):
            apic.kick = lambda i=i: self.kick(i)  # type: ignore[misc]
        self._problems: list[str] = []

    def kick(self, index: int) -> None:
        self.vcpus[index].kick()
        self._woken[index].set()

    def accept(self, index: int, vector: int) -> None:
        with self.lock:
            self.apics[index].accept(Delivery.FIXED, vector, False)

    def state(self, index: int) -> StateBlock:
        st: StateBlock = self.vcpus[index].st  # type: ignore[attr-defined]
        return st

    def counts(self, kind: int) -> int:
        return sum(vcpu.counts[kind] for vcpu in self.vcpus)  # type: ignore[attr-defined]

    def run(self, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        threads = [threading.Thread(target=self._run, args=(i, end)) for i in range(self.cpus)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))
        hung = [i for i, thread in enumerate(threads) if thread.is_alive()]
        for i in hung:
            self._problems.append(f"vCPU {i} still runs, at {self.state(i).rip:#x}")
            self.vcpus[i].request_exit()
            self._woken[i].set()
        for thread in threads:
            thread.join()
        assert not self._problems

    def _run(self, index: int, end: float) -> None:
        vcpu, apic = self.vcpus[index], self.apics[index]
        while time.monotonic() < end:
            left = vcpu.run()
            if left.reason not in (ExitReason.HALTED, ExitReason.KICKED):
                self._problems.append(f"vCPU {index}: {left}")
                return
            if left.reason is ExitReason.HALTED:
                if not left.detail["interrupts"]:
                    return
                while not apic.pending() and time.monotonic() < end:
                    self._woken[index].wait(1)
                    self._woken[index].clear()

    def counter(self, name: str) -> int:
        return self.guest.load(name)

    def close(self) -> None:
        self.guest.close()
        for apic in self.apics:
            apic.close()
        self.clock.close()


Make = Callable[..., Machine]


@pytest.fixture
def make() -> Iterator[Make]:
    machines: list[Machine] = []

    def build(text: str, cpus: int = 2) -> Machine:
        machines.append(Machine(text, cpus))
        return machines[-1]

    yield build
    for machine in machines:
        machine.close()


ROUNDS = 1000
STOP_OTHERS = f"""
    mov edx, 0
    mov eax, 0xC0000 | {STOP}
    call send
    hlt
"""
SLEEP = """
    other: sti
    hlt
    jmp other
"""


@pytest.mark.parametrize("waiting", ["asleep", "spinning"])
def test_to_and_fro(make: Make, waiting: str) -> None:
    """Each is one interrupt; neither sending nor waking up takes Python."""
    wait = {"asleep": "cli\ncmp REGISTER, r12\njne DONE\nsti\nhlt\n", "spinning": "sti\npause\n"}[waiting]
    text = f"""
        again: mov r12, [rip + pongs]
        mov edx, 1
        mov eax, {PING}
        call send
        wait: {wait.replace("REGISTER", "[rip + pongs]").replace("DONE", "came")}
        cmp [rip + pongs], r12
        je wait
        came: sti
        cmp qword [rip + pongs], {ROUNDS}
        jb again
        cli
        {STOP_OTHERS}
        other: xor r14, r14
        xor r12, r12                ; of how many it has answered
        idle: {wait.replace("REGISTER", "r14").replace("DONE", "got")}
        cmp r14, r12
        je idle
        got: sti
        inc r12
        xor edx, edx
        mov eax, {PONG}
        call send
        jmp idle
    """
    machine = make(text)
    machine.run()
    assert (machine.counter("pings"), machine.counter("pongs")) == (ROUNDS, ROUNDS)
    for i in range(2):
        assert machine.state(i).n_ipi >= ROUNDS * 0.9
        assert not machine.state(i).posted1 and not machine.state(i).wakes
    assert machine.counts(Kind.MSR) < ROUNDS * 0.1 and machine.counts(Kind.HALT) < ROUNDS * 0.1


@pytest.mark.parametrize(
    ("destination", "command", "reached"),
    [
        (2, PING, 1),
        (7, PING, 0),
        (0, PING | 0xC0000, 3),
        (0, PING | 0x80000, 4),
        (0, PING | 0x40000, 1),
        (0xFFFFFFFF, PING, 4),
        (0xFFFFFFFF, PING | 0x800, 4),
        (0b1110, PING | 0x800, 3),
        (0b110010, PING | 0x800, 1),
        (0x10001, PING | 0x800, 0),
        (3, PING | 0x8000, 1),
    ],
)
def test_destinations(make: Make, destination: int, command: int, reached: int) -> None:
    """SDM 3, 11.6.2 and 11.12.10."""
    text = f"""
        mov ebx, 50
        again: mov r12, [rip + pings]
        add r12, {reached}
        mov edx, {destination}
        mov eax, {command}
        call send
        sti
        wait: pause
        cmp [rip + pings], r12
        jb wait
        cli
        dec ebx
        jnz again
        mov ecx, 0x830
        rdmsr
        mov r8d, eax
        mov r9d, edx
        {STOP_OTHERS}
        {SLEEP}
    """
    machine = make(text, 4)
    machine.run()
    assert machine.counter("pings") == 50 * reached and machine.counter("stopped") == 3
    assert (machine.guest.reg("r8"), machine.guest.reg("r9")) == (command, destination)
    assert machine.state(0).n_ipi >= 40 * reached


def test_the_most_urgent_first(make: Make) -> None:
    """Two that wait for STI; and one that interrupts the other's handler."""
    text = f"""
        mov ecx, 0x83F
        xor edx, edx
        mov eax, {PING}
        wrmsr
        mov eax, {HIGH}
        wrmsr
        xor r13, r13
        mov r11, [rip + highs]
        sti
        nop
        cli
        mov r10, [rip + pings]
        mov r8, [rip + highs]
        {STOP_OTHERS}
        other: hlt
    """
    machine = make(text, 1)
    machine.run()
    assert [machine.guest.reg(r) for r in ("r11", "r13", "r8", "r10")] == [0, 1, 1, 1]


def test_priority_holds_back(make: Make) -> None:
    text = f"""
        mov ecx, 0x808
        xor edx, edx
        mov eax, {PING | 0xF}
        wrmsr
        mov ecx, 0x83F
        mov eax, {PING}
        wrmsr
        sti
        mov ebx, 1000
        wait: dec ebx
        jnz wait
        mov r12, [rip + pings]
        mov ecx, 0x808
        rdmsr
        mov r11d, eax
        mov eax, {(PING & 0xF0) - 0x10}
        wrmsr
        jmp on
        on: mov r13, [rip + pings]
        cli
        {STOP_OTHERS}
        other: hlt
    """
    machine = make(text, 1)
    machine.run()
    assert [machine.guest.reg(r) for r in ("r11", "r12", "r13")] == [PING | 0xF, 0, 1]


def test_nmis(make: Make) -> None:
    """One waits while another is handled, however many are sent (SDM 3, 6.7.1)."""
    text = f"""
        mov ecx, 0x830
        mov ebp, 1
        mov eax, 0x4400
        xor edx, edx
        wrmsr
        mov ebx, 100
        wait: dec ebx
        jnz wait
        mov r12, [rip + nmis]
        {STOP_OTHERS}
        other: hlt
        {NMI}
    """
    machine = make(text, 1)
    machine.run()
    assert machine.guest.reg("r12") == 2


def test_two_nmis_at_once(make: Make) -> None:
    machine = make(f"mov r12, [rip + nmis]\n{STOP_OTHERS}\nother: hlt\n{NMI}", 1)
    for _ in range(3):
        with machine.lock:
            machine.apics[0].accept(Delivery.NMI, 0, False)
    machine.run()
    assert machine.guest.reg("r12") == 2


def test_devices_meanwhile(make: Make) -> None:
    """Interrupts of devices', from another thread, come between those of vCPUs, to one that sleeps."""
    text = f"""
        again: mov r12, [rip + pings]
        mov edx, 1
        mov eax, {PING}
        call send
        wait: pause
        cmp [rip + pings], r12
        je wait
        cmp qword [rip + highs], 200
        jb again
        {STOP_OTHERS}
        {SLEEP}
    """
    machine = make(text)
    over = threading.Event()

    def send() -> None:
        while not machine.counter("pings") and not over.is_set():
            time.sleep(0.001)  # its APIC is not enabled yet
        while not over.is_set():
            before = machine.counter("highs")
            machine.accept(1, HIGH)
            while machine.counter("highs") == before and not over.is_set():
                time.sleep(0.0002)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        machine.run()
    finally:
        over.set()
        sender.join()
    assert machine.counter("highs") >= 200 and machine.counter("stopped") == 1


def test_a_vcpu_that_python_has(make: Make) -> None:
    """It leaves guest code again and again while others interrupt it: nothing is lost, nothing comes twice."""
    text = f"""
        again: mov r12, [rip + pings]
        mov edx, 1
        mov eax, {PING}
        call send
        wait: pause
        cmp [rip + pings], r12
        je wait
        inc ebx
        cmp ebx, {ROUNDS}
        jb again
        {STOP_OTHERS}
        {SLEEP}
    """
    machine = make(text)
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            machine.vcpus[1].request_exit()
            time.sleep(0.0003)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        machine.run()
    finally:
        over.set()
        thread.join()
    assert machine.counter("pings") == ROUNDS


def test_frozen_asleep(make: Make) -> None:
    """A vCPU that sleeps after HLT stands still where it is, and wakes up all the same."""
    text = f"""
        sti
        wait: pause
        cmp qword [rip + pongs], 1
        jb wait
        mov r12, [rip + pings]
        mov edx, 1
        mov eax, {PING}
        call send
        came: pause
        cmp [rip + pings], r12
        je came
        cli
        {STOP_OTHERS}
        {SLEEP}
    """
    machine = make(text)
    runner = threading.Thread(target=machine.run)
    runner.start()
    end = time.monotonic() + 30
    while machine.vcpus[1].activity is not Activity.HALTED and time.monotonic() < end:
        time.sleep(0.001)
    for _ in range(50):
        machine.guest.vm.freeze()
        while not machine.vcpus[1].frozen():
            time.sleep(0.0001)
        machine.guest.vm.thaw()
    assert machine.vcpus[1].activity is Activity.HALTED
    machine.accept(0, PONG)
    runner.join()
    assert machine.counter("pings") == 1 and machine.counter("stopped") == 1
