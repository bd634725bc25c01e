"""What client and server agree on before the first request: "Newstyle negotiation" of the protocol, fixed.

Servers without NBD_OPT_GO are asked by NBD_OPT_EXPORT_NAME. Everything that a server says is bounded.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from skep.errors import UserError

_INIT, _OPTION, _REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x0003E889045565A9
_FIXED, _NO_ZEROES = 1, 2
_LONGEST_REPLY = 1 << 16
_MOST_REPLIES = 64
"""To one option."""
ALLOCATION = "base:allocation"


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    ACK = 1
    INFO = 3
    META_CONTEXT = 4
    ERR = 1 << 31
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6


class Info(IntEnum):
    EXPORT = 0
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """Transmission flags."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64


@dataclass(slots=True)
class Export:
    """What the server offers."""

    size: int = 0
    flags: int = 0
    least: int = 1
    """Bytes: what requests are multiples of."""
    most: int = 32 << 20
    """Of data in one request."""
    structured: bool = False
    context: int | None = None
    """The number of base:allocation."""


class HandshakeError(UserError):
    """The server cannot be talked with, or does not have what is wanted."""


def shake_hands(connection: socket.socket, name: str, where: str) -> Export:
    """Agree on the export ``name``. Raises HandshakeError, and OSError where the connection is lost."""
    return _Handshake(connection, where).agree(name)


class _Handshake:
    def __init__(self, connection: socket.socket, where: str) -> None:
        self._connection = connection
        self._where = where

    def agree(self, name: str) -> Export:
        magic, style, flags = struct.unpack(">QQH", self._receive(18))
        if magic != _INIT or style != _OPTION or not flags & _FIXED:
            raise self._wrong("it speaks no NBD, or only that of before 2011")
        self._connection.sendall(struct.pack(">I", flags & (_FIXED | _NO_ZEROES)))
        export = Export()
        export.structured = self._ask(Option.STRUCTURED_REPLY, b"") is not None
        if export.structured:
            self._agree_on_context(name, export)
        wanted = struct.pack(">HH", 1, Info.BLOCK_SIZE)
        replies = self._ask(Option.GO, _text(name) + wanted)
        if replies is None:
            self._by_name(name, export, short=bool(flags & _NO_ZEROES))
        else:
            self._read_infos(replies, export)
        if not export.flags & Flag.HAS_FLAGS or export.size >= 1 << 63:
            raise self._wrong(f"an export of {export.size} bytes with flags {export.flags:#x}")
        return export

    def _agree_on_context(self, name: str, export: Export) -> None:
        query = _text(name) + struct.pack(">I", 1) + _text(ALLOCATION)
        for data in self._ask(Option.SET_META_CONTEXT, query) or ():
            kind, body = data
            if kind == Reply.META_CONTEXT and len(body) > 4 and body[4:] == ALLOCATION.encode():
                (export.context,) = struct.unpack_from(">I", body)

    def _read_infos(self, replies: list[tuple[int, bytes]], export: Export) -> None:
        told = False
        for kind, body in replies:
            if kind != Reply.INFO or len(body) < 2:
                continue
            (info,) = struct.unpack_from(">H", body)
            if info == Info.EXPORT and len(body) == 12:
                export.size, export.flags = struct.unpack_from(">QH", body, 2)
                told = True
            elif info == Info.BLOCK_SIZE and len(body) == 14:
                least, preferred, most = struct.unpack_from(">III", body, 2)
                if not 1 <= least <= 65536 or least & (least - 1) or most < max(least, 4096) or preferred < least:
                    raise self._wrong(f"blocks of {least} to {most} bytes")
                export.least, export.most = least, min(export.most, most // least * least)
        if not told:
            raise self._wrong("it does not tell the size of the export")

    def _by_name(self, name: str, export: Export, *, short: bool) -> None:
        """NBD_OPT_EXPORT_NAME: the server has no way to say no, but to hang up."""
        self._send(Option.EXPORT_NAME, name.encode())
        try:
            export.size, export.flags = struct.unpack(">QH", self._receive(10))
        except ConnectionError:
            raise self._wrong(f"it hung up; perhaps it has no export {name!r}") from None
        if not short:
            self._receive(124)

    def _ask(self, option: Option, data: bytes) -> list[tuple[int, bytes]] | None:
        """The replies, with their types, up to the one that ends them; None: the server does not know the option."""
        self._send(option, data)
        replies: list[tuple[int, bytes]] = []
        for _ in range(_MOST_REPLIES):
            magic, echoed, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _REPLY or echoed != option or length > _LONGEST_REPLY:
                raise self._wrong("it answers something else than was asked")
            body = self._receive(length)
            if kind == Reply.ACK:
                return replies
            if kind & Reply.ERR:
                self._refused(option, kind, body)
                return None
            replies.append((kind, body))
        raise self._wrong("it answers without end")

    def _refused(self, option: Option, kind: int, body: bytes) -> None:
        told = body.decode(errors="replace")[:200].strip()
        if kind == Reply.ERR_TLS_REQD:
            raise self._wrong("it demands TLS, which is not supported")
        if option == Option.GO and kind != Reply.ERR_UNSUP:
            what = "it has no such export" if kind == Reply.ERR_UNKNOWN else f"it refuses ({kind & 0xFFFF})"
            raise self._wrong(f"{what}{': ' if told else ''}{told}")

    def _send(self, option: Option, data: bytes) -> None:
        self._connection.sendall(struct.pack(">QII", _OPTION, option, len(data)) + data)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        receive_into(self._connection, memoryview(data))
        return bytes(data)

    def _wrong(self, what: str) -> HandshakeError:
        return HandshakeError(f"the NBD server: {what}", self._where)


def _text(name: str) -> bytes:
    data = name.encode()
    return struct.pack(">I", len(data)) + data


def receive_into(connection: socket.socket, room: memoryview) -> None:
    """Fill the room. Raises OSError where the connection ends before."""
    while room:
        n = connection.recv_into(room)
        if not n:
            raise ConnectionResetError("the NBD server hung up")
        room = room[n:]
