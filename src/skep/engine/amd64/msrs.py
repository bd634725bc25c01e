"""Model-specific registers: numbers, and the rules for their values (Intel SDM 4; SDM 3 for each one's meaning)."""

from __future__ import annotations

from skep.engine.amd64.registers import Efer

IA32_TSC = 0x10
KVM_WALL_CLOCK, KVM_SYSTEM_TIME = 0x11, 0x12
IA32_PLATFORM_ID = 0x17
IA32_APIC_BASE = 0x1B
IA32_FEATURE_CONTROL = 0x3A
IA32_TSC_ADJUST = 0x3B
IA32_SPEC_CTRL = 0x48
IA32_PRED_CMD = 0x49
IA32_BIOS_UPDT_TRIG = 0x79
IA32_BIOS_SIGN_ID = 0x8B
IA32_MTRRCAP = 0xFE
IA32_ARCH_CAPABILITIES = 0x10A
IA32_SYSENTER_CS = 0x174
IA32_SYSENTER_ESP = 0x175
IA32_SYSENTER_EIP = 0x176
IA32_MCG_CAP = 0x179
IA32_MISC_ENABLE = 0x1A0
IA32_MTRR_PHYSBASE0 = 0x200
IA32_MTRR_FIX = (0x250, 0x258, 0x259, *range(0x268, 0x270))
IA32_PAT = 0x277
IA32_MTRR_DEF_TYPE = 0x2FF
IA32_TSC_DEADLINE = 0x6E0
X2APIC_TPR, X2APIC_EOI, X2APIC_ICR, X2APIC_SELF_IPI = 0x808, 0x80B, 0x830, 0x83F
IPI_FIXED, IPI_LOGICAL = 0xCC8FF, 0x800
"""In the interrupt command register (SDM 3, 11.6.1): what a fixed interrupt may have set; a logical destination."""
X2APIC_FIRST, X2APIC_LAST = 0x800, 0x8FF
KVM_WALL_CLOCK_NEW, KVM_SYSTEM_TIME_NEW = 0x4B56_4D00, 0x4B56_4D01
KVM_FIRST, KVM_COUNT = KVM_WALL_CLOCK_NEW, 16
"""KVM's own."""
EFER = 0xC000_0080
STAR = 0xC000_0081
LSTAR = 0xC000_0082
CSTAR = 0xC000_0083
SFMASK = 0xC000_0084
FS_BASE = 0xC000_0100
GS_BASE = 0xC000_0101
KERNEL_GS_BASE = 0xC000_0102
TSC_AUX = 0xC000_0103
AMD_SYSCFG = 0xC001_0010
AMD_HWCR = 0xC001_0015
AMD_NB_CFG = 0xC001_001F

MTRR_VARIABLE = 8
MTRR_PHYS = tuple(range(IA32_MTRR_PHYSBASE0, IA32_MTRR_PHYSBASE0 + 2 * MTRR_VARIABLE))
"""Pairs of base and mask."""
MTRRCAP_VALUE = MTRR_VARIABLE | 1 << 8 | 1 << 10  # fixed ranges, write combining
MTRR_ENABLE, MTRR_FIXED_ENABLE = 1 << 11, 1 << 10

APIC_BASE_ENABLE = 1 << 11
MISC_ENABLE_FAST_STRINGS = 1 << 0
MISC_ENABLE_BTS_UNAVAILABLE, MISC_ENABLE_PEBS_UNAVAILABLE = 1 << 11, 1 << 12
MISC_ENABLE_READ_ONLY = 1 << 7 | MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE
MISC_ENABLE_RESERVED = ~((1 << 39) - 1) & (1 << 64) - 1
MISC_ENABLE_VALUE = MISC_ENABLE_FAST_STRINGS | MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE

RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO = (
    1 << bit for bit in (0, 1, 3, 4, 5, 6, 8)
)
SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO = (
    1 << bit for bit in (13, 14, 15, 20, 24, 26, 27, 62)
)
ARCH_CAPABILITIES_VALUE = (
    RDCL_NO | IBRS_ALL | SKIP_L1DFL_VMENTRY | SSB_NO | MDS_NO | PSCHANGE_MC_NO | TAA_NO
    | SBDR_SSDP_NO | FBSDP_NO | PSDP_NO | BHI_NO | PBRSB_NO | GDS_NO | RFDS_NO | ITS_NO
)  # fmt: skip
"""See :mod:`skep.engine.amd64.cpuid` for why."""

SPEC_CTRL_IBRS, SPEC_CTRL_BHI_DIS_S = 1 << 0, 1 << 10
PRED_CMD_IBPB = 1 << 0

HWCR_TSC_FREQ_SEL = 1 << 24  # the TSC counts at the P0 frequency; Linux warns where it does not

EFER_WRITABLE = Efer.SCE | Efer.LME | Efer.NXE

PAT_RESET = 0x0007_0406_0007_0406
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))
MTRR_TYPES = frozenset((0, 1, 4, 5, 6))
UNCACHED, WRITE_BACK = 0, 6

SAVED = (
    IA32_TSC_ADJUST, IA32_SPEC_CTRL, IA32_SYSENTER_CS, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP, IA32_MISC_ENABLE,
    *MTRR_PHYS, *IA32_MTRR_FIX, IA32_PAT, IA32_MTRR_DEF_TYPE,
    STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, TSC_AUX,
)  # fmt: skip
"""What the ``msrs`` of a vCPU's state holds. EFER and the segment bases have names of their own there."""


AMD_RESET = {AMD_SYSCFG: 0, AMD_HWCR: HWCR_TSC_FREQ_SEL, AMD_NB_CFG: 0}
"""What AMD's CPUs have besides and kernels touch without asking: kept, and without effect."""


def valid_pat(value: int) -> bool:
    return all(value >> shift & 0xFF in PAT_TYPES for shift in range(0, 64, 8))


def valid_mtrr_fixed(value: int) -> bool:
    return all(value >> shift & 0xFF in MTRR_TYPES for shift in range(0, 64, 8))


def valid_mtrr_def_type(value: int) -> bool:
    return value & 0xFF in MTRR_TYPES and not value & ~(0xFF | MTRR_ENABLE | MTRR_FIXED_ENABLE)


def valid_mtrr_variable(index: int, value: int, physical_bits: int) -> bool:
    """A base holds a type, a mask its valid bit."""
    if value >> physical_bits:
        return False
    is_mask = index & 1
    return not value & 0x7FF if is_mask else value & 0xFF in MTRR_TYPES and not value & 0xF00


def mtrr_reset(physical_bits: int) -> dict[int, int]:
    """The MTRRs as firmware leaves them, for a board whose hole for devices is 3 to 4 GiB: all memory write-back, the
    hole and the VGA window uncached."""
    valid = 1 << 11
    hole = 3 << 30
    values = dict.fromkeys((*MTRR_PHYS, *IA32_MTRR_FIX), 0)
    values |= dict.fromkeys(IA32_MTRR_FIX, 0x0606_0606_0606_0606)
    values[0x259] = 0  # 0xa0000 to 0xbffff
    values[IA32_MTRR_PHYSBASE0] = hole | UNCACHED
    values[IA32_MTRR_PHYSBASE0 + 1] = ((1 << physical_bits) - (1 << 30)) | valid
    values[IA32_MTRR_DEF_TYPE] = WRITE_BACK | MTRR_ENABLE | MTRR_FIXED_ENABLE
    return values
