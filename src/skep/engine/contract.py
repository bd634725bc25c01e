"""The engine contract: what executes guest instructions.

An engine makes an :class:`EngineVm` from guest memory, the I/O space and the number of vCPUs, which is
fixed from then on. A vCPU's own structures come with its first start. I/O happens by calls on the
:class:`~skep.contracts.io.IoSpace`, from inside ``run``; ``run`` itself returns only for what the VM must decide.
State goes in and out by the names of the manuals, so that what is saved under one engine loads under another.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from skep.contracts.constantports import ConstantPorts
from skep.contracts.interrupts import EngineChips, LocalApics, LocalInterrupts
from skep.contracts.io import Doorbells, IoSpace, PostedWrites
from skep.engine.exits import Exits
from skep.memory import GuestMemory

if TYPE_CHECKING:
    from skep.engine.debug import Debug


class Activity(enum.StrEnum):
    """What a vCPU does, where its state says so, under ``activity``."""

    ACTIVE = "active"
    HALTED = "halted"
    """Until an interrupt comes, if it hears any."""
    WAITING = "waiting"
    """To be started by another one."""


class ExitReason(enum.Enum):
    """Why ``Vcpu.run`` returned."""

    KICKED = "kicked"
    """Somebody called ``kick``; ask what is to be done and run again."""
    HALTED = "halted"
    """HLT was executed; ``detail["interrupts"]`` is RFLAGS.IF. Run again when something is pending."""
    SHUTDOWN = "shutdown"
    """Triple fault; what led to it is in :attr:`Vcpu.exits`."""
    DEBUG = "debug"
    """What :meth:`Vcpu.set_debug` asked for came: ``detail["places"]`` are the numbers of those hit; ``detail["step"]``
    and ``detail["instruction"]`` are true where that was it. The next run passes a place for execution where this one
    stopped."""
    FAILED = "failed"
    """The engine could not go on; ``detail["message"]`` says why. Ours, not the guest's."""


class Exit(NamedTuple):
    reason: ExitReason
    detail: Mapping[str, Any] = MappingProxyType({})


class Vcpu(Protocol):
    """One virtual processor. All but ``kick`` are called on, or while not running on, its own thread."""

    index: int
    exits: Exits
    """What it last left guest code for."""

    def run(self) -> Exit: ...

    def kick(self) -> None:
        """From any thread: make ``run`` look for interrupts, and for ``request_exit``, soon. Never lost:
        a kick between two runs makes the next one look."""

    def request_exit(self) -> None:
        """From any thread: make ``run`` return KICKED soon. Never lost."""

    def frozen(self) -> bool:
        """Between the VM's ``freeze`` and ``thaw``, from any thread: whether it stands still in the middle of ``run``,
        where its state may be read. False: ``run`` still has something to finish, or returns when it is asked to."""

    @property
    def activity(self) -> Activity:
        """From any thread: what it does in the middle of ``run``, where the engine lets it sleep there."""

    def tally(self) -> dict[str, int]:
        """From any thread: what it left guest code for so far, in words, and how often; "in the kernel" is what the
        host's kernel did without telling."""

    def get_state(self) -> dict[str, Any]:
        """Architectural names: rax.., rip, rflags, cr0.., efer, cs.. (selector, base, limit, attributes), gdtr, idtr,
        ldtr, tr, dr0.., xcr0, xsave (bytes, standard format), msrs {index: value}. Each machine says their exact shape:
        on amd64 it is :class:`skep.engine.amd64.registers.CpuState`."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes any subset of what ``get_state`` gives."""

    def set_debug(self, debug: Debug) -> None:
        """Leave guest code for this from the next run on, in place of what was said before. ``get_state`` and
        ``set_state``, and guest memory, are then the debugger's; a place that the guest's hardware cannot watch raises
        skep.errors.HostError."""

    def close(self) -> None: ...


class EngineVm(Protocol):
    max_vcpus: int
    local_apics: LocalApics | None
    """Where :attr:`Engine.hosts_apics`."""
    chips: EngineChips | None
    """Where :attr:`Engine.hosts_chips`."""
    doorbells: Doorbells | None
    """Where it has any."""
    posted: PostedWrites | None
    """Likewise."""
    withheld: tuple[str, ...]
    """Features of the CPU model that this host cannot give the guest, by the manuals' names."""

    def create_vcpu(self, index: int, interrupts: LocalInterrupts) -> Vcpu:
        """``interrupts`` are :class:`~skep.contracts.interrupts.HostedInterrupts` where the engine hosts the APICs."""

    def freeze(self) -> None:
        """Keep all vCPUs out of guest code, from any thread, as far as the engine can without their threads'
        cooperation; freezing twice is freezing once. What each still has to do :meth:`Vcpu.frozen` tells."""

    def thaw(self) -> None:
        """Guest code may run again."""

    def set_tsc_offset(self, offset: int) -> None:
        """The guest's TSC is the host's plus ``offset`` from now on, and its kvm-clock moves with it. Called while no
        vCPU runs: at a thaw."""

    def kvm_clock(self, tsc: int) -> int:
        """What kvm-clock says, in ns, when the guest's TSC is at ``tsc``, without what the guest added; 0 where guests
        have none. Called while no vCPU runs."""

    def set_kvm_clock(self, tsc: int, ns: int) -> None:
        """It says ``ns`` when the TSC is at ``tsc``. Called while no vCPU runs, and none has a state yet."""

    def answer_ports(self, constants: ConstantPorts) -> None:
        """Before the first vCPU is made: what need not be asked of devices. It stays valid until after ``close``."""

    def observe(self, *, times: bool, perf_map: bool) -> None:
        """Before the first vCPU is made: keep for ``statistics`` what costs time to keep; tell Linux perf, by
        /tmp/perf-PID.map, what the code is called that is made for the guest, where any is."""

    def statistics(self) -> dict[str, int | float]:
        """What the engine did for this VM so far, in the order in which it is to be read. Called while its vCPUs do not
        run, and are not closed."""

    def close(self) -> None: ...


class Engine(Protocol):
    name: str
    description: str
    """The name, and what else people may want to know."""
    hosts_apics: bool
    """Its VMs have the local APICs: they take messages, time, and start the other processors by themselves, so these
    run from the beginning, and HLT does not end ``run``."""
    hosts_chips: bool
    """They have the I/O APIC, the pair of 8259s and the 8254, too."""
    wants_huge_pages: bool
    """A guest's first use of each of the host's pages costs much, so that fewer and larger ones are faster."""

    @property
    def scales_tsc(self) -> bool:
        """It can give guests a TSC of another frequency than the host's."""

    def create_vm(
        self,
        memory: GuestMemory,
        io: IoSpace,
        max_vcpus: int,
        cpu_model: str,
        tsc_offset: int,
        tsc_hz: int | None = None,
        time_of_day: Callable[[], int] | None = None,
    ) -> EngineVm:
        """``cpu_model`` is "baseline" or "host"; the guest's TSC is the host's, made ``tsc_hz`` fast (None: as it is),
        plus ``tsc_offset``. ``time_of_day``, in ns since 1970, is what guests learn by kvm-clock; None: they have none.

        Raises skep.errors.UserError where the host cannot do it."""
