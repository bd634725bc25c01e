"""One connection to a server, after the handshake: requests, many at once, and their replies in any order.

No thread of its own reads the replies: of those who wait for one, one at a time reads for all.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Sequence
from enum import IntEnum

from skep.block.backend import Buffers, fill_zeroes, split
from skep.block.nbd.handshake import Export, receive_into

_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC, _SIMPLE_MAGIC, _STRUCTURED_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_DONE = 1
_ERROR_BIT = 1 << 15
_LONGEST_MESSAGE = 1 << 16
_LONGEST_STATUS = 1 << 20
_MOST_ERRORS = 16
"""In the reply to one request."""
_IOV_MAX = 1024
_KNOWN_ERRORS = (
    *(errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC),
    *(errno.EOVERFLOW, errno.ENOTSUP, errno.ESHUTDOWN),
)

FUA, NO_HOLE = 1, 2
"""Command flags."""


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class _Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5


class ProtocolError(OSError):
    """The server says what it must not."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EPROTO, f"the NBD server: {what}")


class _Pending:
    """A request that was sent."""

    __slots__ = ("command", "done", "error", "errors", "left", "length", "offset", "room", "statuses")

    def __init__(self, command: Command, offset: int, length: int, room: Buffers) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.room = room
        self.left = length if command is Command.READ else 0
        """Bytes that have not come yet."""
        self.statuses: list[tuple[int, int]] = []
        self.error: OSError | None = None
        self.errors = 0
        self.done = False


