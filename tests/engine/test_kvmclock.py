"""kvm-clock, which tells a guest how fast its TSC counts and what time it is, under each engine."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import pytest

from skep.engine.amd64 import msrs
from skep.engine.amd64.cpuid import KVM_CLOCK, KVM_LEAF, MAX_HYPERVISOR
from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.contract import Vcpu
from skep.engine.translate.kvmclock import scale
from skep.memory import Overlay, Rights
from tests.engine.engines import EVERYWHERE, NAMES, Machines, named
from tests.engine.tiny import MMIO, PAGE, RAM, STACK, Tiny

PLACE, WALL, ROM = 0x180000, 0x181000, 0x182000
NEW, OLD = msrs.KVM_SYSTEM_TIME_NEW, msrs.KVM_SYSTEM_TIME
STABLE, STOPPED = 1, 2
NOON = 1_800_000_000 * 10**9 + 123_456_789
GP = 13
MOVABLE = pytest.mark.parametrize("boot", [NAMES[0], NAMES[2]], indirect=True)
"""Where the guest's TSC can be another than the host's: this host's KVM may be an emulation, whose guests read that."""

SET = """
        wrmsr
        hlt
        jmp start
"""


@dataclass(frozen=True)
class Told:
    """struct pvclock_vcpu_time_info."""

    version: int
    tsc_timestamp: int
    system_time: int
    mul: int
    shift: int
    flags: int

    def at(self, tsc: int) -> int:
        passed = tsc - self.tsc_timestamp
        shifted = passed << self.shift if self.shift >= 0 else passed >> -self.shift
        return self.system_time + (shifted * self.mul >> 32)


def told(guest: Tiny, place: int = PLACE) -> Told:
    version, _, *rest = struct.unpack("<IIQQIbBxx", guest.memory.read(place, 32))
    return Told(version, *rest)


def wrmsr(guest: Tiny, index: int, value: int, vcpu: Vcpu | None = None) -> None:
    """Have the guest, whose program is SET, do it."""
    registers = {"rcx": index, "rax": value & 0xFFFF_FFFF, "rdx": value >> 32, "rip": guest.program["start"]}
    (vcpu or guest.vcpu).set_state(registers)
    if vcpu is None:
        guest.run()
    else:
        vcpu.run()


class Unsure:
    """What is asked of an engine inside may be wrong by as long as that took: ``ns``, with a microsecond to spare."""

    ns = 1000

    def __enter__(self) -> Self:
        self._began = read_tsc()
        return self

    def __exit__(self, *error: object) -> None:
        self.ns += (read_tsc() - self._began) * 10**9 // tsc_hz()


def clocked(boot: Machines, text: str = f"start: {SET}", **options: Any) -> Tiny:
    guest: Tiny = boot(text, time_of_day=lambda: NOON, **options)
    return guest


def enter(guest: Tiny) -> None:
    """KVM tells at the next entry to the guest."""
    wrmsr(guest, msrs.IA32_TSC_ADJUST, 0)


@EVERYWHERE
def test_the_signature_leads_to_the_features(boot: Machines) -> None:
    text = "start: cpuid\n hlt"
    for options, wanted in (({}, 0), ({"time_of_day": lambda: NOON}, sum(1 << one.value[3] for one in KVM_CLOCK))):
        guest = boot(text, **options)
        guest.set(rax=KVM_LEAF)
        guest.run()
        assert guest.reg("rax") == MAX_HYPERVISOR
        assert struct.pack("<III", *(guest.reg(name) for name in ("rbx", "rcx", "rdx"))) == b"KVMKVMKVM\0\0\0"
        guest.set(rax=KVM_LEAF + 1, rip=guest.program["start"])
        guest.run()
        assert guest.reg("rax") == wanted


