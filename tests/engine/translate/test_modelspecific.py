"""Model-specific registers: values, #GP rules, saving."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skep.engine.amd64 import msrs
from skep.engine.amd64.cpuid import AMD_VENDOR, INTEL_VENDOR
from skep.engine.amd64.registers import Cr0, Efer
from skep.engine.amd64.tsc import read_tsc
from tests.engine.translate.plain import PlainCpu


@pytest.fixture
def cpu() -> Iterator[PlainCpu]:
    cpu = PlainCpu(vendor=INTEL_VENDOR)
    yield cpu
    cpu.close()


ADDRESSES = (msrs.LSTAR, msrs.CSTAR, msrs.FS_BASE, msrs.GS_BASE, msrs.KERNEL_GS_BASE, msrs.IA32_SYSENTER_EIP)
BAD = [(index, 1 << 47) for index in ADDRESSES] + [
    (msrs.IA32_PAT, 2),
    (msrs.IA32_PAT, 0x0800_0000_0000_0000),
    (msrs.SFMASK, 1 << 32),
    (msrs.TSC_AUX, 1 << 32),
    (msrs.EFER, 1 << 1),
    (msrs.EFER, 1 << 12),
    (msrs.IA32_MTRR_DEF_TYPE, 2),
    (msrs.IA32_MTRR_DEF_TYPE, 1 << 12),
    (0x200, 2),
    (0x200, 0x106),
    (0x201, 1 << 40),
    (0x201, 0x400),
    (0x250, 0x0200),
    (msrs.IA32_MTRRCAP, 0),
    (msrs.IA32_ARCH_CAPABILITIES, 0),
    (msrs.IA32_SPEC_CTRL, 2),
    (msrs.IA32_PRED_CMD, 2),
    (msrs.IA32_MISC_ENABLE, 1 << 40),
    (msrs.IA32_MCG_CAP, 0),
    (0x1234, 0),
    (msrs.AMD_HWCR, 0),
]


def test_misc_enable_keeps_its_read_only_bits(cpu: PlainCpu) -> None:
    before = cpu.msrs.read(msrs.IA32_MISC_ENABLE)
    assert before is not None
    assert cpu.msrs.write(msrs.IA32_MISC_ENABLE, 1 << 34 | 1 << 22 | 1 << 7)
    assert cpu.msrs.read(msrs.IA32_MISC_ENABLE) == 1 << 34 | 1 << 22 | before & msrs.MISC_ENABLE_READ_ONLY


@pytest.mark.parametrize(("index", "value"), BAD)
def test_refused_writes_change_nothing(cpu: PlainCpu, index: int, value: int) -> None:
    before = cpu.msrs.read(index)
    assert not cpu.msrs.write(index, value)
    assert cpu.msrs.read(index) == before
    assert cpu.msrs.exits.refused()["wrmsr", index] == 1


@pytest.mark.parametrize("index", [*ADDRESSES, msrs.STAR, msrs.IA32_SYSENTER_ESP])
def test_addresses_take_both_halves(cpu: PlainCpu, index: int) -> None:
    for value in (0xFFFF_8000_1234_5678, 0x7FFF_FFFF_FFFF):
        assert cpu.msrs.write(index, value)
        assert cpu.msrs.read(index) == value


def test_state_block_has_what_machine_code_reads(cpu: PlainCpu) -> None:
    cpu.msrs.write(msrs.LSTAR, 0x1000)
    cpu.msrs.write(msrs.KERNEL_GS_BASE, 0x2000)
    cpu.msrs.write(msrs.TSC_AUX, 3)
    assert (cpu.st.lstar, cpu.st.kernel_gs_base, cpu.st.tsc_aux) == (0x1000, 0x2000, 3)


def test_efer_keeps_lma_and_lme_is_fixed_under_paging(cpu: PlainCpu) -> None:
    assert cpu.msrs.write(msrs.EFER, Efer.LME | Efer.NXE | Efer.SCE)
    assert cpu.st.efer == Efer.LME | Efer.NXE | Efer.SCE
    cpu.st.cr0, cpu.st.efer = Cr0.PG | Cr0.PE, cpu.st.efer | Efer.LMA
    assert not cpu.msrs.write(msrs.EFER, Efer.NXE)
    assert cpu.msrs.write(msrs.EFER, Efer.LME)
    assert cpu.st.efer == Efer.LME | Efer.LMA


def test_time_stamp_counter_and_its_adjustment(cpu: PlainCpu) -> None:
    cpu.msrs.set_tsc_offset(-read_tsc() & (1 << 64) - 1)
    second = 2_600_000_000
    assert 0 <= (cpu.msrs.read(msrs.IA32_TSC) or 0) < 60 * second
    cpu.msrs.write(msrs.IA32_TSC, 10**15)
    assert 10**15 <= cpu.msrs.timestamp() < 10**15 + 60 * second
    adjust = cpu.msrs.read(msrs.IA32_TSC_ADJUST)
    assert adjust is not None and 10**15 - 60 * second < adjust <= 10**15
    cpu.msrs.set_tsc_offset(-read_tsc() & (1 << 64) - 1)  # a thaw: the guest's own adjustment stays
    assert 10**15 - 60 * second < cpu.msrs.timestamp() < 10**15 + 60 * second
    cpu.msrs.write(msrs.IA32_TSC_ADJUST, 0)
    assert cpu.msrs.timestamp() < 60 * second


def test_deadline_is_told_in_the_vms_time(cpu: PlainCpu) -> None:
    cpu.msrs.write(msrs.IA32_TSC_ADJUST, 1000)
    cpu.msrs.write(msrs.IA32_TSC_DEADLINE, 5000)
    assert cpu.interrupts.deadline == 4000
    assert cpu.msrs.read(msrs.IA32_TSC_DEADLINE) == 5000
    cpu.msrs.write(msrs.IA32_TSC_DEADLINE, 0)
    assert cpu.interrupts.deadline == 0
    assert cpu.msrs.read(msrs.IA32_TSC_DEADLINE) == 0


def test_apic_base_is_the_apics(cpu: PlainCpu) -> None:
    assert cpu.msrs.read(msrs.IA32_APIC_BASE) == 0xFEE0_0900
    assert cpu.msrs.read(0x802) is None


def test_memory_is_write_back_but_for_the_hole(cpu: PlainCpu) -> None:
    assert cpu.msrs.read(msrs.IA32_MTRR_DEF_TYPE) == 0xC06
    assert (cpu.msrs.read(0x200), cpu.msrs.read(0x201)) == (0xC000_0000, 0xFF_C000_0800)
    assert cpu.msrs.read(msrs.IA32_MTRRCAP) == 0x508
    assert cpu.msrs.read(0x259) == 0


def test_amds_own_are_kept() -> None:
    amd = PlainCpu(vendor=AMD_VENDOR)
    assert amd.msrs.read(msrs.AMD_HWCR) == 1 << 24
    for index in msrs.AMD_RESET:
        assert amd.msrs.write(index, 1 << 46)
        assert amd.msrs.read(index) == amd.msrs.save()[index] == 1 << 46
    amd.close()


def test_save_and_load(cpu: PlainCpu) -> None:
    values = {msrs.IA32_PAT: 0x0600_0600_0600_0600, msrs.STAR: 1 << 35, msrs.IA32_TSC_ADJUST: 99, 0x200: 0x1234000 | 6}
    for index, value in values.items():
        assert cpu.msrs.write(index, value)
    saved = cpu.msrs.save()
    assert set(saved) == set(msrs.SAVED)
    assert values.items() <= saved.items()
    other = PlainCpu(vendor=INTEL_VENDOR)
    other.msrs.load(saved)
    assert other.msrs.save() == saved
    other.msrs.reset()
    assert other.msrs.read(msrs.IA32_PAT) == msrs.PAT_RESET
    other.close()


def test_memory_of_unknown_accesses_is_bounded(cpu: PlainCpu) -> None:
    for index in range(0x5000, 0x5100):
        assert cpu.msrs.read(index) is None
    assert len(cpu.msrs.exits.refused()) == 64
