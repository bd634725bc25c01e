"""Guest debug: KVM leaves the guest for a debugger's places, steps and INT3 (api.rst, KVM_SET_GUEST_DEBUG)."""

from __future__ import annotations

from skep.engine.amd64.debugregisters import DR6_BS, DR6_HITS, dr7, numbers
from skep.engine.amd64.registers import Vector
from skep.engine.contract import Exit, ExitReason
from skep.engine.debug import Debug, On, Place
from skep.engine.kvm import failures, uapi
from skep.engine.kvm.uapi import ioctl
from skep.errors import HostError

_DR6_OTHERS = 0xE000
"""BD, BS, BT: what else a #DB tells."""


class Debugger:
    """One vCPU's. All on its thread, or while it does not run."""

    def __init__(self, fd: int, offered: int) -> None:
        """``offered``: the flags of KVM_SET_GUEST_DEBUG that this KVM knows."""
        self._fd = fd
        self._offered = offered
        self._debug = Debug()
        self._control = 0
        self._armed: tuple[Place | None, ...] = ()
        """What KVM was told last."""
        self._stopped_at: int | None = None
        """The linear address where the guest was left; it is to pass what stopped it there."""

    def set(self, debug: Debug) -> None:
        """See :meth:`skep.engine.contract.Vcpu.set_debug`."""
        if _control(debug, step=debug.step) & ~self._offered:
            raise HostError("this KVM lacks guest debug of that kind", None, failures.TODO)
        self._debug = debug

    @property
    def stepping(self) -> bool:
        """No interrupt is to come before the next instruction."""
        return bool(self._control & uapi.GUESTDBG_SINGLESTEP)

    def begin(self) -> None:
        """A run begins."""
        if not self._control and not self._debug:
            return
        if self._stopped_at is not None and self._stopped_at != self._linear_rip():
            self._stopped_at = None
        places = self._debug.places
        armed = tuple(None if self._stopped_at == one.address and one.on is On.EXECUTE else one for one in places)
        self._tell(armed, step=self._debug.step or None in armed)

    def left(self, left: uapi.ExitDebug) -> Exit | None:
        """KVM_EXIT_DEBUG. None: the run goes on, after a look at what waits."""
        if left.exception == Vector.BP:
            return self._stop(left.pc, instruction=True)
        hits = left.dr6 & sum(1 << number for number, place in enumerate(self._armed) if place is not None)
        if self.stepping and (left.dr6 & DR6_BS or not hits):
            return self.stepped(left.pc, hits)
        if hits:
            return self._stop(left.pc, hits)
        self._give_back(left.dr6)
        return None

    def stepped(self, at: int | None = None, hits: int = 0) -> Exit | None:
        """An instruction is done, and the guest is at a linear address: where it says, unless it is given. As
        :meth:`left`."""
        if hits or self._debug.step:
            return self._stop(self._linear_rip() if at is None else at, hits, step=self._debug.step)
        self._stopped_at = None
        self._tell(self._debug.places, step=False)
        return None

    def _stop(self, at: int, hits: int = 0, *, step: bool = False, instruction: bool = False) -> Exit:
        self._stopped_at = at
        return Exit(ExitReason.DEBUG, {"places": numbers(hits), "step": step, "instruction": instruction})

    def _tell(self, armed: tuple[Place | None, ...], *, step: bool) -> None:
        control = _control(self._debug, step=step)
        if step:
            control |= uapi.GUESTDBG_BLOCKIRQ & self._offered
        if (control, armed) != (self._control, self._armed):
            self._control, self._armed = control, armed
            ioctl(self._fd, uapi.SET_GUEST_DEBUG, self._request())

    def _request(self) -> uapi.GuestDebug:
        request = uapi.GuestDebug(control=self._control)
        for number, place in enumerate(self._armed):
            if place is not None:
                request.debugreg[number] = place.address
        request.debugreg[7] = dr7(self._armed)
        return request

    def _give_back(self, dr6: int) -> None:
        """A #DB of the guest's own, which KVM leaves to us while it has places."""
        registers = uapi.Debugregs()
        ioctl(self._fd, uapi.GET_DEBUGREGS, registers)
        registers.dr6 = registers.dr6 & ~DR6_HITS | dr6 & _DR6_OTHERS
        ioctl(self._fd, uapi.SET_DEBUGREGS, registers)
        request = self._request()
        request.control |= uapi.GUESTDBG_INJECT_DB
        ioctl(self._fd, uapi.SET_GUEST_DEBUG, request)

    def _linear_rip(self) -> int:
        regs, sregs = uapi.Regs(), uapi.Sregs()
        ioctl(self._fd, uapi.GET_REGS, regs)
        ioctl(self._fd, uapi.GET_SREGS, sregs)
        rip: int = regs.rip if sregs.cs.l else regs.rip + sregs.cs.base & 0xFFFF_FFFF
        return rip


def _control(debug: Debug, *, step: bool) -> int:
    control = uapi.GUESTDBG_SINGLESTEP * step | uapi.GUESTDBG_USE_SW_BP * debug.instruction
    control |= uapi.GUESTDBG_USE_HW_BP * bool(debug.places)
    return control and control | uapi.GUESTDBG_ENABLE
