"""Hardware tasks, call gates and virtual-8086 mode, in protected mode without paging (SDM 3, 5.8, 7 and 21)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from skep.engine.amd64.registers import Cr0, Rflags
from skep.engine.contract import ExitReason
from tests.engine.assemble import Program
from tests.engine.gas import gas
from tests.engine.tiny import NULL_SEGMENT, Tiny

Boot = Callable[..., Tiny]

AT = 0x100000
GDT, IDT = 0x200000, 0x201000
TSS_MAIN, TSS_OTHER, TSS_SMALL = 0x202000, 0x203000, 0x204000
STACK, INNER, OTHER_STACK, USER_STACK = 0x210000, 0x220000, 0x230000, 0x240000
LANDING = 0x205000
RESULT = 0x206000

CODE, DATA, USER_CODE, USER_DATA, MAIN, OTHER, SMALL, GATE, CALL_GATE, CONFORMING, CODE16, CALL_GATE16 = (
    8 * n for n in range(1, 13)
)
TASK_GATE = GATE
SYMBOLS = {
    "CODE": CODE, "DATA": DATA, "USER_CODE": USER_CODE | 3, "USER_DATA": USER_DATA | 3, "MAIN": MAIN, "OTHER": OTHER,
    "SMALL": SMALL, "TASK_GATE": TASK_GATE, "CALL_GATE": CALL_GATE, "CALL_GATE16": CALL_GATE16, "RESULT": RESULT,
    "TSS_MAIN": TSS_MAIN, "TSS_OTHER": TSS_OTHER, "TSS_SMALL": TSS_SMALL, "USER_STACK": USER_STACK, "GDT": GDT,
    "STACK": STACK,
}  # fmt: skip


def system(kind: int, base: int, limit: int, dpl: int = 0) -> int:
    return limit & 0xFFFF | (base & 0xFFFFFF) << 16 | (0x80 | dpl << 5 | kind) << 40 | (base >> 24) << 56


def gate(kind: int, selector: int, offset: int, dpl: int = 3, parameters: int = 0) -> int:
    return offset & 0xFFFF | selector << 16 | parameters << 32 | (0x80 | dpl << 5 | kind) << 40 | (offset >> 16) << 48


def tss(eip: int, *, flags: int = 2, esp: int = OTHER_STACK, cs: int = CODE, data: int = DATA, trap: int = 0) -> bytes:
    head = struct.pack("<IIIIIIII", 0, INNER, DATA, 0, 0, 0, 0, 0)
    general = struct.pack("<8I", 0xA, 0xC, 0xD, 0xB, esp, 0xE, 0x51, 0xD1)
    selectors = struct.pack("<7I", data, cs, data, data, data, data, 0)
    return head + struct.pack("<II", eip, flags) + general + selectors + struct.pack("<HH", trap, 0x68)


class Machine:
    """A program at ``start``, in ring 0. Faults halt at :data:`LANDING`, with their vector in ECX."""

    def __init__(self, boot: Boot, text: str) -> None:
        symbols = "".join(f".set {name}, {value}\n" for name, value in SYMBOLS.items())
        self.program: Program = gas(f"{symbols}.code32\n{text}", AT)
        self.guest = boot("hlt")
        memory = self.memory = self.guest.memory
        memory.write(AT, self.program.code)
        small = struct.pack("<7H", 0, INNER & 0xFFFF, DATA, 0, 0, 0, 0)
        small += struct.pack("<HH", self.label("small") & 0xFFFF, 2)
        small += struct.pack("<8H", 1, 2, 3, 4, 0x8000, 6, 7, 8)
        small += struct.pack("<5H", DATA, CODE16, DATA, DATA, 0)
        descriptors = [
            0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF,
            system(0xB, TSS_MAIN, 0x67), system(9, TSS_OTHER, 0x67, 3), system(1, TSS_SMALL, 0x2B),
            gate(5, OTHER, 0), gate(12, CODE, self.label("gate"), parameters=2), 0x00CF9F000000FFFF,
            0x00009B100000FFFF, gate(4, CODE16, self.label("gate") & 0xFFFF),
        ]  # fmt: skip
        memory.write(GDT, struct.pack(f"<{len(descriptors)}Q", *descriptors))
        memory.write(TSS_MAIN, tss(0, esp=0))
        memory.write(TSS_OTHER, tss(self.label("other")))
        memory.write(TSS_SMALL, small)
        for vector in range(32):
            landing = LANDING + 16 * vector
            memory.write(landing, b"\xb9" + vector.to_bytes(4, "little") + b"\xf4\xeb\xfd")
            memory.store_u64(IDT + 8 * vector, gate(14, CODE, landing))
        memory.store_u64(IDT + 8 * 0x80, gate(5, OTHER, 0))
        memory.store_u64(IDT + 8 * 0x81, gate(14, CODE, self.label("service")))
        flat: dict[str, Any] = {"base": 0, "limit": 0xFFFFFFFF}
        data = flat | {"selector": DATA, "attributes": 0xC093}
        self.guest.set(
            cr0=Cr0.PE | Cr0.ET | Cr0.NE, cr3=0, cr4=0, efer=0, rip=AT, rflags=2, rsp=STACK,
            cs=flat | {"selector": CODE, "attributes": 0xC09B}, ss=data, ds=data, es=data, fs=data, gs=data,
            gdtr={"base": GDT, "limit": 8 * len(descriptors) - 1}, idtr={"base": IDT, "limit": 0x7FF},
            tr={"selector": MAIN, "base": TSS_MAIN, "limit": 0x67, "attributes": 0x8B}, ldtr=NULL_SEGMENT,
        )  # fmt: skip

    def label(self, name: str) -> int:
        return self.program.labels.get(name, 0)

    def run(self) -> dict[str, Any]:
        left = self.guest.run()
        assert left.reason is ExitReason.HALTED, left
        return self.guest.state

    def fault(self) -> tuple[int, int, int]:
        """(vector, error code, EIP) of the fault that ended the program, one with an error code."""
        state = self.run()
        vector, rest = divmod(state["rip"] - LANDING, 16)
        assert rest == 6, hex(state["rip"])
        error, eip = struct.unpack("<II", self.memory.read(state["rsp"], 8))
        return vector, error, eip

    def busy(self, selector: int) -> bool:
        return bool(self.memory.read(GDT + selector + 5, 1)[0] & 2)

    def word(self, at: int) -> int:
        return self.memory.load_u32(at)


def test_call_and_return(boot: Boot) -> None:
    text = """
        mov eax, 0x1111
        mov ebx, 0x2222
        stc
        call OTHER:0
        back: setc cl
        call TASK_GATE:0
        mov esi, 0x99
        hlt
        other: mov [RESULT], eax
        mov eax, cr0
        mov [RESULT + 4], eax
        pushfd
        pop [RESULT + 8]
        str [RESULT + 12]
        inc dword ptr [RESULT + 16]
        iretd
        jmp other
    """
    machine = Machine(boot, text)
    state = machine.run()
    assert (state["rax"], state["rbx"], state["rcx"], state["rsi"]) == (0x1111, 0x2222, 1, 0x99)
    assert machine.word(RESULT + 16) == 2 and machine.word(RESULT + 12) == OTHER
    assert machine.word(RESULT + 4) & Cr0.TS and machine.word(RESULT + 8) & Rflags.NT
    assert machine.word(TSS_OTHER) == MAIN and not machine.busy(OTHER) and machine.busy(MAIN)
    assert state["tr"]["selector"] == MAIN and not state["rflags"] & Rflags.NT


def test_jump(boot: Boot) -> None:
    """The old task is free again, and there is no way back by itself."""
    machine = Machine(boot, "mov eax, 0x77\njmp OTHER:0\nafter: hlt\nother: mov ecx, [TSS_MAIN + 0x20]\nhlt")
    state = machine.run()
    assert state["rcx"] == machine.label("after") and not state["rflags"] & Rflags.NT
    assert not machine.busy(MAIN) and machine.busy(OTHER)
    assert machine.word(TSS_MAIN + 0x28) == 0x77 and machine.word(TSS_MAIN + 0x4C) == CODE
    assert (state["rax"], state["rbx"], state["rsp"], state["rdi"]) == (0xA, 0xB, OTHER_STACK, 0xD1)


def test_a_task_of_16_bits(boot: Boot) -> None:
    text = """
        mov eax, 0x12345678
        call SMALL:0
        hlt
        .code16
        small: mov [RESULT - 0x200000], ax
        mov cx, sp
        mov [RESULT - 0x200000 + 2], cx
        iret
    """.replace("RESULT - 0x200000", "0x6000")
    machine = Machine(boot, text)
    state = machine.run()
    assert state["rax"] == 0x12345678
    assert machine.memory.load_u16(0x6000) == 1 and machine.memory.load_u16(0x6002) == 0x8000
    assert machine.memory.load_u16(TSS_SMALL) == MAIN


def test_interrupts_and_faults_through_a_task_gate(boot: Boot) -> None:
    text = """
        int 0x80
        after: mov byte ptr [GDT + 0x100], 1
        mov eax, 0x3000
        here: mov gs, ax
        next: hlt
        other: mov eax, [TSS_MAIN + 0x20]
        mov [RESULT], eax
        iretd
        pop [RESULT + 8]
        mov eax, [TSS_MAIN + 0x20]
        mov [RESULT + 4], eax
        mov eax, [TSS_MAIN + 0x24]
        mov [RESULT + 12], eax
        add dword ptr [TSS_MAIN + 0x20], 2
        iretd
    """
    machine = Machine(boot, text)
    machine.memory.store_u64(IDT + 8 * 13, gate(5, OTHER, 0))
    machine.run()
    assert machine.word(RESULT) == machine.label("after")
    assert (machine.word(RESULT + 4), machine.word(RESULT + 8)) == (machine.label("here"), 0x3000)
    assert machine.word(RESULT + 12) & Rflags.RF


@pytest.mark.parametrize(
    ("before", "vector", "error"),
    [
        (lambda m: m.memory.write(GDT + OTHER + 5, b"\x8b"), 13, OTHER),  # busy
        (lambda m: m.memory.write(GDT + OTHER + 5, b"\x09"), 11, OTHER),  # not present
        (lambda m: m.memory.write(GDT + OTHER, b"\x66"), 10, OTHER),  # too short
        (lambda m: m.memory.write(GDT + OTHER + 5, b"\x82"), 13, OTHER),  # an LDT
    ],
)
def test_what_is_wrong_before_the_switch(
    boot: Boot, before: Callable[[Machine], None], vector: int, error: int
) -> None:
    machine = Machine(boot, "nop\nhere: jmp OTHER:0\nother: hlt")
    before(machine)
    assert machine.fault() == (vector, error, machine.label("here"))
    assert machine.guest.state["tr"]["selector"] == MAIN


@pytest.mark.parametrize(
    ("tss_", "vector", "error"),
    [
        ({"cs": DATA}, 10, DATA),
        ({"cs": 0}, 10, 0),
        ({"cs": CODE | 3}, 10, CODE),
        ({"data": CODE}, 10, CODE),
        ({"data": 0x200}, 10, 0x200),
        ({"data": USER_DATA}, 10, USER_DATA),
    ],
)
def test_what_is_wrong_behind_it_is_the_new_task_s(boot: Boot, tss_: dict[str, int], vector: int, error: int) -> None:
    """#TS at its first instruction; the handler is a task, for there may be no stack."""
    text = "jmp OTHER:0\nother: hlt\nsmall_handler: nop"
    machine = Machine(boot, text + "\n.code16\nsmall: pop ax\nmov [0x6000], ax\nhlt")
    machine.memory.write(TSS_OTHER, tss(machine.label("other"), **tss_))
    machine.memory.store_u64(IDT + 8 * vector, gate(5, SMALL, 0))
    state = machine.run()
    assert state["tr"]["selector"] == SMALL
    assert machine.memory.load_u16(0x6000) == error
    assert machine.word(TSS_OTHER + 0x20) == machine.label("other")
    assert machine.memory.load_u16(TSS_SMALL) == OTHER


