"""Emulated system instructions, by the manual: what they do at each privilege and in each mode, and how they fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skep.engine.amd64 import msrs
from skep.engine.amd64.cpuid import AMD_VENDOR, INTEL_VENDOR
from skep.engine.amd64.registers import Attr, Cr0, Cr4, Efer, Rflags, Vector
from skep.engine.translate import emulate_string
from skep.engine.translate.port import GuestFault, TripleFault
from tests.engine.assemble import assemble
from tests.engine.translate.plain import (
    ABSENT,
    CODE,
    CODE32,
    CODE64,
    CONFORMING,
    DATA,
    DATA0,
    DATA16,
    EXECUTE_ONLY,
    GDT,
    HANDLER,
    LDT,
    LDT_SELECTOR,
    READ_ONLY,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER32,
    USER64,
    USER_DATA,
    PlainCpu,
    descriptor,
)


@pytest.fixture
def cpu() -> Iterator[PlainCpu]:
    cpu = PlainCpu(vendor=INTEL_VENDOR)
    cpu.set_up()
    yield cpu
    cpu.close()


@pytest.fixture
def amd() -> Iterator[PlainCpu]:
    cpu = PlainCpu(vendor=AMD_VENDOR)
    cpu.set_up()
    yield cpu
    cpu.close()


def run(cpu: PlainCpu, text: str, bits: int = 64) -> bool:
    """Emulate one instruction at rip and see that rip went on, unless it jumps."""
    return cpu.step(assemble(text, cpu.st.rip, bits=bits).code)


def faults(cpu: PlainCpu, text: str, vector: int, error: int | None = 0, bits: int = 64) -> None:
    """``text`` faults so, and nothing changes."""
    code = assemble(text, cpu.st.rip, bits=bits).code
    cpu.memory[cpu.st.rip : cpu.st.rip + len(code)] = code
    before = bytes(cpu.st.bytes[:0x800]), bytes(cpu.memory)
    with pytest.raises(GuestFault) as caught:
        cpu.emulator.step()
    assert (caught.value.vector, caught.value.error) == (vector, error)
    assert (bytes(cpu.st.bytes[:0x800]), bytes(cpu.memory)) == before


def test_rip_goes_on_and_rf_is_cleared(cpu: PlainCpu) -> None:
    cpu.st.rflags = Rflags.RF | Rflags.CF
    assert run(cpu, "wbinvd") is False
    assert (cpu.st.rip, cpu.st.rflags) == (CODE + 2, 2 | Rflags.CF)


def test_instruction_across_two_pages(cpu: PlainCpu) -> None:
    cpu.st.rip = CODE + 0xFFE
    run(cpu, "mov rax, cr0")
    assert cpu.st.rax == cpu.st.cr0
    cpu.st.rip = CODE + 0xFFE
    cpu.holes.add(CODE + 0x1000)
    code = assemble("mov rax, cr0", CODE).code
    cpu.memory[CODE + 0xFFE : CODE + 0x1001] = code
    with pytest.raises(GuestFault) as caught:
        cpu.emulator.step()
    assert (caught.value.vector, caught.value.error, caught.value.address) == (Vector.PF, 16, CODE + 0x1000)
    cpu.st.rip = CODE + 0xFFD  # all on the first page: the second is not looked at
    run(cpu, "mov rax, cr0")


def test_too_long_and_meaningless(cpu: PlainCpu) -> None:
    cpu.memory[CODE : CODE + 16] = b"\x66" * 15 + b"\x90"
    with pytest.raises(GuestFault) as caught:
        cpu.emulator.step()
    assert caught.value.vector in (Vector.GP, Vector.UD)
    for code in ("0f0b", "0fff00", "0fb900", "0f01c8", "f00f20c0", "0f20c8", "c4e27918c0"):
        cpu.set_up()
        cpu.memory[CODE : CODE + 8] = bytes.fromhex(code).ljust(8, b"\0")
        with pytest.raises(GuestFault) as caught:
            cpu.emulator.step()
        assert caught.value.vector == Vector.UD, code
    assert len(cpu.emulator.refused) <= 16


# CPUID, MSRs, ports


def test_cpuid(cpu: PlainCpu) -> None:
    cpu.st.rax, cpu.st.rcx = 0xFFFF_FFFF_0000_0000, 5
    run(cpu, "cpuid")
    assert (cpu.st.rax, cpu.st.rbx) == cpu.cpuid.read(0, 0, 0, 0)[:2]


def test_msrs_through_instructions(cpu: PlainCpu) -> None:
    cpu.st.rcx, cpu.st.rax, cpu.st.rdx = msrs.LSTAR, 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF
    run(cpu, "wrmsr")
    assert cpu.st.lstar == 0xFFFF_FFFF_8000_0000
    cpu.st.rax = cpu.st.rdx = 0
    run(cpu, "rdmsr")
    assert (cpu.st.rax, cpu.st.rdx) == (0x8000_0000, 0xFFFF_FFFF)
    cpu.st.rdx = 0x8000
    faults(cpu, "wrmsr", Vector.GP)
    cpu.st.rcx = 0x4444
    faults(cpu, "rdmsr", Vector.GP)


def test_efer_changes_the_mode(cpu: PlainCpu) -> None:
    cpu.st.rcx, cpu.st.rax, cpu.st.rdx = msrs.EFER, Efer.LME | Efer.NXE, 0
    changes = cpu.changes
    run(cpu, "wrmsr")
    assert cpu.changes > changes
    assert cpu.flushes


def test_ports(cpu: PlainCpu) -> None:
    cpu.st.rdx, cpu.st.rax = 0xFFFF_0CF8, 0xFFFF_FFFF_1234_5678
    run(cpu, "out dx, eax")
    run(cpu, "out 0x80, al")
    run(cpu, "in ax, dx")
    assert cpu.st.rax == 0xFFFF_FFFF_1234_7788
    run(cpu, "in eax, 0x61")
    assert cpu.st.rax == 0x5566_7788
    assert cpu.io.log == [("out", 0xCF8, 4, 0x1234_5678), ("out", 0x80, 1, 0x78), ("in", 0xCF8, 2, 0x7788),
                          ("in", 0x61, 4, 0x5566_7788)]  # fmt: skip


def test_port_bitmap(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.memory[TSS + 102 : TSS + 104] = (0x68).to_bytes(2, "little")
    cpu.memory[TSS + 0x68 : TSS + 0x80] = b"\xff" * 24
    faults(cpu, "in al, 0x60", Vector.GP)
    cpu.memory[TSS + 0x68 + 12] = 0xFE
    run(cpu, "in al, 0x60")
    faults(cpu, "in ax, 0x60", Vector.GP)  # the second byte's port is refused
    cpu.st.tr_limit = 0x68 + 12
    faults(cpu, "in al, 0x60", Vector.GP)  # the bitmap ends
    cpu.st.rflags = Rflags.IOPL
    run(cpu, "in ax, 0x60")


def test_string_ports(cpu: PlainCpu) -> None:
    cpu.st.rdx, cpu.st.rdi, cpu.st.rcx = 0x1F0, DATA, 3
    run(cpu, "rep insw")
    assert bytes(cpu.memory[DATA : DATA + 6]) == b"\x88\x77" * 3
    assert (cpu.st.rdi, cpu.st.rcx) == (DATA + 6, 0)
    cpu.st.rsi, cpu.st.rcx = DATA, 2
    run(cpu, "rep outsb")
    assert cpu.io.log[-2:] == [("out", 0x1F0, 1, 0x88), ("out", 0x1F0, 1, 0x77)]
    cpu.holes.add(DATA)
    reads = len(cpu.io.log)
    cpu.st.rdi = DATA
    faults(cpu, "insb", Vector.PF, 2)
    assert len(cpu.io.log) == reads  # a read of a port has effects: none for a store that cannot be


def test_long_repetition_comes_up_for_air(cpu: PlainCpu) -> None:
    count = emulate_string.MAX_ROUNDS + 10
    cpu.st.rflags = Rflags.DF
    cpu.st.rdi, cpu.st.rax, cpu.st.rcx = DATA + count - 1, 0xAA, count
    run(cpu, "rep stosb")
    assert (cpu.st.rip, cpu.st.rcx) == (CODE, 10)
    cpu.emulator.step()
    assert (cpu.st.rip, cpu.st.rcx) == (CODE + 2, 0)
    assert cpu.memory[DATA : DATA + count + 1] == b"\xaa" * count + b"\0"


def test_repetition_by_the_page(cpu: PlainCpu) -> None:
    cpu.st.rdi, cpu.st.rax, cpu.st.rcx = DATA + 5, 0x1122_3344_5566_7788, 2000
    run(cpu, "rep stosq")
    assert (cpu.st.rip, cpu.st.rcx, cpu.st.rdi) == (CODE + 3, 0, DATA + 5 + 16000)
    assert cpu.memory[DATA + 5 : DATA + 16005] == (0x1122_3344_5566_7788).to_bytes(8, "little") * 2000
    cpu.memory[DATA : DATA + 9000] = bytes(n * 7 & 0xFF for n in range(9000))
    expected = bytes(cpu.memory[DATA : DATA + 9000])
    cpu.st.rsi, cpu.st.rdi, cpu.st.rcx = DATA, DATA + 0x3003, 9000
    run(cpu, "rep movsb")
    assert cpu.memory[DATA + 0x3003 : DATA + 0x3003 + 9000] == expected


def test_repetition_stops_where_it_faults(cpu: PlainCpu) -> None:
    cpu.holes.add(DATA + 0x2000)
    cpu.st.rdi, cpu.st.rcx = DATA + 2, 0x1000
    with pytest.raises(GuestFault) as caught:
        run(cpu, "rep stosd")
    assert caught.value.address == DATA + 0x2000
    assert (cpu.st.rdi, cpu.st.rcx, cpu.st.rip) == (DATA + 0x1FFE, 0x1000 - 0x7FF, CODE)


def test_comparing_that_faults_leaves_the_flags_of_before(cpu: PlainCpu) -> None:
    """SDM 2, REP: also far into a repetition."""
    for before in (Rflags.CF | Rflags.OF, Rflags.ZF):
        cpu.holes.add(DATA + 0x2000)
        cpu.st.rflags = before
        cpu.st.rdi, cpu.st.rax, cpu.st.rcx = DATA, 0x11, 0x10000
        with pytest.raises(GuestFault):
            for _ in range(0x2000 // emulate_string.MAX_ROUNDS + 1):
                run(cpu, "repne scasb")
        assert cpu.st.rdi == DATA + 0x2000 and cpu.st.flags & Rflags.STATUS == before


def test_overlapping_repetition_repeats(cpu: PlainCpu) -> None:
    cpu.memory[DATA : DATA + 3] = b"abc"
    cpu.st.rsi, cpu.st.rdi, cpu.st.rcx = DATA, DATA + 3, 100
    run(cpu, "rep movsb")
    assert cpu.memory[DATA : DATA + 103] == b"abc" * 34 + b"a"


def test_device_gets_its_elements_one_by_one(cpu: PlainCpu) -> None:
    cpu.devices = range(DATA, DATA + 0x1000)
    cpu.st.rsi, cpu.st.rdi, cpu.st.rcx = STACK, DATA, 3
    run(cpu, "rep movsd")
    assert cpu.accesses == [("write", DATA, 4), ("write", DATA + 4, 4), ("write", DATA + 8, 4)]
    cpu.st.rsi, cpu.st.rdi, cpu.st.rcx = DATA, STACK, 2
    run(cpu, "rep movsq")
    assert cpu.accesses[3:] == [("read", DATA, 8), ("read", DATA + 8, 8)]
    cpu.st.rdi, cpu.st.rcx = DATA, 2
    run(cpu, "rep stosw")
    assert cpu.accesses[5:] == [("write", DATA, 2), ("write", DATA + 2, 2)]


# HLT and interrupt flag


def test_hlt(cpu: PlainCpu) -> None:
    assert run(cpu, "hlt") is True
    assert cpu.st.rip == CODE + 1
    assert run(cpu, "wbinvd") is False


def test_sti_and_mov_ss_hold_off_interrupts_for_one_instruction(cpu: PlainCpu) -> None:
    run(cpu, "sti")
    assert cpu.emulator.shadow
    assert cpu.st.iflag == Rflags.IF
    run(cpu, "sti")
    assert not cpu.emulator.shadow  # IF was set already
    run(cpu, "cli")
    assert not cpu.st.iflag
    cpu.st.rax = DATA0
    run(cpu, "mov ss, eax")
    assert cpu.emulator.shadow
    run(cpu, "mov ds, eax")
    assert not cpu.emulator.shadow


def test_iopl_guards_cli_sti(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    faults(cpu, "cli", Vector.GP)
    faults(cpu, "sti", Vector.GP)
    cpu.st.rflags = Rflags.IOPL
    run(cpu, "sti")
    assert cpu.st.iflag


def test_popf_by_privilege(cpu: PlainCpu) -> None:
    always = Rflags.NT | Rflags.AC | Rflags.ID | Rflags.TF
    everything = always | Rflags.IF | Rflags.IOPL | Rflags.VIF | Rflags.VM | Rflags.RF
    may = {
        (0, 0): always | Rflags.IF | Rflags.IOPL,
        (3, 0): always,
        (3, Rflags.IOPL): always | Rflags.IF | Rflags.IOPL,
    }
    for (cpl, iopl), expected in may.items():
        cpu.set_up(cpl=cpl)
        cpu.st.rflags = iopl
        cpu.st.rsp = STACK - 8
        cpu.put64(STACK - 8, everything)
        run(cpu, "popfq")
        assert cpu.st.rflags == expected | 2, (cpl, iopl)
    cpu.set_up()
    cpu.st.rflags = Rflags.AC
    cpu.st.rsp = STACK - 2
    run(cpu, "popfw")
    assert cpu.st.rflags == 2 | Rflags.AC  # 16 bits only


# Control registers


def test_control_registers_move(cpu: PlainCpu) -> None:
    cpu.st.rbx = cpu.st.cr0 | Cr0.TS | Cr0.MP | Cr0.AM
    run(cpu, "mov cr0, rbx")
    assert cpu.st.cr0 & (Cr0.TS | Cr0.MP | Cr0.AM) == Cr0.TS | Cr0.MP | Cr0.AM
    run(cpu, "clts")
    assert not cpu.st.cr0 & Cr0.TS
    run(cpu, "mov rcx, cr0")
    assert cpu.st.rcx == cpu.st.cr0
    cpu.st.rax = 0xDEAD_BEEF_0000
    run(cpu, "mov cr2, rax")
    run(cpu, "mov r15, cr2")
    assert cpu.st.r15 == 0xDEAD_BEEF_0000
    cpu.st.rax = 7
    run(cpu, "mov cr8, rax")
    assert cpu.interrupts.tpr == 7
    run(cpu, "mov rbx, cr8")
    assert cpu.st.rbx == 7


@pytest.mark.parametrize(
    ("register", "change"),
    [
        ("cr0", 1 << 32),
        ("cr0", Cr0.NW),
        ("cr4", Cr4.PAE),
        ("cr4", Cr4.LA57),
        ("cr4", Cr4.VMXE),
        ("cr4", Cr4.PKE),
        ("cr4", Cr4.CET),
        ("cr4", 1 << 40),
        ("cr3", 1 << 40),
        ("cr3", 1 << 63),
        ("cr8", 16),
    ],
)
def test_bad_control_register_values(cpu: PlainCpu, register: str, change: int) -> None:
    current = 0 if register == "cr8" else getattr(cpu.st, register)
    cpu.st.rax = current ^ change
    faults(cpu, f"mov {register}, rax", Vector.GP)


def test_paging_cannot_be_left_in_64_bit_mode_or_without_pe(cpu: PlainCpu) -> None:
    cpu.st.rax = Cr0.PG
    faults(cpu, "mov cr0, rax", Vector.GP)
    cpu.st.rax = cpu.st.cr0 & ~Cr0.PG
    faults(cpu, "mov cr0, rax", Vector.GP)
    cpu.set_up(32)
    cpu.st.efer, cpu.st.cs_attr = Efer.LME, cpu.st.cs_attr | Attr.L
    cpu.st.rax = cpu.st.cr0 | Cr0.PG
    faults(cpu, "mov cr0, eax", Vector.GP, bits=32)


def test_long_mode_begins_and_ends(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    st = cpu.st
    st.efer = Efer.LME
    st.cr4 &= ~Cr4.PAE
    st.rax = st.cr0 | Cr0.PG
    faults(cpu, "mov cr0, eax", Vector.GP, bits=32)
    st.cr4 |= Cr4.PAE
    run(cpu, "mov cr0, eax", 32)
    assert st.efer & Efer.LMA
    assert cpu.flushes == [True]
    st.rax = st.cr0 & ~Cr0.PG
    run(cpu, "mov cr0, eax", 32)
    assert not st.efer & Efer.LMA


def test_cr3_and_tlb(cpu: PlainCpu) -> None:
    cpu.st.rax = 0x1000
    run(cpu, "mov cr3, rax")
    assert cpu.st.cr3 == 0x1000
    cpu.st.rax = cpu.st.cr4 | Cr4.PCIDE
    run(cpu, "mov cr4, rax")
    cpu.st.rax = 1 << 63 | 0x2005
    run(cpu, "mov cr3, rax")
    assert cpu.st.cr3 == 0x2005
    assert cpu.flushes == [False, True, False]
    cpu.st.rax = cpu.st.cr4 & ~Cr4.PCIDE
    run(cpu, "mov cr4, rax")
    cpu.st.rax |= Cr4.PCIDE
    faults(cpu, "mov cr4, rax", Vector.GP)  # CR3[11:0] is not 0


def test_invlpg_and_invpcid(cpu: PlainCpu) -> None:
    cpu.st.rbx = 0xFFFF_8000_0000_1000
    run(cpu, "invlpg [rbx + 8]")
    assert cpu.flushes == [0xFFFF_8000_0000_1008]
    cpu.st.rbx = 1 << 50
    run(cpu, "invlpg [rbx]")
    assert len(cpu.flushes) == 1
    cpu.st.gs_base, cpu.st.rbx = 0x1_0000_0000, 0x2000
    run(cpu, "invlpg gs:[rbx]")
    assert cpu.flushes.pop() == 0x1_0000_2000
    cpu.st.rbx = DATA
    for kind, flush in ((0, 0x5000), (1, False), (2, True), (3, False)):
        cpu.put64(DATA, 0, 0x5000)
        cpu.st.rax = kind
        run(cpu, "invpcid rax, [rbx]")
        assert cpu.flushes.pop() == flush
    cpu.st.rax = 4
    faults(cpu, "invpcid rax, [rbx]", Vector.GP)
    cpu.st.rax = 1
    cpu.put64(DATA, 5)
    faults(cpu, "invpcid rax, [rbx]", Vector.GP)  # a PCID while CR4.PCIDE is clear
    cpu.put64(DATA, 0, 1 << 50)
    cpu.st.rax = 0
    faults(cpu, "invpcid rax, [rbx]", Vector.GP)


def test_lmsw_sets_pe_but_cannot_clear_it(cpu: PlainCpu) -> None:
    cpu.st.rax = Cr0.TS
    run(cpu, "lmsw ax")
    assert cpu.st.cr0 & Cr0.PE
    assert cpu.st.cr0 & Cr0.TS
    run(cpu, "smsw ebx")
    assert cpu.st.rbx == cpu.st.cr0 & 0xFFFF_FFFF


# Debug registers


def test_debug_registers(cpu: PlainCpu) -> None:
    cpu.st.rax = 0x1234
    run(cpu, "mov dr3, rax")
    run(cpu, "mov rbx, dr3")
    assert cpu.st.rbx == 0x1234
    cpu.st.rax = 0xFFFF_FFFF
    run(cpu, "mov dr6, rax")
    assert cpu.st.dr6 == 0xFFFF_EFFF
    cpu.st.rax = 0
    run(cpu, "mov dr5, rax")  # DR7, as CR4.DE is clear
    assert cpu.st.dr7 == 0x400
    cpu.st.rax = 1 << 32
    faults(cpu, "mov dr7, rax", Vector.GP)
    cpu.st.cr4 |= Cr4.DE
    faults(cpu, "mov rax, dr4", Vector.UD, None)


def test_general_detect(cpu: PlainCpu) -> None:
    cpu.st.dr7 = 1 << 13 | 1 << 10
    with pytest.raises(GuestFault) as caught:
        run(cpu, "mov rax, dr0")
    assert caught.value.vector == Vector.DB
    assert cpu.st.dr6 & 1 << 13
    run(cpu, "mov rax, dr0")  # GD is clear in the handler


# Descriptor tables


def test_tables_load_and_store(cpu: PlainCpu) -> None:
    cpu.st.rbx = DATA
    cpu.memory[DATA : DATA + 10] = bytes.fromhex("ff0f 8877665544 80ffff".replace(" ", ""))
    base = 0xFFFF_8044_5566_7788
    run(cpu, "lgdt [rbx]")
    assert (cpu.st.gdt_base, cpu.st.gdt_limit) == (base, 0xFFF)
    run(cpu, "lidt [rbx]")
    assert (cpu.st.idt_base, cpu.st.idt_limit) == (base, 0xFFF)
    run(cpu, "sgdt [rbx + 16]")
    run(cpu, "sidt [rbx + 32]")
    assert cpu.memory[DATA + 16 : DATA + 26] == cpu.memory[DATA + 32 : DATA + 42] == cpu.memory[DATA : DATA + 10]
    cpu.memory[DATA + 9] = 0
    faults(cpu, "lgdt [rbx]", Vector.GP)


def test_tables_in_32_bit_code(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.st.rbx = DATA
    cpu.memory[DATA : DATA + 8] = bytes.fromhex("ff0f78563412aabb")
    run(cpu, "lidt [ebx]", 32)
    assert (cpu.st.idt_base, cpu.st.idt_limit) == (0x1234_5678, 0xFFF)
    cpu.step(bytes.fromhex("660f011b"))  # 16-bit operand size: a base of 24 bits
    assert cpu.st.idt_base == 0x34_5678
    run(cpu, "sgdt [ebx]", 32)
    assert bytes(cpu.memory[DATA : DATA + 8]) == (0x8F | GDT << 16).to_bytes(6, "little") + b"\xaa\xbb"


def test_umip(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.st.rbx = DATA
    for text in ("sgdt [rbx]", "sidt [rbx]", "sldt ax", "str ax", "smsw ax"):
        run(cpu, text)
    cpu.st.cr4 |= Cr4.UMIP
    for text in ("sgdt [rbx]", "sidt [rbx]", "sldt ax", "str ax", "smsw ax"):
        faults(cpu, text, Vector.GP)


def test_ldt(cpu: PlainCpu) -> None:
    cpu.st.rax = LDT_SELECTOR
    run(cpu, "lldt ax")
    assert (cpu.st.ldtr_base, cpu.st.ldtr_limit) == (LDT, 0x17)
    cpu.put64(LDT + 8, descriptor(0x13, base=0x5000))
    cpu.st.rax = 0x0C
    run(cpu, "mov fs, eax")
    assert (cpu.st.fs_sel, cpu.st.fs_base) == (0x0C, 0x5000)
    cpu.st.rax = 0x1C
    faults(cpu, "mov fs, eax", Vector.GP, 0x1C)  # outside the LDT
    run(cpu, "sldt ebx")
    assert cpu.st.rbx == LDT_SELECTOR
    cpu.st.rax = 0
    run(cpu, "lldt ax")
    cpu.st.rax = 0x0C
    faults(cpu, "mov fs, eax", Vector.GP, 0x0C)
    for selector in (DATA0, 0x400, LDT_SELECTOR | 4):
        cpu.st.rax = selector
        faults(cpu, "lldt ax", Vector.GP, selector)


def test_task_register(cpu: PlainCpu) -> None:
    cpu.st.rax = TSS_SELECTOR
    faults(cpu, "ltr ax", Vector.GP, TSS_SELECTOR)  # busy
    cpu.put64(GDT + TSS_SELECTOR, descriptor(0x9, base=0x1234_5678, limit=0x67, flags=0), 0xFFFF_8000)
    run(cpu, "ltr ax")
    assert (cpu.st.tr_base, cpu.st.tr_limit) == (0xFFFF_8000_1234_5678, 0x67)
    assert cpu.get64(GDT + TSS_SELECTOR)[0] >> 40 & 0xF == 0xB
    cpu.st.rax = 0
    faults(cpu, "ltr ax", Vector.GP, 0)
    cpu.put64(GDT + TSS_SELECTOR, descriptor(0x9, present=0))
    cpu.st.rax = TSS_SELECTOR
    faults(cpu, "ltr ax", Vector.NP, TSS_SELECTOR)


# Segment registers


@pytest.mark.parametrize(
    ("name", "selector", "vector", "error"),
    [
        ("ds", 0x400, Vector.GP, 0x400),
        ("ds", EXECUTE_ONLY, Vector.GP, EXECUTE_ONLY),
        ("es", ABSENT, Vector.NP, ABSENT),
        ("fs", DATA0 | 3, Vector.GP, DATA0),
        ("gs", TSS_SELECTOR, Vector.GP, TSS_SELECTOR),
        ("ss", READ_ONLY, Vector.GP, READ_ONLY),
        ("ss", USER_DATA, Vector.GP, USER_DATA & ~3),
        ("ss", ABSENT, Vector.SS, ABSENT),
        ("ss", 3, Vector.GP, 0),
        ("ss", CODE64, Vector.GP, CODE64),
    ],
)
def test_bad_segment_loads(cpu: PlainCpu, name: str, selector: int, vector: int, error: int) -> None:
    cpu.st.rax = selector
    faults(cpu, f"mov {name}, eax", vector, error)


def test_segment_loads(cpu: PlainCpu) -> None:
    cpu.put64(GDT + READ_ONLY, descriptor(0x10, base=0x12345678, limit=0xFFF, flags=0x4))
    cpu.st.rax = READ_ONLY
    run(cpu, "mov es, eax")
    assert (cpu.st.es_base, cpu.st.es_limit, cpu.st.es_attr) == (0x12345678, 0xFFF, 0x4091)
    assert cpu.get64(GDT + READ_ONLY)[0] >> 40 & 1
    cpu.st.rax = 0
    cpu.st.gs_base = 0x1000
    run(cpu, "mov gs, eax")
    assert (cpu.st.gs_sel, cpu.st.gs_base) == (0, 0)
    assert not cpu.st.gs_attr & Attr.P
    run(cpu, "mov ss, eax")  # null is good enough for 64-bit code below privilege 3
    assert cpu.st.ss_sel == 0
    cpu.st.rax = CONFORMING
    run(cpu, "mov ds, eax")
    cpu.memory[CODE] = 0
    faults(cpu, "db 0x8e, 0xc8", Vector.UD, None)  # mov cs


def test_user_may_not_have_the_kernels_data(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.st.rax = DATA0
    faults(cpu, "mov ds, eax", Vector.GP, DATA0)
    cpu.st.rax = CONFORMING
    run(cpu, "mov ds, eax")


def test_null_and_limited_segments_in_32_bit_code(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.st.rax, cpu.st.rbx = 0, DATA
    run(cpu, "mov ds, eax", 32)
    faults(cpu, "mov ecx, [ebx]", Vector.GP, bits=32)
    cpu.st.rax = DATA16
    run(cpu, "mov ds, eax", 32)
    cpu.st.rbx = 0xFFFFC
    run(cpu, "mov ecx, [ebx]", 32)
    cpu.st.rbx = 0xFFFFD
    faults(cpu, "mov ecx, [ebx]", Vector.GP, bits=32)
    cpu.st.rax = READ_ONLY
    run(cpu, "mov ds, eax", 32)
    cpu.st.rbx = DATA
    run(cpu, "mov ecx, [ebx]", 32)
    faults(cpu, "mov [ebx], ecx", Vector.GP, bits=32)
    cpu.st.rbp = 0xFFFF_0000
    cpu.st.ss_limit = 0xFFFF
    faults(cpu, "mov ecx, [ebp]", Vector.SS, bits=32)


def test_segment_base_counts_in_32_bit_code(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.st.ds_base, cpu.st.rbx = DATA, 0x10
    cpu.memory[DATA + 0x10 : DATA + 0x14] = b"\x78\x56\x34\x12"
    run(cpu, "mov ecx, [ebx]", 32)
    assert cpu.st.rcx == 0x1234_5678


def test_far_pointers(cpu: PlainCpu) -> None:
    cpu.st.rbx = DATA
    cpu.put64(DATA, 0xFFFF_8000_0000_1111, DATA0)
    run(cpu, "LSS_R64_M1664 rsp, [rbx]")
    assert (cpu.st.rsp, cpu.st.ss_sel) == (0xFFFF_8000_0000_1111, DATA0)
    cpu.put64(DATA, 0xFFFF_8000_0000_1111, 0x400)
    faults(cpu, "LFS_R64_M1664 rax, [rbx]", Vector.GP, 0x400)


def test_questions_about_selectors(cpu: PlainCpu) -> None:
    def ask(text: str, selector: int) -> bool:
        cpu.st.rbx, cpu.st.rax = selector, 0x5555
        run(cpu, text)
        return bool(cpu.st.rflags & Rflags.ZF)

    assert ask("lar eax, ebx", CODE64)
    assert cpu.st.rax == 0x00AF_9B00 & 0x00F0_FF00
    assert ask("lsl eax, ebx", DATA0)
    assert cpu.st.rax == 0xFFFF_FFFF
    assert ask("lsl eax, ebx", TSS_SELECTOR)
    assert cpu.st.rax == 0x7FF
    for selector in (0, 3, 0x400, DATA0 | 3):
        assert not ask("lar eax, ebx", selector)
        assert not ask("verr bx", selector)
        assert cpu.st.rax == 0x5555
    assert ask("verr bx", CODE64)
    assert not ask("verr bx", EXECUTE_ONLY)
    assert ask("verw bx", DATA0)
    assert not ask("verw bx", READ_ONLY)
    assert not ask("verw bx", CODE64)
    assert not ask("verr bx", TSS_SELECTOR)
    cpu.put64(GDT + READ_ONLY, descriptor(0x3, limit=5))  # a busy 16-bit TSS: 32-bit kernels only
    assert not ask("lsl eax, ebx", READ_ONLY)


# Far transfers


def test_far_jump_to_compatibility_mode_and_back(cpu: PlainCpu) -> None:
    cpu.st.rbx = DATA
    cpu.memory[DATA : DATA + 6] = (HANDLER | CODE32 << 32).to_bytes(6, "little")
    run(cpu, "JMP_M1632 [rbx]")
    assert (cpu.st.cs_sel, cpu.st.rip) == (CODE32, HANDLER)
    assert not cpu.st.cs_attr & Attr.L
    run(cpu, f"jmp far {CODE64}:{CODE}", 32)
    assert (cpu.st.cs_sel, cpu.st.rip) == (CODE64, CODE)


def test_far_call_and_return(cpu: PlainCpu) -> None:
    cpu.st.rbx = DATA
    cpu.put64(DATA, HANDLER, CODE64)
    run(cpu, "CALL_M1664 [rbx]")
    assert cpu.st.rsp == STACK - 16
    assert cpu.get64(STACK - 16, 2)[1] == CODE64
    assert cpu.st.rip == HANDLER
    run(cpu, "RETFQ")
    assert (cpu.st.cs_sel, cpu.st.rsp) == (CODE64, STACK)
    assert CODE < cpu.st.rip < CODE + 8


def test_far_return_to_user_releases_both_stacks(cpu: PlainCpu) -> None:
    cpu.st.rsp = STACK - 0x100
    cpu.put64(STACK - 0x100, HANDLER, USER64)
    cpu.put64(STACK - 0x100 + 16 + 0x20, 0x9000, USER_DATA)
    run(cpu, "RETFQ_IMM16 0x20")
    assert (cpu.st.rip, cpu.st.cs_sel, cpu.st.cpl) == (HANDLER, USER64, 3)
    assert (cpu.st.rsp, cpu.st.ss_sel, cpu.st.ds_sel) == (0x9020, USER_DATA, 0)


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [(0, Vector.GP, 0), (DATA0, Vector.GP, DATA0), (USER64, Vector.GP, USER64 & ~3), (0x400, Vector.GP, 0x400),
     (TSS_SELECTOR, Vector.GP, TSS_SELECTOR), (CODE64 | 1, Vector.GP, CODE64)],
)  # fmt: skip
def test_bad_far_jumps(cpu: PlainCpu, selector: int, vector: int, error: int) -> None:
    cpu.st.rbx = DATA
    cpu.put64(DATA, HANDLER, selector)
    faults(cpu, "JMP_M1664 [rbx]", vector, error)
    faults(cpu, "CALL_M1664 [rbx]", vector, error)


def test_far_jump_outside(cpu: PlainCpu) -> None:
    cpu.st.rbx = DATA
    cpu.put64(DATA, 1 << 47, CODE64)
    faults(cpu, "JMP_M1664 [rbx]", Vector.GP)
    cpu.put64(GDT + CODE64, descriptor(0x1B, flags=0xE))  # L and D
    cpu.put64(DATA, HANDLER, CODE64)
    faults(cpu, "JMP_M1664 [rbx]", Vector.GP, CODE64)


# INT and system calls


def test_software_interrupts(cpu: PlainCpu) -> None:
    for text, vector, length in (("int 0x80", 0x80, 2), ("int3", 3, 1), ("int1", 1, 1)):
        cpu.set_up(cpl=3)
        cpu.gate(vector, dpl=0 if vector == 1 else 3)  # INT1 does not look at the gate's DPL
        run(cpu, text)
        assert cpu.st.rip == HANDLER
        assert cpu.get64(cpu.st.rsp)[0] == CODE + length
        assert not cpu.get64(cpu.st.rsp + 16)[0] & Rflags.RF
    cpu.set_up(cpl=3)
    faults(cpu, "int 0x20", Vector.GP, 0x20 << 3 | 2)
    cpu.set_up()
    cpu.st.idt_limit = 0
    with pytest.raises(TripleFault):
        run(cpu, "int1")


def test_into(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.gate(4, dpl=3)
    cpu.step(b"\xce")
    assert cpu.st.rip == CODE + 1
    cpu.st.rflags = Rflags.OF
    cpu.step(b"\xce")
    assert cpu.st.rip == HANDLER


def test_iret_keeps_the_rf_it_loaded(cpu: PlainCpu) -> None:
    cpu.st.rsp = STACK - 40
    cpu.put64(STACK - 40, HANDLER, USER64, Rflags.RF, 0x9000, USER_DATA)
    run(cpu, "iretq")
    assert (cpu.st.rip, cpu.st.cpl, cpu.st.rflags) == (HANDLER, 3, 2 | Rflags.RF)


def prepare_syscall(cpu: PlainCpu) -> None:
    cpu.st.star = CODE64 << 32 | 0x23 << 48
    cpu.st.lstar, cpu.st.cstar, cpu.st.sfmask = 0xFFFF_8000_0000_1000, 0xFFFF_8000_0000_2000, Rflags.IF | Rflags.DF


def test_syscall_and_sysret(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    prepare_syscall(cpu)
    cpu.st.rflags = Rflags.IF | Rflags.DF | Rflags.CF
    run(cpu, "syscall")
    st = cpu.st
    assert (st.rip, st.rcx, st.cpl) == (0xFFFF_8000_0000_1000, CODE + 2, 0)
    assert st.r11 == 2 | Rflags.IF | Rflags.DF | Rflags.CF
    assert (st.cs_sel, st.ss_sel, st.rflags, st.rsp) == (CODE64, DATA0, 2 | Rflags.CF, STACK)
    assert st.cs_attr & Attr.L and st.cs_limit == 0xFFFF_FFFF
    st.rip = CODE
    run(cpu, "sysretq")
    assert (st.rip, st.cs_sel, st.ss_sel, st.cpl) == (CODE + 2, USER64, USER_DATA, 3)
    assert st.rflags == 2 | Rflags.IF | Rflags.DF | Rflags.CF


def test_sysret_to_compatibility_mode(cpu: PlainCpu) -> None:
    prepare_syscall(cpu)
    cpu.st.rcx, cpu.st.r11 = 0xFFFF_FFFF_0000_8000, Rflags.RF | Rflags.VM | Rflags.ID
    cpu.step(b"\x0f\x07")
    assert (cpu.st.rip, cpu.st.cs_sel, cpu.st.rflags) == (0x8000, USER32, 2 | Rflags.ID)
    assert not cpu.st.cs_attr & Attr.L


def test_sysret_checks(cpu: PlainCpu) -> None:
    prepare_syscall(cpu)
    cpu.st.rcx = 1 << 47
    faults(cpu, "sysretq", Vector.GP)
    cpu.st.efer &= ~Efer.SCE
    faults(cpu, "sysretq", Vector.UD, None)
    faults(cpu, "syscall", Vector.UD, None)


def test_syscall_from_compatibility_mode_is_amds(cpu: PlainCpu, amd: PlainCpu) -> None:
    for each in (cpu, amd):
        each.set_up(-32, cpl=3)
        prepare_syscall(each)
    with pytest.raises(GuestFault):
        cpu.step(b"\x0f\x05")
    amd.step(b"\x0f\x05")
    assert (amd.st.rip, amd.st.rcx, amd.st.cs_sel) == (0xFFFF_8000_0000_2000, CODE + 2, CODE64)


def test_sysenter_and_sysexit(cpu: PlainCpu, amd: PlainCpu) -> None:
    cpu.set_up(-32, cpl=3)
    st = cpu.st
    faults(cpu, "sysenter", Vector.GP, bits=32)
    st.sysenter_cs, st.sysenter_esp, st.sysenter_eip = CODE64, 0xFFFF_8000_0000_3000, 0xFFFF_8000_0000_4000
    st.rflags = Rflags.IF
    run(cpu, "sysenter", 32)
    assert (st.rip, st.rsp) == (0xFFFF_8000_0000_4000, 0xFFFF_8000_0000_3000)
    assert (st.cpl, st.cs_sel, st.ss_sel) == (0, CODE64, DATA0)
    assert st.cs_attr & Attr.L and not st.iflag
    st.rip, st.rdx, st.rcx = CODE, 0x8000, 0x9000
    cpu.step(b"\x0f\x35")
    assert (st.rip, st.rsp, st.cpl, st.cs_sel, st.ss_sel) == (0x8000, 0x9000, 3, CODE64 + 16 | 3, CODE64 + 24 | 3)
    amd.set_up(-32, cpl=3)
    amd.st.sysenter_cs = CODE64
    with pytest.raises(GuestFault) as caught:
        amd.step(b"\x0f\x34")
    assert caught.value.vector == Vector.UD


# Flags of privilege, bases, extended state, counters


def test_swapgs(cpu: PlainCpu) -> None:
    cpu.st.gs_base, cpu.st.kernel_gs_base = 1, 2
    run(cpu, "swapgs")
    assert (cpu.st.gs_base, cpu.st.kernel_gs_base) == (2, 1)


def test_clac_and_stac(cpu: PlainCpu) -> None:
    run(cpu, "stac")
    assert cpu.st.rflags & Rflags.AC
    run(cpu, "clac")
    assert not cpu.st.rflags & Rflags.AC


def test_fsgsbase_needs_cr4(cpu: PlainCpu) -> None:
    faults(cpu, "rdfsbase rax", Vector.UD, None)
    cpu.st.cr4 |= Cr4.FSGSBASE
    cpu.st.rax = 0xFFFF_8000_0000_0000
    run(cpu, "wrgsbase rax")
    assert cpu.st.gs_base == 0xFFFF_8000_0000_0000
    cpu.st.rax = 1 << 60
    faults(cpu, "wrgsbase rax", Vector.GP)


def test_xcr0(cpu: PlainCpu) -> None:
    if not cpu.cpuid.xcr0_bits:
        pytest.skip("the host has no AVX")
    faults(cpu, "xgetbv", Vector.UD, None)
    cpu.st.cr4 |= Cr4.OSXSAVE
    cpu.st.rcx, cpu.st.rax, cpu.st.rdx = 0, 7, 0
    run(cpu, "xsetbv")
    cpu.st.rax = 0
    run(cpu, "xgetbv")
    assert (cpu.st.rax, cpu.st.rdx) == (7, 0)
    for value in (0, 6, 5, 0xF, 0xE7):
        cpu.st.rax = value
        faults(cpu, "xsetbv", Vector.GP)
    cpu.st.rcx, cpu.st.rax = 1, 7
    faults(cpu, "xgetbv", Vector.GP)
    faults(cpu, "xsetbv", Vector.GP)


def test_time_stamp_counter(cpu: PlainCpu) -> None:
    run(cpu, "rdtsc")
    first = cpu.st.rdx << 32 | cpu.st.rax
    cpu.st.tsc_aux = 5
    run(cpu, "rdtscp")
    assert cpu.st.rdx << 32 | cpu.st.rax > first
    assert cpu.st.rcx == 5
    cpu.set_up(cpl=3)
    cpu.st.cr4 |= Cr4.TSD
    faults(cpu, "rdtsc", Vector.GP)
    faults(cpu, "rdtscp", Vector.GP)
    faults(cpu, "rdpmc", Vector.GP)


def test_random_numbers_where_offered() -> None:
    host, baseline = PlainCpu("host"), PlainCpu("baseline")
    host.set_up()
    baseline.set_up()
    faults(baseline, "rdrand rax", Vector.UD, None)
    faults(baseline, "rdpid rax", Vector.UD, None)
    if bool(host.cpuid.read(1, 0, 0, 0)[2] >> 30 & 1):
        host.st.rflags = Rflags.ZF | Rflags.OF
        run(host, "rdrand rax")
        first = host.st.rax
        run(host, "rdrand rax")
        assert first != host.st.rax
        assert host.st.rflags == 2 | Rflags.CF
    host.close()
    baseline.close()


def test_privileged_instructions_are_refused_outside_ring_0(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.st.rflags = Rflags.IOPL  # does not help
    for text in (
        "hlt", "wrmsr", "rdmsr", "clts", "invd", "wbinvd", "mov rax, cr0", "mov cr3, rax", "mov rax, dr0", "swapgs",
        "lgdt [rax]", "ltr ax", "lldt ax", "lmsw ax", "invlpg [rax]", "invpcid rax, [rax]", "sysretq",
    ):  # fmt: skip
        faults(cpu, text, Vector.GP)
    for text in ("clac", "stac"):
        faults(cpu, text, Vector.UD, None)


# 32-bit stack frames and BOUND


def test_pusha_and_popa(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    for n, name in enumerate(("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi")):
        setattr(cpu.st, name, 0x1111_1111 * n)
    before = tuple(cpu.st.q[:8])
    run(cpu, "pushad", 32)
    assert cpu.st.rsp == STACK - 32
    assert cpu.get32(STACK - 32, 8) == [before[n] for n in reversed(range(8))]
    for n in range(8):
        if n != 4:
            cpu.st.q[n] = 0
    run(cpu, "popad", 32)
    assert tuple(cpu.st.q[:8]) == before


def test_sixteen_bit_stack(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.load("ss", DATA16)
    cpu.st.rsp, cpu.st.rax = 0xABCD_0002, 0x1234_5678
    cpu.st.ss_base = DATA
    run(cpu, "push ax", 32)
    run(cpu, "push ax", 32)
    assert cpu.st.rsp == 0xABCD_FFFE  # only SP wraps
    assert cpu.memory[DATA + 0xFFFE : DATA + 0x10000] == b"\x78\x56"
    run(cpu, "pop bx", 32)
    assert cpu.st.rsp == 0xABCD_0000


def test_bound(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.st.rbx = DATA
    cpu.memory[DATA : DATA + 8] = (-5).to_bytes(4, "little", signed=True) + (10).to_bytes(4, "little")
    for value in (0xFFFF_FFFB, 0, 10):
        cpu.st.rcx = value
        cpu.step(bytes.fromhex("620b"))
    for value in (0xFFFF_FFFA, 11, 0x8000_0000):
        cpu.st.rcx = value
        with pytest.raises(GuestFault) as caught:
            cpu.step(bytes.fromhex("620b"))
        assert caught.value.vector == Vector.BR


def test_near_transfers(cpu: PlainCpu) -> None:
    cpu.st.rax = HANDLER
    run(cpu, "call rax")
    assert (cpu.st.rip, cpu.get64(cpu.st.rsp)[0]) == (HANDLER, CODE + 2)
    run(cpu, "ret")
    assert (cpu.st.rip, cpu.st.rsp) == (CODE + 2, STACK)
    cpu.st.rax = 1 << 47
    faults(cpu, "jmp rax", Vector.GP)
    faults(cpu, "call rax", Vector.GP)
    cpu.st.rsp = STACK - 8
    cpu.put64(STACK - 8, 1 << 47)
    faults(cpu, "ret", Vector.GP)


# Restart


def test_masked_store_is_all_or_nothing(cpu: PlainCpu) -> None:
    if not cpu.cpuid.xcr0_bits:
        pytest.skip("the host has no AVX")
    cpu.st.cr4 |= Cr4.OSXSAVE
    cpu.st.xcr0 = 7
    cpu.st.rdi = DATA + 0xFF8
    cpu.st.bytes[0x1000 + 512] = 2
    cpu.st.bytes[0x1000 + 160 : 0x1000 + 192] = b"\x80" * 32
    cpu.holes.add(DATA + 0x1000)
    faults(cpu, "maskmovdqu xmm0, xmm1", Vector.PF, 2)
    cpu.holes.clear()
    cpu.read_only.add(DATA + 0x1000)
    faults(cpu, "maskmovdqu xmm0, xmm1", Vector.PF, 3)
    cpu.read_only.clear()
    run(cpu, "maskmovdqu xmm0, xmm1")
    assert cpu.memory[DATA + 0xFF8 : DATA + 0x1008] == b"\x80" * 16
    cpu.st.cr0 |= Cr0.TS
    faults(cpu, "maskmovdqu xmm0, xmm1", Vector.NM, None)
    cpu.st.cr0 |= Cr0.EM
    faults(cpu, "maskmovdqu xmm0, xmm1", Vector.UD, None)


def test_vector_masks_need_avx_state(cpu: PlainCpu) -> None:
    cpu.st.rbx = DATA
    faults(cpu, "vmaskmovps xmm1, xmm2, [rbx]", Vector.UD, None)
