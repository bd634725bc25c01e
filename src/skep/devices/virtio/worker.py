"""Who does a device's data half: a thread behind a doorbell, or whoever comes along.

The worker shares with the configuration half nothing but guest memory and the few words below, so that it holds no lock
while it moves data. It runs in *turns*, one at a time. During a turn it may touch guest memory and its backend, and
holds no lock; after every turn it *reports*, which is where it takes the board lock to interrupt the guest.

To wake a thread takes longer than most requests. So a thread that brings work *visits*: it takes a turn by itself, and
what would keep it waiting, or for long, is left to the worker's own thread, which sleeps on an eventfd until it rings.

Whoever wants the worker to stop *holds* it: no turn begins any more, and the one under way is to end soon. Holding does
not wait, so a vCPU thread may do it under the board lock.

A turn may leave something *unfinished* that another thread does meanwhile. The worker is idle when no turn is under way
and nothing is unfinished; also while it is held, turns go on until then, and are to begin nothing new.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from skep import bells
from skep.locks import Lock, Order

_OURS = 1 << 32
"""What we ring with; an engine's rings are counted below."""


class Worker:
    """``turn`` works for a while, told whether a visitor does it, and returns whether there is more to do; ``report``
    follows each turn, without locks. ``unfinished`` counts what turns have left to other threads; its growing is a
    turn's doing, and a fall is followed by a visit or a ring. ``rung`` comes before the turn where an engine rang: it
    does not say for what.

    The thread starts with the first :meth:`release`. An exception in a turn is ours: it goes to ``failed``, and the
    report that follows is to stop what goes wrong.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[bool], bool],
        report: Callable[[], None],
        unfinished: Callable[[], int],
        failed: Callable[[BaseException], None],
        rung: Callable[[], None],
    ) -> None:
        self.name = name
        self.held = True
        """A turn looks at it between requests, and ends where it is set. Only hold and release change it."""
        self._turn = turn
        self._report = report
        self._unfinished = unfinished
        self._failed = failed
        self._rung = rung
        self._lock = Lock(f"{name} worker", Order.BLOCK)
        self._idle = threading.Event()
        self._idle.set()
        self._turning = False
        self._missed = False
        """Somebody came during a turn, with work that the turn may not have seen."""
        self.bell = os.eventfd(0, os.EFD_CLOEXEC)
        """For an engine to ring, by adding 1."""
        self._closing = False
        self._thread: threading.Thread | None = None

    def ring(self) -> None:
        """From any thread, and never lost: a turn on the worker's own thread."""
        # A vCPU thread may do it under the board lock. If it let go of the interpreter there, the worker would run at
        # once, and soon wait for that lock.
        bells.ring(self.bell, _OURS)

    def visit(self) -> None:
        """From any thread, without locks: take a turn here and now. Where one is under way, what has come is seen to
        after it."""
        if self._begin():
            self._do(visiting=True)

    def hold(self) -> bool:
        """Begin nothing new. True where it is idle; otherwise it soon will be, and a report follows."""
        with self._lock:
            self.held = True
            return self._idle.is_set()

    def release(self) -> None:
        """Let turns begin, and begin one."""
        if self._closing:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
        self.held = False
        self.ring()

    @property
    def idle(self) -> bool:
        return self._idle.is_set()

    def wait_idle(self) -> None:
        """After :meth:`hold`: return when it is idle. A turn needs no lock to end, but waits for its I/O."""
        self._idle.wait()

    def close(self) -> None:
        """End the thread. The caller holds no lock that ``report`` takes. Closing twice is closing once."""
        if self._closing:
            return
        self.hold()
        self.wait_idle()
        self._closing = True
        self.ring()
        if self._thread is not None:
            self._thread.join()
        os.close(self.bell)

    def _run(self) -> None:
        while not self._closing:
            if os.eventfd_read(self.bell) % _OURS:
                self._rung()
            if self._begin():
                self._do(visiting=False)

    def _begin(self) -> bool:
        with self._lock:
            if self._turning:
                self._missed = True
                return False
            if self.held and self._idle.is_set():
                return False
            self._turning = True
            self._idle.clear()
            return True

    def _do(self, *, visiting: bool) -> None:
        more = False
        try:
            more = self._turn(visiting)
        except Exception as error:
            self._failed(error)
        with self._lock:
            self._turning = False
            if more or self._missed:
                self._missed = False
                self.ring()  # before it is idle: whoever closes it waits for that
            if not self._unfinished():
                self._idle.set()
        self._report()
