"""Interrupts: when they come, when they must not come yet, and that none is lost; how a running vCPU is called back."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable

import pytest

from skep.engine.contract import ExitReason
from tests.engine.engines import EVERYWHERE, EXACTLY, Machines
from tests.engine.tiny import IST, RSP0, STACK, USER64, Tiny

V = 0x50
"""The vector that tests raise."""


def at_end(guest: Tiny, timeout: float = 10.0) -> None:
    guest.run(timeout)
    assert guest.exception is None, guest.exception


def later(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


ENDLESS = [
    "again: jmp again",
    "again: nop\njmp again",
    "again: inc rax\njne again\njmp again",
    "again: lea rbx, [rip + again]\njmp rbx",
    "again: call f\njmp again\nf: ret",
    "again: mov ecx, 3\nc: loop c\njmp again",
    "again: mov rax, [rip + again]\ntest rax, rax\njnz again",
    "again: mov ecx, 100000\nmov edi, 0x180000\nrep stosb\njmp again",
    "again: pushfq\npopfq\njmp again",
    "again: mov rax, cr0\njmp again",
    "again: cpuid\njmp again",
    "again: in al, 0x80\njmp again",
]


class TestEndlessLoops:
    @EVERYWHERE
    @pytest.mark.parametrize("loop", ENDLESS)
    def test_an_interrupt_gets_in(self, boot: Machines, loop: str) -> None:
        guest = boot(f"start: sti\n{loop}\nhandler: cli\nhlt", handlers={V: "handler"})
        timer = later(0.05, lambda: guest.interrupts.raise_vector(V))
        at_end(guest)
        timer.join()
        rip, cs, rflags = struct.unpack("<3Q", guest.memory.read(guest.reg("rsp"), 24))
        assert guest.program["again"] <= rip < guest.program["handler"]
        assert cs == 0x10 and rflags & 0x200

    @EVERYWHERE
    @pytest.mark.parametrize("loop", ENDLESS)
    def test_request_exit_gets_it_out(self, boot: Machines, loop: str) -> None:
        """With interrupts off as well; and it goes on afterwards."""
        guest = boot(loop)
        for _ in range(3):
            timer = later(0.02, guest.vcpu.request_exit)
            left = guest.vcpu.run()
            timer.join()
            assert left.reason is ExitReason.KICKED
            assert guest.program["again"] <= guest.reg("rip") < guest.program.address + len(guest.program.code)

    @EVERYWHERE
    def test_from_ring_3(self, boot: Machines) -> None:
        guest = boot("again: jmp again\nhandler: cli\nhlt", user=True, handlers={V: "handler"})
        guest.set(rflags=0x202)
        timer = later(0.05, lambda: guest.interrupts.raise_vector(V))
        at_end(guest)
        timer.join()
        assert guest.reg("rsp") == RSP0 - 40
        rip, cs = struct.unpack("<2Q", guest.memory.read(RSP0 - 40, 16))
        assert (rip, cs) == (guest.program["again"], USER64)

    @EXACTLY
    def test_thousands_of_interrupts_change_nothing(self, boot: Machines) -> None:
        """A computation that uses flags and all registers comes to the same result however often it is interrupted."""
        text = """
            start: sti
            mov ecx, 10000000
            xor eax, eax
            mov r9, 0x9e3779b97f4a7c15
            again: add rax, r9
            adc r10, rcx
            rol rax, 7
            xor r11, rax
            sbb r12, r10
            dec rcx
            jnz again
            cli
            hlt
            handler: push rax
            inc qword [rip + count]
            xor eax, eax
            pop rax
            iretq
            count: dq 0
        """

        def result(guest: Tiny) -> list[int]:
            at_end(guest, 30)
            return [guest.reg(r) for r in ("rax", "r9", "r10", "r11", "r12", "rsp")]

        quiet, interrupts, deadline = result(boot(text)), 0, time.monotonic() + 60
        while interrupts < 2000:
            guest, stop = boot(text, handlers={V: "handler"}), threading.Event()

            def disturb(guest: Tiny = guest, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    if not guest.interrupts.pending():  # else more come than are taken, where that costs much
                        guest.interrupts.raise_vector(V)
                    time.sleep(0.0001)

            thread = threading.Thread(target=disturb)
            thread.start()
            try:
                disturbed = result(guest)
            finally:
                stop.set()
                thread.join()
            assert disturbed == quiet
            interrupts += guest.load("count")
            assert time.monotonic() < deadline, interrupts


class TestExits:
    @EVERYWHERE
    def test_a_request_before_the_run_is_not_lost(self, boot: Machines) -> None:
        guest = boot("again: jmp again")
        guest.vcpu.request_exit()
        assert guest.vcpu.run().reason is ExitReason.KICKED
        assert guest.reg("rip") == guest.program["again"]

    @EXACTLY
    def test_a_kick_alone_disturbs_nothing(self, boot: Machines) -> None:
        guest = boot("mov ecx, 20000000\nagain: dec ecx\njnz again\nhlt")
        timers = [later(0.002 * i, guest.vcpu.kick) for i in range(1, 10)]
        at_end(guest)
        for timer in timers:
            timer.join()

    @EVERYWHERE
    def test_no_wake_up_is_lost(self, boot: Machines) -> None:
        """CLI, look, STI, HLT: an interrupt that comes anywhere between wakes the HLT. 500 times, by another thread."""
        text = """
            start: cli
            mov rax, [rip + count]
            cmp rax, 500
            je done
            out 0xf4, eax
            sti
            hlt
            jmp start
            done: mov ebx, 1
            hlt
            handler: inc qword [rip + count]
            iretq
            count: dq 0
        """
        guest = boot(text, handlers={V: "handler"})
        wanted, stop = threading.Semaphore(0), threading.Event()
        guest.io.on_write = lambda port, size, value: wanted.release()

        def device() -> None:
            while wanted.acquire() and not stop.is_set():
                guest.interrupts.raise_vector(V)

        thread = threading.Thread(target=device)
        thread.start()
        deadline = time.monotonic() + 20
        try:
            while not guest.reg("rbx"):
                assert time.monotonic() < deadline, f"asleep at {guest.load('count')}"
                left = guest.vcpu.run()
                assert left.reason is ExitReason.HALTED
                while left.detail["interrupts"] and not guest.interrupts.pending():
                    assert time.monotonic() < deadline
                    time.sleep(0)
        finally:
            stop.set()
            wanted.release()
            thread.join()
        assert guest.load("count") == 500


@EVERYWHERE
@pytest.mark.parametrize("instruction", ["rdmsr", "wrmsr", "insb"])
def test_one_that_comes_with_an_exception_is_not_lost(boot: Machines, instruction: str) -> None:
    """Of a local APIC's MSR that is refused, or of a port's byte that goes where no page is. The exception is first;
    the interrupt waits until its handler has interrupts on again."""
    text = f"""
        start: sti
        mov ecx, 0x810
        mov edx, 0x60
        mov edi, 0xdead0000
        here: {instruction}
        behind:
        lost: test ebx, ebx
        je lost
        cli
        hlt
        fault: out 0xf4, al
        add rsp, 8
        add qword [rsp], behind - here
        iretq
        handler: inc ebx
        mov rsi, [rsp + 16]
        iretq
    """
    guest = boot(text, handlers={13: "fault", 14: "fault", V: "handler"})
    read, come = guest.interrupts.read_msr, threading.Event()

    def comes(*_: int) -> None:
        if not come.is_set():
            come.set()
            guest.interrupts.raise_vector(V)

    def refused(index: int, value: int = 0) -> int | None:
        if index == 0x810:
            comes()
        return read(index)

    guest.interrupts.read_msr = guest.interrupts.write_msr = refused  # type: ignore[method-assign,assignment]
    guest.io.on_read = comes
    guest.io.on_write = comes  # of an engine that looks for the page first, and asks no port
    at_end(guest)
    assert guest.reg("rbx") == 1 and guest.reg("rsi") & 0x200


def pending_program(body: str) -> str:
    """OUT to 0xf4 raises the interrupt, while IF is off; the handler stores where it came."""
    return f"start: cli\nout 0xf4, al\n{body}\ncli\nhlt\nhandler: mov rbx, [rsp]\ncli\nhlt"


@EXACTLY
class TestShadows:
    def came_at(self, boot: Machines, body: str) -> tuple[Tiny, int]:
        guest = boot(pending_program(body), handlers={V: "handler"})
        guest.io.on_write = lambda port, size, value: guest.interrupts.raise_vector(V)
        at_end(guest)
        return guest, guest.reg("rbx")

    def test_sti_holds_for_one_instruction(self, boot: Machines) -> None:
        guest, rip = self.came_at(boot, "sti\nnop\nhere: nop\nnop")
        assert rip == guest.program["here"]

    def test_sti_cli_lets_nothing_in(self, boot: Machines) -> None:
        _, rip = self.came_at(boot, "sti\ncli\nsti\ncli\nnop")
        assert rip == 0

    def test_sti_hlt(self, boot: Machines) -> None:
        guest, rip = self.came_at(boot, "sti\nhlt\nhere: nop")
        assert rip == guest.program["here"]

    def test_a_second_sti_has_no_shadow(self, boot: Machines) -> None:
        guest, rip = self.came_at(boot, "sti\nsti\nhere: nop\nnop")
        assert rip == guest.program["here"]

    def test_sti_before_a_branch(self, boot: Machines) -> None:
        guest, rip = self.came_at(boot, "sti\njmp here\nnop\nhere: nop\nnop")
        assert rip == guest.program["here"]

    def test_sti_before_a_fault(self, boot: Machines) -> None:
        """The shadow ends with the instruction, even one that faults: its handler (gate: IF off) runs first."""
        guest = boot(pending_program("sti\nud: ud2"), handlers={V: "handler"})
        guest.io.on_write = lambda port, size, value: guest.interrupts.raise_vector(V)
        guest.run()
        frame = guest.exception
        assert frame is not None and (frame.vector, frame.rip) == (6, guest.program["ud"])

    def test_popf_has_none(self, boot: Machines) -> None:
        guest, rip = self.came_at(boot, "push 0x202\npopfq\nhere: nop\nnop")
        assert rip == guest.program["here"]

    def test_iretq_has_none(self, boot: Machines) -> None:
        text = (
            "lea rcx, [rip + here]\npush 0x18\npush STACK\npush 0x202\npush 0x10\npush rcx\niretq\nnop\nhere: nop\nnop"
        )
        guest, rip = self.came_at(boot, text)
        assert rip == guest.program["here"]

    def test_mov_ss_holds_for_one_instruction(self, boot: Machines) -> None:
        """The interrupt arrives while MOV SS reads its operand from a device."""
        text = """
            start: mov eax, MMIO
            sti
            nop
            mov ss, [rax]
            mov rsp, STACK - 0x800
            here: nop
            nop
            cli
            hlt
            handler: mov rbx, [rsp]
            mov rcx, rsp
            cli
            hlt
        """
        guest = boot(text, handlers={V: "handler"})
        guest.io.device[:2] = struct.pack("<H", 0x18)
        read = guest.io.mmio_read

        def mmio_read(gpa: int, size: int) -> int:
            guest.interrupts.raise_vector(V)
            return read(gpa, size)

        guest.io.mmio_read = mmio_read  # type: ignore[method-assign]
        at_end(guest)
        assert guest.reg("rbx") == guest.program["here"]
        assert guest.reg("rcx") == STACK - 0x800 - 40

    def test_mov_ss_holds_a_single_step_back(self, boot: Machines) -> None:
        text = """
            start: mov eax, 0x18
            push 0x102
            popfq
            mov ss, ax
            nop
            here: nop
            handler: mov rbx, [rsp]
            hlt
        """
        guest = boot(text, handlers={1: "handler"})
        at_end(guest)
        assert guest.reg("rbx") == guest.program["here"]


class TestPriorities:
    @EXACTLY
    def test_cr8_masks_and_unmasks(self, boot: Machines) -> None:
        text = """
            start: mov eax, 6
            mov cr8, rax
            mov rdx, cr8
            sti
            out 0xf4, al
            nop
            nop
            mov ecx, 1
            xor eax, eax
            mov cr8, rax
            here: nop
            nop
            cli
            hlt
            handler: mov rbx, [rsp]
            cli
            hlt
        """
        guest = boot(text, handlers={V: "handler"})
        guest.io.on_write = lambda port, size, value: guest.interrupts.raise_vector(V)
        at_end(guest)
        assert (guest.reg("rdx"), guest.reg("rcx")) == (6, 1)
        assert guest.reg("rbx") == guest.program["here"]

    @EXACTLY
    def test_several_one_after_the_other(self, boot: Machines) -> None:
        text = "start: cli\nout 0xf4, al\nsti\nnop\nnop\ncli\nhlt\nh1: add ebx, 1\niretq\nh2: add ebx, 16\niretq"
        guest = boot(text, handlers={V: "h1", V + 16: "h2"})

        def raise_three(port: int, size: int, value: int) -> None:
            for vector in (V, V + 16, V):
                guest.interrupts.raise_vector(vector)

        guest.io.on_write = raise_three
        at_end(guest)
        assert guest.reg("rbx") == 18

    @EVERYWHERE
    def test_an_interrupt_that_went_away(self, boot: Machines) -> None:
        """acknowledge() may find nothing any more; the guest notices nothing."""
        guest = boot("start: cli\nout 0xf4, al\nsti\nnop\nmov ebx, 5\ncli\nhlt\nhandler: ud2", handlers={V: "handler"})
        guest.io.on_write = lambda port, size, value: guest.interrupts.raise_vector(V)
        guest.interrupts.acknowledge = guest.interrupts.clear  # type: ignore[method-assign]
        at_end(guest)
        assert guest.reg("rbx") == 5


class TestNmi:
    @EVERYWHERE
    def test_with_interrupts_off_and_on_its_own_stack(self, boot: Machines) -> None:
        guest = boot("again: jmp again\nhandler: mov rbx, rsp\nhlt", handlers={2: "handler"}, ist={2: 2})
        timer = later(0.05, guest.interrupts.raise_nmi)
        at_end(guest)
        timer.join()
        assert guest.reg("rbx") == IST[1] - 40
        (rip,) = struct.unpack("<Q", guest.memory.read(IST[1] - 40, 8))
        assert rip == guest.program["again"]

    @EXACTLY
    def test_a_second_waits_for_iretq(self, boot: Machines) -> None:
        """Between NMI and IRET one more NMI is remembered, and comes right after it."""
        text = """
            start: out 0xf4, al
            nop
            nop
            hlt
            handler: inc ebx
            cmp ebx, 1
            jne second
            out 0xf4, al
            mov ecx, 100000
            wait_: dec ecx
            jnz wait_
            mov edx, ebx
            second: iretq
        """
        guest = boot(text, handlers={2: "handler"})
        guest.io.on_write = lambda port, size, value: guest.interrupts.raise_nmi()
        at_end(guest)
        assert (guest.reg("rdx"), guest.reg("rbx")) == (1, 2)

    @EVERYWHERE
    def test_wakes_hlt_with_interrupts_off(self, boot: Machines) -> None:
        guest = boot("cli\nhlt\nmov ecx, 1\nhlt\nhandler: inc ebx\niretq", handlers={2: "handler"})
        assert guest.vcpu.run().reason is ExitReason.HALTED
        guest.interrupts.raise_nmi()
        assert guest.vcpu.run().reason is ExitReason.HALTED
        assert (guest.reg("rbx"), guest.reg("rcx")) == (1, 1)

    @EVERYWHERE
    def test_one_that_comes_right_after_the_question_is_not_lost(self, boot: Machines) -> None:
        guest = boot("start: sti\nout 0xf4, al\nagain: jmp again\nhandler: hlt", handlers={2: "handler"})
        asked = []
        take = guest.interrupts.take_nmi

        def late() -> bool:
            taken = take()
            if not asked:
                guest.interrupts.raise_nmi()
            asked.append(taken)
            return taken

        guest.interrupts.take_nmi = late  # type: ignore[method-assign]
        guest.io.on_write = lambda port, size, value: guest.vcpu.kick()
        at_end(guest, timeout=3)
        assert asked == [False, True]

    @EXACTLY
    def test_before_an_interrupt(self, boot: Machines) -> None:
        text = "start: cli\nout 0xf4, al\nsti\nnop\nnop\ncli\nhlt\n"
        text += "nmi: mov ecx, ebx\nor ebx, 1\niretq\nirq: shl ebx, 4\niretq"
        guest = boot(text, handlers={2: "nmi", V: "irq"})

        def both(port: int, size: int, value: int) -> None:
            guest.interrupts.raise_vector(V)
            guest.interrupts.raise_nmi()

        guest.io.on_write = both
        at_end(guest)
        assert (guest.reg("rbx"), guest.reg("rcx")) == (16, 0)
