"""Does what the actions say, to one VM."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from skep.control import actions
from skep.control.actions import Action, Done, Result
from skep.control.controller import Reply
from skep.errors import SkepError, UserError
from skep.vm import TRANSITIONS, State, Step, Vm

if TYPE_CHECKING:
    from skep.explain.explanation import Explanation

_MOST = 8
"""Actions under way at once that may wait for the VM."""
_END = 60.0
"""Seconds that ``stop`` waits for the end."""


class Performer:
    """Behind a :class:`skep.control.controller.Controller`."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._guard = threading.Lock()
        self._under_way: list[str] = []
        self._dumping = False

    def submit(self, action: Action, done: Callable[[Reply], None]) -> None:
        if isinstance(action, actions.Status | actions.Exits | actions.Threads):
            done(self._reply(action))
            return
        most = _MOST + isinstance(action, actions.Stop)  # there is always a way out
        with self._guard:
            busy = ", ".join(self._under_way) if len(self._under_way) >= most else None
            if busy is None:
                self._under_way.append(action.name)
        if busy is not None:
            done(_refusal(UserError(f"too much is under way: {busy}", self.vm.name, "threads says where it hangs")))
            return

        def perform() -> None:
            try:
                reply = self._reply(action)
            finally:
                with self._guard:
                    self._under_way.remove(action.name)
            done(reply)

        threading.Thread(target=perform, name=f"skep-{self.vm.name}-{action.name}", daemon=True).start()

    def perform(self, action: Action) -> Result:
        vm = self.vm
        match action:
            case actions.Status():
                return self._status()
            case actions.Exits():
                return self._exits()
            case actions.Threads():
                from skep.control.threads import look

                return look()
            case actions.Registers():
                return self._registers(action.cpu)
            case actions.Explain():
                return _explained(vm.explain())
            case actions.Dump():
                return self._dump(Path(action.file))
            case actions.Freeze():
                self._refuse_while_dumping()
                vm.freeze()
            case actions.Thaw():
                self._refuse_while_dumping()
                vm.thaw()
            case actions.Reset():
                self._refuse_while_dumping()
                self._check(Step.RESET)
                vm.reset()
            case actions.Power():
                self._check_alive("press the power button of")
                vm.power_button()
            case actions.Nmi():
                self._check_alive("press the NMI button of")
                vm.nmi()
            case actions.Stop():
                vm.stop()
                if vm.wait(_END) is None:
                    raise UserError(f"did not end within {_END:g} seconds", vm.name, "threads says where it hangs")
            case _:
                assert_never(action)
        return Done(vm.state.value)

    def _reply(self, action: Action) -> Reply:
        try:
            return {"result": actions.encode(self.perform(action))}
        except SkepError as error:
            return _refusal(error)
        except Exception as error:  # ours, but no reason for the VM to end
            return _refusal(error)

    def _status(self) -> actions.VmStatus:
        vm = self.vm
        outcome = vm.wait(0)
        return actions.VmStatus(
            name=vm.name,
            state="asleep" if vm.asleep and vm.state is State.RUNNING else vm.state.value,
            pid=os.getpid(),
            engine=vm.engine.name,
            memory=vm.settings.memory_size,
            processors=list(vm.processors()),
            guest_seconds=vm.board.clock.now_ns() / 1e9,
            ports=[actions.Port(name, *status) for name, status in vm.plugs.status()],
            complaints=vm.complaints(),
            end=None if outcome is None else str(outcome),
        )

    def _exits(self) -> actions.AllExits:
        vm = self.vm
        each = zip(vm.processors(), vm.exits(), strict=False)  # a reset may come in between
        tallies = [actions.Tally(cpu, doing, tid, exits) for cpu, (doing, (tid, exits)) in enumerate(each)]
        return actions.AllExits(os.getpid(), vm.engine.name, tallies)

    def _registers(self, cpu: int | None) -> actions.AllRegisters:
        doing = self.vm.processors()
        if not doing:
            raise UserError(f"a VM that is {self.vm.state.value} has no processors", self.vm.name)
        wanted = range(len(doing)) if cpu is None else (cpu,)
        states = [(index, self.vm.registers(index)) for index in wanted]
        return actions.AllRegisters(
            [actions.Processor(index, doing[index], _hexadecimal(state)) for index, state in states]
        )

    def _dump(self, path: Path) -> actions.Dumped:
        """Of a VM that runs, it is frozen meanwhile."""
        from skep.control.core import write_core

        vm = self.vm
        if not path.is_absolute():
            raise UserError(f"{path} does not begin with a /", vm.name, "it would be relative to the VM's process")
        with self._guard:
            if self._dumping:
                raise UserError("a dump is being written already", vm.name)
            self._dumping = True
        try:
            thaws = vm.state is State.RUNNING
            vm.freeze()
            try:
                states = [state for index in range(len(vm.processors())) if (state := vm.registers(index))]
                return actions.Dumped(str(path), write_core(path, vm.board.memory, states))
            finally:
                if thaws:
                    vm.thaw()
        finally:
            self._dumping = False

    def _refuse_while_dumping(self) -> None:
        if self._dumping:
            raise UserError("a dump is being written", self.vm.name, "wait for its end")

    def _check(self, step: Step) -> None:
        if (self.vm.state, step) not in TRANSITIONS:
            raise UserError(f"cannot {step.value} a VM that is {self.vm.state.value}", self.vm.name)

    def _check_alive(self, what: str) -> None:
        if self.vm.state not in (State.RUNNING, State.FROZEN):
            raise UserError(f"cannot {what} a VM that is {self.vm.state.value}", self.vm.name)


def _explained(explanation: Explanation) -> actions.Explained:
    return actions.Explained(
        summary=explanation.summary,
        findings=[str(finding) for finding in explanation.findings],
        report=str(explanation).split("\n"),
        log=list(explanation.log),
    )


def _refusal(error: Exception) -> Reply:
    text = str(error) if isinstance(error, SkepError) else f"internal error: {type(error).__name__}: {error}"
    return {"error": {"message": text}}


def _hexadecimal(value: Any) -> Any:
    """Numbers of 64 bits are not safe with everybody's JSON; nor are bytes, or keys that are numbers."""
    if isinstance(value, dict):
        return {f"{key:#x}" if isinstance(key, int) else key: _hexadecimal(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return f"{value:#x}" if isinstance(value, int) else value