@EVERYWHERE
@pytest.mark.parametrize("index", [NEW, OLD], ids=["new", "old"])
def test_the_guest_is_told_time_and_frequency(boot: Machines, index: int) -> None:
    guest = clocked(boot)
    wrmsr(guest, index, PLACE | 1)
    page = told(guest)
    assert page.version and page.version % 2 == 0
    assert (page.mul, page.shift) == pytest.approx(scale(tsc_hz()), rel=1e-3)
    tsc = read_tsc()
    assert 0 <= page.at(tsc) <= 60 * 10**9
    assert abs(page.at(tsc + tsc_hz()) - page.at(tsc) - 10**9) < 1000
    with Unsure() as unsure:
        clock = guest.vm.kvm_clock(tsc)
    assert abs(clock - page.at(tsc)) < unsure.ns
    assert guest.state["msrs"][NEW] == PLACE | 1


def test_the_frequency_is_what_linux_works_out_again() -> None:
    for khz in (100_000, 999_999, 1_000_000, 1_000_001, 2_000_000, 2_000_001, 2_599_997, 100_000_000):
        mul, shift = scale(khz * 1000)
        assert 1 << 31 <= mul < 1 << 32
        worked_out = (10**6 << 32) // mul
        assert abs((worked_out << -shift if shift < 0 else worked_out >> shift) - khz) <= 1 << max(-shift, 0)


@EVERYWHERE
def test_nothing_is_told_after_it_is_switched_off(boot: Machines) -> None:
    guest = clocked(boot)
    wrmsr(guest, NEW, PLACE | 1)
    wrmsr(guest, NEW, PLACE)
    guest.memory.write(PLACE, b"\xee" * 32)
    guest.vm.set_tsc_offset(-1000)
    enter(guest)
    assert guest.memory.read(PLACE, 32) == b"\xee" * 32


@EVERYWHERE
@pytest.mark.parametrize("index", [msrs.KVM_WALL_CLOCK_NEW, msrs.KVM_WALL_CLOCK])
def test_the_time_of_day_is_the_boards(boot: Machines, index: int) -> None:
    guest = clocked(boot)
    time.sleep(0.01)
    wrmsr(guest, index, WALL)
    version, seconds, ns = struct.unpack("<III", guest.memory.read(WALL, 12))
    assert version and version % 2 == 0 and ns < 10**9
    then = NOON - (seconds * 10**9 + ns)
    assert 10**7 <= then <= guest.vm.kvm_clock(read_tsc())
    assert guest.state["msrs"][msrs.KVM_WALL_CLOCK_NEW] == WALL
    wrmsr(guest, index, WALL)
    assert guest.memory.load_u32(WALL) == version + 2


@EVERYWHERE
def test_what_was_translated_where_the_time_is_told_goes(boot: Machines) -> None:
    """The seconds are an instruction."""
    mov_al_2_ret = 0x90C3_02B0
    text = f"""
        start: call {WALL + 4}
               mov bl, al
               mov ecx, {msrs.KVM_WALL_CLOCK_NEW}
               mov eax, {WALL}
               xor edx, edx
               wrmsr
               call {WALL + 4}
               hlt
    """
    guest: Tiny = boot(text, time_of_day=lambda: mov_al_2_ret * 10**9 + 10**9 - 1)
    guest.memory.write(WALL + 4, b"\xb0\x01\xc3\x90")
    guest.run()
    assert (guest.reg("rbx") & 0xFF, guest.reg("rax") & 0xFF) == (1, 2)


