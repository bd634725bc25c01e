"""32-bit paging and PAE paging (SDM 3, 4.3 and 4.4): who may do what, accessed and dirty bits, large pages, PDPTEs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte
from tests.engine.tiny import CODE32, DATA0, GDT, PROGRAM, SEGMENTS, USER32, USER_DATA, Tiny

Boot = Callable[..., Tiny]
ROOT, TABLE0, TABLE1, HIGH = 0x200000, 0x201000, 0x202000, 0x203000
IDT32, TSS32, INNER = 0x205000, 0x206000, 0x207F00
LANDING = 0x208000
V = 0x40400000
"""A page that the tests map, in a directory of its own under PAE."""
G = 0x300000
FORMATS = ("32-bit", "PAE")


class Legacy:
    """A guest with one of the two formats, the first 4 MiB mapped one to one (the user's too), and an IDT
    whose #UD, #GP and #PF gates halt."""

    def __init__(self, boot: Boot, text: str, form: str, *, user: bool = False, **state: Any) -> None:
        self.pae = form == "PAE"
        self.guest = boot(text, bits=32, symbols={"V": V, "G": G, "ROOT": ROOT, "LANDING": LANDING})
        memory = self.guest.memory
        memory.write(ROOT, bytes(0x5000))
        memory.write(LANDING, b"\xf4\xeb\xfd")
        for vector in (6, 13, 14):
            memory.store_u64(IDT32 + 8 * vector, LANDING & 0xFFFF | CODE32 << 16 | 0x8E00 << 32 | LANDING >> 16 << 48)
        memory.write(TSS32, struct.pack("<III", 0, INNER, DATA0))
        self.root(0, TABLE0, identity=True)
        data = SEGMENTS[USER_DATA if user else DATA0]
        self.guest.set(
            cr0=Cr0.PE | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG,
            cr4=(Cr4.PAE if self.pae else 0) | Cr4.PSE | Cr4.PGE,
            cr3=ROOT, efer=Efer.NXE if self.pae else 0,
            cs=SEGMENTS[USER32 if user else CODE32], ss=data, ds=data, es=data, fs=data, gs=data,
            idtr={"base": IDT32, "limit": 0xFF}, gdtr={"base": GDT, "limit": 0x4F},
            tr={"selector": 0x40, "base": TSS32, "limit": 0x67, "attributes": 0x8B},
            **state,
        )  # fmt: skip

    def store(self, table: int, index: int, entry: int) -> int:
        """Returns where the entry lies."""
        at = table + index * (8 if self.pae else 4)
        (self.guest.memory.store_u64 if self.pae else self.guest.memory.store_u32)(at, entry)
        return at

    def load(self, at: int) -> int:
        return self.guest.load(at, 8 if self.pae else 4)

    def root(self, va: int, table: int, *, identity: bool = False) -> None:
        """A branch of the tree for the 2 or 4 MiB at ``va``."""
        memory = self.guest.memory
        memory.write(table, bytes(4096))
        if not self.pae:
            self.store(ROOT, va >> 22, table | 7)
        elif identity:
            memory.store_u64(ROOT, HIGH | 1)
            self.store(HIGH, 0, table | 7)
            self.store(HIGH, 1, 0x200000 | Pte.PS | 7)  # the tables' and the frames' 2 MiB
        else:
            directory = HIGH + 0x1000
            memory.write(directory, bytes(4096))
            memory.store_u64(ROOT + 8 * (va >> 30), directory | 1)
            self.store(directory, va >> 21 & 511, table | 7)
        if identity:
            for page in range(512 if self.pae else 1024):
                self.store(table, page, page << 12 | 7)

    def page(self, entry: int) -> int:
        """Map :data:`V`; the entry's address."""
        self.root(V, TABLE1)
        return self.store(TABLE1, V >> 12 & (511 if self.pae else 1023), entry)

    def large(self, entry: int) -> int:
        """A page of 2 or 4 MiB at :data:`V`."""
        self.root(V, TABLE1)
        directory = HIGH + 0x1000 if self.pae else ROOT
        return self.store(directory, V >> 21 & 511 if self.pae else V >> 22, entry | Pte.PS)

    def run(self) -> tuple[int, int, int] | None:
        """Error code, CR2 and EIP of a fault; None where the program came to its HLT."""
        self.guest.run()
        state = self.guest.state
        if state["rip"] != LANDING + 1:
            return None
        error, eip = struct.unpack("<II", self.guest.memory.read(state["rsp"], 8))
        return error, state["cr2"], eip


READ, WRITE, FETCH = "mov eax, [V]", "mov dword [V], 5", "mov eax, V\njmp eax"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("text", "entry", "user", "error"),
    [
        (READ, 0, False, 0), (WRITE, 0, False, 2), (READ, 0, True, 4), (WRITE, 0, True, 6),
        (WRITE, G | 1, False, 3), (WRITE, G | 5, True, 7), (READ, G | 3, True, 5), (READ, G | 7, True, None),
        (READ, G | 1, False, None), (WRITE, G | 3, False, None),
        ("push dword [V]", 0, True, 4), ("inc byte [V + 3]", G | 5, True, 7),
    ],
)  # fmt: skip
def test_rights(boot: Boot, form: str, text: str, entry: int, user: bool, error: int | None) -> None:
    legacy = Legacy(boot, f"{text}\n" + ("mov ecx, 1\nud2" if user else "hlt"), form, user=user)
    at = legacy.page(entry)
    found = legacy.run()
    if error is None:
        if user:
            assert legacy.guest.reg("rcx") == 1
        assert legacy.load(at) & (Pte.A | Pte.D) == (Pte.A | Pte.D if text == WRITE else Pte.A)
    else:
        assert found == (error, V + (3 if "+ 3" in text else 0), PROGRAM)
        assert legacy.load(at) == entry


