"""What the ports of one VM are plugged into: made as the tree says it, closed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from skep.chardev.loop import Loop
from skep.chardev.transcript import Transcript
from skep.contracts.chardev import BackendStatus, CharBackend
from skep.errors import UserError

if TYPE_CHECKING:
    from skep.chardev.console import Console
    from skep.chardev.stdio import Stdio

KINDS = "stdio, none, pty, unix:PATH, tcp:HOST:PORT, file:PATH or program"


class Plugs:
    """The backends of one VM, by their ports' names. What waits for descriptors does so on one loop, which is made
    when the first backend needs it.

    ``say`` gets a line for the user's eyes; ``stop`` is for who asks for the VM's end at the terminal; ``failed`` is
    told of what is our mistake.
    """

    def __init__(
        self,
        vm: str,
        say: Callable[[str], None],
        stop: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._vm = vm
        self._say = say
        self._stop = stop
        self._failed = failed
        self._loop: Loop | None = None
        self._backends: dict[str, CharBackend] = {}
        self.consoles: dict[str, Console] = {}
        """Those whose other end is the program's."""
        self.stdio: Stdio | None = None
        self.transcript = Transcript()
        """The end of what was written to all of them."""

    def plug(self, port: str, where: str, key: str) -> CharBackend:
        """The backend of ``port``, which ``key`` of the tree wants to be ``where``: one of :data:`KINDS`.

        Raises UserError for what is none of them, or cannot be had.
        """
        if port in self._backends:
            raise UserError(f"another port is called {port} too", key)
        backend = self._backends[port] = self._make(port, where, key)
        return self.transcript.tap(backend)

    def _make(self, port: str, where: str, key: str) -> CharBackend:
        kind, colon, rest = where.partition(":")
        if colon and kind in ("unix", "tcp", "file"):
            return self._make_named(port, kind, rest, key)
        match where:
            case "none" | "":
                from skep.chardev.null import Null

                return Null()
            case "stdio":
                from skep.chardev.stdio import Stdio

                if self.stdio is not None:
                    raise UserError("there is one stdio, and another port has it", key)
                self.stdio = Stdio(self._the_loop(), self._stop)
                return self.stdio
            case "program":
                from skep.chardev.console import Console

                self.consoles[port] = Console(self._the_loop())
                return self.consoles[port]
            case "pty":
                from skep.chardev.pty import Pty

                return Pty(self._the_loop(), self._sayer(port))
            case _:
                raise UserError(f"no such serial backend: {where!r}", key, f"use {KINDS}")

    def _make_named(self, port: str, kind: str, rest: str, key: str) -> CharBackend:
        say = self._sayer(port)
        if kind == "unix":
            from skep.chardev.unix import unix

            return unix(self._the_loop(), rest, key, say)
        if kind == "tcp":
            from skep.chardev.tcp import tcp

            return tcp(self._the_loop(), rest, key, say)
        from skep.chardev.file import File

        return File(rest, key, say)

    def status(self) -> Iterator[tuple[str, BackendStatus]]:
        """Every port and what it is plugged into."""
        for port, backend in list(self._backends.items()):
            yield port, backend.status()

    def close(self) -> None:
        for port, backend in self._backends.items():
            backend.close()
            dropped = backend.status().dropped
            if dropped:
                self._say(f"{port}: {dropped} bytes of output were dropped, nobody read them")
        if self._loop is not None:
            self._loop.close()

    def _sayer(self, port: str) -> Callable[[str], None]:
        return lambda line: self._say(f"{port}: {line}")

    def _the_loop(self) -> Loop:
        if self._loop is None:
            self._loop = Loop(f"skep-{self._vm}-loop", self._failed)
        return self._loop
