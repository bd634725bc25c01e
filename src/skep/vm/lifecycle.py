"""A VM's life: its steps, one after the other, on a thread of its own."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from skep.chardev.plugs import Plugs
from skep.config import Tree, check_settings
from skep.config.settings import HUGE_PAGES
from skep.config.sugar import add_device, add_disk
from skep.engine.contract import Activity as Doing
from skep.engine.contract import Engine, EngineVm
from skep.errors import EngineLimit, InternalError, UserError
from skep.explain.explainer import Explainer
from skep.explain.subject import Activity, Cause, Seen
from skep.machine import Board, Events, build, choose_engine
from skep.memory import GuestMemory
from skep.vm.interpreter import INTERPRETER
from skep.vm.processor import LOOKS, Processor
from skep.vm.saved import VmState, put, take
from skep.vm.states import TRANSITIONS, End, Outcome, State, Step, failure
from skep.vm.stillness import INTERVAL, Stillness

if TYPE_CHECKING:
    from skep.chardev.console import Console
    from skep.explain.explanation import Explanation
    from skep.explain.watch import Watch

PROGRAM = "program"
"""The ``path`` of a serial port whose other end is the program's: see :meth:`Vm.serial`."""
_BETWEEN_LOOKS = 0.01
"""Seconds."""
_WITHIN = (Step.RESET, Step.SLEEP, Step.WAKE, Step.EXPLAIN, Step.SAVE, Step.LOOK)
"""Steps that have something to do though the state stays."""

_S = TypeVar("_S")


class _Request:
    """One step that somebody wants; ``done`` when it was taken or refused."""

    def __init__(self, step: Step, outcome: Outcome | None = None, asker: Processor | None = None) -> None:
        self.step = step
        self.outcome = outcome
        self.asker = asker
        """The processor whose guest code asked; None: the program did."""
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.state: VmState | None = None
        """What SAVE gives, and LOAD takes."""
        self.cause = Cause.ASKED
        self.silent_for = 0.0
        self.explanation: Explanation | None = None
        """What EXPLAIN found; ``cause`` and ``silent_for`` say what for."""


