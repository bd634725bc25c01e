"""What the vCPUs of one VM share."""

from __future__ import annotations

from collections.abc import Callable

from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace
from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.translate.blocks import Cache
from skep.engine.translate.kvmclock import KvmClock
from skep.engine.translate.loan import Directory
from skep.engine.translate.overlays import Overlays
from skep.engine.translate.pairs import Pairs
from skep.engine.translate.ticks import Ticker
from skep.engine.translate.turns import Turns, host_cpus
from skep.engine.translate.watch import PerfMap
from skep.memory import GuestMemory


class Shared:
    """A VM's memory and devices, and the translations of its code."""

    def __init__(
        self,
        memory: GuestMemory,
        io: IoSpace,
        max_vcpus: int,
        cpu_model: str,
        tsc_offset: int,
        cache: Cache,
        time_of_day: Callable[[], int] | None,
    ) -> None:
        self.memory = memory
        self.io = io
        self.max_vcpus = max_vcpus
        self.cpu_model = cpu_model
        self.tsc_offset = tsc_offset
        self.cache = cache
        self.pairs = Pairs(memory)
        self.overlays = Overlays(memory, cache, self.pairs)
        self.ticker = Ticker(self.cache.stubs["watch_ticks"])
        self.turns = Turns(self.cache.stubs["watch_turns"], max_vcpus) if max_vcpus > host_cpus() else None
        self.directory = Directory(max_vcpus)
        self.interrupts: list[LocalInterrupts] = []
        """All local APICs of vCPUs that were made."""
        self.clock: KvmClock | None = None
        """Where guests have kvm-clock."""
        if time_of_day is not None:
            self.clock = KvmClock(memory, tsc_hz(), lambda: read_tsc() + self.tsc_offset, time_of_day)
        self.constants = 0
        """Host address of a table of ports (contracts/constantports.py), or 0."""
        self.names: PerfMap | None = None

    def name_code(self) -> None:
        """Tell Linux perf what code is called, from now on."""
        cache = self.cache
        self.names = PerfMap()
        self.names.fixed(cache.routines | cache.stubs, cache.buffer.rx + cache.first)

    def close(self) -> None:
        if self.names is not None:
            self.names.close()
        self.ticker.close()
        if self.turns is not None:
            self.turns.close()
        self.pairs.close()
        self.cache.close()
