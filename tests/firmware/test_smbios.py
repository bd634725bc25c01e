"""The SMBIOS tables, judged by dmidecode."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from uuid import UUID, uuid3

import pytest

from skep.config import Tree, view
from skep.errors import UserError
from skep.firmware import smbios

BASE = 0xF8000
GIB = 1 << 30
ID = UUID("01234567-89ab-cdef-0123-456789abcdef")


def machine(
    memory: tuple[tuple[int, int], ...] = ((0, GIB // 2),), cores: int = 2, enabled: int = 1, **system: str
) -> smbios.Machine:
    return smbios.Machine(
        bios=smbios.BiosStrings(),
        system=smbios.SystemStrings(**system),
        board=smbios.BoardStrings(),
        chassis=smbios.ChassisStrings(),
        uuid=str(ID),
        processor=smbios.Processor("GenuineIntel", "A CPU", 0x1F8BFBFF_000106A5, 2500, cores, enabled),
        memory=memory,
        rom=(0xF0000, 0x10000),
    )


def decoded(made: smbios.Machine, tmp_path: Path, *, old: bool = False) -> dict[str, dict[str, str]]:
    """What dmidecode says of each structure; ``old`` lets it find the 32-bit entry point only."""
    dmidecode = shutil.which("dmidecode", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert dmidecode, "dmidecode is a package of its own"
    table = smbios.build(made, BASE)
    memory = bytearray(1 << 20)
    memory[BASE : BASE + len(table)] = table
    if old:
        memory[memory.index(b"_SM3_")] = 0
    path = tmp_path / "memory"
    path.write_bytes(memory)
    done = subprocess.run(
        [dmidecode, "--no-sysfs", "-d", path], capture_output=True, text=True, timeout=30, check=True
    )
    assert not done.stderr and not re.search(r"(?i)OUT OF SPEC|BAD INDEX|broken|invalid|truncated", done.stdout)
    head, *structures = done.stdout.split("\n\n")
    assert f"SMBIOS {'2.8' if old else '3.0.0'} present." in head
    found = {}
    for structure in structures:
        lines = structure.strip().splitlines()
        if len(lines) > 1:
            values = (line.strip().partition(": ") for line in lines[2:])
            found[lines[1]] = {key: value for key, _, value in values}
    return found


@pytest.mark.parametrize("old", [False, True])
def test_dmidecode_reads_what_was_said(tmp_path: Path, old: bool) -> None:
    found = decoded(machine(product_name="Straw", family_name="Hives"), tmp_path, old=old)
    assert found["System Information"]["UUID"] == str(ID)
    assert found["System Information"]["Product Name"] == "Straw"
    assert found["System Information"]["Family"] == "Hives"
    assert found["BIOS Information"]["Vendor"] == "Skep"
    assert found["BIOS Information"]["Address"] == "0xF0000"
    assert found["Base Board Information"]["Chassis Handle"] == "0x0300"
    assert found["Processor Information"]["ID"] == "A5 06 01 00 FF FB 8B 1F"
    assert found["Processor Information"]["Max Speed"] == "2500 MHz"
    assert found["Memory Device"]["Size"] == "512 MB"
    assert set(found) == {
        "BIOS Information", "System Information", "Base Board Information", "Chassis Information",
        "Processor Information", "Physical Memory Array", "Memory Device", "Memory Array Mapped Address",
        "System Boot Information", "End Of Table",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "size", "capacity", "end"),
    [
        (((0, (20 << 20) + 4096),), "20484 kB", "20484 kB", "0x00001400FFF"),
        (((0, GIB // 2 + 4096),), "513 MB", "524292 kB", "0x00020000FFF"),
        (((0, 3 * GIB), (4 * GIB, 2 * GIB)), "5 GB", "5 GB", "0x0017FFFFFFF"),
        (((0, 3 * GIB), (4 * GIB, 2045 * GIB)), "2 TB", "2 TB", "0x2003FFFFFFF"),
        (((0, 3 * GIB), (4 * GIB, 5 * 1024 * GIB)), "5123 GB", "5123 GB", "0x00000500FFFFFFFFk"),
    ],
)
def test_memory_of_every_size(
    tmp_path: Path, memory: tuple[tuple[int, int], ...], size: str, capacity: str, end: str
) -> None:
    """Small ones count in KiB or MiB, large ones in the fields that were added for them."""
    found = decoded(machine(memory), tmp_path)
    assert found["Memory Device"]["Size"] == size
    assert found["Physical Memory Array"]["Maximum Capacity"] == capacity
    assert found["Memory Array Mapped Address"]["Ending Address"] == end


@pytest.mark.parametrize(("cores", "enabled"), [(1, 1), (255, 1), (255, 255)])
def test_processors(tmp_path: Path, cores: int, enabled: int) -> None:
    processor = decoded(machine(cores=cores, enabled=enabled), tmp_path)["Processor Information"]
    assert processor["Core Count"] == processor["Thread Count"] == str(cores)
    assert processor["Core Enabled"] == str(enabled)


def test_checksums_and_sizes() -> None:
    table = smbios.build(machine(), BASE)
    assert sum(table[:0x1F]) & 0xFF == 0 and sum(table[0x10:0x1F]) & 0xFF == 0
    assert sum(table[0x20:0x38]) & 0xFF == 0
    (largest,) = struct.unpack_from("<H", table, 8)
    length, address, count = struct.unpack_from("<HIH", table, 0x16)
    assert address == BASE + 0x40 and length == len(table) - 0x40
    at, lengths = 0x40, []
    while at < len(table):
        end = table.index(b"\0\0", at + table[at + 1]) + 2
        lengths.append(end - at)
        at = end
    assert len(lengths) == count and max(lengths) == largest


@pytest.mark.parametrize("bad", ["", "x" * 65, "tab\there", "Bienenkorb \N{HONEYBEE}"])
def test_a_label_that_no_table_takes_is_one_line(bad: str) -> None:
    tree = Tree({"system.sku": bad}).freeze()
    with pytest.raises(UserError, match=r"system\.sku: .* printable"):
        view(tree.node("system"), smbios.SystemStrings)


def test_the_default_uuid_follows_the_name() -> None:
    assert smbios.default_uuid("a") == smbios.default_uuid("a") != smbios.default_uuid("b")
    assert UUID(smbios.default_uuid("a")) == uuid3(UUID(smbios._NAMESPACE), f"a@{os.uname().nodename}")
