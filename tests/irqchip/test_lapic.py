"""The local APIC, against chapter 11 of the SDM's volume 3."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from time import monotonic_ns

import pytest

from skep.clock import GuestClock
from skep.contracts.conformance import DeviceConformance
from skep.contracts.interrupts import Lent, LocalInterrupts
from skep.contracts.io import IoRegion, IoSpace
from skep.irqchip import lapic as regs
from skep.irqchip.apicbus import ApicBus, Delivery, Message
from skep.irqchip.lapic import ApicView, LocalApic
from skep.irqchip.lapictimer import MIN_PERIOD_NS
from skep.locks import Lock, Order
from tests.boardtest import Time

X2APIC = 0xFEE0_0C00


@pytest.fixture
def time() -> Iterator[Time]:
    time = Time()
    yield time
    time.close()


class Cpus:
    """Some local APICs, software-enabled, and how often each was kicked."""

    def __init__(self, time: Time, count: int = 1, x2apic: bool = False) -> None:
        self.time = time
        self.apics = ApicBus(time.lock)
        self.kicks = [0] * count
        self.pic_vector = 0x30
        self.all = [LocalApic(i, self.apics, time.clock, lambda: self.pic_vector, bsp=i == 0) for i in range(count)]
        for i, apic in enumerate(self.all):
            apic.kick = lambda i=i: self.kicked(i)  # type: ignore[misc]
            apic.write(regs.SVR, 4, 0x1FF)
            if x2apic:
                assert apic.write_msr(regs.MSR_APIC_BASE, X2APIC | 0x100 * (i == 0))

    def kicked(self, i: int) -> None:
        self.kicks[i] += 1

    def fixed(self, vector: int, destination: int = 0, level: bool = False) -> None:
        with self.time.lock:
            self.apics.send(Message(destination, False, Delivery.FIXED, vector, level))

    def who_has(self, vector: int) -> list[int]:
        """The APICs that got the vector; they lose it."""
        got = [i for i, apic in enumerate(self.all) if apic.irr >> vector & 1]
        for apic in self.all:
            apic.irr &= ~(1 << vector)
        return got


class _Msrs:
    """The x2APIC registers as a region, for random traffic: 16 bytes a register, as in the page."""

    def __init__(self, apic: LocalApic) -> None:
        self.apic = apic

    def read(self, offset: int, size: int) -> int:
        return (self.apic.read_msr(0x800 + (offset >> 4)) or 0) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        index = {0x400: regs.MSR_APIC_BASE, 0x410: regs.MSR_TSC_DEADLINE}.get(offset & ~0xF, 0x800 + (offset >> 4))
        self.apic.write_msr(index, value)


class TestLocalApic(DeviceConformance[LocalApic]):
    @pytest.fixture(autouse=True)
    def _time(self, time: Time) -> None:
        self.time = time

    def make_device(self) -> LocalApic:
        return LocalApic(0, ApicBus(self.time.lock), self.time.clock, lambda: 0x30, bsp=True)

    def regions(self, device: LocalApic) -> list[tuple[IoRegion, int]]:
        return [(device, 0x1000), (_Msrs(device), 0x420)]

    def let_go(self, device: LocalApic) -> None:
        device.set_lint(0, False)
        device.set_lint(1, False)

    def time_passes(self, device: LocalApic, rng: random.Random) -> None:
        self.time.pass_ns(rng.choice((0, 1000, 100_000)))
        device.set_lint(rng.randrange(2), rng.random() < 0.5)
        device.acknowledge()
        device.take_nmi()
        with self.time.lock:
            device.accept(rng.randrange(8), rng.randrange(256), rng.random() < 0.5)


def test_it_is_what_the_engine_asks_for(time: Time) -> None:
    interrupts: LocalInterrupts = Cpus(time).all[0]
    assert not interrupts.pending() and interrupts.acknowledge() is None


def test_power_on_values(time: Time) -> None:
    apics = ApicBus(time.lock)
    ap = LocalApic(3, apics, time.clock, lambda: 0, bsp=False)
    assert ap.read_msr(regs.MSR_APIC_BASE) == 0xFEE0_0800
    assert ap.read(regs.ID, 4) == 3 << 24
    assert ap.read(regs.VERSION, 4) & 0xFF_00FF == 0x05_0015
    assert ap.read(regs.SVR, 4) == 0xFF
    assert ap.read(regs.DFR, 4) == 0xFFFF_FFFF
    assert {ap.read(lvt, 4) for lvt in range(regs.LVT_TIMER, regs.LVT_ERROR + 1, 16)} == {1 << 16}
    bsp = LocalApic(0, apics, time.clock, lambda: 0, bsp=True)
    assert bsp.read_msr(regs.MSR_APIC_BASE) == 0xFEE0_0900
    assert bsp.read(regs.LVT_LINT0, 4) == 0x700, "virtual wire"


# Priorities and the end of interrupts


def test_higher_vectors_first_and_only_above_the_class_in_service(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    for vector in (0x41, 0x62, 0x45):
        cpus.fixed(vector)
    assert cpus.kicks == [1], "one kick until it is acknowledged"
    assert apic.acknowledge() == 0x62
    assert not apic.pending() and apic.read(regs.PPR, 4) == 0x60
    cpus.fixed(0x6F)
    assert not apic.pending(), "the same class waits"
    cpus.fixed(0x70)
    assert apic.acknowledge() == 0x70
    apic.write(regs.EOI, 4, 0)
    assert not apic.pending()
    apic.write(regs.EOI, 4, 0)
    assert cpus.kicks == [3]
    assert apic.acknowledge() == 0x6F
    apic.write(regs.EOI, 4, 0)
    assert apic.acknowledge() == 0x45


def test_registers_show_irr_isr_and_tmr(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    cpus.fixed(0x85, level=True)
    cpus.fixed(0xFE)
    assert apic.read(regs.IRR + 0x40, 4) == 1 << 5
    assert apic.read(regs.TMR + 0x40, 4) == 1 << 5
    assert apic.read(regs.IRR + 0x70, 4) == 1 << 30
    assert apic.acknowledge() == 0xFE
    assert apic.read(regs.ISR + 0x70, 4) == 1 << 30 and apic.read(regs.IRR + 0x70, 4) == 0


def test_task_priority_holds_back_and_cr8_is_its_upper_half(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    apic.write_tpr(5)
    assert apic.read(regs.TPR, 4) == 0x50 and apic.read(regs.PPR, 4) == 0x50
    cpus.fixed(0x5F)
    assert not apic.pending() and apic.acknowledge() is None
    apic.write(regs.TPR, 4, 0x4F)
    assert apic.read_tpr() == 4 and apic.pending() and cpus.kicks == [1]


def test_eoi_of_a_level_is_broadcast_unless_suppressed(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    ended: list[int] = []
    cpus.apics.end_of_interrupt = ended.append  # type: ignore[method-assign]
    for level, suppressed, expected in ((False, 0, []), (True, 0, [0x55]), (True, 0x1000, [])):
        apic.write(regs.SVR, 4, 0x1FF | suppressed)
        cpus.fixed(0x55, level=level)
        assert apic.acknowledge() == 0x55
        apic.write(regs.EOI, 4, 0)
        assert ended == expected
        ended.clear()


def test_software_disabled_takes_no_fixed_interrupts_but_nmis(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    apic.write(regs.LVT_ERROR, 4, 0xFE)
    apic.write(regs.SVR, 4, 0xFF)
    assert apic.read(regs.LVT_ERROR, 4) == 0x1_00FE, "LVT masks are forced"
    apic.write(regs.LVT_ERROR, 4, 0xFE)
    assert apic.read(regs.LVT_ERROR, 4) == 0x1_00FE
    cpus.fixed(0x80)
    assert not apic.irr
    with time.lock:
        apic.accept(Delivery.NMI, 0, False)
    assert apic.take_nmi() and not apic.take_nmi()


# The 8259 pair and the pins


def test_extint_through_lint0_goes_past_the_priority(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    apic.write_tpr(15)
    with time.lock:
        apic.set_lint(0, True)
    assert apic.pending() and apic.acknowledge() == 0x30
    assert not apic.isr
    assert apic.pending() and cpus.kicks == [2], "INT is still up"
    with time.lock:
        apic.set_lint(0, False)
    assert not apic.pending()
    apic.write(regs.LVT_LINT0, 4, 0x1_0700)
    with time.lock:
        apic.set_lint(0, True)
    assert not apic.pending(), "masked"


def test_two_nmis_wait_and_no_more(time: Time) -> None:
    """The first is as good as delivered; only one waits behind it."""
    cpus = Cpus(time)
    apic = cpus.all[0]
    for _ in range(5):
        apic.accept(Delivery.NMI, 0, False)
    assert [apic.take_nmi() for _ in range(3)] == [True, True, False] and cpus.kicks[0] == 2


def test_switched_off_the_apic_forgets_its_identifier(time: Time) -> None:
    """SDM 3, 11.4.3: switched on again, it is as after a reset."""
    apic = Cpus(time, 2).all[1]
    apic.write(regs.ID, 4, 7 << 24)
    assert apic.read(regs.ID, 4) == 7 << 24
    assert apic.write_msr(regs.MSR_APIC_BASE, 0xFEE0_0000) and apic.write_msr(regs.MSR_APIC_BASE, 0xFEE0_0800)
    assert apic.read(regs.ID, 4) == 1 << 24


def test_without_an_apic_the_pins_are_intr_and_nmi(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    apic.write(regs.LVT_LINT0, 4, 0x1_0000)
    assert apic.write_msr(regs.MSR_APIC_BASE, 0xFEE0_0100)
    assert apic.page == -1
    with time.lock:
        apic.set_lint(0, True)
        apic.set_lint(1, True)
    assert apic.acknowledge() == 0x30 and apic.take_nmi()


def test_lint1_is_an_nmi_and_a_fixed_level_at_lint0_comes_back_after_eoi(time: Time) -> None:
    apic = Cpus(time).all[0]
    with time.lock:
        apic.set_lint(1, True)
    assert apic.take_nmi()
    apic.write(regs.LVT_LINT0, 4, 0x8000 | 0x66)
    with time.lock:
        apic.set_lint(0, True)
    assert apic.read(regs.LVT_LINT0, 4) == 0xC066, "remote IRR"
    assert apic.acknowledge() == 0x66
    apic.write(regs.EOI, 4, 0)
    assert apic.acknowledge() == 0x66
    with time.lock:
        apic.set_lint(0, False)
    apic.write(regs.EOI, 4, 0)
    assert not apic.pending() and apic.read(regs.LVT_LINT0, 4) == 0x8066


# Destinations


def test_physical_destinations(time: Time) -> None:
    cpus = Cpus(time, 3)
    cpus.fixed(0x40, destination=1)
    assert cpus.who_has(0x40) == [1]
    cpus.fixed(0x40, destination=0xFF)
    assert cpus.who_has(0x40) == [0, 1, 2]
    cpus.fixed(0x40, destination=7)
    assert cpus.who_has(0x40) == []


def test_logical_destinations_flat_and_cluster(time: Time) -> None:
    cpus = Cpus(time, 3)
    for i, apic in enumerate(cpus.all):
        apic.write(regs.LDR, 4, 1 << 24 + i)

    def logical(destination: int) -> list[int]:
        with time.lock:
            cpus.apics.send(Message(destination, True, Delivery.FIXED, 0x40))
        return cpus.who_has(0x40)

    assert logical(0b101) == [0, 2] and logical(0) == []
    for i, apic in enumerate(cpus.all):
        apic.write(regs.DFR, 4, 0x0FFF_FFFF)
        apic.write(regs.LDR, 4, (0x10 * (i // 2) | 1 << i % 2) << 24)
    assert logical(0x03) == [0, 1] and logical(0x11) == [2] and logical(0xF1) == [0, 2]


def test_lowest_priority_goes_to_the_least_busy(time: Time) -> None:
    cpus = Cpus(time, 2)
    cpus.all[0].write_tpr(3)
    with time.lock:
        cpus.apics.send(Message(0xFF, False, Delivery.LOWEST_PRIORITY, 0x40))
    assert cpus.who_has(0x40) == [1]


def test_interprocessor_interrupts(time: Time) -> None:
    cpus = Cpus(time, 3)
    one = cpus.all[1]

    def send(low: int, high: int = 0) -> list[int]:
        one.write(regs.ICR_HIGH, 4, high << 24)
        one.write(regs.ICR, 4, low)
        return cpus.who_has(0x50)

    assert send(0x4050, high=2) == [2]
    assert send(0x4_4050) == [1]
    assert send(0x8_4050) == [0, 1, 2]
    assert send(0xC_4050) == [0, 2]
    assert send(0xC_4400) == [] and [apic.take_nmi() for apic in cpus.all] == [True, False, True]
    started: list[int] = []
    resets: list[int] = []
    cpus.all[2].on_sipi = started.append
    cpus.all[2].on_init = lambda: resets.append(2)
    cpus.all[2].write_tpr(9)
    send(0xC500, high=2)  # INIT, assert
    send(0x8500, high=2)  # INIT, de-assert: nobody acts on it
    send(0x4699, high=2)
    assert resets == [2] and started == [0x99] and cpus.all[2].tpr == 0


def test_illegal_vectors_are_errors(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    apic.write(regs.LVT_ERROR, 4, 0xEE)
    apic.write(regs.ICR, 4, 0x4_000F)
    assert apic.acknowledge() == 0xEE
    assert apic.read(regs.ESR, 4) == 0, "errors show after a write"
    apic.write(regs.ESR, 4, 0)
    assert apic.read(regs.ESR, 4) == 1 << 5
    cpus.fixed(0x0F)
    apic.read(0x3D0, 4)
    apic.write(regs.ESR, 4, 0)
    assert apic.read(regs.ESR, 4) == 1 << 6 | 1 << 7


def test_msi(time: Time) -> None:
    cpus = Cpus(time, 2)
    cpus.apics.signal(0xFEE0_1000, 0x4061)
    assert cpus.who_has(0x61) == [1]
    cpus.all[0].write(regs.LDR, 4, 0x0100_0000)
    cpus.apics.signal(0xFEE0_100C, 0x61)  # logical, redirection hint
    assert cpus.who_has(0x61) == [0]
    cpus.apics.signal(0xFEE0_0000, 0x400)
    assert cpus.all[0].take_nmi()
    cpus.apics.signal(0xFED0_0000, 0x61)
    cpus.apics.signal(0x1_FEE0_0000, 0x61)
    assert cpus.who_has(0x61) == []


# x2APIC


def test_mode_transitions(time: Time) -> None:
    apic = Cpus(time).all[0]
    disabled, xapic, x2apic, invalid = (0xFEE0_0100 | bits for bits in (0, 0x800, 0xC00, 0x400))

    def allowed(start: int) -> list[bool]:
        results = []
        for target in (disabled, xapic, x2apic, invalid):
            assert apic.write_msr(regs.MSR_APIC_BASE, disabled)
            if start != disabled:
                assert apic.write_msr(regs.MSR_APIC_BASE, xapic)
                assert apic.write_msr(regs.MSR_APIC_BASE, start)
            results.append(apic.write_msr(regs.MSR_APIC_BASE, target))
        return results

    assert allowed(disabled) == [True, True, False, False]
    assert allowed(xapic) == [True, True, True, False]
    assert allowed(x2apic) == [True, False, True, False]
    assert not apic.write_msr(regs.MSR_APIC_BASE, xapic | 1), "reserved"


def test_x2apic_registers_fault_where_the_manual_says(time: Time) -> None:
    cpus = Cpus(time, 1, x2apic=True)
    apic = cpus.all[0]
    assert apic.read_msr(0x802) == 0 and apic.read_msr(0x80D) == 1
    assert apic.page == -1
    for index in (0x80B, 0x80E, 0x831, 0x83F, 0x809, 0x804):
        assert apic.read_msr(index) is None, f"{index:#x}"
    read_only = [(index, 0) for index in (0x802, 0x803, 0x80D, 0x810, 0x831, 0x839)]
    reserved = [(0x808, 0x100), (0x80F, 0x2000), (0x832, 1 << 20), (0x83F, 0x100), (0x830, 1 << 31)]
    for index, value in [*read_only, *reserved, (0x80B, 1), (0x828, 1)]:
        assert not apic.write_msr(index, value), f"{index:#x}"
    assert apic.write_msr(0x83F, 0x77) and apic.acknowledge() == 0x77
    assert apic.write_msr(0x80B, 0) and not apic.isr
    assert apic.write_msr(0x808, 0x20) and apic.read_msr(0x808) == 0x20 and apic.read_tpr() == 2


def test_x2apic_destinations(time: Time) -> None:
    cpus = Cpus(time, 18, x2apic=True)
    icr = 0x830

    def send(destination: int, low: int) -> list[int]:
        assert cpus.all[0].write_msr(icr, destination << 32 | low)
        return cpus.who_has(0x50)

    assert send(17, 0x50) == [17]
    assert send(0xFFFF_FFFF, 0x50) == list(range(18))
    assert send(0xFF, 0x50) == [], "8 bits are no broadcast here"
    assert send(0x1_0003, 0x850) == [16, 17]
    assert send(0x0_8001, 0x850) == [0, 15]
    assert cpus.all[0].read_msr(icr) == 0x8001 << 32 | 0x850


def test_x2apic_msrs_fault_in_xapic_mode(time: Time) -> None:
    apic = Cpus(time).all[0]
    assert apic.read_msr(0x802) is None and not apic.write_msr(0x80B, 0)


# The timer


def test_one_shot(time: Time) -> None:
    apic = Cpus(time).all[0]
    apic.write(regs.LVT_TIMER, 4, 0xEF)
    apic.write(regs.DIVIDE, 4, 0x3)  # by 16
    apic.write(regs.INITIAL_COUNT, 4, 1000)
    time.pass_ns(8000)
    assert apic.read(regs.CURRENT_COUNT, 4) == 500
    time.pass_ns(7999)
    assert not apic.pending()
    time.pass_ns(1)
    assert apic.acknowledge() == 0xEF and apic.read(regs.CURRENT_COUNT, 4) == 0
    apic.write(regs.EOI, 4, 0)
    time.pass_ns(100_000)
    assert not apic.pending()


def test_a_short_one_shot_fires_however_slow_the_host_is(time: Time) -> None:
    """Linux arms 1 us ahead; when that had passed before we were done, it once never came, and Linux slept for good."""
    apic = Cpus(time).all[0]
    read = time.clock.counter

    def slow() -> int:
        time.counter += 10_000
        return read()

    time.clock.counter = slow
    apic.write(regs.LVT_TIMER, 4, 0xEF)
    apic.write(regs.INITIAL_COUNT, 4, 1)
    time.clock.counter = read
    time.pass_ns(10_000)
    assert apic.acknowledge() == 0xEF


def test_changes_of_mode_and_rate_while_counting(time: Time) -> None:
    apic = Cpus(time).all[0]
    apic.write(regs.DIVIDE, 4, 0xB)
    apic.write(regs.LVT_TIMER, 4, 0x2_00EF)
    apic.write(regs.INITIAL_COUNT, 4, 1_000_000)
    time.pass_ns(1_600_000)
    assert apic.acknowledge() == 0xEF and apic.read(regs.CURRENT_COUNT, 4) == 400_000
    apic.write(regs.EOI, 4, 0)
    apic.write(regs.LVT_TIMER, 4, 0xEF)
    assert apic.read(regs.CURRENT_COUNT, 4) == 400_000, "the same count, once more only"
    apic.write(regs.DIVIDE, 4, 0)
    assert apic.read(regs.CURRENT_COUNT, 4) == 400_000
    time.pass_ns(799_999)
    assert not apic.pending()
    time.pass_ns(1)
    assert apic.acknowledge() == 0xEF and apic.read(regs.CURRENT_COUNT, 4) == 0
    apic.write(regs.EOI, 4, 0)
    apic.write(regs.DIVIDE, 4, 1)
    apic.write(regs.LVT_TIMER, 4, 0x2_00EF)
    time.pass_ns(10_000_000)
    assert not apic.pending(), "what has expired stays so until a count is written"


@pytest.mark.parametrize(("code", "divider"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_divider(time: Time, code: int, divider: int) -> None:
    apic = Cpus(time).all[0]
    apic.write(regs.DIVIDE, 4, code)
    apic.write(regs.INITIAL_COUNT, 4, 1000)
    time.pass_ns(100 * divider)
    assert apic.read(regs.CURRENT_COUNT, 4) == 900


def test_periodic(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    apic.write(regs.DIVIDE, 4, 0xB)
    apic.write(regs.LVT_TIMER, 4, 0x2_00EF)
    apic.write(regs.INITIAL_COUNT, 4, 1_000_000)
    for _ in range(5):
        time.pass_ns(1_000_000)
        assert apic.acknowledge() == 0xEF
        apic.write(regs.EOI, 4, 0)
        assert not apic.pending()
    time.pass_ns(250_000)
    assert apic.read(regs.CURRENT_COUNT, 4) == 750_000
    apic.write(regs.INITIAL_COUNT, 4, 0)
    time.pass_ns(10_000_000)
    assert not apic.pending()


def test_a_tiny_period_does_not_storm(time: Time) -> None:
    cpus = Cpus(time)
    apic = cpus.all[0]
    apic.write(regs.LVT_TIMER, 4, 0x2_00EF)
    apic.write(regs.INITIAL_COUNT, 4, 1)
    fired = 0
    for _ in range(100):
        time.pass_ns(10_000)
        fired += apic.acknowledge() is not None
        apic.write(regs.EOI, 4, 0)
    assert 10 <= fired <= 1_000_000 // MIN_PERIOD_NS


def test_tsc_deadline(time: Time) -> None:
    apic = Cpus(time).all[0]
    assert apic.write_msr(regs.MSR_TSC_DEADLINE, 5) and apic.read_msr(regs.MSR_TSC_DEADLINE) == 0, "not in this mode"
    apic.write(regs.LVT_TIMER, 4, 0x4_00EF)
    assert apic.write_msr(regs.MSR_TSC_DEADLINE, time.clock.tsc() + 50_000)
    time.pass_ns(49_999)
    assert not apic.pending() and apic.read_msr(regs.MSR_TSC_DEADLINE)
    time.pass_ns(1)
    assert apic.acknowledge() == 0xEF and apic.read_msr(regs.MSR_TSC_DEADLINE) == 0
    apic.write(regs.EOI, 4, 0)
    apic.write_msr(regs.MSR_TSC_DEADLINE, 1)  # past
    assert apic.acknowledge() == 0xEF, "at once, without the clock's thread"
    apic.write(regs.EOI, 4, 0)
    apic.write_msr(regs.MSR_TSC_DEADLINE, time.clock.tsc() + 1000)
    apic.write_msr(regs.MSR_TSC_DEADLINE, 0)
    time.pass_ns(2000)
    assert not apic.pending(), "disarmed"
    apic.write(regs.INITIAL_COUNT, 4, 1000)
    assert apic.read(regs.INITIAL_COUNT, 4) == 0 and apic.read(regs.CURRENT_COUNT, 4) == 0


def test_a_masked_timer_expires_silently_and_leaving_deadline_mode_disarms(time: Time) -> None:
    apic = Cpus(time).all[0]
    apic.write(regs.LVT_TIMER, 4, 0x5_00EF)
    apic.write_msr(regs.MSR_TSC_DEADLINE, time.clock.tsc() + 1000)
    time.pass_ns(1000)
    assert not apic.pending() and apic.read_msr(regs.MSR_TSC_DEADLINE) == 0
    apic.write(regs.LVT_TIMER, 4, 0x4_00EF)
    apic.write_msr(regs.MSR_TSC_DEADLINE, time.clock.tsc() + 1000)
    apic.write(regs.LVT_TIMER, 4, 0xEF)
    time.pass_ns(2000)
    assert not apic.pending()


def test_a_deadline_in_real_time_kicks_on_the_clocks_thread() -> None:
    lock = Lock("board", Order.BOARD)
    clock = GuestClock(monotonic_ns, 1_000_000_000, lock)
    apic = LocalApic(0, ApicBus(lock), clock, lambda: 0x30, bsp=True)
    kicked = threading.Event()
    apic.kick = kicked.set
    with lock:
        apic.write(regs.LVT_TIMER, 4, 0x4_00EF)
    deadline = clock.tsc() + 3_000_000
    assert apic.write_msr(regs.MSR_TSC_DEADLINE, deadline)
    assert kicked.wait(10) and clock.tsc() >= deadline and apic.acknowledge() == 0xEF
    clock.close()


def test_timers_go_on_after_load(time: Time) -> None:
    apic = Cpus(time).all[0]
    apic.write(regs.LVT_TIMER, 4, 0x4_00EF)
    apic.write_msr(regs.MSR_TSC_DEADLINE, time.clock.tsc() + 1000)
    fresh = Cpus(time).all[0]
    fresh.load(apic.save())
    time.pass_ns(1000)
    assert fresh.acknowledge() == 0xEF


# What is lent to the vCPU


class Loan:
    """A vCPU that does what it was lent as translated code does."""

    def __init__(self, clock: GuestClock) -> None:
        self.clock = clock
        self.held = False
        self.service = self.vector = self.deadline = self.task = self.command = self.edges = self.box = 0

    def give(self, lent: Lent, vector: int) -> None:
        assert not self.held
        self.held, self.vector = True, vector
        self.service, self.deadline, self.task, self.command, self.edges = lent

    def take(self) -> Lent:
        assert self.held
        self.held = False
        return Lent(self.service, self.deadline, self.task, self.command, self.edges)

    def collect(self) -> int:
        box, self.box = self.box, 0
        return box

    def write(self, apic: LocalApic, index: int, value: int) -> None:
        now = self.clock.tsc()
        if self.held and index == 0x80B:
            self.service ^= 1 << self.service.bit_length() - 1 if self.service else 0
        elif self.held and index == 0x808:
            self.task = value
        elif self.held and index == 0x830:
            self.command = value
        elif self.held and self.vector and not 0 < self.deadline <= now and not 0 < value <= now:
            self.deadline = value
        else:
            assert apic.write_msr(index, value)

    def post(self, apic: LocalApic, vector: int) -> None:
        """From another vCPU."""
        if self.held:
            self.box |= 1 << vector
        else:
            with apic.lock:
                apic.accept(Delivery.FIXED, vector, False)

    def window(self, apic: LocalApic) -> int | None:
        """The interrupt that is taken, if one is."""
        due = self.held and self.deadline and self.clock.tsc() >= self.deadline
        vector = max(self.box.bit_length() - 1, self.vector if due else 0)
        floor = max(self.service.bit_length() - 1, self.task) >> 4
        if self.held and not apic.irr and not apic.extint_latched and vector >> 4 > floor:
            if vector == self.box.bit_length() - 1:
                self.box ^= 1 << vector
            else:
                self.deadline = 0
            self.service |= 1 << vector
            self.edges |= 1 << vector
            return vector
        return apic.acknowledge() if apic.pending() else None


def _lent(time: Time) -> tuple[LocalApic, Loan]:
    apic = Cpus(time, x2apic=True).all[0]
    assert apic.write_msr(0x832, 0x4_00EC) and apic.write_msr(0x808, 0x10)
    return apic, Loan(time.clock)


def test_what_was_lent_comes_back(time: Time) -> None:
    apic, loan = _lent(time)
    deadline = time.clock.tsc() + 1000
    assert apic.write_msr(regs.MSR_TSC_DEADLINE, deadline)
    apic.accept(Delivery.FIXED, 0x55, False)
    apic.lend(loan)
    assert not loan.held, "something waits"
    assert apic.acknowledge() == 0x55
    apic.lend(loan)
    assert (loan.held, loan.service, loan.vector, loan.deadline) == (True, 1 << 0x55, 0xEC, deadline)
    time.pass_ns(1001)
    assert loan.held and not apic._ready, "the clock does not watch it meanwhile"
    assert apic.pending() and apic.isr == 1 << 0x55 and not loan.held
    assert apic.acknowledge() == 0xEC


def test_settled_the_clock_watches(time: Time) -> None:
    apic, loan = _lent(time)
    apic.lend(loan)
    loan.deadline = time.clock.tsc() + 1000
    apic.settle()
    assert not loan.held
    time.pass_ns(999)
    assert not apic.pending()
    time.pass_ns(1)
    assert apic.pending() and apic.acknowledge() == 0xEC


@pytest.mark.parametrize(
    ("index", "value", "vector"),
    [
        (0x832, 0x5_00EC, 0),
        (0x832, 0xEC, 0),
        (0x832, 0x2_00EC, 0),
        (0x832, 0x4_000F, 0),
        (0x808, 0xE0, 0xEC),
    ],
)
def test_a_timer_that_is_not_lent(time: Time, index: int, value: int, vector: int) -> None:
    apic, loan = _lent(time)
    assert apic.write_msr(index, value)
    apic.lend(loan)
    assert loan.held and loan.vector == vector


def test_a_level_triggered_interrupt_is_not_lent(time: Time) -> None:
    apic, loan = _lent(time)
    apic.accept(Delivery.FIXED, 0x55, True)
    assert apic.acknowledge() == 0x55
    apic.lend(loan)
    assert not loan.held


def test_the_xapic_lends_nothing(time: Time) -> None:
    apic, loan = Cpus(time).all[0], Loan(time.clock)
    apic.lend(loan)
    assert not loan.held


def test_whatever_arrives_meanwhile_kicks(time: Time) -> None:
    """Only the vCPU knows whether it may take it."""
    cpus = Cpus(time, x2apic=True)
    apic, loan = cpus.all[0], Loan(time.clock)
    apic.accept(Delivery.FIXED, 0x91, False)
    assert apic.acknowledge() == 0x91
    apic.lend(loan)
    before = cpus.kicks[0]
    cpus.fixed(0x31)
    assert cpus.kicks[0] == before + 1
    assert not apic.pending(), "less urgent than what is in service"
    assert apic.write_msr(0x80B, 0) and apic.pending()


def test_init_takes_what_was_lent(time: Time) -> None:
    apic, loan = _lent(time)
    apic.lend(loan)
    loan.service, loan.deadline = 1 << 0xEC, 5
    with time.lock:
        apic.accept(Delivery.INIT, 0, False)
    apic.settle()
    assert apic.isr == 0 and apic.timer.tsc_deadline == 0


def test_what_comes_too_late_is_collected(time: Time) -> None:
    """An interrupt is left for a vCPU that does not look any more."""
    cpus = Cpus(time, x2apic=True)
    apic, loan = cpus.all[0], Loan(time.clock)
    apic.lend(loan)
    apic.settle()
    loan.box = 1 << 0x91
    before = cpus.kicks[0]
    apic.collect()
    assert cpus.kicks[0] == before + 1 and apic.pending() and apic.acknowledge() == 0x91
    apic.lend(loan)
    loan.box = 1 << 0xA1
    apic.collect()
    assert loan.box, "the vCPU looks"
    assert apic.write_msr(0x80F, 0xFF) and apic.irr == 1 << 0xA1
    loan.box = 1 << 0xB1
    apic.collect()
    assert apic.irr == 1 << 0xA1, "switched off"


def test_a_reset_forgets_the_vcpu(time: Time) -> None:
    """Another one comes, while what the first had is gone."""
    apic, loan = _lent(time)
    apic.lend(loan)
    apic.settle()
    loan.box = 1 << 0x91
    apic.reset()
    apic.write(regs.SVR, 4, 0x1FF)
    assert not apic.pending() and loan.box, "nobody looks there any more"


@pytest.mark.parametrize("seed", range(20))
def test_nobody_can_tell(seed: int) -> None:
    """Two APICs, one of which lends whenever it can, go through the same."""
    choose = random.Random(seed)
    time = Time()
    (plain, _), (apic, loan) = _lent(time), _lent(time)
    for _ in range(600):
        what = choose.choice(("arrival", "deadline", "time", "eoi", "read", "priority", "ipi", "post", *["window"] * 3))
        vector = choose.choice((0x31, 0x55, 0x91, 0xEC, 0xF3))
        if what == "arrival":
            level = choose.random() < 0.2
            for one in (plain, apic):
                with time.lock:
                    one.accept(Delivery.FIXED, vector, level)
        elif what == "deadline":
            deadline = choose.choice((0, 1, time.clock.tsc() + choose.randrange(500)))
            assert plain.write_msr(regs.MSR_TSC_DEADLINE, deadline)
            loan.write(apic, regs.MSR_TSC_DEADLINE, deadline)
        elif what == "time":
            time.pass_ns(choose.randrange(300))
        elif what == "eoi":
            assert plain.write_msr(0x80B, 0)
            loan.write(apic, 0x80B, 0)
        elif what == "read":
            index = choose.choice((0x810 + choose.randrange(8), 0x80A, 0x802, regs.MSR_TSC_DEADLINE))
            assert plain.read_msr(index) == apic.read_msr(index)
        elif what == "ipi":
            assert plain.write_msr(0x830, 1 << 18 | vector)  # to itself
            loan.write(apic, 0x830, 1 << 18 | vector)
            if loan.held:
                loan.post(apic, vector)
        elif what == "post":
            plain.accept(Delivery.FIXED, vector, False)
            loan.post(apic, vector)
        elif what == "priority":
            assert plain.write_msr(0x808, 0x50 * (vector & 1))
            loan.write(apic, 0x808, 0x50 * (vector & 1))
        else:
            first = plain.acknowledge() if plain.pending() else None
            assert loan.window(apic) == first
        if choose.random() < 0.1:
            apic.settle()
        if not loan.held:
            apic.lend(loan)
    apic.settle()
    before, after = plain.save(), apic.save()
    assert before == after
    time.close()


# The page


def test_view_routes_its_own_page_and_nothing_else(time: Time) -> None:
    seen: list[int] = []

    class Rest:
        def port_read(self, port: int, size: int) -> int:
            return port

        def port_write(self, port: int, size: int, value: int) -> None: ...

        def mmio_read(self, gpa: int, size: int) -> int:
            seen.append(gpa)
            return 0

        def mmio_write(self, gpa: int, size: int, value: int) -> None:
            seen.append(gpa)

    cpus = Cpus(time, 2)
    view: IoSpace = ApicView(Rest(), cpus.all[1])
    assert view.mmio_read(0xFEE0_0020, 4) == 1 << 24 and view.port_read(7, 1) == 7
    view.mmio_write(0xFEE0_0080, 4, 0x30)
    assert cpus.all[1].tpr == 0x30 and not seen
    view.mmio_read(0xFEE0_1020, 4)
    cpus.all[1].write_msr(regs.MSR_APIC_BASE, 0xFEF0_0800)
    view.mmio_write(0xFEE0_0080, 4, 0)
    assert seen == [0xFEE0_1020, 0xFEE0_0080] and view.mmio_read(0xFEF0_0080, 4) == 0x30


def test_narrow_accesses(time: Time) -> None:
    apic = Cpus(time).all[0]
    assert apic.read(regs.SVR + 1, 1) == 1 and apic.read(regs.SVR + 4, 4) == 0
    apic.write(regs.TPR, 1, 0x20)
    assert apic.tpr == 0, "registers are written as dwords"
