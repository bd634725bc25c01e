"""The MP table: processors and interrupt wiring for who does not read ACPI (MultiProcessor Specification 1.4, 4).

Structure and field names are the specification's.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_SPEC_REV = 4
_OEM_ID, _PRODUCT_ID = b"SKEP    ", b"SKEP AMD64  "
_LAPIC_VERSION, _IOAPIC_VERSION = 0x15, 0x20
_PCI_BUS, _ISA_BUS = 0, 1
_INT, _NMI, _EXTINT = 0, 1, 3  # interrupt types
_CONFORMS, _LEVEL_HIGH = 0, 0b1101  # flags: trigger mode << 2 | polarity
_EVERY_APIC = 0xFF
_ISA_IRQS = 16
_CASCADE = 2


class Machine(NamedTuple):
    """What the table tells."""

    cpus: int
    """Their APIC identifiers count from 0; the first one starts the system."""
    signature: int
    """CPUID leaf 1, EAX."""
    features: int
    """CPUID leaf 1, EDX."""
    lapic: int
    ioapic: int
    ioapic_id: int
    overrides: tuple[tuple[int, int], ...]
    """ISA IRQs that reach another pin: (IRQ, pin)."""
    sci: int
    """The ISA IRQ that is a level, asserted high."""
    routing: tuple[tuple[int, int, int], ...]
    """(slot, pin from 0 for INTA, pin of the I/O APIC) of every interrupt pin of PCI bus 0."""


def build(machine: Machine, base: int) -> bytes:
    """The floating pointer structure and, behind it, the configuration table, for address ``base``."""
    pointer_size = 16
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", base + pointer_size, 1, _SPEC_REV, 0))
    pointer[10] = -sum(pointer) & 0xFF
    return bytes(pointer) + _configuration(machine)


def _configuration(machine: Machine) -> bytes:
    entries = [_processor(machine, i) for i in range(machine.cpus)]
    entries += [struct.pack("<BB6s", 1, _PCI_BUS, b"PCI   "), struct.pack("<BB6s", 1, _ISA_BUS, b"ISA   ")]
    entries.append(struct.pack("<BBBBI", 2, machine.ioapic_id, _IOAPIC_VERSION, 1, machine.ioapic))
    pins = {irq: irq for irq in range(_ISA_IRQS) if irq != _CASCADE} | dict(machine.overrides)
    for irq, pin in pins.items():
        flags = _LEVEL_HIGH if irq == machine.sci else _CONFORMS
        entries.append(_interrupt(3, _INT, flags, _ISA_BUS, irq, machine.ioapic_id, pin))
    for slot, pci_pin, pin in machine.routing:
        entries.append(_interrupt(3, _INT, _CONFORMS, _PCI_BUS, slot << 2 | pci_pin, machine.ioapic_id, pin))
    entries.append(_interrupt(4, _EXTINT, _CONFORMS, _ISA_BUS, 0, _EVERY_APIC, 0))
    entries.append(_interrupt(4, _NMI, _CONFORMS, _ISA_BUS, 0, _EVERY_APIC, 1))
    body = b"".join(entries)
    header = "<4sHBB8s12sIHHIHBx"
    table = bytearray(
        struct.pack(
            header,
            b"PCMP", struct.calcsize(header) + len(body), _SPEC_REV, 0, _OEM_ID, _PRODUCT_ID,
            0, 0, len(entries), machine.lapic, 0, 0,
        )
        + body
    )  # fmt: skip
    table[7] = -sum(table) & 0xFF
    return bytes(table)


def _processor(machine: Machine, index: int) -> bytes:
    enabled, bootstrap = 1, 2
    flags = enabled | (bootstrap if index == 0 else 0)
    return struct.pack("<BBBBII8x", 0, index, _LAPIC_VERSION, flags, machine.signature, machine.features)


def _interrupt(entry: int, kind: int, flags: int, bus: int, irq: int, apic: int, pin: int) -> bytes:
    """``entry`` 3 is an I/O APIC's pin, 4 a LINT of a local APIC."""
    return struct.pack("<BBHBBBB", entry, kind, flags, bus, irq, apic, pin)
