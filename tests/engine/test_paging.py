"""Paging: who may do what, with which error code; accessed and dirty bits; when a change of the tables is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skep.engine.amd64.registers import Cr0, Cr4, Pte
from tests.engine.place import PAGE
from tests.engine.tiny import IDENTITY, Tiny

Boot = Callable[..., Tiny]

V = 0x400000
"""A page of virtual memory that only these tests map."""
G, H = 0x300000, 0x301000
"""Guest-physical pages for it."""
LARGE = 0x600000

READ, WRITE = "mov rax, [V]", "mov qword [V], 5"
FETCH = "mov rax, V\njmp rax"
NAMES = {"V": V, "LARGE": LARGE}


def make(boot: Boot, text: str, **options: object) -> Tiny:
    return boot(text, symbols={**NAMES, "G": G, "H": H}, **options)


def at_end(guest: Tiny) -> None:
    """The program came to its HLT."""
    guest.run()
    assert guest.exception is None, guest.exception


@pytest.mark.parametrize(
    ("text", "flags", "user", "error"),
    [
        (READ, None, False, 0),
        (WRITE, None, False, 2),
        (READ, None, True, 4),
        (WRITE, None, True, 6),
        (FETCH, None, False, 0x10),
        (FETCH, None, True, 0x14),
        (WRITE, 0, False, 3),
        (WRITE, Pte.US, True, 7),
        (READ, Pte.RW, True, 5),
        (WRITE, Pte.RW, True, 7),
        (FETCH, Pte.RW, True, 0x15),
        (FETCH, Pte.NX, False, 0x11),
        (FETCH, Pte.NX | Pte.US, True, 0x15),
        (READ, Pte.RW | 1 << 45, False, 9),
        (WRITE, Pte.RW | 1 << 51, False, 0xB),
        ("inc byte [V + 7]", None, False, 2),
        ("lock cmpxchg [V], rax", 0, False, 3),
        ("cmp dword [V], 5", None, True, 4),
        ("push qword [V]", None, False, 0),
        ("pop qword [V]", None, False, 2),
        ("mov rdi, V\nstosq", None, True, 6),
        ("mov rsi, V\nlodsb", None, True, 4),
        ("movups [V], xmm0", 0, False, 3),
        ("bts qword [V], 3", 0, False, 3),
        ("bt qword [V], 3", None, False, 0),
        ("xchg [V], al", Pte.US, True, 7),
    ],
)
def test_error_codes(boot: Boot, text: str, flags: int | None, user: bool, error: int) -> None:
    *before, last = text.splitlines()
    guest = make(boot, "\n".join([*before, f"last: {last}", "hlt"]), user=user)
    if flags is not None:
        guest.map(V, G, flags)
    guest.run()
    frame = guest.exception
    assert frame is not None
    assert (frame.vector, frame.error, frame.cr2) == (14, error, V + 7 if "+ 7" in text else V)
    assert frame.rip == (V if text == FETCH else guest.program["last"])
    assert frame.cs & 3 == (3 if user else 0)
    if user:
        assert frame.ss & 3 == 3


def test_supervisor_writes_read_only_pages_without_wp(boot: Boot) -> None:
    guest = make(boot, f"{WRITE}\nhlt")
    guest.map(V, G, 0)
    guest.set(cr0=guest.state["cr0"] & ~Cr0.WP)
    at_end(guest)
    assert guest.load(G) == 5


def test_rights_are_of_all_levels(boot: Boot) -> None:
    for level in (2, 3, 4):
        for missing, text, error in ((Pte.US, READ, 5), (Pte.RW, WRITE, 7)):
            va = V + (1 << 39)  # a branch of the tree of its own
            text_there = text.replace("[V]", "[rbx]")
            guest = make(boot, f"mov rbx, V + (1 << 39)\n{text_there}\nhlt", user=True)
            guest.map(va, G, Pte.US | Pte.RW)
            where = guest.entry(va, level)
            guest.memory.store_u64(where, guest.memory.load_u64(where) & ~missing)
            guest.run()
            frame = guest.exception
            assert frame is not None and (frame.vector, frame.error, frame.cr2) == (14, error, va), (level, text)


def test_smep(boot: Boot) -> None:
    for smep in (False, True):
        guest = make(boot, FETCH)
        guest.map(V, G, Pte.US)
        guest.memory.write(G, b"\xf4")
        guest.set(cr4=guest.state["cr4"] | (Cr4.SMEP if smep else 0))
        guest.run()
        frame = guest.exception
        if smep:
            assert frame is not None and (frame.vector, frame.error, frame.cr2, frame.rip) == (14, 0x11, V, V)
        else:
            assert frame is None and guest.reg("rip") == V + 1


@pytest.mark.parametrize(
    "text", [READ, WRITE, "push qword [V]", "add [V], rax", "mov rsi, V\nlodsq", "movups xmm0, [V]"]
)
@pytest.mark.parametrize(
    "allow",
    [
        "",
        "stac\n",
        "clac\nstac\n",
        "stac\nstac\n",
        "stac\nclac\n",
        "push 0x40002\npopfq\n",
        "push 0x40002\npopfq\nclac\n",
    ],
)
def test_smap(boot: Boot, text: str, allow: str) -> None:
    """User pages are the supervisor's only while RFLAGS.AC is set."""
    guest = make(
        boot, f"mov rax, [PROGRAM_DATA]\n{allow}{text}\nhlt".replace("PROGRAM_DATA", "rip + data") + "\ndata: dq 1"
    )
    guest.map(V, G, Pte.US | Pte.RW)
    guest.set(cr4=guest.state["cr4"] | Cr4.SMAP)
    guest.run()
    frame = guest.exception
    if allow in ("", "stac\nclac\n", "push 0x40002\npopfq\nclac\n"):
        writes = text == WRITE or text.startswith("add")
        assert frame is not None and (frame.vector, frame.error, frame.cr2) == (14, 3 if writes else 1, V)
    else:
        assert frame is None


