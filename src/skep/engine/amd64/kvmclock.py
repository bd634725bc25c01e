"""kvm-clock: time as KVM tells it to its guests, who then need not measure their TSC by a slow timer (Linux,
Documentation/virt/kvm/x86/msr.rst and cpuid.rst).

A guest names places in its memory by MSRs. One for each processor (``struct pvclock_vcpu_time_info``) says what the
clock, which counts nanoseconds, was when the processor's TSC stood at some value, and how fast that TSC counts; it is
kept true from then on. Another (``struct pvclock_wall_clock``) says, when it is named, what time of day it was when the
clock was at 0. Whoever reads a place tries again where its version was odd or has changed meanwhile.

Under KVM the first is the kernel's own, under the translator :mod:`skep.engine.translate.kvmclock`'s. The second is
ours under both, so that it says what the board's clock chip does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from skep.engine.amd64 import msrs
from skep.memory import GuestMemory, MemoryFault

WALL_CLOCK = frozenset((msrs.KVM_WALL_CLOCK, msrs.KVM_WALL_CLOCK_NEW))
SYSTEM_TIME = frozenset((msrs.KVM_SYSTEM_TIME, msrs.KVM_SYSTEM_TIME_NEW))
"""Old numbers and new ones of the same."""
SAVED = (msrs.KVM_WALL_CLOCK_NEW, msrs.KVM_SYSTEM_TIME_NEW)
"""Joins :data:`skep.engine.amd64.msrs.SAVED` where guests have the clock."""

NS = 1_000_000_000
_M32 = 0xFFFF_FFFF


class WallClock:
    """Of one VM. ``now`` is its kvm-clock, ``time_of_day`` that of its board, in ns since 1970."""

    def __init__(self, memory: GuestMemory, now: Callable[[], int], time_of_day: Callable[[], int]) -> None:
        self._memory = memory
        self._now = now
        self._time_of_day = time_of_day
        self.msr = 0
        """What the guest wrote last; each processor reads the same."""

    def write_msr(self, value: int) -> bool:
        """MSR_KVM_WALL_CLOCK: tell it at the address ``value``. It always succeeds."""
        self.msr = value
        if value:
            seconds, ns = divmod(self._time_of_day() - self._now(), NS)
            publish(self._memory, value, struct.pack("<II", seconds & _M32, ns))
        return True


def publish(memory: GuestMemory, gpa: int, data: bytes) -> None:
    """Write what follows a version at ``gpa``, by the protocol. Where that is no RAM it is written nowhere."""
    try:
        version = memory.load_u32(gpa) | 1
        if not memory.is_ram(gpa, 4 + len(data)):
            return
        memory.store_u32(gpa, version)
        memory.write(gpa + 4, data)
        memory.store_u32(gpa, version + 1 & _M32)
    except MemoryFault:
        pass
