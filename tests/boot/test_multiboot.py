"""The Multiboot Specification: what lands where, guests that start by it, and one line for each file that cannot."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.boot.e820 import E820, RangeType
from skep.boot.image import open_multiboot
from skep.boot.multiboot import OURS
from skep.errors import UserError
from skep.memory import GuestMemory
from skep.vm import End, Vm
from tests.boot.elf import vmlinux
from tests.engine.gas import gas

MiB = 1 << 20
LOAD = 4 * MiB
MAP = [E820(0, 0x9FC00, RangeType.RAM), E820(MiB, 63 * MiB, RangeType.RAM), E820(1 << 32, MiB, RangeType.RESERVED)]

# Prints the string of its module, then the module, on COM1, and leaves by the test device with status 21.
CODE = bytes.fromhex(
    "3d 02b0ad2b"  #     cmp eax, LOADER_MAGIC
    "75 fe"  #           jne $
    "8b 5b 18"  #        mov ebx, [ebx + mods_addr]
    "ba f8030000"  #     mov edx, 0x3f8
    "8b 73 08"  #        mov esi, [ebx + string]
    "ac 84 c0 74 03"  #  lodsb; test al, al; jz over
    "ee eb f8"  #        out dx, al; jmp lodsb
    "8b 33"  #           mov esi, [ebx]
    "8b 4b 04 29 f1"  #  mov ecx, [ebx + end]; sub ecx, esi
    "f3 6e"  #           rep outsb
    "b0 0a e6 f4"  #     mov al, 10; out 0xf4, al
    "f4 eb fd"  #        hlt for ever
)

# In real mode, waits for two interrupts of the timer, looks at the 8259s' masks, leaves with status 2 * 21 + 1.
REAL = """
.code32
    lgdt [table]
    ljmp 0x08, offset narrow
.code16
narrow:
    mov ax, 0x10
    mov ss, ax
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    ljmp 0, offset real
real:
    xor ax, ax
    mov ss, ax
    mov ds, ax
    mov sp, 0x7000
    sti
    hlt
    hlt
    int 0x70
    in al, 0x21
    mov ah, al
    in al, 0xa1
    cmp ax, 0xfaff
    jne wrong
    mov al, 21
wrong:
    out 0xf4, al
    hlt
.balign 8
gdt: .quad 0, 0x00009b000000ffff, 0x000093000000ffff
table: .word 23
    .long gdt
.balign 4
"""


def header(flags: int = 0, *fields: int) -> bytes:
    return struct.pack("<3I", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(fields)}I", *fields
    )


def kernel(code: bytes = CODE, load: int = LOAD, flags: int = 0) -> bytes:
    """An ELF file whose header stands behind its code."""
    return vmlinux(wide=False, code=code.ljust(64, b"\x90") + header(flags), load=load, memsz=4096, entry=None)


def flat(code: bytes = CODE, load: int = LOAD) -> bytes:
    """No ELF file: the header says where it belongs. Something that is not loaded stands before it."""
    body = header(1 << 16, load + 8, load, load + 8 + 32 + len(code), load + MiB, load + 8 + 32)
    return b"#!" + bytes(14) + bytes(8) + body + code + b"not loaded"


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "environment"
    path.write_bytes(b"A=1\nB=two\n")
    return path


def test_everything_is_where_the_specification_wants_it(tmp_path: Path, module: Path) -> None:
    path = tmp_path / "test.flat"
    path.write_bytes(kernel())
    memory = GuestMemory(64 * MiB)
    image = open_multiboot(path, module, "one two")
    state = image.load(memory, MAP, 0xE0000)
    assert memory.read(LOAD, len(CODE)) == CODE
    assert (state["rip"], state["rax"], state["cr0"] & 1) == (LOAD, 0x2BADB002, 1)
    for name, attributes in (("cs", 0xC09B), ("ds", 0xC093), ("ss", 0xC093), ("gs", 0xC093)):
        segment = state[name]  # type: ignore[literal-required]
        assert (segment["base"], segment["limit"], segment["attributes"]) == (0, 0xFFFFFFFF, attributes)
    info = struct.unpack("<16I", memory.read(state["rbx"], 64))
    flags, lower, upper, _, cmdline, modules, modules_at = info[:7]
    assert flags == 0x24D and (lower, upper) == (640, 63 * 1024)
    assert memory.read(cmdline, 200).split(b"\0")[0] == f"{path} one two".encode()
    assert modules == 1
    start, end, string, _ = struct.unpack("<4I", memory.read(modules_at, 16))
    assert start % 4096 == 0 and memory.read(start, end - start) == module.read_bytes()
    assert memory.read(string, 200).split(b"\0")[0] == str(module).encode()
    length, at = info[11:13]
    found = []
    while length:
        size, *entry = struct.unpack("<IQQI", memory.read(at, 24))
        found.append(tuple(entry))
        at, length = at + size + 4, length - size - 4
    assert found == [tuple(entry) for entry in MAP]
    memory.clear()
    assert image.load(memory, MAP, 0xE0000) == state
    image.close()
    memory.close()


@pytest.mark.parametrize(
    "data", [kernel(), flat(), kernel(load=0x8000), kernel(flags=3)], ids=["elf", "flat", "low", "flags"]
)
def test_a_guest_starts_finds_its_module_and_ends_with_a_status_of_its_own(
    tmp_path: Path, module: Path, data: bytes
) -> None:
    path = tmp_path / "test.flat"
    path.write_bytes(data)
    config = {"boot.multiboot": str(path), "boot.initrd": str(module), "lpc.pc-testdev": "on"}
    with Vm(memory="64M", config=config) as vm:
        vm.start()
        vm.console.expect(f"{module}A=1\nB=two\n", timeout=20)
        outcome = vm.wait(20)
    assert outcome is not None and outcome.end is End.LEFT and outcome.exit_status == 21


def test_interrupts_are_as_a_bios_leaves_them(tmp_path: Path) -> None:
    """Multiboot 3.2; with the timer's default rate this takes a tenth of a second."""
    path = tmp_path / "test.flat"
    path.write_bytes(kernel(gas(REAL, 0x8000).code, load=0x8000))
    with Vm(memory="64M", config={"boot.multiboot": str(path), "lpc.pc-testdev": "on"}) as vm:
        vm.start()
        outcome = vm.wait(20)
    assert outcome is not None and outcome.end is End.LEFT and outcome.exit_status == 2 * 21 + 1


