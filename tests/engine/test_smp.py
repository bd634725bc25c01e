"""Several vCPUs of one VM: atomic instructions, the order of memory, code that one changes while others run it, and
stopping them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import pytest

from skep.engine.contract import Vcpu
from skep.engine.translate import TranslateEngine
from skep.engine.translate.vcpu import TranslateVcpu
from tests.engine.tiny import GDT, Tiny

CPUS = 4


def together(text: str, cpus: int = CPUS, timeout: float = 60) -> Tiny:
    guest = Tiny(TranslateEngine(), text, cpus=cpus)
    guest.run_together(timeout)
    return guest


ADD_ONE = {
    "inc": "lock inc qword [rbx]",
    "xadd": "mov eax, 1\nlock xadd [rbx], rax",
    "cmpxchg": "mov rax, [rbx]\nretry: lea rdx, [rax + 1]\nlock cmpxchg [rbx], rdx\njne retry",
    "cmpxchg16b": "mov rsi, rbx\nmov rax, [rsi]\nmov rdx, [rsi + 8]\nretry: lea rbx, [rax + 1]\nmov rcx, rdx\n"
    "lock cmpxchg16b [rsi]\njne retry\nmov rbx, rsi",
    "xchg": "take: mov eax, 1\nxchg [rbx + 8], eax\ntest eax, eax\nje taken\npause\njmp take\n"
    "taken: inc qword [rbx]\nmov dword [rbx + 8], 0",
    "bts": "take: lock bts dword [rbx + 8], 3\njnc taken\npause\njmp take\ntaken: inc qword [rbx]\n"
    "lock btr dword [rbx + 8], 3",
    "bts by register": "mov eax, 67\ntake: lock bts dword [rbx], eax\njnc taken\npause\njmp take\n"
    "taken: inc qword [rbx]\nlock btr dword [rbx], eax",
}


@pytest.mark.parametrize("how", ADD_ONE)
@pytest.mark.parametrize("place", ["aligned", "on two pages", "beside code"])
def test_atomic_instructions(how: str, place: str) -> None:
    """SDM 3, 9.1: locked instructions are atomic wherever their operand lies."""
    if place == "on two pages" and how == "cmpxchg16b":
        pytest.skip("must be aligned")
    rounds = {"aligned": 20000, "on two pages": 200, "beside code": 300}[place]  # some hosts slow split locks down
    where = {"aligned": "0x180000", "on two pages": "0x180ffc", "beside code": "rip + data"}[place]
    text = f"""
        start: lea rbx, [{where}]
        mov r15d, {rounds}
        again: {ADD_ONE[how]}
        dec r15d
        jne again
        hlt
        align 16
        data: dq 0, 0
    """
    guest = together(text)
    with guest:
        assert guest.load("data" if place == "beside code" else int(where, 0)) == rounds * CPUS


def test_an_accessed_bit_is_set_without_losing_what_changes_beside_it() -> None:
    """SDM 3, 9.1.2.1: a segment load updates its descriptor as one locked operation."""
    text = """
        start: lea rbx, [GDT + 0x1D]
        test edi, edi
        jnz toggle
        mov r15d, 4000
        again: lock and byte [rbx], 0xFE
        mov eax, 0x18
        mov ds, eax
        dec r15d
        jnz again
        mov qword [rip + over], 1
        hlt
        toggle: mov dl, [rbx]
        and dl, 0x20
        more: lock xor byte [rbx], 0x20         ; the privilege level
        xor dl, 0x20
        mov ecx, 50
        wait: dec ecx
        jnz wait
        mov al, [rbx]
        and al, 0x20
        cmp al, dl
        je kept
        inc qword [rip + lost]
        mov dl, al
        kept: cmp qword [rip + over], 0
        je more
        hlt
        align 8
        over: dq 0
        lost: dq 0
    """
    with together(text, 2) as guest:
        assert guest.load("lost") == 0 and guest.load(GDT + 0x18) & 1 << 40


WATCHED = {"watched": (0x180000, 2), "watched on two pages": (0x180FFC, 3)}
"""Where a data breakpoint lies, and DR7's length field: 8 bytes, 4 bytes."""
IN_CODE = {"in code": "align 16\nspace 14", "in code on two pages": "align 4096\nspace 4090"}
"""What is before the instructions whose immediates are the operands."""


