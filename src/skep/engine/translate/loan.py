"""What translated code does of its local APIC's work: interrupts to and from other vCPUs, EOI, the task priority,
IA32_TSC_DEADLINE, and the timer's interrupt.

It stands in the state block, where apic_runtime.py reads and writes it; ``apic`` is 1 while it does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from skep.contracts.interrupts import IN_SERVICE, Lent
from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.translate.layout import EDGES, POSTED, TAKEN, StateBlock
from skep.engine.translate.ticks import Ticker

_M64 = (1 << 64) - 1
_POSTED = POSTED >> 3
_VECTORS = 32
"""Bytes with a bit for each."""


class ApicLoan:
    """One vCPU's (:class:`skep.contracts.interrupts.Loan`), used on its thread."""

    def __init__(self, st: StateBlock, ticker: Ticker, routines: Mapping[str, int]) -> None:
        """``routines``: host addresses of compiled ones."""
        self._st = st
        self._alarm = ticker.alarm(st)
        self._take_posted = ctypes.PYFUNCTYPE(None, ctypes.c_uint64)(routines["take_posted"])
        self._barrier = ctypes.PYFUNCTYPE(None)(routines["barrier"])
        hz = tsc_hz()
        st.tick = self._alarm.fileno()
        st.tick_scale = (10**9 << 32) // hz
        st.tick_most = min(hz // 2, (1 << 31) - 1)  # times the scale, that fits 64 bits and is less than a second

    def close(self) -> None:
        self._alarm.close()

    def rest(self) -> None:
        """Guest code does not run for a while: who posts from now on tells Python."""
        st = self._st
        st.apic = st.listening = 0
        self._barrier()
        if st.apic_armed:
            st.apic_armed = 0
            self._alarm.cancel()

    def give(self, lent: Lent, vector: int) -> None:
        st = self._st
        service, serving = 0, lent.service
        for place in range(IN_SERVICE):
            if not serving:
                break
            number = serving.bit_length() - 1
            service |= number << 8 * place
            serving ^= 1 << number
        st.apic_service, st.apic_vector = service, vector
        st.apic_task, st.apic_command = lent.task, lent.command
        deadline = lent.deadline
        if deadline:
            deadline = deadline + st.tsc_adjust & _M64 or 1
        st.apic_deadline = deadline
        armed = st.apic_armed
        if deadline and (not armed or deadline < armed):
            st.apic_armed = deadline
            left = deadline - (read_tsc() + st.tsc_offset & _M64)
            self._alarm.set((min(max(left, 0), st.tick_most) * st.tick_scale >> 32) + 1)
        st.bytes[EDGES : EDGES + _VECTORS] = bytes(_VECTORS)
        st.apic = st.listening = 1

    def take(self) -> Lent:
        st = self._st
        st.apic = 0
        deadline = st.apic_deadline
        if deadline:
            deadline = deadline - st.tsc_adjust & _M64 or 1
        service, serving = st.apic_service, 0
        while service:
            serving |= 1 << (service & 0xFF)
            service >>= 8
        edges = int.from_bytes(st.bytes[EDGES : EDGES + _VECTORS], "little")
        return Lent(serving, deadline, st.apic_task, st.apic_command, edges)

    def collect(self) -> int:
        st = self._st
        q = st.q
        if not (q[_POSTED] or q[_POSTED + 1] or q[_POSTED + 2] or q[_POSTED + 3]):
            return 0
        self._take_posted(st.address)
        return int.from_bytes(st.bytes[TAKEN : TAKEN + _VECTORS], "little")


class Directory:
    """The state blocks of a VM's vCPUs by APIC ID, where machine code finds whom it posts to."""

    def __init__(self, vcpus: int) -> None:
        self._words = (ctypes.c_uint64 * vcpus)()
        self._blocks: list[StateBlock] = []

    def enter(self, st: StateBlock, index: int) -> None:
        """The vCPU with this state block, which stays in memory until the end, can be posted to where it listens."""
        self._blocks.append(st)
        st.vcpus, st.vcpus_count = ctypes.addressof(self._words), len(self._words)
        self._words[index] = st.address
