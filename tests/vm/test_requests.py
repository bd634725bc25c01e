"""What a disk's requests cost under KVM: with the local APICs in the kernel no return from it, neither for the queue's
notification nor for the completion's interrupt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from skep.bus.pci import intx_gsi
from skep.machine.amd64 import why_not_kvm
from skep.machine.amd64map import ECAM_BASE
from skep.vm import Vm
from tests.boot.bzimage import write_guest
from tests.devices.virtio.driver import NEXT, WRITE, Driver
from tests.engine.engines import need

GUEST = """
        mov rsp, 0x80000
        lidt [rip + idt]
        mov rdi, 0x60000 + 0x42 * 16
        lea rax, [rip + handler]
        mov [rdi], ax
        mov word [rdi + 2], 0x10
        mov word [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], ax
        shr rax, 16
        mov [rdi + 8], eax
        mov rdi, 0xfee00000
        mov dword [rdi + 0xf0], 0x1ff
        mov rbx, 0x70000                ; the mailbox
wait:   pause
        mov eax, [rbx + 32]             ; the I/O APIC's register of a wire, perhaps
        test eax, eax
        je work
        mov rsi, 0xfec00000
        mov [rsi], eax
        mov dword [rsi + 0x10], 0x8042  ; level-triggered, vector 0x42
        inc eax
        mov [rsi], eax
        mov dword [rsi + 0x10], 0
        mov dword [rbx + 32], 0
work:
        mov ecx, [rbx]                  ; so many requests
        test ecx, ecx
        je wait
        mov rsi, [rbx + 8]              ; the doorbell
        mov rdx, [rbx + 16]             ; the available ring's index
        xor ebp, ebp                    ; how many interrupts are expected
next:   inc ebp
        inc word [rdx]
        mov word [rsi], 0
sleep:  cli
        cmp [rbx + 24], ebp
        je done
        cmp dword [rbx + 60], 0
        jne awake
        sti
        hlt
        jmp sleep
awake:  sti
        pause
        jmp sleep
done:   dec ecx
        jne next
        mov dword [rbx + 24], 0
        mov dword [rbx], 0              ; done
        jmp wait

handler: inc dword [rbx + 48]           ; interrupts
        cmp qword [rbx + 40], 0         ; the device's ISR
        je ours
        sub dword [rbx + 56], 1         ; so many interrupts are not looked after at first
        jns end
        mov dword [rbx + 56], 0
        mov r8, [rbx + 40]
        test byte [r8], 1
        je end
ours:   inc dword [rbx + 24]
end:    mov dword [rdi + 0xb0], 0
        iretq

idt:    dw 0xfff
        dq 0x60000