@pytest.mark.parametrize("how", ADD_ONE)
@pytest.mark.parametrize("place", [*WATCHED, *IN_CODE])
def test_atomic_instructions_that_machine_code_does_not_finish(how: str, place: str) -> None:
    """Operands with a breakpoint on them, and operands that are instructions, are Python's."""
    if "two pages" in place and how == "cmpxchg16b":
        pytest.skip("must be aligned")
    rounds = 60
    add = ADD_ONE[how].replace("rbx + 8", "rbx + 10").replace("eax, 67", "eax, 83")
    where = "rip + data" if place in IN_CODE else hex(WATCHED[place][0])
    text = f"""
        start: lea rbx, [{where}]
        mov r12d, {rounds}
        again: call changes
        {add}
        dec r12d
        jne again
        hlt
        debug: iretq
        {IN_CODE.get(place, "")}
        changes: db 0x49, 0xbd ; mov r13, 0
        data: dq 0
        db 0x49, 0xbe ; mov r14, 0
        dq 0
        ret
    """
    with Tiny(TranslateEngine(), text, cpus=CPUS, handlers={1: "debug"}) as guest:
        if place in WATCHED:
            at, length = WATCHED[place]
            for vcpu in guest.others:  # the first does it in machine code
                vcpu.set_state({"dr0": at, "dr7": 0x402 | 1 << 16 | length << 18})
        guest.run_together(60)
        assert guest.exception is None
        assert guest.load("data" if place in IN_CODE else WATCHED[place][0]) == rounds * CPUS


def test_stores_are_seen_in_order() -> None:
    """SDM 3, 9.2.3.2: what was stored first is seen first."""
    text = """
        start: xor r15d, r15d
        test edi, edi
        jne reader
        mov ecx, 200000
        writer: inc r15
        mov [0x180000], r15
        mov [0x181000], r15
        dec ecx
        jne writer
        hlt
        reader: mov rax, [0x181000]
        mov rdx, [0x180000]
        cmp rdx, rax
        jb wrong
        cmp rax, 200000
        jb reader
        hlt
        wrong: mov dword [0x182000], 1
        hlt
    """
    with together(text) as guest:
        assert guest.load(0x182000) == 0


def test_a_fence_orders_a_store_before_a_load() -> None:
    """SDM 3, 9.2.3.4 and 9.2.5: with MFENCE or a locked instruction between, not both of two vCPUs miss the other."""
    text = """
        start: xor r15d, r15d
        mov r14, rdi
        xor r14, 1
        again: inc r15
        ; both meet, then each stores to its own word and loads the other's
        lock inc dword [0x183000]
        lea rax, [r15 + r15]
        meet: pause
        cmp [0x183000], eax
        jb meet
        mov [0x180000 + rdi * 8], r15
        mfence
        mov rax, [0x180000 + r14 * 8]
        mov [0x181000 + rdi * 8], rax
        lock inc dword [0x183008]
        lea rax, [r15 + r15]
        met: pause
        cmp [0x183008], eax
        jb met
        test edi, edi
        jne next
        cmp [0x181000], r15
        je next
        cmp [0x181008], r15
        je next
        inc dword [0x182000]
        next: lock inc dword [0x183010]
        lea rax, [r15 + r15]
        all: pause
        cmp [0x183010], eax
        jb all
        cmp r15, 3000
        jb again
        hlt
    """
    with together(text, 2) as guest:
        assert guest.load(0x182000) == 0


@pytest.mark.parametrize("data_too", [False, True])
def test_code_changed_by_another(data_too: bool) -> None:
    """SDM 3, 9.1.3, cross-modifying code: who was told of new code and has serialized runs the new code."""
    text = f"""
        start: xor r15d, r15d
        test edi, edi
        jne runner
        writer: inc r15d
        mov [rip + patch + 1], r15d
        {"mov [rip + beside], r15d" if data_too else ""}
        mov [0x180000], r15d
        mov ecx, 1
        waits: mov eax, [0x181000 + rcx * 4]
        cmp eax, r15d
        jb pauses
        inc ecx
        cmp ecx, {CPUS}
        jb waits
        cmp r15d, 150
        jb writer
        hlt
        pauses: pause
        jmp waits
        runner: call function
        mov r14d, [0x180000]
        cmp r14d, r15d
        je runner
        cpuid
        call function
        cmp eax, r14d
        jne wrong
        mov r15d, r14d
        mov [0x181000 + rdi * 4], r15d
        cmp r15d, 150
        jb runner
        hlt
        wrong: inc dword [0x182000]
        mov dword [0x181000 + rdi * 4], -1
        hlt
        align 64
        function: nop
        nop
        nop
        patch: mov eax, 0
        ret
        beside: dd 0
    """
    with together(text) as guest:
        assert guest.load(0x182000) == 0


