"""The actions: everything that can be asked of a running VM, and what it answers. One typed set for all who ask.

The docstring of an action is its help; its fields are its arguments.
"""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

from skep.config.tree import nearest
from skep.errors import UserError


def _argument(of: type, about: str, from_words: Callable[[str], object], default: Any = dataclasses.MISSING) -> Any:
    """A field of an action: a JSON value of type ``of``, or what ``from_words`` makes of a word that was typed."""
    metadata = {"of": of, "help": about, "from_words": from_words}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Status:
    """what it is doing, and what its ports are plugged into"""

    name: ClassVar[str] = "status"


@dataclass(frozen=True, slots=True)
class Freeze:
    """stop everything that can change, and its time; done when it returns"""

    name: ClassVar[str] = "freeze"


@dataclass(frozen=True, slots=True)
class Thaw:
    """go on after a freeze; the guest sees no time pass"""

    name: ClassVar[str] = "thaw"


@dataclass(frozen=True, slots=True)
class Reset:
    """press the reset button"""

    name: ClassVar[str] = "reset"


@dataclass(frozen=True, slots=True)
class Power:
    """press the power button; what follows is the guest's business"""

    name: ClassVar[str] = "power"


@dataclass(frozen=True, slots=True)
class Stop:
    """end it, whatever the guest does; done when it returns"""

    name: ClassVar[str] = "stop"


@dataclass(frozen=True, slots=True)
class Nmi:
    """press the NMI button"""

    name: ClassVar[str] = "nmi"


@dataclass(frozen=True, slots=True)
class Registers:
    """the processors' registers"""

    name: ClassVar[str] = "registers"
    cpu: int | None = _argument(int, "only processor N", int, default=None)


@dataclass(frozen=True, slots=True)
class Exits:
    """how often each processor left guest code, and for what"""

    name: ClassVar[str] = "exits"


@dataclass(frozen=True, slots=True)
class Threads:
    """every thread's stack, and the locks it holds or waits for"""

    name: ClassVar[str] = "threads"


@dataclass(frozen=True, slots=True)
class Explain:
    """what the guest did last, and what may be wrong with it"""

    name: ClassVar[str] = "explain"


@dataclass(frozen=True, slots=True)
class Dump:
    """write memory and registers to a file, an ELF core for gdb and crash"""

    name: ClassVar[str] = "dump"
    file: str = _argument(str, "the file, which appears when it is complete", os.path.abspath)


Action: TypeAlias = (
    Status | Freeze | Thaw | Reset | Power | Stop | Nmi | Registers | Exits | Threads | Explain | Dump
)

ACTIONS: Mapping[str, type[Action]] = {
    kind.name: kind
    for kind in (Status, Freeze, Thaw, Reset, Power, Stop, Nmi, Registers, Exits, Threads, Explain, Dump)
}


# What they answer. All is made of what JSON has.


class Port(NamedTuple):
    name: str
    where: str
    """What it is plugged into: ``pty:/dev/pts/3``."""
    present: bool
    """Somebody is at the other end."""
    waiting: int
    """Bytes of output that nobody has taken yet."""
    dropped: int
    """Bytes of output that nobody ever took."""


class VmStatus(NamedTuple):
    name: str
    state: str
    """created, running, frozen, ended or closed."""
    pid: int
    engine: str
    memory: int
    """Bytes."""
    processors: list[str]
    """What each is doing: running, halted, frozen, or waiting to be started."""
    guest_seconds: float
    """The guest's own time since it was made: it stands still in a freeze."""
    ports: list[Port]
    complaints: list[str]
    """What the guest's drivers did wrong, and the host to its disks: the last few times, for each device."""
    end: str | None
    """How it ended."""


class Done(NamedTuple):
    """The action has had its effect; ``state`` is the VM's now."""

    state: str


class Processor(NamedTuple):
    cpu: int
    doing: str
    registers: dict[str, Any]
    """By their architectural names, in hexadecimal; empty if it was never started."""


class AllRegisters(NamedTuple):
    processors: list[Processor]


class Tally(NamedTuple):
    cpu: int
    doing: str
    tid: int | None
    """The kernel's number of its thread; None: it was never started."""
    exits: dict[str, int]
    """Since the last reset, by cause."""


class AllExits(NamedTuple):
    pid: int
    engine: str
    processors: list[Tally]


class Frame(NamedTuple):
    file: str
    line: int
    function: str
    text: str


class Thread(NamedTuple):
    name: str
    tid: int
    """The kernel's number of it."""
    state: str
    """As proc(5) has it: R running, S sleeping, D in the disk's hands."""
    holds: list[str]
    """Locks."""
    waits_for: list[str]
    """Locks."""
    stack: list[Frame]
    """The innermost frame last."""


class AllThreads(NamedTuple):
    threads: list[Thread]


class Explained(NamedTuple):
    summary: str
    findings: list[str]
    """What is probably wrong, and what to do."""
    report: list[str]
    """All of it in at most 40 lines, for people."""
    log: list[str]
    """The kernel's log, from the guest's memory."""


class Dumped(NamedTuple):
    file: str
    bytes: int
    """The file's length; holes take no room."""


Result: TypeAlias = VmStatus | Done | AllRegisters | AllExits | AllThreads | Explained | Dumped


def parse(name: object, arguments: object) -> Action:
    """An action from what somebody said. Raises UserError, which names the nearest that there is."""
    if not isinstance(name, str) or name not in ACTIONS:
        near = nearest(name, ACTIONS) if isinstance(name, str) else None
        raise UserError(f"no such action: {str(name)[:40]!r}", None, near and f"the nearest is {near}")
    kind = ACTIONS[name]
    if not isinstance(arguments, dict):
        raise UserError("the arguments are an object", name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in arguments.items():
        if key not in fields:
            raise UserError(f"no such argument: {str(key)[:40]!r}", name)
        expected = fields[key].metadata["of"]
        if type(value) is not expected and not (value is None and fields[key].default is None):
            raise UserError(f"{key} is {_NAMES[expected]}", name)
    for key, field in fields.items():
        if key not in arguments and field.default is dataclasses.MISSING:
            raise UserError(f"{key} is missing", name, str(field.metadata["help"]))
    return kind(**arguments)


_NAMES: Mapping[type, str] = {int: "a number", str: "a text"}


def encode(result: Result) -> dict[str, Any]:
    """A result as JSON has it."""
    return {name: _plain(value) for name, value in result._asdict().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value._asdict().items()} if hasattr(value, "_asdict") else value
