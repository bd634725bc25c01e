"""Loops whose body has r9, r10, r11 in host registers (renaming.py): the guest never sees that they were elsewhere."""

from __future__ import annotations

import secrets
import threading

import pytest
from iced_x86 import Code, Register

from skep.engine.translate import TranslateEngine
from skep.engine.translate.layout import Kind, Mode
from skep.engine.translate.renaming import Renaming, rename
from tests.engine.assemble import Imm, Mem, Reg, assemble
from tests.engine.compare import minimize, run_sequences
from tests.engine.engines import translate
from tests.engine.generate import Generator
from tests.engine.guestcpu import GuestCpu
from tests.engine.oracle import Oracle
from tests.engine.place import DATA, PAGE
from tests.engine.sequence import Label
from tests.engine.tiny import MMIO, Tiny
from tests.engine.translate.composed import composed

V, G = 0x400000, 0x300000
READS = (Code.XOR_R64_RM64, Code.ADD_R64_RM64, Code.MOV_R64_RM64, Code.CMP_R64_RM64)
OUT = (Code.JO_REL32_64, Code.JB_REL32_64, Code.JLE_REL32_64)

def renamed(body: str) -> Renaming | None:
    """The renaming of the loop that ``body`` and a jump back are."""
    with Tiny(TranslateEngine(), "start: hlt\n") as guest:
        vcpu = guest.vcpu
        vcpu.state_changed()  # type: ignore[attr-defined]
        guest.memory.write(0x140000, assemble(f"top: {body}\njne top\nhlt", 0x140000, {}).code)
        made = composed(vcpu.cache, 0x140000, vcpu.st.mode & ~Mode.USER)  # type: ignore[attr-defined]
        assert made.loop
        return rename(made.items[: made.loop])


@pytest.mark.parametrize(
    ("body", "homes"),
    [
        ("add r9, rax\nadd rax, r9\ndec rcx", (9, None, None)),
        ("add r9, rax\nxor r10, r11\nxor r11, r10\ndec rcx", (9, 15, 14)),
        ("add r10, [rbx + r10 * 8]\nmov r15, r10\nmov r14, r12\ndec rcx", (None, 9, None)),
        ("mov rax, r11\ndec rcx", None),  # read once: not worth it
        ("add r9, rax\npush rax\npop rbx\ndec rcx", None),
        ("add r9, [rsp + 8]\ndec rcx", None),
        ("add r9, rax\ndiv r9\ndec rcx", None),
        ("add r9, rax\npxor xmm0, xmm1\ndec rcx", None),
        ("add r9, rax\nlock add [rbx], r9\ndec rcx", None),
        ("add r9, rax\nrdtsc\ndec rcx", None),
        ("add r9, rax\nmov ax, ds\ndec rcx", None),
    ],
)
def test_homes(body: str, homes: tuple[int | None, int | None, int | None] | None) -> None:
    found = renamed(body)
    assert (None if found is None else found.homes[9:12]) == homes


def test_everything_is_put_back() -> None:
    """All ways out of a body: its end, jumps out of it, and a loop around it."""
    text = """
        start: mov r9, 1
        mov r10, 2
        mov r11, 3
        mov ebp, 5
        outer: mov ecx, 20
        top: add r9, r10
        xor r10, r11
        lea r11, [r11 + r9 * 2 + 7]
        rol r11, 3
        cmp r9, r12
        je out
        dec ecx
        jne top
        dec ebp
        jne outer
        hlt
        out: hlt
    """
    for stop in (-1, 7, 50):
        r9, r10, r11, seen, out = 1, 2, 3, 0, False
        mask = (1 << 64) - 1
        values = []
        for _ in range(5):
            for _ in range(20):
                r9 = r9 + r10 & mask
                r10 ^= r11
                r11 = r11 + r9 * 2 + 7 & mask
                r11 = (r11 << 3 | r11 >> 61) & mask
                values.append(r9)
                seen += 1
                out = seen == stop
                if out:
                    break
            if out:
                break
        with Tiny(TranslateEngine(), text) as guest:
            names = {"rax": 11, "rdx": 13, "rbx": 14, "rsi": 15, "rdi": 16, "r8": 17, "r13": 18, "r14": 19, "r15": 20}
            stack = guest.reg("rsp")
            guest.set(r12=values[-1] if out else 0, **names)
            guest.run()
            assert guest.exception is None
            state = guest.state
            assert (state["r9"], state["r10"], state["r11"], state["rsp"]) == (r9, r10, r11, stack)
            assert {name: state[name] for name in names} == names