def test_smap_counts_after_the_page_was_used_with_ac(boot: Boot) -> None:
    """The two TLBs are two: what STAC let in is not seen after CLAC."""
    guest = make(boot, f"stac\n{READ}\n{WRITE}\nclac\nlast: {READ}\nhlt")
    guest.map(V, G, Pte.US | Pte.RW)
    guest.set(cr4=guest.state["cr4"] | Cr4.SMAP)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.error, frame.rip) == (14, 1, guest.program["last"])


def test_delivery_leaves_ac_alone(boot: Boot) -> None:
    """Delivery leaves AC as it is: a handler that came by an interrupt gate may touch what its caller might."""
    text = f"""
        start: stac
        int 0x80
        hlt
        handler: pushfq
        pop rbx
        {READ}
        hlt
    """
    guest = make(boot, text, handlers={0x80: "handler"})
    guest.map(V, G, Pte.US | Pte.RW)
    guest.set(cr4=guest.state["cr4"] | Cr4.SMAP)
    at_end(guest)
    assert guest.reg("rbx") & 0x40000


class TestAccessedAndDirty:
    def bits(self, guest: Tiny, va: int, level: int = 1) -> int:
        return guest.memory.load_u64(guest.entry(va, level)) & (Pte.A | Pte.D)

    def test_read(self, boot: Boot) -> None:
        guest = make(boot, f"{READ}\nhlt")
        guest.map(V, G)
        at_end(guest)
        assert self.bits(guest, V) == Pte.A
        for level in (2, 3, 4):
            assert self.bits(guest, V, level) & Pte.A

    def test_write(self, boot: Boot) -> None:
        guest = make(boot, f"{WRITE}\nhlt")
        guest.map(V, G)
        at_end(guest)
        assert self.bits(guest, V) == Pte.A | Pte.D

    def test_read_then_write(self, boot: Boot) -> None:
        """A translation filled by a read lets no write by without D."""
        guest = make(boot, f"{READ}\nout 0xf4, al\n{WRITE}\nhlt")
        guest.map(V, G)
        seen: list[int] = []
        guest.io.on_write = lambda port, size, value: seen.append(self.bits(guest, V))
        at_end(guest)
        assert seen == [Pte.A] and self.bits(guest, V) == Pte.A | Pte.D

    def test_execute(self, boot: Boot) -> None:
        guest = make(boot, FETCH)
        guest.map(V, G)
        guest.memory.write(G, b"\xf4")
        at_end(guest)
        assert self.bits(guest, V) == Pte.A

    def test_denied_write_sets_no_d(self, boot: Boot) -> None:
        guest = make(boot, f"{WRITE}\nhlt")
        guest.map(V, G, 0)
        guest.run()
        assert guest.exception is not None and not self.bits(guest, V) & Pte.D

    def test_large_page(self, boot: Boot) -> None:
        guest = make(boot, "mov rax, [LARGE + 0x12345]\nout 0xf4, al\nmov [LARGE + 0x1fff00], rax\nhlt")
        guest.map(LARGE, 0x200000, level=2)
        guest.memory.store_u64(0x200000 + 0x12345, 0x1122334455667788)
        seen: list[int] = []
        guest.io.on_write = lambda port, size, value: seen.append(self.bits(guest, LARGE, 2))
        at_end(guest)
        assert guest.reg("rax") == 0x1122334455667788 == guest.load(0x200000 + 0x1FFF00)
        assert seen == [Pte.A] and self.bits(guest, LARGE, 2) == Pte.A | Pte.D

    def test_cleared_bits_come_back_after_invlpg(self, boot: Boot) -> None:
        guest = make(boot, f"{WRITE}\nout 0xf4, al\ninvlpg [V]\n{READ}\nout 0xf4, al\n{WRITE}\nhlt")
        where = guest.map(V, G)
        seen: list[int] = []

        def clear(port: int, size: int, value: int) -> None:
            seen.append(self.bits(guest, V))
            guest.memory.store_u64(where, guest.memory.load_u64(where) & ~(Pte.A | Pte.D))

        guest.io.on_write = clear
        at_end(guest)
        assert seen == [Pte.A | Pte.D, Pte.A]
        assert self.bits(guest, V) & Pte.D


