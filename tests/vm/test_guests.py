"""Whole VMs with a small guest of real code, under each engine that this host has.

The guest is entered as a Linux kernel would be, and does what the first character of its command line says.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.vm import End, Step, Vm
from tests.boot.bzimage import LOAD, write_guest
from tests.chardev.test_chardev import wait_for
from tests.engine.engines import ON_HARDWARE, WHOLE_ON_HARDWARE, need

GUEST = """
        mov rsp, 0x80000
        mov r15d, [rsi + 0x228]         ; cmd_line_ptr
        lea rsi, [rip + hello]
        call print
        mov al, [r15]
        cmp al, 'l'
        jne does
        call letters
        inc r15
        mov al, [r15]
does:   cmp al, 'o'
        je off
        cmp al, 'r'
        je reboot
        cmp al, 't'
        je triple
        cmp al, 'h'
        je halt
        cmp al, 's'
        je spin
        cmp al, 'e'
        je echo
        mov r14d, 100
        cmp al, 'i'
        je interrupts
        mov r14d, -1
        cmp al, 'k'
        je interrupts
        cmp al, 'm'
        je memory
        cmp al, 'a'
        je another
        cmp al, 'n'
        je nmi
        cmp al, 'b'
        je all
        cmp al, '2'
        je both
        cmp al, 'w'
        je idle
        cmp al, 'z'
        je sleep
        cmp al, 'y'
        je nap
        hlt

off:    mov dx, 0x604
        mov ax, 0x3400
        out dx, ax
        jmp off

reboot: mov dx, 0xcf9
        mov al, 6
        out dx, al
        jmp reboot

triple: lidt [rip + no_idt]
        ud2

halt:   cli
        hlt
        jmp halt

idle:   sti
        hlt
        jmp idle

spin:   inc qword [0x70000]
        jmp spin

echo:   mov dx, 0x3fc
        mov al, 3
        out dx, al
again:  mov dx, 0x3fd
        in al, dx
        test al, 1
        je again
        mov dx, 0x3f8
        in al, dx
        cmp al, 'q'
        je off
        out dx, al
        jmp again

interrupts:                             ; so many ticks of the PIT, asleep between them
        lidt [rip + idt]
        mov rdi, 0x60000 + 0x20 * 16
        lea rax, [rip + tick]
        mov [rdi], ax
        mov word [rdi + 2], 0x10
        mov word [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], ax
        shr rax, 16
        mov [rdi + 8], eax
        lea rsi, [rip + ports]
next:   movzx edx, word [rsi]
        mov al, [rsi + 2]
        add rsi, 3
        out dx, al
        cmp dx, 0x40
        jne next
        mov al, [rsi + 2]               ; the count's high byte
        out dx, al
        xor ebx, ebx
wait:   sti
        hlt
        cmp ebx, r14d
        jb wait
        lea rsi, [rip + ticked]
        call print
        jmp off
nmi:                                    ; halted with interrupts off, which only an NMI ends
        lidt [rip + idt]
        lea rax, [rip + struck]
        mov rdi, 0x60000 + 2 * 16
        mov [rdi], ax
        mov word [rdi + 2], 0x10
        mov word [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], ax
        shr rax, 16
        mov [rdi + 8], eax
        lea rsi, [rip + hello]
        call print
        cli
        hlt
        jmp off
struck: lea rsi, [rip + ticked]
        call print
        iretq

tick:   push rax
        inc ebx
        inc qword [0x70000]
        mov al, 0x20
        out 0x20, al
        pop rax
        iretq

memory:                                 ; RAM above 4 GiB is not mapped by the loader: only what is below is touched
        mov rdi, 0x2000000
        mov ecx, 4096
        mov rax, 0x1122334455667788
fill:   mov [rdi], rax
        add rdi, 8
        dec ecx
        jne fill
        jmp off

both:   call second                     ; starts the second processor, and halts as it does
        jmp halt

another:
        call second
        jmp spin

second:                                 ; starts the second processor, which prints A and halts
        mov rax, 0xf4ee41b003f8ba       ; mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt
        mov [0x8000], rax
        mov rdi, 0xfee00000
        mov dword [rdi + 0x310], 0x1000000
        mov dword [rdi + 0x300], 0x4500
        mov dword [rdi + 0x300], 0x4608
        ret

