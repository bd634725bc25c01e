"""The serial port behind a listening socket, Unix or TCP: one client at a time, which may go and another come."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from skep.chardev.line import Line
from skep.chardev.loop import Loop

BUSY = b"[skep: somebody else has this port; try again when they have left]\r\n"
_AT_ONCE = 16
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_REST = 0.2
"""Seconds without new clients when the host has no descriptor left for one."""


class Listener(Line):
    """A :class:`~skep.contracts.chardev.CharBackend` on a socket that listens already. ``gone`` is called when it is
    closed. A client that shuts down its sending side has left."""

    def __init__(
        self, loop: Loop, server: socket.socket, where: str, say: Callable[[str], None], gone: Callable[[], None]
    ) -> None:
        super().__init__(loop, where, say)
        self._server = server
        self._gone = gone
        self._client: socket.socket | None = None
        server.setblocking(False)

    def _open(self) -> None:
        if not self._closed:
            self._loop.watch(self._server.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                client, _ = self._server.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._loop.watch(self._server.fileno())
                    self._loop.call_later(_REST, self._open)
                    return
                continue  # this one went away before it was taken
            if self._link is not None and self._link.gone():
                self._detach()
            if self._link is not None:
                _turn_away(client)
                continue
            client.setblocking(False)
            self._client = client
            self._attach(client.fileno())

    def _left(self, fd: int) -> None:
        client, self._client = self._client, None
        if client is not None:
            _hang_up(client)

    def _shut(self) -> None:
        self._loop.watch(self._server.fileno())
        self._server.close()
        self._gone()


def _turn_away(client: socket.socket) -> None:
    client.setblocking(False)
    try:
        client.send(BUSY)
    except OSError:
        pass
    _hang_up(client)


def _hang_up(client: socket.socket) -> None:
    """Close, having read what came: else TCP tells the other side to forget what it has not read yet."""
    try:
        client.shutdown(socket.SHUT_WR)
        for _ in range(_AT_ONCE):
            if not client.recv(1 << 16):
                break
    except OSError:
        pass
    client.close()
