"""What an exit costs, beside a C program that does nothing else."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from skep.contracts.interrupts import EngineApic
from skep.engine.kvm import KvmEngine, can_host_apics
from skep.memory import GuestMemory
from tests.engine.tiny import RecordingIo, TestInterrupts

EXITS = 4_000
ROUNDS = 10
MOST = 2.5
"""Times as much. In the laboratory, too, whose QEMU forgets its TLB and its jumps at each exit: what counts there is
how many pages of code and data are touched."""


class CountingIo(RecordingIo):
    """Asks the vCPU to leave after so many writes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0
        self.done = lambda: None

    def port_write(self, port: int, size: int, value: int) -> None:
        self.left -= 1
        if not self.left:
            self.done()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = Path(os.environ.get("SKEP_PROGRAMS", "/nowhere"), "exits")  # the laboratory's
    if built.exists():
        return built
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    path = tmp_path_factory.mktemp("exits") / "exits"
    source = Path(__file__).with_name("exits.c")
    subprocess.run([compiler, "-O2", "-o", path, source], check=True, timeout=60)
    return path


class Hosted(TestInterrupts):
    """A board's side of a local APIC that KVM has: nothing ever comes from here."""

    def attach(self, apic: EngineApic) -> None: ...

    def detach(self) -> None: ...

    def end_of_interrupt(self, vector: int) -> None: ...


def in_python(kvm: KvmEngine) -> int:
    """The same in ns, with the local APIC where a VM has it."""
    hosted = can_host_apics()
    kvm = KvmEngine(kvm.device, hosts_apics=hosted)
    memory = GuestMemory(1 << 20)
    memory.write(0x7C00, bytes.fromhex("e680 ebfc"))
    io = CountingIo()
    vm = kvm.create_vm(memory, io, 1, "baseline", 0)
    vcpu = vm.create_vcpu(0, Hosted() if hosted else TestInterrupts())
    try:
        io.done = vcpu.request_exit
        code = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": 0x9B}
        vcpu.set_state({"cs": code, "rip": 0x7C00, "rflags": 2})
        for io.left in (EXITS // 10, EXITS):
            begin = time.thread_time_ns()
            vcpu.run()
        return (time.thread_time_ns() - begin) // EXITS
    finally:
        vm.close()
        memory.close()


@pytest.mark.parametrize(
    "kvm", ["kvm", pytest.param("hardware", marks=(pytest.mark.hardware, pytest.mark.slow))], indirect=True
)
def test_a_round_trip(kvm: KvmEngine, program: Path) -> None:
    """By turns, what one is to the other in the middle one of them: a busy host may slow either down."""
    ratios = []
    for _ in range(ROUNDS):
        c = subprocess.run([program, str(EXITS)], check=True, capture_output=True, timeout=60).stdout
        ratios.append(in_python(kvm) / int(c))
    assert statistics.median(ratios) <= MOST, ratios