def switching(boot: Boot, invalidate: str, flags: int, *, level: int = 1, **state: int) -> Tiny:
    """Read V, let the host change the entry, ``invalidate``, read V again: rax before, rcx after."""
    va = "V" if level == 1 else "LARGE + 0x3000"
    guest = make(boot, f"mov rax, [{va}]\nout 0xf4, al\n{invalidate}\nmov rcx, [{va}]\nhlt\ndescriptor: dq 0, V")
    first, second = (G, H) if level == 1 else (0x200000, 0x400000)
    offset = 0 if level == 1 else 0x3000
    guest.memory.store_u64(first + offset, 1)
    guest.memory.store_u64(second + offset, 2)
    where = guest.map(V if level == 1 else LARGE, first, flags, level=level)
    large = Pte.PS if level == 2 else 0

    def change(port: int, size: int, value: int) -> None:
        guest.memory.store_u64(where, second | flags | large | Pte.P)

    guest.io.on_write = change
    if state:
        guest.set(**{name: guest.state[name] | value for name, value in state.items()})
    at_end(guest)
    assert guest.reg("rax") == 1
    return guest


@pytest.mark.parametrize(
    ("invalidate", "flags"),
    [
        ("invlpg [V]", Pte.RW),
        ("invlpg [V + 0xabc]", Pte.RW),
        ("invlpg [V]", Pte.RW | Pte.G),
        ("mov rdx, cr3\nmov cr3, rdx", Pte.RW),
        ("mov rdx, cr4\nxor rdx, 0x80\nmov cr4, rdx", Pte.RW | Pte.G),
        ("mov rdx, cr4\nxor rdx, 0x80\nmov cr4, rdx", Pte.RW),
        ("mov rdx, cr0\nbtr rdx, 16\nmov cr0, rdx\nbts rdx, 16\nmov cr0, rdx\ninvlpg [V]", Pte.RW),
        ("mov edx, 0\ninvpcid rdx, [rip + descriptor]", Pte.RW),
        ("mov edx, 2\ninvpcid rdx, [rip + descriptor]", Pte.RW | Pte.G),
        ("mov edx, 3\ninvpcid rdx, [rip + descriptor]", Pte.RW),
    ],
)
def test_a_changed_entry_is_seen_after(boot: Boot, invalidate: str, flags: int) -> None:
    assert switching(boot, invalidate, flags).reg("rcx") == 2