"""
MAILBOX, FREE = 0x70000, 0x200_0000
PATIENCE = 20.0
"""Seconds that a request may take; only a failing test waits that long."""


class Requester:
    """A guest that makes requests of a disk, one after the other, as often as the mailbox says."""

    def __init__(self, home: Path, irqchip: str, *, msix: bool = True) -> None:
        kernel, disk = home / "vmlinuz", home / "disk"
        write_guest(kernel, GUEST)
        disk.write_bytes(bytes(1 << 20))
        config = {"kvm.irqchip": irqchip, "pci.0.1.0.device": "virtio-blk", "pci.0.1.0.path": str(disk)}
        self.vm = Vm(kernel=kernel, memory="64M", engine="kvm", config=config)
        self.vm.start()
        self.memory = self.vm.board.memory
        self.function = self.vm.board.pci.functions[1, 0]  # type: ignore[attr-defined]
        board = SimpleNamespace(memory=self.memory, bus=self.vm.board.bus, ECAM=ECAM_BASE)
        self.driver = driver = Driver(board, 0)  # type: ignore[arg-type]
        driver._free = FREE
        queue = driver.start(msix=msix, size=16)
        if not msix:
            self.memory.store_u64(MAILBOX + 40, driver.structures[3].gpa)
            self.memory.store_u32(MAILBOX + 32, 0x10 + 2 * intx_gsi(1, 0))
            while self.memory.load_u32(MAILBOX + 32):
                time.sleep(0.001)
        request = driver.allocate(1024)
        for number, (gpa, size, flags) in enumerate(
            [(request, 16, NEXT), (request + 16, 512, NEXT | WRITE), (request + 528, 1, WRITE)]
        ):
            words = (gpa, size | flags << 32 | (number + 1) << 48)
            for word, value in enumerate(words):
                self.memory.store_u64(queue.desc + 16 * number + 8 * word, value)
        self.memory.store_u64(MAILBOX + 8, driver.structures[2].gpa)
        self.memory.store_u64(MAILBOX + 16, queue.avail + 2)

    def make(self, requests: int) -> dict[str, int | float]:
        """Make so many, and say for what the vCPU left the guest meanwhile, and how often."""
        before = self._exits()
        self.memory.store_u32(MAILBOX, requests)
        self.wait()
        after = self._exits()
        return {reason: times - before.get(reason, 0) for reason, times in after.items() if times != before.get(reason)}

    def wait(self) -> None:
        """Until they are all done."""
        before, end = -1, 0.0
        while self.memory.load_u32(MAILBOX):
            done = self.memory.load_u32(MAILBOX + 24)
            if done != before:
                before, end = done, time.monotonic() + PATIENCE
            assert time.monotonic() < end, f"nothing came after {done} requests"
            time.sleep(0.002)

    def _exits(self) -> dict[str, int | float]:
        """But for those that it takes to count."""
        self.vm.freeze()
        engine_vm = self.vm._engine_vm
        assert engine_vm is not None
        told = engine_vm.statistics()
        self.vm.thaw()
        exits = {what: times for what, times in told.items() if what.startswith("exits: ")}
        exits.pop("exits: asked for", None)
        return exits


@pytest.fixture(params=["here", pytest.param("hardware", marks=(pytest.mark.hardware, pytest.mark.slow))])
def requester(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[type[Requester]]:
    need("kvm")
    made: list[Requester] = []

    def make(irqchip: str, *, msix: bool = True) -> Requester:
        if irqchip == "split" and not msix and why_not_kvm() is not None:
            pytest.skip("kvm-pvm, an emulation of KVM, does not tell of the ends of interrupts")
        made.append(Requester(tmp_path, irqchip, msix=msix))
        # In L1 an interrupt may come between STI and HLT, as if QEMU had dropped STI's shadow at an exit.
        made[-1].memory.store_u32(MAILBOX + 60, request.param == "hardware")
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        one.vm.close()


@pytest.mark.parametrize("irqchip", ["split", "whole"])
def test_a_request_costs_no_exit(requester: type[Requester], irqchip: str) -> None:
    one = requester(irqchip)
    one.make(20)
    assert one.make(500) == {}
    assert one.function.msix is not None and list(one.function.msix._bound) == [Driver.QUEUE_VECTOR]


def test_a_request_costs_exits_without_apics_in_the_kernel(requester: type[Requester]) -> None:
    exits = requester("off").make(100)
    assert exits["exits: devices' memory"] >= 100, "ends of interrupts"


@pytest.mark.parametrize("irqchip", ["off", "split", "whole"])
def test_a_wire_interrupts_until_it_is_let_go_of(requester: type[Requester], irqchip: str) -> None:
    """The guest ends three interrupts without looking after the device, which goes on asserting its wire."""
    one = requester(irqchip, msix=False)
    one.memory.store_u32(MAILBOX + 56, 3)
    one.make(1)
    assert one.memory.load_u32(MAILBOX + 48) >= 4
    exits = one.make(100)
    if irqchip == "whole":  # what asks for the device's ISR; now and then an interrupt comes twice
        assert exits.keys() == {"exits: devices' memory"} and 100 <= exits["exits: devices' memory"] < 200
    else:
        assert one.memory.load_u32(MAILBOX + 48) == 104


@pytest.mark.parametrize("msix", [True, False], ids=["message", "wire"])
@pytest.mark.parametrize("irqchip", ["off", "split", "whole"])
def test_no_interrupt_is_lost_by_a_freeze(requester: type[Requester], irqchip: str, msix: bool) -> None:
    one = requester(irqchip, msix=msix)
    one.make(20)
    for _ in range(100):
        if not one.memory.load_u32(MAILBOX):
            one.memory.store_u32(MAILBOX, 100)
        one.vm.freeze()
        one.vm.thaw()
        time.sleep(0.001)
    one.wait()
