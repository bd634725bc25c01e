"""Which pages a guest wrote, by each engine: what it wrote is told, what it did not is not, and nothing is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from skep.memory import PAGE, GuestMemory, Overlay, Rights
from skep.memory.dirty import dirty_ranges
from tests.engine.engines import NAMES, Machines, named
from tests.engine.tiny import PROGRAM, RAM, Tiny

AREA, PAGES = 0x400000, 1024
"""Pages that the guest writes to, every other one of which it leaves alone."""
HOLE = 0x2000000
Boot = Callable[..., Tiny]


@pytest.fixture(params=[*NAMES, "kvm rings", pytest.param("hardware rings", marks=pytest.mark.hardware)])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    with closing(Machines(named(request.param))) as machines:

        def make(text: str, cpus: int = 1) -> Tiny:
            guest = machines(text, symbols={"AREA": AREA, "HOLE": HOLE}, reach=HOLE + PAGE, cpus=cpus)
            for page in range(2 * PAGES):
                guest.map(AREA + page * PAGE, AREA + page * PAGE)
            guest.map(HOLE, HOLE)
            return guest

        yield make


def pages(bitmap: bytes) -> set[int]:
    return {gpa // PAGE + i for gpa, n in dirty_ranges(bitmap) for i in range(n // PAGE)}


WRITES = """
    start:  mov rbx, AREA
            mov byte [rbx + 5], 1
            inc qword [rbx + 2*4096]
            mov rax, [rbx + 3*4096]
            lock or dword [rbx + 4*4096 + 8], 2
            mov [rbx + 7*4096 - 4], rax
            lea rdi, [rbx + 10*4096 - 16]
            mov ecx, 4
            cld
            rep stosq
            lea rsp, [rbx + 13*4096]
            push rax
            lea rsi, [rbx + 14*4096]
            lea rdi, [rbx + 16*4096]
            movsb
            hlt"""
WRITTEN = {0, 2, 4, 6, 7, 9, 10, 12, 16}
READ = {3, 14}
"""KVM tells of a page at its first use after slots changed, be it only read."""


def test_what_was_written_and_nothing_else(boot: Boot) -> None:
    guest = boot(WRITES)
    guest.run()
    guest.memory.start_dirty()
    for _ in range(3):
        guest.set(rip=PROGRAM)
        guest.run()
        seen = pages(guest.memory.take_dirty())
        area = {page - AREA // PAGE for page in seen if page >= AREA // PAGE}
        assert area == WRITTEN
        guest.memory.write(AREA + 20 * PAGE - 1, b"ab")  # a device's
        assert pages(guest.memory.take_dirty()) == {AREA // PAGE + 19, AREA // PAGE + 20}
    guest.memory.stop_dirty()
    guest.set(rip=PROGRAM)
    guest.run()
    guest.memory.start_dirty()
    assert not any(guest.memory.take_dirty()), "what was written before"


COPIED = """
    start:  mov rbx, AREA
            lea r8, [rdi*2 + 1]
            mov r10, 0x5851f42d4c957f2d
    again:  imul r8, r10
            inc r8
            mov rax, r8
            shr rax, 33
            and eax, {mask}
            shl rax, 13
            mov rdx, r8
            shr rdx, 21
            and edx, 0xff8
            mov [rbx + rax], r8
            lock xadd [rbx + rax], rdx
            mov [rbx + rax + 4088], r8
            inc qword [rip + turns]
            cmp byte [rip + enough], 0
            je again
            hlt
    turns:  dq 0
    enough: dq 0"""


@pytest.mark.parametrize("cpus", [1, 3])
def test_a_copy_that_follows_what_is_dirty_is_complete(boot: Boot, cpus: int) -> None:
    """As a live migration does it: all pages once, then what was written meanwhile, again and again."""
    guest = boot(COPIED.format(mask=PAGES // 2 - 1), cpus)
    memory = guest.memory
    left_alone = {AREA // PAGE + 1 + 2 * i for i in range(PAGES // 2)}
    memory.start_dirty()
    copy = bytearray(memory.read(0, RAM))
    runner = threading.Thread(target=guest.run_together, args=(90,))
    runner.start()
    rounds = 0
    while rounds < 20 or memory.load_u64(guest.program["turns"]) < 2000:
        rounds += 1
        follow(memory, copy, left_alone)
        runner.join(0.002)
        if not runner.is_alive():
            break
    memory.write(guest.program["enough"], b"\1")
    runner.join()
    assert rounds >= 20
    follow(memory, copy, left_alone)
    differ = {at // PAGE for at in range(0, RAM, PAGE) if copy[at : at + PAGE] != memory.read(at, PAGE)}
    assert not differ
    assert not any(memory.take_dirty())


def follow(memory: GuestMemory, copy: bytearray, left_alone: set[int]) -> None:
    dirty = memory.take_dirty()
    assert not pages(dirty) & left_alone
    for gpa, n in dirty_ranges(dirty):
        copy[gpa : gpa + n] = memory.read(gpa, n)


def test_what_was_written_before_the_map_changed_is_told(boot: Boot) -> None:
    """Slots come and go; what they knew does not."""
    guest = boot(WRITES)
    file = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(file, PAGE)
    guest.memory.start_dirty()
    guest.run()
    over = Overlay(AREA + 40 * PAGE, PAGE, Rights.WRITE, file)
    guest.memory.change(add=[over])
    seen = {page - AREA // PAGE for page in pages(guest.memory.take_dirty()) if page >= AREA // PAGE}
    assert seen - READ == WRITTEN | {40}
    guest.set(rip=PROGRAM)
    guest.run()
    seen = {page - AREA // PAGE for page in pages(guest.memory.take_dirty()) if page >= AREA // PAGE}
    assert seen - READ == WRITTEN
    guest.memory.change(remove=[over])
    assert pages(guest.memory.take_dirty()) == {AREA // PAGE + 40}
    os.close(file)


def test_a_devices_own_memory_is_watched_too(boot: Boot) -> None:
    guest = boot("mov rbx, HOLE\n mov byte [rbx], 1\n hlt")
    file = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(file, PAGE)
    guest.memory.change(add=[Overlay(HOLE, PAGE, Rights.WRITE, file)])
    guest.memory.start_dirty()
    guest.run()
    assert HOLE // PAGE in pages(guest.memory.take_dirty())
    guest.memory.stop_dirty()
    os.close(file)
