"""The serial port inside this process: a program talks to the guest through ``vm.console``."""

from __future__ import annotations

import codecs
import re
import threading
import time

from skep.chardev.backlog import LIMIT, Backlog
from skep.chardev.loop import Loop
from skep.chardev.pump import Pump
from skep.contracts.chardev import BackendStatus, Receiver
from skep.errors import SkepError

KEPT = LIMIT
"""Characters of output that wait to be looked at; older ones go first."""
_GATHER = 0.001
"""Seconds: a guest writes byte by byte, and nobody needs to search again for each."""


class ConsoleTimeout(SkepError):
    """What was expected did not come; the message shows the end of what did."""


class ConsoleClosed(SkepError):
    """What was expected cannot come any more: the VM is closed."""


class Console:
    """A :class:`~skep.contracts.chardev.CharBackend`. Output is UTF-8 text, and each character of it is used once."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pump = Pump()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._backlog = Backlog()
        self._text = ""  # what expect and read have in front of them
        self._forgotten = 0
        self._reading = threading.Lock()
        self._news = threading.Event()
        self._closed = False

    # The program's side

    def expect(self, pattern: str | re.Pattern[str], timeout: float = 60.0) -> re.Match[str]:
        """Wait until the output that was not used yet contains ``pattern``, a regular expression.

        The match, and what lies before it, are used then: ``match.string[:match.start()]`` is what came before.
        Carriage returns are kept, and a terminal's lines end in CR LF.
        """
        compiled = re.compile(pattern)
        deadline = time.monotonic() + timeout
        while True:
            closed = self._closed  # before the search: what came before the end is searched after it
            self._news.clear()
            with self._reading:
                self._gather()
                found = compiled.search(self._text)
                if found:
                    self._text = self._text[found.end() :]
                    return found
                tail = self._text[-200:]
            if closed:
                raise ConsoleClosed(f"the VM is closed and {compiled.pattern!r} did not come; last: {tail!r}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConsoleTimeout(f"{compiled.pattern!r} did not come in {timeout:g} s; last: {tail!r}")
            if self._news.wait(left):
                time.sleep(_GATHER)

    def read(self) -> str:
        """All output that was not used yet, at once; it is used now."""
        with self._reading:
            self._gather()
            text, self._text = self._text, ""
            return text

    def send(self, text: str | bytes) -> None:
        """Type ``text``. It waits here until the guest takes it; a line ends with ``\\n`` as the Enter key does."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        self._loop.call(lambda: self._deliver(data))

    # The port's side

    def connect(self, receiver: Receiver) -> None:
        self._pump.connect(receiver)
        self._backlog.drained = lambda: self._loop.call(receiver.drained)  # the program holds a lock while it reads
        self._loop.call(self._pump.run)

    def write(self, data: bytes) -> None:
        self._backlog.put(data)
        if not self._news.is_set():
            self._news.set()

    def output_room(self) -> int:
        return self._backlog.room()

    def room_available(self) -> None:
        if self._pump.waiting:
            self._loop.call(self._pump.run)

    def status(self) -> BackendStatus:
        return BackendStatus("program", not self._closed, len(self._backlog), self._backlog.dropped + self._forgotten)

    def close(self) -> None:
        self._closed = True
        self._news.set()

    def _deliver(self, data: bytes) -> None:
        self._pump.put(data)
        if not self._closed:
            self._pump.run()

    def _gather(self) -> None:
        text = self._text + self._decoder.decode(self._backlog.take(2 * LIMIT))
        self._text = text[-KEPT:]
        self._forgotten += len(text) - len(self._text)
