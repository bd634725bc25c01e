"""The 64-bit boot protocol: what lands where, and one line for each file that is no kernel."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from skep.boot.e820 import E820, RangeType
from skep.boot.image import open_image
from skep.boot.linux import BOOT_CS, BOOT_DS, CMDLINE, PAGE_TABLES
from skep.errors import UserError
from skep.memory import GuestMemory
from tests.boot.bzimage import CODE, LOAD, MiB, bzimage


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    return path


MAP = [E820(0, 0x9FC00, RangeType.RAM), E820(MiB, 63 * MiB, RangeType.RAM)]


def test_everything_is_where_the_protocol_wants_it(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"cpio!" * 1000)
    memory = GuestMemory(64 * MiB)
    state = open_image(kernel, initrd, "console=ttyS0 quiet").load(memory, MAP, 0xE0000)
    assert memory.read(LOAD, len(CODE)) == CODE
    assert state["rip"] == LOAD + 0x200
    zero_page = memory.read(state["rsi"], 4096)
    assert zero_page[0x1F1:0x268] == kernel.read_bytes()[0x1F1:0x210] + b"\xff" + kernel.read_bytes()[0x211:0x218] + (
        zero_page[0x218:0x220]
    ) + kernel.read_bytes()[0x220:0x228] + zero_page[0x228:0x22C] + kernel.read_bytes()[0x22C:0x268]
    image, size = struct.unpack_from("<II", zero_page, 0x218)
    assert size == 5000 and image % 4096 == 0 and image + size <= 64 * MiB and image > 64 * MiB - 3 * 4096
    assert memory.read(image, size) == initrd.read_bytes()
    (cmdline,) = struct.unpack_from("<I", zero_page, 0x228)
    assert cmdline == CMDLINE and memory.read(cmdline, 20) == b"console=ttyS0 quiet\0"
    assert struct.unpack_from("<Q", zero_page, 0x70) == (0xE0000,)
    assert zero_page[0x1E8] == 2
    assert [struct.unpack_from("<QQI", zero_page, 0x2D0 + 20 * i) for i in range(2)] == MAP
    assert zero_page[0x1EF] == 0  # sentinel: the zero page was cleared
    memory.close()


def test_the_cpu_starts_in_long_mode_with_identity_paging(kernel: Path) -> None:
    memory = GuestMemory(64 * MiB)
    state = open_image(kernel).load(memory, MAP, 0)

    def walk(va: int) -> int:
        table = state["cr3"]
        for shift in (39, 30, 21):
            entry = memory.load_u64(table + (va >> shift & 511) * 8)
            assert entry & 3 == 3, hex(va)
            if entry & 0x80:
                return (entry & ~0x1FFFFF) | va & 0x1FFFFF
            table = entry & ~0xFFF
        raise AssertionError("no large page")

    for va in (0, 0x1FFFFF, 0x200000, LOAD + 5, (1 << 30) - 1, 3 << 30, (4 << 30) - 1):
        assert walk(va) == va
    assert memory.load_u64(PAGE_TABLES + 8) == 0 and memory.load_u64(PAGE_TABLES + 0x1000 + 4 * 8) == 0
    assert state["cr0"] & 0x80000001 == 0x80000001 and state["cr4"] & 0x20 and state["efer"] & 0x500 == 0x500
    assert state["rflags"] == 2
    for name, selector in (("cs", BOOT_CS), ("ds", BOOT_DS), ("es", BOOT_DS), ("ss", BOOT_DS)):
        segment = state[name]  # type: ignore[literal-required]
        assert segment["selector"] == selector
        descriptor = memory.load_u64(state["gdtr"]["base"] + selector)
        attributes = descriptor >> 40 & 0xF0FF
        assert segment["attributes"] == attributes, name
        assert segment["base"] == 0 and segment["limit"] == 0xFFFFFFFF
    assert selector + 7 <= state["gdtr"]["limit"]
    memory.close()


def test_nothing_overlaps(kernel: Path) -> None:
    """The parts in low memory, as addresses: each ends before the next begins, all below the EBDA."""
    from skep.boot import linux

    parts = [
        (linux.GDT, 32),
        (linux.ZERO_PAGE, 4096),
        (linux.PAGE_TABLES, 6 * 4096),
        (linux.CMDLINE, linux.CMDLINE_MAX),
    ]
    ends = [start + size for start, size in parts]
    assert all(end <= start for end, (start, _) in zip(ends, parts[1:], strict=False)) and ends[-1] <= 0x9FC00


def test_loading_again_after_a_reset_gives_the_same(kernel: Path) -> None:
    memory = GuestMemory(64 * MiB)
    image = open_image(kernel, None, "x")
    state = image.load(memory, MAP, 0)
    before = memory.read(0, 64 * MiB)
    kernel.unlink()
    memory.clear()
    assert image.load(memory, MAP, 0) == state
    assert memory.read(0, 64 * MiB) == before
    memory.close()


def test_the_initrd_stays_below_what_the_kernel_can_reach(tmp_path: Path) -> None:
    kernel = tmp_path / "k"
    kernel.write_bytes(bzimage(initrd_max=40 * MiB - 1))
    initrd = tmp_path / "i"
    initrd.write_bytes(b"i" * 4097)
    memory = GuestMemory(64 * MiB)
    state = open_image(kernel, initrd).load(memory, MAP, 0)
    assert memory.load_u32(state["rsi"] + 0x218) == 40 * MiB - 8192
    memory.close()


def test_setup_sects_0_means_4(tmp_path: Path) -> None:
    kernel = tmp_path / "k"
    kernel.write_bytes(bzimage(setup_sects=0))
    memory = GuestMemory(64 * MiB)
    open_image(kernel).load(memory, MAP, 0)
    assert memory.read(LOAD, len(CODE)) == CODE
    memory.close()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"MZ" + bytes(2000), "not a Linux kernel"),
        (bzimage()[:0x267], "not a Linux kernel"),
        (bzimage()[:-16], "truncated"),
        (bzimage(syssize=1 << 20), "truncated"),
        (bzimage(version=0x20B), "2.11 is too old"),
        (bzimage(xloadflags=0x7E), "no 64-bit entry"),
        (bzimage(pref_address=1 << 40), "loaded at"),
        (bzimage(pref_address=0), "loaded at"),
    ],
)
def test_a_file_that_is_no_kernel_is_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        open_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path, kernel: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_image(tmp_path / "missing")
    with pytest.raises(UserError, match="directory"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_image(kernel, tmp_path / "missing")
    with pytest.raises(UserError, match="cannot read the kernel"):
        open_image("a\0b")
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(UserError, match="initrd is empty"):
        open_image(kernel, empty)


def test_what_does_not_fit_into_memory(tmp_path: Path, kernel: Path) -> None:
    memory = GuestMemory(20 * MiB - 4096)
    with pytest.raises(UserError, match="needs 20 MiB of memory, the guest has 19"):
        open_image(kernel).load(memory, MAP, 0)
    memory.close()
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(45 * MiB))
    memory = GuestMemory(64 * MiB)
    with pytest.raises(UserError, match="initrd has 45 MiB and does not fit into 64 MiB"):
        open_image(kernel, initrd).load(memory, MAP, 0)
    memory.close()


def test_command_lines(kernel: Path) -> None:
    open_image(kernel, None, "x" * 2047)
    for bad, says in (("x" * 2048, "takes 2047"), ("a\0b", "NUL"), ("\ud800", "not text")):
        with pytest.raises(UserError, match=says):
            open_image(kernel, None, bad)
