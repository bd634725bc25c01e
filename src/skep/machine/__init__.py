"""Boards: what a machine consists of, built from a frozen configuration tree. One file a kind of machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from skep.bus import Bus
from skep.clock import GuestClock
from skep.config import Settings, Tree
from skep.contracts.chardev import CharBackend
from skep.contracts.device import Device
from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace
from skep.engine.contract import Engine, EngineVm
from skep.errors import HostError
from skep.locks import Lock
from skep.memory import GuestMemory


class Events(NamedTuple):
    """What a board tells its VM. All may be called from any thread, under the board lock, and return at once."""

    power_off: Callable[[], None]
    """The guest switched the machine off."""
    leave: Callable[[int], None]
    """The guest ended the VM with an exit status of its own."""
    reset: Callable[[], None]
    """The guest asked for a reset."""
    sleep: Callable[[], None]
    """The guest sent the machine to sleep, on a processor's thread: it does nothing more."""
    wake: Callable[[], None]
    """Something woke the machine."""
    start_cpu: Callable[[int, Any], None]
    """Start processor ``index`` in ``state``; it waited since it was made, or since ``stop_cpu``."""
    stop_cpu: Callable[[int], None]
    """Processor ``index`` leaves what it does and waits."""
    failed: Callable[[BaseException], None]
    """A timer or a backend raised: ours, and the end of the VM."""
    say: Callable[[str], None]
    """One line for the user's eyes; the VM goes on."""


class Board(Protocol):
    """A machine without its processors."""

    lock: Lock
    memory: GuestMemory
    clock: GuestClock
    bus: Bus
    devices: list[Device]
    """Everything with a life, in the order in which it pauses; closed the other way round. Before the VM starts, a
    program may add to it."""
    wiring: list[Device]
    """Those of them that others tell of their interrupts."""
    cpus: int
    io: IoSpace
    """For the engine. It knows the processor that calls by its thread."""

    def reset(self) -> Any:
        """Power-on: every device reset, memory cleared, the boot files loaded. No processor is running.

        Gives the first processor's state, for :meth:`skep.engine.contract.Vcpu.set_state`.
        """

    def sleep(self) -> None:
        """Suspend to RAM: what loses its power is reset; memory stays. No processor is running, and the board is
        paused."""

    def wake(self) -> Any:
        """From ``sleep``: the first processor's state, as of ``reset``; None where the guest has nothing to wake to."""

    def time_of_day(self) -> int:
        """What its clock chip says, in ns since 1970."""

    def adopt(self, vm: EngineVm | None) -> None:
        """The engine's VM was made, or is about to go (None): the board uses what it has of its own."""

    def interrupts(self, index: int) -> LocalInterrupts: ...

    def enter_cpu(self, index: int) -> None:
        """The calling thread is processor ``index`` from now on, until it ends."""

    def on_kick(self, index: int, kick: Callable[[], None]) -> None:
        """``kick`` is called, under the board lock, when an interrupt for processor ``index`` begins to wait."""

    def wakes(self, index: int, interrupts_on: bool) -> bool:
        """Something waits that ends a halt of processor ``index``."""

    def hears_interrupts(self, state: Any) -> bool:
        """A processor in this state, if it is halted, is woken by interrupts, and not only by an NMI."""

    def power_button(self) -> None: ...

    def nmi(self) -> None:
        """Press the button that interrupts even a guest that has interrupts off."""

    def complaints(self) -> list[str]:
        """What drivers did wrong, and what the host did to devices: the last few times of each."""

    def new_generation(self) -> None:
        """Tell the guest that it is a copy from now on: others may go on from the same past."""

    def pause(self) -> None:
        """No processor is running. Time stops, and nothing of the board changes when it returns."""

    def resume(self) -> None: ...

    def close(self) -> None: ...


PlugSerial = Callable[[str, str, str], CharBackend]
"""Makes the backend of a port from its name (com1), from what the tree says it is plugged into, and from the key that
says so. Who makes it closes it."""


def build(
    tree: Tree,
    settings: Settings,
    memory: GuestMemory,
    events: Events,
    plug: PlugSerial,
    *,
    hosts_apics: bool,
    hosts_chips: bool,
    scales_tsc: bool,
) -> Board:
    """The board that a frozen tree describes, for an engine that has local APICs, all interrupt controllers, or none,
    and can give the guest another TSC than the host's, or not. Raises UserError for what is wrong in the tree, and
    leaves nothing behind."""
    _check_host()
    from skep.machine.amd64 import Amd64Board

    return Amd64Board(
        tree, settings, memory, events, plug, hosts_apics=hosts_apics, hosts_chips=hosts_chips, scales_tsc=scales_tsc
    )


def choose_engine(
    wanted: str, code_cache: str, code_size: int = 64 << 20, kvm_irqchip: str = "auto", kvm_dirty_ring: int = 0
) -> tuple[Engine, str]:
    """The engine for "auto", or for its name, and why it was taken; the others are the settings of those names. Raises
    UserError where it cannot work here."""
    _check_host()
    from skep.machine import amd64

    return amd64.choose_engine(wanted, code_cache, code_size, kvm_irqchip, kvm_dirty_ring)


def _check_host() -> None:
    if os.uname().machine != "x86_64":
        raise HostError(f"Skep has no board for {os.uname().machine} hosts yet", None, "use an x86-64 one")
