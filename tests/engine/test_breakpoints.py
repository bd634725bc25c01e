"""Debug registers: breakpoints for data, instructions and ports, single steps, DR6 and DR7 (SDM 3, 17.2 and 17.3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skep.engine.amd64.registers import Cr4, Pte
from skep.engine.contract import ExitReason
from tests.engine.tiny import CODE32, Tiny

Boot = Callable[..., Tiny]

V = 0x180000
"""What is watched. A page of its own."""
LOG = 0x190000
EXECUTE, WRITE, PORT, ACCESS = range(4)
LENGTH = {1: 0, 2: 1, 8: 2, 4: 3}
BS, BD = 1 << 14, 1 << 13

HANDLER = """
    debug: push rax
    mov rax, [rsp + 8]
    mov [r15], rax
    mov rax, dr6
    mov [r15 + 8], rax
    mov eax, 0xffff0ff0
    mov dr6, rax
    bts dword [rsp + 24], 16
    add r15, 16
    pop rax
    iretq
"""


def dr7(*breakpoints: tuple[int, int]) -> int:
    """(kind, length) of DR0, DR1..."""
    value = 0x400
    for i, (kind, length) in enumerate(breakpoints):
        value |= 2 << 2 * i | kind << 16 + 4 * i | LENGTH[length] << 18 + 4 * i
    return value


def make(boot: Boot, text: str, *, user: bool = False, control: int = 0x400, **state: int) -> Tiny:
    """A program whose #DB are written down, and go on behind what they are for."""
    end = "int3" if user else "hlt"
    guest = boot(f"{text}\n{end}\n{HANDLER}", handlers={1: "debug"}, symbols={"V": V, "LOG": LOG}, user=user)
    guest.set(r15=LOG, dr7=control, **state)
    return guest


def run(guest: Tiny) -> list[tuple[int, int]]:
    """(RIP, DR6 without its fixed bits) of each #DB, to the program's end."""
    left = guest.run()
    assert left.reason is ExitReason.HALTED, left
    frame = guest.exception
    assert frame is None or frame.vector == 3, frame
    end = guest.reg("r15")
    return [(guest.load(at), guest.load(at + 8) & 0xE00F) for at in range(LOG, end, 16)]


@pytest.mark.parametrize(
    ("text", "kind", "length", "hits"),
    [
        ("mov [V], al", WRITE, 1, True),
        ("mov [V + 1], al", WRITE, 1, False),
        ("mov [V + 1], al", WRITE, 2, True),
        ("mov [V - 3], eax", WRITE, 1, True),
        ("mov [V - 4], eax", WRITE, 8, False),
        ("mov [V + 7], al", WRITE, 8, True),
        ("mov [V + 8], al", WRITE, 8, False),
        ("mov al, [V]", WRITE, 1, False),
        ("mov al, [V]", ACCESS, 1, True),
        ("cmp dword [V], 5", ACCESS, 4, True),
        ("inc dword [V]", WRITE, 4, True),
        ("lock xadd [V], rax", WRITE, 8, True),
        ("movups [V - 12], xmm0", WRITE, 4, True),
        ("movups [V - 16], xmm0", WRITE, 4, False),
        ("mov rsp, V + 8\npush rax", WRITE, 8, True),
        ("mov rsp, V\npop rax", ACCESS, 8, True),
        ("push qword [V]", ACCESS, 8, True),
        ("call f\njmp g\nf: ret\ng: mov [V], rax", WRITE, 8, True),
        ("xsave [V - 64]", WRITE, 4, True),
        ("bts dword [V - 4], 32", WRITE, 4, False),
        ("mov ecx, 40\nbts dword [V - 4], ecx", WRITE, 4, True),
        ("mov edi, V\nstosb", WRITE, 1, True),
        ("mov esi, V\nlodsb", ACCESS, 1, True),
        ("sgdt [V]", WRITE, 4, True),
        ("enter 16, 0\nleave\nmov [V], al", WRITE, 1, True),
    ],
)
def test_data(boot: Boot, text: str, kind: int, length: int, hits: bool) -> None:
    """A trap: RIP is behind the instruction, which has been done."""
    *before, last = text.splitlines()
    guest = make(boot, "\n".join((*before, last, "next: nop")), dr0=V, control=dr7((kind, length)), rax=0, rdx=0)
    assert run(guest) == ([(guest.program["next"], 1)] if hits else [])


