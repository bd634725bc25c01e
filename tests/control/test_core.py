"""The ELF core's form, which gdb and crash count on. (gdb itself reads one in tests/cli/test_ctl.py.)"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from skep.control.core import write_core
from skep.errors import UserError
from skep.memory import GuestMemory

PROCESSORS = [
    {
        "rip": 0x1000 + number,
        "rsp": 0x2000,
        "cr3": 0x8000,
        "cs": {"selector": 0x10, "base": 0, "limit": 0xFFFF_FFFF, "attributes": 0xA09B},
        "fs": {"selector": 0, "base": 0x1234_5678_9ABC, "limit": 0, "attributes": 0},
        "idtr": {"base": 0xFFFF_FE00_0000_0000, "limit": 0xFFF},
        "msrs": {0xC000_0102: 0xFFFF_8880_0000_0000 + number},
    }
    for number in range(2)
]


def parse(path: Path) -> tuple[list[tuple[int, ...]], list[tuple[bytes, int, bytes]]]:
    """The program headers and the notes."""
    data = path.read_bytes()
    assert data[:7] == b"\x7fELF\2\1\1"
    kind, machine, version, _, at = struct.unpack_from("<HHIQQ", data, 16)
    size, count = struct.unpack_from("<HH", data, 54)
    assert (kind, machine, version, size) == (4, 62, 1, 56)
    headers = [struct.unpack_from("<IIQQQQQQ", data, at + size * number) for number in range(count)]
    place, end = headers[0][2], headers[0][2] + headers[0][5]
    notes = []
    while place < end:
        name_size, size, kind = struct.unpack_from("<III", data, place)
        name = data[place + 12 : place + 12 + name_size]
        place += 12 + -(-name_size // 4) * 4
        notes.append((name, kind, data[place : place + size]))
        place += -(-size // 4) * 4
    return headers, notes


def test_memory_and_registers(tmp_path: Path) -> None:
    memory = GuestMemory(3 << 20, low_limit=1 << 20, high_base=4 << 30)
    try:
        memory.write(0x1000, b"low")
        memory.write((4 << 30) + 0x10_0000, b"high")
        length = write_core(tmp_path / "core", memory, PROCESSORS)
    finally:
        memory.close()
    path = tmp_path / "core"
    assert path.stat().st_size == length
    assert path.stat().st_blocks * 512 < 64 << 10, "what was never touched is a hole"
    headers, notes = parse(path)
    assert headers[0][0] == 4 and [header[0] for header in headers[1:]] == [1, 1]
    assert [header[3:5] for header in headers[1:]] == [(0, 0), (4 << 30, 4 << 30)]
    assert [header[5:7] for header in headers[1:]] == [(1 << 20, 1 << 20), (2 << 20, 2 << 20)]
    assert {header[7] for header in headers[1:]} == {0}, "with another p_align, crash would take it for a netdump's"
    with path.open("rb") as file:
        for header, offset, text in ((headers[1], 0x1000, b"low"), (headers[2], 0x10_0000, b"high")):
            file.seek(header[2] + offset)
            assert file.read(len(text)) == text
    # All of one kind, then all of the other, as QEMU has them.
    assert [(name, kind, len(data)) for name, kind, data in notes] == [
        *[(b"CORE\0", 1, 336)] * 2,
        *[(b"QEMU\0", 0, 440)] * 2,
    ]
    for number in range(2):
        status, qemu = notes[number][2], notes[2 + number][2]
        registers = struct.unpack_from("<27Q", status, 112)
        assert struct.unpack_from("<I", status, 32) == (number + 1,)
        assert (registers[16], registers[17], registers[19], registers[21]) == (
            0x1000 + number, 0x10, 0x2000, 0x1234_5678_9ABC,
        )  # fmt: skip
        assert struct.unpack_from("<II", qemu) == (1, 440)
        assert struct.unpack_from("<QQ", qemu, 8 + 16 * 8) == (0x1000 + number, 0)
        assert struct.unpack_from("<IIIIQ", qemu, 152) == (0x10, 0xFFFF_FFFF, 0xA09B00, 0, 0)
        assert struct.unpack_from("<IIIIQ", qemu, 152 + 9 * 24) == (0, 0xFFF, 0, 0, 0xFFFF_FE00_0000_0000)
        assert struct.unpack_from("<5QQ", qemu, 152 + 240)[3:] == (0x8000, 0, 0xFFFF_8880_0000_0000 + number)


@pytest.mark.parametrize("name", ["x" * 300, "absent/core", ".", "a\0b"])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    memory = GuestMemory(1 << 20)
    before = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(UserError):
            write_core(tmp_path / name, memory, PROCESSORS)
    finally:
        memory.close()
    assert list(tmp_path.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == before - 1
