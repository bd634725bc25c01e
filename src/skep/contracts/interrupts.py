"""What a vCPU needs of its local interrupt controller, whoever owns it."""

from __future__ import annotations

from typing import Protocol


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