@pytest.mark.parametrize("invalidate", ["invlpg [LARGE]", "invlpg [LARGE + 0x1ff000]", "mov rdx, cr3\nmov cr3, rdx"])
def test_a_changed_large_page_is_seen_after(boot: Boot, invalidate: str) -> None:
    """INVLPG anywhere inside a large page drops all of it."""
    assert switching(boot, invalidate, Pte.RW, level=2).reg("rcx") == 2


def test_more_rights_need_no_invalidation(boot: Boot) -> None:
    """A page that becomes present, or writable, is so at once: only less needs telling (SDM 3, 4.10.4.3)."""
    text = f"start: {READ}\nout 0xf4, al\n{WRITE}\nmov rbx, V + 4096\nmov rcx, [rbx]\nhlt\n"
    text += "fault: add rsp, 8\nout 0xf5, al\niretq"
    guest = make(boot, text, handlers={14: "fault"})
    where, other = guest.map(V, G, 0), guest.entry(V + PAGE)

    def change(port: int, size: int, value: int) -> None:
        if port == 0xF4:
            guest.memory.store_u64(where, G | Pte.P | Pte.RW)
        else:
            guest.memory.store_u64(other, H | Pte.P)

    guest.io.on_write = change
    at_end(guest)
    assert guest.load(G) == 5
    assert len(guest.io.outs(0xF5)) == 1  # only the page that was not there faulted, once


def test_pcid(boot: Boot) -> None:
    """Two address spaces with PCIDs; CR3 bit 63 keeps what is cached, and what is cached belongs to its PCID."""
    text = """
        mov rax, [V]            ; PCID 1
        mov rbx, OTHER | 2 | 1 << 63
        mov cr3, rbx
        mov rcx, [V]            ; PCID 2
        mov rbx, PML4 | 1 | 1 << 63
        mov cr3, rbx
        mov rdx, [V]
        mov rbx, cr3
        hlt
    """
    guest = make(boot, text.replace("OTHER", str(0x5F000)))
    other = 0x5F000
    guest.memory.write(other, guest.memory.read(guest.cr3, PAGE))
    # a PML4 of its own, and below it its own way to V
    names = [guest.new_table() for _ in range(3)]
    guest.memory.write(names[0], guest.memory.read(guest.memory.load_u64(guest.cr3) & Pte.ADDRESS, PAGE))
    directory = guest.memory.load_u64(guest.memory.load_u64(guest.cr3) & Pte.ADDRESS) & Pte.ADDRESS
    guest.memory.write(names[1], guest.memory.read(directory, PAGE))
    guest.memory.store_u64(other, names[0] | Pte.P | Pte.RW)
    guest.memory.store_u64(names[0], names[1] | Pte.P | Pte.RW)
    guest.memory.store_u64(names[1] + 8 * (V >> 21), names[2] | Pte.P | Pte.RW)
    guest.memory.store_u64(names[2] + 8 * (V >> 12 & 0x1FF), H | Pte.P | Pte.RW)
    guest.map(V, G)
    guest.memory.store_u64(G, 1)
    guest.memory.store_u64(H, 2)
    guest.set(cr4=guest.state["cr4"] | Cr4.PCIDE, cr3=guest.cr3 | 1)
    at_end(guest)
    assert [guest.reg(r) for r in ("rax", "rcx", "rdx")] == [1, 2, 1]
    assert guest.reg("rbx") == guest.cr3 | 1


