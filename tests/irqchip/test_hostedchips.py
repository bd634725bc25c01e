"""The state of controllers that KVM has, into KVM and out again: what the board's own models may be in comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from skep.contracts.interrupts import EngineChips
from skep.engine.contract import EngineVm
from skep.engine.kvm import KvmEngine
from skep.irqchip.apicbus import ApicBus
from skep.irqchip.hostedchips import HostedIoApic, HostedPic, HostedPit
from skep.irqchip.ioapic import LEVEL, MASKED, PINS, REMOTE_IRR, IoApic
from skep.irqchip.pic import Pic
from skep.irqchip.pit import Pit
from skep.memory import GuestMemory
from tests.boardtest import Time, Wire
from tests.engine.engines import need

PICS = {"irr", "isr", "imr", "elcr", "vector_base", "lowest", "auto_eoi", "rotate_in_aeoi", "special_mask",
        "fully_nested", "poll", "read_isr", "expected_icw", "icw4_follows"}  # fmt: skip


class Ports:
    def port_read(self, port: int, size: int) -> int:
        return 0

    mmio_read = port_read

    def port_write(self, port: int, size: int, value: int) -> None: ...

    mmio_write = port_write


@pytest.fixture
def chips() -> Iterator[EngineChips]:
    need("kvm")
    memory = GuestMemory(1 << 20)
    vm: EngineVm = KvmEngine(hosts_chips=True).create_vm(memory, Ports(), 1, "baseline", 0)
    assert vm.chips is not None
    yield vm.chips
    vm.close()
    memory.close()


@pytest.fixture
def time() -> Iterator[Time]:
    one = Time()
    yield one
    one.close()


@pytest.mark.parametrize("seed", range(20))
def test_the_8259s_come_back(chips: EngineChips, time: Time, seed: int) -> None:
    rng = random.Random(seed)
    model, pair = Pic(), HostedPic(time.lock)
    model.reset()
    for chip in (model.master, model.slave):
        chip.write(0, 1, 0x11)  # not single: KVM's are a pair
        for _ in range(rng.choice([0, 1, 2, 3, 3, 3])):
            chip.write(1, 1, rng.getrandbits(8))
    for _ in range(60):
        chip = rng.choice([model.master, model.slave])
        if rng.random() < 0.5:
            model.set_line(rng.choice([irq for irq in range(16) if irq != 2]), rng.random() < 0.6)
        elif rng.random() < 0.3:
            model.acknowledge()
        elif not chip.expected_icw:
            offset, value = rng.randrange(2), rng.getrandbits(8) & ~0x10
            chip.write(offset, 1, value)
        model.elcr.write(0, 2, 0 if seed % 2 else rng.getrandbits(16))
    pair.load(model.save())
    pair.adopt(chips)
    pair.pause()
    assert {
        (name, key): value for name in ("master", "slave") for key, value in pair.save()[name].items() if key in PICS
    } == {
        (name, key): value for name in ("master", "slave") for key, value in model.save()[name].items() if key in PICS
    }


@pytest.mark.parametrize("seed", range(10))
def test_the_io_apic_comes_back(chips: EngineChips, time: Time, seed: int) -> None:
    rng = random.Random(seed)
    model, hosted = IoApic(ApicBus(time.lock)), HostedIoApic(ApicBus(time.lock), 0, time.lock)
    for register in [*range(0x10, 0x10 + 2 * PINS), 0]:
        model.write(0, 4, register)
        model.write(0x10, 4, rng.getrandbits(32))
    for pin in range(PINS):
        model.set_line(pin, rng.random() < 0.5)
    hosted.load(model.save())
    hosted.adopt(chips)
    hosted.pause()
    saved, before = hosted.save(), model.save()
    for pin in range(PINS):  # a level that is asserted, and for which the guest was not interrupted yet, is sent
        if saved["entries"][pin] != before["entries"][pin]:
            assert saved["entries"][pin] == before["entries"][pin] | REMOTE_IRR
            assert before["entries"][pin] & (LEVEL | MASKED) == LEVEL and model.lines >> pin & 1
            before["entries"][pin] = saved["entries"][pin]
    assert saved == before


def test_the_8254_comes_back(chips: EngineChips, time: Time) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        model, hosted = Pit(time.clock, Wire()), HostedPit(time.clock, Wire(), time.lock)
        try:
            time.pass_ns(1_000_000_000)
            for number in range(3):
                mode = rng.choice([0, 2, 3, 4]) if number == 0 else rng.randrange(6)
                model.write(3, 1, number << 6 | 3 << 4 | mode << 1 | (rng.random() < 0.2))
                model.write(number, 1, 0x34)
                if rng.random() < 0.9:
                    model.write(number, 1, 0x92)
                for _ in range(rng.randrange(3)):
                    model.write(3, 1, rng.choice([number << 6, 0xC2 | 2 << number, 0xE0 | 2 << number]))
                if rng.random() < 0.3:
                    model.read(number, 1)
            model.write_port_b(rng.randrange(4))
            hosted.load(model.save())
            hosted.adopt(chips)
            hosted.pause()
            saved, before = hosted.save(), model.save()
            assert saved["port_b"] & 3 == before["port_b"] & 3
            for counter, was in zip(saved["counters"], before["counters"], strict=True):
                if was["written"]:
                    same = {"mode", "access", "bcd", "gate", "written", "write_high", "latched_count", "latched_status"}
                    assert {name: counter[name] for name in same} == {name: was[name] for name in same}
                    assert 0 <= saved["ticked"] - counter["start"] < 1_193_182
                else:
                    assert not counter["written"]
        finally:
            model.close()
            hosted.close()


def test_the_hpet_stands_in_for_counter_0(chips: EngineChips, time: Time) -> None:
    hosted = HostedPit(time.clock, Wire(), time.lock)
    try:
        hosted.write(3, 1, 0x34)
        for byte in (0, 0x10):
            hosted.write(0, 1, byte)
        hosted.adopt(chips)
        with time.lock:
            hosted.replace(True)
            hosted.replace(False)
        hosted.pause()
        assert hosted.counters[0].written == 0x1000 and hosted.tick_due is not None
    finally:
        hosted.close()
