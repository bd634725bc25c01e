"""Code that changes while it runs: by the program itself, by another mapping, by a device, by the page tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skep.engine.amd64.registers import Pte
from skep.engine.translate.layout import TLB_ENTRIES, Kind
from tests.engine.assemble import assemble
from tests.engine.place import PAGE
from tests.engine.tiny import PROGRAM, Tiny

Boot = Callable[..., Tiny]
V, W = 0x400000, 0x500000
"""Two virtual addresses for tests to map code at."""
G, H = 0x300000, 0x301000


def at_end(guest: Tiny, timeout: float = 20.0) -> None:
    guest.run(timeout)
    assert guest.exception is None, guest.exception


STORES = [
    "mov byte [rbx], 7",
    "mov dword [rbx], 7",
    "movzx ecx, byte [rbx]\nadd ecx, 2\nmov [rbx], ecx",
    "add byte [rbx], 2",
    "lock add dword [rbx], 2",
    "xor eax, eax\nmov al, 5\nmov ecx, 7\nlock cmpxchg [rbx], cl",
    "mov cl, 7\nxchg [rbx], cl",
    "mov ecx, 2\nlock xadd [rbx], ecx",
    "mov ecx, 7\nmovd xmm0, ecx\nmovd [rbx], xmm0",
    "mov al, 7\nmov rdi, rbx\nstosb",
    "lea rsi, [rip + seven]\nmov rdi, rbx\nmovsb",
    "lea rsi, [rip + seven]\nmov rdi, rbx\nmov ecx, 4\nrep movsb",
    "mov eax, 7\nmov rdi, rbx\nmov ecx, 1\nrep stosd",
    "mov rbp, rsp\nlea rsp, [rbx + 8]\npush qword [rip + imm8]\nmov rsp, rbp",
    "btr dword [rbx], 0\nbts dword [rbx], 1\nbts dword [rbx], 0\nbts dword [rbx], 2",
    "mov qword [rip + t], 7\nfild qword [rip + t]\nfistp dword [rbx]",
    "vpxor ymm0, ymm0, ymm0\nvpcmpeqd ymm1, ymm1, ymm1\nmov ecx, 7\nvmovd xmm0, ecx\nvmaskmovps [rbx], xmm1, xmm0\n",
]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("jump", ["", "jmp over\nover: ", "push 0\npop rax\ncpuid\n"])
def test_an_instruction_ahead_is_changed(boot: Boot, store: str, jump: str) -> None:
    """What was stored is what runs, in the same block too, the second time as well as the first."""
    tail = "vmaskmovps" in store
    text = f"""
        start: mov r15d, 3
        again: mov dword [rip + patch + 1], 5
        call f
        mov r13d, edx
        lea rbx, [rip + patch + 1]
        {store}
        call f
        add r12d, edx
        dec r15d
        jnz again
        hlt
        f: {jump}
        patch: mov edx, 5
        {"nop" if not tail else "jmp after"}
        {"" if not tail else "space 16"}
        after: ret
        align 16
        seven: dd 7
        imm8: dq 0x{("c3c3c390" if "push" in store else "0")}00000007
        t: dq 0
    """
    if tail:
        text = text.replace("vmaskmovps [rbx], xmm1, xmm0", "movd dword [rbx], xmm0")
    guest = boot(text)
    at_end(guest)
    assert (guest.reg("r13"), guest.reg("r12")) == (5, 21)


def test_the_next_instruction(boot: Boot) -> None:
    """A store to the very next instruction of the same block."""
    text = """
        start: mov ecx, 10
        again: lea rbx, [rip + patch + 1]
        mov [rbx], cl
        patch: mov eax, 0xff
        add rdx, rax
        dec ecx
        jnz again
        hlt
    """
    guest = boot(text)
    at_end(guest)
    assert guest.reg("rdx") == sum(range(1, 11))


def test_a_thousand_times(boot: Boot) -> None:
    text = """
        start: mov ecx, 1000
        again: mov [rip + patch + 1], ecx
        call f
        add rdx, rax
        dec ecx
        jnz again
        hlt
        align 4096
        f: nop
        patch: mov eax, 0
        ret
    """
    guest = boot(text)
    at_end(guest)
    assert guest.reg("rdx") == 500500


def test_the_length_of_an_instruction_changes(boot: Boot) -> None:
    """nop nop nop nop nop becomes call, as a kernel's tracer does it, and back."""
    text = """
        start: call f
        mov rax, [rip + callf]
        mov [rip + f], eax
        shr rax, 32
        mov [rip + f + 4], al
        call f
        mov dword [rip + f], 0x90909090
        mov byte [rip + f + 4], 0x90
        call f
        hlt
        g: add ebx, 100
        ret
        f: nop
        nop
        nop
        nop
        nop
        inc ebx
        ret
        callf: call2: db 0xe8
        dd g - f - 5
        db 0, 0, 0
    """
    guest = boot(text)
    at_end(guest)
    assert guest.reg("rbx") == 103