def test_the_command_line_ends_with_that_status(tmp_path: Path, module: Path) -> None:
    path = tmp_path / "test.flat"
    path.write_bytes(kernel())
    words = ["run", "--multiboot", str(path), "--initrd", str(module), "-o", "lpc.pc-testdev=on", "-o", "control=off"]
    command = [sys.executable, "-m", "skep.cli", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (21, f"{module}A=1\nB=two\n")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"MZ" * 100, "not a Multiboot kernel"),
        (bytes(8192) + kernel(), "not a Multiboot kernel"),
        (bytes(2) + header() + bytes(100), "not a Multiboot kernel"),
        (bytes(4) + header() + bytes(100), "does not say where it is loaded"),
        (kernel(flags=4), "flags 0x4"),
        (kernel(flags=1 << 16), "does not say where it is loaded"),
        (kernel(load=OURS - 64), "loaded at 0x8ffc0"),
        (kernel(load=0xF0000), "loaded at 0xf0000"),
        (flat(load=0xF8000), "loaded at"),
        (flat()[:60], "outside the file"),
    ],
)
def test_a_file_that_is_no_kernel_is_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        open_multiboot(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit(tmp_path: Path) -> None:
    path, module = tmp_path / "kernel", tmp_path / "module"
    path.write_bytes(kernel())
    module.write_bytes(bytes(8 * MiB))
    memory = GuestMemory(12 * MiB)
    for initrd, needs in ((None, None), (module, 13)):
        image = open_multiboot(path, initrd)
        if needs is None:
            image.load(memory, MAP, 0)
        else:
            with pytest.raises(UserError, match=f"needs {needs} MiB of memory, the guest has 12"):
                image.load(memory, MAP, 0)
        image.close()
    memory.close()
    with pytest.raises(UserError, match="command line has"):
        open_multiboot(path, cmdline="x" * 20000)
    with pytest.raises(UserError, match="two kernels"):
        Vm(kernel=path, config={"boot.multiboot": str(path)})


@given(st.data())
def test_headers_with_random_bytes_are_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    image = bytearray(data.draw(st.sampled_from((kernel(), flat()))))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("multiboot") / "file"
    path.write_bytes(image)
    memory = GuestMemory(16 * MiB)
    try:
        loaded = open_multiboot(path)
        try:
            loaded.load(memory, MAP, 0)
        finally:
            loaded.close()
    except UserError:
        pass
    finally:
        memory.close()
