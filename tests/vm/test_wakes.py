"""A processor that sleeps between interrupts is woken by each, whoever has the interrupt controllers.

The small guest is a kernel's idle loop: interrupts off, a look whether there is anything to do, STI and HLT, which let
nothing in between. For each turn its local APIC's timer expires, after a time that is another one each turn, and
its serial port has sent a byte. One that was lost leaves it asleep for good.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from skep.vm import Vm
from tests.boot.bzimage import write_guest
from tests.engine.engines import ALONE_ON_HARDWARE, ON_HARDWARE, WHOLE_ON_HARDWARE, need
from tests.vm.test_guests import IRQCHIPS

GUEST = """
        mov rsp, 0x80000
        lidt [rip + idt]
        lea rax, [rip + timer]
        mov edi, 0x60000 + 0x41 * 16
        call gate
        lea rax, [rip + sent]
        mov edi, 0x60000 + 0x42 * 16
        call gate
        mov edi, 0xfee00000
        mov dword [rdi + 0xf0], 0x1ff
        mov dword [rdi + 0x350], 0x10000        ; no 8259s
        mov dword [rdi + 0x3e0], 0xb            ; a nanosecond a count
        mov dword [rdi + 0x320], 0x41
        mov esi, 0xfec00000
        mov dword [rsi], 0x18                   ; pin 4
        mov dword [rsi + 0x10], 0x42
        mov dword [rsi], 0x19
        mov dword [rsi + 0x10], 0
        mov dx, 0x3f9
        mov al, 2                               ; when the transmitter is empty
        out dx, al
        mov dx, 0x3fc
        mov al, 8                               ; OUT2: its wire is connected
        out dx, al
        mov rbx, 0x70000
        mov r9d, 12345
turn:   cli
        mov dword [rbx + 16], 0
        mov dword [rbx + 20], 0
        imul r9d, r9d, 1103515245
        add r9d, 12345
        mov eax, r9d
        shr eax, 14
        inc eax
        mov [rdi + 0x380], eax                  ; up to 262 us
        test r9d, 0x2000
        jne look
        mov dx, 0x3f8
        mov al, '.'
        out dx, al
look:   cmp dword [rbx + 16], 0                 ; the timer, whose time is mostly longer
        jne done
        sti
asleep: hlt
        cli
        jmp look
done:   test r9d, 0x2000
        jne count
        cmp dword [rbx + 20], 0
        jne count
        sti
        hlt
        cli
        jmp done
count:  inc qword [rbx]
        jmp turn

gate:   mov [rdi], ax
        mov word [rdi + 2], 0x10
        mov word [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], ax
        shr rax, 16
        mov [rdi + 8], eax
        ret

timer:  inc dword [rbx + 16]
        jmp end
sent:   push rax
        push rdx
        mov dx, 0x3fa
        in al, dx                               ; which ends its request
        inc dword [rbx + 20]
        pop rdx
        pop rax
end:    push rax
        mov rax, [rsp + 8]
        cmp byte [rax], 0xf4                    ; before the HLT, which was let in by STI's shadow
        jne out
        inc qword [rsp + 8]
        inc dword [rbx + 8]
out:    mov dword [rdi + 0xb0], 0
        pop rax
        iretq

idt:    dw 0xfff
        dq 0x60000
"""
MAILBOX = 0x70000
TURNS = 2000
PATIENCE = 20.0
"""Seconds without a turn; only a failing test waits that long."""


@pytest.mark.parametrize(
    "how",
    ["translate", "kvm", "kvm alone", "kvm whole", ON_HARDWARE, WHOLE_ON_HARDWARE, ALONE_ON_HARDWARE],
)
def test_no_wake_up_is_lost(tmp_path: Path, how: str) -> None:
    engine, *more = how.split()
    need(engine)
    write_guest(tmp_path / "vmlinuz", GUEST)
    config = IRQCHIPS.get(" ".join(more), {})
    with Vm(kernel=tmp_path / "vmlinuz", memory="64M", engine=engine, config=config) as vm:
        vm.start()
        memory = vm.board.memory
        before, end = -1, 0.0
        while (turns := memory.load_u64(MAILBOX)) < TURNS:
            if turns != before:
                before, end = turns, time.monotonic() + PATIENCE
            assert time.monotonic() < end, f"asleep after {turns} turns"
            time.sleep(0.001)
            vm._processors[0].kick()  # for nothing, at any moment
        early = memory.load_u32(MAILBOX + 8)
        assert early == 0 or "hardware" in how, f"STI let {early} interrupts in before HLT"
