"""KVM's ioctls and structures for x86, by the names of <linux/kvm.h>, as far as the engine uses them.

The ioctls go through ctypes: ``fcntl.ioctl`` retries EINTR from Python 3.14 on, and a kick would never end KVM_RUN.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import Array, Structure, Union, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any

API_VERSION = 12

CAP_IRQCHIP = 0
CAP_USER_MEMORY = 3
CAP_NR_MEMSLOTS = 10
CAP_SET_GUEST_DEBUG = 23
CAP_COALESCED_MMIO = 15
CAP_IRQ_ROUTING = 25
CAP_ADJUST_CLOCK = 39
CAP_TSC_CONTROL = 60
CAP_IRQFD = 32
CAP_PIT2 = 33
CAP_PIT_STATE2 = 35
CAP_MAX_VCPUS = 66
CAP_TSC_DEADLINE_TIMER = 72
CAP_IRQFD_RESAMPLE = 82
CAP_READONLY_MEM = 81
CAP_SYNC_REGS = 74
CAP_KVMCLOCK_CTRL = 76
CAP_SIGNAL_MSI = 77
CAP_SPLIT_IRQCHIP = 121
CAP_IOEVENTFD_ANY_LENGTH = 122
CAP_X2APIC_API = 129
CAP_IMMEDIATE_EXIT = 136
CAP_COALESCED_PIO = 162
CAP_X86_USER_SPACE_MSR = 188
CAP_X86_MSR_FILTER = 189
CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
CAP_DIRTY_LOG_RING = 192
CAP_SET_GUEST_DEBUG2 = 195
CAP_BINARY_STATS_FD = 203

EXIT_IO = 2
EXIT_DEBUG = 4
EXIT_HLT = 5
EXIT_MMIO = 6
EXIT_IRQ_WINDOW_OPEN = 7
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTR = 10
EXIT_SET_TPR = 11
EXIT_INTERNAL_ERROR = 17
EXIT_IOAPIC_EOI = 26
EXIT_X86_RDMSR = 29
EXIT_X86_WRMSR = 30
EXIT_DIRTY_RING_FULL = 31

EXIT_IO_OUT = 1
MEM_LOG_DIRTY_PAGES, MEM_READONLY = 1, 2
DIRTY_LOG_MANUAL_PROTECT_ENABLE, DIRTY_LOG_INITIALLY_SET = 1, 2
DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET = 1, 2
DIRTY_LOG_PAGE_OFFSET = 64
CPUID_FLAG_SIGNIFICANT_INDEX = 1
MSR_EXIT_REASON_INVAL, MSR_EXIT_REASON_UNKNOWN, MSR_EXIT_REASON_FILTER = 1, 2, 4
MSR_FILTER_READ, MSR_FILTER_WRITE = 1, 2
VCPU_TSC_CTRL, VCPU_TSC_OFFSET = 0, 0
VCPUEVENT_VALID_NMI_PENDING, VCPUEVENT_VALID_SHADOW = 1, 4
X2APIC_API_USE_32BIT_IDS, X2APIC_API_DISABLE_BROADCAST_QUIRK = 1, 2
IRQ_ROUTING_IRQCHIP, IRQ_ROUTING_MSI = 1, 2
IRQCHIP_PIC_MASTER, IRQCHIP_PIC_SLAVE, IRQCHIP_IOAPIC = range(3)
PIT_SPEAKER_DUMMY = 1
PIT_HPET_LEGACY, PIT_SPEAKER_DATA_ON = 1, 2
MP_STATE_RUNNABLE, MP_STATE_UNINITIALIZED, MP_STATE_INIT_RECEIVED, MP_STATE_HALTED, MP_STATE_SIPI_RECEIVED = range(5)
IOEVENTFD_FLAG_DEASSIGN = 4
IRQFD_FLAG_DEASSIGN, IRQFD_FLAG_RESAMPLE = 1, 2
SYNC_X86_REGS = 1
GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP, GUESTDBG_USE_SW_BP, GUESTDBG_USE_HW_BP = 1, 2, 0x10000, 0x20000
GUESTDBG_INJECT_DB, GUESTDBG_BLOCKIRQ = 0x40000, 0x100000
LAPIC_SIZE = 1024


class UserspaceMemoryRegion(Structure):
    _fields_ = (
        ("slot", c_uint32), ("flags", c_uint32),
        ("guest_phys_addr", c_uint64), ("memory_size", c_uint64), ("userspace_addr", c_uint64),
    )  # fmt: skip


class DirtyLog(Structure):
    _fields_ = (("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", ctypes.c_void_p))


class ClearDirtyLog(Structure):
    """``first_page`` is a multiple of 64, and so is ``num_pages``, unless the slot ends there."""

    _fields_ = (
        ("slot", c_uint32), ("num_pages", c_uint32), ("first_page", c_uint64), ("dirty_bitmap", ctypes.c_void_p),
    )  # fmt: skip


class DirtyGfn(Structure):
    """An entry of a dirty ring."""

    _fields_ = (("flags", c_uint32), ("slot", c_uint32), ("offset", c_uint64))


class EnableCap(Structure):
    _fields_ = (("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))


class MsrFilterRange(Structure):
    """``bitmap`` has a bit for each MSR from ``base`` on: 0 hands it to userspace."""

    _fields_ = (("flags", c_uint32), ("nmsrs", c_uint32), ("base", c_uint32), ("bitmap", ctypes.c_void_p))


class MsrFilter(Structure):
    _fields_ = (("flags", c_uint32), ("ranges", MsrFilterRange * 16))


class DeviceAttr(Structure):
    _fields_ = (("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64))


class ClockData(Structure):
    """``clock`` is kvm-clock's, in ns; the rest only SET_CLOCK's ``flags`` would ask for."""

    _fields_ = (
        ("clock", c_uint64), ("flags", c_uint32), ("pad0", c_uint32), ("realtime", c_uint64), ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    )  # fmt: skip


class Regs(Structure):
    NAMES = (
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
    )  # fmt: skip
    _fields_ = tuple((name, c_uint64) for name in NAMES)


class Segment(Structure):
    _fields_ = (
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    )  # fmt: skip


class Dtable(Structure):
    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class Sregs(Structure):
    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Dtable), ("idt", Dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )  # fmt: skip


class Debugregs(Structure):
    _fields_ = (
        ("db", c_uint64 * 4), ("dr6", c_uint64), ("dr7", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 9),
    )  # fmt: skip


class GuestDebug(Structure):
    """``debugreg`` 0 to 3 and 7 count, in place of the guest's, with GUESTDBG_USE_HW_BP."""

    _fields_ = (("control", c_uint32), ("pad", c_uint32), ("debugreg", c_uint64 * 8))


