"""CPU models: what the guest's CPUID says, which is exactly what the translator does.

Two models. ``baseline`` is x86-64-v2 (SSE4.2, SSSE3, POPCNT, CX16, LAHF; no XSAVE, no AVX), the same on every host.
``host`` adds what the host has and translated code can use. What either has of system features (NX, SMEP, PCID...) is
the translator's own and needs nothing of the host.

Vendor: the host's. Copied instructions behave as the host's maker made them (SYSRET to a non-canonical address, BSF of
zero, 66-prefixed near branches), and guests look at the vendor to know. Family and model are plain ones that fit the
features, never the host's: a guest that knows the host's model would look for its PMU, its errata and its power MSRs.

Speculation: the guest's mitigations cannot reach the host's predictors from here, since all of it runs in one host
process and its indirect branches go through the translator's own tables; what protects the *host* is its own kernel and
the sandbox. So the model says what makes a guest spend nothing on them: IA32_ARCH_CAPABILITIES (read on both vendors by
Linux) says that enhanced IBRS is there, which retires retpolines, and that the sampling bugs are not; BHI_CTRL that a
bit of IA32_SPEC_CTRL does what would take a loop at every system call.

Hypervisor leaves: KVM's signature, with frequencies behind it as QEMU has them; of KVM's features there is kvm-clock
(:mod:`skep.engine.amd64.kvmclock`), if the VM has it. Guests take from a hypervisor that they know what they would not
from others: Linux x2APIC without interrupt remapping, where an APIC by MSR costs less than by MMIO. Linux, FreeBSD and
OpenBSD look every 0x100 leaves for a name that they know, others at the first place alone. So our own name, which none
of them knows, comes second.

Not offered, and #UD or #GP: MONITOR, VMX, SVM, PMU, MCE, TSX, protection keys, CET, AVX-512, LA57, user interrupts,
MPX, XSAVES. FSRM is not offered though the host may have it: a short REP MOVSB costs a call here.
"""

from __future__ import annotations

import struct
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from skep.engine.amd64 import hostcpuid
from skep.engine.amd64.registers import Cr4, Xcr0
from skep.errors import UserError

MODELS = ("baseline", "host")

APIC_TIMER_HZ = 1_000_000_000
"""The clock of the local APIC's timer (skep.irqchip.lapictimer.TIMER_HZ), told as the core crystal's."""

PHYSICAL_BITS = 40
"""As QEMU's TCG has it: guests size tables by it, and 1 TiB is enough."""
LINEAR_BITS = 48

EAX, EBX, ECX, EDX = range(4)
Registers = tuple[int, int, int, int]


