"""What translated code does of its local APIC's work: EOI, IA32_TSC_DEADLINE, and the timer's interrupt.

It stands in the state block, where system_runtime.py reads and writes it; ``apic`` is 1 while it does.
"""

from __future__ import annotations

from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.translate.layout import StateBlock
from skep.engine.translate.ticks import Ticker

_M64 = (1 << 64) - 1


class ApicLoan:
    """One vCPU's (:class:`skep.contracts.interrupts.Loan`), used on its thread."""

    def __init__(self, st: StateBlock, ticker: Ticker) -> None:
        self._st = st
        self._alarm = ticker.alarm(st)
        hz = tsc_hz()
        st.tick = self._alarm.fileno()
        st.tick_scale = (10**9 << 32) // hz
        st.tick_most = min(hz // 2, (1 << 31) - 1)  # times the scale, that fits 64 bits and is less than a second

    def close(self) -> None:
        self._alarm.close()

    def rest(self) -> None:
        """Guest code does not run for a while."""
        st = self._st
        st.apic = 0
        if st.apic_armed:
            st.apic_armed = 0
            self._alarm.cancel()

    def give(self, service: int, vector: int, deadline: int) -> None:
        st = self._st
        st.apic_service, st.apic_vector = service, vector
        if deadline:
            deadline = deadline + st.tsc_adjust & _M64 or 1
        st.apic_deadline = deadline
        armed = st.apic_armed
        if deadline and (not armed or deadline < armed):
            st.apic_armed = deadline
            left = deadline - (read_tsc() + st.tsc_offset & _M64)
            self._alarm.set((min(max(left, 0), st.tick_most) * st.tick_scale >> 32) + 1)
        st.apic = 1

    def take(self) -> tuple[int, int]:
        st = self._st
        st.apic = 0
        deadline = st.apic_deadline
        if deadline:
            deadline = deadline - st.tsc_adjust & _M64 or 1
        return st.apic_service, deadline