class Vm:
    """One virtual machine.

    Either from ``tree``, a configuration, or from keyword arguments, which only write one: ``disks`` are paths with
    options as ``skep run --disk`` takes them, ``devices`` as ``--device``; ``memory`` is text such as "512M";
    ``console`` is "program" (the default: see :attr:`console`), "stdio", "none" or whatever else ``lpc.com1.path`` may
    be. ``config`` adds keys of the tree. ``diagnostics`` is called, from any thread, with one line for the user's eyes;
    ``explained``, from the VM's own, with the reasons when the guest has failed: a triple fault, its kernel's panic, a
    halt for good, a silence of ``explain.silence`` seconds.

    Raises UserError for what is wrong with the configuration or with this host; nothing is left behind then.
    While any VM of the process runs, the interpreter's cyclic collector rests and threads take turns sooner.
    """

    def __init__(
        self,
        tree: Tree | None = None,
        *,
        kernel: str | PathLike[str] | None = None,
        initrd: str | PathLike[str] | None = None,
        cmdline: str | None = None,
        cpus: int | None = None,
        memory: str | None = None,
        disks: Iterable[str | PathLike[str]] = (),
        devices: Iterable[str] = (),
        engine: str | None = None,
        console: str | None = None,
        name: str | None = None,
        no_reboot: bool | None = None,
        config: Mapping[str, str] | None = None,
        diagnostics: Callable[[str], None] | None = None,
        explained: Callable[[Explanation], None] | None = None,
    ) -> None:
        self.tree = tree.thawed() if tree is not None else Tree()
        _write(
            self.tree,
            {
                "boot.kernel": kernel,
                "boot.initrd": initrd,
                "boot.cmdline": cmdline,
                "cpus": cpus,
                "memory.size": memory,
                "engine": engine,
                "lpc.com1.path": console if console is not None or tree is not None else PROGRAM,
                "name": name,
                "no_reboot": None if no_reboot is None else str(no_reboot).lower(),
            },
        )
        for key, value in (config or {}).items():
            self.tree[key] = value
        for disk in disks:
            add_disk(self.tree, str(disk), "disks")
        for device in devices:
            add_device(self.tree, device, "devices")
        self.tree.freeze()
        self.settings = check_settings(self.tree)
        self.name = self.settings.name
        self.state = State.CREATED
        self._diagnostics = diagnostics
        self._explained = explained
        self._watch: Watch | None = None
        self._last_seen: list[Seen] = []
        """The processors as they were at the end."""
        self._outcome: Outcome | None = None
        self._ended = threading.Event()
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._waiting: deque[_Request] = deque()
        """Taken from there, and coming next."""
        self._processors: list[Processor] = []
        self._engine_vm: EngineVm | None = None
        self.statistics: dict[str, int | float] = {}
        """What the engine did from the last power-on to the end, where the tree says ``stats``."""
        self.withheld: tuple[str, ...] = ()
        """Features of the CPU model that this host cannot give the guest; known from the start on."""
        self._tuned = False
        self._parting = False
        """The guest asked for its end or a reset, and may well halt for good until that comes."""
        self.asleep = False
        """The guest suspended the machine to RAM. It has no processors, until its clock's alarm or the power button
        wakes it."""
        self._kvm_clock_asleep = 0
        self._said_hopeless = False
        self._stillness: Stillness | None = None
        """Where processors sleep that do not tell when it is for good."""
        self.plugs = Plugs(self.name, self.say, self.stop, self._failed)
        """What the guest's ports are plugged into."""
        self._explainer = Explainer(self.tree, self.settings, self.plugs.transcript)
        self._memory: GuestMemory | None = None
        self._board: Board | None = None
        self._thread: threading.Thread | None = None
        try:
            self._engine, self.engine_why = choose_engine(
                self.settings.engine,
                self.settings.code_cache,
                self.settings.code_size,
                self.settings.kvm_irqchip,
                self.settings.kvm_dirty_ring,
            )
            huge = HUGE_PAGES[self.settings.memory_hugepages]
            self._memory = GuestMemory(
                self.settings.memory_size,
                huge=0 if huge is None and not self._engine.wants_huge_pages else huge,
                wired=self.settings.memory_wired,
            )
            self._board = build(
                self.tree,
                self.settings,
                self._memory,
                self._events(),
                self.plugs.plug,
                hosts_apics=self._engine.hosts_apics,
                hosts_chips=self._engine.hosts_chips,
                scales_tsc=self._engine.scales_tsc,
            )
        except BaseException:
            self._free()
            raise
        self._thread = threading.Thread(target=self._main, name=f"skep-{self.name}", daemon=True)
        self._thread.start()

    # What a program does with it. All but freeze, thaw and close may also be called from the VM's own threads.

    @property
    def engine(self) -> Engine:
        """What executes the guest; ``engine_why`` says why this one."""
        return self._engine

    @property
    def board(self) -> Board:
        """The machine itself: its memory, its bus, its devices."""
        if self._board is None:
            raise InternalError("the VM has no board")
        return self._board

    @property
    def console(self) -> Console:
        """The other end of the guest's first serial port: ``expect`` and ``send``."""
        return self.serial("com1")

    def serial(self, name: str) -> Console:
        """The other end of a port that the tree plugs into "program": "com1" to "com4", or a named one of a virtio
        console."""
        if name not in self.plugs.consoles:
            where = f"lpc.{name}.path" if name.startswith("com") else name
            raise UserError(f"the VM's {name} is not the program's", where, f"make it {PROGRAM}")
        return self.plugs.consoles[name]

    def complaints(self) -> list[str]:
        """What the guest's drivers did wrong, and the host to its disks: the last few times, for each device. The first
        is also told to ``diagnostics``."""
        return self._board.complaints() if self._board is not None else []

    def start(self) -> None:
        """Power on. Raises UserError where the kernel and its files cannot be loaded, or the engine cannot run here."""
        self._ask(Step.START)

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait for the VM's end; None if it did not come within ``timeout`` seconds."""
        self._ended.wait(timeout)
        return self._outcome

    def freeze(self) -> None:
        """Nothing of the VM changes any more when it returns, and its time stands still.

        In this order: processors, time, devices with their backends. What the guest had asked for by then has happened:
        a reset, or its end, and then there is nothing to freeze, which a UserError says. What is pressed from now on
        takes effect at the thaw.
        """
        self._ask(Step.FREEZE)

    def thaw(self) -> None:
        """Go on, in the opposite order. The guest does not see that time passed."""
        self._ask(Step.THAW)

    def save(self) -> VmState:
        """The state of a frozen VM: another one of the same configuration, under any engine, goes on from it. What is
        on disks is not in it."""
        state = self._ask(Step.SAVE).state
        if state is None:
            raise InternalError("nothing was saved")
        return state

    def load(self, state: VmState) -> None:
        """In place of a start: be the VM that ``state`` was saved from, and stay frozen. Raises UserError where the
        configuration is another one."""
        request = _Request(Step.LOAD)
        request.state = state
        self._ask_for(request)

    def reset(self) -> None:
        """Ask for what the reset button does: power-on state, and the kernel as it was read at the start."""
        self._tell(_Request(Step.RESET))

    def power_button(self) -> None:
        """Press it. What follows is the guest's business."""
        # Also while it is starting: the guest may run before the state says so. A reset forgets an earlier press.
        if self._board is not None and self.state not in (State.ENDED, State.CLOSED):
            self._board.power_button()

    def nmi(self) -> None:
        """Press the NMI button: a guest that hears nothing else says where it is, if it was told to."""
        if self._board is not None and self.state not in (State.ENDED, State.CLOSED):
            self._board.nmi()

    def processors(self) -> tuple[str, ...]:
        """What each processor does at this moment: running, halted, frozen, or waiting to be started. Never waits."""
        return tuple(processor.doing for processor in self._processors)

    def exits(self) -> tuple[tuple[int | None, dict[str, int]], ...]:
        """For each processor the kernel's number of its thread, None before its start, and what it left guest code for
        since the last reset, in words, and how often. Never waits."""
        return tuple((processor.thread, processor.tally()) for processor in self._processors)

    def registers(self, index: int, timeout: float = 2.0) -> dict[str, Any]:
        """The registers of a processor as they are between two of its instructions, in the engine contract's names; it
        goes on at once. Empty: it was never started. May be called from any thread but a processor's.

        Raises UserError where there is no such processor, or it does not answer within ``timeout`` seconds.
        """
        processors = self._processors
        if not 0 <= index < len(processors):
            raise UserError(f"there is no processor {index} now", self.name, f"it has {len(processors)}, from 0")
        return processors[index].registers(timeout)

    def new_generation(self) -> None:
        """Say that this VM goes on from a past which it shares with others: the guest gets another generation
        identifier, and reseeds its random numbers."""
        if self._board is not None and self.state not in (State.ENDED, State.CLOSED):
            self._board.new_generation()

    def explain(self) -> Explanation:
        """What the guest did last, and what may be wrong with it: ``str`` of it is a report.

        A guest that runs is watched for a moment and then held, with its time, while its memory is looked at. After the
        end it works until the VM is closed.
        """
        explanation = self._ask(Step.EXPLAIN).explanation
        if explanation is None:
            raise InternalError("nothing was explained")
        return explanation

    def stop(self) -> None:
        """Ask for the end, whatever the guest does; ``wait`` tells when it came."""
        self._tell(_Request(Step.END, Outcome(End.STOPPED)))

    def close(self) -> None:
        """Give everything back: threads, memory, files. It stops the VM first; closing twice is closing once."""
        request = _Request(Step.CLOSE)
        self._tell(request)
        if self._thread is not None:
            self._thread.join()
        if request.error is not None:
            raise request.error

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The steps, on the VM's own thread.

    def _tell(self, request: _Request) -> None:
        self._requests.put(request)

    def _ask(self, step: Step) -> _Request:
        """Have a step taken and wait for it."""
        if self.state is State.CLOSED:
            raise UserError(f"cannot {step.value} a VM that is closed", self.name)
        return self._ask_for(_Request(step))

    def _ask_for(self, request: _Request) -> _Request:
        step = request.step
        self._tell(request)
        while not request.done.wait(0.5):
            if self._thread is None or not self._thread.is_alive():  # closed by somebody else meanwhile
                raise UserError(f"cannot {step.value} a VM that is closed", self.name)
        if request.error is not None:
            raise request.error
        return request

    def _main(self) -> None:
        while self.state is not State.CLOSED:
            request = self._waiting.popleft() if self._waiting else self._next()
            after = TRANSITIONS.get((self.state, request.step))
            if request.asker is not None and request.asker not in self._processors:
                pass  # it was asked before a reset that came in between
            elif after is None:
                request.error = UserError(f"cannot {request.step.value} a VM that is {self.state.value}", self.name)
            elif not self._take(request, after):
                continue
            request.done.set()

    def _next(self) -> _Request:
        """Wait for a step; where nobody tells of a guest that sleeps for good, it may be a look."""
        while self._stillness is not None and self.state is State.RUNNING and not self._said_hopeless:
            try:
                return self._requests.get(timeout=INTERVAL)
            except queue.Empty:
                if self._stillness.is_time([one.clock for one in self._processors if one.clock is not None]):
                    return _Request(Step.LOOK)
        return self._requests.get()

    def _take(self, request: _Request, after: State) -> bool:
        """Take a step. False: others come first, and then this one again."""
        before = self.state
        try:
            if after is not before or request.step in _WITHIN:
                self._do(request, after)
                if request.step is Step.FREEZE and self._guest_was_first(request):
                    self.state = after  # a reset happens to a frozen VM, whose guest does not run before it is thawed
                    return False
            self.state = after
        except BaseException as error:
            request.error = error
            if request.step is Step.CLOSE:
                self.state = State.CLOSED
            elif before is not State.CREATED and request.step is not Step.EXPLAIN:  # half a step: there is no way back
                self._tell(_Request(Step.END, failure(error, request.step.value)))
        if self._outcome is not None:
            self._ended.set()
        return True

    def _guest_was_first(self, request: _Request) -> bool:
        """The guest asked for its end or a reset before it stood still: that comes next, and behind it ``request``."""
        waiting = [*self._waiting]
        while not self._requests.empty():  # nobody else takes
            waiting.append(self._requests.get())
        guests = [one for one in waiting if one.asker in self._processors]
        others = [one for one in waiting if one.asker not in self._processors]
        self._waiting = deque([*guests, request, *others] if guests else others)
        return bool(guests)

    def _do(self, request: _Request, after: State) -> None:
        board = self.board
        match request.step:
            case Step.START:
                self._power_on(board.reset(), paused=False)
                self._start_watch()
            case Step.SAVE:
                request.state = take(board, self._kvm_clock(), [processor.save() for processor in self._processors])
            case Step.LOAD:
                if request.state is not None:
                    self._load(request.state)
            case Step.RESET:
                self._reset(frozen=after is State.FROZEN)
            case Step.SLEEP:
                self._kvm_clock_asleep = self._kvm_clock()
                self._without_processors(board.sleep, frozen=after is State.FROZEN)
                self.asleep, self._last_seen = True, []
                self.say(Cause.ASLEEP.value)
            case Step.WAKE:
                if self.asleep:  # and not reset meanwhile
                    self._wake(frozen=after is State.FROZEN)
            case Step.FREEZE:
                self._park()
                board.pause()
            case Step.THAW:
                board.resume()
                self._unpark()
            case Step.EXPLAIN:
                self._explain(request)
            case Step.LOOK:
                if self._sleeps_for_good():
                    self._tell_of_sleep()
            case Step.END:
                self._end(request.outcome or Outcome(End.STOPPED))
            case Step.CLOSE:
                try:
                    self._end(Outcome(End.STOPPED))
                finally:
                    self._free()

    def _load(self, state: VmState) -> None:
        board = self.board
        board.reset()
        board.pause()
        put(board, state)
        if state.processors:
            self._power_on(*state.processors, paused=True, kvm_clock=state.kvm_clock)
        else:
            self.asleep, self._kvm_clock_asleep = True, state.kvm_clock
        self._start_watch()

    def _kvm_clock(self) -> int:
        if self._engine_vm is None:
            return self._kvm_clock_asleep
        return self._engine_vm.kvm_clock(self.board.clock.tsc())

    def _reset(self, *, frozen: bool) -> None:
        if self._explainer.panicked():
            self._park()
            self._tell_why(Cause.PANIC)
        self._power_on(self._without_processors(self.board.reset, frozen=frozen), paused=frozen)

    def _wake(self, *, frozen: bool) -> None:
        state = self.board.wake()
        if state is None:
            self._reset(frozen=frozen)
        else:
            self._power_on(state, paused=frozen, kvm_clock=self._kvm_clock_asleep)

    def _without_processors(self, do: Callable[[], _S], *, frozen: bool) -> _S:
        """Processors end; ``do`` something to the paused board."""
        self._processors_off()
        gc.collect()  # no automatic collection while guests run, and an engine's VM may be full of cycles
        if not frozen:
            self.board.pause()
        done = do()
        if not frozen:
            self.board.resume()
        return done

    def _power_on(self, state: Any, *others: Any, paused: bool, kvm_clock: int | None = None) -> None:
        """The first processor runs, unless ``paused``; the others wait to be started by it, or go on too.
        ``kvm_clock``: what that clock says, which begins at 0 otherwise."""
        self._parting = self.asleep = False
        self._explainer.begin()
        if not self._tuned:  # before the engine makes what a reset is to collect
            self._tuned = True
            INTERPRETER.enter()
        board = self.board
        self._engine_vm = self._engine.create_vm(
            board.memory, board.io, board.cpus, self.settings.cpu_model, board.clock.tsc_offset, board.clock.hz,
            board.time_of_day if self.settings.cpu_kvmclock else None,
        )  # fmt: skip
        if kvm_clock is not None:
            self._engine_vm.set_kvm_clock(board.clock.tsc(), kvm_clock)
        self.withheld = self._engine_vm.withheld
        board.adopt(self._engine_vm)
        self._engine_vm.answer_ports(board.bus.constants)
        if self.settings.stats or self.settings.perf_map:
            self._engine_vm.observe(times=self.settings.stats, perf_map=self.settings.perf_map)
        board.clock.add_offset_listener(self._engine_vm.set_tsc_offset)
        hosted = self._engine.hosts_apics
        self._stillness = Stillness() if hosted else None
        told = self._processor_ends, self._processor_sleeps_for_good
        self._processors = [
            Processor(self.name, i, board, self._engine_vm, *told, paused=paused, hosted=hosted)
            for i in range(board.cpus)
        ]
        waiting = {"activity": Doing.WAITING.value}
        states = [state, *(others or [waiting] * (board.cpus - 1))]
        if hosted:
            for processor, one in zip(self._processors, states, strict=True):
                processor.prepare(one)
        for processor, one in zip(self._processors, states, strict=True):
            if hosted or one != waiting:
                processor.begin({} if hosted else one)

    def _park(self) -> None:
        """No processor runs guest code, and none does anything for it, until :meth:`_unpark`. Twice is once."""
        if self._engine_vm is not None:
            self._engine_vm.freeze()
        for processor in self._processors:
            processor.pause()
        # Twice: a processor may have been starting another one while it was asked.
        for _ in range(2):
            for processor in self._processors:
                processor.wait_until_parked()

    def _unpark(self) -> None:
        for processor in self._processors:
            processor.resume()
        if self._engine_vm is not None:
            self._engine_vm.thaw()

    def _processors_off(self) -> None:
        if self._processors:
            self._park()
            if self.settings.stats and self._engine_vm is not None:
                self.statistics = self._engine_vm.statistics()
        for processor in self._processors:
            processor.leave()
        if self._engine_vm is not None:
            self._engine_vm.thaw()
        for processor in self._processors:
            processor.join()
        self._processors = []
        if self._engine_vm is not None:
            self.board.clock.remove_offset_listener(self._engine_vm.set_tsc_offset)
            self.board.adopt(None)
            self._engine_vm.close()
            self._engine_vm = self._stillness = None

    def _end(self, outcome: Outcome) -> None:
        if self._outcome is None:
            try:
                self._park()
                stopped = isinstance(outcome.error, EngineLimit)
                if outcome.end is not End.FAILED or stopped:
                    self._last_seen = [processor.seen() for processor in self._processors]
                if outcome.end is End.TRIPLE_FAULT or stopped:
                    cause = Cause.ENGINE_FAILED if stopped else Cause.TRIPLE_FAULT
                    outcome = outcome._replace(explanation=self._tell_why(cause))
                elif self._explainer.panicked() and outcome.end in (End.REBOOTED, End.POWERED_OFF):
                    outcome = outcome._replace(explanation=self._tell_why(Cause.PANIC))
                self._processors_off()
                if self._board is not None and self.state is State.RUNNING:
                    self._board.pause()
            except Exception as error:
                outcome = failure(error, "stop")
            self._outcome = outcome
        if self._tuned:
            self._tuned = False
            INTERPRETER.leave()

    def _free(self) -> None:
        """Everything that __init__ made, as far as it came."""
        if self._watch is not None:
            self._watch.close()
        self.plugs.close()
        if self._board is not None:
            self._board.close()
        if self._memory is not None:
            self._memory.close()

    # What the board and the processors say. From any thread, often under the board lock: take note, and return.

    def _events(self) -> Events:
        return Events(
            power_off=lambda: self._guest_ends(Outcome(End.POWERED_OFF)),
            leave=lambda status: self._guest_ends(Outcome(End.LEFT, status=status)),
            reset=self._guest_resets,
            sleep=self._guest_sleeps,
            wake=lambda: self._tell(_Request(Step.WAKE)),
            start_cpu=self._start_cpu,
            stop_cpu=self._stop_cpu,
            failed=self._failed,
            say=self.say,
        )

    def _start_cpu(self, index: int, state: Any) -> None:
        for processor in self._processors[index : index + 1]:  # there are none between two lives
            processor.begin(state)

    def _stop_cpu(self, index: int) -> None:
        for processor in self._processors[index : index + 1]:
            processor.hold()

    def _guest_ends(self, outcome: Outcome) -> None:
        if self._processors:
            self._parting = True
            self._tell(_Request(Step.END, outcome, self._processors[0]))

    def _guest_resets(self) -> None:
        if self.settings.no_reboot:
            self._guest_ends(Outcome(End.REBOOTED))
        elif self._processors:
            self._parting = True
            self._tell(_Request(Step.RESET, asker=self._processors[0]))

    def _guest_sleeps(self) -> None:
        for processor in self._processors:
            processor.hold()
        if self._processors:
            self._parting = True
            self._tell(_Request(Step.SLEEP, asker=self._processors[0]))

    def _failed(self, error: BaseException) -> None:
        self._tell(_Request(Step.END, failure(error, "the board")))

    def _processor_ends(self, processor: Processor, outcome: Outcome) -> None:
        self._tell(_Request(Step.END, outcome, processor))

    def _processor_sleeps_for_good(self) -> None:
        """A processor halted with interrupts off. Where all did, only an NMI or a reset can help."""
        if all(processor.hopeless for processor in self._processors if processor.begun):
            self._tell_of_sleep()

    def _sleeps_for_good(self) -> bool:
        """On the VM's own thread, where the local APICs are the engine's: all processors that were started have halted
        with interrupts off, and nothing is on its way."""
        try:
            self._park()
            doing = {processor.sleeps() for processor in self._processors}
        finally:
            self._unpark()
        return Activity.HALTED in doing and doing <= {Activity.HALTED, Activity.NOT_STARTED}

    def _tell_of_sleep(self) -> None:
        if not self._parting and not self._said_hopeless:
            self._said_hopeless = True
            if self._explained is None or self._explainer.halted_on_purpose():
                self.say(Cause.HALTED.value)
            else:
                self._tell(self._why(Cause.HALTED))

    # Explanations, on the VM's own thread.

    def _start_watch(self) -> None:
        if self._explained is not None:
            from skep.explain.watch import Watch

            self._watch = Watch(
                f"skep-{self.name}-watch",
                self._explainer.transcript,
                float(self.settings.explain_silence),
                lambda cause, silent_for: self._tell(self._why(cause, silent_for)),
            )

    def _why(self, cause: Cause, silent_for: float = 0.0) -> _Request:
        request = _Request(Step.EXPLAIN)
        request.cause, request.silent_for = cause, silent_for
        return request

    def _explain(self, request: _Request) -> None:
        cause = request.cause
        if cause is not Cause.ASKED and self._too_late(cause):
            return
        places = self._look_around() if self.state is State.RUNNING else {}
        if self.state is State.RUNNING:
            self._park()
            self.board.pause()
        try:
            if self._processors:
                self._last_seen = [one.seen(places.get(one.index, ())) for one in self._processors]
            subject = Cause.ASLEEP if self.asleep else cause
            request.explanation = explanation = self._explainer.explain(
                subject, self.board, self._last_seen, request.silent_for
            )
        finally:
            if self.state is State.RUNNING:
                self.board.resume()
                self._unpark()
        if cause is not Cause.ASKED and (explanation.cause is not Cause.MUTE or explanation.findings):
            self._publish(explanation)

    def _too_late(self, cause: Cause) -> bool:
        """Something changed since an explanation was asked for: a silent guest was frozen, a halted one reset."""
        if self.state is not State.RUNNING or self.asleep:
            return True
        if cause is Cause.PANIC:
            return self._explainer.done or not self._explainer.panicked()
        if cause is Cause.HALTED and self._stillness is not None:
            return not self._sleeps_for_good()
        return cause is Cause.HALTED and not any(processor.hopeless for processor in self._processors)

    def _look_around(self) -> dict[int, tuple[int, ...]]:
        """Where each processor is at several moments."""
        places: dict[int, tuple[int, ...]] = {}
        for _ in range(LOOKS):
            self._park()
            for processor in self._processors:
                seen = processor.seen()
                if seen.activity not in (Activity.NOT_STARTED, Activity.IDLE, Activity.HALTED):
                    places[processor.index] = (*places.get(processor.index, ()), seen.registers["rip"])
            self._unpark()
            time.sleep(_BETWEEN_LOOKS)
        return places

    def _tell_why(self, cause: Cause) -> Explanation | None:
        """Explain a failure before what it is seen by goes; the processors are parked."""
        try:
            seen = self._last_seen = [processor.seen() for processor in self._processors]
            explanation = self._explainer.explain(cause, self.board, seen, 0.0)
        except Exception as error:  # the end of the guest is to be told in any case
            self.say(f"the guest's failure cannot be explained: {type(error).__name__}: {error}")
            return None
        self._publish(explanation)
        return explanation

    def _publish(self, explanation: Explanation) -> None:
        self._explainer.done = explanation.cause not in (Cause.SILENT, Cause.MUTE)
        if self._explained is not None:
            self._explained(explanation)

    def say(self, line: str) -> None:
        if self._diagnostics is not None:
            self._diagnostics(line)


def _write(tree: Tree, leaves: Mapping[str, object]) -> None:
    """What the program says is meant as it stands: no variables are expanded in it."""
    for key, value in leaves.items():
        if value is not None:
            tree[key] = str(value).replace("%", "%%")
