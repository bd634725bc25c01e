"""Compatibility mode and flat 32-bit protected mode, and the ways between them and long mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skep.engine.amd64.cpuid import INTEL_VENDOR, host_vendor
from skep.engine.amd64.registers import Cr0, Cr4, Pte
from skep.engine.contract import ExitReason
from tests.engine.assemble import assemble
from tests.engine.tiny import CODE32, DATA0, GDT, IDT, SEGMENTS, STACK, USER32, USER_STACK, Tiny

Boot = Callable[..., Tiny]
CODE_AT = 0x140000
"""32-bit code that a 64-bit program goes to."""


def at_end(guest: Tiny) -> None:
    left = guest.run()
    assert left.reason is ExitReason.HALTED, left
    assert guest.exception is None, guest.exception


def flat(boot: Boot, text: str, **registers: Any) -> Tiny:
    """32-bit protected mode, without paging, IDT or TSS; flat segments."""
    guest = boot(text, bits=32)
    data = SEGMENTS[DATA0]
    guest.set(
        cr0=Cr0.PE | Cr0.ET | Cr0.NE,
        cr4=Cr4.OSFXSR | Cr4.OSXMMEXCPT,
        cr3=0,
        efer=0,
        xcr0=1,
        cs=SEGMENTS[CODE32],
        ss=data,
        ds=data,
        es=data,
        fs=data,
        gs=data,
        **registers,
    )
    return guest


def compatibility(boot: Boot, text: str, *, user: bool = False) -> Tiny:
    """A 64-bit program that goes to 32-bit code by RETFQ, or by IRETQ to ring 3."""
    if user:
        go = f"push 0x2b\npush USER_STACK\npush 0x202\npush {USER32}\npush {CODE_AT}\niretq"
    else:
        go = f"push {CODE32}\npush {CODE_AT}\nretfq"
    guest = boot(f"{go}\nback: mov r15d, 1\nhlt", symbols={"CODE_AT": CODE_AT})
    if user:
        for page in (CODE_AT, USER_STACK - 4096):
            guest.map(page, page, Pte.US | Pte.RW)
    labels = {"back": guest.program["back"], "USER_STACK": USER_STACK}
    guest.memory.write(CODE_AT, assemble(text, CODE_AT, labels, bits=32).code)
    return guest


BODIES = {
    "short forms": (
        "mov ecx, 5\ninc ecx\ndec edx\npush ecx\npop eax\nadd eax, ecx",
        {"rax": 12, "rcx": 6, "rdx": 0xFFFFFFFF},
    ),
    "pusha": (
        "mov eax, 1\nmov ecx, 2\nmov edx, 3\npushad\nxor eax, eax\nxor edx, edx\npopad",
        {"rax": 1, "rcx": 2, "rdx": 3},
    ),
    "addresses wrap": ("mov ebx, 0xfffffff0\nlea eax, [ebx + 0x20]\nmov ecx, [ebx + 0x1000f4]", {"rax": 0x10}),
    "16-bit operands": (
        "mov eax, 0x12345678\nmov ax, 0x1111\npush ax\npop cx\nadd cx, 1",
        {"rax": 0x12341111, "rcx": 0x1112},
    ),
    "16-bit addresses": ("mov ebx, 0x10008\nmov esi, 0x20010\ndb 0x67, 0x8d, 0x00", {"rax": 0x18}),
    "calls": ("call f\nmov ecx, 7\njmp g\nf: mov edx, [esp]\nret\ng: nop", {"rcx": 7, "rdx": CODE_AT + 5}),
    "loop": ("mov ecx, 5\nxor eax, eax\nagain: add eax, ecx\nloop again\njecxz g\nint3\ng: nop", {"rax": 15, "rcx": 0}),
    "bcd": (
        "mov eax, 0x79\nadd al, 0x35\ndaa\nmov cl, al\nmov eax, 0x0205\naad 10\nmov dl, al",
        {"rcx": 0x14, "rdx": 25},
    ),
    "aam aaa": ("mov eax, 77\naam 10\nmov ecx, eax\nmov eax, 0x0f\naaa", {"rcx": 0x0707, "rax": 0x0105}),
    "xlat and strings": (
        "mov esi, STRING\nmov edi, STRING + 8\nmov ecx, 4\nrep movsb\nmov eax, [STRING + 8]",
        {"rax": 0x04030201},
    ),
    "sse": ("mov eax, 0x40400000\nmovd xmm0, eax\naddss xmm0, xmm0\nmovd ecx, xmm0", {"rcx": 0x40C00000}),
    "x87": ("fld1\nfadd st0, st0\npush 0\nfistp dword [esp]\npop eax", {"rax": 2}),
    "segments": ("mov ax, ds\nmov dx, cs\nmov cx, 0x18\nmov fs, cx\nmov ecx, fs:[STRING]", {"rcx": 0x04030201}),
    "far pointer": ("push 0x18\npush STRING\nlfs ebx, [esp]\nmov ecx, fs:[ebx]", {"rcx": 0x04030201}),
    "jump table": ("mov eax, 1\njmp dword [TABLE + eax*4]\nint3\nz: nop", {"rax": 1}),
    "arpl": ("mov eax, 0x10\nmov ecx, 3\narpl ax, cx\nsetz dl", {"rax": 0x13}),
    "high registers": ("mov eax, 0x1234\nmov cl, ah\nmov ch, 5\nxchg ch, al", {"rcx": 0x3412, "rax": 0x1205}),
    "lea and imul": ("mov ecx, 7\nlea eax, [ecx + ecx*8 + 5]\nimul edx, eax, -3", {"rax": 68, "rdx": (1 << 32) - 204}),
    "bound and into": (
        "mov eax, 5\nmov dword [STRING + 16], 1\nmov dword [STRING + 20], 9\nbound eax, [STRING + 16]\nxor ecx, ecx\n"
        "into",
        {"rax": 5},
    ),
    "enter": (
        "mov ebp, 0x777\nenter 16, 0\nmov dword [ebp - 4], 9\nmov eax, [ebp - 4]\nleave\nmov ecx, ebp",
        {"rax": 9, "rcx": 0x777},
    ),
    "cmpxchg8b": ("mov eax, 0x04030201\nmov edx, 0\nmov ebx, 5\nmov ecx, 6\nlock cmpxchg8b [STRING]\nsetz al", {}),
    "push sreg": ("push ds\npop es\npush cs\npop eax\nand eax, 0xfffc\nmov cx, es", {}),
}


def _body(name: str, end: str) -> tuple[str, dict[str, int]]:
    text, expected = BODIES[name]
    text = text.replace("STRING", "string").replace("TABLE", "table")
    data = "\nalign 8\nstring: dd 0x04030201, 0, 0, 0, 0, 0\n"
    data += f"table: dd 0, {'z' if 'z:' in text else '0'}"
    return f"{text}\n{end}{data}", expected


@pytest.mark.parametrize("name", BODIES)
def test_flat_protected_mode(boot: Boot, name: str) -> None:
    text, expected = _body(name, "hlt")
    guest = flat(boot, text, rdx=0, rcx=0)
    if name == "calls":
        expected = {**expected, "rdx": guest.program.address + 5}
    at_end(guest)
    state = guest.state
    assert {r: state[r] for r in expected} == expected


@pytest.mark.parametrize("name", [n for n in BODIES if n != "segments"])
def test_compatibility_mode(boot: Boot, name: str) -> None:
    text, expected = _body(name, "jmp far 0x10:back")
    guest = compatibility(boot, text)
    at_end(guest)
    state = guest.state
    assert state["r15"] == 1  # 64-bit code again
    assert {r: state[r] & 0xFFFFFFFF for r in expected} == expected


@pytest.mark.parametrize("name", ["short forms", "calls", "loop", "sse", "pusha"])
def test_compatibility_mode_in_ring_3(boot: Boot, name: str) -> None:
    text, expected = _body(name, "int3")
    guest = compatibility(boot, text, user=True)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.cs) == (3, USER32)
    state = guest.state
    assert {r: state[r] & 0xFFFFFFFF for r in expected} == expected


def test_upper_halves_survive_compatibility_mode_only_where_untouched(boot: Boot) -> None:
    """64-bit registers keep their upper halves until 32-bit code writes them; R8 to R15 are left alone."""
    guest = compatibility(boot, "mov eax, 1\njmp far 0x10:back")
    guest.set(rax=-1 & (1 << 64) - 1, r10=0x1122334455667788)
    at_end(guest)
    assert guest.reg("rax") == 1 and guest.reg("r10") == 0x1122334455667788


def test_fxsave_leaves_the_upper_vectors_alone(boot: Boot) -> None:
    """Outside 64-bit mode FXSAVE writes and FXRSTOR reads XMM0 to XMM7 only (SDM 2, FXSAVE)."""
    guest = compatibility(boot, "fxsave [0x181000]\nfxrstor [0x182000]\njmp far 0x10:back")
    image = bytearray(guest.state["xsave"])
    vectors = bytes(range(1, 256)) + b"\0"
    image[160:416] = vectors
    image[512:520] = (7).to_bytes(8, "little")
    guest.set(xsave=bytes(image))
    area = bytearray(b"\xa5" * 512)
    area[24:32] = bytes.fromhex("801f0000ffff0000")
    for at in (0x181000, 0x182000):
        guest.memory.write(at, bytes(area))
    at_end(guest)
    saved = guest.read(0x181000, 512)
    assert saved[160:288] == vectors[:128] and saved[288:416] == b"\xa5" * 128
    assert guest.state["xsave"][160:416] == b"\xa5" * 128 + vectors[128:]


def test_faults_in_compatibility_mode_push_64_bit_frames(boot: Boot) -> None:
    guest = compatibility(boot, "mov ecx, 3\nmov eax, [0x700000]")
    guest.run()
    frame = guest.exception
    assert frame is not None
    assert (frame.vector, frame.error, frame.cr2, frame.cs, frame.rip) == (14, 0, 0x700000, CODE32, CODE_AT + 5)


def test_int_80_from_32_bit_user_code(boot: Boot) -> None:
    """As 32-bit Linux programs make system calls of a 64-bit kernel."""
    go = f"push 0x2b\npush USER_STACK\npush 0x202\npush {USER32}\npush {CODE_AT}\niretq\n"
    go += "handler: add eax, 1\nmov r14, [rsp + 8]\niretq"
    guest = boot(go, handlers={0x80: "handler"})
    for page in (CODE_AT, USER_STACK - 4096):
        guest.map(page, page, Pte.US | Pte.RW)
    guest.memory.write(CODE_AT, assemble("mov eax, 5\nint 0x80\nmov ecx, eax\nint3", CODE_AT, bits=32).code)
    guest.run()
    frame = guest.exception
    assert frame is not None and frame.vector == 3
    assert guest.reg("rcx") == 6 and guest.reg("r14") == USER32


def test_one_byte_string_is_two_instructions_in_two_modes(boot: Boot) -> None:
    """48 is REX.W in 64-bit code and DEC EAX in 32-bit code: one page, both modes, and translations of both."""
    body = "again: db 0x48, 0x01, 0xc8\n"  # add rax, rcx | dec eax; add eax, ecx
    guest = boot(
        f"mov rax, 1 << 40\nmov ecx, 3\ncall f\nmov rbx, rax\nmov eax, 10\n"
        f"push {CODE32}\nlea rdx, [rip + f32]\npush rdx\nretfq\n"
        f"back: mov r15d, 1\nhlt\nf: {body}ret\nf32: {body.replace('again: ', '')}db 0xea\ndd back\ndw 0x10"
    )
    at_end(guest)
    assert guest.reg("rbx") == (1 << 40) + 3 and guest.reg("rax") == 12


def test_the_way_into_long_mode(boot: Boot) -> None:
    """As a kernel's boot code goes it: PAE, CR3, EFER.LME, PG, a far jump."""
    text = """
        mov eax, cr4
        or eax, 0x20
        mov cr4, eax
        mov eax, PML4
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x100
        wrmsr
        mov eax, cr0
        or eax, 0x80000001
        mov cr0, eax
        rdmsr
        mov ebx, eax
        jmp far 0x10:code64
        code64: db 0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8
        db 0x4c, 0x8d, 0x05, 0, 0, 0, 0
        hlt
    """
    guest = flat(boot, text, rdx=0)
    guest.set(gdtr={"base": GDT, "limit": 0x4F}, idtr={"base": IDT, "limit": 0xFFF})
    at_end(guest)
    state = guest.state
    assert state["rax"] == 0x0807060504030201
    assert state["rbx"] & 0x500 == 0x500  # LME and LMA
    assert state["r8"] == guest.program["code64"] + 17
    assert state["efer"] & 0x400 and state["cs"]["selector"] == 0x10


