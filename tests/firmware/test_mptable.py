"""The MP table, walked as an operating system walks it. That Linux boots by it is in tests/guest/test_board.py."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from skep.firmware import mptable

BASE = 0xF0000


def machine(cpus: int) -> mptable.Machine:
    return mptable.Machine(
        cpus=cpus,
        signature=0x106A5,
        features=0x1F8BFBFF,
        lapic=0xFEE00000,
        ioapic=0xFEC00000,
        ioapic_id=0,
        overrides=((0, 2),),
        sci=9,
        routing=tuple((slot, pin, 16 + (slot + pin) % 8) for slot in range(1, 32) for pin in range(4)),
    )


def entries(table: bytes) -> Iterator[bytes]:
    """Every entry, after the checks that the specification asks for (4.1, 4.2)."""
    assert table[:4] == b"_MP_" and sum(table[:16]) & 0xFF == 0 and table[8] == 1 and table[9] == 4
    assert not any(table[11:16]), "there is a configuration table, and no IMCR"
    (address,) = struct.unpack_from("<I", table, 4)
    configuration = table[address - BASE :]
    signature, length, revision, _, count = struct.unpack_from("<4sHBB26xH", configuration)
    assert signature == b"PCMP" and revision == 4 and length == len(configuration)
    assert sum(configuration) & 0xFF == 0 and struct.unpack_from("<I", configuration, 36) == (0xFEE00000,)
    at, last = 44, 0
    for _ in range(count):
        assert configuration[at] >= last, "sorted by type"
        last = configuration[at]
        size = 20 if last == 0 else 8
        yield configuration[at : at + size]
        at += size
    assert at == length


@pytest.mark.parametrize("cpus", [1, 255])
def test_the_table_tells_the_machine(cpus: int) -> None:
    found = list(entries(mptable.build(machine(cpus), BASE)))
    processors = [entry for entry in found if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(cpus))
    assert [entry[3] for entry in processors] == [3] + [1] * (cpus - 1), "enabled; the first one starts the system"
    assert struct.unpack_from("<II", processors[0], 4) == (0x106A5, 0x1F8BFBFF)
    assert [(entry[1], entry[2:]) for entry in found if entry[0] == 1] == [(0, b"PCI   "), (1, b"ISA   ")]
    assert [entry[1:] for entry in found if entry[0] == 2] == [struct.pack("<BBBI", 0, 0x20, 1, 0xFEC00000)]
    wires = [struct.unpack("<BHBBBB", entry[1:]) for entry in found if entry[0] == 3]
    isa = {irq: (flags, pin) for kind, flags, bus, irq, apic, pin in wires if bus == 1}
    assert set(isa) == set(range(16)) - {2} and isa[0] == (0, 2) and isa[4] == (0, 4)
    assert isa[9] == (0b1101, 9), "the SCI is a level, active high"
    pci = {(irq >> 2, irq & 3): pin for kind, flags, bus, irq, apic, pin in wires if bus == 0}
    assert len(pci) == 31 * 4 and pci[2, 0] == 18
    assert all(kind == 0 and apic == 0 for kind, _, _, _, apic, _ in wires)
    local = [struct.unpack("<BHBBBB", entry[1:]) for entry in found if entry[0] == 4]
    assert [(kind, apic, pin) for kind, _, _, _, apic, pin in local] == [(3, 0xFF, 0), (1, 0xFF, 1)]