def test_a_page_fault_in_a_body() -> None:
    """The handler finds each register in its place, and may change it."""
    text = """
        start: mov rbx, 0x400000
        mov r9, 0x1111
        mov r10, 0x2222
        mov ecx, 40
        top: add r9, [rbx]
        add r10, r9
        add rbx, 256
        dec ecx
        jne top
        hlt
        fault: mov rax, cr2
        mov [rip + seen], r9
        mov [rip + seen + 8], r10
        mov [rip + seen + 16], r15
        mov [rip + seen + 24], rsp
        mov r15, 77
        inc r10
        mov rdx, [rip + entry]
        or qword [rdx], 1
        add rsp, 8
        iretq
        entry: dq 0
        seen: dq 0, 0, 0, 0
    """
    with Tiny(TranslateEngine(), text, handlers={14: "fault"}) as guest:
        guest.map(V, G)
        where = guest.map(V + PAGE, G + PAGE)
        for page in (0, 1):
            for i in range(PAGE // 8):
                guest.memory.store_u64(G + page * PAGE + i * 8, (page * 1000 + i) * 3)
        guest.map(V + 2 * PAGE, G)
        guest.memory.store_u64(where, (G + PAGE) | 2)
        guest.memory.store_u64(guest.program["entry"], where)
        stack = guest.reg("rsp")
        guest.set(r15=0xF)
        guest.run()
        assert guest.exception is None
        r9, r10 = 0x1111, 0x2222
        at_fault = None
        for i in range(40):
            if i == 16:
                at_fault = (r9, r10, 0xF)
                r10 += 1
            word = i % 16 * 32
            r9 += (word + (1000 if i // 16 == 1 else 0)) * 3
            r10 += r9
        seen = guest.program["seen"]
        assert tuple(guest.load(seen + 8 * i) for i in range(3)) == at_fault
        assert guest.load(seen + 24) < stack
        assert (guest.reg("r9"), guest.reg("r10"), guest.reg("r15"), guest.reg("rsp")) == (r9, r10, 77, stack)


def test_a_device_in_a_body() -> None:
    text = """
        start: mov rbx, MMIO
        mov ecx, 9
        top: add r9, [rbx]
        mov [rbx + 8], r9
        xor r10, r9
        dec ecx
        jne top
        hlt
    """
    with Tiny(TranslateEngine(), text) as guest:
        guest.io.device[0:8] = (5).to_bytes(8, "little")
        guest.set(r9=100, r10=0, r15=7)
        guest.run()
        r10 = 0
        for i in range(1, 10):
            r10 ^= 100 + 5 * i
        assert (guest.reg("r9"), guest.reg("r10"), guest.reg("r15")) == (145, r10, 7)
        written = [value for kind, where, _, value in guest.io.log if kind == "write" and where == MMIO + 8]
        assert written == [100 + 5 * i for i in range(1, 10)]


def test_somebody_looks_in() -> None:
    """A vCPU that is stopped in a body shows its registers as they are."""
    text = """
        start: mov r9, 1
        mov r10, 0x7777
        xor ecx, ecx
        top: add r9, 2
        lea r10, [r10 + 4]
        inc rcx
        test r11, r11
        je top
        hlt
    """
    with Tiny(TranslateEngine(), text) as guest:
        guest.set(r15=99, r11=0)
        stack = guest.reg("rsp")
        seen = 0
        while seen < 20:
            timer = threading.Timer(0.005, guest.vcpu.request_exit)
            timer.start()
            guest.vcpu.run()
            timer.join()
            state = guest.state
            if state["rip"] == guest.program["start"]:
                continue
            seen += 1
            assert state["r9"] == 1 + 2 * state["rcx"] and state["r10"] == 0x7777 + 4 * state["rcx"]
            assert (state["r15"], state["rsp"]) == (99, stack)
        assert guest.vcpu.counts[Kind.BREAK]  # type: ignore[attr-defined]
        assert guest.reg("rcx") > 1000


class Loops(Generator):
    """Loops of integer instructions that mostly leave the stack alone, with ways out."""

    def _step(self) -> None:
        self.theme = "integer"
        if self.rng.random() < 0.3:
            self._plain()
            return
        rng = self.rng
        counter = rng.choice((Register.RCX, Register.RBX, Register.R8, Register.R9, Register.R11, Register.R13))
        if counter in self.reserved:
            return
        self._make(Code.MOV_R32_IMM32, Reg(counter - Register.RAX + Register.EAX), Imm(rng.randint(2, 9)))
        table = self._table_for(counter) if rng.random() < 0.5 else None
        top, end = Label(), Label()
        self.items.append(top)
        self.known = {r: v for r, v in self.known.items() if rng.random() < 0.6}
        with self._reserve(counter, Register.RSP, *([] if table is None else [table.base])):
            before = dict(self.known)
            if table is not None:
                byte = rng.choice((Register.AL, Register.CL, Register.DH, Register.DIL, Register.R12L))
                self._make(Code.MOVZX_R32_RM8, Reg(table.index - Register.RAX + Register.EAX), Reg(byte))
                self._make(rng.choice(READS), Reg(rng.choice((Register.RDX, Register.RBP, Register.R14))), table)
            for _ in range(rng.randint(1, 7)):
                if rng.random() < 0.1:
                    self._emit(self._branch_to(rng.choice(OUT)), end)
                self._plain()
        self._make(Code.DEC_RM64, Reg(counter))
        self._emit(self._branch_to(Code.JNE_REL32_64), top)
        self.items.append(end)
        self._forget(before)


    def _table_for(self, counter: int) -> Mem | None:
        """A table at a register that it loads."""
        rng = self.rng
        base, index = rng.choice((Register.RBX, Register.RDI, Register.R10)), rng.choice((Register.RCX, Register.RSI))
        if counter in (base, index):
            return None
        disp = rng.choice((0, 64, -0x1000))
        self._load(base, DATA + self._place(8, 0.5) - disp)
        return Mem(base, index, rng.choice((1, 2, 4, 8)), disp)


def check(host: Oracle, seed: str, count: int) -> None:
    generator = Loops(seed)
    with GuestCpu(translate()) as guest:
        failed = list(run_sequences(generator, count, host, guest))
        shown = "\n\n".join(str(minimize(mismatch, host, guest)) for mismatch in failed[:3])
    assert not failed, f"{len(failed)} of {count} sequences differ from the host CPU:\n\n{shown}"


def test_random_loops(host: Oracle) -> None:
    check(host, "loops", 1500)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_random_loops(host: Oracle, part: int) -> None:
    check(host, f"loops{part}-{secrets.token_hex(4)}", 10_000)