def test_the_trap_flag_of_a_task(boot: Boot) -> None:
    machine = Machine(boot, "jmp OTHER:0\nother: nop\nnext: hlt")
    machine.memory.write(TSS_OTHER, tss(machine.label("other"), trap=1))
    state = machine.run()
    assert state["rcx"] == 1 and state["dr6"] & 1 << 15
    assert machine.word(state["rsp"]) == machine.label("other")


TO_RING_3 = "push USER_DATA\npush USER_STACK\npush 2\npush USER_CODE\npush offset user\niretd\n"


def test_call_gates_inwards(boot: Boot) -> None:
    text = TO_RING_3 + """
        user: mov ax, USER_DATA
        mov ds, ax
        push 0x111
        push 0x222
        call CALL_GATE:0
        back: mov ebp, esp
        int 0x81
        gate: mov eax, [esp + 8]
        mov ebx, [esp + 12]
        mov ecx, [esp]
        mov esi, cs
        mov edi, ss
        retf 8
        service: hlt
    """
    machine = Machine(boot, text)
    state = machine.run()
    assert (state["rax"], state["rbx"], state["rcx"]) == (0x222, 0x111, machine.label("back"))
    assert (state["rsi"], state["rdi"], state["rbp"]) == (CODE, DATA, USER_STACK)


