"""The state of a VM that stands still, whatever engine ran it: what goes on elsewhere from here.

Everything is under the names of the manuals: a state that one engine left is what another begins with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from skep.contracts.device import SavedState
from skep.errors import UserError
from skep.machine import Board


class VmState(NamedTuple):
    """What :meth:`skep.vm.Vm.save` gives. Plain values all through."""

    ticks: int
    """Guest time, in ticks of its counter."""
    hz: int
    """Of that counter."""
    kvm_clock: int
    """Nanoseconds on the clock that the guest knows from its engine; 0 where it has none."""
    processors: list[dict[str, Any]]
    """As :meth:`skep.engine.contract.Vcpu.get_state` gives them, with ``activity``."""
    devices: dict[str, SavedState]
    memory: list[tuple[int, bytes]]
    """(guest-physical address, contents) of the pieces that were ever written to; the others are zeros."""


def take(board: Board, kvm_clock: int, processors: list[dict[str, Any]]) -> VmState:
    """The board is paused."""
    devices = {device.name: device.save() for device in board.devices}
    if len(devices) != len(board.devices):
        raise UserError("two devices have one name", None, "give them different ones to save this VM")
    return VmState(board.clock.tsc(), board.clock.hz, kvm_clock, processors, devices, list(board.memory.written()))


def put(board: Board, state: VmState) -> None:
    """Into a board of the same configuration that was reset, and is paused. Raises UserError where it is another one;
    the board is of no use then."""
    names = {device.name for device in board.devices}
    strange = ", ".join(sorted(names ^ state.devices.keys()))
    if strange:
        todo = "load it into one of the same configuration"
        raise UserError(f"the state is of another machine: {strange}", None, todo)
    if abs(state.hz - board.clock.hz) > state.hz // 1000:
        what = f"the state's TSC runs at {state.hz // 1000} kHz, this one's at {board.clock.hz // 1000}"
        raise UserError(what, "cpu.tsc_khz", f"make it {state.hz // 1000}, under KVM on a processor with TSC scaling")
    for gpa, contents in state.memory:
        board.memory.write(gpa, contents)
    board.clock.load(state.ticks)
    # Twice those that hear of the others' interrupts: what is said to them as the others are loaded is not news.
    for device in (*board.devices, *board.wiring):
        device.load(state.devices[device.name])