@EVERYWHERE
def test_no_place_harms(boot: Machines, rom: int) -> None:
    """Where there is no RAM nothing is told; the MSR keeps its value, and the guest goes on."""
    guest = clocked(boot, overlays=[Overlay(ROM, PAGE, Rights.READ, rom)])
    guest.memory.write(RAM - 64, b"\xee" * 64)
    for gpa in (RAM, RAM - 2, RAM - 8, MMIO, ROM, ROM - 8, 1 << 40, 1 << 52, (1 << 64) - 2, 0xFEE0_0000):
        wrmsr(guest, NEW, gpa | 1)
        wrmsr(guest, msrs.KVM_WALL_CLOCK_NEW, gpa)
        guest.vm.set_tsc_offset(-1)
        enter(guest)
        assert [guest.state["msrs"][index] for index in (NEW, msrs.KVM_WALL_CLOCK_NEW)] == [gpa | 1, gpa]
        assert guest.memory.read(RAM - 64, 60) == b"\xee" * 60
        assert os.pread(rom, PAGE, 0) == b"\xee" * PAGE
    for gpa in (PLACE + 2, PLACE + PAGE - 16, PLACE + PAGE - 2, PLACE):
        wrmsr(guest, NEW, gpa | 1)
    assert told(guest).version


@pytest.fixture
def rom() -> Iterator[int]:
    fd = os.memfd_create("rom")
    os.write(fd, b"\xee" * PAGE)
    yield fd
    os.close(fd)


@EVERYWHERE
@pytest.mark.parametrize("how", ["rdmsr", "wrmsr"])
def test_without_the_clock_there_are_no_such_msrs(boot: Machines, how: str) -> None:
    guest = boot(f"start: {how}\n hlt")
    for index in (NEW, OLD, msrs.KVM_WALL_CLOCK, *range(msrs.KVM_FIRST, msrs.KVM_FIRST + msrs.KVM_COUNT)):
        guest.set(rcx=index, rax=PLACE | 1, rdx=0, rip=guest.program["start"], rsp=STACK)
        guest.run()
        assert (fault := guest.exception) is not None and fault.vector == GP
    assert not {NEW, msrs.KVM_WALL_CLOCK_NEW} & guest.state["msrs"].keys()


@EVERYWHERE
def test_nothing_else_of_kvms_is_there(boot: Machines) -> None:
    guest = clocked(boot, "start: rdmsr\n hlt")
    for index in range(NEW + 1, msrs.KVM_FIRST + msrs.KVM_COUNT):
        guest.set(rcx=index, rip=guest.program["start"], rsp=STACK)
        guest.run()
        assert (fault := guest.exception) is not None and fault.vector == GP


@MOVABLE
def test_it_stands_still_with_the_tsc(boot: Machines) -> None:
    """A thaw tells the guest so, whose flag it is then."""
    guest = clocked(boot)
    wrmsr(guest, NEW, PLACE | 1)
    before = told(guest)
    assert not before.flags & STOPPED
    offset, unsure = 0, Unsure()
    for _ in range(3):
        stood = read_tsc() + offset
        time.sleep(0.05)
        offset = stood - read_tsc()
        with unsure:
            guest.vm.set_tsc_offset(offset)
        enter(guest)
        after = told(guest)
        assert after.flags & STOPPED and after.version % 2 == 0
        assert abs(after.at(stood) - before.at(stood)) < unsure.ns
        guest.memory.store_u8(PLACE + 29, after.flags & ~STOPPED)


@MOVABLE
def test_a_guest_that_moves_its_tsc_keeps_its_time(boot: Machines) -> None:
    guest = clocked(boot)
    wrmsr(guest, NEW, PLACE | 1)
    before = told(guest)
    hour = 3600 * tsc_hz()
    with Unsure() as unsure:
        wrmsr(guest, msrs.IA32_TSC_ADJUST, hour)
    after = told(guest)
    tsc = read_tsc()
    assert abs(after.at(tsc + hour) - before.at(tsc)) < unsure.ns


