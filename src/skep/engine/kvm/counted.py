"""What a vCPU left guest code for, and how often: for us, and what the kernel did by itself and tells in a file
(api.rst, KVM_GET_STATS_FD)."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence

from skep.engine.kvm import uapi

REASONS = {
    uapi.EXIT_IO: "ports",
    uapi.EXIT_DEBUG: "the debugger",
    uapi.EXIT_HLT: "HLT",
    uapi.EXIT_IOAPIC_EOI: "ends of interrupts",
    uapi.EXIT_MMIO: "devices' memory",
    uapi.EXIT_IRQ_WINDOW_OPEN: "an interrupt's window",
    uapi.EXIT_INTR: "asked for",
    uapi.EXIT_X86_RDMSR: "RDMSR",
    uapi.EXIT_X86_WRMSR: "WRMSR",
    uapi.EXIT_DIRTY_RING_FULL: "a full dirty ring",
}
IN_KERNEL = {
    "halt_exits": "HLT",
    "irq_exits": "interrupts of the host's",
    "irq_injections": "interrupts of the guest's",
    "pf_fixed": "pages mapped",
    "insn_emulation": "instructions emulated",
    "hypercalls": "hypercalls",
}
"""The kernel's names, and what they mean. It counts what it passes on to us, too."""

_HEADER = struct.Struct("<6I")
_DESCRIPTOR = struct.Struct("<IhHII")


def by_cause(counts: Sequence[int]) -> dict[str, int]:
    """Exits to us by name, from those by KVM's reason."""
    return {REASONS.get(reason, f"reason {reason}"): count for reason, count in enumerate(counts) if count}


class Counted:
    """The kernel's file of one vCPU. ``read`` may be called from any thread, also after ``close``: it is empty then."""

    def __init__(self, vcpu: int, *, offered: bool) -> None:
        """``offered``: this KVM has such files; it is empty otherwise."""
        self._guard = threading.Lock()  # of the file
        self._fd = uapi.ioctl(vcpu, uapi.GET_STATS_FD) if offered else -1
        if offered:
            os.set_inheritable(self._fd, False)
        self._places: dict[str, int] = {}

    def read(self, *names: str) -> dict[str, int]:
        """Those of the values that this KVM has."""
        with self._guard:
            if self._fd < 0:
                return {}
            self._places = self._places or _places(self._fd)
            known = [name for name in names if name in self._places]
            return {name: int.from_bytes(os.pread(self._fd, 8, self._places[name]), "little") for name in known}

    def close(self) -> None:
        with self._guard:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _places(fd: int) -> dict[str, int]:
    """Where in the file each is that consists of one number."""
    _, name_size, count, _, descriptors, data = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    size = _DESCRIPTOR.size + name_size
    table = os.pread(fd, count * size, descriptors)
    places = {}
    for at in range(0, len(table), size):
        _, _, numbers, offset, _ = _DESCRIPTOR.unpack_from(table, at)
        if numbers == 1:
            places[table[at + _DESCRIPTOR.size : at + size].rstrip(b"\0").decode()] = data + offset
    return places
