"""How a vCPU gets its interrupts: from a local APIC outside of KVM, or from KVM's own.

Either is asked before each entry, on the vCPU's thread, and told after it. KVM says by
``ready_for_interrupt_injection`` whether the guest could take an interrupt from outside at once; if not, a window is
asked for, and KVM_RUN returns as soon as it opens.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

from skep.contracts.interrupts import HostedInterrupts, LocalInterrupts
from skep.engine.kvm import uapi
from skep.engine.kvm.uapi import ioctl


class Way(Protocol):
    """One of the two."""

    def attach(self) -> None: ...

    def offer(self, run: uapi.Run, halted: bool) -> bool:
        """Inject what waits, or ask for a window. False: the vCPU is ``halted``, and nothing wakes it."""

    def close(self) -> None: ...


class Injected:
    """From outside: KVM has no interrupt controllers, and knows of the local APIC only its CR8."""

    def __init__(self, fd: int, interrupts: LocalInterrupts) -> None:
        self._fd = fd
        self._interrupts = interrupts

    def attach(self) -> None:
        """KVM knows of no local APIC."""

    def offer(self, run: uapi.Run, halted: bool) -> bool:
        interrupts = self._interrupts
        nmi = interrupts.take_nmi()
        if nmi:
            ioctl(self._fd, uapi.NMI)
        waiting = interrupts.pending()
        if halted and not nmi and not (waiting and run.if_flag):
            return False
        run.request_interrupt_window = 0
        if waiting and not run.ready_for_interrupt_injection:
            run.request_interrupt_window = 1
        elif waiting:
            vector = interrupts.acknowledge()
            if vector is not None:
                ioctl(self._fd, uapi.INTERRUPT, (ctypes.c_uint32 * 1)(vector))
                run.ready_for_interrupt_injection = 0
                run.request_interrupt_window = interrupts.pending()
        return True

    def close(self) -> None:
        """Nothing is held."""


class Hosted:
    """From KVM's local APIC; from outside come only those of the 8259 pair, and the NMI button's."""

    def __init__(self, fd: int, interrupts: HostedInterrupts) -> None:
        self._fd = fd
        self._interrupts = interrupts

    def attach(self) -> None:
        self._interrupts.attach(KvmApic(self._fd))

    def offer(self, run: uapi.Run, halted: bool) -> bool:
        interrupts = self._interrupts
        if interrupts.take_nmi():
            ioctl(self._fd, uapi.NMI)
        run.request_interrupt_window = 0
        if interrupts.pending():
            self._inject(run)
        return True

    def _inject(self, run: uapi.Run) -> None:
        """An interrupt of the 8259 pair. It is put where KVM has those that it began to deliver, and not by
        KVM_INTERRUPT, because what waits there no state tells; a halt it has to end by itself then."""
        if not run.ready_for_interrupt_injection:
            run.request_interrupt_window = 1
            return
        vector = self._interrupts.acknowledge()
        if vector is None:
            return
        events, activity = uapi.VcpuEvents(), uapi.MpState()
        ioctl(self._fd, uapi.GET_VCPU_EVENTS, events)
        events.flags, events.interrupt_injected, events.interrupt_soft, events.interrupt_nr = 0, 1, 0, vector
        ioctl(self._fd, uapi.SET_VCPU_EVENTS, events)
        ioctl(self._fd, uapi.GET_MP_STATE, activity)
        if activity.mp_state == uapi.MP_STATE_HALTED:
            ioctl(self._fd, uapi.SET_MP_STATE, uapi.MpState(uapi.MP_STATE_RUNNABLE))
        run.ready_for_interrupt_injection = 0
        run.request_interrupt_window = self._interrupts.pending()

    def close(self) -> None:
        self._interrupts.detach()


class KvmApic:
    """See :class:`skep.contracts.interrupts.EngineApic`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def registers(self) -> bytes:
        page = uapi.LapicState()
        ioctl(self._fd, uapi.GET_LAPIC, page)
        return bytes(page.regs)

    def set_registers(self, page: bytes) -> None:
        ioctl(self._fd, uapi.SET_LAPIC, uapi.LapicState.from_buffer_copy(page))

    def read_msr(self, index: int) -> int:
        table = uapi.msrs(1)
        table.entries[0].index = index
        ioctl(self._fd, uapi.GET_MSRS, table)
        value: int = table.entries[0].data
        return value

    def write_msr(self, index: int, value: int) -> None:
        table = uapi.msrs(1)
        table.entries[0].index, table.entries[0].data = index, value
        ioctl(self._fd, uapi.SET_MSRS, table)
