"""The states of a VM, the steps between them, and how one ends."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from skep.errors import InternalError, SkepError

if TYPE_CHECKING:
    from skep.explain.explanation import Explanation


class End(enum.Enum):
    """Why a VM ended."""

    POWERED_OFF = "powered off"
    STOPPED = "stopped"
    """On request."""
    REBOOTED = "rebooted"
    """And ``no_reboot`` says not to start again."""
    LEFT = "left by the test device"
    """With the exit status that the guest gave."""
    TRIPLE_FAULT = "triple fault"
    FAILED = "failed"
    """Ours."""


class Outcome(NamedTuple):
    """How a VM ended. ``registers`` are there after a triple fault, ``error`` where it is ours, and ``explanation``
    where the guest failed (a triple fault, or its kernel's panic before it rebooted or powered off), and where the
    engine could not go on with it."""

    end: End
    registers: Mapping[str, Any] = MappingProxyType({})
    error: BaseException | None = None
    explanation: Explanation | None = None
    status: int = 0
    """The exit status that the guest gave, where it did."""

    @property
    def exit_status(self) -> int:
        return {End.LEFT: self.status, End.TRIPLE_FAULT: 3, End.FAILED: 4}.get(self.end, 0)

    def __str__(self) -> str:
        return self.end.value if self.error is None else f"{self.end.value}: {self.error}"


class State(enum.Enum):
    CREATED = "created"
    RUNNING = "running"
    FROZEN = "frozen"
    ENDED = "ended"
    CLOSED = "closed"


class Step(enum.Enum):
    START = "start"
    FREEZE = "freeze"
    THAW = "thaw"
    RESET = "reset"
    SLEEP = "suspend to RAM"
    WAKE = "wake"
    SAVE = "save"
    LOAD = "load a state into"
    EXPLAIN = "explain"
    LOOK = "look at"
    """Whether it sleeps for good."""
    END = "stop"
    CLOSE = "close"


TRANSITIONS = {
    (State.CREATED, Step.START): State.RUNNING,
    (State.RUNNING, Step.FREEZE): State.FROZEN,
    (State.FROZEN, Step.FREEZE): State.FROZEN,
    (State.FROZEN, Step.THAW): State.RUNNING,
    (State.RUNNING, Step.THAW): State.RUNNING,
    (State.CREATED, Step.LOAD): State.FROZEN,
    (State.FROZEN, Step.SAVE): State.FROZEN,
    (State.RUNNING, Step.RESET): State.RUNNING,
    (State.FROZEN, Step.RESET): State.FROZEN,
    (State.RUNNING, Step.SLEEP): State.RUNNING,
    (State.FROZEN, Step.SLEEP): State.FROZEN,
    (State.RUNNING, Step.WAKE): State.RUNNING,
    (State.FROZEN, Step.WAKE): State.FROZEN,
    (State.RUNNING, Step.EXPLAIN): State.RUNNING,
    (State.RUNNING, Step.LOOK): State.RUNNING,
    (State.FROZEN, Step.EXPLAIN): State.FROZEN,
    (State.ENDED, Step.EXPLAIN): State.ENDED,
    (State.CREATED, Step.END): State.ENDED,
    (State.RUNNING, Step.END): State.ENDED,
    (State.FROZEN, Step.END): State.ENDED,
    (State.ENDED, Step.END): State.ENDED,
    (State.CREATED, Step.CLOSE): State.CLOSED,
    (State.RUNNING, Step.CLOSE): State.CLOSED,
    (State.FROZEN, Step.CLOSE): State.CLOSED,
    (State.ENDED, Step.CLOSE): State.CLOSED,
}
"""What may be done in which state, and the state that follows. All else is refused, and changes nothing."""


def failure(error: BaseException, who: str) -> Outcome:
    """How a VM ends that something of ours failed. What is not of our own exception tree is ours to answer for."""
    if isinstance(error, SkepError):
        return Outcome(End.FAILED, error=error)
    internal = InternalError(f"{who}: {type(error).__name__}: {error}")
    internal.__cause__ = error
    return Outcome(End.FAILED, error=internal)