all:                                    ; starts all others, each of which counts itself
        mov rax, 0xf4700006fff0         ; lock inc word [0x7000]; hlt
        mov [0x8000], rax
        mov rdi, 0xfee00000
        mov dword [rdi + 0x300], 0xc4500
        mov dword [rdi + 0x300], 0xc4608
        jmp spin

nap:    mov dx, 0x602                   ; an alarm each second is to wake it
        mov ax, 0x400
        out dx, ax
        lea rsi, [rip + alarm]
set:    mov al, [rsi]
        out 0x70, al
        mov al, [rsi + 1]
        out 0x71, al
        add rsi, 2
        cmp byte [rsi], 0
        jne set
sleep:  lea rsi, [rip + wakes]          ; to RAM, and real mode at 0x8000 afterwards
        mov rdi, 0x8000
        mov ecx, 18
copy:   mov al, [rsi]
        mov [rdi], al
        inc rsi
        inc rdi
        dec ecx
        jne copy
        mov rdi, 0xe004c                ; the FACS's waking vector
        mov dword [rdi], 0x8000
        mov byte [0x7000], 0
        mov dx, 0x604
        mov ax, 0x2400
        out dx, ax
awake:  inc byte [0x7000]               ; which is never
        jmp awake

print:  mov dx, 0x3f8
more:   mov al, [rsi]
        inc rsi
        test al, al
        je printed
        out dx, al
        jmp more
printed:
        ret

letters:                                ; 10,000, asking LSR before each, as Linux's kernel does
        mov ecx, 10000
        mov bl, 'A'
full:   mov dx, 0x3fd
        in al, dx
        test al, 0x20
        je full
        mov dx, 0x3f8
        mov al, bl
        out dx, al
        inc bl
        cmp bl, 'Z' + 1
        jne letter
        mov bl, 'A'
letter: dec ecx
        jne full
        ret

hello:  db 72, 105, 10, 0
ticked: db 84, 105, 99, 107, 101, 100, 10, 0
alarm:  dw 0xff05
        dw 0xff03
        dw 0xff01
        dw 0x220b
        db 0
wakes:  db 0xa0, 0, 0x70                ; mov al, [0x7000]; add al, '0'
        db 4, 0x30
        db 0xba, 0xf8, 3                ; mov dx, 0x3f8; out dx, al
        db 0xee
        db 0xba, 4, 6                   ; and off
        db 0xb8, 0, 0x34
        db 0xef
        db 0xeb, 0xfe
no_idt: dw 0
        dq 0
idt:    dw 0xfff
        dq 0x60000
ports:  dw 0x20
        db 0x11
        dw 0x21
        db 0x20
        dw 0x21
        db 4
        dw 0x21
        db 1
        dw 0x21
        db 0xfe
        dw 0x43
        db 0x34
        dw 0x40
        db 0xa9
        dw 0
        db 16