def test_a_breakpoint_that_comes_and_goes() -> None:
    """As Linux patches code that others run: INT3 in an instruction's place, then the instruction again."""
    text = """
        start: test edi, edi
        jne runner
        mov ecx, 150
        writer: mov byte [rip + patch], 0xcc
        mov edx, 50
        wait1: pause
        dec edx
        jne wait1
        mov byte [rip + patch], 0x66
        mov edx, 50
        wait2: pause
        dec edx
        jne wait2
        dec ecx
        jg writer
        cmp dword [0x181008], 20        ; they have all the time they need to meet it
        jb writer
        mov dword [0x181000], 1
        hlt
        runner: inc r14
        patch: xchg ax, ax
        cmp dword [0x181000], 0
        je runner
        hlt
        hit: inc r15
        lock inc dword [0x181008]
        mov qword [rsp], offset patch + 2
        iretq
    """.replace("offset patch + 2", "{after}")
    with Tiny(TranslateEngine(), text.replace("{after}", "0")) as guest:
        after = guest.program["patch"] + 2
    with Tiny(TranslateEngine(), text.replace("{after}", str(after)), cpus=CPUS, handlers={3: "hit"}) as guest:
        guest.run_together(60)
        assert guest.exception is None
        hits = 0
        for vcpu in guest.others:
            state = vcpu.get_state()
            assert 0x100000 < state["rip"] < 0x200000, hex(state["rip"])
            hits += state["r15"]
        assert hits >= 20


def test_pages_that_are_code_and_data_by_turns() -> None:
    """One vCPU writes routines into fresh pages, the others call them at once."""
    text = """
        start: mov rbx, 0x140000
        xor r15d, r15d
        test edi, edi
        jne runner
        writer: inc r15d
        mov byte [rbx], 0xb8
        mov [rbx + 1], r15d
        mov byte [rbx + 5], 0xc3
        mov [0x180000], rbx
        waits: mov eax, [0x182000]
        lea ecx, [r15 + r15 * 2]
        cmp eax, ecx
        jae go
        pause
        jmp waits
        go: add rbx, 0x100
        cmp rbx, 0x160000
        jb writer
        mov rbx, 0x140000
        cmp r15d, 200
        jb writer
        mov qword [0x180000], 1
        hlt
        runner: mov rax, [0x180000]
        cmp rax, 1
        je over
        cmp rax, r14
        jne called
        pause
        jmp runner
        called: mov r14, rax
        inc r15d
        cpuid
        call r14
        cmp eax, r15d
        je right
        inc dword [0x183000]
        right: lock inc dword [0x182000]
        jmp runner
        over: hlt
    """
    with together(text) as guest:
        assert guest.load(0x183000) == 0
        assert guest.load(0x182000) >= 600


def test_stopped_ten_thousand_times() -> None:
    """Everybody stops at once, nothing is lost, and nobody runs meanwhile."""
    text = """
        start: mov rcx, rdi
        shl rcx, 12
        again: inc qword [0x140000 + rcx]
        lock inc qword [0x180000]
        cmp dword [0x181000], 0
        je again
        hlt
    """
    with Tiny(TranslateEngine(), text, cpus=CPUS) as guest:
        vcpu = guest.vcpu
        assert isinstance(vcpu, TranslateVcpu)
        world = vcpu.cache.world
        moved = 0
        ran = threading.Thread(target=guest.run_together, args=(120,))
        ran.start()
        try:
            last = 0
            for _ in range(10000):
                with world.stopped():
                    now = guest.load(0x180000)
                    assert now == guest.load(0x180000)
                    assert now >= last
                moved += now > last
                last = now
        finally:
            guest.memory.store_u32(0x181000, 1)
            ran.join()
        assert moved > 10
        alone = sum(guest.load(0x140000 + (i << 12)) for i in range(CPUS))
        assert alone == guest.load(0x180000)


