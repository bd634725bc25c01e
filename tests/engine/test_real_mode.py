"""Real mode: paragraphs, 64 KiB limits, interrupts through the vector table, the ways to protected and long mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skep.engine.amd64.registers import Cr0
from skep.engine.contract import ExitReason
from tests.engine.gas import gas
from tests.engine.tiny import NULL_SEGMENT, TABLES, Tiny

Boot = Callable[..., Tiny]

BASE = 0x10000
"""Where programs lie: CS:IP is 1000:0 unless a test says otherwise."""
DATA = 0x30000
TRAMPOLINE = 0xA000
"""For what goes to long mode, whose tables (tiny.TABLES) lie where programs lie else."""
STUBS = 0x9000
"""For every vector an IRETless handler of 4 bytes that halts."""


def segment(selector: int, code: bool = False, limit: int = 0xFFFF) -> dict[str, int]:
    return {"selector": selector, "base": selector << 4, "limit": limit, "attributes": 0x9B if code else 0x93}


def real(boot: Boot, text: str, *, at: int = BASE, cs: int | None = None, **state: object) -> Tiny:
    """A program at the linear address ``at``, DS = ES = 3000, SS:SP = 2000:8000, interrupts off."""
    guest = boot("hlt")
    cs = at >> 4 if cs is None else cs
    guest.program = gas(f".code16\n{text}", at)
    guest.memory.write(at, guest.program.code)
    for vector in range(256):
        guest.memory.store_u32(4 * vector, STUBS >> 4 << 16 | 4 * vector)
        guest.memory.write(STUBS + 4 * vector, b"\xf4\xeb\xfd\x90")
    data = segment(DATA >> 4)
    guest.set(
        **{
            "cr0": Cr0.ET | Cr0.NE, "cr4": 0, "efer": 0, "cr3": 0, "rip": at - (cs << 4), "rsp": 0x8000,
            "cs": segment(cs, code=True), "ss": segment(0x2000), "ds": data, "es": data, "fs": data, "gs": data,
            "idtr": {"base": 0, "limit": 0x3FF}, "gdtr": {"base": 0, "limit": 0},
            "ldtr": NULL_SEGMENT, "tr": {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": 0x8B},
        } | state
    )  # fmt: skip
    return guest


def end(guest: Tiny) -> dict[str, int]:
    """Run to a HLT that is the program's own; its state."""
    left = guest.run()
    assert left.reason is ExitReason.HALTED, left
    assert fault(guest) is None, (fault(guest), guest.state)
    return guest.state


def fault(guest: Tiny) -> tuple[int, int, int] | None:
    """(vector, CS, IP) that the handler at which the guest halted was given."""
    state = guest.state
    at = state["rip"] + state["cs"]["base"] - STUBS
    if not 0 <= at < 1024:
        return None
    top = state["ss"]["base"] + (state["rsp"] & 0xFFFF)
    return at // 4, guest.memory.load_u16(top + 2), guest.memory.load_u16(top)


