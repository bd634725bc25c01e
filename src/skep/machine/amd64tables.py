"""What the guest is told of the amd64 board: the tables that firmware would leave in memory, and the memory map."""

from __future__ import annotations

from typing import NamedTuple

from skep.boot.e820 import E820, RangeType
from skep.config import Settings, Tree, View, option, values, view
from skep.devices import i8042, pm
from skep.engine.amd64 import cpuid
from skep.firmware import acpi, mptable, smbios
from skep.irqchip import hpet, ioapic, lapic
from skep.irqchip.lines import PIT_PIN
from skep.machine.amd64map import (
    ACPI_BASE,
    ACPI_SIZE,
    BIOS_BASE,
    BIOS_SIZE,
    ECAM_BASE,
    ECAM_SIZE,
    HIGH_MEMORY,
    IOAPIC_ID,
    KEYBOARD_IRQ,
    LOW_RAM_END,
    MPTABLE_BASE,
    PCI_MEMORY,
    PCI_ROUTING,
    RTC_CENTURY,
    SMBIOS_BASE,
    VMGENID_BASE,
    VMGENID_GPE,
)
from skep.memory import GuestMemory


class X86Options(View):
    """What is x86's own."""

    mptable: bool = option(values.boolean, True, doc="describe processors and interrupts by an MP table too")


class Tables(NamedTuple):
    """Bytes by guest-physical address; ``rsdp`` is where ACPI begins, ``facs`` where the guest says what it wakes to, 0
    without ACPI."""

    rsdp: int
    facs: int
    places: dict[int, bytes]


def make_tables(
    tree: Tree, settings: Settings, memory: GuestMemory, serial: tuple[acpi.Serial, ...], tsc_hz: int
) -> Tables:
    """All of them, as the tree wants them; ``tsc_hz`` is the guest's TSC's. Raises UserError for what it says wrong."""
    model = cpuid.make(settings.cpu_model, tsc_hz, cpus=settings.cpus)
    places = {SMBIOS_BASE: _smbios(tree, settings, memory, model, tsc_hz)}
    if view(tree.node("x86"), X86Options).mptable:
        places[MPTABLE_BASE] = _mptable(settings, model)
    if not settings.acpi_tables:
        return Tables(0, 0, places)
    made = _acpi(settings, serial)
    places[ACPI_BASE] = made.data
    return Tables(made.rsdp, made.facs, places)


def memory_map(memory: GuestMemory) -> list[E820]:
    """What the guest is told of its memory."""
    ranges = [
        E820(0, LOW_RAM_END, RangeType.RAM),
        E820(ACPI_BASE, ACPI_SIZE, RangeType.ACPI),
        E820(BIOS_BASE, BIOS_SIZE, RangeType.RESERVED),
        E820(HIGH_MEMORY, memory.low_size - HIGH_MEMORY, RangeType.RAM),
        E820(ECAM_BASE, ECAM_SIZE, RangeType.RESERVED),
    ]
    if memory.high_size:
        ranges.append(E820(memory.high_base, memory.high_size, RangeType.RAM))
    return ranges


def _possible_cpus(settings: Settings) -> int:
    return settings.max_cpus or settings.cpus


def _acpi(settings: Settings, serial: tuple[acpi.Serial, ...]) -> acpi.Tables:
    platform = acpi.Platform(
        cpus=settings.cpus,
        possible_cpus=_possible_cpus(settings),
        lapic=lapic.DEFAULT_BASE,
        ioapic=ioapic.BASE,
        ioapic_id=IOAPIC_ID,
        sci=pm.SCI_GSI,
        overrides=((0, PIT_PIN),),
        pm1a_event=pm.BASE,
        pm1a_control=pm.BASE + pm.CONTROL,
        pm_timer=pm.BASE + pm.TIMER,
        pm_timer_32bit=True,
        gpe0=pm.BASE + pm.GPE0,
        gpe0_size=pm.GPE0_SIZE,
        reset_port=pm.RESET_PORT,
        reset_value=pm.RESET_VALUE,
        s3_sleep_type=pm.SLEEP_TYPE_S3,
        s5_sleep_type=pm.SLEEP_TYPE_S5,
        century=RTC_CENTURY,
        keyboard=acpi.Keyboard((i8042.DATA_PORT, i8042.STATUS_PORT), KEYBOARD_IRQ),
        serial=serial,
        hpet=acpi.Hpet(hpet.BASE, hpet.SIZE, hpet.CAPABILITIES & 0xFFFF_FFFF, hpet.MIN_PERIOD_TICKS),
        generation=acpi.Generation(VMGENID_BASE, VMGENID_GPE),
        pci=acpi.Pci(
            ecam=ECAM_BASE,
            last_bus=(ECAM_SIZE >> 20) - 1,
            memory=(PCI_MEMORY[0], PCI_MEMORY[-1]),
            ports=((0, 0xCF7), (0xD00, 0xFFFF)),
            routing=PCI_ROUTING,
        ),
    )
    return acpi.build(platform, ACPI_BASE, ACPI_SIZE)


def _mptable(settings: Settings, model: cpuid.Cpuid) -> bytes:
    signature, _, _, features = model.table[1, 0]
    machine = mptable.Machine(
        cpus=settings.cpus,
        signature=signature,
        features=features,
        lapic=lapic.DEFAULT_BASE,
        ioapic=ioapic.BASE,
        ioapic_id=IOAPIC_ID,
        overrides=((0, PIT_PIN),),
        sci=pm.SCI_GSI,
        routing=PCI_ROUTING,
    )
    return mptable.build(machine, MPTABLE_BASE)


def _smbios(tree: Tree, settings: Settings, memory: GuestMemory, model: cpuid.Cpuid, tsc_hz: int) -> bytes:
    signature, _, _, features = model.table[1, 0]
    machine = smbios.Machine(
        bios=view(tree.node("bios"), smbios.BiosStrings),
        system=view(tree.node("system"), smbios.SystemStrings),
        board=view(tree.node("board"), smbios.BoardStrings),
        chassis=view(tree.node("chassis"), smbios.ChassisStrings),
        uuid=settings.uuid if settings.uuid is not None else smbios.default_uuid(settings.name),
        processor=smbios.Processor(
            manufacturer=model.vendor.decode("ascii"),
            brand=cpuid.BRAND.decode("ascii"),
            identifier=features << 32 | signature,
            mhz=round(tsc_hz / 1_000_000),
            cores=_possible_cpus(settings),
            enabled_cores=settings.cpus,
        ),
        memory=tuple((region.gpa, region.size) for region in memory.ram),
        rom=(BIOS_BASE, BIOS_SIZE),
    )
    return smbios.build(machine, SMBIOS_BASE)