class Xcr(Structure):
    _fields_ = (("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64))


class Xcrs(Structure):
    _fields_ = (("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", Xcr * 16), ("padding", c_uint64 * 16))


class Xsave(Structure):
    """The XSAVE area in the standard format."""

    _fields_ = (("region", c_uint8 * 4096),)


class VcpuEvents(Structure):
    """What is on its way into the guest, and what blocks it."""

    _fields_ = (
        ("exception", c_uint8 * 8),
        ("interrupt_injected", c_uint8), ("interrupt_nr", c_uint8), ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8), ("nmi_pending", c_uint8), ("nmi_masked", c_uint8), ("nmi_pad", c_uint8),
        ("sipi_vector", c_uint32), ("flags", c_uint32), ("rest", c_uint8 * 40),
    )  # fmt: skip


class LapicState(Structure):
    """The registers of a local APIC as its page has them."""

    _fields_ = (("regs", c_uint8 * LAPIC_SIZE),)


class MpState(Structure):
    _fields_ = (("mp_state", c_uint32),)


class Msi(Structure):
    _fields_ = (
        ("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("flags", c_uint32),
        ("devid", c_uint32), ("pad", c_uint8 * 12),
    )  # fmt: skip


class IrqRoutingMsi(Structure):
    _fields_ = (("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("devid", c_uint32))


class IrqRoutingIrqchip(Structure):
    _fields_ = (("irqchip", c_uint32), ("pin", c_uint32))


class IrqRoutingUnion(Union):
    _fields_ = (("msi", IrqRoutingMsi), ("irqchip", IrqRoutingIrqchip), ("words", c_uint32 * 8))


class IrqRoutingEntry(Structure):
    _anonymous_ = ("u",)
    _fields_ = (("gsi", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("pad", c_uint32), ("u", IrqRoutingUnion))


class IrqLevel(Structure):
    _fields_ = (("irq", c_uint32), ("level", c_uint32))


class PicState(Structure):
    """One 8259."""

    _fields_ = tuple(
        (name, c_uint8) for name in (
            "last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll", "special_mask",
            "init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode", "init4", "elcr", "elcr_mask",
        )
    )  # fmt: skip


class IoapicState(Structure):
    _fields_ = (
        ("base_address", c_uint64), ("ioregsel", c_uint32), ("id", c_uint32), ("irr", c_uint32), ("pad", c_uint32),
        ("redirtbl", c_uint64 * 24),
    )  # fmt: skip


class IrqchipUnion(Union):
    _fields_ = (("pic", PicState), ("ioapic", IoapicState), ("dummy", c_uint8 * 512))


class Irqchip(Structure):
    _fields_ = (("chip_id", c_uint32), ("pad", c_uint32), ("chip", IrqchipUnion))


class PitConfig(Structure):
    _fields_ = (("flags", c_uint32), ("pad", c_uint32 * 15))


class PitChannelState(Structure):
    """A counter of the 8254; ``count_load_time`` is CLOCK_MONOTONIC's."""

    _fields_ = (
        ("count", c_uint32), ("latched_count", c_uint16),
        *((name, c_uint8) for name in (
            "count_latched", "status_latched", "status", "read_state", "write_state", "write_latch", "rw_mode", "mode",
            "bcd", "gate",
        )),
        ("count_load_time", c_int64),
    )  # fmt: skip


class PitState2(Structure):
    _fields_ = (("channels", PitChannelState * 3), ("flags", c_uint32), ("reserved", c_uint32 * 9))


class Ioeventfd(Structure):
    """``len`` 0: a write of any length, whatever it writes."""

    _fields_ = (
        ("datamatch", c_uint64), ("addr", c_uint64), ("len", c_uint32), ("fd", c_int32), ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )  # fmt: skip


class CoalescedMmioZone(Structure):
    _fields_ = (("addr", c_uint64), ("size", c_uint32), ("pio", c_uint32))


class CoalescedMmio(Structure):
    _fields_ = (("phys_addr", c_uint64), ("len", c_uint32), ("pio", c_uint32), ("data", c_uint8 * 8))


class CoalescedMmioRing(Structure):
    """``CoalescedMmio`` follow, as many as the page has room for."""

    _fields_ = (("first", c_uint32), ("last", c_uint32))


class Irqfd(Structure):
    _fields_ = (
        ("fd", c_uint32), ("gsi", c_uint32), ("flags", c_uint32), ("resamplefd", c_uint32), ("pad", c_uint8 * 16),
    )  # fmt: skip


class MsrEntry(Structure):
    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class CpuidEntry(Structure):
    _fields_ = (
        ("function", c_uint32), ("index", c_uint32), ("flags", c_uint32),
        ("eax", c_uint32), ("ebx", c_uint32), ("ecx", c_uint32), ("edx", c_uint32), ("padding", c_uint32 * 3),
    )  # fmt: skip


class ExitIo(Structure):
    _fields_ = (
        ("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32), ("data_offset", c_uint64),
    )  # fmt: skip


class ExitMmio(Structure):
    _fields_ = (("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8))


class ExitFailEntry(Structure):
    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))


class ExitInternal(Structure):
    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class ExitDebug(Structure):
    """``pc`` is linear."""

    _fields_ = (("exception", c_uint32), ("pad", c_uint32), ("pc", c_uint64), ("dr6", c_uint64), ("dr7", c_uint64))


class ExitEoi(Structure):
    _fields_ = (("vector", c_uint8),)


class ExitMsr(Structure):
    _fields_ = (
        ("error", c_uint8), ("pad", c_uint8 * 7), ("reason", c_uint32), ("index", c_uint32), ("data", c_uint64),
    )  # fmt: skip


class ExitUnion(Union):
    _fields_ = (
        ("io", ExitIo), ("mmio", ExitMmio), ("fail_entry", ExitFailEntry), ("internal", ExitInternal), ("msr", ExitMsr),
        ("eoi", ExitEoi), ("debug", ExitDebug), ("padding", c_uint8 * 256),
    )  # fmt: skip


class SyncRegs(Structure):
    """What KVM leaves here at each exit, as far as ``kvm_valid_regs`` asks for it."""

    _fields_ = (("regs", Regs), ("sregs", Sregs), ("events", VcpuEvents))


class SyncUnion(Union):
    _fields_ = (("regs", SyncRegs), ("padding", c_uint8 * 2048))


class Run(Structure):
    """What a vCPU shares with us: the first page of its mapping."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8), ("flags", c_uint16),
        ("cr8", c_uint64), ("apic_base", c_uint64),
        ("exit", ExitUnion),
        ("kvm_valid_regs", c_uint64), ("kvm_dirty_regs", c_uint64), ("s", SyncUnion),
    )  # fmt: skip


def msrs(entries: int) -> Any:
    """A struct kvm_msrs with room for ``entries``."""
    return _counted(MsrEntry, entries)


def cpuid2(entries: int) -> Any:
    """A struct kvm_cpuid2 with room for ``entries``."""
    return _counted(CpuidEntry, entries)


def irq_routing(entries: int) -> Any:
    """A struct kvm_irq_routing with room for ``entries``."""
    return _counted(IrqRoutingEntry, entries)


def _counted(entry: type[Structure], n: int) -> Any:
    kind = type("Counted", (Structure,), {"_fields_": (("n", c_uint32), ("pad", c_uint32), ("entries", entry * n))})
    made = kind()
    made.n = n
    return made


def _io(number: int) -> int:
    return 0xAE << 8 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | _io(number)


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | _io(number)


GET_API_VERSION = _io(0x00)
CREATE_VM = _io(0x01)
CHECK_EXTENSION = _io(0x03)
GET_VCPU_MMAP_SIZE = _io(0x04)
GET_SUPPORTED_CPUID = _ior(0x05, 8) | _iow(0x05, 8)
CREATE_VCPU = _io(0x41)
GET_DIRTY_LOG = _iow(0x42, ctypes.sizeof(DirtyLog))
SET_USER_MEMORY_REGION = _iow(0x46, ctypes.sizeof(UserspaceMemoryRegion))
SET_TSS_ADDR = _io(0x47)
SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
CREATE_IRQCHIP = _io(0x60)
IRQ_LINE = _iow(0x61, ctypes.sizeof(IrqLevel))
GET_IRQCHIP = _ior(0x62, ctypes.sizeof(Irqchip)) | _iow(0x62, ctypes.sizeof(Irqchip))
SET_IRQCHIP = _ior(0x63, ctypes.sizeof(Irqchip))
CREATE_PIT2 = _iow(0x77, ctypes.sizeof(PitConfig))
GET_PIT2, SET_PIT2 = _ior(0x9F, ctypes.sizeof(PitState2)), _iow(0xA0, ctypes.sizeof(PitState2))
SET_CLOCK, GET_CLOCK = _iow(0x7B, ctypes.sizeof(ClockData)), _ior(0x7C, ctypes.sizeof(ClockData))
SET_GSI_ROUTING = _iow(0x6A, 8)
REGISTER_COALESCED_MMIO = _iow(0x67, ctypes.sizeof(CoalescedMmioZone))
UNREGISTER_COALESCED_MMIO = _iow(0x68, ctypes.sizeof(CoalescedMmioZone))
IRQFD = _iow(0x76, ctypes.sizeof(Irqfd))
IOEVENTFD = _iow(0x79, ctypes.sizeof(Ioeventfd))
RUN = _io(0x80)
GET_REGS, SET_REGS = _ior(0x81, ctypes.sizeof(Regs)), _iow(0x82, ctypes.sizeof(Regs))
GET_SREGS, SET_SREGS = _ior(0x83, ctypes.sizeof(Sregs)), _iow(0x84, ctypes.sizeof(Sregs))
INTERRUPT = _iow(0x86, 4)
GET_MSRS, SET_MSRS = _ior(0x88, 8) | _iow(0x88, 8), _iow(0x89, 8)
SET_CPUID2 = _iow(0x90, 8)
GET_LAPIC, SET_LAPIC = _ior(0x8E, LAPIC_SIZE), _iow(0x8F, LAPIC_SIZE)
GET_MP_STATE, SET_MP_STATE = _ior(0x98, 4), _iow(0x99, 4)
NMI = _io(0x9A)
GET_VCPU_EVENTS, SET_VCPU_EVENTS = _ior(0x9F, ctypes.sizeof(VcpuEvents)), _iow(0xA0, ctypes.sizeof(VcpuEvents))
GET_DEBUGREGS, SET_DEBUGREGS = _ior(0xA1, ctypes.sizeof(Debugregs)), _iow(0xA2, ctypes.sizeof(Debugregs))
GET_STATS_FD = _io(0xCE)
SET_TSC_KHZ = _io(0xA2)
SET_GUEST_DEBUG = _iow(0x9B, ctypes.sizeof(GuestDebug))
KVMCLOCK_CTRL = _io(0xAD)
ENABLE_CAP = _iow(0xA3, ctypes.sizeof(EnableCap))
SIGNAL_MSI = _iow(0xA5, ctypes.sizeof(Msi))
GET_XSAVE, SET_XSAVE = _ior(0xA4, ctypes.sizeof(Xsave)), _iow(0xA5, ctypes.sizeof(Xsave))
GET_XCRS, SET_XCRS = _ior(0xA6, ctypes.sizeof(Xcrs)), _iow(0xA7, ctypes.sizeof(Xcrs))
X86_SET_MSR_FILTER = _iow(0xC6, ctypes.sizeof(MsrFilter))
CLEAR_DIRTY_LOG = _ior(0xC0, ctypes.sizeof(ClearDirtyLog)) | _iow(0xC0, ctypes.sizeof(ClearDirtyLog))
RESET_DIRTY_RINGS = _io(0xC7)
SET_DEVICE_ATTR = _iow(0xE1, ctypes.sizeof(DeviceAttr))

raw_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
"""ioctl(2), for what is done all the time; ``ctypes.get_errno`` has the error."""
raw_ioctl.restype = ctypes.c_int
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def ioctl(fd: int, request: int, argument: Structure | Array[Any] | int = 0) -> int:
    """Raises OSError. ``argument`` is a number, or a structure passed by address and filled in place."""
    result: int = raw_ioctl(fd, request, argument if isinstance(argument, int) else ctypes.addressof(argument))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