def test_call_gates_of_the_same_level(boot: Boot) -> None:
    text = "mov ebp, esp\ncall CALL_GATE:0\nafter: jmp CALL_GATE:0\ngate: mov eax, [esp]\nsub ebp, esp\nhlt"
    machine = Machine(boot, text)
    state = machine.run()
    assert (state["rax"], state["rbp"]) == (machine.label("after"), 8)


@pytest.mark.parametrize(
    ("change", "vector", "error"),
    [
        (lambda m: m.memory.write(GDT + CALL_GATE + 5, b"\x8c"), 13, CALL_GATE),  # DPL 0
        (lambda m: m.memory.write(GDT + CALL_GATE + 5, b"\x6c"), 11, CALL_GATE),  # not present
        (lambda m: m.memory.write(GDT + CALL_GATE + 2, bytes((DATA, 0))), 13, DATA),
        (lambda m: m.memory.write(GDT + CALL_GATE + 2, bytes(2)), 13, 0),
        (lambda m: m.memory.store_u16(TSS_MAIN + 8, USER_DATA), 10, USER_DATA),
    ],
)
def test_what_is_wrong_with_call_gates(
    boot: Boot, change: Callable[[Machine], None], vector: int, error: int
) -> None:
    """The stack that is wrong is also that of the fault's handler: then it is a double fault, by a task of its own."""
    machine = Machine(boot, TO_RING_3 + "user: call CALL_GATE:0\nhlt\ngate: hlt\n.code16\nsmall: mov cx, 0x88\nhlt")
    change(machine)
    if vector == 10:
        machine.memory.store_u64(IDT + 8 * 8, gate(5, SMALL, 0))
        assert machine.run()["rcx"] & 0xFF == 0x88
    else:
        assert machine.fault() == (vector, error, machine.label("user"))


