"""System instructions: CPUID, MSRs, ports, control and debug registers, tables, TLB, flags of privilege.

Order of checks and results: Intel SDM 2, each instruction's own page. CPUID offers no VMX, no MONITOR, no TSX, so their
instructions have no handler and raise #UD.
"""

from __future__ import annotations

import os

from iced_x86 import Code, Instruction, Mnemonic, Register, Register_, RegisterExt

from skep.engine.amd64.cpuid import Feature
from skep.engine.amd64.debugregisters import DR7_FIXED
from skep.engine.amd64.msrs import EFER
from skep.engine.amd64.registers import Attr, Cr0, Cr4, Efer, Rflags, SystemType, Vector, Xcr0, canonical
from skep.engine.translate import breakpoints, segments
from skep.engine.translate.context import M32, M64, RAX, RBX, RCX, RDX, SEGMENT_NAME, Context, Handler, operand_segment
from skep.engine.translate.paging import load_cr3, load_pdptes
from skep.engine.translate.port import GuestFault

CR3_NO_FLUSH = 1 << 63
PCID = 0xFFF
DR6_FIXED = 0xFFFF_0FF0
DR6_WRITABLE = 0xE00F
DR6_BD = 1 << 13
DR7_WRITABLE = 0xFFFF_23FF
DR7_GD = 1 << 13
CPUID_APIC = 1 << 9
KVM_EPERM, KVM_ENOSYS = -1, -1000


def cpuid(e: Context, i: Instruction) -> None:
    q = e.st.q
    e.msrs.exits.note("cpuid", q[RAX] & M32, 0, q[RCX] & M32, e.st.rip)
    leaf = q[RAX] & M32
    q[RAX], q[RBX], q[RCX], q[RDX] = e.cpuid.read(leaf, q[RCX] & M32, e.st.cr4, e.st.xcr0)
    if leaf == 1 and not e.msrs.apic_enabled():
        q[RDX] &= ~CPUID_APIC


def hypercall(e: Context, i: Instruction) -> None:
    """VMCALL on Intel's, VMMCALL on AMD's CPUs: KVM's signature is offered, and no call (Linux, kvm_para.h)."""
    if (i.mnemonic == Mnemonic.VMMCALL) != e.cpuid.is_amd:
        raise GuestFault(Vector.UD)
    mask = M64 if e.bits == 64 else M32
    e.st.q[RAX] = (KVM_EPERM if e.st.cpl else KVM_ENOSYS) & mask