class Feature(Enum):
    """A CPUID bit: leaf, subleaf, register, bit. Names are the manuals'."""

    SSE3 = (1, 0, ECX, 0)
    PCLMULQDQ = (1, 0, ECX, 1)
    SSSE3 = (1, 0, ECX, 9)
    FMA = (1, 0, ECX, 12)
    CX16 = (1, 0, ECX, 13)
    PCID = (1, 0, ECX, 17)
    SSE4_1 = (1, 0, ECX, 19)
    SSE4_2 = (1, 0, ECX, 20)
    X2APIC = (1, 0, ECX, 21)
    MOVBE = (1, 0, ECX, 22)
    POPCNT = (1, 0, ECX, 23)
    TSC_DEADLINE = (1, 0, ECX, 24)
    AES = (1, 0, ECX, 25)
    XSAVE = (1, 0, ECX, 26)
    OSXSAVE = (1, 0, ECX, 27)
    AVX = (1, 0, ECX, 28)
    F16C = (1, 0, ECX, 29)
    RDRAND = (1, 0, ECX, 30)
    HYPERVISOR = (1, 0, ECX, 31)
    FPU = (1, 0, EDX, 0)
    DE = (1, 0, EDX, 2)
    PSE = (1, 0, EDX, 3)
    TSC = (1, 0, EDX, 4)
    MSR = (1, 0, EDX, 5)
    PAE = (1, 0, EDX, 6)
    CX8 = (1, 0, EDX, 8)
    APIC = (1, 0, EDX, 9)
    SEP = (1, 0, EDX, 11)
    MTRR = (1, 0, EDX, 12)
    PGE = (1, 0, EDX, 13)
    CMOV = (1, 0, EDX, 15)
    PAT = (1, 0, EDX, 16)
    PSE36 = (1, 0, EDX, 17)
    CLFSH = (1, 0, EDX, 19)
    MMX = (1, 0, EDX, 23)
    FXSR = (1, 0, EDX, 24)
    SSE = (1, 0, EDX, 25)
    SSE2 = (1, 0, EDX, 26)
    HTT = (1, 0, EDX, 28)
    ARAT = (6, 0, EAX, 2)
    FSGSBASE = (7, 0, EBX, 0)
    TSC_ADJUST = (7, 0, EBX, 1)
    BMI1 = (7, 0, EBX, 3)
    AVX2 = (7, 0, EBX, 5)
    SMEP = (7, 0, EBX, 7)
    BMI2 = (7, 0, EBX, 8)
    ERMS = (7, 0, EBX, 9)
    INVPCID = (7, 0, EBX, 10)
    RDSEED = (7, 0, EBX, 18)
    ADX = (7, 0, EBX, 19)
    SMAP = (7, 0, EBX, 20)
    CLFLUSHOPT = (7, 0, EBX, 23)
    CLWB = (7, 0, EBX, 24)
    SHA = (7, 0, EBX, 29)
    UMIP = (7, 0, ECX, 2)
    RDPID = (7, 0, ECX, 22)
    SERIALIZE = (7, 0, EDX, 14)
    IBRS = (7, 0, EDX, 26)
    ARCH_CAPABILITIES = (7, 0, EDX, 29)
    BHI_CTRL = (7, 2, EDX, 4)
    KVM_CLOCKSOURCE = (0x4000_0001, 0, EAX, 0)
    KVM_CLOCKSOURCE2 = (0x4000_0001, 0, EAX, 3)
    KVM_CLOCKSOURCE_STABLE_BIT = (0x4000_0001, 0, EAX, 24)
    LAHF = (0x8000_0001, 0, ECX, 0)
    CMP_LEGACY = (0x8000_0001, 0, ECX, 1)
    LZCNT = (0x8000_0001, 0, ECX, 5)
    PREFETCHW = (0x8000_0001, 0, ECX, 8)
    SYSCALL = (0x8000_0001, 0, EDX, 11)
    NX = (0x8000_0001, 0, EDX, 20)
    PAGE1GB = (0x8000_0001, 0, EDX, 26)
    RDTSCP = (0x8000_0001, 0, EDX, 27)
    LM = (0x8000_0001, 0, EDX, 29)
    INVARIANT_TSC = (0x8000_0007, 0, EDX, 8)
    LFENCE_SERIALIZING = (0x8000_0021, 0, EAX, 2)
    NULL_SELECTOR_CLEARS_BASE = (0x8000_0021, 0, EAX, 6)
    SRSO_NO = (0x8000_0021, 0, EAX, 29)
    TSA_SQ_NO = (0x8000_0021, 0, ECX, 1)
    TSA_L1_NO = (0x8000_0021, 0, ECX, 2)


F = Feature

SYSTEM = frozenset((
    F.FPU, F.DE, F.PSE, F.TSC, F.MSR, F.PAE, F.CX8, F.APIC, F.SEP, F.MTRR, F.PGE, F.PAT, F.PSE36, F.X2APIC,
    F.TSC_DEADLINE, F.ARAT, F.HYPERVISOR, F.PCID, F.FSGSBASE, F.TSC_ADJUST, F.SMEP, F.SMAP, F.UMIP, F.INVPCID,
    F.SERIALIZE, F.IBRS, F.BHI_CTRL, F.ARCH_CAPABILITIES, F.SYSCALL, F.NX, F.PAGE1GB, F.RDTSCP, F.LM, F.INVARIANT_TSC,
))  # fmt: skip
"""What the translator does itself."""

BASELINE = SYSTEM | frozenset((
    F.CMOV, F.CLFSH, F.MMX, F.FXSR, F.SSE, F.SSE2, F.SSE3, F.SSSE3, F.SSE4_1, F.SSE4_2, F.CX16, F.POPCNT, F.LAHF,
    F.ERMS,
))  # fmt: skip
"""x86-64-v2. ERMS: REP strings go page by page, so one REP MOVSB beats REP MOVSQ with a tail."""