CASES = {
    "arithmetic": ("mov ax, 0x1234\nadd ax, 0x1111\nmov ecx, 0x12345678\ninc cx\nxor dx, dx\nmov dl, ah\nhlt",
                   {"rax": 0x2345, "rcx": 0x12345679, "rdx": 0x23}),
    "memory": ("mov word ptr [0x100], 0x5566\nmov bx, 0x80\nmov si, 0x80\nmov ax, [bx + si]\n"
               "mov eax, [bx + si - 2]\nhlt",
               {"rax": 0x55660000}),
    "addresses wrap at 64 KiB": ("mov byte ptr [0x10], 7\nmov bx, 0xfff0\nmov al, [bx + 0x20]\nhlt", {"rax": 7}),
    "32-bit addresses": ("mov dword ptr [0x40], 99\nmov ebx, 0x20\nmov eax, [ebx + ebx]\nlea ecx, [ebx*4 + 1]\nhlt",
                         {"rax": 99, "rcx": 0x81}),
    "stack": ("push 0x1234\npush 5\npush ax\npop cx\npop dx\npop si\nmov bp, sp\nmov di, [bp - 4]\nhlt",
              {"rdx": 5, "rsi": 0x1234, "rdi": 5, "rsp": 0x8000}),
    "the upper half of ESP stays": ("mov esp, 0x12340000\npush ax\nmov ecx, esp\npop ax\nhlt",
                                    {"rcx": 0x1234FFFE, "rsp": 0x12340000}),
    "32-bit pushes": ("push dword ptr 0x11223344\npop ax\npop cx\nhlt", {"rax": 0x3344, "rcx": 0x1122}),
    "calls": ("call f\nmov cx, 7\nhlt\nf: mov bp, sp\nmov dx, [bp]\nret", {"rcx": 7, "rdx": 3}),
    "32-bit calls": (".code16gcc\ncall f\nmov ecx, 7\nhlt\nf: mov edx, [esp]\nret", {"rcx": 7, "rdx": 6}),
    "indirect": ("mov ax, offset f - BASE\ncall ax\nmov word ptr [0], offset g - BASE\njmp word ptr [0]\n"
                 "f: inc cx\nret 0\n"
                 "g: hlt".replace("BASE", str(BASE)), {"rcx": 1}),
    "far call": ("call 0x1000:(f - BASE)\nhlt\nf: mov bp, sp\nmov ax, [bp + 2]\nretf".replace("BASE", str(BASE)),
                 {"rax": 0x1000}),
    "far jump by memory": ("mov word ptr [0], offset f - BASE - 0x10\nmov word ptr [2], 0x1001\njmp dword ptr [0]\n"
                           "f: mov ax, cs\nhlt".replace("BASE", str(BASE)), {"rax": 0x1001}),
    "loops": ("mov ecx, 0x10003\nxor ax, ax\n1: add ax, 2\nloop 1b\nmov dx, 5\nmov cx, 4\n2: dec dx\nloopne 2b\n"
              "jcxz 3f\nhlt\n"
              "3: mov si, 9\nhlt", {"rax": 6, "rdx": 1, "rsi": 9, "rcx": 0x10000}),
    "loope": ("mov cx, 9\n1: cmp cx, 5\nloope 1b\nmov dx, cx\nmov cx, 6\n2: cmp cx, cx\nloope 2b\n"
              "hlt", {"rdx": 8, "rcx": 0}),
    "loops by ECX": ("mov ecx, 0x10002\n1: inc ax\n.byte 0x67, 0xe2, 0xfc\nmov edx, ecx\njecxz 2f\nhlt\n"
                     "2: mov si, 1\nhlt",
                     {"rdx": 0, "rsi": 1, "rax": 2}),
    "strings": ("mov cx, 4\nmov ax, 0x4142\nmov di, 0x20\nrep stosw\nmov si, 0x22\nmov di, 0x80\nmov cx, 3\nrep movsb\n"
                "mov eax, [0x80]\nmov si, 0x20\nlodsw\nmov dx, ax\nhlt", {"rdx": 0x4142, "rsi": 0x22, "rdi": 0x83}),
    "strings downwards": ("mov dword ptr [0], 0x44332211\nmov si, 3\nmov di, 0x13\nmov cx, 4\nstd\nrep movsb\ncld\n"
                          "mov eax, [0x10]\nmov di, 0x46\nmov cx, 2\nmov dx, di\nstd\nrep stosd\ncld\nhlt",
                          {"rax": 0x44332211, "rsi": 0xFFFF, "rdi": 0x3E}),
    "strings are compared": ("mov dword ptr [0], 0x44332211\nmov dword ptr [0x10], 0x44552211\nmov si, 0\nmov di, 16\n"
                             "mov ecx, 0x77770008\nrepe cmpsb\nsetb al\nmov dx, cx\nmov bx, si\nxor di, di\nmov cx, 9\n"
                             "mov al, 0x33\nrepne scasb\nsete ah\nhlt",
                             {"rdx": 5, "rbx": 3, "rdi": 3, "rcx": 0x77770006, "rax": 0x133}),
    "strings wrap at 64 KiB": ("mov edi, 0x1234fff0\nmov cx, 0x20\nmov ax, 0x55\nrep stosb\nmov bx, [0xe]\n"
                               "mov dl, [0x10]\nhlt", {"rdi": 0x12340010, "rbx": 0x5555, "rdx": 0}),
    "strings with 32-bit addresses": ("mov edi, 0x20\nmov ecx, 3\nmov eax, 0x12345678\naddr32 rep stosd\nmov esi, 36\n"
                                      "addr32 lodsd\nmov esi, 0x20\nmov edi, 0x120\nmov ecx, 12\n"
                                      "addr32 rep movsb\nmov edx, [0x128]\nhlt",
                                      {"rdi": 0x12C, "rax": 0x12345678, "rdx": 0x12345678, "rcx": 0}),
    "strings from another segment": ("mov ax, 0x3100\nmov fs, ax\nmov word ptr fs:[0], 4951\nmov si, 0\nfs lodsw\nhlt",
                                     {"rax": 0x1357}),
    "flags on the stack": ("stc\npushf\nclc\npop ax\npush 0x893\npopf\nsetc cl\nseto ch\npushfd\npop edx\nhlt",
                           {"rcx": 0x101, "rdx": 0x893 & ~0x10 | 2 | 0x10}),
    "segments": ("mov ax, 0x3001\nmov ds, ax\nmov word ptr [0], 0x77\nmov ax, es:[0x10]\nmov cx, ds\npush ds\npop fs\n"
                 "mov dx, fs:[0]\nmov si, cs:[0]\nhlt", {"rax": 0x77, "rcx": 0x3001, "rdx": 0x77}),
    "override of the stack's segment": ("push 0x99\nmov bp, sp\nmov ax, [bp]\nmov bx, bp\nmov cx, ss:[bx]\nhlt",
                                        {"rax": 0x99, "rcx": 0x99}),
    "far pointers": ("mov dword ptr [0], 0x30020004\nles di, [0]\nmov word ptr es:[di], 0x1212\nmov ax, [0x24]\n"
                     "lds si, [0]\n"
                     "mov cx, ds\nhlt", {"rax": 0x1212, "rcx": 0x3002, "rsi": 4, "rdi": 4}),
    "software interrupts": ("mov word ptr es:[0], 1\nxor ax, ax\nmov ds, ax\nmov word ptr [0x80*4], offset f - BASE\n"
                            "mov word ptr [0x80*4+2], 0x1000\nmov ax, 5\nstc\nint 0x80\nsbb dx, dx\nhlt\n"
                            "f: add ax, 1\npushf\npop cx\niret".replace("BASE", str(BASE)), {"rax": 6, "rdx": 0xFFFF}),
    "pusha": ("mov ax, 1\nmov cx, 2\nmov di, 8\npusha\nxor ax, ax\nxor cx, cx\npopa\n"
              "hlt", {"rax": 1, "rcx": 2, "rdi": 8}),
    "bit tests reach beyond their word": ("mov bx, 0x84\nbts word ptr [0x10], bx\nmov al, [0x20]\nhlt", {"rax": 0x10}),
    "xchg and lock": ("mov word ptr [2], 9\nmov ax, 3\nlock xadd [2], ax\nmov cx, [2]\nhlt", {"rax": 9, "rcx": 12}),
    "bcd": ("mov al, 0x79\nadd al, 0x35\ndaa\nhlt", {"rax": 0x14}),
    "x87": ("fninit\nfld1\nfadd st, st\nfistp word ptr [0]\nmov ax, [0]\nhlt", {"rax": 2}),
    "enter": ("mov bp, 7\nenter 8, 0\nmov word ptr [bp - 2], 3\nmov ax, ss:[0x7ffc]\nleave\nmov cx, bp\nhlt",
              {"rax": 3, "rcx": 7}),
    "xlat": ("mov byte ptr [0x13], 0x5a\nmov bx, 0x10\nmov al, 3\nxlatb\nhlt", {"rax": 0x5A}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_programs(boot: Boot, name: str) -> None:
    text, expected = CASES[name]
    state = end(real(boot, text))
    assert {register: state[register] for register in expected} == expected


@pytest.mark.parametrize("at", [BASE, 0x7C00, 0x10FF0])
@pytest.mark.parametrize("name", ["calls", "loops", "software interrupts"])
def test_programs_in_segments_that_begin_anywhere(boot: Boot, name: str, at: int) -> None:
    """CS:IP as boot sectors find it: the segment begins inside a page, or the program lies at its very start."""
    text, expected = CASES[name]
    for cs in (at >> 4, max(0, at >> 4 & ~0xFFF)):
        if name == "software interrupts" and cs << 4 != BASE:
            continue
        state = end(real(boot, text, at=at, cs=cs))
        if name == "calls":
            expected = {**expected, "rdx": at - (cs << 4) + 3}
        assert {register: state[register] for register in expected} == expected


@pytest.mark.parametrize(
    ("text", "vector"),
    [
        ("mov bx, 0xffff\nlast: mov ax, [bx]", 13),
        ("mov bx, 0xffff\nlast: mov [bx], ax", 13),
        ("mov bp, 0xffff\nlast: mov ax, [bp]", 12),
        ("mov ebx, 0x10000\nlast: mov al, [ebx]", 13),
        ("mov sp, 1\nlast: push ax", 12),
        ("mov sp, 0xffff\nlast: pop ax", 12),
        ("mov eax, 0x12345\nlast: jmp eax", 13),
        ("push dword ptr 0x12345\nlast: .byte 0x66\nret", 13),
        ("mov si, 0xffff\nlast: lodsw", 13),
        ("mov di, 0xfffd\nmov cx, 3\nlast: rep stosw", 13),
        ("mov bp, 0xffff\nlast: leave", 12),
        ("last: ud2", 6),
        ("xor cx, cx\nlast: div cx", 0),
        ("last: .byte 0x63, 0xc0", 6),
        ("last: lldt ax", 6),
        ("last: .byte 0xc5, 0xf8, 0x77", 6),
        ("mov cx, 5\nmov dx, 1\nmov word ptr [0], 9\nmov word ptr [2], 5\nlast: bound dx, [0]", 5),
    ],
)
def test_faults(boot: Boot, text: str, vector: int) -> None:
    guest = real(boot, f"{text}\nhlt")
    guest.run()
    assert fault(guest) == (vector, BASE >> 4, guest.program["last"] - BASE)


def test_a_jump_backwards_over_the_segment_s_start_wraps(boot: Boot) -> None:
    """From 07C0:0005 to 07C0:FFF5, which no jump inside the page is."""
    guest = real(boot, "nop", at=0x7C05, cs=0x7C0)
    guest.memory.write(0x7C05, b"\xeb\xee")  # jmp to -11, IP 0xfff5
    guest.memory.write(0x17BF5, b"\xb8\x99\x00\xf4")
    guest.memory.write(0x7BF5, b"\xb8\x11\x00\xf4")
    assert end(guest)["rax"] == 0x99


def test_running_off_the_segment_s_end(boot: Boot) -> None:
    """The instruction at FFFF would be followed by one outside the limit."""
    guest = real(boot, "nop\njmp 0xfffe + BASE\nhlt".replace("BASE", str(BASE)))
    guest.memory.write(BASE + 0xFFFE, b"\x40\x40")
    guest.run()
    assert guest.state["rax"] == 2
    assert fault(guest) == (13, BASE >> 4, 0)  # 16 bits of EIP 0x10000 are pushed


def test_interrupts(boot: Boot) -> None:
    text = "sti\n1: inc bx\ncmp word ptr [0], 3\njne 1b\ncli\nhlt\nhandler: inc word ptr [0]\niret"
    guest = real(boot, text)
    guest.memory.store_u32(4 * 0x20, 0x1000 << 16 | guest.program["handler"] - BASE)
    for _ in range(3):
        guest.interrupts.raise_vector(0x20)
    assert end(guest)["rsp"] == 0x8000


def test_single_steps(boot: Boot) -> None:
    text = "pushf\npop ax\nor ax, 0x100\npush ax\npopf\ninc cx\ninc cx\njmp 1f\n1: inc cx\npushf\npop ax\n"
    guest = real(boot, text + "and ax, 0xfeff\npush ax\npopf\nhlt\nhandler: inc dx\niret")
    guest.memory.store_u32(4, 0x1000 << 16 | guest.program["handler"] - BASE)
    state = end(guest)
    assert (state["rcx"], state["rdx"]) == (3, 9)


def test_self_modifying_code(boot: Boot) -> None:
    text = "mov cx, 3\n1: mov ax, 0\nadd dx, ax\ninc word ptr cs:[1b - BASE + 1]\nloop 1b\nhlt"
    assert end(real(boot, text.replace("BASE", str(BASE))))["rdx"] == 0 + 1 + 2


def test_device_memory(boot: Boot) -> None:
    """Through a segment whose limit was raised in protected mode."""
    guest = real(boot, "mov ebx, 0xd0000010\nmov eax, 0x11223344\nmov [ebx], eax\nmov cx, [ebx + 1]\nhlt")
    guest.set(ds=segment(0, limit=0xFFFFFFFF))
    assert end(guest)["rcx"] == 0x2233
    assert ("write", 0xD0000010, 4, 0x11223344) in guest.io.log


TO_LONG_MODE = """
    cli
    mov ax, cs
    mov ds, ax
    lidt [none - BASE]
    lgdt [gdtr - BASE]
    mov eax, cr0
    or al, 1
    {switch}
    .byte 0x66, 0xea
    .long protected
    .word 0x08
gdtr: .word 0x1f
    .long gdt
none: .word 0, 0, 0
    .balign 8
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
    .code32
protected:
    mov ax, 0x10
    mov ds, ax
    mov ss, ax
    mov esp, 0x80000
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, {pml4}
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea
    .long long
    .word 0x18
    .code64
long:
    mov rbx, 0x1122334455667788
    push rbx
    pop rdx
    hlt
"""


@pytest.mark.parametrize("switch", ["mov cr0, eax\njmp 1f\n1:", "lmsw ax"])
def test_the_way_to_long_mode_that_application_processors_go(boot: Boot, switch: str) -> None:
    text = TO_LONG_MODE.format(switch=switch, pml4=TABLES).replace("BASE", str(TRAMPOLINE))
    state = end(real(boot, text, at=TRAMPOLINE))
    assert state["rdx"] == 0x1122334455667788
    assert state["cs"]["selector"] == 0x18 and state["efer"] & 0x500 == 0x500


def test_there_and_back(boot: Boot) -> None:
    """Real, 16-bit protected, 32-bit protected with segments that have a base, and back; then through a big limit."""
    text = """
        cli
        mov ax, cs
        mov ds, ax
        lgdt [gdtr - BASE]
        mov eax, cr0
        inc ax
        mov cr0, eax
        jmp 0x08:(p16 - BASE)
    p16: mov ax, 0x18
        mov ds, ax
        mov ss, ax
        mov sp, 0x9000
        mov word ptr [0x500], 0x1111
        push 0x2222
        call f
        jmp 0x10:(p32 - BASE)
    f:  mov bp, sp
        mov cx, [bp + 2]
        ret 2
        .code32
    p32: mov edx, [0x500]
        mov eax, 0x20
        mov es, eax
        mov dword ptr es:[0x100], 0x3333
        call g
    returned: mov esi, es:[0x100]
        jmp 0x08:(back - BASE)
    g:  mov edi, [esp]
        ret
        .code16
    back: mov ax, 0x18
        mov ds, ax
        mov ax, 0x28
        mov fs, ax
        mov eax, cr0
        dec ax
        mov cr0, eax
        jmp 0x1000:(home - BASE)
    home: mov ax, 0x3000
        mov ds, ax
        mov fs, ax
        mov ss, ax
        mov eax, 0x120000
        mov word ptr fs:[eax], 0x4444
        hlt
        .balign 8
    gdtr: .word 0x2f
        .long gdt
        .balign 8
    gdt: .quad 0, 0x00009b010000ffff, 0x00409b010000ffff, 0x000093030000ffff, 0x0040930400000fff, 0x00cf92000000ffff
    """.replace("BASE", str(BASE))
    guest = real(boot, text)
    state = end(guest)
    assert guest.memory.load_u16(0x30500) == 0x1111
    assert (state["rcx"], state["rdx"] & 0xFFFF, state["rsi"]) == (0x2222, 0x1111, 0x3333)
    assert guest.memory.load_u32(0x40100) == 0x3333
    assert state["rdi"] == guest.program["returned"] - BASE
    assert guest.memory.load_u16(0x30000 + 0x120000) == 0x4444
