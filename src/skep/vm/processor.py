"""A virtual processor's thread."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from skep.engine.contract import Activity as Doing
from skep.engine.contract import EngineVm, Exit, ExitReason, Vcpu
from skep.errors import EngineLimit, InternalError, UserError
from skep.explain.subject import Activity, Seen
from skep.machine import Board
from skep.vm.states import End, Outcome, failure

PATIENCE = 30.0
"""Seconds after which a processor that does not answer is ours to explain."""
LOOKS = 5
"""How often a processor is looked at to tell whether it spins."""
_BETWEEN_LOOKS = 0.0005
"""Seconds after which it is looked again whether the engine has frozen a processor."""
_DOING = {Doing.ACTIVE: "running", Doing.HALTED: "halted", Doing.WAITING: "waiting to be started"}
_SPIN = 256
"""Bytes of code in which a processor spins that is never seen elsewhere."""


class Processor:
    """One virtual processor and its thread.

    The thread runs guest code; whatever else is wanted of it is a flag that somebody sets before waking it, and that it
    looks at in :meth:`_attend`, between two runs of the engine. A flag set while it runs is followed by a request to
    the engine to come back, so that none is missed. To pause it, its thread is not needed where it waits for an
    interrupt, or where the engine has frozen it in the middle of a run.
    """

    def __init__(
        self,
        name: str,
        index: int,
        board: Board,
        engine_vm: EngineVm,
        over: Callable[[Processor, Outcome], None],
        hopeless: Callable[[], None],
        *,
        paused: bool,
        hosted: bool,
    ) -> None:
        """``name`` is the VM's. From the processor's thread, ``over`` is told that the VM must end, and ``hopeless``
        that the processor halted with interrupts off. ``hosted``: its local APIC is the engine's, which waits in a halt
        by itself."""
        self.index = index
        self.hopeless = False
        """Halted with interrupts off."""
        self._name = name
        self._tell_over = over
        self._tell_hopeless = hopeless
        self._board = board
        self._engine_vm: EngineVm | None = engine_vm
        self._vcpu: Vcpu | None = None
        self._thread: threading.Thread | None = None
        self.clock: int | None = None
        """Of the processor time that its thread uses, for :func:`time.clock_gettime_ns`; None: it has not begun."""
        self._wake = threading.Event()
        self._sleeping = False
        self._guard = threading.Lock()  # of pausing and parking, and of the thread's beginning
        self._hosted = hosted
        self._paused = paused
        self._parked = threading.Event()
        self._resting = False
        """It waits to be woken, and looks at ``_paused`` before it does anything else."""
        self._woken = False
        """It was, while it was paused, and did not look what for."""
        self._resumptions = 0
        self._errands: deque[Callable[[], None]] = deque()
        """To be done on its thread, between two runs of guest code, whatever else it waits for."""
        self._ending = False
        self._held = True
        """It waits for its start: an application processor between INIT and SIPI."""
        self._next_state: Any = None
        self._halted: bool | None = None
        """It executed HLT; the value is RFLAGS.IF."""
        self._end: Activity | None = None
        """How it ended: FAULTED, by a triple fault, or STOPPED."""
        board.on_kick(index, self.kick)

    # From other threads.

    def prepare(self, state: Any) -> None:
        """Where its local APIC is the engine's: be there, in ``state``, before any processor runs, whose messages would
        be lost otherwise. ``begin`` follows."""
        if self._engine_vm is None:
            raise InternalError("a processor is made after its end")
        self._vcpu = self._engine_vm.create_vcpu(self.index, self._board.interrupts(self.index))
        self._vcpu.set_state(state)

    def begin(self, state: Any) -> None:
        """Start in ``state``. Ignored unless it waits for that."""
        with self._guard:
            if not self._held or self._next_state is not None or self._ending:
                return
            self._next_state = state
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._main, name=f"skep-{self._name}-cpu{self.index}", daemon=True
                )
                self._thread.start()
        self._wake.set()

    @property
    def begun(self) -> bool:
        return self._thread is not None

    def hold(self) -> None:
        """Stop, and wait for the next ``begin``."""
        with self._guard:
            self._held = True
            self._next_state = None
        self._interrupt()

    def kick(self) -> None:
        """An interrupt waits, perhaps."""
        vcpu = self._vcpu
        if vcpu is not None:
            vcpu.kick()
        if self._sleeping:
            self._wake.set()

    def pause(self) -> None:
        """Stand still, the engine having been frozen."""
        with self._guard:
            self._paused = True
            if self._resting:
                self._parked.set()
                return
        if not self._frozen():
            self._interrupt()

    def wait_until_parked(self) -> None:
        """After ``pause``: no guest code runs, and none will."""
        end = time.monotonic() + PATIENCE
        while self._thread is not None and not self._parked.is_set():
            if self._frozen():
                self._parked.set()
            elif not self._parked.wait(_BETWEEN_LOOKS) and time.monotonic() > end:
                raise InternalError(f"processor {self.index} does not stop")

    def _frozen(self) -> bool:
        vcpu = self._vcpu
        return vcpu is not None and vcpu.frozen()

    def seen(self, places: tuple[int, ...] = ()) -> Seen:
        """What it is doing, while it is parked; ``places`` are where it was, at several moments, before."""
        vcpu = self._vcpu
        if vcpu is None or (self._held and self._end is None):
            return Seen(self.index, Activity.NOT_STARTED, {})
        registers = vcpu.get_state()
        activity = Activity.RUNNING
        if self._end is not None:
            activity = self._end
        elif registers.get("activity") == Doing.WAITING:
            activity = Activity.NOT_STARTED
        elif registers.get("activity") == Doing.HALTED:
            activity = Activity.IDLE if self._board.hears_interrupts(registers) else Activity.HALTED
        elif self._halted is not None or vcpu.activity is Doing.HALTED:
            activity = Activity.HALTED if self.hopeless else Activity.IDLE
        elif len(places) == LOOKS and max(places) - min(places) < _SPIN:
            activity = Activity.SPINNING
        return Seen(self.index, activity, registers, places, tuple(vcpu.exits.last()), vcpu.exits.refused())

    def save(self) -> dict[str, Any]:
        """Its state, while it is parked."""
        vcpu = self._vcpu
        if self._hosted and vcpu is not None:
            return vcpu.get_state()
        if self._next_state is not None:  # started, and did not come to it yet
            return dict(self._next_state)
        if vcpu is None or self._held:
            return {"activity": Doing.WAITING.value}
        state = vcpu.get_state()
        if self._halted is not None or vcpu.activity is Doing.HALTED:
            state["activity"] = Doing.HALTED.value
        return state

    def sleeps(self) -> Activity:
        """What it does while it is parked, if its local APIC is the engine's, as exactly as a verdict needs it: HALTED
        where nothing is on its way that would wake it, and nothing but an NMI or a reset ever will."""
        vcpu = self._vcpu
        if vcpu is None:
            return Activity.NOT_STARTED
        state = vcpu.get_state()
        if state.get("activity") == Doing.WAITING:
            return Activity.NOT_STARTED
        if state.get("activity") != Doing.HALTED:
            return Activity.RUNNING
        hears = self._board.hears_interrupts(state) or state.get("nmi_pending") or self._board.wakes(self.index, False)
        return Activity.IDLE if hears else Activity.HALTED

    def resume(self) -> None:
        """Go on when the engine is thawed, which comes next."""
        with self._guard:
            self._paused = False
            self._parked.clear()
            self._resumptions += 1
            woken, self._woken = self._woken, False
        if woken:
            self._wake.set()

    @property
    def doing(self) -> str:
        if self._thread is None or self._held:
            return "waiting to be started"
        if self._parked.is_set():
            return "frozen"
        vcpu = self._vcpu
        if self._halted is not None:
            return "halted"
        return _DOING[Doing.ACTIVE if vcpu is None else vcpu.activity]

    @property
    def thread(self) -> int | None:
        """The kernel's number of its thread."""
        return None if self._thread is None else self._thread.native_id

    def tally(self) -> dict[str, int]:
        """What it left guest code for; see :meth:`skep.engine.contract.Vcpu.tally`."""
        vcpu = self._vcpu
        return {} if vcpu is None else vcpu.tally()

    def registers(self, timeout: float) -> dict[str, Any]:
        answer: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()

        def take() -> None:
            try:
                answer.put({} if self._vcpu is None else self._vcpu.get_state())
            except Exception as error:  # theirs who asked, not the guest's
                answer.put(error)

        if self._thread is None or self._ending:
            return {}
        resumptions = self._resumptions
        if self._parked.is_set():  # its thread may be asleep
            take()
            if self._resumptions == resumptions:
                return self._answered(answer.get())
            answer.get()
        self._errands.append(take)
        self._interrupt()
        try:
            state = answer.get(timeout=timeout)
        except queue.Empty:
            raise UserError(
                f"processor {self.index} does not answer", self._name, "its thread's stack may say why"
            ) from None
        return self._answered(state)

    @staticmethod
    def _answered(state: dict[str, Any] | Exception) -> dict[str, Any]:
        if isinstance(state, Exception):
            raise state
        return state

    def leave(self) -> None:
        """Run no more guest code, and end."""
        with self._guard:
            self._ending = True
        self._interrupt()

    def join(self) -> None:
        """After ``leave``, with the engine thawed: the thread is over when it returns, the vCPU closed, and nothing of
        the engine is held any more."""
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                raise InternalError(f"processor {self.index} does not end")
        self._vcpu = self._engine_vm = None

    def _interrupt(self) -> None:
        vcpu = self._vcpu
        if vcpu is not None:
            vcpu.request_exit()
        self._wake.set()

    # On its own thread.

    def _main(self) -> None:
        try:
            self.clock = time.pthread_getcpuclockid(threading.get_ident())
            self._board.enter_cpu(self.index)
            while (vcpu := self._attend()) is not None:
                self._handle(vcpu.run(), vcpu)
        except BaseException as error:
            self._fail(error)
        finally:
            self._parked.set()
            if self._vcpu is not None:
                self._vcpu.close()

    def _attend(self) -> Vcpu | None:
        """Do what was asked, wait while there is nothing to run; None when it is over."""
        self._sleeping = True  # before looking: what comes after the look wakes us
        while not self._ending:
            while self._errands:
                self._errands.popleft()()
            with self._guard:
                paused = self._woken = self._paused
                if paused:
                    self._parked.set()
            if paused:
                pass
            elif self._held:
                if self._next_state is not None:
                    self._set_going()
                    continue
            elif self._halted is None or self._board.wakes(self.index, self._halted):
                self._halted, self.hopeless, self._sleeping = None, False, False
                return self._vcpu
            with self._guard:
                self._resting = True
            self._wake.wait()
            self._wake.clear()
            with self._guard:
                self._resting = False
        return None

    def _set_going(self) -> None:
        vcpu = self._vcpu
        if vcpu is None:
            if self._engine_vm is None:
                raise InternalError(f"processor {self.index} was started after its end")
            vcpu = self._vcpu = self._engine_vm.create_vcpu(self.index, self._board.interrupts(self.index))
        with self._guard:
            state, self._next_state = self._next_state, None
            if state is None:  # held again meanwhile
                return
            self._held = False
        vcpu.set_state(state)
        if self._board.wakes(self.index, True):
            vcpu.kick()  # it has waited since before there was anybody to tell
        halted = state.get("activity") == Doing.HALTED and not self._hosted
        self._halted = self._board.hears_interrupts(state) if halted else None

    def _handle(self, exit_: Exit, vcpu: Vcpu) -> None:
        match exit_.reason:
            case ExitReason.KICKED:
                pass
            case ExitReason.HALTED:
                self._halted = bool(exit_.detail["interrupts"])
                if not self._halted and not self._board.wakes(self.index, False):
                    self.hopeless = True
                    self._tell_hopeless()
            case ExitReason.SHUTDOWN:
                self._end = Activity.FAULTED
                self._over(Outcome(End.TRIPLE_FAULT, vcpu.get_state()))
            case ExitReason.FAILED:
                self._end = Activity.STOPPED
                self._fail(EngineLimit(str(exit_.detail.get("message", "the engine gave no reason"))))

    def _fail(self, error: BaseException) -> None:
        self._over(failure(error, f"processor {self.index}"))

    def _over(self, outcome: Outcome) -> None:
        """Nothing more to run here; the VM decides what follows."""
        self._held = True
        self._tell_over(self, outcome)
