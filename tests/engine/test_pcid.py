"""Address spaces with PCIDs: the guest sees what its page tables say, or what it was not yet told to forget.

A program does one step after the other as Python writes them; a model knows what each step may see (SDM 3, 4.10).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from skep.engine.amd64.registers import Cr0, Cr4, Pte, Vector
from skep.engine.translate.layout import Kind
from tests.engine.place import PAGE
from tests.engine.tiny import Tiny

Boot = Callable[..., Tiny]

V = 1 << 39
"""The first of the pages that differ from space to space; below it all spaces are the same."""
PAGES = 4
GLOBAL = V + (2048 << 12)
"""A global page, of one frame in all spaces. It shares a TLB entry with the first page."""
FRAMES = [0x300000 + (n << 12) for n in range(8)]
COMMAND = 0xF0000
PCIDS = (1, 2, 9, 10, 0xFFF, 0)
"""Some differ only in bits that a small table would not look at."""
NO_FLUSH = 1 << 63
ONE, CONTEXT, EVERYTHING, ALL_BUT_GLOBAL = range(4)

PROGRAM = f"""
    start: mov rbp, {COMMAND}
    next: out 0xF0, al
    mov rax, [rbp]
    mov rbx, [rbp + 8]
    mov rcx, [rbp + 16]
    lea rdx, [rip + steps]
    jmp qword [rdx + rax * 8]
    step_read: mov rax, [rbx + 0x100]
    mov [rbp + 24], rax
    jmp next
    step_call: call rbx
    mov [rbp + 24], rax
    jmp next
    step_write: mov dword [rbx + 1], ecx
    jmp next
    step_cr3: mov cr3, rbx
    jmp next
    step_invlpg: invlpg [rbx]
    jmp next
    step_invpcid: invpcid rcx, [rbp + 32]
    jmp next
    step_cr0: mov cr0, rbx
    jmp next
    step_stop: hlt
    align 8
    steps: dq step_read, step_call, step_write, step_cr3, step_invlpg, step_invpcid, step_cr0, step_stop
