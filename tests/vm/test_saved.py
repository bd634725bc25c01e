"""What one VM was when it stood still, another one goes on from, whatever engine runs them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import pytest

from skep.engine.amd64.msrs import KVM_SYSTEM_TIME_NEW
from skep.engine.amd64.tsc import tsc_hz
from skep.errors import UserError
from skep.vm import End, Vm
from tests.engine.engines import ON_HARDWARE, need
from tests.vm.test_guests import IRQCHIPS, kernel, sleeps

__all__ = ["kernel"]

ENGINES = ("translate", "kvm", "kvm alone", "kvm whole")
PAIRS = [
    *product(ENGINES, repeat=2),
    *(
        pytest.param(before, after, id=f"{before}-{after} on hardware", marks=(pytest.mark.hardware, pytest.mark.slow))
        for before, after in pairwise((*ENGINES, "translate"))
    ),
]

A_MOMENT, AN_HOUR = 10**8, 3600 * 10**9
"""Nanoseconds that calls of the kernel's may take; and what they never do."""


class Made:
    """VMs with the small guest of test_guests.py."""

    def __init__(self, kernel: Path) -> None:
        self.kernel = kernel
        self.vms: list[Vm] = []

    def __call__(self, how: str, command: str, keys: dict[str, str] | None = None, **options: object) -> Vm:
        engine, *more = how.split()
        need(engine)
        config = {**IRQCHIPS.get(" ".join(more), {}), **(keys or {})}
        self.vms.append(
            Vm(kernel=self.kernel, memory="64M", cmdline=command, engine=engine, config=config, **options)  # type: ignore[arg-type]
        )
        return self.vms[-1]


@pytest.fixture
def make(kernel: Path) -> Iterator[Made]:
    made = Made(kernel)
    yield made
    for vm in made.vms:
        vm.close()


def counts_on(vm: Vm, times: int = 1) -> None:
    memory = vm.board.memory
    count = memory.load_u64(0x70000)
    deadline = time.monotonic() + 30
    while memory.load_u64(0x70000) < count + times:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_guest_that_counts_goes_on(make: Made, before: str, after: str) -> None:
    first = make(before, "s")
    first.start()
    first.console.expect("Hi\n", timeout=20)
    counts_on(first)
    first.freeze()
    state = first.save()
    assert state.kvm_clock > 0
    state = state._replace(kvm_clock=state.kvm_clock + AN_HOUR)
    count, ticks = first.board.memory.load_u64(0x70000), first.board.clock.tsc()
    first.close()
    second = make(after, "s")
    second.load(state)
    assert second.board.memory.load_u64(0x70000) == count and second.board.clock.tsc() == ticks
    again = second.save()
    assert again.devices == state.devices
    assert abs(again.kvm_clock - state.kvm_clock) < A_MOMENT
    second.thaw()
    counts_on(second)
    second.stop()
    outcome = second.wait(20)
    assert outcome is not None and outcome.end is End.STOPPED


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_guest_asleep_between_ticks_is_woken(make: Made, before: str, after: str) -> None:
    """By the PIT."""
    first = make(before, "k")
    first.start()
    counts_on(first, 3)
    first.freeze()
    state = first.save()
    first.close()
    second = make(after, "k")
    second.load(state)
    second.thaw()
    counts_on(second, 50)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_guest_that_suspended_to_ram_wakes_elsewhere(make: Made, before: str, after: str) -> None:
    first = make(before, "z")
    first.start()
    sleeps(first)
    first.freeze()
    state = first.save()
    first.close()
    second = make(after, "z")
    second.load(state)
    assert second.asleep
    second.thaw()
    second.power_button()
    second.console.expect("0", timeout=20)
    outcome = second.wait(20)
    assert outcome is not None and outcome.end is End.POWERED_OFF


def test_processors_that_were_not_started_wait_on(make: Made) -> None:
    first = make("translate", "s", cpus=3)
    first.start()
    first.console.expect("Hi\n", timeout=20)
    first.freeze()
    state = first.save()
    assert [one.get("activity") for one in state.processors] == [None, "waiting", "waiting"]
    second = make("translate", "s", cpus=3)
    second.load(state)
    second.thaw()
    counts_on(second)
    assert second.processors()[1:] == ("waiting to be started",) * 2


def test_a_state_of_another_machine_is_refused(make: Made) -> None:
    first = make("translate", "s")
    first.start()
    with pytest.raises(UserError, match="cannot save a VM that is running"):
        first.save()
    first.freeze()
    state = first.save()
    with pytest.raises(UserError, match="another machine: lapic1"):
        make("translate", "s", cpus=2).load(state)
    with pytest.raises(UserError, match="another machine: virtio-rnd"):
        make("translate", "s", devices=["virtio-rnd"]).load(state)
    faster = state._replace(hz=2 * state.hz)
    with pytest.raises(UserError, match=rf"TSC runs at {faster.hz // 1000} kHz.*make it {faster.hz // 1000}"):
        make("translate", "s").load(faster)
    with pytest.raises(UserError, match="load a state into a VM that is frozen"):
        first.load(state)


@pytest.mark.parametrize("engine", [*ENGINES, ON_HARDWARE])
def test_a_tsc_of_another_frequency(make: Made, engine: str) -> None:
    """The host's own is what any engine has; another needs a processor that scales, or is refused in a line."""
    khz = tsc_hz() // 1000
    same = make(engine, "s", keys={"cpu.tsc_khz": str(khz)})
    assert same.board.clock.hz == tsc_hz()
    if same.engine.scales_tsc:
        assert make(engine, "s", keys={"cpu.tsc_khz": str(khz // 2)}).board.clock.hz == khz // 2 * 1000
        return
    with pytest.raises(UserError, match=f"every guest's TSC runs at {khz} kHz") as told:
        make(engine, "s", keys={"cpu.tsc_khz": str(khz // 2)})
    assert "\n" not in str(told.value) and "cpu.tsc_khz" in str(told.value)


@pytest.mark.parametrize("engine", [*ENGINES, ON_HARDWARE])
@pytest.mark.parametrize("offered", [True, False])
def test_guests_have_kvm_clock_or_not(make: Made, engine: str, offered: bool) -> None:
    vm = make(engine, "s", keys={} if offered else {"cpu.kvmclock": "off"})
    vm.start()
    vm.console.expect("Hi\n", timeout=20)
    vm.freeze()
    state = vm.save()
    assert (KVM_SYSTEM_TIME_NEW in state.processors[0]["msrs"]) is offered
    assert (state.kvm_clock > 0) is offered


@pytest.mark.parametrize("engine", [*ENGINES, ON_HARDWARE])
def test_the_tsc_stands_still_while_the_vm_does(make: Made, engine: str) -> None:
    vm = make(engine, "s")
    vm.start()
    vm.console.expect("Hi\n", timeout=20)
    vm.freeze()
    stood = vm.board.clock.tsc()
    time.sleep(0.2)
    assert vm.board.clock.tsc() == stood
    began = time.monotonic()
    vm.thaw()
    vm.freeze()
    assert 0 <= vm.board.clock.tsc() - stood <= tsc_hz() * (time.monotonic() - began)