def test_the_way_out_of_long_mode(boot: Boot) -> None:
    """Compatibility mode, paging off, and flat 32-bit mode goes on."""
    text = """
        mov eax, cr0
        and eax, 0x7fffffff
        mov cr0, eax
        mov ecx, 0xc0000080
        rdmsr
        mov ebx, eax
        and eax, ~0x100 & 0xffffffff
        wrmsr
        mov esi, [0x300000]
        hlt
    """
    guest = compatibility(boot, text)
    guest.memory.store_u32(0x300000, 0x55AA)
    at_end(guest)
    state = guest.state
    assert state["rbx"] & 0x400 == 0 and state["rsi"] == 0x55AA
    assert not state["cr0"] & Cr0.PG and not state["efer"] & 0x500


SYSTEM_CALLS = """
    mov ecx, 0x174
    xor edx, edx
    mov eax, 0x10
    wrmsr
    mov ecx, 0x175
    lea rax, [STACK]
    wrmsr
    mov ecx, 0x176
    lea rax, [rip + kernel]
    wrmsr
    push 0x2b
    push USER_STACK
    push 0x202
    push {user}
    push {start}
    iretq
    kernel: mov r14, rsp
    pushfq
    pop r13
    add r15, rax
    mov rdx, rsi
    mov rcx, rbp
    {back}
"""


