"""The ACPI tables of an amd64 board (ACPI 6.5, chapter 5).

The board says what it has in a :class:`Platform`; :func:`build` lays the tables out for one guest-physical address.
The AML is data but for two methods: the one that hands PCI Express features over, and the one of the general-purpose
event. The board is in ACPI mode from the start (SMI_CMD is 0), and its power button is the fixed-hardware one.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from skep.firmware import aml

_OEM_ID, _OEM_TABLE_ID, _CREATOR = b"SKEP  ", b"SKEPAMD6", b"SKEP"
_LAST_XAPIC_ID = 0xFE  # 0xff is for all
_SYSTEM_MEMORY, _SYSTEM_IO = 0, 1  # address spaces of a generic address structure, 5.2.3.2
_BYTE, _WORD, _DWORD = 1, 2, 3  # its access sizes
WAKING_VECTOR = 12
"""Where in the FACS the operating system says, in 32 bits, where it wakes (5.2.10)."""


class Pci(NamedTuple):
    """The host bridge. Ranges are (first, last)."""

    ecam: int
    last_bus: int
    memory: tuple[int, int]
    ports: tuple[tuple[int, int], ...]
    routing: tuple[tuple[int, int, int], ...]
    """(slot, pin from 0 for INTA, GSI) of every interrupt pin."""


class Keyboard(NamedTuple):
    """The PS/2 controller."""

    ports: tuple[int, int]
    irq: int


class Serial(NamedTuple):
    """COM port ``number``, counted from 1."""

    number: int
    port: int
    irq: int


class Hpet(NamedTuple):
    base: int
    size: int
    block_id: int
    """The low half of its General Capabilities and ID Register."""
    minimum_tick: int


class Generation(NamedTuple):
    """The VM generation identifier."""

    address: int
    event: int
    """The general-purpose event that tells of its change."""


class Platform(NamedTuple):
    """What the tables tell."""

    cpus: int
    """Their APIC identifiers, and ACPI's own, count from 0."""
    possible_cpus: int
    """With those that are not there yet."""
    lapic: int
    ioapic: int
    ioapic_id: int
    sci: int
    """The GSI of the system control interrupt, level, asserted high."""
    overrides: tuple[tuple[int, int], ...]
    """ISA IRQs that reach another GSI: (IRQ, GSI)."""
    pm1a_event: int
    pm1a_control: int
    pm_timer: int
    pm_timer_32bit: bool
    gpe0: int
    gpe0_size: int
    reset_port: int
    reset_value: int
    s3_sleep_type: int
    s5_sleep_type: int
    century: int
    """The CMOS byte that holds the century."""
    keyboard: Keyboard
    serial: tuple[Serial, ...]
    hpet: Hpet
    generation: Generation
    pci: Pci


class Tables(NamedTuple):
    rsdp: int
    """Guest-physical address of the RSDP."""
    facs: int
    """And of the FACS."""
    data: bytes
    """Everything, from the address it was built for."""


def build(platform: Platform, base: int, limit: int) -> Tables:
    """All tables, from ``base``; raises ValueError where they would take more than ``limit`` bytes."""
    blob = bytearray()

    def place(table: bytes, alignment: int = 16) -> int:
        blob.extend(bytes(-len(blob) % alignment))
        address = base + len(blob)
        blob.extend(table)
        return address

    rsdp_size = 36
    place(bytes(rsdp_size))
    facs_address = place(facs(), 64)
    dsdt_address = place(dsdt(platform))
    made = (fadt(platform, facs_address, dsdt_address), madt(platform), mcfg(platform.pci), hpet(platform.hpet))
    tables = [place(table) for table in made]
    blob[:rsdp_size] = rsdp(place(xsdt(tables)))
    if len(blob) > limit:
        raise ValueError(f"the ACPI tables take {len(blob)} bytes of {limit}")
    return Tables(base, facs_address, bytes(blob))


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: header (5.2.6) and body."""
    head = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR, 1
    )
    table = bytearray(head + body)
    table[9] = _checksum(table)
    return bytes(table)


def _gas(port: int, bits: int, access: int) -> bytes:
    """A generic address structure for a port (5.2.3.2)."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, bits, 0, access, port)


def rsdp(xsdt_address: int) -> bytes:
    """Root System Description Pointer, revision 2; no RSDT (5.2.5.3)."""
    table = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt_address, 0))
    table[8] = _checksum(table[:20])
    table[32] = _checksum(table)
    return bytes(table)


def xsdt(addresses: list[int]) -> bytes:
    return _table(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses))


