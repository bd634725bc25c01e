"""The model-specific registers of one translated vCPU.

Some live in the state block, where machine code reads them; those of the local APIC belong to it; the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable

from skep.contracts.interrupts import LocalInterrupts
from skep.engine.amd64 import kvmclock, msrs
from skep.engine.amd64.cpuid import Cpuid
from skep.engine.amd64.registers import Cr0, Efer, canonical
from skep.engine.amd64.tsc import read_tsc
from skep.engine.exits import Exits
from skep.engine.translate import identity
from skep.engine.translate.kvmclock import Place
from skep.engine.translate.layout import StateBlock

M64 = 0xFFFF_FFFF_FFFF_FFFF

IN_STATE = {
    msrs.IA32_SYSENTER_CS: "sysenter_cs",
    msrs.IA32_SYSENTER_ESP: "sysenter_esp",
    msrs.IA32_SYSENTER_EIP: "sysenter_eip",
    msrs.IA32_PAT: "pat",
    msrs.EFER: "efer",
    msrs.STAR: "star",
    msrs.LSTAR: "lstar",
    msrs.CSTAR: "cstar",
    msrs.SFMASK: "sfmask",
    msrs.FS_BASE: "fs_base",
    msrs.GS_BASE: "gs_base",
    msrs.KERNEL_GS_BASE: "kernel_gs_base",
    msrs.TSC_AUX: "tsc_aux",
}

ADDRESSES = frozenset((
    msrs.IA32_SYSENTER_ESP, msrs.IA32_SYSENTER_EIP, msrs.LSTAR, msrs.CSTAR,
    msrs.FS_BASE, msrs.GS_BASE, msrs.KERNEL_GS_BASE,
))  # fmt: skip
"""Those that must be canonical."""

WORDS = frozenset((msrs.IA32_SYSENTER_CS, msrs.SFMASK, msrs.TSC_AUX))
"""Those of 32 bits."""


class ModelSpecific:
    """``read`` and ``write`` are RDMSR and WRMSR at privilege 0; None and False mean #GP(0)."""

    def __init__(
        self, st: StateBlock, interrupts: LocalInterrupts, cpuid: Cpuid, exits: Exits, place: Place | None = None
    ) -> None:
        """``place``: where it is told the time, if the VM has kvm-clock."""
        self._st = st
        self._place = place
        self._interrupts = interrupts
        self._cpuid = cpuid
        self._kept: dict[int, int] = {}
        self.exits = exits
        self._writers: dict[int, Callable[[int], bool]] = {
            msrs.IA32_TSC: self._write_tsc,
            msrs.IA32_TSC_ADJUST: self._write_tsc_adjust,
            msrs.IA32_TSC_DEADLINE: self._write_deadline,
            msrs.IA32_PRED_CMD: lambda value: not value & ~msrs.PRED_CMD_IBPB,
            msrs.IA32_BIOS_UPDT_TRIG: lambda value: True,  # a microcode update that changes nothing
            msrs.IA32_BIOS_SIGN_ID: lambda value: True,  # written with 0 before CPUID fills it
            msrs.EFER: self._write_efer,
        }
        if place is not None:
            self._writers |= dict.fromkeys(kvmclock.WALL_CLOCK, place.wall.write_msr)
            self._writers |= dict.fromkeys(kvmclock.SYSTEM_TIME, place.write_msr)
        self.reset()

    def reset(self) -> None:
        """Power-on values, with the MTRRs as firmware leaves them. TSC_ADJUST becomes 0."""
        self._change_adjust(0)
        self._kept = {
            msrs.IA32_SPEC_CTRL: 0,
            msrs.IA32_MISC_ENABLE: msrs.MISC_ENABLE_VALUE,
            **msrs.mtrr_reset(self._cpuid.physical_bits),
        }
        self._constants = {
            msrs.IA32_PLATFORM_ID: 0,
            msrs.IA32_FEATURE_CONTROL: 1,  # locked, nothing enabled
            msrs.IA32_BIOS_SIGN_ID: 1 << 32,
            msrs.IA32_MTRRCAP: msrs.MTRRCAP_VALUE,
            msrs.IA32_MCG_CAP: 0,  # no banks: there is no machine check
            msrs.IA32_ARCH_CAPABILITIES: msrs.ARCH_CAPABILITIES_VALUE,
        }
        if self._cpuid.is_amd:
            self._kept |= msrs.AMD_RESET
        for index, name in IN_STATE.items():
            setattr(self._st, name, msrs.PAT_RESET if index == msrs.IA32_PAT else 0)

    # The time stamp counter: the host's, the VM's offset, and this vCPU's own adjustment

    def timestamp(self) -> int:
        """The guest's TSC now."""
        return (read_tsc() + self._st.tsc_offset) & M64

    def set_tsc_offset(self, offset: int) -> None:
        """The VM's offset changed (creation, thaw); what the guest wrote to its TSC stays on top of it."""
        self._st.tsc_offset = (offset + self._st.tsc_adjust) & M64

    def _change_adjust(self, value: int) -> None:
        st = self._st
        change = value - st.tsc_adjust
        st.tsc_offset = (st.tsc_offset + change) & M64
        st.tsc_adjust = value
        if self._place is not None and change:
            self._place.adjusted(value)
        if st.apic_deadline:
            st.apic_deadline = (st.apic_deadline + change) & M64 or 1

    def _write_tsc(self, value: int) -> bool:
        self._change_adjust((self._st.tsc_adjust + value - self.timestamp()) & M64)
        return True

    def _write_tsc_adjust(self, value: int) -> bool:
        self._change_adjust(value)
        return True

    def _write_deadline(self, value: int) -> bool:
        """The APIC knows the VM's counter; 0 disarms."""
        return self._interrupts.write_msr(
            msrs.IA32_TSC_DEADLINE, value and ((value - self._st.tsc_adjust) & M64 or 1)
        )

    def _read_deadline(self) -> int | None:
        value = self._interrupts.read_msr(msrs.IA32_TSC_DEADLINE)
        return value and (value + self._st.tsc_adjust) & M64

    # RDMSR and WRMSR

    def read(self, index: int) -> int | None:
        value = self._read(index)
        self.exits.note("rdmsr", index, 0, value, self._st.rip)
        if value is None:
            self.exits.note_refused("rdmsr", index)
        return value

    def _read(self, index: int) -> int | None:
        name = IN_STATE.get(index)
        if name is not None:
            value: int = getattr(self._st, name)
            return value
        if index in self._constants:
            return self._constants[index]
        if index in self._kept:
            return self._kept[index]
        if index == msrs.IA32_TSC:
            return self.timestamp()
        if index == msrs.IA32_TSC_ADJUST:
            return self._st.tsc_adjust
        if index == msrs.IA32_TSC_DEADLINE:
            return self._read_deadline()
        if self._place is not None and index in kvmclock.SYSTEM_TIME:
            return self._place.msr
        if self._place is not None and index in kvmclock.WALL_CLOCK:
            return self._place.wall.msr
        if index == msrs.IA32_APIC_BASE or msrs.X2APIC_FIRST <= index <= msrs.X2APIC_LAST:
            return self._interrupts.read_msr(index)
        return None

    def write(self, index: int, value: int) -> bool:
        done = self._write(index, value)
        self.exits.note("wrmsr", index, 0, value, self._st.rip)
        if not done:
            self.exits.note_refused("wrmsr", index)
        return done

    def _write(self, index: int, value: int) -> bool:
        writer = self._writers.get(index)
        if writer is not None:
            return writer(value)
        if index in IN_STATE:
            if not self._valid_in_state(index, value):
                return False
            setattr(self._st, IN_STATE[index], value)
            return True
        if index in self._kept:
            return self._write_kept(index, value)
        if index == msrs.IA32_APIC_BASE or msrs.X2APIC_FIRST <= index <= msrs.X2APIC_LAST:
            done = self._interrupts.write_msr(index, value)
            if done and index == msrs.IA32_APIC_BASE:
                self.apic_changed()
            return done
        return False

    def apic_enabled(self) -> bool:
        return bool((self._interrupts.read_msr(msrs.IA32_APIC_BASE) or 0) & msrs.APIC_BASE_ENABLE)

    def apic_changed(self) -> None:
        """CPUID tells of a local APIC only while it is enabled (SDM 3, 11.4.3)."""
        identity.show_apic(self._st, self.apic_enabled())

    @staticmethod
    def _valid_in_state(index: int, value: int) -> bool:
        if index in ADDRESSES:
            return canonical(value)
        if index in WORDS:
            return not value >> 32
        return index != msrs.IA32_PAT or msrs.valid_pat(value)

    def _write_efer(self, value: int) -> bool:
        st = self._st
        lma = st.efer & Efer.LMA
        if value & ~(msrs.EFER_WRITABLE | Efer.LMA):
            return False
        if (value ^ st.efer) & Efer.LME and st.cr0 & Cr0.PG:
            return False
        st.efer = value & msrs.EFER_WRITABLE | lma
        return True

    def _write_kept(self, index: int, value: int) -> bool:
        if index in msrs.IA32_MTRR_FIX:
            valid = msrs.valid_mtrr_fixed(value)
        elif index in msrs.MTRR_PHYS:
            valid = msrs.valid_mtrr_variable(index, value, self._cpuid.physical_bits)
        elif index == msrs.IA32_MTRR_DEF_TYPE:
            valid = msrs.valid_mtrr_def_type(value)
        elif index == msrs.IA32_SPEC_CTRL:
            valid = not value & ~(msrs.SPEC_CTRL_IBRS | msrs.SPEC_CTRL_BHI_DIS_S)
        elif index == msrs.IA32_MISC_ENABLE:  # as in KVM, what would hide CPUID leaves or NX is kept and hides none
            read_only = msrs.MISC_ENABLE_READ_ONLY
            valid, value = not value & msrs.MISC_ENABLE_RESERVED, value & ~read_only | self._kept[index] & read_only
        else:
            valid = True
        if valid:
            self._kept[index] = value
        return valid

    # Saved state

    def save(self) -> dict[int, int]:
        """All of :data:`skep.engine.amd64.msrs.SAVED`, kvm-clock's, and AMD's own where the CPU is AMD's."""
        indices = (*msrs.SAVED, *kvmclock.SAVED)
        if self._cpuid.is_amd:
            indices += (*msrs.AMD_RESET,)
        return {index: value for index in indices if (value := self._read(index)) is not None}

    def load(self, values: dict[int, int]) -> None:
        """Any subset of what ``save`` gave."""
        for index, value in values.items():
            if index in IN_STATE:
                setattr(self._st, IN_STATE[index], value)
            elif index == msrs.IA32_TSC_ADJUST:
                self._change_adjust(value)
            elif self._place is not None and index in kvmclock.SYSTEM_TIME:
                self._place.write_msr(value)
            elif self._place is not None and index in kvmclock.WALL_CLOCK:
                self._place.wall.msr = value
            elif index in self._kept:
                self._kept[index] = value