def test_invlpg_between_two_operands_of_a_block(boot: Boot) -> None:
    """What the operands of a block share ends where the page may become another."""
    text = """
        start: mov rdx, ENTRY
        mov rbx, V
        mov eax, H | 3
        mov qword [rbx], 1
        mov qword [rbx + 8], 2
        mov [rdx], rax
        invlpg [rbx]
        mov qword [rbx + 16], 3
        mov rcx, [rbx + 24]
        hlt
    """
    guest = make(boot, text.replace("ENTRY", str(0x40000 + 8 * (V >> 12 & 511))))
    table = guest.map(V, G)
    guest.map(0x40000, table & ~(PAGE - 1))
    guest.memory.store_u64(H + 24, 4)
    at_end(guest)
    assert [guest.load(G + 8 * i) for i in range(3)] == [1, 2, 0]
    assert guest.load(H + 16) == 3 and guest.reg("rcx") == 4


def test_an_address_space_without_the_page(boot: Boot) -> None:
    """After a CR3 load what the old tables mapped is gone, global pages of the old space being the guest's business."""
    guest = make(boot, f"{READ}\nmov rbx, OTHER\nmov cr3, rbx\nlast: {READ}\nhlt".replace("OTHER", str(0x5F000)))
    guest.map(V, G)
    tables = [0x5F000, *(guest.new_table() for _ in range(2))]
    old = guest.cr3
    for table in tables:  # PML4, page-directory-pointer table, page directory
        guest.memory.write(table, guest.memory.read(old, PAGE))
        old = guest.memory.load_u64(old) & Pte.ADDRESS
    guest.memory.store_u64(tables[0], tables[1] | Pte.P | Pte.RW)
    guest.memory.store_u64(tables[1], tables[2] | Pte.P | Pte.RW)
    guest.memory.store_u64(tables[2] + 8 * (V >> 21), 0)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.error, frame.cr2, frame.rip) == (14, 0, V, guest.program["last"])


def test_one_gib_page(boot: Boot) -> None:
    va = 3 << 39
    guest = make(boot, "mov rbx, 3 << 39\nmov rax, [rbx + 0x300008]\nmov [rbx + 0x301000], rax\nhlt")
    where = guest.entry(va, 3)
    guest.memory.store_u64(where, Pte.P | Pte.RW | Pte.PS)
    guest.memory.store_u64(G + 8, 77)
    at_end(guest)
    assert guest.load(H) == 77
    assert guest.memory.load_u64(where) & (Pte.A | Pte.D) == Pte.A | Pte.D


def test_an_instruction_across_pages_faults_at_the_second(boot: Boot) -> None:
    """CR2 is the second page, RIP the instruction; with the page there, it runs."""
    machine = bytes.fromhex("48b8 8877665544332211 f4")  # mov rax, imm64; hlt
    for present in (False, True):
        guest = make(boot, "mov rax, V + 4096 - 4\njmp rax")
        guest.map(V, G)
        if present:
            guest.map(V + PAGE, H)
        guest.memory.write(G + PAGE - 4, machine)
        guest.run()
        frame = guest.exception
        if present:
            assert frame is None and guest.reg("rax") == 0x1122334455667788
        else:
            assert frame is not None
            assert (frame.vector, frame.error, frame.cr2, frame.rip) == (14, 0x10, V + PAGE, V + PAGE - 4)


def test_memory_outside_ram_reads_all_ones(boot: Boot) -> None:
    guest = make(boot, "mov rax, [V]\nmov dword [V], 1\nhlt")
    guest.map(V, 0xE0000000)
    at_end(guest)
    assert guest.reg("rax") == (1 << 64) - 1


def test_physical_addresses_do_not_escape(boot: Boot) -> None:
    """A translation to just behind RAM, and far behind it, is no RAM."""
    for gpa in (16 << 20, (16 << 20) + PAGE, 1 << 32, (1 << 40) - PAGE):
        guest = make(boot, "mov rax, [V + 8]\nmov qword [V + 8], 1\nmovups xmm1, [V]\nhlt")
        guest.map(V, gpa)
        at_end(guest)
        assert guest.reg("rax") == (1 << 64) - 1, hex(gpa)


def test_identity_is_what_tiny_says(boot: Boot) -> None:
    guest = make(boot, "mov rax, [END]\nhlt".replace("END", str(IDENTITY)))
    guest.run()
    assert guest.exception is not None and guest.exception.cr2 == IDENTITY