def facs() -> bytes:
    """Firmware ACPI Control Structure: no global lock is held, nothing to wake to (5.2.10). Version 0 has the one
    waking vector that is for real mode, and not the one for protected mode."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 0)


def fadt(platform: Platform, facs_address: int, dsdt_address: int) -> bytes:
    """Fixed ACPI Description Table, revision 6 (5.2.9)."""
    wbinvd, proc_c1, slp_button, tmr_val_ext, reset_reg_sup = 1 << 0, 1 << 2, 1 << 5, 1 << 8, 1 << 10
    flags = wbinvd | proc_c1 | slp_button | reset_reg_sup  # 4 and 6 clear: a fixed power button, and RTC_STS
    if platform.pm_timer_32bit:
        flags |= tmr_val_ext
    legacy_devices, with_8042, vga_not_present = 1 << 0, 1 << 1, 1 << 2  # bit 5 clear: an RTC
    no_c_state = 0xFFFF
    body = struct.pack(
        "<II B BHIBBBB IIII IIII BBBBBBBB HHHHBBBBB HBI",
        facs_address, dsdt_address,
        0,
        0, platform.sci, 0, 0, 0, 0, 0,  # no preferred profile; SCI_INT; SMI_CMD and what would be written there
        platform.pm1a_event, 0, platform.pm1a_control, 0,
        0, platform.pm_timer, platform.gpe0, 0,  # PM2, PM_TMR, GPE0, GPE1
        4, 2, 0, 4,  # lengths of PM1_EVT, PM1_CNT, PM2_CNT, PM_TMR
        platform.gpe0_size, 0, 0, 0,  # of GPE0, GPE1; GPE1 base, _CST
        no_c_state, no_c_state, 0, 0, 0, 0, 0, 0, platform.century,
        legacy_devices | with_8042 | vga_not_present, 0, flags,
    )  # fmt: skip
    body += _gas(platform.reset_port, 8, _BYTE) + struct.pack("<BHB", platform.reset_value, 0, 5)  # minor version 5
    body += struct.pack("<QQ", facs_address, dsdt_address)
    nothing = bytes(12)
    body += _gas(platform.pm1a_event, 32, _WORD) + nothing
    body += _gas(platform.pm1a_control, 16, _WORD) + nothing
    body += nothing + _gas(platform.pm_timer, 32, _DWORD)  # PM2 before it
    body += _gas(platform.gpe0, 8 * platform.gpe0_size, _BYTE) + nothing * 3  # GPE1, sleep control and status
    body += struct.pack("<8s", b"SKEP")  # hypervisor vendor
    return _table(b"FACP", 6, body)


def madt(platform: Platform) -> bytes:
    """Multiple APIC Description Table, revision 5 (5.2.12): who may be interrupted, and through what."""
    enabled, online_capable, pcat_compat, lint1 = 1 << 0, 1 << 1, 1, 1
    level_high = 0b11 << 2 | 0b01
    body = struct.pack("<II", platform.lapic, pcat_compat)
    for i in range(platform.possible_cpus):
        flags = enabled if i < platform.cpus else online_capable
        if i <= _LAST_XAPIC_ID:
            body += struct.pack("<BBBBI", 0, 8, i, i, flags)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, i, flags, i)  # local x2APIC
    body += struct.pack("<BBBBII", 1, 12, platform.ioapic_id, 0, platform.ioapic, 0)
    for irq, gsi in platform.overrides:
        body += struct.pack("<BBBBIH", 2, 10, 0, irq, gsi, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, platform.sci, platform.sci, level_high)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, lint1)  # every local APIC's NMI
    if platform.possible_cpus > _LAST_XAPIC_ID + 1:
        body += struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFF_FFFF, lint1)  # every local x2APIC's
    return _table(b"APIC", 5, body)


def mcfg(pci: Pci) -> bytes:
    """Where PCI Express configuration space is mapped (PCI Firmware Specification 3.3, 4.1.2)."""
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", pci.ecam, 0, 0, pci.last_bus))


def hpet(timer: Hpet) -> bytes:
    """The HPET description table (IA-PC HPET Specification 1.0a, 3.2.4)."""
    address = struct.pack("<BBBBQ", _SYSTEM_MEMORY, 64, 0, 0, timer.base)
    return _table(b"HPET", 1, struct.pack("<I12sBHB", timer.block_id, address, 0, timer.minimum_tick, 0))


def dsdt(platform: Platform) -> bytes:
    """Differentiated System Description Table: processors, the PCI root, and what sits on no bus that can be asked."""
    s3, s5 = aml.integer(platform.s3_sleep_type), aml.integer(platform.s5_sleep_type)
    ports = [
        aml.io(platform.pm1a_event, 4),
        aml.io(platform.pm1a_control, 2),
        aml.io(platform.pm_timer, 4),
        aml.io(platform.gpe0, platform.gpe0_size),
    ]
    if platform.reset_port not in range(0xCF8, 0xD00):  # those are the host bridge's
        ports.append(aml.io(platform.reset_port, 1))
    board = aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resource_template(aml.memory32_fixed(platform.pci.ecam, (platform.pci.last_bus + 1) << 20), *ports),
        ),
    )
    clock = aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resource_template(aml.io(0x70, 2), aml.irq_no_flags(8))),
    )
    keyboard = aml.device(
        "KBD",
        aml.name("_HID", aml.eisa_id("PNP0303")),
        aml.name(
            "_CRS",
            aml.resource_template(
                *(aml.io(port, 1) for port in platform.keyboard.ports), aml.irq_no_flags(platform.keyboard.irq)
            ),
        ),
    )
    timer = aml.device(
        "HPET",
        aml.name("_HID", aml.eisa_id("PNP0103")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(aml.memory32_fixed(platform.hpet.base, platform.hpet.size))),
    )
    serial = [
        aml.device(
            f"COM{com.number}",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(com.number)),
            aml.name("_CRS", aml.resource_template(aml.io(com.port, 8), aml.irq_no_flags(com.irq))),
        )
        for com in platform.serial
    ]
    processors = [
        aml.device(
            f"C{i:03X}",
            aml.name("_HID", aml.string("ACPI0007")),
            aml.name("_UID", aml.integer(i)),
            *([aml.name("_STA", aml.integer(0))] if i >= platform.cpus else []),
        )
        for i in range(platform.possible_cpus)
    ]
    devices = (_pci_root(platform.pci), board, clock, timer, keyboard, *serial, _generation(platform.generation))
    return _table(
        b"DSDT",
        2,
        aml.scope("_SB", *processors, *devices)
        + aml.scope("_GPE", _event(platform.generation.event, r"\_SB.GENC"))
        + aml.name("_S3", aml.package(s3, s3, aml.integer(0), aml.integer(0)))
        + aml.name("_S5", aml.package(s5, s5, aml.integer(0), aml.integer(0))),
    )


def _generation(generation: Generation) -> bytes:
    """The VM generation counter device, which drivers know by its compatible and its DOS name."""
    low, high = generation.address & 0xFFFF_FFFF, generation.address >> 32
    return aml.device(
        "GENC",
        aml.name("_HID", aml.string("SKEP0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("_UID", aml.integer(0)),
        aml.name("ADDR", aml.package(aml.integer(low), aml.integer(high))),
    )


def _event(number: int, path: str) -> bytes:
    """What an edge-triggered general-purpose event does: tell a device's driver of a change of its own."""
    device_specific = 0x80
    return aml.method(f"_E{number:02X}", 0, aml.notify(path, device_specific))