VIRTUAL = """
    push 0
    push 0
    push 0x2000
    push 0x2000
    push 0x3000
    push 0x8000
    push FLAGS
    push 0x1800
    push offset virtual - 0x18000
    iretd
"""


def virtual(boot: Boot, text: str, flags: int = 0) -> Machine:
    """``virtual`` runs at 1800:..., with DS = 2000 and SS:SP = 3000:8000."""
    program = VIRTUAL.replace("FLAGS", hex(flags | Rflags.VM | 2)).replace("offset virtual - 0x18000", "0x100")
    body = gas(f".code16\n{text}", 0x100)
    machine = Machine(boot, program + "hlt\nservice: hlt")
    machine.memory.write(0x18100, body.code)
    machine.program.labels.update(body.labels)
    return machine


def test_virtual_8086_mode(boot: Boot) -> None:
    text = """
        mov ax, 0x1234
        mov [0x10], ax
        push ax
        pop cx
        mov ax, 0x2100
        mov es, ax
        mov word ptr es:[4], 0x77
        call 0x1801:(f - 0x10)
        int3
        f: mov dx, cs
        mov si, 3
        1: dec si
        jnz 1b
        retf
    """
    machine = virtual(boot, text)
    state = machine.run()
    assert machine.memory.load_u16(0x20010) == 0x1234 and machine.memory.load_u16(0x21004) == 0x77
    frame = struct.unpack("<9I", machine.memory.read(state["rsp"], 36))
    _, cs, flags, esp, ss, es, ds, fs, gs = frame
    assert (state["rip"] - LANDING) // 16 == 3
    assert (cs, ss, es, ds, fs, gs, esp) == (0x1800, 0x3000, 0x2100, 0x2000, 0, 0, 0x8000)
    assert flags & Rflags.VM and state["ds"]["selector"] == 0 and state["cs"]["selector"] == CODE
    assert state["rdx"] == 0x1801


@pytest.mark.parametrize("text", ["cli", "sti", "pushf", "popf", "int 0x81", "iret", "hlt", "lgdt [0]", "in al, 0x60"])
@pytest.mark.parametrize("iopl", [0, 3])
def test_what_looks_at_iopl_there(boot: Boot, text: str, iopl: int) -> None:
    machine = virtual(boot, f"here: {text}\nnext: ud2", flags=iopl << 12)
    machine.memory.write(0x38000, struct.pack("<3H", 0x105, 0x1800, 0x7202))
    machine.memory.write(0x18105, b"\x0f\x0b")
    always = text in ("hlt", "lgdt [0]", "in al, 0x60")
    state = machine.run()
    vector = (state["rip"] - LANDING) // 16
    if text == "int 0x81" and iopl == 3:
        assert state["rip"] == machine.label("service") + 1
    else:
        assert vector == (13 if always or iopl == 0 else 6), text
    if vector == 13:
        assert machine.word(state["rsp"] + 4) == machine.program.labels["here"]


def test_instructions_that_are_not_there(boot: Boot) -> None:
    for text in ("lar ax, cx", "sldt ax", ".byte 0x63, 0xc0", ".byte 0xc5, 0xf8, 0x77"):
        assert (virtual(boot, text).run()["rip"] - LANDING) // 16 == 6, text
