"""A VM under KVM: its memory slots, its CPUID, and what of the CPU model the hardware really has.

KVM has the local APICs where it is asked to (:mod:`skep.engine.kvm.apics`), and the other interrupt controllers besides
(:mod:`skep.engine.kvm.chips`); what it has not is the board's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from skep.contracts.constantports import ConstantPorts
from skep.contracts.interrupts import EngineChips, LocalApics, LocalInterrupts
from skep.contracts.io import Doorbells, IoSpace, PostedWrites
from skep.engine.amd64 import cpuid, msrs
from skep.engine.amd64.cpuid import SUBLEAVES, Feature
from skep.engine.amd64.native import function
from skep.engine.amd64.tsc import tsc_hz as host_tsc_hz
from skep.engine.contract import EngineVm
from skep.engine.kvm import failures, uapi
from skep.engine.kvm.apics import KvmApics
from skep.engine.kvm.chips import KvmChips
from skep.engine.kvm.counted import IN_KERNEL
from skep.engine.kvm.doorbells import KvmDoorbells
from skep.engine.kvm.kvmclock import KvmClock
from skep.engine.kvm.posted import Posted
from skep.engine.kvm.rings import Rings
from skep.engine.kvm.slots import Slots
from skep.engine.kvm.streams import Streams
from skep.engine.kvm.vcpu import KICK_SIGNAL, KvmVcpu
from skep.errors import HostError, UserError
from skep.locks import Lock, Order
from skep.memory import GuestMemory
from skep.memory.dirty import DirtySource

DEVICE = "/dev/kvm"

TSS_PAGES = 0xFFFB_D000
"""Three pages, and the one before them, that KVM needs for real mode on old Intel CPUs: in the hole under 4 GiB."""

OURS = frozenset((Feature.TSC_DEADLINE, Feature.HYPERVISOR, Feature.HTT, Feature.CMP_LEGACY, Feature.X2APIC))
"""Features that need nothing of the hardware: the local APIC is Skep's, and the others only tell what there is."""

_NEEDED = {
    uapi.CAP_USER_MEMORY: "user memory",
    uapi.CAP_IMMEDIATE_EXIT: "immediate exit",
    uapi.CAP_X86_USER_SPACE_MSR: "MSRs in user space",
    uapi.CAP_X86_MSR_FILTER: "MSR filters",
    uapi.CAP_ADJUST_CLOCK: "a kvm-clock that can be set",
    uapi.CAP_KVMCLOCK_CTRL: "word to guests that they stood still",
}
_SPLIT = {uapi.CAP_SPLIT_IRQCHIP: "the split irqchip"}
_WHOLE = {
    uapi.CAP_IRQCHIP: "the irqchip",
    uapi.CAP_PIT2: "the 8254",
    uapi.CAP_PIT_STATE2: "the 8254's state",
    uapi.CAP_IRQFD_RESAMPLE: "wires by eventfd",
}
_NEEDED_TO_HOST = {
    uapi.CAP_X2APIC_API: "the x2APIC API",
    uapi.CAP_SIGNAL_MSI: "messages from user space",
    uapi.CAP_IRQ_ROUTING: "interrupt routing",
    uapi.CAP_IRQFD: "interrupts by eventfd",
    uapi.CAP_TSC_DEADLINE_TIMER: "the TSC deadline timer",
}