FROM_HOST = frozenset((
    F.PCLMULQDQ, F.MOVBE, F.AES, F.RDRAND, F.BMI1, F.BMI2, F.RDSEED, F.ADX, F.CLFLUSHOPT, F.CLWB, F.SHA, F.LZCNT,
    F.PREFETCHW, F.RDPID,
))  # fmt: skip
"""What ``host`` adds where the host has it."""

FROM_HOST_AVX = frozenset((F.XSAVE, F.AVX, F.AVX2, F.FMA, F.F16C))
"""The same, where the host's kernel has enabled AVX state too."""

AMD = frozenset((
    F.LFENCE_SERIALIZING, F.NULL_SELECTOR_CLEARS_BASE, F.SRSO_NO, F.TSA_SQ_NO, F.TSA_L1_NO,
))  # fmt: skip
"""Said by AMD's own leaf."""

KVM_CLOCK = frozenset((F.KVM_CLOCKSOURCE, F.KVM_CLOCKSOURCE2, F.KVM_CLOCKSOURCE_STABLE_BIT))
"""kvm-clock: by its old MSRs, by its new ones, and that its pages say whether all processors' TSCs agree."""

MIRRORED = 0x0183_F3FF & ~(1 << 11)
"""Bits of 1.EDX that AMD repeats in 0x80000001.EDX."""

INTEL_VENDOR, AMD_VENDOR = b"GenuineIntel", b"AuthenticAMD"

# family, model, stepping as CPUID packs them
NEHALEM, HASWELL, ZEN3 = 0x0001_06A5, 0x0003_06C3, 0x00A0_0F11

SIGNATURE = b"SkepSkepSkep"
KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
BRAND = b"Skep virtual CPU"

KVM_LEAF, SKEP_LEAF = 0x4000_0000, 0x4000_0100
MAX_BASIC, MAX_HYPERVISOR, MAX_EXTENDED_INTEL, MAX_EXTENDED_AMD = 0x16, 0x4000_0010, 0x8000_0008, 0x8000_0021

XSAVE_LEGACY_SIZE = 576  # x87 and SSE, with the header
AVX_OFFSET, AVX_SIZE = 576, 256

CR4_BASE = (
    Cr4.TSD | Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.PCE | Cr4.OSFXSR | Cr4.OSXMMEXCPT
    | Cr4.UMIP | Cr4.FSGSBASE | Cr4.PCIDE | Cr4.SMEP | Cr4.SMAP
)  # fmt: skip


class Cpuid(NamedTuple):
    """One vCPU's CPUID."""

    vendor: bytes
    features: frozenset[Feature]
    table: dict[tuple[int, int], Registers]
    """(leaf, subleaf) -> EAX, EBX, ECX, EDX, for leaves with subleaves every one of them that is not zero; the rest of
    the leaves under subleaf 0. :meth:`read` adds what depends on control registers."""

    @property
    def physical_bits(self) -> int:
        return PHYSICAL_BITS

    @property
    def is_amd(self) -> bool:
        return self.vendor == AMD_VENDOR

    @property
    def xcr0_bits(self) -> int:
        """What XSETBV may set."""
        if F.XSAVE not in self.features:
            return 0
        return Xcr0.X87 | Xcr0.SSE | (Xcr0.AVX if F.AVX in self.features else 0)

    @property
    def cr4_bits(self) -> int:
        """What MOV CR4 may set."""
        return CR4_BASE | (Cr4.OSXSAVE if F.XSAVE in self.features else 0)

    def has(self, feature: Feature) -> bool:
        return feature in self.features

    def read(self, leaf: int, subleaf: int, cr4: int, xcr0: int) -> Registers:
        """What CPUID gives. Leaves that do not exist give zeros, as AMD has it."""
        a, b, c, d = self.table.get((leaf, subleaf if leaf in SUBLEAVES else 0), (0, 0, 0, 0))
        if leaf == 1 and cr4 & Cr4.OSXSAVE:
            c |= 1 << 27
        elif leaf == 0xB:  # the level number asked for comes back, and the APIC id is everywhere
            c, d = c | subleaf & 0xFF, self.table[0xB, 0][EDX]
        elif leaf == 0xD and subleaf == 0 and F.XSAVE in self.features:
            b = AVX_OFFSET + AVX_SIZE if xcr0 & Xcr0.AVX else XSAVE_LEGACY_SIZE
        return a, b, c, d