"""

Make = Callable[..., Vm]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "vmlinuz"
    write_guest(path, GUEST)
    return path


IRQCHIPS = {"alone": {"kvm.irqchip": "off"}, "whole": {"kvm.irqchip": "whole"}}
IRQCHIPS |= {f"{how} on hardware": config for how, config in IRQCHIPS.items()}


@pytest.fixture(params=["translate", "kvm", "kvm alone", "kvm whole", ON_HARDWARE, WHOLE_ON_HARDWARE])
def make(request: pytest.FixtureRequest, kernel: Path) -> Iterator[Make]:
    """``make(command)``: a VM with the small guest; everything it took is given back. "kvm alone" has no interrupt
    controllers, "kvm whole" all of them."""
    engine, *how = request.param.split()
    config = IRQCHIPS.get(" ".join(how), {})
    need(engine)
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    made: list[Vm] = []

    def make(command: str, **options: Any) -> Vm:
        made.append(Vm(kernel=kernel, memory="64M", cmdline=command, engine=engine, config=config, **options))
        made[-1].start()
        made[-1].console.expect("Hi\n", timeout=20)
        return made[-1]

    yield make
    for vm in made:
        vm.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == fds


def ended(vm: Vm) -> End:
    outcome = vm.wait(20)
    assert outcome is not None, "it did not end"
    assert outcome.error is None, outcome
    return outcome.end


def test_power_off(make: Make) -> None:
    assert ended(make("o")) is End.POWERED_OFF


def test_reboots_go_on_in_the_same_vm(make: Make) -> None:
    vm = make("r")
    for _ in range(3):
        vm.console.expect("Hi\n", timeout=20)
    vm.stop()
    assert ended(vm) is End.STOPPED


def test_a_reboot_can_be_the_end(make: Make) -> None:
    assert ended(make("r", no_reboot=True)) is End.REBOOTED


def test_a_triple_fault_says_where(make: Make, request: pytest.FixtureRequest) -> None:
    outcome = make("t").wait(20)
    assert outcome is not None and outcome.end is End.TRIPLE_FAULT and outcome.exit_status == 3
    if "hardware" in request.node.name and outcome.registers["rip"] == 0xFFF0:
        pytest.skip("SVM keeps no state at a triple fault")
    assert LOAD < outcome.registers["rip"] < LOAD + 0x2000
    assert outcome.registers["rsp"] == 0x80000 and outcome.registers["idtr"]["limit"] == 0


def test_a_halt_for_good_is_said(make: Make) -> None:
    said = threading.Event()
    vm = make("h", diagnostics=lambda line: said.set())
    assert said.wait(20)
    vm.stop()
    assert ended(vm) is End.STOPPED


@pytest.mark.parametrize("command", ["w", "s", "a"])
def test_a_halt_that_may_end_is_not_said(make: Make, command: str) -> None:
    """For an interrupt, or of one processor only."""
    said: list[str] = []
    vm = make(command, cpus=2, diagnostics=said.append)
    if vm.engine.hosts_apics:
        for _ in range(3):
            vm._ask(Step.LOOK)
            time.sleep(0.01)
    else:
        time.sleep(0.05)
    assert not said


def test_a_halt_of_all_processors_is_said(make: Make) -> None:
    said = threading.Event()
    make("2", cpus=2, diagnostics=lambda line: said.set())
    assert said.wait(20)


def test_a_spinning_guest_can_be_frozen_and_goes_on(make: Make) -> None:
    vm = make("s")
    memory = vm.board.memory
    for _ in range(5):
        vm.freeze()
        count = memory.load_u64(0x70000)
        time.sleep(0.02)
        assert memory.load_u64(0x70000) == count
        vm.thaw()
        deadline = time.monotonic() + 20
        while memory.load_u64(0x70000) == count:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    vm.stop()
    assert ended(vm) is End.STOPPED


def test_a_freeze_right_after_the_start(make: Make, kernel: Path) -> None:
    """Wherever the processor's thread is by then."""
    one = make("s")
    engine, config = one.engine.name, {"kvm.irqchip": one.settings.kvm_irqchip}
    for number in range(20):
        with Vm(kernel=kernel, memory="64M", cmdline="s", engine=engine, config=config) as vm:
            vm.start()
            time.sleep(number * 0.0002)
            vm.freeze()
            count = vm.board.memory.load_u64(0x70000)
            time.sleep(0.005)
            assert vm.board.memory.load_u64(0x70000) == count
            vm.thaw()
            deadline = time.monotonic() + 20
            while vm.board.memory.load_u64(0x70000) == count:
                assert time.monotonic() < deadline
                time.sleep(0.001)


def test_an_nmi_wakes_a_guest_that_has_interrupts_off(make: Make) -> None:
    vm = make("n")
    vm.console.expect("Hi\n", timeout=20)
    deadline = time.monotonic() + 20
    while not (vm.engine.hosts_apics or vm._processors[0].hopeless):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    vm.nmi()
    vm.console.expect("Ticked\n", timeout=20)
    while vm.engine.hosts_apics and not vm.wait(1):  # an NMI that comes before the HLT does not end it
        assert time.monotonic() < deadline
        vm.nmi()
    assert ended(vm) is End.POWERED_OFF
    vm.nmi()


def test_the_console_both_ways(make: Make) -> None:
    vm = make("e")
    vm.console.send("abc")
    vm.console.expect("abc", timeout=20)
    vm.console.send("q")
    assert ended(vm) is End.POWERED_OFF


@pytest.mark.parametrize("command", "orthsw")
def test_all_that_it_said_is_seen(make: Make, command: str) -> None:
    """However many bytes came, and whatever came right after them."""
    vm = make(f"l{command}")
    text = "".join(chr(ord("A") + n % 26) for n in range(10_000))
    vm.console.expect(text, timeout=20)
    if command == "r":
        vm.console.expect(text, timeout=20)
    if command not in "ot":
        vm.stop()
    assert ended(vm) is {"o": End.POWERED_OFF, "t": End.TRIPLE_FAULT}.get(command, End.STOPPED)
    assert command == "r" or not vm.console.read(), "nothing twice"