@pytest.mark.parametrize("how", ["cr3", "invlpg", "another page", "read-only"])
def test_the_stacks_page_changes(boot: Boot, how: str) -> None:
    """What is known of the page under RSP goes with its translation."""
    V, G, H = 0x600000, 0x300000, 0x301000
    change = {
        "cr3": "mov rax, [rip + new]\nmov [rip + entry], rax\nmov rax, cr3\nmov cr3, rax",
        "invlpg": "mov rax, [rip + new]\nmov rbx, [rip + where]\nmov [rbx], rax\ninvlpg [rsp]",
        "another page": "lea rsp, [rsp + 0x1000]",
        "read-only": "mov rax, [rip + new]\nmov rbx, [rip + where]\nmov [rbx], rax\ninvlpg [rsp]",
    }[how].replace("mov [rip + entry], rax", "mov rbx, [rip + where]\nmov [rbx], rax")
    text = f"""
        start: mov rsp, {V + 0x800}
        push 1
        push 2
        add [rsp + 8], rsp
        pop rcx
        {change}
        push 3
        mov r8, [rsp]
        mov dword [rsp + rcx * 8], 9
        hlt
        new: dq 0
        where: dq 0
    """
    guest = boot(text, ist={14: 1})
    entry = guest.map(V, G)
    guest.map(V + PAGE, H)
    flags = Pte.P | Pte.A | Pte.D | (0 if how == "read-only" else Pte.RW)
    guest.memory.store_u64(guest.program["new"], (G if how == "read-only" else H) | flags)
    guest.memory.store_u64(guest.program["where"], entry)
    guest.run()
    if how == "read-only":
        assert guest.exception is not None
        assert (guest.exception.vector, guest.exception.error, guest.exception.cr2) == (14, 3, V + 0x7F0)
        return
    assert guest.exception is None
    assert guest.reg("r8") == 3
    assert guest.load(G + 0x7F8) == 1 + V + 0x7F0
    assert guest.load(H + 0x7F0) == 3
    assert guest.load(H + 0x800, 4) == 9
    assert guest.load(G + 0x7F0) == 2


@pytest.mark.parametrize("level", [2, 3, 4])
def test_reserved_bits_of_a_directory_are_seen_before_what_it_leads_to(boot: Boot, level: int) -> None:
    """The page below is not present, and still the fault is for the reserved bit."""
    va = V + (1 << 39)
    for bit, nxe in ((1 << 45, True), (Pte.NX, False), (Pte.PS if level == 4 else 1 << 51, True)):
        guest = make(boot, f"mov rbx, {va}\nmov rax, [rbx]\nhlt")
        guest.map(va, G, Pte.RW)
        guest.memory.store_u64(guest.entry(va), 0)
        where = guest.entry(va, level)
        guest.memory.store_u64(where, guest.memory.load_u64(where) | bit)
        guest.set(efer=guest.state["efer"] & ~(0 if nxe else 1 << 11))
        guest.run()
        frame = guest.exception
        assert frame is not None and (frame.vector, frame.error, frame.cr2) == (14, 9, va), (level, hex(bit))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_program_s_invlpg_costs_the_kernel_nothing(boot: Boot, level: int) -> None:
    """A kernel's code, and all memory in its large pages, is where every table in the translator that goes by some bits
    of an address takes it for the program's page."""
    size = 1 << 12 + 9 * (level - 1)
    upper = 0xFFFF_8000_0000_0000 | V // size * size
    inner = upper + G % size
    text = f"""
        mov rbx, {inner}
        mov ecx, 1000
        again: mov rax, [V]
        call rbx
        invlpg [V]
        dec ecx
        jnz again
        hlt
    """
    guest = make(boot, text)
    guest.map(V, H)
    guest.map(upper, G // size * size, Pte.RW | Pte.G, level=level)
    guest.memory.write(G, b"\xc3")
    at_end(guest)
    assert guest.reg("rcx") == 0
    state = guest.vcpu.st  # type: ignore[attr-defined]
    assert state.n_miss < 100 and state.n_fill < 1200
