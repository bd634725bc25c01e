"""The interpreter of `skep io`: lines to commands, requests made and told, now or when they are waited for."""

from __future__ import annotations

import getopt
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TextIO

from skep.block.format import Image, ImageError
from skep.cli.io.printing import NotANumber, dump, number, report
from skep.cli.io.session import Session
from skep.errors import UserError

PROMPT = "qemu-io> "
"""So that what filters qemu-io's output filters ours."""


class Wrong(Exception):
    """The command failed; the message, if there is one, is what it prints."""


class Misused(Wrong):
    """And then how it is used."""


class Command(NamedTuple):
    name: str
    do: Callable[[Interpreter, Words], None]
    usage: str
    about: str
    least: int = 0
    most: int | None = 0
    """Words behind the name; None: any number."""
    letters: str = ""
    """Its options, as getopt(3) has them."""
    short: str = ""
    """Another name."""
    needs_image: bool = True


@dataclass(slots=True)
class Words:
    """A command's options, and the rest."""

    options: dict[str, str]
    rest: list[str]

    def has(self, letter: str) -> bool:
        return letter in self.options

    def pattern(self) -> int | None:
        """The byte after -P."""
        text = self.options.get("P")
        if text is None:
            return None
        try:
            byte = int(text, 0)
        except ValueError:
            byte = -1
        if not 0 <= byte <= 0xFF:
            raise Wrong(f"{text} is not a valid pattern byte")
        return byte


@dataclass(slots=True)
class Request:
    """A transfer that was made, and how it is told."""

    what: str
    failed: str
    """What failed where it did."""
    offset: int
    length: int
    said: Words
    rooms: Sequence[memoryview] = ()
    """What was read, to be looked at."""


class Interpreter:
    """Does commands one after another, prints what becomes of them, and goes on after one that fails."""

    def __init__(self, session: Session, commands: Sequence[Command]) -> None:
        self.session = session
        self.commands = commands
        self._done = False
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: list[tuple[Request, Future[float]]] = []
        self._failed = False

    def run(self, commands: Sequence[str], source: TextIO) -> int:
        """These, or the lines of ``source`` where there are none. 1: one failed."""
        try:
            for line in commands or _lines(source):
                self.command(line)
                if self._done:
                    break
            self.finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
        return int(self._failed)

    def command(self, line: str) -> None:
        name, *arguments = line.split() or [""]
        if not name:
            return
        command = self.find(name)
        if command is None:
            print(f'command "{name}" not found', file=sys.stderr)
            self._failed = True
            return
        try:
            if command.needs_image and self.session.image is None:
                print("no file open, try 'help open'", file=sys.stderr)
                raise Wrong
            if wrong := _miscounted(command, len(arguments)):
                print(f"bad argument count {len(arguments)} to {name}, {wrong}", file=sys.stderr)
                raise Wrong
            command.do(self, _parsed(command, arguments, name))
        except Wrong as error:
            self._failed = True
            if str(error):
                print(error)
            if isinstance(error, Misused):
                print(described_command(command, name))
        except (UserError, OSError) as error:
            self._failed = True
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            print(f"skep io: {text}", file=sys.stderr)
        sys.stdout.flush()

    @property
    def image(self) -> Image:
        image = self.session.image
        assert image is not None
        return image

    def find(self, name: str) -> Command | None:
        return next((one for one in self.commands if name in (one.name, one.short)), None)

    def stop(self) -> None:
        """After this command."""
        self._done = True

    # Requests.

    def make(self, request: Request, move: Callable[[], None], *, later: bool = False) -> None:
        """Make a request and tell what became of it, now or when it is waited for."""
        if later:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(16, "skep-io")
            self._under_way.append((request, self._pool.submit(_timed, move)))
            return
        self._tell(request, lambda: _timed(move))

    def finish(self) -> None:
        """Wait for what was begun."""
        under_way, self._under_way = self._under_way, []
        for request, future in under_way:
            try:
                self._tell(request, future.result)
            except Wrong as error:  # not the command's: it did begin the request
                if str(error):
                    print(error)

    def _tell(self, request: Request, result: Callable[[], float]) -> None:
        try:
            took = result()
        except (OSError, ImageError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            raise Wrong(f"{request.failed} failed: {text}") from None
        said, wrong = request.said, ""
        if (pattern := said.pattern()) is not None and request.rooms:
            first, n = verified(said, request.length)
            data = b"".join(request.rooms)[first : first + n]
            if data.strip(bytes([pattern])):
                wrong = f"Pattern verification failed at offset {request.offset + first}, {n} bytes"
                print(wrong)
        if not said.has("q"):
            if said.has("v"):
                for line in dump(memoryview(b"".join(request.rooms)), request.offset):
                    print(line)
            print(report(request.what, request.offset, request.length, took, said.has("C")))
        if wrong:
            raise Wrong

    def needs_writable(self) -> None:
        if self.image.read_only:
            raise UserError("Block node is read-only")


def _timed(move: Callable[[], None]) -> float:
    begun = time.monotonic()
    move()
    return time.monotonic() - begun


def _lines(source: TextIO) -> Iterator[str]:
    while True:
        print(PROMPT, end="", flush=True)
        line = source.readline()
        if not line:
            return
        yield line


def _miscounted(command: Command, count: int) -> str:
    least, most = command.least, command.most
    if least <= count and (most is None or count <= most):
        return ""
    if most is None:
        return f"expected at least {least} arguments"
    return f"expected {least} arguments" if least == most else f"expected between {least} and {most} arguments"


def _parsed(command: Command, arguments: list[str], name: str) -> Words:
    try:
        options, rest = getopt.gnu_getopt(arguments, command.letters)
    except getopt.GetoptError as error:
        what = "option requires an argument" if "requires" in error.msg else "invalid option"
        print(f"{name}: {what} -- '{error.opt[:1]}'", file=sys.stderr)
        raise Misused from None
    return Words({option[1:]: value for option, value in options}, rest)


def number_of(text: str) -> int:
    try:
        return number(text)
    except NotANumber as error:
        raise Wrong(str(error)) from None


def verified(said: Words, length: int) -> tuple[int, int]:
    """Which bytes of a read are compared with the pattern: -s and -l."""
    first = number_of(said.options.get("s", "0"))
    return first, number_of(said.options["l"]) if said.has("l") else length - first


def described_command(command: Command, name: str) -> str:
    usage = f" {command.usage}" if command.usage else ""
    return f"{name}{usage} -- {command.about}"
