"""The serial port on a Unix socket: ``socat - UNIX-CONNECT:PATH``."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable

from skep.chardev.listener import Listener
from skep.chardev.loop import Loop
from skep.errors import UserError

LONGEST = 107
"""Bytes of a name in struct sockaddr_un, less the zero."""
_CLIENTS = 128
_PROBES, _BETWEEN_PROBES = 5, 0.01


def unix(loop: Loop, path: str, key: str, say: Callable[[str], None]) -> Listener:
    """Listen on ``path``, for this user alone. Raises UserError, with ``key`` as its place."""
    server, gone = listen(path, key)
    return Listener(loop, server, f"unix:{path}", say, gone)


def listen(path: str, key: str) -> tuple[socket.socket, Callable[[], None]]:
    """A socket of mode 0600 that listens on ``path``, and what removes it again. One that nobody listens on any more,
    of a process that was killed, is replaced. Raises UserError, with ``key`` as its place."""
    if not path:
        raise UserError("names no socket", key, "say unix:PATH")
    if len(os.fsencode(path)) > LONGEST:
        raise UserError(f"{path} is longer than the {LONGEST} bytes that a socket's name may have", key)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(server.fileno(), 0o600)  # before it has a name, so that nobody else is ever let in
        try:
            server.bind(path)
        except OSError as error:
            if not _is_stale(path):
                raise UserError(f"{path}: {_why(path, error)}", key) from None
            os.unlink(path)
            server.bind(path)
        server.listen(_CLIENTS)
        mine = os.stat(path)
    except OSError as error:
        server.close()
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}", key) from None
    except BaseException:
        server.close()
        raise

    def remove() -> None:
        try:
            there = os.lstat(path)
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                os.unlink(path)
        except OSError:
            pass

    return server, remove


def _is_stale(path: str) -> bool:
    """A socket that nobody listens on. One that has just got its name may be about to."""
    try:
        for _ in range(_PROBES):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                return False
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(path)
                    return False
                except ConnectionRefusedError:
                    time.sleep(_BETWEEN_PROBES)
    except OSError:
        return False
    return True


def _why(path: str, error: OSError) -> str:
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            return "somebody else listens there"
        return "exists, and is no socket"
    except OSError:
        return (error.strerror or str(error)).lower()
