"""How an export is named: ``nbd://HOST[:PORT]/EXPORT`` and ``nbd+unix:///EXPORT?socket=PATH``, the NBD project's
``doc/uri.md``; QEMU's older ``nbd:HOST:PORT[:exportname=EXPORT]``; and by options of a layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from skep.block.tree import Layer
from skep.errors import UserError

PORT = 10809
_LONGEST_NAME = 4096
_OLD = re.compile(
    r"nbd:(?:unix:(?P<path>[^:]+)|(?P<host>\[[^]]+\]|[^:/]+):(?P<port>[0-9]+))(?::exportname=(?P<export>.*))?"
)


@dataclass(frozen=True, slots=True)
class Address:
    """Of an export. ``path`` is that of a Unix socket; without one, it is TCP."""

    export: str = ""
    host: str = ""
    port: int = PORT
    path: str | None = None
    timeout: float = 30
    """Seconds without a sign of the server until it is given up."""
    reconnect: float = 0
    """Seconds for which a lost connection is tried anew."""

    def __str__(self) -> str:
        if self.path is not None:
            return f"nbd+unix:///{self.export}?socket={self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}{'' if self.port == PORT else f':{self.port}'}/{self.export}"


def parse(text: str) -> Address:
    """Raises UserError."""
    from urllib.parse import parse_qs, unquote, urlsplit

    if (old := _OLD.fullmatch(text)) is not None:
        host = (old["host"] or "").strip("[]")
        return _checked(Address(old["export"] or "", host, int(old["port"] or PORT), old["path"]), text)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UserError(f"not an NBD address: {error}", text) from None
    export = unquote(parts.path.removeprefix("/"))
    query = parse_qs(parts.query, keep_blank_values=True)
    if unknown := set(query) - {"socket"}:
        raise UserError(f"an NBD address has no {unknown.pop()!r}", text, "known is socket")
    socket = query.get("socket", [None])[0]
    if (parts.scheme == "nbd+unix") != (socket is not None) or parts.username is not None or parts.fragment:
        todo = "it is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
        raise UserError("not an NBD address", text, todo)
    return _checked(Address(export, parts.hostname or "", PORT if port is None else port, socket), text)


def of_layer(said: Layer) -> Address:
    """Raises UserError."""
    server = said.below("server")
    place = said if server is None else server
    if server is not None:
        server.take("type")
    host, path, port = place.take("host"), place.take("path"), place.number("port", PORT)
    if server is not None:
        server.done()
    export = said.take("export") or ""
    timeout, reconnect = said.number("timeout", 30), said.number("reconnect-delay", 0)
    said.done()
    if (host is None) == (path is None):
        raise UserError("is missing, or path is" if host is None else "and path are both told", said.where("host"))
    address = Address(export, host or "", port or PORT, path, timeout or 30, reconnect or 0)
    return _checked(address, str(address))


def _checked(address: Address, text: str) -> Address:
    if address.path is None and not address.host:
        raise UserError("the host is missing", text, "it is nbd://HOST[:PORT]/EXPORT")
    if not 0 < address.port < 1 << 16:
        raise UserError(f"{address.port} is no port", text)
    if len(address.export.encode()) > _LONGEST_NAME:
        raise UserError(f"an export's name has at most {_LONGEST_NAME} bytes", text[:60])
    return address
