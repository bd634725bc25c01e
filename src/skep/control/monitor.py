"""The VM's monitor at the terminal of `skep run`: Ctrl-A c goes to it and back, and the guest runs on meanwhile."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from skep.control.actions import ACTIONS, Action, Stop, parse
from skep.control.controller import Controller, Reply
from skep.control.text import lines
from skep.errors import UserError

_PROMPT = b"skep> "
_LONGEST = 256
_AHEAD = 4096
_CTRL_D = 0x04
_ERASE = b"\b \b"


class LineEditor:
    """A line as it is typed: Backspace erases, Ctrl-W a word, Ctrl-U all; arrows and the like are ignored."""

    def __init__(self, echo: Callable[[bytes], None]) -> None:
        self._echo = echo
        self._line = bytearray()
        self._escape = b""

    def feed(self, byte: int) -> str | None:
        """The line, when ``byte`` ends it."""
        if self._escape:
            self._skip(byte)
        elif byte in b"\r\n":
            self._echo(b"\r\n")
            line, self._line = self._line.decode("utf-8", "replace"), bytearray()
            return line.strip()
        elif byte in b"\b\x7f":
            self._erase(1)
        elif byte == 0x15:  # Ctrl-U
            self._erase(len(self._line))
        elif byte == 0x17:  # Ctrl-W
            words = bytes(self._line).rstrip(b" ")
            self._erase(len(self._line) - words.rfind(b" ") - 1)
        elif byte == 0x1B:
            self._escape = b"\x1b"
        elif 0x20 <= byte < 0x7F and len(self._line) < _LONGEST:
            self._line.append(byte)
            self._echo(bytes((byte,)))
        return None

    def empty(self) -> bool:
        return not self._line

    def clear(self) -> None:
        self._line.clear()
        self._escape = b""

    def _erase(self, count: int) -> None:
        count = min(count, len(self._line))
        del self._line[len(self._line) - count :]
        self._echo(_ERASE * count)

    def _skip(self, byte: int) -> None:
        """ESC and a letter, or ESC [ or ESC O up to a letter (ECMA-48, 5.4)."""
        self._escape += bytes((byte,))
        introduced = self._escape[1:2] in (b"[", b"O")
        if not introduced or (len(self._escape) > 2 and 0x40 <= byte < 0x7F):
            self._escape = b""


class Screen(Protocol):
    """The terminal, as :class:`skep.chardev.stdio.Stdio` has it."""

    def show(self, data: bytes) -> None: ...

    def leave_overlay(self) -> None: ...

    def call(self, callback: Callable[[], None]) -> None:
        """Call back on the terminal's thread, soon."""


class Monitor:
    """A :class:`~skep.chardev.stdio.Overlay` whose commands are the actions. All on the terminal's thread."""

    def __init__(self, controller: Controller, screen: Screen) -> None:
        self._controller = controller
        self._screen = screen
        self._editor = LineEditor(screen.show)
        self._here = False
        self._waits = False
        self._ahead: deque[int] = deque(maxlen=_AHEAD)
        """Typed while an answer is awaited."""

    def enter(self) -> None:
        self._here = True
        vm = self._controller.vm
        greeting = f"the monitor of {vm.name}, which is {vm.state.value}; `help` helps, Ctrl-A c goes back"
        self._say(["", greeting])
        if not self._waits:
            self._prompt()

    def leave(self) -> None:
        self._here = False
        self._editor.clear()
        self._ahead.clear()
        self._say(["", "back at the guest's console"])

    def typed(self, data: bytes) -> None:
        self._ahead.extend(data)
        self._go_on()

    def _go_on(self) -> None:
        while self._ahead and self._here and not self._waits:
            byte = self._ahead.popleft()
            if byte == _CTRL_D and self._editor.empty():
                self._screen.leave_overlay()
                return
            line = self._editor.feed(byte)
            if line is not None:
                self._run(line)

    def _run(self, line: str) -> None:
        name, *words = line.split() or [""]
        try:
            if name in ("help", "?"):
                self._say(_help())
            elif name == "console":
                self._screen.leave_overlay()
                return
            elif name:
                self._submit(_action(name, words))
                return
        except UserError as error:
            self._say([str(error)])
        self._prompt()

    def _submit(self, action: Action) -> None:
        self._waits = True
        call = self._screen.call
        self._controller.submit(action, lambda reply: call(lambda: self._answer(action, reply)))

    def _answer(self, action: Action, reply: Reply) -> None:
        if "error" in reply:
            self._say([str(reply["error"]["message"])])
        elif not isinstance(action, Stop):
            self._say(lines(action.name, reply["result"]))
        self._waits = False
        if self._here:
            self._prompt()
            self._go_on()

    def _say(self, lines: Iterable[str]) -> None:
        self._screen.show("".join(f"{line}\r\n" for line in lines).encode())

    def _prompt(self) -> None:
        self._screen.show(_PROMPT)


def _action(name: str, words: list[str]) -> Action:
    """A command: an action's name, and its arguments in their order. Raises UserError."""
    name = Stop.name if name == "quit" else name
    fields = dataclasses.fields(ACTIONS[name]) if name in ACTIONS else ()
    if len(words) > len(fields):
        raise UserError(f"does not know what to do with {words[len(fields)]!r}", name)
    arguments: dict[str, object] = {}
    for field, word in zip(fields, words, strict=False):
        try:
            arguments[field.name] = field.metadata["from_words"](word)
        except ValueError:
            raise UserError(f"{word!r} is not what {field.name} may be", name) from None
    return parse(name, arguments)


def _help() -> list[str]:
    texts = []
    for name, kind in ACTIONS.items():
        words = [name if name != Stop.name else "quit, stop"]
        for field in dataclasses.fields(kind):
            words.append(field.name.upper() if field.default is dataclasses.MISSING else f"[{field.name.upper()}]")
        texts.append((" ".join(words), kind.__doc__ or ""))
    texts += [("console", "go back, as Ctrl-A c does"), ("help", "this")]
    return [f"{name:16} {text}" for name, text in texts]