def until_frozen(vcpus: Iterable[Vcpu]) -> None:
    end = time.monotonic() + 30
    for vcpu in vcpus:
        while not vcpu.frozen():
            assert time.monotonic() < end
            time.sleep(0.0001)


def test_the_state_of_frozen_vcpus() -> None:
    """It is whole, and the same until the thaw; what runs has lost nothing."""
    text = """
        start: xor r12d, r12d
        xor ebx, ebx
        lea rbp, [rdi * 8 + 0x180000]
        again: inc r12
        movq xmm7, r12
        mov r10, r12
        mov [rbp], r12
        inc rbx
        test r12d, 0xfff
        jne over
        in al, 0x80
        over: cmp dword [0x181000], 0
        je again
        hlt
    """
    with Tiny(TranslateEngine(), text, cpus=CPUS) as guest:
        everyone = [guest.vcpu, *guest.others]
        ran = threading.Thread(target=guest.run_together, args=(120,))
        ran.start()
        try:
            started = time.monotonic() + 30
            while not all(guest.load(0x180000 + 8 * i) for i in range(CPUS)):
                assert time.monotonic() < started
            last = [0] * CPUS
            for _ in range(300):
                guest.vm.freeze()
                guest.vm.freeze()
                until_frozen(everyone)
                states = [vcpu.get_state() for vcpu in everyone]
                for i, state in enumerate(states):
                    count = state["r12"]
                    assert last[i] <= count and guest.load(0x180000 + 8 * i) in (count, count - 1)
                    assert state["rbx"] in (count, count - 1) and state["r10"] in (count, count - 1)
                    xmm7 = int.from_bytes(state["xsave"][160 + 16 * 7 :][:16], "little")
                    assert xmm7 in (count, count - 1) and state["rbp"] == 0x180000 + 8 * i
                    assert guest.program["again"] <= state["rip"] <= guest.program["over"] + 16
                    last[i] = count
                assert [vcpu.get_state() for vcpu in everyone] == states
                guest.vm.thaw()
                assert not any(vcpu.frozen() for vcpu in everyone)
        finally:
            guest.vm.thaw()
            guest.memory.store_u32(0x181000, 1)
            ran.join()
        assert all(vcpu.get_state()["rbx"] == vcpu.get_state()["r12"] for vcpu in everyone)
        assert sum(last) > 1000


def test_an_interrupt_that_was_acknowledged_before_the_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no longer the interrupt controller's, so it must be in the state."""
    text = "start: sti\nagain: jmp again\nhandler: hlt"
    with Tiny(TranslateEngine(), text, handlers={0x40: "handler"}) as guest:
        acknowledge = guest.interrupts.acknowledge

        def and_freeze() -> int | None:
            vector = acknowledge()
            guest.vm.freeze()
            return vector

        monkeypatch.setattr(guest.interrupts, "acknowledge", and_freeze)
        guest.interrupts.raise_vector(0x40)
        ran = threading.Thread(target=guest.run)
        ran.start()
        try:
            until_frozen([guest.vcpu])
            assert guest.reg("rip") == guest.program["handler"] and not guest.state["rflags"] & 0x200
        finally:
            guest.vm.thaw()
            ran.join()


def test_an_instruction_that_python_finishes_is_finished_before_the_freeze() -> None:
    """A device was asked already, and it is not asked twice."""
    text = "start: mov eax, 5\nmov ebx, MMIO\nadd [rbx], eax\nagain: cmp dword [0x181000], 0\nje again\nhlt"
    with Tiny(TranslateEngine(), text) as guest:
        read = guest.io.mmio_read

        def freeze_and_read(gpa: int, size: int) -> int:
            guest.vm.freeze()
            return read(gpa, size)

        guest.io.mmio_read = freeze_and_read  # type: ignore[method-assign]
        ran = threading.Thread(target=guest.run)
        ran.start()
        try:
            until_frozen([guest.vcpu])
            assert [kind for kind, *_ in guest.io.log] == ["read", "write"]
            assert int.from_bytes(guest.io.device[:4], "little") == 5
            assert guest.reg("rip") == guest.program["again"]
        finally:
            guest.vm.thaw()
            guest.memory.store_u32(0x181000, 1)
            ran.join()