SUBLEAVES = frozenset((4, 7, 0xB, 0xD, 0x8000_001D))


@lru_cache(maxsize=1)
def host_vendor() -> bytes:
    """Intel's or AMD's vendor string: whose rules the host follows. Hygon builds AMD's cores; Zhaoxin follows Intel."""
    _, b, c, d = hostcpuid.cpuid(0)
    vendor = struct.pack("<III", b, d, c)
    return AMD_VENDOR if vendor in (AMD_VENDOR, b"HygonGenuine") else INTEL_VENDOR


def host_has(feature: Feature) -> bool:
    leaf, subleaf, register, bit = feature.value
    if hostcpuid.cpuid(leaf & 0x8000_0000)[EAX] < leaf:
        return False
    return bool(hostcpuid.cpuid(leaf, subleaf)[register] >> bit & 1)


def model_features(model: str, vendor: bytes) -> frozenset[Feature]:
    """The features of ``baseline`` or ``host``. Raises UserError for a model that does not exist."""
    if model not in MODELS:
        raise UserError(f"no such CPU model: {model}", "cpu.model", f"take one of {', '.join(MODELS)}")
    features = BASELINE | (AMD if vendor == AMD_VENDOR else frozenset())
    if model == "host":
        features |= {feature for feature in FROM_HOST if host_has(feature)}
        state = Xcr0.X87 | Xcr0.SSE | Xcr0.AVX
        if host_has(F.XSAVE) and host_has(F.AVX) and hostcpuid.xcr0() & state == state:
            features |= {feature for feature in FROM_HOST_AVX if host_has(feature)}
    return features


def make(
    model: str, tsc_hz: int, apic_id: int = 0, cpus: int = 1, vendor: bytes | None = None, *, kvm_clock: bool = False
) -> Cpuid:
    """The CPUID of the vCPU ``apic_id`` of ``cpus``, all cores of one package; the vendor is the host's by default."""
    vendor = vendor or host_vendor()
    features = model_features(model, vendor)
    if kvm_clock:
        features |= KVM_CLOCK
    if cpus > 1:
        features |= {F.HTT, F.CMP_LEGACY} if vendor == AMD_VENDOR else {F.HTT}
    table = _fixed(vendor, features, tsc_hz, apic_id, cpus)
    for feature in features:
        leaf, subleaf, register, bit = feature.value
        row = list(table.get((leaf, subleaf), (0, 0, 0, 0)))
        row[register] |= 1 << bit
        table[leaf, subleaf] = (row[0], row[1], row[2], row[3])
    if vendor == AMD_VENDOR:
        a, b, c, d = table[0x8000_0001, 0]
        table[0x8000_0001, 0] = (a, b, c, d | table[1, 0][EDX] & MIRRORED)
    return Cpuid(vendor, features, table)


