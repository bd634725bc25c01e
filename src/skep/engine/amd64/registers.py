"""Names of amd64 registers and bits, as the manuals have them, and the shape of a vCPU's state.

The state that :meth:`skep.engine.contract.Vcpu.get_state` gives and ``set_state`` takes (any subset of it) is a
:class:`CpuState`: plain values under architectural names, the same for every engine. What is not in it belongs to
somebody else: the local APIC's registers (with IA32_APIC_BASE and IA32_TSC_DEADLINE) to the APIC, the time stamp
counter to the VM's clock.
"""

from __future__ import annotations

from typing import TypedDict

GENERAL = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
SYSTEM_SEGMENTS = ("ldtr", "tr")
TABLES = ("gdtr", "idtr")


class Segment(TypedDict):
    """A segment register with its hidden part.

    ``limit`` is in bytes (granularity applied). ``attributes`` are bits 40-47 and 52-55 of the descriptor as VMX has
    them (SDM 3, table 25-2): type | S << 4 | DPL << 5 | P << 7 | AVL << 12 | L << 13 | D << 14 | G << 15. After a load
    with a null selector P is clear: the segment cannot be used outside 64-bit mode.
    """

    selector: int
    base: int
    limit: int
    attributes: int


class Table(TypedDict):
    """GDTR or IDTR."""

    base: int
    limit: int


class CpuState(TypedDict, total=False):
    """Everything that one vCPU is."""

    rax: int
    rcx: int
    rdx: int
    rbx: int
    rsp: int
    rbp: int
    rsi: int
    rdi: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int
    es: Segment
    cs: Segment
    ss: Segment
    ds: Segment
    fs: Segment
    gs: Segment
    ldtr: Segment
    tr: Segment
    gdtr: Table
    idtr: Table
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int
    xcr0: int
    dr0: int
    dr1: int
    dr2: int
    dr3: int
    dr6: int
    dr7: int
    xsave: bytes
    """x87, SSE and AVX state in the standard (not compacted) XSAVE format, header included."""
    msrs: dict[int, int]
    """Those of :data:`skep.engine.amd64.msrs.SAVED` that the engine knows."""
    interrupt: int
    """A vector that was taken from the interrupt controller and did not reach the guest yet; absent: there is none."""
    nmi_blocked: int
    """1: the guest is in its NMI handler."""
    nmi_pending: int
    """1: another NMI waits for that handler's end, or has come and not reached the guest yet."""
    activity: str
    """The value of a :class:`skep.engine.contract.Activity`; absent where the engine has no local APIC, and does not
    know."""


class Attr:
    """Bits of :class:`Segment` attributes."""

    TYPE = 0xF
    S = 1 << 4  # code or data, not a system segment
    DPL_SHIFT = 5
    P = 1 << 7
    AVL = 1 << 12
    L = 1 << 13  # 64-bit code
    D = 1 << 14  # 32-bit code or stack
    G = 1 << 15

    ACCESSED = 1 << 0
    WRITABLE = 1 << 1  # data segments
    READABLE = 1 << 1  # code segments
    EXPAND_DOWN = 1 << 2  # data segments
    CONFORMING = 1 << 2  # code segments
    CODE = 1 << 3


class SystemType:
    """The type field of system descriptors (SDM 3, table 3-2). The number is the same in 32- and 64-bit mode."""

    TSS16 = 1
    LDT = 2
    TSS16_BUSY = 3
    CALL_GATE16 = 4
    TASK_GATE = 5
    INTERRUPT_GATE16 = 6
    TRAP_GATE16 = 7
    TSS = 9
    TSS_BUSY = 11
    CALL_GATE = 12
    INTERRUPT_GATE = 14
    TRAP_GATE = 15


class Cr0:
    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31
    ALL = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG


class Cr4:
    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23


class Efer:
    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11


class Rflags:
    CF = 1 << 0
    ONE = 1 << 1  # always set
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL = 3 << 12
    IOPL_SHIFT = 12
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21
    STATUS = CF | PF | AF | ZF | SF | OF


class Xcr0:
    X87 = 1 << 0
    SSE = 1 << 1
    AVX = 1 << 2


class Vector:
    """Exceptions (SDM 3, table 6-1)."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19


class Pte:
    """Bits of a paging-structure entry (SDM 3, 4.5)."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7  # in a directory: maps a large page
    G = 1 << 8
    NX = 1 << 63
    ADDRESS = 0x000F_FFFF_FFFF_F000


class PfError:
    """The error code of #PF (SDM 3, figure 4-12)."""

    P = 1 << 0
    W = 1 << 1
    U = 1 << 2
    RSVD = 1 << 3
    FETCH = 1 << 4  # I/D in the manual


def canonical(address: int) -> bool:
    """Whether bits 63:47 are all equal (4-level paging)."""
    return address < 1 << 47 or 0xFFFF_8000_0000_0000 <= address < 1 << 64