@pytest.mark.parametrize("form", FORMATS)
def test_fetch(boot: Boot, form: str) -> None:
    legacy = Legacy(boot, FETCH, form)
    legacy.page(G | 7)
    legacy.guest.memory.write(G, b"\xb9\x2a\0\0\0\xf4")
    assert legacy.run() is None
    assert legacy.guest.reg("rcx") == 42
    legacy = Legacy(boot, FETCH, form)
    legacy.page(0)
    assert legacy.run() == (0x10 if form == "PAE" else 0, V, V)


def test_no_execute_and_reserved_bits_of_pae(boot: Boot) -> None:
    for text, entry, error in (
        (FETCH, Pte.NX | G | 7, 0x11),
        (READ, Pte.NX | G | 7, None),
        (READ, 1 << 45 | G | 7, 9),
        (READ, 1 << 55 | G | 7, 9),
    ):
        legacy = Legacy(boot, f"{text}\nhlt", "PAE")
        legacy.page(entry)
        found = legacy.run()
        assert found == (None if error is None else (error, V, V if text == FETCH else PROGRAM))


def test_addresses_above_4_gib_are_reached_by_pae_and_by_pse_36(boot: Boot) -> None:
    """There is no RAM there: it reads as ones."""
    legacy = Legacy(boot, f"{READ}\nhlt", "PAE")
    legacy.page(1 << 36 | 7)
    assert legacy.run() is None and legacy.guest.reg("rax") == 0xFFFFFFFF
    assert ("read", 1 << 36, 4, 0xFFFFFFFF) in legacy.guest.io.log
    legacy = Legacy(boot, f"{READ}\nhlt", "32-bit")
    legacy.large(0x10 << 13 | 0x80000007)
    assert legacy.run() is None
    assert ("read", 0x10_8000_0000, 4, 0xFFFFFFFF) in legacy.guest.io.log


@pytest.mark.parametrize("form", FORMATS)
def test_large_pages(boot: Boot, form: str) -> None:
    legacy = Legacy(boot, "mov dword [V + 0x12344], 7\nmov eax, [V + 0x112344]\nhlt", form)
    at = legacy.large(0x400000 | 7)
    legacy.guest.memory.store_u32(0x512344, 99)
    assert legacy.run() is None
    assert legacy.guest.load(0x412344, 4) == 7 and legacy.guest.reg("rax") == 99
    assert legacy.load(at) & (Pte.A | Pte.D) == Pte.A | Pte.D


@pytest.mark.parametrize("form", FORMATS)
def test_invlpg_drops_all_of_a_large_page(boot: Boot, form: str) -> None:
    """Both halves of 4 MiB: the page is named by an address in the other one."""
    text = "mov ebx, V + 0x2000\nmov eax, [ebx]\nmov dword [ENTRY], NEW\nmov esi, [ebx]\n"
    text += f"invlpg [V + {0x1FF000 if form == 'PAE' else 0x3FF000}]\nmov ecx, [ebx]\nhlt"
    directory = HIGH + 0x1000 if form == "PAE" else ROOT
    entry = directory + ((V >> 21 & 511) * 8 if form == "PAE" else (V >> 22) * 4)
    text = text.replace("ENTRY", str(entry)).replace("NEW", str(0x800000 | Pte.PS | 7))
    legacy = Legacy(boot, text, form)
    assert legacy.large(0x400000 | 7) == entry
    legacy.guest.memory.store_u32(0x402000, 1)
    legacy.guest.memory.store_u32(0x802000, 2)
    assert legacy.run() is None
    state = legacy.guest.state
    assert (state["rax"], state["rcx"]) == (1, 2)


