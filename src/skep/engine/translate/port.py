"""What the Python parts of the translator (emulation of rare instructions, delivery) ask of their vCPU."""

from __future__ import annotations

from typing import Protocol

from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace
from skep.engine.debug import Debug
from skep.engine.translate.layout import StateBlock


class GuestFault(Exception):
    """An exception of the guest's own: ``vector``, ``error`` code if it has one, ``address`` for CR2."""

    def __init__(self, vector: int, error: int | None = None, address: int | None = None) -> None:
        super().__init__(vector, error, address)
        self.vector = vector
        self.error = error
        self.address = address


class DebuggerStop(Exception):
    """A debugger wants the vCPU before the instruction at rip: for ``places`` (bits as in DR6), or for what it is."""

    def __init__(self, places: int = 0, *, instruction: bool = False) -> None:
        super().__init__(places, instruction)
        self.places = places
        self.instruction = instruction


class TripleFault(Exception):
    """Delivery of a double fault faulted; ``faults`` are those that led there, the first one first."""

    def __init__(self, faults: list[GuestFault]) -> None:
        super().__init__(faults)
        self.faults = faults


class CpuPort(Protocol):
    st: StateBlock
    io: IoSpace
    interrupts: LocalInterrupts
    debug: Debug
    hits: int
    """Bits for DR6 of the breakpoints that the instruction has hit so far; reads and writes add theirs."""

    def read(self, va: int, size: int, supervisor: bool = False) -> bytes:
        """Read guest virtual memory (RAM or MMIO) with the current privilege, or as the CPU's own implicit supervisor
        access (descriptor tables, TSS). ``va`` is a linear address, already truncated to 32 bits where the mode says
        so. Raises GuestFault (#PF, #GP for non-canonical)."""

    def fetch(self, va: int, size: int) -> bytes:
        """Read code, which lies within one page, with the current privilege."""

    def change(self, va: int, *, to_set: int = 0, to_clear: int = 0) -> None:
        """Bits of a byte of a descriptor, as the supervisor, as one locked operation (SDM 3, 9.1.2.1)."""

    def write(self, va: int, data: bytes, supervisor: bool = False) -> None:
        """All or nothing: both pages are checked before the first byte is stored."""

    def check_write(self, va: int, size: int, supervisor: bool = False) -> None:
        """Raise what ``write`` would raise."""

    def physical(self, va: int, *, write: bool = False, execute: bool = False) -> int:
        """Walk the page tables as the current privilege would; sets accessed and dirty bits."""

    def read_physical(self, gpa: int, size: int) -> bytes:
        """Of RAM; all ones where there is none."""

    def ram(self, va: int, size: int, *, write: bool = False) -> int | None:
        """The physical address of ``size`` bytes within one page, None where a device answers there. Faults as an
        access of the current privilege would."""

    def flush_tlb(self, global_too: bool) -> None: ...

    def invalidate_page(self, va: int) -> None: ...

    def breakpoints_changed(self) -> None:
        """DR0 to DR3 or DR7 changed."""

    def state_changed(self) -> None:
        """CR0, CR4, EFER, XCR0, CPL, CS or RFLAGS.AC/TF changed: recompute the mode."""