_PCI_HOST_BRIDGE = "33db4d5b-1ff7-401c-9657-7441c03dd766"
"""The UUID of _OSC for host bridges (PCI Firmware Specification 3.3, 4.5.1)."""
_GRANTED = 0x3D
"""Native hot-plug, PME, AER, the capability structure and LTR; not SHPC. Nothing here would want them for itself."""


def _osc() -> bytes:
    """Operating System Capabilities: which features the system may control (ACPI 6.2.11)."""
    unrecognized_uuid, unrecognized_revision, masked = 1 << 2, 1 << 3, 1 << 4
    status, control, capabilities = aml.name_string("CDW1"), aml.name_string("CDW3"), aml.arg(3)
    answer = aml.return_(capabilities)

    def complain(bit: int) -> bytes:
        return aml.or_(status, aml.integer(bit), status)

    return aml.method(
        "_OSC",
        4,
        aml.create_dword_field(capabilities, 0, "CDW1"),
        aml.if_(
            aml.l_equal(aml.arg(0), aml.to_uuid(_PCI_HOST_BRIDGE)),
            aml.create_dword_field(capabilities, 8, "CDW3"),
            aml.if_(aml.l_not_equal(aml.arg(1), aml.integer(1)), complain(unrecognized_revision)),
            aml.and_(control, aml.integer(_GRANTED), aml.local(0)),
            aml.if_(aml.l_not_equal(control, aml.local(0)), complain(masked)),
            aml.and_(control, aml.integer(_GRANTED), control),
            answer,
        ),
        complain(unrecognized_uuid),
        answer,
    )


def _pci_root(pci: Pci) -> bytes:
    windows = [
        aml.word_bus_number(0, pci.last_bus),
        aml.io(0xCF8, 8),
        *(aml.word_io(first, last) for first, last in pci.ports),
        aml.dword_memory(*pci.memory),
    ]
    any_function = 0xFFFF
    routes = [
        aml.package(aml.integer(slot << 16 | any_function), aml.integer(pin), aml.integer(0), aml.integer(gsi))
        for slot, pin, gsi in pci.routing
    ]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(*windows)),
        aml.name("_PRT", aml.package(*routes)),
        _osc(),
    )