def test_4_mib_pages_need_cr4_pse(boot: Boot) -> None:
    legacy = Legacy(boot, f"{READ}\nhlt", "32-bit")
    legacy.large(0x400000 | 7)  # without PSE this is a table at 0x400000
    legacy.guest.set(cr4=0)
    legacy.guest.memory.store_u32(0x400000 + (V >> 12 & 1023) * 4, G | 7)
    legacy.guest.memory.store_u32(G, 77)
    assert legacy.run() is None and legacy.guest.reg("rax") == 77


def test_pdptes_are_read_when_cr3_is_loaded(boot: Boot) -> None:
    text = "mov eax, [V]\nmov dword [ROOT + 8], 0\ninvlpg [V]\nmov eax, [V]\nmov ecx, 1\nmov eax, cr3\nmov cr3, eax\n"
    legacy = Legacy(boot, text + "last: mov eax, [V]\nhlt", "PAE")
    legacy.page(G | 7)
    found = legacy.run()
    assert found == (0, V, legacy.guest.program["last"])
    assert legacy.guest.reg("rcx") == 1


@pytest.mark.parametrize("way", ["last: mov cr3, eax", "btr ecx, 31\nmov cr0, ecx\nbts ecx, 31\nlast: mov cr0, ecx"])
def test_reserved_bits_of_pdptes_are_general_protection(boot: Boot, way: str) -> None:
    legacy = Legacy(boot, f"or dword [ROOT + 8], 3\nmov eax, cr3\nmov ecx, cr0\n{way}\nhlt", "PAE")
    found = legacy.run()
    assert found is not None and (found[0], found[2]) == (0, legacy.guest.program["last"])


def test_smep_and_smap_hold_in_legacy_paging_too(boot: Boot) -> None:
    for form in FORMATS:
        for text, cr4, error in ((READ, Cr4.SMAP, 1), (f"stac\n{READ}", Cr4.SMAP, None), (FETCH, Cr4.SMEP, 0x11)):
            legacy = Legacy(boot, f"{text}\nhlt", form)
            legacy.page(G | 7)
            # the program itself must be the supervisor's then
            for page in range(512 if legacy.pae else 1024):
                legacy.store(TABLE0, page, page << 12 | 3)
            if legacy.pae:
                legacy.store(HIGH, 1, 0x200000 | Pte.PS | 3)
            legacy.guest.set(cr4=legacy.guest.state["cr4"] | cr4)
            found = legacy.run()
            assert (found[0] if found else None) == error, (form, text)


def test_from_no_paging_through_pae_to_long_mode_and_back(boot: Boot) -> None:
    """PG with PAE first, off again, then LME and PG: PDPTEs and PML4 are different trees under one CR3."""
    text = """
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        mov ebx, [V]
        and eax, 0x7fffffff
        mov cr0, eax
        mov esi, PML4
        mov cr3, esi
        mov ecx, 0xc0000080
        mov eax, 0x100
        xor edx, edx
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        jmp far 0x10:code64
        code64: db 0x48, 0xff, 0xc3
        hlt
    """
    legacy = Legacy(boot, text, "PAE")
    legacy.page(G | 7)
    legacy.guest.memory.store_u32(G, 41)
    legacy.guest.set(cr0=Cr0.PE | Cr0.ET | Cr0.NE | Cr0.WP)
    assert legacy.run() is None
    state = legacy.guest.state
    assert state["rbx"] == 42 and state["efer"] & Efer.LMA and state["cs"]["selector"] == 0x10


OTHER = G + 0x5000
"""The frame behind :data:`G`'s, by its linear address."""


