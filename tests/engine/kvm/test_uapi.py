"""KVM's structures, numbers and ioctls, against the header of the kernel."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from skep.engine.kvm import uapi

STRUCTURES = {
    uapi.CoalescedMmio: "kvm_coalesced_mmio", uapi.CoalescedMmioRing: "kvm_coalesced_mmio_ring",
    uapi.CoalescedMmioZone: "kvm_coalesced_mmio_zone",
    uapi.ClearDirtyLog: "kvm_clear_dirty_log", uapi.CpuidEntry: "kvm_cpuid_entry2",
    uapi.DirtyGfn: "kvm_dirty_gfn", uapi.DirtyLog: "kvm_dirty_log", uapi.Debugregs: "kvm_debugregs",
    uapi.ClockData: "kvm_clock_data", uapi.DeviceAttr: "kvm_device_attr",
    uapi.Dtable: "kvm_dtable", uapi.EnableCap: "kvm_enable_cap", uapi.Ioeventfd: "kvm_ioeventfd",
    uapi.GuestDebug: "kvm_guest_debug",
    uapi.IoapicState: "kvm_ioapic_state", uapi.Irqchip: "kvm_irqchip", uapi.Irqfd: "kvm_irqfd",
    uapi.IrqLevel: "kvm_irq_level", uapi.IrqRoutingIrqchip: "kvm_irq_routing_irqchip",
    uapi.PicState: "kvm_pic_state", uapi.PitChannelState: "kvm_pit_channel_state", uapi.PitConfig: "kvm_pit_config",
    uapi.PitState2: "kvm_pit_state2",
    uapi.IrqRoutingEntry: "kvm_irq_routing_entry", uapi.IrqRoutingMsi: "kvm_irq_routing_msi",
    uapi.LapicState: "kvm_lapic_state", uapi.MpState: "kvm_mp_state", uapi.Msi: "kvm_msi",
    uapi.MsrEntry: "kvm_msr_entry", uapi.MsrFilter: "kvm_msr_filter", uapi.MsrFilterRange: "kvm_msr_filter_range",
    uapi.Regs: "kvm_regs", uapi.Run: "kvm_run", uapi.Segment: "kvm_segment", uapi.Sregs: "kvm_sregs",
    uapi.SyncRegs: "kvm_sync_regs",
    uapi.UserspaceMemoryRegion: "kvm_userspace_memory_region", uapi.VcpuEvents: "kvm_vcpu_events",
    uapi.Xcr: "kvm_xcr", uapi.Xcrs: "kvm_xcrs", uapi.Xsave: "kvm_xsave",
}  # fmt: skip
EXITS = {
    uapi.ExitIo: "io", uapi.ExitMmio: "mmio", uapi.ExitFailEntry: "fail_entry", uapi.ExitInternal: "internal",
    uapi.ExitMsr: "msr", uapi.ExitEoi: "eoi", uapi.ExitDebug: "debug.arch",
}  # fmt: skip
"""Members of the union in kvm_run, whose structures have no names."""
PARTS = {uapi.ExitUnion, uapi.IrqchipUnion, uapi.IrqRoutingUnion, uapi.SyncUnion}
"""What the header has no name for, and is seen as part of others."""

# Bytes that the header cuts into pieces of no use to us.
OTHERWISE = {
    "VcpuEvents.exception": "exception", "VcpuEvents.interrupt_injected": "interrupt.injected",
    "VcpuEvents.interrupt_nr": "interrupt.nr", "VcpuEvents.interrupt_soft": "interrupt.soft",
    "VcpuEvents.interrupt_shadow": "interrupt.shadow", "VcpuEvents.nmi_injected": "nmi.injected",
    "VcpuEvents.nmi_pending": "nmi.pending", "VcpuEvents.nmi_masked": "nmi.masked", "VcpuEvents.nmi_pad": "nmi.pad",
    "VcpuEvents.rest": "smi", "Run.exit": "io", "IrqRoutingEntry.u": "u", "CpuidEntry.eax": "eax",
    "GuestDebug.debugreg": "arch.debugreg",
}  # fmt: skip
NAMES = {
    "CPUID_FLAG_SIGNIFICANT_INDEX": "KVM_CPUID_FLAG_SIGNIFCANT_INDEX", "IRQ_ROUTING_MSI": "KVM_IRQ_ROUTING_MSI",
    "IRQ_ROUTING_IRQCHIP": "KVM_IRQ_ROUTING_IRQCHIP", "LAPIC_SIZE": "KVM_APIC_REG_SIZE",
    "PIT_HPET_LEGACY": "KVM_PIT_FLAGS_HPET_LEGACY", "PIT_SPEAKER_DATA_ON": "KVM_PIT_FLAGS_SPEAKER_DATA_ON",
}  # fmt: skip


def numbers() -> dict[str, int]:
    return {name: value for name, value in vars(uapi).items() if name.isupper() and isinstance(value, int)}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler makes of the header, by the names that things have here."""
    compiler = shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("needs gcc and linux-libc-dev")
    asked = {name: NAMES.get(name, f"KVM_{name}") for name in numbers()}
    for kind, name in STRUCTURES.items():
        asked[kind.__name__] = f"sizeof(struct {name})"
        for field, *_ in kind._fields_:
            key = f"{kind.__name__}.{field}"
            asked[key] = f"offsetof(struct {name}, {OTHERWISE.get(key, field)})"
    for kind, name in EXITS.items():
        for field, *_ in kind._fields_:
            inside = f"offsetof(struct kvm_run, {name}.{field}) - offsetof(struct kvm_run, io)"
            asked[f"{kind.__name__}.{field}"] = inside
    lines = "\n".join(f'printf("{key} %llu\\n", (unsigned long long)({text}));' for key, text in asked.items())
    home = tmp_path_factory.mktemp("uapi")
    source = home / "uapi.c"
    headers = "".join(f"#include <{name}>\n" for name in ("stddef.h", "stdio.h", "linux/kvm.h"))
    source.write_text(f"{headers}int main(void) {{\n{lines}\n}}\n")
    subprocess.run([compiler, "-w", "-o", home / "uapi", source], check=True, timeout=60)
    output = subprocess.run([home / "uapi"], check=True, capture_output=True, text=True, timeout=20).stdout
    return {key: int(value) for key, value in map(str.split, output.splitlines())}


def test_numbers(told: dict[str, int]) -> None:
    assert {name: told[name] for name in numbers()} == numbers()


def test_structures(told: dict[str, int]) -> None:
    ours: dict[str, int] = {}
    for kind in STRUCTURES:
        ours[kind.__name__] = ctypes.sizeof(kind)
    for kind in (*STRUCTURES, *EXITS):
        for field, *_ in kind._fields_:
            ours[f"{kind.__name__}.{field}"] = getattr(kind, field).offset
    assert {name: told[name] for name in ours} == ours


def test_nothing_is_left_out() -> None:
    kinds = {
        one
        for one in vars(uapi).values()
        if isinstance(one, type) and issubclass(one, (ctypes.Structure, ctypes.Union))
        if one.__module__ == uapi.__name__
    }
    assert kinds == {*STRUCTURES, *EXITS, *PARTS}
