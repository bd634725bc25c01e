"""An engine whose guest is Python: for tests of the VM's own rules, where a real guest would only be slower to steer.

A program is a function of its :class:`ScriptedVcpu`; it returns what ``run`` gives, and is called for each run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace
from skep.engine.contract import Activity, Exit, ExitReason
from skep.engine.exits import Exits
from skep.memory import GuestMemory

KICKED = Exit(ExitReason.KICKED)
HALTED = Exit(ExitReason.HALTED, {"interrupts": True})
HALTED_FOR_GOOD = Exit(ExitReason.HALTED, {"interrupts": False})


class ScriptedVcpu:
    def __init__(self, vm: ScriptedVm, index: int, interrupts: LocalInterrupts) -> None:
        self.index = index
        self.vm = vm
        self.io = vm.io
        self.interrupts = interrupts
        self.state: dict[str, Any] = {}
        self.exits = Exits()
        self.wanted = threading.Event()
        self.closed = False
        self.runs = 0

    def run(self) -> Exit:
        assert not self.closed and threading.current_thread().name.endswith(f"cpu{self.index}")
        self.runs += 1
        return self.vm.engine.program(self)

    def spin(self) -> Exit:
        """Guest code that goes on until somebody wants something."""
        self.wanted.wait()
        self.wanted.clear()
        return KICKED

    def kick(self) -> None:
        self.wanted.set()

    def request_exit(self) -> None:
        self.wanted.set()

    activity = Activity.ACTIVE

    def tally(self) -> dict[str, int]:
        return {"runs": self.runs}

    def frozen(self) -> bool:
        return False

    def get_state(self) -> dict[str, Any]:
        return dict(self.state)

    def set_state(self, state: dict[str, Any]) -> None:
        self.state.update(state)

    def close(self) -> None:
        self.closed = True


class ScriptedVm:
    def __init__(self, engine: ScriptedEngine, memory: GuestMemory, io: IoSpace, max_vcpus: int) -> None:
        self.engine = engine
        self.memory = memory
        self.io = io
        self.max_vcpus = max_vcpus
        self.vcpus: list[ScriptedVcpu] = []
        self.offsets: list[int] = []
        self.local_apics = self.chips = self.doorbells = self.posted = None
        self.withheld: tuple[str, ...] = ()
        self.closed = False

    def create_vcpu(self, index: int, interrupts: LocalInterrupts) -> ScriptedVcpu:
        vcpu = ScriptedVcpu(self, index, interrupts)
        self.vcpus.append(vcpu)
        return vcpu

    def answer_ports(self, constants: object) -> None: ...

    def freeze(self) -> None:
        pass

    def thaw(self) -> None:
        pass

    def set_tsc_offset(self, offset: int) -> None:
        self.offsets.append(offset)

    def kvm_clock(self, tsc: int) -> int:
        return 0

    def set_kvm_clock(self, tsc: int, ns: int) -> None: ...

    def close(self) -> None:
        assert all(vcpu.closed for vcpu in self.vcpus)
        self.closed = True


class ScriptedEngine:
    name = description = "scripted"
    hosts_apics = hosts_chips = scales_tsc = wants_huge_pages = False

    def __init__(self, program: Callable[[ScriptedVcpu], Exit]) -> None:
        self.program = program
        self.vms: list[ScriptedVm] = []

    def create_vm(
        self,
        memory: GuestMemory,
        io: IoSpace,
        max_vcpus: int,
        cpu_model: str,
        tsc_offset: int,
        tsc_hz: int | None = None,
        time_of_day: Callable[[], int] | None = None,
    ) -> ScriptedVm:
        self.vms.append(ScriptedVm(self, memory, io, max_vcpus))
        return self.vms[-1]
