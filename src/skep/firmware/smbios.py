"""SMBIOS: what the machine is called and what it consists of (System Management BIOS Reference Specification, DSP0134).

The structures are those of version 3.0; there is an entry point of 64 bits, and one of 32 for who is older. Names of
structures and fields are the specification's.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from skep.config import View, option, values
from skep.firmware.guid import guid, named

_NONE = 0xFFFF
"""The handle of a structure that is not there."""
_KIB, _MIB = 10, 20
_NAMESPACE = "5a2e2b5e-6f0b-4c1e-9d5b-7c3a1f0e8d42"
"""Of the UUIDs that we derive from names; any constant will do."""


class BiosStrings(View):
    """The keys of ``bios``."""

    vendor: str = option(values.label, "Skep", doc="who made the firmware")
    version: str = option(values.label, "1.0", doc="its version")
    release_date: str = option(values.label, "01/01/2026", doc="its date, MM/DD/YYYY")


class SystemStrings(View):
    """The keys of ``system``."""

    manufacturer: str = option(values.label, "Skep", doc="who made the machine")
    product_name: str = option(values.label, "Skep VM", doc="what it is called")
    version: str = option(values.label, "1.0", doc="its version")
    serial_number: str = option(values.label, "None", doc="its serial number")
    sku: str = option(values.label, "None", doc="its stock-keeping unit")
    family_name: str = option(values.label, "Virtual Machine", doc="its family")


class BoardStrings(View):
    """The keys of ``board``."""

    manufacturer: str = option(values.label, "Skep", doc="who made the main board")
    product_name: str = option(values.label, "Skep VM", doc="what it is called")
    version: str = option(values.label, "1.0", doc="its version")
    serial_number: str = option(values.label, "None", doc="its serial number")
    asset_tag: str = option(values.label, "None", doc="its asset tag")
    location: str = option(values.label, "None", doc="where in the chassis it is")


class ChassisStrings(View):
    """The keys of ``chassis``."""

    manufacturer: str = option(values.label, "Skep", doc="who made the chassis")
    version: str = option(values.label, "1.0", doc="its version")
    serial_number: str = option(values.label, "None", doc="its serial number")
    asset_tag: str = option(values.label, "None", doc="its asset tag")
    sku: str = option(values.label, "None", doc="its stock-keeping unit")


class Processor(NamedTuple):
    """All processors are cores of one socket."""

    manufacturer: str
    brand: str
    identifier: int
    """CPUID leaf 1: EAX, and EDX above it."""
    mhz: int
    cores: int
    enabled_cores: int


class Machine(NamedTuple):
    """What the tables tell."""

    bios: BiosStrings
    system: SystemStrings
    board: BoardStrings
    chassis: ChassisStrings
    uuid: str
    processor: Processor
    memory: tuple[tuple[int, int], ...]
    """Ranges of RAM: (first address, size), both whole KiB."""
    rom: tuple[int, int]
    """The BIOS's address, below 1 MiB, and its size."""


def default_uuid(name: str) -> str:
    """Of a VM that was given none: the same for the same name on the same host, as bhyve has it."""
    return named(_NAMESPACE, f"{name}@{os.uname().nodename}")


def build(machine: Machine, base: int) -> bytes:
    """Both entry points, on boundaries of 16 bytes as is required, and the structures, for address ``base``."""
    structures = _structures(machine)
    table = b"".join(structures)
    at = base + 0x40
    largest = max(map(len, structures))
    return (_entry32(at, len(table), largest, len(structures)) + _entry64(at, len(table))).ljust(0x40, b"\0") + table


def _entry32(table: int, length: int, largest: int, count: int) -> bytes:
    """SMBIOS 2.1 entry point (5.2.1), of version 2.8."""
    inner = bytearray(struct.pack("<5sBHIHB", b"_DMI_", 0, length, table, count, 0x28))
    inner[5] = -sum(inner) & 0xFF
    outer = bytearray(struct.pack("<4sBBBBHB5x", b"_SM_", 0, 0x1F, 2, 8, largest, 0) + inner)
    outer[4] = -sum(outer) & 0xFF
    return bytes(outer).ljust(0x20, b"\0")