class KvmEngine:
    """See :class:`skep.engine.contract.Engine`."""

    name = "kvm"
    description = "kvm"
    wants_huge_pages = True

    def __init__(
        self, device: str = DEVICE, *, hosts_apics: bool = False, hosts_chips: bool = False, dirty_ring: int = 0
    ) -> None:
        """With ``hosts_chips`` it has the local APICs as well. ``dirty_ring``: entries of each vCPU's ring that tells
        what is dirty, a power of two; 0: KVM's bitmaps do."""
        self.device = device
        self.hosts_apics = hosts_apics or hosts_chips
        self.hosts_chips = hosts_chips
        self.dirty_ring = dirty_ring

    @property
    def scales_tsc(self) -> bool:
        return _offers(self.device, (uapi.CAP_TSC_CONTROL,))

    def create_vm(
        self,
        memory: GuestMemory,
        io: IoSpace,
        max_vcpus: int,
        cpu_model: str,
        tsc_offset: int,
        tsc_hz: int | None = None,
        time_of_day: Callable[[], int] | None = None,
    ) -> EngineVm:
        try:
            fd = os.open(self.device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise failures.not_opened(self.device, error) from None
        try:
            return KvmVm(
                fd, memory, io, max_vcpus, cpu_model, tsc_offset, tsc_hz or host_tsc_hz(), time_of_day,
                hosts_apics=self.hosts_apics, hosts_chips=self.hosts_chips, dirty_ring=self.dirty_ring,
            )  # fmt: skip
        except OSError as error:
            raise failures.not_made(self.device, error) from None
        finally:
            os.close(fd)


class KvmVm:
    """See :class:`skep.engine.contract.EngineVm`. ``kvm`` is /dev/kvm, open during the constructor."""

    def __init__(
        self,
        kvm: int,
        memory: GuestMemory,
        io: IoSpace,
        max_vcpus: int,
        cpu_model: str,
        tsc_offset: int,
        tsc_hz: int,
        time_of_day: Callable[[], int] | None,
        *,
        hosts_apics: bool,
        hosts_chips: bool,
        dirty_ring: int,
    ) -> None:
        try:
            version = uapi.ioctl(kvm, uapi.GET_API_VERSION)
        except OSError:  # another device
            version = 0
        needed = _NEEDED | (_NEEDED_TO_HOST | (_WHOLE if hosts_chips else _SPLIT) if hosts_apics else {})
        lacking = [what for cap, what in needed.items() if version != uapi.API_VERSION or not _has(kvm, cap)]
        if lacking:
            raise HostError(f"this KVM lacks {', '.join(lacking)}", None, failures.TODO)
        limit = _has(kvm, uapi.CAP_MAX_VCPUS)
        if max_vcpus > limit:
            raise UserError(f"KVM on this host has at most {limit} CPUs a VM", "cpus", "ask for fewer")
        if dirty_ring * ctypes.sizeof(uapi.DirtyGfn) > _has(kvm, uapi.CAP_DIRTY_LOG_RING):
            raise failures.no_ring(_has(kvm, uapi.CAP_DIRTY_LOG_RING) // ctypes.sizeof(uapi.DirtyGfn))
        self.max_vcpus = max_vcpus
        self._io = io
        self._model = cpu_model
        self._tsc_offset = tsc_offset
        self._tsc_hz = tsc_hz
        self._supported = _supported_cpuid(kvm)
        self._synced = bool(_has(kvm, uapi.CAP_SYNC_REGS) & uapi.SYNC_X86_REGS)
        self._guest_debug = _has(kvm, uapi.CAP_SET_GUEST_DEBUG2)
        if not self._guest_debug and _has(kvm, uapi.CAP_SET_GUEST_DEBUG):  # before Linux 5.9: none that came later
            self._guest_debug = uapi.GUESTDBG_ENABLE | uapi.GUESTDBG_SINGLESTEP
            self._guest_debug |= uapi.GUESTDBG_USE_SW_BP | uapi.GUESTDBG_USE_HW_BP
        self._counted = bool(_has(kvm, uapi.CAP_BINARY_STATS_FD))
        self._run_size = uapi.ioctl(kvm, uapi.GET_VCPU_MMAP_SIZE)
        self._vcpus: list[KvmVcpu] = []
        self._memory = memory
        self._gate = Lock("the way into the guest", Order.ENGINE)
        self._clocked = time_of_day is not None
        self.withheld = tuple(sorted(one.name for one in self._absent(self._model_of(0))))
        self._fd = uapi.ioctl(kvm, uapi.CREATE_VM)
        try:
            self._clock: KvmClock | None = None
            if time_of_day is not None:
                self._clock = KvmClock(self._fd, memory, tsc_hz, tsc_offset, time_of_day)
            uapi.ioctl(self._fd, uapi.SET_IDENTITY_MAP_ADDR, (ctypes.c_uint64 * 1)(TSS_PAGES - 4096))
            uapi.ioctl(self._fd, uapi.SET_TSS_ADDR, TSS_PAGES)
            self._slots = self._make_slots(kvm, dirty_ring)
            self._slots.adopt(memory.regions)
            self._rings: Rings | None = None
            if dirty_ring:
                self._rings = Rings(self._fd, dirty_ring, self._slots, self._still, memory.mark_dirty)
            self._dirty: DirtySource = self._rings or self._slots
            self.local_apics: LocalApics | None = KvmApics(self._fd, chips=hosts_chips) if hosts_apics else None
            self.chips: EngineChips | None = KvmChips(self._fd) if hosts_chips else None
            self.doorbells: Doorbells | None = None
            if _has(kvm, uapi.CAP_IOEVENTFD_ANY_LENGTH):
                self.doorbells = KvmDoorbells(self._fd)
            self.posted: PostedWrites | None = None
            self._posted: Posted | None = None
            self._streams: Streams | None = None
            self._constants: ConstantPorts | None = None
            if _has(kvm, uapi.CAP_COALESCED_PIO):
                self.posted = self._posted = Posted(self._fd, _has(kvm, uapi.CAP_COALESCED_MMIO), io)
                self._streams = Streams(self._posted)
            self._take_msrs()
            _install_kick_handler()
        except BaseException:
            os.close(self._fd)
            raise
        memory.add_map_listener(self._slots)
        memory.add_dirty_source(self._dirty)

    def _make_slots(self, kvm: int, dirty_ring: int) -> Slots:
        by_hand = False
        if dirty_ring:
            size = dirty_ring * ctypes.sizeof(uapi.DirtyGfn)
            uapi.ioctl(self._fd, uapi.ENABLE_CAP, uapi.EnableCap(uapi.CAP_DIRTY_LOG_RING, 0, (size, 0, 0, 0)))
        else:
            how = uapi.DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.DIRTY_LOG_INITIALLY_SET
            by_hand = _has(kvm, uapi.CAP_MANUAL_DIRTY_LOG_PROTECT2) & how == how
            if by_hand:
                cap = uapi.EnableCap(uapi.CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (how, 0, 0, 0))
                uapi.ioctl(self._fd, uapi.ENABLE_CAP, cap)
        return Slots(
            self._fd,
            _has(kvm, uapi.CAP_NR_MEMSLOTS),
            read_only=bool(_has(kvm, uapi.CAP_READONLY_MEM)),
            cleared_by_hand=by_hand,
            still=self._still,
            forgotten=self._memory.mark_dirty,
        )

    @contextmanager
    def _still(self) -> Iterator[None]:
        """No vCPU is in guest code inside. Any thread may ask, a vCPU's too, whatever the others' wait for."""
        with self._gate:
            for vcpu in self._vcpus:
                vcpu.kick()
            for vcpu in self._vcpus:
                while vcpu.inside:
                    time.sleep(50e-6)
            yield

    def _take_msrs(self) -> None:
        """Unknown MSRs come to us, which are remembered; by a filter KVM's own, but for what the guest was offered of
        them and is not ours; and the local APIC's where it is ours: two by the filter, the x2APIC's because KVM does
        not know them then."""
        reasons = uapi.MSR_EXIT_REASON_INVAL | uapi.MSR_EXIT_REASON_UNKNOWN | uapi.MSR_EXIT_REASON_FILTER
        uapi.ioctl(self._fd, uapi.ENABLE_CAP, uapi.EnableCap(uapi.CAP_X86_USER_SPACE_MSR, 0, (reasons, 0, 0, 0)))
        ours = [msrs.IA32_APIC_BASE, msrs.IA32_TSC_DEADLINE] if self.local_apics is None else []
        ours += [msrs.KVM_WALL_CLOCK, *range(msrs.KVM_FIRST, msrs.KVM_FIRST + msrs.KVM_COUNT)]
        if self._clock is None:
            ours.append(msrs.KVM_SYSTEM_TIME)
        else:
            ours.remove(msrs.KVM_SYSTEM_TIME_NEW)
        none = ctypes.create_string_buffer(8)  # a bitmap of zeros
        msr_filter = uapi.MsrFilter()
        for entry, (first, count) in zip(msr_filter.ranges, _ranges(ours), strict=False):
            entry.flags = uapi.MSR_FILTER_READ | uapi.MSR_FILTER_WRITE
            entry.nmsrs, entry.base, entry.bitmap = count, first, ctypes.addressof(none)
        uapi.ioctl(self._fd, uapi.X86_SET_MSR_FILTER, msr_filter)

    def create_vcpu(self, index: int, interrupts: LocalInterrupts) -> KvmVcpu:
        fd = uapi.ioctl(self._fd, uapi.CREATE_VCPU, index)
        model = self._model_of(index)
        hosted = self.local_apics is not None
        vcpu = KvmVcpu(
            index,
            fd,
            self._run_size,
            self._io,
            interrupts,
            self._gate,
            self._posted,
            self._streams,
            self._constants,
            None if self._clock is None else self._clock.wall,
            hosted=hosted,
            synced=self._synced,
            guest_debug=self._guest_debug,
            counted=self._counted,
        )
        try:
            if self._rings is not None:
                self._rings.add(fd)
                vcpu.handle(uapi.EXIT_DIRTY_RING_FULL, self._rings.full)
            vcpu.set_cpuid(self._cpuid(model))
            vcpu.set_state({"msrs": msrs.mtrr_reset(model.physical_bits)})
            if self._tsc_hz != host_tsc_hz():
                uapi.ioctl(fd, uapi.SET_TSC_KHZ, self._tsc_hz // 1000)
            vcpu.set_tsc_offset(self._tsc_offset)
            vcpu.attach_apic()
        except BaseException:
            vcpu.close()
            raise
        self._vcpus.append(vcpu)
        return vcpu

    def freeze(self) -> None:
        """Each vCPU's thread has to come back from the kernel."""

    def thaw(self) -> None:
        """Nothing was held."""

    def set_tsc_offset(self, offset: int) -> None:
        began = 0 if self._clock is None else self._clock.at(0)
        self._tsc_offset = offset
        for vcpu in self._vcpus:
            vcpu.set_tsc_offset(offset)
        if self._clock is not None:
            self._clock.tsc_offset = offset
            self._clock.set(0, began)  # after the TSCs: as long as they differ, KVM tells the time in another way
            for vcpu in self._vcpus:
                vcpu.stood_still()

    def kvm_clock(self, tsc: int) -> int:
        return 0 if self._clock is None else self._clock.at(tsc)

    def set_kvm_clock(self, tsc: int, ns: int) -> None:
        if self._clock is not None:
            self._clock.set(tsc, ns)

    def answer_ports(self, constants: ConstantPorts) -> None:
        self._constants = constants

    def observe(self, *, times: bool, perf_map: bool) -> None:
        pass  # the counters cost nothing, and the guest's code is its own

    def statistics(self) -> dict[str, int | float]:
        exits: Counter[str] = Counter()
        kernels: Counter[str] = Counter()
        for vcpu in self._vcpus:
            exits.update(vcpu.told())
            kernels.update(vcpu.counted.read(*IN_KERNEL))
        told: dict[str, int | float] = {f"exits: {cause}": count for cause, count in exits.most_common()}
        return told | {f"in the kernel: {IN_KERNEL[name]}": count for name, count in kernels.most_common()}

    def close(self) -> None:
        self._memory.remove_dirty_source(self._dirty)
        self._memory.remove_map_listener(self._slots)
        if self._rings is not None:
            self._rings.close()
        if self._streams is not None:
            self._streams.close()
        for vcpu in self._vcpus:
            vcpu.close()
        self._vcpus.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _model_of(self, index: int) -> cpuid.Cpuid:
        return cpuid.make(self._model, self._tsc_hz, index, self.max_vcpus, kvm_clock=self._clocked)

    def _absent(self, model: cpuid.Cpuid) -> list[Feature]:
        """What of the CPU model this hardware or this KVM has not."""
        return [feature for feature in model.features - OURS if not self._has_feature(*feature.value)]

    def _has_feature(self, leaf: int, subleaf: int, register: int, bit: int) -> bool:
        return bool(self._supported.get((leaf, subleaf), (0, 0, 0, 0))[register] >> bit & 1)

    def _cpuid(self, model: cpuid.Cpuid) -> list[uapi.CpuidEntry]:
        """The CPU model's CPUID, less the features that this hardware or this KVM has not."""
        absent: dict[tuple[int, int], list[int]] = {}
        for feature in self._absent(model):
            leaf, subleaf, register, bit = feature.value
            absent.setdefault((leaf, subleaf), [0, 0, 0, 0])[register] |= 1 << bit
        return [
            uapi.CpuidEntry(
                leaf,
                subleaf,
                uapi.CPUID_FLAG_SIGNIFICANT_INDEX if leaf in SUBLEAVES else 0,
                *(value & ~gone for value, gone in zip(values, absent.get((leaf, subleaf), [0] * 4), strict=True)),
            )
            for (leaf, subleaf), values in sorted(model.table.items())
        ]


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as ranges: (first, count)."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        first, count = found[-1] if found else (number, 0)
        if number == first + count:
            found[-1:] = [(first, count + 1)]
        else:
            found.append((number, 1))
    return found


def can_host_apics(device: str = DEVICE) -> bool:
    """Whether this host's KVM has all that it takes to have the local APICs; False where it cannot be asked."""
    return _offers(device, _NEEDED_TO_HOST | _SPLIT)


def can_host_chips(device: str = DEVICE) -> bool:
    """The same of all interrupt controllers and the 8254."""
    return _offers(device, _NEEDED_TO_HOST | _WHOLE)


def _offers(device: str, capabilities: Iterable[int]) -> bool:
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return all(_has(fd, capability) for capability in capabilities)
    except OSError:  # another device
        return False
    finally:
        os.close(fd)


def _has(kvm: int, capability: int) -> int:
    return uapi.ioctl(kvm, uapi.CHECK_EXTENSION, capability)


def _supported_cpuid(kvm: int) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """What this KVM can give a guest on this hardware, by (leaf, subleaf)."""
    room = 64
    while True:
        rows = uapi.cpuid2(room)
        try:
            uapi.ioctl(kvm, uapi.GET_SUPPORTED_CPUID, rows)
        except OSError as error:
            if error.errno != errno.E2BIG or room > 4096:
                raise
            room *= 2
            continue
        return {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in rows.entries[: rows.n]}


_nothing: Any = function(b"\xc3", None)  # ret


def _install_kick_handler() -> None:
    """Make :data:`KICK_SIGNAL` interrupt KVM_RUN and do nothing else.

    Not through :mod:`signal`: that works in the main thread only, and runs Python in it for every kick.
    """

    class Sigaction(ctypes.Structure):
        _fields_ = (
            ("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        )  # fmt: skip

    action = Sigaction(handler=ctypes.cast(_nothing, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sigaction(int(KICK_SIGNAL), ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "sigaction")