def test_what_a_port_is_known_to_read_is_no_exit_to_python(make: Make, request: pytest.FixtureRequest) -> None:
    if "kvm" not in request.node.callspec.params["make"] or "alone" in request.node.callspec.params["make"]:
        pytest.skip("under KVM, where that has the local APICs")
    vm = make("ls")
    vm.console.expect("".join(chr(ord("A") + n % 26) for n in range(10_000)), timeout=20)
    ((_, exits),) = vm.exits()
    assert exits["ports whose value is known"] == 10_000 and exits["ports"] < 500


def test_freezes_lose_nothing_of_what_it_says(make: Make) -> None:
    """And in a freeze it says nothing, though it was in the middle of it."""
    vm = make("ls")
    text = ""
    deadline = time.monotonic() + 20
    while len(text) < 10_000 and time.monotonic() < deadline:
        vm.freeze()
        text += vm.console.read()
        time.sleep(0.01)
        assert not vm.console.read()
        vm.thaw()
        time.sleep(0.005)
    assert text == "".join(chr(ord("A") + n % 26) for n in range(10_000))


def sleeps(vm: Vm) -> None:
    assert wait_for(lambda: vm.asleep, 20)


def test_suspends_to_ram_until_its_alarm(make: Make) -> None:
    """And does nothing behind the instruction that sends it to sleep."""
    vm = make("y")
    vm.console.expect("0", timeout=20)
    assert ended(vm) is End.POWERED_OFF


def test_suspends_to_ram_until_the_power_button(make: Make) -> None:
    vm = make("z")
    sleeps(vm)
    assert not vm.processors() and not vm.exits()
    assert vm.board.memory.load_u32(0xE004C) == 0x8000, "memory stays"
    vm.freeze()
    vm.power_button()
    vm.thaw()
    vm.console.expect("0", timeout=20)
    assert ended(vm) is End.POWERED_OFF and not vm.asleep


def test_what_sleeps_is_explained_reset_and_stopped(make: Make) -> None:
    vm = make("z")
    sleeps(vm)
    assert "suspended to RAM" in str(vm.explain())
    vm.reset()
    vm.console.expect("Hi\n", timeout=20)
    sleeps(vm)
    vm.stop()
    assert ended(vm) is End.STOPPED


def test_what_has_nothing_to_wake_to_begins_anew(make: Make) -> None:
    vm = make("z")
    sleeps(vm)
    vm.board.memory.store_u32(0xE004C, 0)
    vm.power_button()
    vm.console.expect("Hi\n", timeout=20)
    sleeps(vm)


def test_a_timer_wakes_a_halted_guest_a_hundred_times(make: Make) -> None:
    vm = make("i")
    vm.console.expect("Ticked\n", timeout=20)
    assert ended(vm) is End.POWERED_OFF


def test_a_second_processor(make: Make) -> None:
    vm = make("a", cpus=2)
    vm.console.expect("A", timeout=20)
    vm.freeze()
    count = vm.board.memory.load_u64(0x70000)
    vm.thaw()
    deadline = time.monotonic() + 20
    while vm.board.memory.load_u64(0x70000) == count:
        assert time.monotonic() < deadline
    vm.stop()
    assert ended(vm) is End.STOPPED


def test_64_processors_start(make: Make) -> None:
    vm = make("b", cpus=64)
    deadline = time.monotonic() + 60
    while vm.board.memory.load_u16(0x7000) < 63:
        assert time.monotonic() < deadline, vm.board.memory.load_u16(0x7000)
        time.sleep(0.01)
    vm.freeze()
    vm.thaw()
    assert vm.board.memory.load_u16(0x7000) == 63
    vm.stop()
    assert ended(vm) is End.STOPPED


def test_memory_is_seen_from_outside(make: Make) -> None:
    vm = make("m")
    memory = vm.board.memory
    assert ended(vm) is End.POWERED_OFF
    assert memory.read(0x2000000, 8) == bytes.fromhex("8877665544332211")


def test_a_guest_that_only_resets_can_be_frozen(make: Make) -> None:
    vm = make("r")
    for _ in range(10):
        vm.freeze()
        vm.console.read()
        time.sleep(0.01)
        assert vm.console.read() == ""
        vm.thaw()
        vm.console.expect("Hi\n", timeout=20)