"""
PLACES = (*range(V, V + PAGES * PAGE, PAGE), GLOBAL)
WHAT = ("read", "call", "write", "cr3", "change", "invlpg", "invpcid")
STEPS = ("read", "call", "write", "cr3", "invlpg", "invpcid", "cr0", "stop")


class Spaces:
    """The guest, and what may be seen where: frames by PCID and page."""

    def __init__(self, guest: Tiny, choose: random.Random) -> None:
        self.guest, self.choose = guest, choose
        memory = guest.memory
        self.tables = {pcid: guest.cr3 if pcid == 0 else guest.new_table() for pcid in PCIDS}
        for table in self.tables.values():
            memory.store_u64(table, memory.load_u64(guest.cr3))
        self.code = {}
        for number, frame in enumerate(FRAMES):
            memory.write(frame, b"\xb8" + number.to_bytes(4, "little") + b"\xc3")  # mov eax, number; ret
            memory.store_u64(frame + 0x100, number)
            self.code[frame] = number
        self.may: dict[tuple[int, int], set[int]] = {}
        self.now: dict[tuple[int, int], int] = {}
        for pcid in PCIDS:
            for va in PLACES[:-1]:
                self.change(pcid, va, choose.choice(FRAMES))
        self.change_global(FRAMES[0])
        self.told(*self.may)
        self.pcid = 0
        self.weights = [choose.random() ** 3 + 0.01 for _ in WHAT]
        self.expected: Callable[[int], None] | None = None
        self.left = 0

    def change(self, pcid: int, va: int, frame: int) -> None:
        self.guest.map(va, frame, cr3=self.tables[pcid])
        self.now[pcid, va] = frame
        self.may.setdefault((pcid, va), set()).add(frame)

    def change_global(self, frame: int) -> None:
        for pcid in PCIDS:
            self.guest.map(GLOBAL, frame, Pte.RW | Pte.G, cr3=self.tables[pcid])
        self.now[-1, GLOBAL] = frame
        self.may.setdefault((-1, GLOBAL), set()).add(frame)

    def told(self, *places: tuple[int, int]) -> None:
        """What was seen there before may not be seen any more."""
        for place in places:
            self.may[place] = {self.now[place]}

    def of(self, pcid: int) -> list[tuple[int, int]]:
        return [place for place in self.may if place[0] == pcid]

    def step(self, *, port: int, size: int, value: int) -> None:
        """The program asks what to do."""
        memory, choose = self.guest.memory, self.choose
        if self.expected is not None:
            self.expected(memory.load_u64(COMMAND + 24))
            self.expected = None
        self.left -= 1
        if self.left < 0:
            return self.command("stop")
        va = choose.choice(PLACES)
        place = (-1 if va == GLOBAL else self.pcid, va)
        (what,) = choose.choices(WHAT, self.weights)
        if what == "change":
            if va == GLOBAL:
                self.change_global(choose.choice(FRAMES))
            else:
                self.change(choose.choice(PCIDS), va, choose.choice(FRAMES))
            what = choose.choice(("read", "call"))
        if what in ("read", "call"):
            may = self.may[place]

            def seen(got: int) -> None:
                want = {FRAMES.index(frame) if what == "read" else self.code[frame] for frame in may}
                assert got in want, f"{what} at {place}: {got}, not {want}"

            self.expected = seen
            self.command(what, va)
        elif what == "write":
            if len(self.may[place]) > 1:
                self.told(place)
                self.command("invlpg", va)
            else:
                self.code[self.now[place]] = number = choose.randrange(1 << 30)
                self.command("write", va, number)
        elif what == "cr3":
            self.pcid = choose.choice(PCIDS)
            keep = choose.random() < 0.7
            if not keep:
                self.told(*self.of(self.pcid))
            self.command("cr3", self.tables[self.pcid] | self.pcid | keep * NO_FLUSH)
        elif what == "invlpg":
            self.told(place)
            self.command("invlpg", va + choose.randrange(PAGE))
        else:
            self.invpcid(choose.choice((ONE, CONTEXT, EVERYTHING, ALL_BUT_GLOBAL)), va)

    def invpcid(self, kind: int, va: int) -> None:
        pcid = self.choose.choice(PCIDS)
        if kind == ONE:
            self.told(*[(pcid, va)] * (va != GLOBAL))
        elif kind == CONTEXT:
            self.told(*self.of(pcid))
        else:
            self.told(*(place for place in self.may if kind == EVERYTHING or place[0] >= 0))
        self.guest.memory.store_u64(COMMAND + 32, pcid)
        self.guest.memory.store_u64(COMMAND + 40, va)
        self.command("invpcid", 0, kind)

    def command(self, what: str, first: int = 0, second: int = 0) -> None:
        for i, word in enumerate((STEPS.index(what), first, second)):
            self.guest.memory.store_u64(COMMAND + 8 * i, word)


def start(boot: Boot, seed: int) -> Spaces:
    guest = boot(PROGRAM)
    spaces = Spaces(guest, random.Random(seed))
    guest.set(cr4=guest.state["cr4"] | Cr4.PCIDE)
    guest.io.on_write = lambda port, size, value: spaces.step(port=port, size=size, value=value)
    return spaces


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_seen_that_was_to_be_forgotten(boot: Boot, seed: int) -> None:
    spaces = start(boot, seed)
    spaces.left = 1500
    spaces.guest.run()
    assert spaces.guest.exception is None and spaces.left == -1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_for_long(boot: Boot, seed: int) -> None:
    spaces = start(boot, seed)
    spaces.left = 20000
    spaces.guest.run(timeout=120)
    assert spaces.guest.exception is None and spaces.left == -1


def script(spaces: Spaces, steps: Iterable[tuple[str, int]]) -> list[int]:
    """Do these steps; how often TLB and jump cache had missed before each."""
    guest, misses, left = spaces.guest, list[int](), iter(steps)

    def step(port: int, size: int, value: int) -> None:
        misses.append(guest.vcpu.st.n_fill + guest.vcpu.st.n_miss)  # type: ignore[attr-defined]
        spaces.command(*next(left))

    guest.io.on_write = step
    guest.run()
    return misses


def test_what_is_kept(boot: Boot) -> None:
    """Going to another PCID and back misses nothing."""
    spaces = start(boot, 0)
    there = [("read", va) for va in PLACES[:-1]] + [("call", V)]
    first, second = (spaces.tables[pcid] | pcid | NO_FLUSH for pcid in (1, 2))
    turn = [("cr3", first), *there, ("cr3", second), *there]
    misses = script(spaces, [*turn, *turn, *turn, ("stop", 0)])
    assert spaces.guest.exception is None
    begin = 2 * len(turn)
    assert misses[begin] - misses[0] > 10
    assert misses[begin + len(turn)] == misses[begin]


def test_without_an_exit(boot: Boot) -> None:
    """CR3 loads, INVLPG and INVPCID."""
    spaces = start(boot, 0)
    vcpu = spaces.guest.vcpu
    first = spaces.tables[1] | 1 | NO_FLUSH
    steps = [("cr3", first), ("invlpg", V), *[("invpcid", 0)] * 4] * 10
    script(spaces, [*steps, ("stop", 0)])
    assert vcpu.counts[Kind.EMULATE] == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "pcid", "va", "enabled"),
    [(4, 1, 0, True), (0, 0x1000, 0, True), (3, 0x1000, 0, True), (0, 1, 1 << 47, True), (1, 5, 0, False)],
)
def test_invpcid_refuses(boot: Boot, kind: int, pcid: int, va: int, enabled: bool) -> None:
    """#GP(0) (SDM 2, INVPCID)."""
    guest = boot(
        "start: mov eax, KIND\nwrong: invpcid rax, [rip + what]\nhlt\nalign 16\nwhat: dq PCID, VA".replace(
            "KIND", str(kind)
        )
        .replace("PCID", str(pcid))
        .replace("VA", str(va))
    )
    if enabled:
        guest.set(cr4=guest.state["cr4"] | Cr4.PCIDE)
    guest.run()
    assert guest.exception is not None
    assert (guest.exception.vector, guest.exception.error) == (Vector.GP, 0)
    assert guest.exception.rip == guest.program["wrong"]


def test_what_became_illegal_meanwhile(boot: Boot) -> None:
    """Code that was reached under one PCID, while CR0.TS is set under another."""
    spaces = start(boot, 0)
    guest = spaces.guest
    guest.memory.write(spaces.now[1, V], bytes.fromhex("0f57c0c3"))  # xorps xmm0, xmm0; ret
    first, second = (spaces.tables[pcid] | pcid | NO_FLUSH for pcid in (1, 2))
    task_switched = guest.state["cr0"] | Cr0.TS
    steps = [("cr3", first), ("call", V), ("cr3", second), ("cr0", task_switched), ("cr3", first), ("call", V)]
    script(spaces, [*steps, ("stop", 0)])
    assert guest.exception is not None and (guest.exception.vector, guest.exception.rip) == (Vector.NM, V)
