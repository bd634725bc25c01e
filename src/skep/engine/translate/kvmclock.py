"""kvm-clock under the translator (:mod:`skep.engine.amd64.kvmclock`).

A processor's TSC is the VM's counter and what the guest added (IA32_TSC_ADJUST). The clock follows the counter from one
moment on, the same for all processors, so they agree to the nanosecond however far apart in time they asked. A freeze
moves the counter's distance to the host's alone: what a guest was told stays true.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from skep.engine.amd64.kvmclock import NS, WallClock, publish
from skep.locks import Lock, Order
from skep.memory import GuestMemory, MemoryFault

ENABLE = 1 << 0
"""In MSR_KVM_SYSTEM_TIME."""
TSC_STABLE, GUEST_STOPPED = 1 << 0, 1 << 1
"""Flags: the TSCs of all processors agree; the guest stood still, so that its watchdogs had better forget. The guest
takes back the latter."""
FLAGS = 29
_time_info = struct.Struct("<4xQQIbB2x")
"""struct pvclock_vcpu_time_info, behind its version."""
_M64 = (1 << 64) - 1


class KvmClock:
    """Of one VM. ``tsc`` is its counter now, without what guests add."""

    def __init__(self, memory: GuestMemory, hz: int, tsc: Callable[[], int], time_of_day: Callable[[], int]) -> None:
        self._memory = memory
        self._mul, self._shift = scale(hz)
        self._began = tsc(), 0
        """A value of the counter, and the clock's then."""
        self._places: list[Place] = []
        self._lock = Lock("kvm-clock", Order.KVM_CLOCK)
        """Of what is published."""
        self.wall = WallClock(memory, lambda: self.at(tsc()), time_of_day)

    def at(self, tsc: int) -> int:
        """What a guest reads when the counter is at ``tsc``."""
        counter, ns = self._began
        passed = tsc - counter
        return ns + ((passed << self._shift if self._shift >= 0 else passed >> -self._shift) * self._mul >> 32)

    def set(self, tsc: int, ns: int) -> None:
        """It is ``ns`` when the counter is at ``tsc``. No vCPU runs."""
        with self._lock:
            self._began = tsc, ns
            self._publish(self._places)

    def stopped(self) -> None:
        """Tell the guest that it stood still. No vCPU runs."""
        with self._lock:
            self._publish(self._places, GUEST_STOPPED)

    def place(self) -> Place:
        """A further processor's."""
        with self._lock:
            agreed = self._agree()
            self._places.append(Place(self))
            if self._agree() != agreed:
                self._publish(self._places)
            return self._places[-1]

    def changed(self, place: Place, msr: int, adjust: int) -> None:
        """For :class:`Place`. As long as they agree, no other processor's place changes."""
        with self._lock:
            agreed = self._agree()
            place.msr, place.adjust = msr, adjust
            self._publish([place] if self._agree() == agreed else self._places)

    def _agree(self) -> bool:
        return all(one.adjust == self._places[0].adjust for one in self._places)

    def _publish(self, places: list[Place], flags: int = 0) -> None:
        if self._agree():
            flags |= TSC_STABLE
        counter, ns = self._began
        for place in places:
            if place.msr & ENABLE:
                gpa = place.msr & ~ENABLE
                stamp = counter + place.adjust & _M64
                kept = self._flags(gpa) & GUEST_STOPPED
                data = _time_info.pack(stamp, ns & _M64, self._mul, self._shift, flags | kept)
                publish(self._memory, gpa, data)

    def _flags(self, gpa: int) -> int:
        try:
            return self._memory.load_u8(gpa + FLAGS)
        except MemoryFault:
            return 0


class Place:
    """Where one processor is told the time, and what the guest added to its TSC."""

    def __init__(self, clock: KvmClock) -> None:
        self._clock = clock
        self.msr = 0
        """MSR_KVM_SYSTEM_TIME."""
        self.adjust = 0

    @property
    def wall(self) -> WallClock:
        return self._clock.wall

    def write_msr(self, value: int) -> bool:
        """It always succeeds."""
        self._clock.changed(self, value, self.adjust)
        return True

    def adjusted(self, adjust: int) -> None:
        """IA32_TSC_ADJUST is another."""
        self._clock.changed(self, self.msr, adjust)


def scale(hz: int) -> tuple[int, int]:
    """tsc_to_system_mul and tsc_shift for a TSC of that frequency: ns = (ticks << shift) * mul >> 32, where mul has 32
    significant bits."""
    shift = 1 - ((hz - 1) // NS).bit_length()
    while hz << max(shift, 0) <= NS:
        shift += 1
    return (NS << 32 - shift) // hz, shift