def _entry64(table: int, length: int) -> bytes:
    """SMBIOS 3.0 entry point (5.2.2)."""
    entry = bytearray(struct.pack("<5sBBBBBBxIQ", b"_SM3_", 0, 0x18, 3, 0, 0, 1, length, table))
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry)


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """Header, formatted part, and the strings, which the formatted part refers to by their number from 1 (6.1)."""
    texts = b"".join(text.encode() + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + texts + b"\0"


def _structures(machine: Machine) -> list[bytes]:
    chassis, array = 0x300, 0x1000
    made = [
        _bios(machine, 0),
        _system(machine, 0x100),
        _board(machine.board, 0x200, chassis),
        _chassis(machine.chassis, chassis),
        _processor(machine.processor, 0x400),
        _memory_array(machine, array),
        _memory_device(machine, 0x1100, array),
    ]
    made += [_mapped(*memory, 0x1300 + i, array) for i, memory in enumerate(machine.memory)]
    made.append(_structure(32, 0x2000, bytes(7)))  # system boot information: no errors detected
    made.append(_structure(127, 0x7F00, b""))
    return made


def _bios(machine: Machine, handle: int) -> bytes:
    """Type 0."""
    isa, pci, selectable_boot = 1 << 4, 1 << 7, 1 << 16
    acpi, virtual_machine = 1 << 0, 1 << 4  # of the first extension byte, and of the second
    address, size = machine.rom
    body = struct.pack(
        "<BBHBBQBBBBBB",
        1, 2, address >> 4, 3, (size >> 16) - 1, isa | pci | selectable_boot, acpi, virtual_machine,
        1, 0, 0xFF, 0xFF,  # of version 1.0; no embedded controller
    )  # fmt: skip
    return _structure(0, handle, body, machine.bios.vendor, machine.bios.version, machine.bios.release_date)


def _system(machine: Machine, handle: int) -> bytes:
    """Type 1."""
    power_switch = 6
    system = machine.system
    body = struct.pack("<BBBB16sBBB", 1, 2, 3, 4, guid(machine.uuid), power_switch, 5, 6)
    return _structure(
        1, handle, body,
        system.manufacturer, system.product_name, system.version, system.serial_number, system.sku, system.family_name,
    )  # fmt: skip


def _board(board: BoardStrings, handle: int, chassis: int) -> bytes:
    """Type 2."""
    hosting, motherboard = 1, 10
    body = struct.pack("<BBBBBBBHBB", 1, 2, 3, 4, 5, hosting, 6, chassis, motherboard, 0)
    return _structure(
        2, handle, body,
        board.manufacturer, board.product_name, board.version, board.serial_number, board.asset_tag, board.location,
    )  # fmt: skip


def _chassis(chassis: ChassisStrings, handle: int) -> bytes:
    """Type 3."""
    other, safe, no_security = 1, 3, 3
    body = struct.pack("<9BIBBBBB", 1, other, 2, 3, 4, safe, safe, safe, no_security, 0, 0, 0, 0, 0, 5)
    return _structure(
        3, handle, body,
        chassis.manufacturer, chassis.version, chassis.serial_number, chassis.asset_tag, chassis.sku,
    )  # fmt: skip


def _processor(processor: Processor, handle: int) -> bytes:
    """Type 4."""
    central, other, populated_and_enabled, no_upgrade, capable64, multi_core = 3, 1, 0x41, 6, 1 << 2, 1 << 3
    cores, enabled = processor.cores, processor.enabled_cores
    body = struct.pack(
        "<BBBBQBBHHHBBHHHBBBBBBHHHHH",
        1, central, other, 2, processor.identifier, 3, 0, 0, processor.mhz, processor.mhz,
        populated_and_enabled, no_upgrade, _NONE, _NONE, _NONE, 0, 0, 0,
        min(cores, 0xFF), min(enabled, 0xFF), min(cores, 0xFF), capable64 | (multi_core if cores > 1 else 0),
        other, cores, enabled, cores,
    )  # fmt: skip
    return _structure(4, handle, body, "CPU 0", processor.manufacturer, processor.brand)


def _memory_array(machine: Machine, handle: int) -> bytes:
    """Type 16."""
    system_board, system_memory, no_correction, not_provided, see_extended = 3, 3, 3, 0xFFFE, 0x8000_0000
    size = sum(length for _, length in machine.memory)
    kib = size >> _KIB
    extended = 0 if kib < see_extended else size
    capacity = see_extended if extended else kib
    body = struct.pack("<BBBIHHQ", system_board, system_memory, no_correction, capacity, not_provided, 1, extended)
    return _structure(16, handle, body)


def _memory_device(machine: Machine, handle: int, array: int) -> bytes:
    """Type 17: all memory is in one."""
    not_provided, bits, dimm, ram, other_detail, see_extended = 0xFFFE, 64, 9, 7, 1 << 1, 0x7FFF
    size = sum(length for _, length in machine.memory)
    in_kib = 1 << 15
    mib = -(-size >> _MIB)
    small = size % (1 << _MIB) and size >> _KIB < see_extended
    short = in_kib | size >> _KIB if small else min(mib, see_extended)
    body = struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHH",
        array, not_provided, bits, bits, short, dimm, 0, 1, 2, ram, other_detail, 0, 3, 0, 0, 0, 0,
        mib if short == see_extended else 0, 0, 0, 0, 0,
    )  # fmt: skip
    return _structure(17, handle, body, "DIMM 0", "Bank 0", "Skep")


def _mapped(start: int, size: int, handle: int, array: int) -> bytes:
    """Type 19."""
    first, last, see_extended = start >> _KIB, (start + size >> _KIB) - 1, 0xFFFF_FFFF
    if last < see_extended:
        body = struct.pack("<IIHBQQ", first, last, array, 1, 0, 0)
    else:
        body = struct.pack("<IIHBQQ", see_extended, see_extended, array, 1, start, start + size - 1)
    return _structure(19, handle, body)