def rdmsr(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    read_msr(e)


def wrmsr(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    write_msr(e)


def read_msr(e: Context) -> None:
    q = e.st.q
    value = e.msrs.read(q[RCX] & M32)
    if value is None:
        raise GuestFault(Vector.GP, 0)
    q[RAX], q[RDX] = value & M32, value >> 32


def write_msr(e: Context) -> None:
    q = e.st.q
    index = q[RCX] & M32
    if not e.msrs.write(index, q[RAX] & M32 | (q[RDX] & M32) << 32):
        raise GuestFault(Vector.GP, 0)
    if index == EFER:
        e.cpu.flush_tlb(True)
        e.cpu.state_changed()


def check_port(e: Context, port: int, size: int) -> None:
    """CPL above IOPL, and virtual-8086 mode: the TSS's bitmap decides (SDM 1, 19.5.2)."""
    st = e.st
    if not st.cr0 & Cr0.PE or (st.cpl <= e.iopl and not st.sysfl & Rflags.VM):
        return
    if st.tr_attr & Attr.TYPE not in (SystemType.TSS, SystemType.TSS_BUSY) or st.tr_limit < 103:
        raise GuestFault(Vector.GP, 0)
    at = int.from_bytes(e.cpu.read(st.tr_base + 102 & M64, 2, True), "little") + port // 8
    if at + 1 > st.tr_limit:
        raise GuestFault(Vector.GP, 0)
    bitmap = int.from_bytes(e.cpu.read(st.tr_base + at & M64, 2, True), "little")
    if bitmap >> port % 8 & (1 << size) - 1:
        raise GuestFault(Vector.GP, 0)


def in_(e: Context, i: Instruction) -> None:
    port, size = e.load(i, 1), RegisterExt.size(i.op0_register)
    check_port(e, port, size)
    e.cpu.hits |= breakpoints.port_hits(e.st, port, size)
    e.put(i.op0_register, e.io.port_read(port, size))


def out(e: Context, i: Instruction) -> None:
    port, size = e.load(i, 0), RegisterExt.size(i.op1_register)
    check_port(e, port, size)
    e.cpu.hits |= breakpoints.port_hits(e.st, port, size)
    e.io.port_write(port, size, e.get(i.op1_register))


def hlt(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    e.halted = True


def nothing(e: Context, i: Instruction) -> None:
    """SERIALIZE: emulation is serial."""


def privileged_nothing(e: Context, i: Instruction) -> None:
    """WBINVD, INVD, WBNOINVD: caches are the host's, and coherent."""
    e.require_cpl0()


# Control and debug registers


def read_cr(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    number = i.op1_register - Register.CR0
    e.put(i.op0_register, e.interrupts.read_tpr() if number == 8 else getattr(e.st, f"cr{number}"))


def write_cr(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    _WRITE_CR[i.op0_register](e, e.get(i.op1_register))


def write_cr0(e: Context, value: int) -> None:
    st = e.st
    old = st.cr0
    paging, was_paging = bool(value & Cr0.PG), bool(old & Cr0.PG)
    new = value & Cr0.ALL | Cr0.ET
    wrong = (
        value >> 32
        or (paging and not value & Cr0.PE)
        or (value & Cr0.NW and not value & Cr0.CD)
        or (paging and not was_paging and st.efer & Efer.LME and (not st.cr4 & Cr4.PAE or st.cs_attr & Attr.L))
        or (was_paging and not paging and (e.bits == 64 or st.cr4 & Cr4.PCIDE))
    )
    if wrong:
        raise GuestFault(Vector.GP, 0)
    if (old ^ new) & (Cr0.PG | Cr0.CD | Cr0.NW):
        load_pdptes(e.cpu, new, st.cr3, st.cr4)
    st.cr0 = new
    if paging and st.efer & Efer.LME:
        st.efer |= Efer.LMA
    elif not paging:
        st.efer &= ~Efer.LMA
    if (old ^ new) & (Cr0.PG | Cr0.WP | Cr0.PE):
        e.cpu.flush_tlb(True)
    e.cpu.state_changed()


def write_cr2(e: Context, value: int) -> None:
    e.st.cr2 = value


def write_cr3(e: Context, value: int) -> None:
    """A load that need not flush does, and what is kept of other PCIDs goes: machine code knows better (runtime.py)."""
    st = e.st
    if segments.long_mode(st):
        if st.cr4 & Cr4.PCIDE:
            value &= ~CR3_NO_FLUSH
        if value >> e.cpuid.physical_bits:
            raise GuestFault(Vector.GP, 0)
    load_cr3(e.cpu, value)


def write_cr4(e: Context, value: int) -> None:
    st = e.st
    old = st.cr4
    wrong = (
        value & ~e.cpuid.cr4_bits
        or (segments.long_mode(st) and not value & Cr4.PAE)
        or (value & ~old & Cr4.PCIDE and (not segments.long_mode(st) or st.cr3 & 0xFFF))
    )
    if wrong:
        raise GuestFault(Vector.GP, 0)
    if (old ^ value) & (Cr4.PSE | Cr4.PAE | Cr4.PGE | Cr4.SMEP):
        load_pdptes(e.cpu, st.cr0, st.cr3, value)
    st.cr4 = value
    if (old ^ value) & (Cr4.PSE | Cr4.PAE | Cr4.PGE | Cr4.PCIDE | Cr4.SMEP | Cr4.SMAP):
        e.cpu.flush_tlb(True)
    e.cpu.state_changed()


def write_cr8(e: Context, value: int) -> None:
    if value > 15:
        raise GuestFault(Vector.GP, 0)
    e.interrupts.write_tpr(value)


_WRITE_CR = {
    Register.CR0: write_cr0,
    Register.CR2: write_cr2,
    Register.CR3: write_cr3,
    Register.CR4: write_cr4,
    Register.CR8: write_cr8,
}


def _debug_number(e: Context, register: Register_) -> int:
    """The debug register meant; DR4 and DR5 are DR6 and DR7 unless CR4.DE."""
    number = register - Register.DR0
    if number > 7:
        raise GuestFault(Vector.UD)
    if number in (4, 5):
        if e.st.cr4 & Cr4.DE:
            raise GuestFault(Vector.UD)
        number += 2
    e.require_cpl0()
    if e.st.dr7 & DR7_GD:
        e.st.dr6 |= DR6_BD
        e.st.dr7 &= ~DR7_GD
        raise GuestFault(Vector.DB)
    return number


def read_dr(e: Context, i: Instruction) -> None:
    e.put(i.op0_register, getattr(e.st, f"dr{_debug_number(e, i.op1_register)}"))


def write_dr(e: Context, i: Instruction) -> None:
    number, value = _debug_number(e, i.op0_register), e.get(i.op1_register)
    if number >= 6 and value >> 32:
        raise GuestFault(Vector.GP, 0)
    if number == 6:
        value = value & DR6_WRITABLE | DR6_FIXED
    elif number == 7:
        value = value & DR7_WRITABLE | DR7_FIXED
    setattr(e.st, f"dr{number}", value)
    if number != 6:
        e.cpu.breakpoints_changed()


def clts(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    e.st.cr0 &= ~Cr0.TS
    e.cpu.state_changed()


def lmsw(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    value = e.load(i, 0)
    low = Cr0.PE | Cr0.MP | Cr0.EM | Cr0.TS
    write_cr0(e, e.st.cr0 & ~(low & ~Cr0.PE) | value & low)


def require_umip_allows(e: Context) -> None:
    if e.st.cr4 & Cr4.UMIP and e.st.cpl:
        raise GuestFault(Vector.GP, 0)


def smsw(e: Context, i: Instruction) -> None:
    require_umip_allows(e)
    e.store(i, 0, e.st.cr0)


# Descriptor tables


def _load_table(e: Context, i: Instruction) -> tuple[int, int]:
    e.require_cpl0()
    size = 10 if e.bits == 64 else 6
    raw = e.read(i, size)
    base, limit = int.from_bytes(raw[2:], "little"), int.from_bytes(raw[:2], "little")
    if i.code in (Code.LGDT_M1632_16, Code.LIDT_M1632_16):
        base &= 0xFF_FFFF
    if not canonical(base):
        raise GuestFault(Vector.GP, 0)
    return base, limit


def lgdt(e: Context, i: Instruction) -> None:
    e.st.gdt_base, e.st.gdt_limit = _load_table(e, i)


def lidt(e: Context, i: Instruction) -> None:
    e.st.idt_base, e.st.idt_limit = _load_table(e, i)


def _store_table(e: Context, i: Instruction, base: int, limit: int) -> None:
    require_umip_allows(e)
    e.write(i, (limit | base << 16).to_bytes(10, "little")[: 10 if e.bits == 64 else 6])


def sgdt(e: Context, i: Instruction) -> None:
    _store_table(e, i, e.st.gdt_base, e.st.gdt_limit)


def sidt(e: Context, i: Instruction) -> None:
    _store_table(e, i, e.st.idt_base, e.st.idt_limit)


def require_protected(e: Context) -> None:
    if segments.paragraphs(e.st):
        raise GuestFault(Vector.UD)


def lldt(e: Context, i: Instruction) -> None:
    require_protected(e)
    e.require_cpl0()
    segments.load_ldt(e.cpu, e.load(i, 0) & 0xFFFF)


def ltr(e: Context, i: Instruction) -> None:
    require_protected(e)
    e.require_cpl0()
    segments.load_task(e.cpu, e.load(i, 0) & 0xFFFF)


def sldt(e: Context, i: Instruction) -> None:
    require_protected(e)
    require_umip_allows(e)
    e.store(i, 0, e.st.ldtr_sel)


def str_(e: Context, i: Instruction) -> None:
    require_protected(e)
    require_umip_allows(e)
    e.store(i, 0, e.st.tr_sel)


# TLB


def invlpg(e: Context, i: Instruction) -> None:
    e.require_cpl0()
    segment = SEGMENT_NAME[operand_segment(i)]
    base = segments.held(e.st, segment).base if e.bits != 64 or segment in ("fs", "gs") else 0
    address = e.offset(i) + base & (M64 if e.bits == 64 else M32)
    if canonical(address):  # no fault otherwise: there is nothing to drop
        e.cpu.invalidate_page(address)


def invpcid(e: Context, i: Instruction) -> None:
    """Dropping more than was asked for is enough, and allowed."""
    e.require_cpl0()
    kind = e.load(i, 0)
    raw = e.read(i, 16)
    pcid, address = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")
    individual, single, everything, all_but_global = range(4)
    if kind > all_but_global or (kind in (individual, single) and pcid > (0xFFF if e.st.cr4 & Cr4.PCIDE else 0)):
        raise GuestFault(Vector.GP, 0)
    if pcid >> 12 or (kind == individual and not canonical(address)):
        raise GuestFault(Vector.GP, 0)
    if kind == individual and (not e.st.cr4 & Cr4.PCIDE or pcid == e.st.cr3 & PCID):
        e.cpu.invalidate_page(address)
    else:
        e.cpu.flush_tlb(kind == everything)


# Flags of privilege


def require_iopl(e: Context) -> None:
    if e.st.cr0 & Cr0.PE and e.st.cpl > e.iopl:
        raise GuestFault(Vector.GP, 0)


def cli(e: Context, i: Instruction) -> None:
    require_iopl(e)
    e.st.iflag = 0


def sti(e: Context, i: Instruction) -> None:
    require_iopl(e)
    e.shadow = not e.st.iflag and not e.st.sysfl & Rflags.TF  # it holds off interrupts, no steps
    e.st.iflag = Rflags.IF


def clac(e: Context, i: Instruction) -> None:
    if e.st.cpl:
        raise GuestFault(Vector.UD)
    e.st.sysfl &= ~Rflags.AC
    e.cpu.state_changed()


def stac(e: Context, i: Instruction) -> None:
    if e.st.cpl:
        raise GuestFault(Vector.UD)
    e.st.sysfl |= Rflags.AC
    e.cpu.state_changed()


def swapgs(e: Context, i: Instruction) -> None:
    if e.bits != 64:
        raise GuestFault(Vector.UD)
    e.require_cpl0()
    st = e.st
    st.gs_base, st.kernel_gs_base = st.kernel_gs_base, st.gs_base


# Counters, identities, random numbers


def _timestamp(e: Context) -> int:
    if e.st.cr4 & Cr4.TSD and e.st.cpl:
        raise GuestFault(Vector.GP, 0)
    return e.msrs.timestamp()


def rdtsc(e: Context, i: Instruction) -> None:
    q, now = e.st.q, _timestamp(e)
    q[RAX], q[RDX] = now & M32, now >> 32


def rdtscp(e: Context, i: Instruction) -> None:
    q, now = e.st.q, _timestamp(e)
    q[RAX], q[RDX], q[RCX] = now & M32, now >> 32, e.st.tsc_aux & M32


def rdpid(e: Context, i: Instruction) -> None:
    if not e.cpuid.has(Feature.RDPID):
        raise GuestFault(Vector.UD)
    e.put(i.op0_register, e.st.tsc_aux & M32)


def rdpmc(e: Context, i: Instruction) -> None:
    """No counter exists, so every index is out of range."""
    raise GuestFault(Vector.GP, 0)


def random(e: Context, i: Instruction) -> None:
    feature = Feature.RDRAND if i.mnemonic == Mnemonic.RDRAND else Feature.RDSEED
    if not e.cpuid.has(feature):
        raise GuestFault(Vector.UD)
    e.put(i.op0_register, int.from_bytes(os.urandom(8), "little"))
    e.set_status(Rflags.CF)


# Extended state and bases


def _require_xsave(e: Context) -> None:
    if not e.st.cr4 & Cr4.OSXSAVE:
        raise GuestFault(Vector.UD)


def xgetbv(e: Context, i: Instruction) -> None:
    _require_xsave(e)
    q = e.st.q
    if q[RCX] & M32:
        raise GuestFault(Vector.GP, 0)
    q[RAX], q[RDX] = e.st.xcr0 & M32, e.st.xcr0 >> 32


def xsetbv(e: Context, i: Instruction) -> None:
    _require_xsave(e)
    e.require_cpl0()
    q = e.st.q
    value = q[RAX] & M32 | (q[RDX] & M32) << 32
    avx_without_sse = value & Xcr0.AVX and not value & Xcr0.SSE
    if q[RCX] & M32 or value & ~e.cpuid.xcr0_bits or not value & Xcr0.X87 or avx_without_sse:
        raise GuestFault(Vector.GP, 0)
    e.st.xcr0 = value
    e.cpu.state_changed()


def _require_fsgsbase(e: Context) -> None:
    if e.bits != 64 or not e.st.cr4 & Cr4.FSGSBASE:
        raise GuestFault(Vector.UD)


def _read_base(name: str) -> Handler:
    def read(e: Context, i: Instruction) -> None:
        _require_fsgsbase(e)
        e.put(i.op0_register, getattr(e.st, name))

    return read


def _write_base(name: str) -> Handler:
    def write(e: Context, i: Instruction) -> None:
        _require_fsgsbase(e)
        value = e.get(i.op0_register)
        if not canonical(value):
            raise GuestFault(Vector.GP, 0)
        setattr(e.st, name, value)

    return write


HANDLERS: dict[int, Handler] = {
    Mnemonic.CPUID: cpuid,
    Mnemonic.VMCALL: hypercall,
    Mnemonic.VMMCALL: hypercall,
    Mnemonic.RDMSR: rdmsr,
    Mnemonic.WRMSR: wrmsr,
    Mnemonic.IN: in_,
    Mnemonic.OUT: out,
    Mnemonic.HLT: hlt,
    Mnemonic.SERIALIZE: nothing,
    Mnemonic.WBINVD: privileged_nothing,
    Mnemonic.WBNOINVD: privileged_nothing,
    Mnemonic.INVD: privileged_nothing,
    Mnemonic.CLTS: clts,
    Mnemonic.LMSW: lmsw,
    Mnemonic.SMSW: smsw,
    Mnemonic.LGDT: lgdt,
    Mnemonic.LIDT: lidt,
    Mnemonic.SGDT: sgdt,
    Mnemonic.SIDT: sidt,
    Mnemonic.LLDT: lldt,
    Mnemonic.LTR: ltr,
    Mnemonic.SLDT: sldt,
    Mnemonic.STR: str_,
    Mnemonic.INVLPG: invlpg,
    Mnemonic.INVPCID: invpcid,
    Mnemonic.CLI: cli,
    Mnemonic.STI: sti,
    Mnemonic.CLAC: clac,
    Mnemonic.STAC: stac,
    Mnemonic.SWAPGS: swapgs,
    Mnemonic.RDTSC: rdtsc,
    Mnemonic.RDTSCP: rdtscp,
    Mnemonic.RDPID: rdpid,
    Mnemonic.RDPMC: rdpmc,
    Mnemonic.RDRAND: random,
    Mnemonic.RDSEED: random,
    Mnemonic.XGETBV: xgetbv,
    Mnemonic.XSETBV: xsetbv,
    Mnemonic.RDFSBASE: _read_base("fs_base"),
    Mnemonic.RDGSBASE: _read_base("gs_base"),
    Mnemonic.WRFSBASE: _write_base("fs_base"),
    Mnemonic.WRGSBASE: _write_base("gs_base"),
}
