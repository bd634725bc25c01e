"""The ACPI tables, judged by iasl, and what they say judged field by field."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.firmware import acpi, aml

BASE = 0xE0000


def platform(cpus: int = 2, possible: int | None = None) -> acpi.Platform:
    return acpi.Platform(
        cpus=cpus,
        possible_cpus=possible or cpus,
        lapic=0xFEE00000,
        ioapic=0xFEC00000,
        ioapic_id=0,
        sci=9,
        overrides=((0, 2),),
        pm1a_event=0x600,
        pm1a_control=0x604,
        pm_timer=0x608,
        pm_timer_32bit=True,
        gpe0=0x60C,
        gpe0_size=4,
        reset_port=0xCF9,
        reset_value=6,
        s3_sleep_type=1,
        s5_sleep_type=5,
        century=0x32,
        keyboard=acpi.Keyboard((0x60, 0x64), 1),
        serial=(acpi.Serial(1, 0x3F8, 4), acpi.Serial(3, 0x3E8, 4)),
        hpet=acpi.Hpet(0xFED00000, 0x400, 0x8086A201, 5000),
        generation=acpi.Generation(0x1_000F_F000, 3),
        pci=acpi.Pci(
            ecam=0xE0000000,
            last_bus=255,
            memory=(0xC0000000, 0xDFFFFFFF),
            ports=((0, 0xCF7), (0xD00, 0xFFFF)),
            routing=tuple((slot, pin, 16 + (slot + pin) % 8) for slot in range(32) for pin in range(4)),
        ),
    )


def walk(tables: acpi.Tables) -> dict[str, bytes]:
    """Every table, found as an operating system finds it; checks signatures, lengths and checksums."""

    def at(address: int) -> bytes:
        offset = address - BASE
        (length,) = struct.unpack_from("<I", tables.data, offset + 4)
        return tables.data[offset : offset + length]

    rsdp = tables.data[tables.rsdp - BASE :][:36]
    assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2 and sum(rsdp[:20]) & 0xFF == 0 and sum(rsdp) & 0xFF == 0
    assert tables.rsdp % 16 == 0
    found = {}
    xsdt = at(struct.unpack_from("<Q", rsdp, 24)[0])
    found["XSDT"] = xsdt
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        found[at(address)[:4].decode()] = at(address)
    fadt = found["FACP"]
    assert struct.unpack_from("<I", fadt, 40)[0] == struct.unpack_from("<Q", fadt, 140)[0]
    found["DSDT"] = at(struct.unpack_from("<Q", fadt, 140)[0])
    (facs,) = struct.unpack_from("<Q", fadt, 132)
    assert facs % 64 == 0
    found["FACS"] = at(facs)
    for name, table in found.items():
        assert table[:4].decode() == name
        if name != "FACS":
            assert sum(table) & 0xFF == 0, name
    return found


def processors(madt: bytes) -> list[tuple[int, int, int]]:
    """(UID, APIC identifier, flags) of every processor."""
    found = []
    entries = madt[44:]
    while entries:
        if entries[0] == 0:
            found.append((entries[2], entries[3], entries[4]))
        elif entries[0] == 9:
            apic_id, flags, uid = struct.unpack_from("<III", entries, 4)
            assert apic_id >= 255, "smaller ones have the other entry (5.2.12.12)"
            found.append((uid, apic_id, flags))
        entries = entries[entries[1] :]
    return found


@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_tables_are_found_and_whole(cpus: int) -> None:
    found = walk(acpi.build(platform(cpus), BASE, 0x10000))
    assert set(found) == {"XSDT", "FACP", "APIC", "MCFG", "HPET", "DSDT", "FACS"}
    assert len(found["FACP"]) == 276 and len(found["FACS"]) == 64
    assert processors(found["APIC"]) == [(i, i, 1) for i in range(cpus)]


def test_processors_that_could_be_there_are_told() -> None:
    """Enabled those that are, online capable the others; beyond 254 as local x2APICs, with an NMI entry of theirs."""
    madt = acpi.madt(platform(3, 300))
    assert processors(madt) == [(i, i, 1 if i < 3 else 2) for i in range(300)]
    assert b"\x0a\x0c\0\0\xff\xff\xff\xff\x01\0\0\0" in madt
    assert b"\x0a\x0c\0\0\xff" not in acpi.madt(platform(3, 255))


def test_too_little_room_is_said() -> None:
    with pytest.raises(ValueError, match="of 4096"):
        acpi.build(platform(255), BASE, 4096)


@pytest.mark.parametrize(("cpus", "possible"), [(1, 1), (2, 255), (300, 300)])
def test_iasl_accepts_the_tables_and_compiles_them_back(cpus: int, possible: int, tmp_path: Path) -> None:
    iasl = shutil.which("iasl")
    assert iasl, "iasl comes with acpica-tools"
    for name, table in walk(acpi.build(platform(cpus, possible), BASE, 0x10000)).items():
        path = tmp_path / f"{name.lower()}.dat"
        path.write_bytes(table)
        down = subprocess.run([iasl, "-d", path], capture_output=True, text=True, timeout=60, check=False)
        assert down.returncode == 0, down.stderr
        assert not re.search(r"(?i)error|warning|invalid|incorrect", down.stdout + down.stderr), down.stdout
        if name == "XSDT":  # the table compiler takes addresses of tables it does not have for errors
            continue
        source = path.with_suffix(".dsl")
        compile_ = [iasl, "-ve", "-p", tmp_path / "again", source]
        up = subprocess.run(compile_, capture_output=True, text=True, timeout=60, check=False)
        assert up.returncode == 0 and "0 Errors" in up.stdout + up.stderr, up.stdout + up.stderr
        again = (tmp_path / "again.aml").read_bytes()
        creator = slice(28, 36)  # the compiler puts its own name and checksum
        assert len(again) == len(table)
        if name != "FACS":
            assert again[36:] == table[36:], name
            assert again[:9] == table[:9] and again[10:28] == table[10:28] and again[creator] != table[creator]


def test_the_dsdt_says_what_the_platform_said(tmp_path: Path) -> None:
    dsdt = tmp_path / "dsdt.dat"
    dsdt.write_bytes(acpi.dsdt(platform(1)))
    subprocess.run(["iasl", "-d", dsdt], capture_output=True, timeout=60, check=True)
    text = re.sub(r"\s+", " ", re.sub(r"//.*", "", (tmp_path / "dsdt.dsl").read_text()))
    for expected in (
        'Name (_HID, EisaId ("PNP0A08")',
        'Name (_HID, EisaId ("PNP0501")',
        'Name (_HID, EisaId ("PNP0B00")',
        'Name (_CID, "VM_Gen_Counter") Name (_DDN, "VM_Gen_Counter")',
        "Name (ADDR, Package (0x02) { 0x000FF000, One })",
        r"Method (_E03, 0, Serialized) { Notify (\_SB.GENC, 0x80) }",
        'If ((Arg0 == ToUUID ("33db4d5b-1ff7-401c-9657-7441c03dd766")',
        "Local0 = (CDW3 & 0x3D) If ((CDW3 != Local0)) { CDW1 |= 0x10 }",
        'Name (_HID, EisaId ("PNP0103")',
        'Device (KBD) { Name (_HID, EisaId ("PNP0303")',
        "IO (Decode16, 0x0064, 0x0064, 0x01, 0x01, ) IRQNoFlags () {1}",
        'Name (_HID, "ACPI0007"',
        "Name (_S3, Package (0x04) { One, One, Zero, Zero })",
        "Name (_S5, Package (0x04) { 0x05, 0x05, Zero, Zero })",
        "IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, ) IRQNoFlags () {4}",
        'Device (COM3) { Name (_HID, EisaId ("PNP0501")',
        "0xC0000000, 0xDFFFFFFF, 0x00000000, 0x20000000",
        "0x0000, 0x00FF, 0x0000, 0x0100",
        "Package (0x04) { 0x001FFFFF, 0x03, Zero, 0x12 }",
        "Memory32Fixed (ReadWrite, 0xE0000000, 0x10000000, )",
    ):
        assert expected in text, expected


def test_the_fadt_says_what_the_platform_said(tmp_path: Path) -> None:
    path = tmp_path / "facp.dat"
    path.write_bytes(acpi.fadt(platform(), 0x1000, 0x2000))
    subprocess.run(["iasl", "-d", path], capture_output=True, timeout=60, check=True)
    lines = [re.sub(r"^\[.*?\]\s*", "", line) for line in (tmp_path / "facp.dsl").read_text().splitlines()]
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    for key, value in {
        "SCI Interrupt": "0009",
        "PM1A Event Block Address": "00000600",
        "PM1A Control Block Address": "00000604",
        "PM Timer Block Address": "00000608",
        "GPE0 Block Address": "0000060C",
        "GPE0 Block Length": "04",
        "SMI Command Port": "00000000",
        "RTC Century Index": "32",
        "8042 Present on ports 60/64 (V2)": "1",
        "VGA Not Present (V4)": "1",
        "CMOS RTC Not Present (V5)": "0",
        "Control Method Power Button (V1)": "0",
        "RTC wake not in fixed reg space (V1)": "0",
        "32-bit PM Timer (V1)": "1",
        "Reset Register Supported (V2)": "1",
        "Hardware Reduced (V5)": "0",
        "Value to cause reset": "06",
    }.items():
        assert said[key] == value, (key, said.get(key))


@given(st.integers(0, (1 << 28) - 8))
def test_pkg_length_counts_itself(size: int) -> None:
    encoded = aml.pkg_length(size)
    more = encoded[0] >> 6
    assert len(encoded) == 1 + more
    total = encoded[0] & 0x3F if not more else encoded[0] & 0xF | int.from_bytes(encoded[1:], "little") << 4
    assert total == size + len(encoded)


def test_pkg_length_has_a_limit() -> None:
    with pytest.raises(ValueError):
        aml.pkg_length(1 << 28)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("COM1", b"COM1"),
        ("\\_SB", b"\\_SB_"),
        ("^RTC", b"^RTC_"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
        ("\\", b"\\\x00"),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


def test_eisa_ids() -> None:
    assert aml.eisa_id("PNP0A08") == bytes.fromhex("0c41d00a08")
