"""What lies over RAM and beside it, changed while the guest runs: each engine follows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import pytest

from skep.memory import PAGE, Overlay, Rights
from tests.engine.engines import NAMES, Machines, named
from tests.engine.tiny import PROGRAM, RAM, Tiny

HOLE, OVER_RAM = 0x2000000, 0x800000
"""Places for a window: where nothing is, and where RAM is."""
Boot = Callable[..., Tiny]


@pytest.fixture(params=NAMES)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """A guest with a window at W; behind its two pages they are seen once more, the second first."""
    with closing(Machines(named(request.param))) as machines:

        def make(text: str, window: int = HOLE, cpus: int = 1, overlays: Sequence[Overlay] = ()) -> Tiny:
            guest = machines(text, symbols={"W": window}, reach=HOLE + 4 * PAGE, cpus=cpus, overlays=overlays)
            for page, frame in enumerate((0, 1, 1, 0)):
                guest.map(window + page * PAGE, window + frame * PAGE)
            return guest

        yield make


@pytest.fixture
def backing() -> Iterator[Callable[[bytes], int]]:
    """Files for overlays, of two pages, that begin with some bytes."""
    files: list[int] = []

    def make(data: bytes) -> int:
        files.append(os.memfd_create("test", os.MFD_CLOEXEC))
        os.pwrite(files[-1], data.ljust(2 * PAGE, b"\0"), 0)
        return files[-1]

    yield make
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize("where", [HOLE, OVER_RAM])
def test_rom_is_read_and_not_written(boot: Boot, backing: Callable[[bytes], int], where: int) -> None:
    guest = boot(
        """
        mov rbx, W
        mov rax, [rbx]
        mov [rip + got], rax
        mov dword [rbx + 8], 0x1234
        add byte [rbx + 1], 1
        mov eax, 0x55555555
        mov [rbx - 2], eax
        lea rdi, [rip + copy]
        mov rsi, rbx
        mov ecx, 2
        cld
        rep movsq
        lea rdi, [rbx + 32]
        mov ecx, 2
        rep stosw
        hlt
        got: dq 0
        copy: dq 0, 0""",
        where,
    )
    guest.map(where - PAGE, where - PAGE)
    below = os.memfd_create("below", os.MFD_CLOEXEC)
    os.ftruncate(below, PAGE)
    content = bytes(range(1, 65))
    rom = backing(content)
    overlays = Overlay(where, 2 * PAGE, Rights.READ, rom), Overlay(where - PAGE, PAGE, Rights.WRITE, below)
    guest.memory.change(add=overlays)
    guest.run()
    assert guest.read("got", 8) == content[:8] and guest.read("copy", 16) == content[:16]
    assert os.pread(rom, 64, 0) == content
    assert guest.io.log == [
        ("write", where + 8, 4, 0x1234), ("write", where + 1, 1, content[1] + 1), ("write", where, 2, 0x5555),
        ("write", where + 32, 2, 0x5555), ("write", where + 34, 2, 0x5555),
    ]  # fmt: skip
    assert os.pread(below, 2, PAGE - 2) == b"\x55\x55"
    os.close(below)


def test_a_vm_that_is_made_later_knows_what_is_there(boot: Boot, backing: Callable[[bytes], int]) -> None:
    rom = Overlay(OVER_RAM, PAGE, Rights.READ, backing(b"12345678"))
    guest = boot("mov rcx, W\n mov rax, [rcx]\n mov [rcx], cl\n hlt", OVER_RAM, overlays=[rom])
    guest.run()
    assert guest.reg("rax").to_bytes(8, "little") == b"12345678"
    assert guest.io.log == [("write", OVER_RAM, 1, OVER_RAM & 0xFF)]


def test_a_device_over_ram_hides_it(boot: Boot) -> None:
    guest = boot("mov rbx, W\n mov rax, [rbx]\n mov [rbx + 8], rax\n hlt", OVER_RAM)
    guest.memory.store_u64(OVER_RAM, 0x1122334455667788)
    window = Overlay(OVER_RAM, PAGE, Rights.NONE)
    guest.memory.change(add=[window])
    guest.run()
    ones = (1 << 64) - 1
    assert guest.io.log == [("read", OVER_RAM, 8, ones), ("write", OVER_RAM + 8, 8, ones)]
    assert not guest.memory.is_ram(OVER_RAM, 1) and not guest.memory.is_ram(OVER_RAM - 1, 2)
    guest.memory.change(remove=[window])
    guest.set(rip=PROGRAM)
    guest.run()
    assert len(guest.io.log) == 2
    assert guest.memory.load_u64(OVER_RAM + 8) == 0x1122334455667788


READS = """
    start:  mov rcx, W
    again:  cmp byte [rip + enough], 0
            jne done
            inc qword [rip + turns]
            mov rax, [rip + wanted]
            {look}
            cmp rax, [rip + wanted]
            jne again
            test rax, rax
            je any
            cmp rax, rbx
            je again
            jmp wrong
    any:    {either}
    wrong:  mov [rip + bad], rbx
    done:   hlt
            align 8
    wanted: dq 0
    turns:  dq 0
    bad:    dq 0
    enough: dq 0"""
WHOLE = """cmp ebx, 0x1111
            je again
            cmp ebx, 0x2222
            je again"""
BY_BYTES = """test ebx, 0xffff0000
            jne wrong
            cmp bl, 0x11
            je high
            cmp bl, 0x22
            jne wrong
    high:   cmp bh, 0x11
            je again
            cmp bh, 0x22
            je again"""
"""An access that crosses pages may be several (SDM 3, 9.1.1), and the change come between."""
LOOKS = {
    "data": "mov rbx, [rcx]",
    "two pages": "mov rbx, [rcx + 4092]",
    "no neighbours": "mov rbx, [rcx + 3*4096 - 4]",
    "code": "call rcx",
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("where", [HOLE, OVER_RAM])
def test_a_window_is_swapped_under_a_running_guest(
    boot: Boot, backing: Callable[[bytes], int], where: int, look: str
) -> None:
    """It sees one or the other, never neither, and the new one as soon as the change is made."""
    values = (0x1111, 0x2222)
    files = []
    for value in values:
        data = bytes.fromhex("bb") + value.to_bytes(4, "little") + b"\xc3"  # mov ebx, value; ret
        if look == "data":
            data = value.to_bytes(8, "little")
        elif look == "two pages":
            data = bytes(4092) + value.to_bytes(8, "little")
        elif look == "no neighbours":
            data = bytes(2 * PAGE - 4) + value.to_bytes(4, "little")
        files.append(backing(data))
    either = BY_BYTES if look in ("two pages", "no neighbours") else WHOLE
    guest = boot(READS.format(look=LOOKS[look], either=either), where)
    memory = guest.memory
    shown = Overlay(where, 2 * PAGE, Rights.WRITE, files[0])
    memory.change(add=[shown])
    runner = threading.Thread(target=guest.run, args=(60,))
    runner.start()
    wanted, turns, enough = (guest.program[name] for name in ("wanted", "turns", "enough"))
    for i in range(1, 41):
        memory.store_u64(wanted, 0)
        last = shown
        shown = Overlay(where, 2 * PAGE, Rights.READ if i % 3 == 0 else Rights.WRITE, files[i % 2])
        memory.change([last], [shown])
        memory.store_u64(wanted, values[i % 2])
        seen = memory.load_u64(turns)
        while memory.load_u64(turns) < seen + 3 and runner.is_alive():
            pass
    memory.store_u64(enough, 1)
    runner.join()
    assert guest.load("bad") == 0 and guest.exception is None
    assert guest.load("turns") > 100 and not guest.io.log


@pytest.mark.parametrize("where", [HOLE, OVER_RAM])
def test_rights_change_under_a_running_guest(boot: Boot, backing: Callable[[bytes], int], where: int) -> None:
    """What it writes goes to memory, to the bus, and to memory again."""
    guest = boot(
        """
        start:  mov rcx, W
        again:  inc qword [rip + turns]
                inc qword [rcx]
                cmp byte [rip + enough], 0
                je again
                hlt
                align 8
        turns:  dq 0
        enough: dq 0""",
        where,
    )
    memory, file, log = guest.memory, backing(b""), guest.io.log
    shown = Overlay(where, PAGE, Rights.WRITE, file)
    memory.change(add=[shown])
    runner = threading.Thread(target=guest.run, args=(60,))
    runner.start()

    def some_turns() -> None:
        seen = memory.load_u64(guest.program["turns"])
        while memory.load_u64(guest.program["turns"]) < seen + 3 and runner.is_alive():
            pass

    for rights in (Rights.READ, Rights.NONE) * 3:
        some_turns()
        count, told = os.pread(file, 8, 0), len(log)
        some_turns()
        assert os.pread(file, 8, 0) != count and len(log) == told
        other = Overlay(where, PAGE, rights, file if rights else -1)
        memory.change([shown], [other])
        some_turns()
        count, told = os.pread(file, 8, 0), len(log)
        some_turns()
        assert os.pread(file, 8, 0) == count and len(log) > told
        memory.change([other], [shown])
    memory.store_u64(guest.program["enough"], 1)
    runner.join()
    assert guest.exception is None


def test_what_goes_is_the_buss_at_once(boot: Boot, backing: Callable[[bytes], int]) -> None:
    guest = boot("mov rcx, W\n mov rax, [rcx]\n hlt")
    window = Overlay(HOLE, PAGE, Rights.WRITE, backing(b"12345678"))
    guest.memory.change(add=[window])
    guest.run()
    assert guest.reg("rax").to_bytes(8, "little") == b"12345678" and not guest.io.log
    guest.memory.change(remove=[window])
    guest.set(rip=PROGRAM)
    guest.run()
    assert guest.io.log == [("read", HOLE, 8, (1 << 64) - 1)]


def test_all_cpus_keep_running_while_the_map_changes(boot: Boot, backing: Callable[[bytes], int]) -> None:
    """Each adds to its own counter in RAM beside the window that comes and goes; nothing is lost."""
    guest = boot(
        """
        start:  mov rcx, W
                xor edx, edx
        again:  lock inc qword [rcx + rdi*8 + 4096]
                inc rdx
                cmp byte [rip + enough], 0
                je again
                mov [rcx + rdi*8 + 4096 + 64], rdx
                hlt
        enough: dq 0""",
        OVER_RAM,
        cpus=3,
    )
    runner = threading.Thread(target=guest.run_together, args=(60,))
    runner.start()
    window = Overlay(OVER_RAM, PAGE, Rights.NONE)
    memory = guest.memory
    for _ in range(50):
        seen = memory.load_u64(OVER_RAM + PAGE)
        memory.change(add=[window])
        memory.change(remove=[window])
        while memory.load_u64(OVER_RAM + PAGE) == seen and runner.is_alive():
            pass
    memory.store_u64(guest.program["enough"], 1)
    runner.join()
    counts, own = ([memory.load_u64(OVER_RAM + at + 8 * i) for i in range(3)] for at in (PAGE, PAGE + 64))
    assert counts == own and min(counts) > 0
    assert memory.is_ram(0, RAM)
