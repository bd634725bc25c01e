"""What a vCPU needs of its local interrupt controller, whoever owns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

Registers = dict[str, Any]
"""Of one chip, by the names of the fields of :mod:`skep.irqchip`'s model of it."""


class Lent(NamedTuple):
    """Registers of a local APIC that its vCPU has while it runs guest code."""

    service: int
    """ISR: a bit for each vector in service, of 256; at most :data:`IN_SERVICE`, none of them a level."""
    deadline: int
    """IA32_TSC_DEADLINE, in ticks of the VM's counter; 0: not armed."""
    task: int
    """The task priority register."""
    command: int
    """The interrupt command register."""
    edges: int = 0
    """A bit for each vector that was taken meanwhile."""


IN_SERVICE = 8
"""Interrupts in service at once that can be lent."""


class Loan(Protocol):
    """What a vCPU can do by itself of its local APIC's work while it runs guest code, and a box in which other vCPUs
    leave interrupts for it."""

    def give(self, lent: Lent, vector: int) -> None:
        """From here on the vCPU ends the interrupts in service where the guest writes EOI, writes the task priority,
        takes interrupts from the box, and sends them to others'. Unless ``vector`` is 0, the guest may write
        IA32_TSC_DEADLINE, and when that has come the vCPU takes the timer's interrupt, ``vector``."""

    def take(self) -> Lent:
        """No longer; what the registers are by now."""

    def collect(self) -> int:
        """Empty the box: a bit for each vector, edges all. On the vCPU's thread, or while it runs no guest code; under
        the local APIC's lock."""


class LocalInterrupts(Protocol):
    """The vCPU's side of a local APIC (Intel SDM 3, chapter 11).

    Called by the engine on the vCPU's own thread. Whoever makes an interrupt pending calls the vCPU's
    ``kick`` afterwards, so that the engine asks again.
    """

    def pending(self) -> bool:
        """An interrupt waits whose priority is above the processor priority (IF is not looked at)."""

    def acknowledge(self) -> int | None:
        """Take the interrupt: its vector, or None if it went away meanwhile."""

    def take_nmi(self) -> bool:
        """True once for each NMI that arrived."""

    def read_tpr(self) -> int:
        """CR8: bits 7:4 of the task priority register."""

    def write_tpr(self, value: int) -> None: ...

    def read_msr(self, index: int) -> int | None:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE, the x2APIC registers 0x800-0x83f; None means #GP."""

    def write_msr(self, index: int, value: int) -> bool:
        """False means #GP."""

    def lend(self, loan: Loan) -> None:
        """Guest code is about to run. What can be given is given, and taken back at the next other question."""

    def settle(self) -> None:
        """Guest code does not run for a while: what was given is taken back, and the time watched."""

    def collect(self) -> None:
        """From any thread: something came into the box that the vCPU may not see."""


class EngineApic(Protocol):
    """A local APIC that the engine has itself, asked while its vCPU does not run."""

    def registers(self) -> bytes:
        """1 KiB, laid out as the xAPIC page (SDM 3, table 11-1); the ID has 32 bits in x2APIC mode."""

    def set_registers(self, page: bytes) -> None: ...

    def read_msr(self, index: int) -> int:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE."""

    def write_msr(self, index: int, value: int) -> None: ...


@runtime_checkable
class HostedInterrupts(LocalInterrupts, Protocol):
    """The vCPU's side of the board where the engine has the local APIC: of :class:`LocalInterrupts` it asks only for
    the 8259 pair's interrupts, and NMIs."""

    def attach(self, apic: EngineApic) -> None:
        """The vCPU was made, and its APIC is to get the state that it has on the board."""

    def detach(self) -> None:
        """It is about to go."""

    def end_of_interrupt(self, vector: int) -> None:
        """The guest ended a level-triggered interrupt of those that :meth:`LocalApics.watch` names."""


class LocalApics(Protocol):
    """The local APICs of a VM that its engine has, as others on the board see them."""

    def signal(self, address: int, data: int) -> None:
        """A message, from any thread; address bits 63:40 are bits 31:8 of its destination."""

    def watch(self, messages: Mapping[int, tuple[int, int]]) -> None:
        """The level-triggered inputs of the I/O APIC, and the message, (address, data), that each sends: ends of these
        interrupts are told, and no others."""

    def bind(self, fd: int, address: int, data: int) -> bool:
        """From now on this message is sent whenever something is added to the eventfd ``fd``, and now if something was
        added before. False: the host has no room for it, and nothing has changed."""

    def unbind(self, fd: int) -> None:
        """No longer. What was added by then has been sent, or is on its way."""


class EngineChips(Protocol):
    """The I/O APIC, the pair of 8259s and the 8254 of a VM that its engine has. Called under the board lock; the
    registers are asked for and set while no vCPU runs."""

    def set_line(self, gsi: int, level: bool) -> None:
        """GSI 0 is input 0 of the pair and input 2 of the I/O APIC, those up to 15 are the same input of both. The
        8254's wire is another one to GSI 0."""

    def bind_line(self, gsi: int, assert_fd: int, ended_fd: int) -> None:
        """The GSI is asserted from when something is added to the eventfd ``assert_fd`` until the guest ends its
        interrupt; then 1 is added to ``ended_fd``."""

    def ioapic(self) -> Registers:
        """``id``, ``select``, ``entries``."""

    def set_ioapic(self, registers: Registers, levels: int) -> None:
        """``levels``: which level-triggered inputs are asserted; :meth:`set_line` tells when they no longer are."""

    def pics(self) -> tuple[Registers, Registers]:
        """Master and slave; the master's input from the slave is not to be relied on."""

    def set_pics(self, master: Registers, slave: Registers) -> None: ...

    def pit(self) -> tuple[list[Registers], bool]:
        """The counters, each with ``elapsed_ns`` since its count was loaded, and whether the speaker is on."""

    def set_pit(self, counters: list[Registers], *, speaker: bool, replaced: bool) -> None:
        """``replaced``: counter 0's output goes nowhere."""
