"""KVM's kvm-clock of one VM (:mod:`skep.engine.amd64.kvmclock`): where it stands beside the guest's TSC."""

from __future__ import annotations

from collections.abc import Callable

from skep.engine.amd64.kvmclock import NS, WallClock
from skep.engine.amd64.tsc import guest_counter
from skep.engine.kvm import uapi
from skep.memory import GuestMemory

_M64 = (1 << 64) - 1


class KvmClock:
    """``fd`` is the VM's, ``tsc_hz`` and ``tsc_offset`` are its TSC's.

    The kernel's clock goes on in a freeze. At the thaw it is put back by as much as the TSC was, which is some calls
    of the kernel's earlier: the guest runs only after both, and sees neither go backwards.
    """

    def __init__(
        self, fd: int, memory: GuestMemory, tsc_hz: int, tsc_offset: int, time_of_day: Callable[[], int]
    ) -> None:
        self._fd = fd
        self._counter, self._hz = guest_counter(tsc_hz // 1000)
        self.tsc_offset = tsc_offset
        """In force."""
        self.wall = WallClock(memory, self._now, time_of_day)

    def at(self, tsc: int) -> int:
        """What it says when the TSC is at ``tsc``, to the microsecond, and not too little."""
        passed = tsc - self._counter() - self.tsc_offset
        return self._now() + passed * NS // self._hz

    def set(self, tsc: int, ns: int) -> None:
        """It says ``ns`` when the TSC is at ``tsc``."""
        passed = self._counter() + self.tsc_offset - tsc
        uapi.ioctl(self._fd, uapi.SET_CLOCK, uapi.ClockData(clock=ns + passed * NS // self._hz & _M64))

    def _now(self) -> int:
        data = uapi.ClockData()
        uapi.ioctl(self._fd, uapi.GET_CLOCK, data)
        now: int = data.clock
        return now - (now >> 63 << 64)  # a VM that is loaded may not be as old as what it goes on with, until its thaw
