"""The control socket: one JSON object a line, either way.

The server speaks first: ``{"skep": VERSION, "vm": NAME}``. To ``{"action": NAME, "arguments": {...}, "id": ANY}`` it
answers ``{"id": ANY, "result": {...}}`` or ``{"id": ANY, "error": {"message": TEXT}}``; ``arguments`` and ``id`` may
be left out. A client's requests are done one after the other.

It has a loop of its own, so that it answers also where the VM's hangs. Whoever connects is this user, or root; all the
same a client may send what it likes, or nothing, or not read: it then costs one of a few places and a bounded memory.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

from skep.chardev.loop import Loop
from skep.chardev.unix import listen
from skep.control.controller import Controller
from skep.control.directory import Claim

if TYPE_CHECKING:
    from skep.control.conversation import Conversation

MOST = 32
"""Clients at a time. Where there are more, the one that has been idle for longest goes."""
_AT_ONCE = 16
_REST = 0.2
"""Seconds without new clients when the host has no descriptor left for one."""
_PATIENCE = 1.0
"""Seconds that the last answers have to leave at the end."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Server:
    """Answers for one VM on the socket of its claim, until ``close``."""

    def __init__(self, controller: Controller, claim: Claim) -> None:
        self._controller = controller
        self._clients: dict[int, Conversation] = {}
        self._closed = False
        self._server, self._gone = listen(claim.socket, claim.name)
        self._server.setblocking(False)
        self._loop = Loop(f"skep-{claim.name}-control")
        self._name = claim.name
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
        from skep.control.conversation import Conversation, refuse  # most VMs are never asked anything

        connection.setblocking(False)
        if not _trusted(connection):
            refuse(connection, "this VM is another user's")
            return
        if len(self._clients) >= MOST:
            idle = [client for client in self._clients.values() if not client.at_work]
            if not idle:
                refuse(connection, "too many clients wait for this VM")
                return
            min(idle, key=lambda client: client.heard).close()
        client = Conversation(self._loop, connection, self._controller, self._forget)
        self._clients[connection.fileno()] = client
        client.greet(self._name)

    def _forget(self, fd: int) -> None:
        del self._clients[fd]


def _trusted(connection: socket.socket) -> bool:
    """unix(7), SO_PEERCRED: who connected is this user, or root."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())
