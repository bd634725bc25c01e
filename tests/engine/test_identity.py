"""What a processor says it is and how fast its TSC runs, the same under each engine."""

from __future__ import annotations

import struct
from fractions import Fraction
from random import Random
from typing import Any

import pytest

from skep.contracts.interrupts import LocalInterrupts
from skep.engine.amd64 import cpuid
from skep.engine.amd64.cpuid import Feature
from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.kvm import KvmEngine, uapi
from skep.memory import GuestMemory
from tests.engine.engines import NAMES, named
from tests.engine.tiny import RecordingIo, TestInterrupts, Tiny

ASKED, TOLD = 0x180000, 0x190000
EVERY_LEAF = f"""
        mov rsi, {ASKED}
        mov rdi, {TOLD}
next:   mov eax, [rsi]
        mov ecx, [rsi + 4]
        cmp eax, 0xffffffff
        je done
        cpuid
        mov [rdi], eax
        mov [rdi + 4], ebx
        mov [rdi + 8], ecx
        mov [rdi + 12], edx
        add rsi, 8
        add rdi, 16
        jmp next
done:   hlt
"""
GET_TSC_KHZ = 0xAEA3


@pytest.mark.parametrize("model", cpuid.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_cpuid_is_the_models_less_what_is_withheld(name: str, model: str) -> None:
    """Leaf by leaf: under KVM what the translator's guests see, but for features that it says are missing."""
    if name == "kvm":
        pytest.skip("the emulation shows the host's features")
    expected = cpuid.make(model, tsc_hz())
    leaves = sorted(expected.table)
    with Tiny(named(name), EVERY_LEAF, cpu_model=model) as guest:
        guest.memory.write(ASKED, b"".join(struct.pack("<II", *one) for one in leaves) + b"\xff" * 8)
        guest.run()
        told = [struct.unpack("<4I", guest.memory.read(TOLD + 16 * i, 16)) for i in range(len(leaves))]
        cr4, xcr0 = guest.reg("cr4"), guest.reg("xcr0")
        withheld = [Feature[feature] for feature in guest.vm.withheld]
    assert withheld == [] or name != "translate"
    for (leaf, subleaf), seen in zip(leaves, told, strict=True):
        wanted = list(expected.read(leaf, subleaf, cr4, xcr0))
        for feature in withheld:
            if feature.value[:2] == (leaf, subleaf):
                wanted[feature.value[2]] &= ~(1 << feature.value[3])
        assert seen == tuple(wanted), f"leaf {leaf:#x}.{subleaf}, less {withheld}"


@pytest.mark.parametrize("name", NAMES)
def test_no_processor_that_runs_kvm_withholds_the_base(name: str) -> None:
    if name == "kvm":
        pytest.skip("the emulation has less than any processor")
    with Tiny(named(name), "hlt", cpu_model="host") as guest:
        withheld = {Feature[feature] for feature in guest.vm.withheld}
    assert not withheld & {Feature.SSE2, Feature.CX16, Feature.SSE4_2, Feature.LM, Feature.NX, Feature.SYSCALL}
    assert withheld <= cpuid.make("host", tsc_hz()).features
    if name == "translate":
        assert not withheld


@pytest.mark.parametrize("name", NAMES)
def test_the_tsc_is_as_fast_as_cpuid_says(name: str) -> None:
    """Each of the guest's readings lies between two of the host's."""
    text = "again: rdtsc\n shl rdx, 32\n or rax, rdx\n mov [T], rax\n out 0x80, al\n jmp again"
    with Tiny(named(name), text, cpu_model="baseline", symbols={"T": TOLD}) as guest:
        readings: list[tuple[int, int]] = []

        def note(port: int, size: int, value: int) -> None:
            readings.append((read_tsc(), guest.load(TOLD)))
            if readings[-1][0] - readings[0][0] > tsc_hz() // 5:
                guest.vcpu.request_exit()

        guest.io.on_write = note
        with guest.watched(30):
            guest.vcpu.run()
    (before, _), (first, begin), *_, (last, _), (after, end) = readings
    assert last - first <= end - begin <= after - before


def vcpu_of(engine: KvmEngine, hz: int | None) -> tuple[Any, Any, GuestMemory]:
    memory = GuestMemory(1 << 20)
    vm = engine.create_vm(memory, RecordingIo(), 1, "baseline", 0, hz)
    interrupts: LocalInterrupts = TestInterrupts()
    return vm, vm.create_vcpu(0, interrupts), memory


@pytest.mark.parametrize("name", NAMES[1:])
def test_kvm_is_told_of_another_frequency(name: str) -> None:
    """A higher one any KVM takes, scaling or not."""
    engine = named(name)
    assert isinstance(engine, KvmEngine)
    host = None
    for factor in (1, 2):
        vm, vcpu, memory = vcpu_of(engine, factor * (tsc_hz() // 1000) * 1000 if factor > 1 else None)
        try:
            khz = uapi.ioctl(vcpu._fd, GET_TSC_KHZ)
            host = host or khz
            assert khz == pytest.approx(factor * host, rel=1e-3)
        finally:
            vm.close()
            memory.close()
    assert host == pytest.approx(tsc_hz() // 1000, rel=2e-3)


def test_the_crystals_ratio_is_the_nearest() -> None:
    random = Random(0)
    for _ in range(500):
        hz = random.choice((random.randrange(10**5, 10**8) * 1000, random.randrange(10**8, 10**11)))
        denominator, numerator, _, _ = cpuid.make("baseline", hz).table[0x15, 0]
        best = Fraction(10**9, hz).limit_denominator(4293)
        assert (denominator, numerator) == (best.numerator, best.denominator)


def test_leaves_that_tell_a_frequency_tell_the_guests() -> None:
    for hz in (1_000_000_000, 2_600_000_000):
        table = cpuid.make("baseline", hz).table
        denominator, numerator, crystal, _ = table[0x15, 0]
        assert crystal * numerator // denominator == pytest.approx(hz, rel=1e-6)
        assert table[0x16, 0][0] == hz // 10**6 and table[0x4000_0010, 0][0] == hz // 1000