def two_pages(boot: Boot, text: str, form: str, first: int, second: int, *, user: bool = True) -> tuple[Legacy, int]:
    """A guest with two pages from :data:`V` on; where the second one's entry lies."""
    legacy = Legacy(boot, text, form, user=user)
    at = legacy.page(first)
    legacy.guest.memory.write(G + 0xFF8, bytes(range(8)))
    legacy.guest.memory.write(OTHER, bytes(range(8, 16)))
    return legacy, legacy.store(TABLE1, (at - TABLE1) // (8 if legacy.pae else 4) + 1, second)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("text", "first", "second", "error", "cr2"),
    [
        ("mov eax, [V + 0xffe]", G | 7, 0, 4, V + 0x1000), ("mov eax, [V + 0xffe]", 0, OTHER | 7, 4, V + 0xFFE),
        ("add dword [V + 0xffe], 1", G | 7, 0, 6, V + 0x1000),
        ("add dword [V + 0xffe], 1", G | 7, OTHER | 5, 7, V + 0x1000),
        ("mov dword [V + 0xffd], 1", G | 5, OTHER | 7, 7, V + 0xFFD),
        ("movups [V + 0xffc], xmm0", G | 7, OTHER | 3, 7, V + 0x1000),
        ("mov esp, V + 0x1002\nlast: push 1", G | 5, OTHER | 7, 7, V + 0xFFE),
        ("mov esp, V + 0x1002\nlast: push 1", G | 7, 0, 6, V + 0x1000),
        ("mov edi, V + 0xffe\nlast: stosd", G | 7, 0, 6, V + 0x1000),
        ("mov esi, V + 0xffe\nmov edi, V + 0xfff\nlast: movsd", G | 7, 0, 4, V + 0x1000),
    ],
)  # fmt: skip
def test_a_fault_on_one_half_of_an_operand(
    boot: Boot, form: str, text: str, first: int, second: int, error: int, cr2: int
) -> None:
    """Nothing of it is stored then."""
    legacy, _ = two_pages(boot, f"{text}\nud2", form, first, second)
    legacy.guest.set(cr4=legacy.guest.state["cr4"] | Cr4.OSFXSR)
    program = legacy.guest.program
    assert legacy.run() == (error, cr2, program.labels.get("last", PROGRAM))
    assert legacy.guest.read(G + 0xFF8, 8) + legacy.guest.read(OTHER, 8) == bytes(range(16))


@pytest.mark.parametrize("form", FORMATS)
def test_an_operand_on_two_pages(boot: Boot, form: str) -> None:
    """Their frames are no neighbours; accessed and dirty bits of both are set."""
    legacy, second = two_pages(boot, "add dword [V + 0xffe], 0x01010101\nhlt", form, G | 3, OTHER | 3, user=False)
    assert legacy.run() is None
    assert legacy.guest.read(G + 0xFFE, 2) + legacy.guest.read(OTHER, 2) == bytes((7, 8, 9, 10))
    assert legacy.load(second) & (Pte.A | Pte.D) == Pte.A | Pte.D


@pytest.mark.parametrize("form", FORMATS)
def test_an_instruction_on_two_pages(boot: Boot, form: str) -> None:
    """Its second page is missing, is there, and becomes another one."""
    text = "mov ebx, V + 0xffd\njmp ebx\nagain: invlpg [V + 0x1000]\nmov ebx, V + 0xffd\njmp ebx"
    legacy, second = two_pages(boot, text, form, G | 3, 0, user=False)
    memory, guest = legacy.guest.memory, legacy.guest
    memory.write(G + 0xFFD, b"\xb9\x11\x22")  # mov ecx, 0x4433_2211
    memory.write(OTHER, b"\x33\x44\xf4")
    memory.write(OTHER + 0x1000, b"\x55\x66\xf4")
    assert legacy.run() == (0x10 if legacy.pae else 0, V + 0x1000, V + 0xFFD)
    for frame, number in ((OTHER, 0x44332211), (OTHER + 0x1000, 0x66552211), (OTHER, 0x44332211)):
        legacy.store(TABLE1, (second - TABLE1) // (8 if legacy.pae else 4), frame | 3)
        guest.set(rip=guest.program["again"], rcx=0)
        assert legacy.run() is None
        assert guest.reg("rcx") == number


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("where", ["V", "G"])
def test_code_that_is_changed(boot: Boot, form: str, where: str) -> None:
    """Through its own linear address, or through its frame's other one."""
    text = f"""
        mov ecx, 100
        xor ebx, ebx
        again: mov [{where} + 1], ecx
        mov eax, V
        call eax
        dec ecx
        jne again
        hlt
    """
    legacy = Legacy(boot, text, form)
    legacy.page(G | 3)
    legacy.guest.memory.write(G, b"\xb8\0\0\0\0\x01\xc3\xc3")  # mov eax, 0; add ebx, eax; ret
    legacy.guest.set(rsp=0x1F0000)
    assert legacy.run() is None
    assert legacy.guest.reg("rbx") == 5050