def test_a_changed_jump_target(boot: Boot) -> None:
    text = """
        start: call f
        mov byte [rip + f + 1], 2
        call f
        mov byte [rip + f], 0xeb
        call f
        hlt
        f: jmp short one
        one: inc ebx
        inc ecx
        ret
    """
    guest = boot(text)
    at_end(guest)
    assert (guest.reg("rbx"), guest.reg("rcx")) == (1, 3)


def test_an_instruction_across_two_pages(boot: Boot) -> None:
    """Its second half lies on another page, and that is changed."""
    code = bytes.fromhex("b805000000 c3")  # mov eax, 5; ret, with the immediate's last bytes on the second page
    for at in (V + PAGE - 1, V + PAGE - 3, V + PAGE - 5):
        text = "mov rbx, AT\ncall rbx\nadd rcx, rax\nmov byte [rbx + 1], 7\nmov byte [rbx + 4], 1\n"
        text += "call rbx\nadd rcx, rax\nhlt"
        guest = boot(text, symbols={"AT": at})
        guest.map(V, G)
        guest.map(V + PAGE, H)
        guest.memory.write(G + at - V, code[: V + PAGE - at])
        guest.memory.write(H, code[V + PAGE - at :])
        at_end(guest)
        assert guest.reg("rcx") == 5 + 0x01000007