class Connection:
    """Requests fail with OSError: the server's own error, or that the connection is lost, after which all do."""

    def __init__(self, link: socket.socket, export: Export) -> None:
        """The socket, which has a timeout, is this object's own from now on."""
        self.export = export
        self._link = link
        self._sending = threading.Lock()
        self._turn = threading.Condition()
        """Over all that follows."""
        self._pending: dict[int, _Pending] = {}
        self._cookie = 0
        self._reading = False
        self._lost: OSError | None = None

    @property
    def lost(self) -> OSError | None:
        return self._lost

    def request(
        self, command: Command, offset: int, length: int, flags: int = 0, data: Buffers = (), room: Buffers = ()
    ) -> Sequence[tuple[int, int]]:
        """Send a request, with the data of a write, and wait for its reply, which fills the room of a read. The answer
        is (length, flags) of BLOCK_STATUS. Raises OSError."""
        pending = _Pending(command, offset, length, room)
        with self._turn:
            if self._lost is not None:
                raise self._lost
            self._cookie = cookie = self._cookie + 1
            self._pending[cookie] = pending
        try:
            with self._sending:
                self._send([_REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length), *data])
        except OSError as error:
            self._lose(error)
        self._wait(pending)
        if pending.error is not None:
            raise pending.error
        return pending.statuses

    def _send(self, buffers: Sequence[bytes | memoryview]) -> None:
        rest: Buffers = [memoryview(one) for one in buffers]
        while rest:
            sent = self._link.sendmsg(rest[:_IOV_MAX])
            rest = split(rest, sent)[1]

    def _wait(self, pending: _Pending) -> None:
        while True:
            with self._turn:
                while self._reading and not pending.done:
                    self._turn.wait()
                if pending.done:
                    return
                self._reading = True
            try:
                self._read_reply()
            except OSError as error:
                self._lose(error)
            finally:
                with self._turn:
                    self._reading = False
                    self._turn.notify_all()

    def _lose(self, error: OSError) -> None:
        """All requests fail, now and later."""
        with self._turn:
            if self._lost is None:
                what = "it said nothing for too long" if isinstance(error, TimeoutError) else str(error)
                self._lost = OSError(error.errno or errno.EIO, f"the NBD connection is lost: {what}")
            for pending in self._pending.values():
                pending.error = self._lost
                pending.done = True
            self._pending.clear()
            self._turn.notify_all()
            try:
                self._link.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    # Replies.

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        receive_into(self._link, memoryview(data))
        return bytes(data)

    def _read_reply(self) -> None:
        (magic,) = struct.unpack(">I", self._receive(4))
        if magic == _SIMPLE_MAGIC:
            code, cookie = struct.unpack(">IQ", self._receive(12))
            self._read_simple(self._find(cookie), cookie, code)
        elif magic == _STRUCTURED_MAGIC and self.export.structured:
            flags, kind, cookie, length = struct.unpack(">HHQI", self._receive(16))
            pending = self._find(cookie)
            self._read_chunk(pending, kind, length)
            if kind == _Chunk.NONE and not flags & _DONE:
                raise ProtocolError("an empty chunk that is not the last")
            if flags & _DONE:
                if pending.left and pending.error is None:
                    raise ProtocolError("a read ended before all its bytes came")
                self._finish(cookie)
        else:
            raise ProtocolError(f"a reply begins with {magic:#x}")

    def _find(self, cookie: int) -> _Pending:
        with self._turn:
            pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolError("it answers what was not asked")
        return pending

    def _finish(self, cookie: int) -> None:
        with self._turn:
            pending = self._pending.pop(cookie, None)
            if pending is not None:
                pending.done = True

    def _read_simple(self, pending: _Pending, cookie: int, code: int) -> None:
        if pending.command is Command.BLOCK_STATUS or (pending.command is Command.READ and self.export.structured):
            raise ProtocolError("a simple reply where a structured one is due")
        if code:
            pending.error = _error(code, "")
        else:
            for buffer in pending.room:
                receive_into(self._link, buffer)
        self._finish(cookie)

    def _read_chunk(self, pending: _Pending, kind: int, length: int) -> None:
        if kind & _ERROR_BIT:
            self._read_error(pending, length)
        elif kind == _Chunk.NONE:
            if length:
                raise ProtocolError("an empty chunk that is not")
        elif kind in (_Chunk.OFFSET_DATA, _Chunk.OFFSET_HOLE) and pending.command is Command.READ:
            self._read_data(pending, kind, length)
        elif kind == _Chunk.BLOCK_STATUS and pending.command is Command.BLOCK_STATUS and not pending.statuses:
            self._read_status(pending, length)
        else:
            raise ProtocolError(f"a chunk of type {kind} for {pending.command.name}")

    def _read_data(self, pending: _Pending, kind: int, length: int) -> None:
        if length < 9 or (kind == _Chunk.OFFSET_HOLE and length != 12):
            raise ProtocolError("a chunk that is too short")
        (offset,) = struct.unpack(">Q", self._receive(8))
        hole = kind == _Chunk.OFFSET_HOLE
        n = struct.unpack(">I", self._receive(4))[0] if hole else length - 8
        at = offset - pending.offset
        if not n or n > pending.left or at < 0 or at + n > pending.length:
            raise ProtocolError("data that was not asked for")
        pending.left -= n
        room = split(split(pending.room, at)[1], n)[0]
        if hole:
            fill_zeroes(room)
        else:
            for buffer in room:
                receive_into(self._link, buffer)

    def _read_status(self, pending: _Pending, length: int) -> None:
        if length % 8 != 4 or not 12 <= length <= _LONGEST_STATUS:
            raise ProtocolError(f"the status of blocks in {length} bytes")
        data = self._receive(length)
        if struct.unpack_from(">I", data)[0] != self.export.context:
            raise ProtocolError("the status of blocks of another kind")
        pending.statuses = list(struct.iter_unpack(">II", data[4:]))
        if not all(n for n, _ in pending.statuses):
            raise ProtocolError("the status of no bytes")

    def _read_error(self, pending: _Pending, length: int) -> None:
        pending.errors += 1
        if not 6 <= length <= _LONGEST_MESSAGE or pending.errors > _MOST_ERRORS:
            raise ProtocolError("errors without end")
        data = self._receive(length)
        code, n = struct.unpack_from(">IH", data)
        pending.error = _error(code, data[6 : 6 + n].decode(errors="replace")[:200])

    def close(self) -> None:
        """Part as the protocol wants it. Requests that wait fail."""
        if self._lost is None:
            try:
                with self._sending:
                    self._send([_REQUEST.pack(_REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0)])
            except OSError:
                pass
        self._lose(ConnectionError("it was closed"))
        self._link.close()


def _error(code: int, told: str) -> OSError:
    code = code if code in _KNOWN_ERRORS else errno.EINVAL
    return OSError(code, f"the NBD server: {told or os.strerror(code)}")
