"""The local APIC's timer: one-shot, periodic, TSC-deadline (Intel SDM 3, 11.5.4).

The count is a function of guest time since it was written. The input clock is :data:`TIMER_HZ`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from skep.state import Fields

if TYPE_CHECKING:
    from skep.clock import GuestClock

TIMER_HZ = 1_000_000_000
"""The timer's clock before the divider: one tick a nanosecond. Guests find it by calibration or CPUID."""
MIN_PERIOD_NS = 50_000
"""A periodic timer fires no oftener; the count that the guest reads is right nevertheless."""

ONE_SHOT, PERIODIC, TSC_DEADLINE = range(3)
"""Bits 18:17 of the timer's LVT entry; 3 is reserved, and behaves as a one-shot here."""


class ApicTimer(Fields):
    """``expired`` is called under the board lock, mostly on the clock's thread."""

    name = "lapic timer"
    state_fields: ClassVar[tuple[str, ...]] = ("mode", "initial_count", "divide", "start", "deadline", "tsc_deadline")

    def __init__(self, clock: GuestClock, expired: Callable[[], None]) -> None:
        self._clock = clock
        self._expired = expired
        self._timer = clock.timer(self._fire)
        self.reset()

    def reset(self) -> None:
        self.mode = ONE_SHOT
        self.initial_count = 0
        self.divide = 0
        """The divide configuration register."""
        self.start = 0
        """When the count was written, in ns of guest time, as if the divider had always been what it is."""
        self.deadline = 0
        """When the count expires next, in ns of guest time; 0: not at all."""
        self.tsc_deadline = 0
        """IA32_TSC_DEADLINE; 0: not armed."""
        self._timer.cancel()

    def close(self) -> None:
        self._timer.close()

    def loaded(self) -> None:
        self._arm()

    def set_mode(self, mode: int) -> None:
        """The LVT entry was written. Entering or leaving TSC-deadline mode disarms (11.5.4.1)."""
        if mode == self.mode:
            return
        left = self.current_count()
        if TSC_DEADLINE in (mode, self.mode):
            self.initial_count = self.deadline = self.tsc_deadline = 0
        self.mode = mode
        self._go_on(left)

    def set_divide(self, divide: int) -> None:
        left = self.current_count()
        self.divide = divide
        self._go_on(left)

    def set_initial_count(self, count: int) -> None:
        if self.mode != TSC_DEADLINE:
            self.initial_count = count
            self.start = self._clock.now_ns()
            self._count_from(self.start, count)

    def set_tsc_deadline(self, deadline: int) -> None:
        if self.mode != TSC_DEADLINE:
            return
        self.tsc_deadline = deadline
        if deadline and self._clock.tsc() >= deadline:  # past already: no need to wake the clock's thread
            self._timer.cancel()
            self._fire()
        else:
            self._arm()

    def lend(self) -> int:
        """The TSC deadline, which somebody else watches from here on."""
        if self._timer.deadline is not None:
            self._timer.cancel()
        return self.tsc_deadline

    def take_back(self, deadline: int) -> None:
        """What the deadline is by now. It is not watched before ``settle``."""
        self.tsc_deadline = deadline
        if deadline and self._clock.tsc() >= deadline:
            self._fire()

    def settle(self) -> None:
        if self.tsc_deadline and self._timer.deadline is None:
            self._arm()

    def set_left(self, left: int) -> None:
        """The count is at ``left`` now; 0: it does not run. Nothing is armed."""
        now = self._clock.now_ns()
        self.start = now - (self.initial_count - left) * self._divider()
        self.deadline = now + left * self._divider() if left else 0

    def current_count(self) -> int:
        if not self.deadline:
            return 0
        gone = (self._clock.now_ns() - self.start) // self._divider()
        if self.mode == PERIODIC:
            return self.initial_count - gone % self.initial_count
        return max(self.initial_count - gone, 0)

    def _divider(self) -> int:
        """Nanoseconds a count, as TIMER_HZ is 1 GHz."""
        code = (self.divide & 8) >> 1 | self.divide & 3
        return 1 if code == 7 else 2 << code

    def _go_on(self, left: int) -> None:
        """The count, if it runs, goes on from ``left`` in the present mode, at the present rate."""
        if self.deadline:
            now = self._clock.now_ns()
            self.start = now - (self.initial_count - left) * self._divider()
            self._count_from(now, left)
        else:
            self._arm()

    def _count_from(self, now: int, count: int) -> None:
        # Not compared with the clock: however late it is by now, the expiry is still to come.
        ahead = count * self._divider()
        if self.mode == PERIODIC:
            ahead = max(ahead, MIN_PERIOD_NS)
        self.deadline = now + ahead if self.initial_count else 0
        self._arm()

    def _arm(self) -> None:
        if self.tsc_deadline:
            self._timer.arm_tsc(self.tsc_deadline)
        elif self.deadline:
            self._timer.arm(self.deadline)
        else:
            self._timer.cancel()

    def _fire(self) -> None:
        if self.mode == PERIODIC:
            now = self._clock.now_ns()
            period = self.initial_count * self._divider()
            expiries = (now - self.start) // period  # those that were missed are one in IRR anyway
            self.deadline = max(self.start + (expiries + 1) * period, now + MIN_PERIOD_NS)
            self._arm()
        else:
            self.deadline = self.tsc_deadline = 0
        self._expired()