def test_an_instruction_across_two_pages_whose_second_leaves_the_tlb(boot: Boot) -> None:
    """Looking the second page up again stays in machine code, and sees when it has become another."""
    at, rounds = V + PAGE - 3, 100
    text = f"""
        start: mov r15d, {rounds}
        again: call AT
        add rcx, rax
        mov rdx, [BESIDE]       ; its TLB entry is the second page's
        cmp r15d, {rounds // 2}
        jne next
        out 0xf4, al
        invlpg [V + {PAGE}]
        next: dec r15d
        jnz again
        hlt
    """
    guest = boot(text, symbols={"AT": at, "V": V, "BESIDE": V + PAGE + (TLB_ENTRIES << 12)})
    guest.map(V, G)
    second = guest.map(V + PAGE, H)
    guest.map(V + PAGE + (TLB_ENTRIES << 12), PROGRAM)
    guest.memory.write(G + PAGE - 3, bytes.fromhex("b80500"))  # mov eax, 5, of which two bytes are on the second page
    guest.memory.write(H, bytes.fromhex("0000c3"))
    guest.memory.write(H + PAGE, bytes.fromhex("0100c3"))
    guest.io.on_write = lambda port, size, value: guest.memory.store_u64(second, H + PAGE | Pte.P)
    at_end(guest)
    assert guest.reg("rcx") == 5 * rounds + 0x10000 * (rounds // 2 - 1)
    assert guest.vcpu.st.n_span > rounds * 9 // 10  # type: ignore[attr-defined]
    assert guest.vcpu.counts[Kind.SPAN] < 5  # type: ignore[attr-defined]


def test_through_another_mapping(boot: Boot) -> None:
    """Code is executed at one address and written at another."""
    text = "mov rbx, V\ncall rbx\nmov ecx, eax\nmov rdx, W\nmov byte [rdx + 1], 9\ncall rbx\nadd ecx, eax\nhlt"
    guest = boot(text, symbols={"V": V, "W": W})
    guest.map(V, G, 0)
    guest.map(W, G, Pte.RW)
    guest.memory.write(G, bytes.fromhex("b805000000 c3"))
    at_end(guest)
    assert guest.reg("rcx") == 14


def test_the_same_code_at_two_addresses(boot: Boot) -> None:
    """Translations hold no virtual address: RIP-relative operands and return addresses are each mapping's own."""
    body = assemble("call next\nnext: pop rax\nlea rcx, [rip + next]\nret", 0).code
    text = "mov rbx, V\ncall rbx\nmov r8, rax\nmov r9, rcx\nmov rbx, W\ncall rbx\nhlt"
    guest = boot(text, symbols={"V": V, "W": W})
    guest.map(V, G, 0)
    guest.map(W, G, 0)
    guest.memory.write(G, body)
    at_end(guest)
    assert [guest.reg(r) for r in ("r8", "r9", "rax", "rcx")] == [V + 5, V + 5, W + 5, W + 5]


def test_by_a_device(boot: Boot) -> None:
    """Memory's one door for writers drops translations: a device that fills a page of code."""
    text = "again: mov rbx, V\ncall rbx\nadd ecx, eax\nout 0xf4, al\ncmp eax, 9\njne again\nhlt"
    guest = boot(text, symbols={"V": V})
    guest.map(V, G, 0)
    guest.memory.write(G, bytes.fromhex("b805000000 c3"))
    values = iter((6, 7, 8, 9, 9))
    guest.io.on_write = lambda port, size, value: guest.memory.write(G + 1, bytes([next(values)]))
    at_end(guest)
    assert guest.reg("rcx") == 5 + 6 + 7 + 8 + 9


def test_between_two_runs(boot: Boot) -> None:
    guest = boot("again: mov eax, 5\nhlt\njmp again")
    at_end(guest)
    guest.memory.write(PROGRAM + 1, b"\x08")
    at_end(guest)
    assert guest.reg("rax") == 8


@pytest.mark.parametrize("flush", ["invlpg [V]", "mov rdx, cr3\nmov cr3, rdx"])
def test_another_page_under_the_same_address(boot: Boot, flush: str) -> None:
    """The page tables change under code that ran, was chained to, and is called again."""
    text = f"mov r15d, 3\nloop_: mov rbx, V\ncall rbx\nadd ecx, eax\nout 0xf4, al\n{flush}\ndec r15d\njnz loop_\nhlt"
    guest = boot(text, symbols={"V": V})
    where = guest.map(V, G, 0)
    guest.memory.write(G, bytes.fromhex("b805000000 c3"))
    guest.memory.write(H, bytes.fromhex("b806000000 c3"))
    pages = iter((H, G, H))
    guest.io.on_write = lambda port, size, value: guest.memory.store_u64(where, next(pages) | Pte.P)
    at_end(guest)
    assert guest.reg("rcx") == 16


def test_a_direct_jump_to_a_page_that_changes(boot: Boot) -> None:
    """Jumps between pages are patched; the patch must not outlive the mapping."""
    text = "mov r15d, 4\nagain: call V\nadd ecx, eax\nout 0xf4, al\ninvlpg [V]\ndec r15d\njnz again\nhlt"
    guest = boot(text, symbols={"V": V})
    where = guest.map(V, G, 0)
    guest.memory.write(G, bytes.fromhex("b805000000 c3"))
    guest.memory.write(H, bytes.fromhex("b806000000 c3"))
    pages = iter((H, G, H, G))
    guest.io.on_write = lambda port, size, value: guest.memory.store_u64(where, next(pages) | Pte.P)
    at_end(guest)
    assert guest.reg("rcx") == 5 + 6 + 5 + 6


def test_data_beside_code_keeps_its_values(boot: Boot) -> None:
    """A counter in the same 64-byte line as the loop that counts."""
    text = "start: mov ecx, 3000\nagain: inc qword [rip + count]\ndec ecx\njnz again\nhlt\ncount: dq 0"
    guest = boot(text)
    at_end(guest)
    assert guest.load("count") == 3000


def test_a_page_crossing_store_into_code(boot: Boot) -> None:
    text = "mov rbx, V + 4096\ncall rbx\nmov ecx, eax\nmov rdx, 0x00c3000000_09b8_90\nmov [rbx - 1], rdx\n"
    text += "call rbx\nadd ecx, eax\nhlt"
    guest = boot(text, symbols={"V": V})
    guest.map(V, G)
    guest.map(V + PAGE, H)
    guest.memory.write(H, bytes.fromhex("b805000000 c3"))
    at_end(guest)
    assert guest.reg("rcx") == 14


def test_a_fault_after_code_was_changed(boot: Boot) -> None:
    """The position map of the new translation is used, not the old one's."""
    text = "lea rbx, [rip + p]\ncall f\nmov word [rbx], 0x0b0f\ncall f\nhlt\nf: xor eax, eax\np: nop\nnop\nret"
    guest = boot(text)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.rip) == (6, guest.program["p"])
