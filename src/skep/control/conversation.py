"""What is said over a connection to the control socket: see :mod:`skep.control.server`."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

from skep import __version__
from skep.chardev.loop import Loop
from skep.control.actions import parse
from skep.control.controller import Controller, Reply
from skep.errors import UserError

LONGEST = 1 << 16
"""Bytes of a request."""
_CHUNK = 1 << 16


class Conversation:
    """With one client. It reads while it has nothing to do and nothing to say, so it has one request at most."""

    def __init__(
        self, loop: Loop, connection: socket.socket, controller: Controller, forget: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._fd = connection.fileno()
        self._controller = controller
        self._forget = forget
        self._received = bytearray()
        self._unsent = b""
        self._ended = False
        """It says no more."""
        self._last = False
        """Nothing more is to be done for it than to send what is unsent."""
        self.at_work = False
        self.heard = time.monotonic()
        self._closed = False

    @property
    def busy(self) -> bool:
        return self.at_work or bool(self._unsent)

    def greet(self, name: str) -> None:
        """``name``: the VM's."""
        self._unsent += _line({"skep": __version__, "vm": name})
        self._writable()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.watch(self._fd)
            self._forget(self._fd)
            self._connection.close()

    def _writable(self) -> None:
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self._next()

    def _readable(self) -> None:
        try:
            data = self._connection.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self.heard = time.monotonic()
        self._received += data
        self._ended = not data
        self._next()

    def _next(self) -> None:
        """Do the next request that is there, or wait for what there is to wait for."""
        while not self._closed and not self.at_work and not self._unsent and not self._last:
            line, newline, rest = self._received.partition(b"\n")
            if not newline:
                if len(line) > LONGEST:
                    self._give_up(f"a request has at most {LONGEST} bytes")
                    continue
                break
            self._received = rest
            self._request(bytes(line))
        if self._closed:
            return
        if (self._ended or self._last) and not self.at_work and not self._unsent:
            self.close()
            return
        reading = not self.at_work and not self._unsent and not self._ended
        self._loop.watch(
            self._fd, self._readable if reading else None, self._writable if self._unsent else None
        )

    def _request(self, line: bytes) -> None:
        if len(line) > LONGEST:
            self._give_up(f"a request has at most {LONGEST} bytes")
            return
        ident: Any = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise UserError("a request is an object, {\"action\": \"status\"}")
            ident = request.get("id")
            unknown = sorted(request.keys() - {"action", "arguments", "id"})
            if unknown:
                raise UserError(f"a request has no {unknown[0][:40]!r}")
            action = parse(request.get("action"), request.get("arguments", {}))
        except UserError as error:
            self._answer(ident, {"error": {"message": str(error)}})
            return
        except (ValueError, RecursionError) as error:
            self._give_up(f"not JSON: {error}")
            return
        self.at_work = True
        self._controller.submit(action, lambda reply: self._loop.call(lambda: self._done(ident, reply)))

    def _done(self, ident: Any, reply: Reply) -> None:
        self.at_work = False
        self.heard = time.monotonic()
        if not self._closed:
            self._answer(ident, reply)
            self._writable()

    def _answer(self, ident: Any, reply: Reply) -> None:
        self._unsent += _line({**({} if ident is None else {"id": ident}), **reply})

    def _give_up(self, message: str) -> None:
        """Who says such things is not understood any more: no telling where the next request begins."""
        self._last = True
        self._received.clear()
        self._answer(None, {"error": {"message": message}})


def refuse(connection: socket.socket, message: str) -> None:
    try:
        connection.send(_line({"error": {"message": message}}))
    except OSError:
        pass
    connection.close()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
