"""Guest time: one counter that stops while the VM is frozen, and the timers that follow it.

Time is counted in ticks of a counter of the host's (on amd64 boards the TSC, of which the guest sees a copy). The
guest's counter is the host's plus :attr:`GuestClock.tsc_offset`; it starts at 0 when the clock is made, and freezing
moves the offset, so that nothing jumps at the thaw. Nanoseconds are derived from ticks, so a guest that compares
its TSC with a timer's interrupt finds them agreeing.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from skep.alarm import Alarm
from skep.locks import Lock, Order

Callback = Callable[[], None]
OffsetListener = Callable[[int], None]

_LONGEST_WAIT = 3600  # seconds; a guest may ask for more than the host's timers take


class Timer:
    """One pending callback at most. Made by :meth:`GuestClock.timer`; used under the board lock."""

    __slots__ = ("_clock", "callback", "deadline", "serial")

    def __init__(self, clock: GuestClock, callback: Callback, serial: int) -> None:
        self._clock = clock
        self.callback = callback
        self.serial = serial
        self.deadline: int | None = None
        """In ticks of the guest's counter; None while not armed."""

    def arm(self, deadline_ns: int) -> None:
        """Call back when ``now_ns()`` has reached ``deadline_ns``, at once if it has. Replaces what was armed."""
        self._clock._arm(self, self._clock.ticks(deadline_ns))

    def arm_tsc(self, deadline_tsc: int) -> None:
        """The same, when ``tsc()`` has reached ``deadline_tsc``."""
        self._clock._arm(self, deadline_tsc)

    def cancel(self) -> None:
        """After it, under the board lock, the callback does not come."""
        self._clock._arm(self, None)

    def close(self) -> None:
        self.cancel()


class GuestClock:
    """The time of one VM.

    ``counter`` is the host's, which never stops and never goes back; ``hz`` its frequency. Timers' callbacks come from
    one thread of the clock's, holding ``lock`` (the board's), so they are atomic with everything else a device
    does. What a callback raises goes to ``on_error``, and the clock goes on.
    """

    def __init__(
        self,
        counter: Callable[[], int],
        hz: int,
        lock: AbstractContextManager[object] | None = None,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.counter = counter
        self.hz = hz
        self.tsc_offset = -counter()
        self._board: AbstractContextManager[object] = lock if lock is not None else nullcontext()
        self._on_error = on_error
        self._lock = Lock("clock", Order.CLOCK)
        self._queue: list[tuple[int, int, Timer]] = []  # armed timers, the earliest first: one entry a timer
        self._serial = 0
        self._frozen_at: int | None = None
        self._listeners: tuple[OffsetListener, ...] = ()
        self._alarm = Alarm()
        self._set_for: int | None = None  # the deadline that the alarm is set for; None: it is not
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="skep-clock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No callback runs when it returns. Not from a callback, and not under the board lock."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            self._alarm.set(0)
        self._thread.join()
        self._alarm.close()
        self._listeners = ()

    def tsc(self) -> int:
        """The guest's counter, without what a guest's own write to its TSC added."""
        frozen = self._frozen_at
        return frozen if frozen is not None else self.counter() + self.tsc_offset

    def now_ns(self) -> int:
        """Guest time: nanoseconds since the clock was made, less the time it was frozen."""
        return self.tsc() * 1_000_000_000 // self.hz

    def ticks(self, ns: int) -> int:
        """The first tick at which ``now_ns()`` is at least ``ns``."""
        return -(-ns * self.hz // 1_000_000_000)

    @property
    def frozen(self) -> bool:
        return self._frozen_at is not None

    def freeze(self) -> None:
        """Time stands still when it returns, and no callback runs or comes. Freezing twice is freezing once."""
        with self._board, self._lock:
            if self._frozen_at is None:
                self._frozen_at = self.tsc()

    def thaw(self) -> None:
        """Time goes on where it stood. Listeners learn the new ``tsc_offset`` before any timer fires."""
        with self._board:
            with self._lock:
                if self._frozen_at is None:
                    return
                self.tsc_offset = self._frozen_at - self.counter()
            for listener in self._listeners:
                listener(self.tsc_offset)
            with self._lock:
                self._frozen_at = None
                self._set_alarm()

    def load(self, ticks: int) -> None:
        """While it is frozen: the guest's counter is at ``ticks``."""
        with self._board, self._lock:
            if self._frozen_at is None:
                raise ValueError("the clock runs")
            self._frozen_at = ticks

    def add_offset_listener(self, listener: OffsetListener) -> None:
        """``listener(tsc_offset)`` is called while the VM is frozen, whenever the offset changed."""
        self._listeners = (*self._listeners, listener)

    def remove_offset_listener(self, listener: OffsetListener) -> None:
        self._listeners = tuple(one for one in self._listeners if one != listener)

    def timer(self, callback: Callback) -> Timer:
        with self._lock:
            self._serial += 1
            return Timer(self, callback, self._serial)

    def _arm(self, timer: Timer, deadline: int | None) -> None:
        with self._lock:
            if timer.deadline is not None:
                self._queue.remove((timer.deadline, timer.serial, timer))
            timer.deadline = deadline
            if deadline is None:
                return
            insort(self._queue, (deadline, timer.serial, timer))
            self._set_alarm()

    def _set_alarm(self) -> None:
        """See to it that the thread wakes for the first timer. One moved back finds it waking early, once."""
        if not self._queue or self._frozen_at is not None or self._closed:
            return
        first = self._queue[0][0]
        if self._set_for is None or first < self._set_for:
            self._set_for = first
            self._alarm.set(min(first - self.tsc(), _LONGEST_WAIT * self.hz) * 1_000_000_000 // self.hz)

    def _run(self) -> None:
        while not self._closed:
            self._alarm.wait()
            with self._lock:
                self._set_for = None
            while not self._closed:
                with self._board:
                    due = self._take_due()
                    if due is None:
                        break
                    try:
                        due()
                    except Exception as e:
                        if self._on_error is None:
                            raise
                        self._on_error(e)
            with self._lock:
                self._set_alarm()

    def _take_due(self) -> Callback | None:
        """Disarm the first timer if its time has come. Under the board lock: who cancels is not overtaken."""
        with self._lock:
            if self._frozen_at is not None or not self._queue or self._queue[0][0] > self.tsc():
                return None
            timer = self._queue.pop(0)[2]
            timer.deadline = None
            return timer.callback