def _fixed(
    vendor: bytes, features: frozenset[Feature], tsc_hz: int, apic_id: int, cpus: int
) -> dict[tuple[int, int], Registers]:
    """Everything but feature bits."""
    amd = vendor == AMD_VENDOR
    signature = ZEN3 if amd else HASWELL if F.AVX2 in features else NEHALEM
    vendor_b, vendor_d, vendor_c = struct.unpack("<III", vendor)
    core_bits = (cpus - 1).bit_length()
    clflush_quadwords = 8
    table: dict[tuple[int, int], Registers] = {
        (0, 0): (MAX_BASIC, vendor_b, vendor_c, vendor_d),
        (1, 0): (signature, clflush_quadwords << 8 | min(cpus, 255) << 16 | (apic_id & 0xFF) << 24, 0, 0),
        (0xB, 0): (0, 1, 1 << 8, apic_id),  # threads: one a core
        (0xB, 1): (core_bits, cpus, 2 << 8 | 1, apic_id),
        (0x15, 0): _tsc_and_crystal(tsc_hz),
        (0x16, 0): (round(tsc_hz / 10**6), round(tsc_hz / 10**6), 100, 0),
        (7, 0): (2, 0, 0, 0),  # the last subleaf
        (KVM_LEAF, 0): (MAX_HYPERVISOR, *struct.unpack("<III", KVM_SIGNATURE)),
        (KVM_LEAF + 1, 0): (0, 0, 0, 0),
        (0x4000_0010, 0): (tsc_hz // 1000, APIC_TIMER_HZ // 1000, 0, 0),
        (SKEP_LEAF, 0): (SKEP_LEAF, *struct.unpack("<III", SIGNATURE)),
        (0x8000_0000, 0): (MAX_EXTENDED_AMD, vendor_b, vendor_c, vendor_d) if amd else (MAX_EXTENDED_INTEL, 0, 0, 0),
        (0x8000_0001, 0): (signature if amd else 0, 0, 0, 0),
        (0x8000_0006, 0): (0, 0, 1024 << 16 | 8 << 12 | 64, 32 * 2 << 18 | 8 << 12 | 64 if amd else 0),
        (0x8000_0008, 0): (PHYSICAL_BITS | LINEAR_BITS << 8, 0, (cpus - 1) | core_bits << 12 if amd else 0, 0),
    }
    brand = BRAND.ljust(48, b"\0")
    for part in range(3):
        table[0x8000_0002 + part, 0] = struct.unpack_from("<4I", brand, 16 * part)
    if amd:
        table[0x8000_0005, 0] = (0, 0, 32 << 24 | 8 << 16 | 1 << 8 | 64, 32 << 24 | 8 << 16 | 1 << 8 | 64)
    else:
        table[2, 0] = (0x0000_FF01, 0, 0, 0)  # caches: see leaf 4
    for number, cache in enumerate(_caches(cpus)):
        table[0x8000_001D if amd else 4, number] = cache
    if F.XSAVE in features:
        avx = F.AVX in features
        largest = AVX_OFFSET + AVX_SIZE if avx else XSAVE_LEGACY_SIZE
        table[0xD, 0] = (Xcr0.X87 | Xcr0.SSE | (Xcr0.AVX if avx else 0), XSAVE_LEGACY_SIZE, largest, 0)
        if avx:
            table[0xD, 2] = (AVX_SIZE, AVX_OFFSET, 0, 0)
    return table


def _tsc_and_crystal(tsc_hz: int) -> Registers:
    """Leaf 0x15: denominator and numerator of TSC over crystal, and the crystal's frequency, which is the APIC timer's.

    Linux multiplies the crystal's kHz by the numerator in 32 bits, so that is kept small; what the ratio then lacks
    goes into the crystal, which so differs from the timer's clock by at most 0.02 %, and the TSC comes out right.
    """
    limit = 0xFFFF_FFFF // (APIC_TIMER_HZ // 1000) - 1
    denominator, numerator = _nearest(APIC_TIMER_HZ, tsc_hz, limit)
    return denominator, numerator, round(tsc_hz * denominator / numerator), 0


def _nearest(over: int, under: int, limit: int) -> tuple[int, int]:
    """The fraction nearest to ``over / under`` among those with a denominator up to ``limit``: the last convergent of
    its continued fraction that has one, or the best between that and the next. (The library's module for fractions
    takes longer to import than all of CPUID to make.)"""
    a, b = over, under
    before, last = (0, 1), (1, 0)
    while b:
        whole, rest = divmod(a, b)
        following = before[0] + whole * last[0], before[1] + whole * last[1]
        if following[1] > limit:
            part = (limit - before[1]) // last[1]
            between = before[0] + part * last[0], before[1] + part * last[1]
            return min(last, between, key=lambda one: abs(one[0] * under - one[1] * over) / one[1])
        before, last, a, b = last, following, b, rest
    return last


def _caches(cpus: int) -> list[Registers]:
    """Plain caches of a present-day core (SDM 2, CPUID leaf 4; AMD's 0x8000001D has the same form)."""
    data, instruction, unified = 1, 2, 3
    line = 64
    rows = []
    for kind, level, kib, ways, sharing in (
        (data, 1, 32, 8, 1),
        (instruction, 1, 32, 8, 1),
        (unified, 2, 1024, 8, 1),
        (unified, 3, 32768, 16, cpus),
    ):
        sets = kib * 1024 // ways // line
        shared = (1 << (sharing - 1).bit_length()) - 1
        cores = (1 << (cpus - 1).bit_length()) - 1
        self_initializing = 1 << 8
        rows.append((
            kind | level << 5 | self_initializing | min(shared, 0xFFF) << 14 | min(cores, 0x3F) << 26,
            line - 1 | (ways - 1) << 22,
            sets - 1,
            0,
        ))  # fmt: skip
    return rows
