"""System instructions of 64-bit code, in the compiled language (runtime.py): CPUID, MSRs, data segments.

Each routine gets an operand and a descriptor - the instruction's offset in its page, above it (bit 12) what the
instruction names - and gives 1, or 0 with nothing changed: then the instruction is Python's (emulate_system.py), which
knows the rest of its cases and all of its faults.
"""

from __future__ import annotations

from skep.contracts.constantports import PRESENT
from skep.engine.amd64.msrs import (
    FS_BASE,
    GS_BASE,
    IA32_PRED_CMD,
    IA32_TSC_ADJUST,
    IA32_TSC_DEADLINE,
    KERNEL_GS_BASE,
    PRED_CMD_IBPB,
    X2APIC_EOI,
    X2APIC_ICR,
    X2APIC_SELF_IPI,
    X2APIC_TPR,
)
from skep.engine.amd64.registers import Cr4, Xcr0
from skep.engine.translate.apic_runtime import (
    APIC_ROUTINES,
    end_interrupt,
    send,
    send_self,
    set_deadline,
    set_task_priority,
)
from skep.engine.translate.compiler import inline, ld16, ld32, ld64, sar, st, st64
from skep.engine.translate.identity import (
    EXTENDED_STATE,
    FEATURES,
    HAS_SUBLEAVES,
    ROW,
    ROW_HOW,
    ROW_REGISTERS,
    ROWS,
    TOPOLOGY,
    WITH_AVX,
    WITHOUT_AVX,
    first_row,
    next_row,
)
from skep.engine.translate.layout import ES, Kind
from skep.engine.translate.runtime import descriptor_at, resume

M32 = 0xFFFFFFFF
SELECTOR, BASE, LIMIT, ATTRIBUTES = ES
OSXSAVE, CPUID_OSXSAVE, AVX = Cr4.OSXSAVE, 1 << 27, Xcr0.AVX


@inline
def python(desc: int) -> int:
    st.rip = st.page + (desc & 4095)
    st.kind = Kind.EMULATE
    return 0


@inline
def python_msr(desc: int, write: int) -> int:
    """As python, for RDMSR and WRMSR."""
    st.rip = st.page + (desc & 4095)
    st.kind = Kind.MSR
    st.info = write
    return 0


def load_segment(selector: int, desc: int) -> int:
    """MOV to DS, ES, FS or GS: the null selectors, and data segments of the GDT whose accessed bit is set."""
    me = st.self_ + (desc >> 12) * 8
    selector = selector & 0xFFFF
    base = 0
    limit = 0
    attributes = 0
    if selector & ~3:
        data = descriptor_at(selector)
        dpl = (data >> 45) & 3
        if (data >> 40) & 0x99 != 0x91 or dpl < selector & 3 or dpl < st.cpl:
            return python(desc)
        base = ((data >> 16) & 0xFFFFFF) | ((data >> 56) << 24)
        limit = (data & 0xFFFF) | ((data >> 32) & 0xF0000)
        attributes = (data >> 40) & 0xF0FF
        if attributes & 0x8000:
            limit = (limit << 12) | 0xFFF
    st64(me + SELECTOR, selector)
    st64(me + BASE, base)
    st64(me + LIMIT, limit)
    st64(me + ATTRIBUTES, attributes)
    return 1


def row_of(key: int) -> int:
    """The row of a leaf (with its subleaf at bit 32) in the table that identity.py has written, or 0."""
    number = first_row(key)
    while True:
        row = st.self_ + ROWS + number * ROW
        have = ld64(row)
        if have == key:
            return row
        if have + 1 == 0:
            return 0
        number = next_row(number)


def identify(unused: int, desc: int) -> int:
    """CPUID (amd64/cpuid.py, Cpuid.read)."""
    leaf = st.rax & M32
    subleaf = st.rcx & M32
    row = row_of(leaf)
    last = 0
    if row:
        last = ld32(row + ROW_REGISTERS + 12)
        if ld32(row + ROW_HOW) & HAS_SUBLEAVES and subleaf:
            row = row_of(leaf | (subleaf << 32))
    a = 0
    b = 0
    c = 0
    d = 0
    if row:
        a = ld32(row + ROW_REGISTERS)
        b = ld32(row + ROW_REGISTERS + 4)
        c = ld32(row + ROW_REGISTERS + 8)
        d = ld32(row + ROW_REGISTERS + 12)
    if leaf == FEATURES and st.cr4 & OSXSAVE:
        c = c | CPUID_OSXSAVE
    if leaf == TOPOLOGY:
        c = c | (subleaf & 0xFF)
        d = last
    if leaf == EXTENDED_STATE and subleaf == 0 and row:
        b = WITHOUT_AVX
        if st.xcr0 & AVX:
            b = WITH_AVX
    st.rax = a
    st.rbx = b
    st.rcx = c
    st.rdx = d
    return 1


def read_msr(unused: int, desc: int) -> int:
    """RDMSR of the segments' bases, of what the counter is adjusted by, and of what the local APIC has lent."""
    index = st.rcx & M32
    if index == FS_BASE:
        value = st.fs_base
    elif index == GS_BASE:
        value = st.gs_base
    elif index == KERNEL_GS_BASE:
        value = st.kernel_gs_base
    elif index == IA32_TSC_ADJUST:
        value = st.tsc_adjust
    elif index == X2APIC_TPR and st.apic:
        value = st.apic_task
    elif index == X2APIC_ICR and st.apic:
        value = st.apic_command
    else:
        return python_msr(desc, 0)
    st.rax = value & M32
    st.rdx = value >> 32
    return 1


def write_apic(index: int, value: int, now: int) -> int:
    """What the local APIC has lent: 1, or 0 with nothing done."""
    if index == X2APIC_EOI and value == 0:
        return end_interrupt(now)
    if index == IA32_TSC_DEADLINE and st.apic_vector:
        return set_deadline(now, value)
    if index == X2APIC_ICR:
        return send(value)
    if index == X2APIC_SELF_IPI:
        return send_self(value)
    if index == X2APIC_TPR and value <= 0xFF:
        return set_task_priority(now, value)
    return 0


def write_msr(now: int, desc: int) -> int:
    """WRMSR of the segments' bases, of commands to predictors that guest code does not reach, and of what the local
    APIC has lent."""
    index = st.rcx & M32
    value = (st.rax & M32) | (st.rdx << 32)
    if st.apic and write_apic(index, value, now):
        return 1
    if index == IA32_PRED_CMD and value & ~PRED_CMD_IBPB == 0:
        return 1
    if sar(value, 47) + 1 > 1:
        return python_msr(desc, 1)
    if index == FS_BASE:
        st.fs_base = value
    elif index == GS_BASE:
        st.gs_base = value
    elif index == KERNEL_GS_BASE:
        st.kernel_gs_base = value
    else:
        return python_msr(desc, 1)
    return 1


def port() -> int:
    """IN of a byte that is known without the device (contracts/constantports.py): as resume. 0: Python's, PORT."""
    if st.info & 0x1F != 1 or st.constants == 0 or st.single or st.armed7 & 0xFF:
        return 0
    number = st.rdx & 0xFFFF
    if st.info & 0x20:
        number = st.info >> 16
    word = ld16(st.constants + number * 2)
    if word & PRESENT == 0:
        return 0
    st.rax = (st.rax & ~0xFF) | (word & 0xFF)
    st.n_port = st.n_port + 1
    return resume()


SYSTEM_ROUTINES = [
    *APIC_ROUTINES, port, load_segment, row_of, identify, read_msr, write_apic, write_msr,
]  # fmt: skip