@pytest.mark.skipif(host_vendor() != INTEL_VENDOR, reason="AMD's CPUs have no SYSENTER in IA-32e mode")
@pytest.mark.parametrize("back", ["SYSEXITD", "db 0xfb, 0x0f, 0x35"])
def test_sysenter_from_32_bit_user_code(boot: Boot, back: str) -> None:
    """As 32-bit Linux programs make system calls on Intel's CPUs; the kernel is 64-bit code. The second way back has
    its STI before it."""
    text = SYSTEM_CALLS.format(user=USER32, start=CODE_AT, back=back)
    guest = boot(text)
    for page in (CODE_AT, USER_STACK - 4096):
        guest.map(page, page, Pte.US | Pte.RW)
    user = "mov eax, 5\nmov esi, next\nmov ebp, esp\nmov edi, 0x1234\nsysenter\nint3\nnext: push eax\npop ebx\nint3"
    program = assemble(user, CODE_AT, bits=32)
    guest.memory.write(CODE_AT, program.code)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.rip, frame.rsp) == (3, program["next"] + 3, USER_STACK)
    state = guest.state
    assert (state["rbx"], state["r15"], state["r14"]) == (5, 5, STACK)
    assert not state["r13"] & 0x200  # SYSENTER clears IF
    assert frame.cs & 3 == 3 and frame.cs & ~3 == 0x20 and frame.ss & ~3 == 0x28


def test_a_segment_that_a_return_takes_away_keeps_its_base(boot: Boot) -> None:
    """GS with a selector of ring 0: null in ring 3, and the kernel still finds its data when it comes back."""
    go = f"push 0x2b\npush USER_STACK\npush 0x202\npush 0x33\npush {CODE_AT}\niretq\n"
    guest = boot(go + "back: mov eax, gs\nmov rbx, gs:[0]\nhlt", handlers={0x80: "back"})
    for page in (CODE_AT, USER_STACK - 4096):
        guest.map(page, page, Pte.US | Pte.RW)
    guest.memory.write(CODE_AT, b"\xcd\x80")
    guest.memory.store_u64(0x180000, 0x1122334455667788)
    guest.set(gs={**SEGMENTS[DATA0], "base": 0x180000})
    at_end(guest)
    assert (guest.reg("rax"), guest.reg("rbx")) == (0, 0x1122334455667788)