def test_several_at_once(boot: Boot) -> None:
    control = dr7((WRITE, 1), (ACCESS, 2), (EXECUTE, 1), (WRITE, 4))
    text = "mov [V], rax\none: mov al, [V + 2]\ntwo: mov [V + 0x100], eax\nthree: nop"
    guest = make(boot, text, dr0=V, dr1=V + 2, dr2=0x1234, dr3=V + 0x100, control=control)
    at = guest.program
    assert run(guest) == [(at["one"], 3), (at["two"], 2), (at["three"], 8)]


def test_what_the_rest_of_the_page_holds_is_left_alone(boot: Boot) -> None:
    text = "mov ecx, 1000\nagain: inc dword [V + 64]\nadd rax, [V + 128]\nloop again\nmov [V], al\nnext: nop"
    guest = make(boot, text, dr0=V, control=dr7((ACCESS, 4)))
    assert run(guest) == [(guest.program["next"], 1)]
    assert guest.load(V + 64, 4) == 1000


def test_user_code(boot: Boot) -> None:
    guest = make(boot, "mov [V], al\nnext: mov [V + 4], al", user=True, dr0=V, control=dr7((WRITE, 4)))
    assert run(guest) == [(guest.program["next"], 1)]


def test_repeated_string_instructions_stop_where_they_hit(boot: Boot) -> None:
    text = "mov edi, V\nmov ecx, 100\nmov eax, 0x55\nagain: rep stosb\nnext: nop"
    guest = make(boot, text, dr0=V + 40, dr1=V + 99, control=dr7((WRITE, 1), (WRITE, 1)))
    guest.memory.write(V, bytes(128))
    assert run(guest) == [(guest.program["again"], 1), (guest.program["next"], 2)]
    assert guest.read(V, 101) == b"\x55" * 100 + b"\0"


def test_faulting_instructions_hit_nothing(boot: Boot) -> None:
    """The second access of PUSH faults: neither is done, and the breakpoint on the first is not hit."""
    text = "mov rbp, rsp\nmov rsp, 0x700000\npush qword [V]\nhlt\nfault: mov rsp, rbp\nmov ecx, 7"
    guest = boot(f"{text}\nhlt\n{HANDLER}", handlers={1: "debug", 14: "fault"}, symbols={"V": V}, ist={14: 2})
    guest.set(r15=LOG, dr0=V, dr7=dr7((ACCESS, 8)))
    assert run(guest) == []
    assert guest.reg("rcx") == 7


def test_registers_are_written_by_the_guest(boot: Boot) -> None:
    text = f"""
        mov [V], al
        mov eax, V
        mov dr1, rax
        mov eax, {dr7((0, 1), (WRITE, 1)) & ~3}
        mov dr7, rax
        mov [V], al
        one: mov rbx, dr7
        mov eax, 0x400
        mov dr7, rax
        mov [V], al
        mov rcx, dr1
    """
    guest = make(boot, text)
    assert run(guest) == [(guest.program["one"], 2)]
    assert guest.reg("rcx") == V and guest.reg("rbx") == 0x100408


@pytest.mark.parametrize("place", ["inside", "loop", "last byte of a page"])
def test_instructions(boot: Boot, place: str) -> None:
    """A fault, before the instruction; RF in the frame lets it pass once."""
    if place == "last byte of a page":
        guest = make(boot, "nop\njmp far_away\nspace 4096 - 11\nfar_away: mov eax, 5\nnext: inc eax")
        at = guest.program["far_away"]
        expected = [(at, 1)]
    elif place == "loop":
        guest = make(boot, "mov ecx, 3\nagain: inc eax\nhere: inc eax\nloop again")
        at = guest.program["here"]
        expected = [(at, 1)] * 3
    else:
        guest = make(boot, "mov ecx, 1\nhere: add eax, 5\ninc eax")
        at = guest.program["here"]
        expected = [(at, 1)]
    guest.set(dr0=at, dr7=dr7((EXECUTE, 1)), rax=0)
    assert run(guest) == expected
    assert guest.reg("rax") == 6


def test_an_instruction_breakpoint_that_comes_while_the_code_is_known(boot: Boot) -> None:
    text = f"""
        call f
        call f
        lea rax, [rip + here]
        mov dr3, rax
        mov eax, {2 << 6 | 0x400}
        mov dr7, rax
        call f
        mov eax, 0x400
        mov dr7, rax
        call f
        jmp over
        f: nop
        here: nop
        ret
        over: nop
    """
    guest = make(boot, text)
    assert run(guest) == [(guest.program["here"], 8)]


def test_ports(boot: Boot) -> None:
    text = "out 0x80, al\none: in eax, 0x7e\ntwo: in al, 0x7f\nmov edx, 0x80\nin al, dx\nthree: nop"
    for de in (False, True):
        guest = make(boot, text, dr0=0x80, control=dr7((PORT, 2)))
        guest.set(cr4=guest.state["cr4"] | (Cr4.DE if de else 0))
        at = guest.program
        assert run(guest) == ([(at["one"], 1), (at["two"], 1), (at["three"], 1)] if de else [])


