"""The serial port on a TCP socket: ``socat - TCP:HOST:PORT``. Whoever reaches it has the console, unencrypted."""

from __future__ import annotations

import socket
from collections.abc import Callable

from skep.chardev.listener import Listener
from skep.chardev.loop import Loop
from skep.errors import UserError

_CLIENTS = 128
_IDLE, _INTERVAL, _PROBES = 15, 5, 3
"""A client whose host has vanished is gone after 30 seconds, and another may come."""


def tcp(loop: Loop, address: str, key: str, say: Callable[[str], None]) -> Listener:
    """Listen on ``HOST:PORT``, an IPv6 address in brackets; port 0 is any free one, which ``say`` is told.

    Raises UserError, with ``key`` as its place."""
    host, port = _parse(address, key)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"{host}: {(error.strerror or str(error)).lower()}", key) from None
    family, kind, protocol, _, target = found[0]
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (_IDLE + _INTERVAL * _PROBES) * 1000)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.bind(target)
        server.listen(_CLIENTS)
    except OSError as error:
        server.close()
        raise UserError(f"{address}: {(error.strerror or str(error)).lower()}", key) from None
    bound = server.getsockname()
    name = f"[{bound[0]}]:{bound[1]}" if family == socket.AF_INET6 else f"{bound[0]}:{bound[1]}"
    if not port:
        say(f"it listens on {name}")
    return Listener(loop, server, f"tcp:{name}", say, lambda: None)


def _parse(address: str, key: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UserError(f"{address!r} is not HOST:PORT", key, "an IPv6 address stands in brackets: [::1]:4000")
    if not colon or not host or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"{address!r} is not HOST:PORT", key, "say tcp:127.0.0.1:4000")
    return host, int(port)
