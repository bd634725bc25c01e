"""The PVH boot ABI: what lands where, a guest that starts by it, and one line for each file that cannot."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.boot import pvh
from skep.boot.e820 import E820, RangeType
from skep.boot.elf import ElfFile
from skep.boot.files import BootFile
from skep.boot.image import open_image
from skep.errors import UserError
from skep.memory import GuestMemory
from skep.vm import End, Vm
from tests.boot.elf import CODE, LOAD, MiB, note, vmlinux
from tests.engine.engines import need

MAP = [E820(0, 0x9FC00, RangeType.RAM), E820(MiB, 63 * MiB, RangeType.RAM), E820(1 << 32, MiB, RangeType.RESERVED)]


@pytest.mark.parametrize("wide", [True, False])
def test_everything_is_where_the_abi_wants_it(tmp_path: Path, wide: bool) -> None:
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(vmlinux(wide=wide))
    initrd.write_bytes(b"cpio!" * 1000)
    memory = GuestMemory(64 * MiB)
    image = open_image(kernel, initrd, "console=ttyS0 quiet")
    state = image.load(memory, MAP, 0xE0000)
    assert memory.read(LOAD, len(CODE)) == CODE
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = struct.unpack(
        "<IIIIQQQQII", memory.read(state["rbx"], 56)
    )
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert memory.read(cmdline, 20) == b"console=ttyS0 quiet\0" and rsdp == 0xE0000
    assert modules == 1
    start, size, *rest = struct.unpack("<4Q", memory.read(modlist, 32))
    assert (size, rest) == (5000, [0, 0]) and memory.read(start, size) == initrd.read_bytes() and start % 4096 == 0
    assert entries == len(MAP)
    found = [struct.unpack("<QQII", memory.read(memmap + 24 * i, 24)) for i in range(entries)]
    assert found == [(*entry, 0) for entry in MAP]
    memory.clear()
    assert image.load(memory, MAP, 0xE0000) == state
    image.close()
    memory.close()


def test_the_processor_starts_as_the_abi_says(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(vmlinux(entry=LOAD + 4))
    memory = GuestMemory(64 * MiB)
    image = open_image(kernel)
    state = image.load(memory, MAP, 0)
    assert memory.load_u32(state["rbx"] + 12) == 0 and memory.load_u64(state["rbx"] + 16) == 0, "no module"
    assert state["rip"] == LOAD + 4 and state["rflags"] == 2
    assert state["cr0"] & ~0x10 == 1, "PE alone; ET is no writable bit"
    for name, attributes in (("cs", 0xC09B), ("ds", 0xC093), ("es", 0xC093), ("ss", 0xC093)):
        segment = state[name]  # type: ignore[literal-required]
        assert (segment["base"], segment["limit"]) == (0, 0xFFFFFFFF)
        descriptor = memory.load_u64(state["gdtr"]["base"] + segment["selector"])
        assert segment["attributes"] == descriptor >> 40 & 0xF0FF == attributes
    assert (state["tr"]["base"], state["tr"]["limit"]) == (pvh.TSS, 0x67)
    descriptor = memory.load_u64(state["gdtr"]["base"] + state["tr"]["selector"])
    assert state["tr"]["attributes"] == descriptor >> 40 & 0xF0FF
    assert descriptor >> 16 & 0xFFFFFF == state["tr"]["base"] and descriptor & 0xFFFF == state["tr"]["limit"]
    image.close()
    memory.close()


@pytest.mark.parametrize("engine", ["translate", "kvm"])
def test_a_guest_starts_and_finds_its_command_line(tmp_path: Path, engine: str) -> None:
    need(engine)
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(vmlinux())
    with Vm(kernel=kernel, memory="64M", cmdline="hello, PVH", engine=engine) as vm:
        vm.start()
        vm.console.expect("hello, PVH", timeout=20)
        outcome = vm.wait(20)
    assert outcome is not None and outcome.end is End.POWERED_OFF


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x7fELF", "not an ELF file for x86"),
        (b"\x7fELF\x02\x02" + bytes(100), "not an ELF file for x86"),
        (vmlinux()[:40], "truncated"),
        (vmlinux()[:100], "truncated"),
        (vmlinux()[:-1], "truncated"),
        (vmlinux(machine=183), r"another machine \(183\)"),
        (vmlinux(entry=None), "without a PVH entry"),
        (vmlinux(entry=None, notes=note(b"Xen", 18, b"abc")), "without a PVH entry"),
        (vmlinux(entry=None, notes=note(b"GNU", 18, bytes(8))), "without a PVH entry"),
        (vmlinux(entry=LOAD + len(CODE)), "outside the kernel"),
        (vmlinux(load=0x8000, entry=0x8000), "loaded at 0x8000"),
        (vmlinux(load=1 << 32, entry=1 << 32), "loaded at 0x100000000"),
        (vmlinux(memsz=1), "larger in the file"),
    ],
)
def test_a_file_that_is_no_kernel_is_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        open_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux(memsz=8 * MiB))
    image = open_image(path)
    memory = GuestMemory(20 * MiB)
    with pytest.raises(UserError, match="needs 24 MiB of memory, the guest has 20"):
        image.load(memory, MAP, 0)
    image.close()
    memory.close()
    with pytest.raises(UserError, match="takes 65535"):
        open_image(path, cmdline="x" * 65536)


@given(st.data())
def test_headers_with_random_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    image = bytearray(vmlinux(wide=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(4, len(image) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("elf") / "file"
    path.write_bytes(image)
    file = BootFile(path, "kernel")
    try:
        elf = ElfFile(file)
        list(elf.notes())
        first, end = elf.extent()
        assert first <= end
    except UserError:
        pass
    finally:
        file.close()