def test_general_detect(boot: Boot) -> None:
    """Any move to or from a debug register faults, once: the bit is cleared on the way."""
    guest = make(boot, "mov ecx, 5\nhere: mov rbx, dr0\nmov rdx, dr7", dr0=0x1234, control=0x2400)
    assert run(guest) == [(guest.program["here"], BD)]
    assert (guest.reg("rbx"), guest.reg("rdx")) == (0x1234, 0x400)


STEPS = "push 0x102\npopfq\n"


def test_steps_and_breakpoints_come_together(boot: Boot) -> None:
    text = f"{STEPS}mov [V], al\none: nop\ntwo: push 2\nthree: popfq\nfour: nop"
    guest = make(boot, text, dr0=V, dr1=0, control=dr7((WRITE, 1)))
    at = guest.program
    assert run(guest) == [(at["one"], BS | 1), (at["two"], BS), (at["three"], BS), (at["four"], BS)]


def test_steps_enter_no_handler_of_a_software_interrupt(boot: Boot) -> None:
    text = f"{STEPS}int 0x80\none: nop\ntwo: nop\nhlt\nsoft: nop\nnop\niretq"
    guest = boot(f"{text}\n{HANDLER}", handlers={1: "debug", 0x80: "soft"}, symbols={"V": V})
    guest.set(r15=LOG)
    # IRETQ in the handler sets TF again, so the next step is that of the instruction behind INT
    left = guest.run()
    assert left.reason is ExitReason.HALTED
    steps = [(guest.load(at), guest.load(at + 8) & 0xE00F) for at in range(LOG, guest.reg("r15"), 16)]
    assert steps == [(guest.program["two"], BS), (guest.program["two"] + 1, BS)]


def test_compatibility_mode(boot: Boot) -> None:
    code = 0x140000
    guest = make(boot, f"push {CODE32}\npush CODE\nretfq\nback: nop".replace("CODE\n", f"{code}\n"))
    at = guest.program["back"]
    # mov [V], eax; inc eax; jmp far 0x10:back
    guest.memory.write(code, b"\xa3" + V.to_bytes(4, "little") + b"\x40\xea" + at.to_bytes(4, "little") + b"\x10\0")
    guest.set(dr0=V, dr1=code + 6, dr7=dr7((WRITE, 4), (EXECUTE, 1)))
    assert run(guest) == [(code + 5, 1), (code + 6, 2)]


def test_a_page_that_is_mapped_twice_is_watched_by_its_linear_address(boot: Boot) -> None:
    guest = make(boot, "mov [V], al\none: mov [W], al".replace("W", str(0x40000000)), dr0=V, control=dr7((WRITE, 1)))
    guest.map(0x40000000, V, Pte.RW)
    assert run(guest) == [(guest.program["one"], 1)]


def test_a_step_that_faults(boot: Boot) -> None:
    """The instruction runs alone; the host's own fault is the guest's, at that instruction, and there is no step."""
    guest = make(boot, f"{STEPS}one: nop\ntwo: div ecx", rcx=0)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.rip) == (0, guest.program["two"])
    steps = [guest.load(at) for at in range(LOG, guest.reg("r15"), 16)]
    assert steps == [guest.program["two"]]  # of the NOP: TF counts from the instruction behind POPFQ on


def test_dr6_forgets_other_breakpoints_and_nothing_else(boot: Boot) -> None:
    guest = make(boot, "mov [V], al\nnext: nop", dr0=V, control=dr7((WRITE, 1)), dr6=0xFFFF0FF0 | BS | 0xE)
    assert run(guest) == [(guest.program["next"], BS | 1)]


def test_sti_holds_off_no_step(boot: Boot) -> None:
    """In ring 3, where STI is not translated."""
    guest = make(boot, "push 0x3102\npopfq\nsti\none: nop\ntwo: nop", user=True, rflags=0x3002)
    assert [rip for rip, _ in run(guest)][:2] == [guest.program["one"], guest.program["two"]]


def test_int1_behind_mov_ss_is_one_exception(boot: Boot) -> None:
    """What MOV SS hit waits for the next instruction, which is itself #DB."""
    guest = make(boot, "mov eax, ss\nmov [V], ax\nmov ss, [V]\ndb 0xf1\nnext: nop", dr0=V, control=dr7((ACCESS, 2)))
    hits = run(guest)
    assert hits[-1] == (guest.program["next"], 1) and len(hits) == 2
