"""``skep run``: one VM in the foreground of this terminal."""

from __future__ import annotations

import gc
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from skep.config import Settings, Tree, check_settings
from skep.errors import UserError

if TYPE_CHECKING:
    from skep.chardev.stdio import Overlay, Stdio
    from skep.control.controller import Controller
    from skep.control.directory import Claim
    from skep.explain import Explanation
    from skep.vm import Outcome, Vm


def run(tree: Tree, verbose: bool) -> int:
    """Run the VM of ``tree`` to its end, or print the tree where it asks for that; returns the exit status."""
    settings = check_settings(tree.freeze())
    if settings.config_dump:
        sys.stdout.write(tree.dump())
        return 0
    messages = Messages()
    with ExitStack() as last:
        if gc.isenabled():
            gc.disable()  # nothing of what is imported and made now goes again; vm/interpreter.py does the same later
            last.callback(gc.enable)
        from skep.control.controller import Controller
        from skep.vm import Vm

        claim = _claim(tree, settings, messages) if settings.control else None
        if claim is not None:
            last.enter_context(claim)
            tree = tree.thawed()
            tree["name"] = claim.name
        vm = Vm(tree, diagnostics=messages.say_once, explained=messages.explain)
        last.callback(vm.close)  # should what follows fail
        controller = Controller(vm)
        if claim is not None:
            from skep.control.server import Server

            last.enter_context(Server(controller, claim))  # it answers until the VM is closed
        outcome = _to_its_end(vm, controller, messages, verbose)
    messages.end = "\n"  # the terminal is the user's again
    if outcome.error is not None:
        raise outcome.error
    if verbose:
        messages.say(str(outcome))
    for line in statistics_lines(vm.statistics):
        print(line, file=sys.stderr)
    return outcome.exit_status


def _to_its_end(vm: Vm, controller: Controller, messages: Messages, verbose: bool) -> Outcome:
    with vm:
        if verbose:
            messages.say(f"engine {vm.engine.description}: {vm.engine_why}")
            if vm.board.memory.kind:
                messages.say(f"memory: {vm.board.memory.kind}")
        stdio = vm.plugs.stdio
        if stdio is not None:
            stdio.make_overlay = partial(_monitor, controller, stdio)
        with Signals(vm.power_button, vm.stop, stdio.look_at_size if stdio is not None else None):
            vm.start()
            if verbose and vm.withheld:
                without = ", ".join(vm.withheld)
                messages.say(f"CPU model {vm.settings.cpu_model}, without what this host cannot give: {without}")
            outcome = vm.wait()
    assert outcome is not None, "a wait without a timeout"
    return outcome


def _monitor(controller: Controller, stdio: Stdio) -> Overlay:
    from skep.control.monitor import Monitor

    return Monitor(controller, stdio)


def _claim(tree: Tree, settings: Settings, messages: Messages) -> Claim | None:
    """The VM's name among this user's. Raises UserError where another VM has it; a host on which no VM could have one
    is no reason not to run."""
    from skep.control.directory import Claim, NameTaken

    try:
        return Claim(settings.name) if "name" in tree else Claim.any_of(settings.name)
    except NameTaken:
        raise
    except UserError as error:
        messages.say(f"no control socket: {error}")
        return None


class Messages:
    """What we say to the user while the guest may have the terminal, and with it the meaning of a line feed."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.end = "\r\n" if sys.stderr.isatty() else "\n"

    def say(self, line: str) -> None:
        print(f"skep: {line}", file=sys.stderr, end=self.end, flush=True)

    def say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def explain(self, explanation: Explanation) -> None:
        """The report of a guest's failure, in one piece."""
        sys.stderr.write(f"skep: {explanation}\n".replace("\n", self.end))
        sys.stderr.flush()


def statistics_lines(statistics: Mapping[str, int | float]) -> Iterator[str]:
    """What an engine did, one to a line: whole numbers are counts."""
    for name, value in statistics.items():
        yield f"{value:>15,}  {name}" if isinstance(value, int) else f"{value:>15,.4f}  {name}"


class Signals:
    """What other processes and the kernel ask of us by signals, done on a thread of its own.

    A Python signal handler runs in the middle of whatever the main thread does, perhaps while it holds the very lock
    that the VM's methods need; so the handler only puts the request into a queue.

    SIGTERM presses the power button, a second one stops. SIGINT and SIGHUP, the terminal's, stop at once. SIGWINCH
    says that the terminal has another size.
    """

    def __init__(
        self, press_power_button: Callable[[], None], stop: Callable[[], None], resized: Callable[[], None] | None
    ) -> None:
        self._press = press_power_button
        self._stop = stop
        self._resized = resized
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._pressed = False
        self._thread = threading.Thread(target=self._main, name="signals", daemon=True)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._thread.start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *([signal.SIGWINCH] if self._resized else ())):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._requests.put(None)
        self._thread.join()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requests.put(number)

    def _main(self) -> None:
        while (number := self._requests.get()) is not None:
            if number == signal.SIGWINCH:
                if self._resized is not None:
                    self._resized()
            elif number == signal.SIGTERM and not self._pressed:
                self._pressed = True
                self._press()
            else:
                self._stop()
