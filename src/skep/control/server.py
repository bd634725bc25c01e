"""The control socket: one JSON object a line, either way.

The server speaks first: ``{"skep": VERSION, "vm": NAME}``. To ``{"action": NAME, "arguments": {...}, "id": ANY}`` it
answers ``{"id": ANY, "result": {...}}`` or ``{"id": ANY, "error": {"message": TEXT}}``; ``arguments`` and ``id`` may
be left out. A client's requests are done one after the other.

It has a loop of its own, so that it answers also where the VM's hangs. Whoever connects is this user, or root; all the
same a client may send what it likes, or nothing, or not read: it then costs one of a few places and a bounded memory.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from skep import __version__
from skep.chardev.loop import Loop
from skep.chardev.unix import listen
from skep.control.actions import parse
from skep.control.controller import Controller, Reply
from skep.control.directory import Claim
from skep.errors import UserError

LONGEST = 1 << 16
"""Bytes of a request."""
MOST = 32
"""Clients at a time. Where there are more, the one that has been idle for longest goes."""
_AT_ONCE = 16
_CHUNK = 1 << 16
_REST = 0.2
"""Seconds without new clients when the host has no descriptor left for one."""
_PATIENCE = 1.0
"""Seconds that the last answers have to leave at the end."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Server:
    """Answers for one VM on the socket of its claim, until ``close``."""

    def __init__(self, controller: Controller, claim: Claim) -> None:
        self._controller = controller
        self._clients: dict[int, _Client] = {}
        self._closed = False
        self._server, self._gone = listen(str(claim.socket), claim.name)
        self._server.setblocking(False)
        self._loop = Loop(f"skep-{claim.name}-control")
        self._greeting = _line({"skep": __version__, "vm": claim.name})
        self._loop.watch(self._server.fileno(), self._accept)

    def close(self) -> None:
        """What is under way is answered if it ends at once; then everybody is hung up on."""
        if self._closed:
            return
        self._closed = True
        self._loop.run(self._shut)
        deadline = time.monotonic() + _PATIENCE
        while any(client.busy for client in list(self._clients.values())) and time.monotonic() < deadline:
            time.sleep(0.005)
        self._loop.run(self._hang_up)
        self._loop.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # On the loop's thread.

    def _shut(self) -> None:
        self._loop.watch(self._server.fileno())
        self._server.close()
        self._gone()

    def _hang_up(self) -> None:
        for client in list(self._clients.values()):
            client.close()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self._server.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._loop.watch(self._server.fileno())
                    self._loop.call_later(_REST, self._listen_again)
                    return
                continue  # it went away before it was taken
            self._welcome(connection)

    def _listen_again(self) -> None:
        if not self._closed:
            self._loop.watch(self._server.fileno(), self._accept)

    def _welcome(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if not _trusted(connection):
            _refuse(connection, "this VM is another user's")
            return
        if len(self._clients) >= MOST:
            idle = [client for client in self._clients.values() if not client.at_work]
            if not idle:
                _refuse(connection, "too many clients wait for this VM")
                return
            min(idle, key=lambda client: client.heard).close()
        client = _Client(self._loop, connection, self._controller, self._forget)
        self._clients[connection.fileno()] = client
        client.send(self._greeting)

    def _forget(self, fd: int) -> None:
        del self._clients[fd]


class _Client:
    """One connection. It reads while it has nothing to do and nothing to say, so it never has more than one request."""

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

    def send(self, line: bytes) -> None:
        self._unsent += line
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


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _trusted(connection: socket.socket) -> bool:
    """unix(7), SO_PEERCRED: who connected is this user, or root."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


def _refuse(connection: socket.socket, message: str) -> None:
    try:
        connection.send(_line({"error": {"message": message}}))
    except OSError:
        pass
    connection.close()