@MOVABLE
def test_processors_agree_or_it_is_said_that_they_do_not(boot: Machines) -> None:
    """KVM says it of TSCs that it was told of itself alone."""
    guest = clocked(boot, cpus=2)
    (other,) = guest.others
    places = PLACE, PLACE + 64
    wrmsr(guest, NEW, places[0] | 1)
    wrmsr(guest, NEW, places[1] | 1, other)
    enter(guest)
    first, second = (told(guest, place) for place in places)
    assert first.flags & second.flags & STABLE
    tsc = read_tsc()
    assert first.at(tsc) == second.at(tsc)
    with Unsure() as unsure:
        wrmsr(guest, msrs.IA32_TSC_ADJUST, 1 << 32)
        wrmsr(guest, msrs.IA32_TSC_ADJUST, 0, other)
    first, second = (told(guest, place) for place in places)
    if boot.engine.name == "translate":
        assert not (first.flags | second.flags) & STABLE
    assert abs(first.at(tsc + (1 << 32)) - second.at(tsc)) < unsure.ns
    wrmsr(guest, msrs.IA32_TSC_ADJUST, 1 << 32, other)
    wrmsr(guest, msrs.IA32_TSC_ADJUST, 1 << 32)
    first, second = (told(guest, place) for place in places)
    assert first.at(tsc + (1 << 32)) == second.at(tsc + (1 << 32))
    assert first.flags & second.flags & STABLE


READ_BY_TURNS = f"""
        start:  imul rsi, rdi, 64
                add rsi, PLACE
                mov rax, rsi
                or eax, 1
                xor edx, edx
                mov ecx, {NEW}
                wrmsr
                mov ebx, ROUNDS
        again:  lock bts dword [rip + busy], 0
                jnc take
                pause
                jmp again
        take:   mov r8d, [rsi]
                lfence
                rdtsc
                shl rdx, 32
                or rax, rdx
                sub rax, [rsi + 8]
                mov cl, [rsi + 28]
                test cl, cl
                js slower
                shl rax, cl
                jmp scaled
        slower: neg cl
                shr rax, cl
        scaled: mov ecx, [rsi + 24]
                mul rcx
                shrd rax, rdx, 32
                add rax, [rsi + 16]
                test r8d, 1
                jnz take
                cmp r8d, [rsi]
                jne take
                cmp rax, [rip + last]
                jae later
                inc dword [rip + warps]
        later:  mov [rip + last], rax
                mov dword [rip + busy], 0
                dec ebx
                jne again
                hlt
        align 64
        busy:   dq 0
        warps:  dq 0
        last:   dq 0
"""


@MOVABLE
def test_no_processor_sees_an_earlier_time_than_another_did(boot: Machines) -> None:
    guest = clocked(boot, READ_BY_TURNS, cpus=2, symbols={"PLACE": PLACE, "ROUNDS": 20_000})
    guest.run_together()
    assert guest.load("warps") == 0 and 0 < guest.load("last") < 100 * 10**9


@pytest.mark.parametrize("after", [NAMES[0], NAMES[2]])
@pytest.mark.parametrize("before", NAMES)
def test_another_engine_goes_on_with_it(before: str, after: str) -> None:
    text = f"start: {SET}"
    with Tiny(named(before), text, time_of_day=lambda: NOON, cpu_model="baseline") as one:
        wrmsr(one, NEW, PLACE | 1)
        wrmsr(one, msrs.KVM_WALL_CLOCK_NEW, WALL)
        stood = read_tsc()
        page, saved = one.memory.read(PLACE, 32), one.state["msrs"]
        with Unsure() as unsure:
            clock = one.vm.kvm_clock(stood)
        was = told(one).at(stood)
    time.sleep(0.05)
    with Tiny(named(after), text, time_of_day=lambda: NOON, cpu_model="baseline") as other:
        other.memory.write(PLACE, page)
        with unsure:
            other.vm.set_kvm_clock(stood, clock)
        other.set(msrs=saved)
        with unsure:
            other.vm.set_tsc_offset(stood - read_tsc())
        enter(other)
        now = told(other)
        assert [other.state["msrs"][index] for index in (NEW, msrs.KVM_WALL_CLOCK_NEW)] == [PLACE | 1, WALL]
        assert now.flags & STOPPED and abs(now.at(stood) - was) < unsure.ns
