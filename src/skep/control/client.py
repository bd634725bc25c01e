"""The other end of a VM's control socket."""

from __future__ import annotations

import json
import socket
from typing import Any

from skep.config.tree import nearest
from skep.control import directory
from skep.errors import UserError

_PATIENCE = 5.0
"""Seconds in which a VM greets us, however busy its host is."""
_MOST = 64 << 20
"""Bytes of an answer."""


class Client:
    """A connection to a VM of this user's. Raises UserError where there is none of that name, or it does not answer."""

    def __init__(self, name: str, patience: float | None = None) -> None:
        """``patience``: seconds that an answer may take; None: as many as it likes, once the VM has greeted us."""
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_PATIENCE)
            try:
                self._socket.connect(directory.socket_of(name))
            except (FileNotFoundError, ConnectionRefusedError):
                raise _no_such(name) from None
            except OSError as error:
                raise UserError((error.strerror or str(error)).lower(), name) from None
            self._file = self._socket.makefile("rb")
            self.greeting = self._receive()
            self._socket.settimeout(patience)
        except BaseException:
            self._socket.close()
            raise

    def request(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and wait for the result. Raises UserError with what the VM has against it."""
        request = {"action": action, "arguments": {key: value for key, value in arguments.items() if value is not None}}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            pass  # it may have said why before it hung up
        reply = self._receive()
        result = reply.get("result")
        if not isinstance(result, dict):
            raise UserError("answered neither with a result nor with an error", self.name)
        return result

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._file.readline(_MOST)
            reply = json.loads(line) if line.endswith(b"\n") else None
        except TimeoutError:
            raise UserError(f"does not answer within {self._socket.gettimeout():g} seconds", self.name) from None
        except (OSError, ValueError):
            reply = None
        if not isinstance(reply, dict):
            raise UserError("has hung up: it has just ended", self.name)
        if "error" in reply:
            raise UserError(str(reply["error"]["message"]))
        return reply


def _no_such(name: str) -> UserError:
    known = directory.names()
    if name in known:
        return UserError("does not answer: it is just starting, or ending", name)
    near = nearest(name, known)
    hint = f"the nearest is {near}" if near else "`skep list` shows those that are"
    return UserError("no VM of that name is running", name, hint)
