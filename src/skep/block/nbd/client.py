"""An NBD server's export as a file, over which formats lie."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from skep.block.backend import Buffers, Extent, File, Located, split, write_zeroes_as_data
from skep.block.closing import Closing
from skep.block.nbd.address import Address, of_layer, parse
from skep.block.nbd.connection import FUA, NO_HOLE, Command, Connection, ProtocolError
from skep.block.nbd.handshake import Flag, shake_hands
from skep.block.tree import Layer
from skep.errors import UserError

_STEP = 1 << 30
"""Bytes that one request without data covers at most."""
_HOLE, _ZERO = 1, 2
"""Of base:allocation."""
_PAUSE = 0.2


def open_nbd(name: str, *, read_only: bool, write_cache: bool) -> File:
    """Raises UserError."""
    return NbdFile(parse(name), read_only=read_only, write_cache=write_cache)


def open_layer(said: Layer, *, read_only: bool, write_cache: bool) -> File:
    """Raises UserError."""
    return NbdFile(of_layer(said), read_only=read_only, write_cache=write_cache)


class NbdFile(Closing):
    """Its size stays. Transfers are multiples of ``alignment``. Many may be under way, each from a thread of its own.

    When the connection is lost, what is under way fails, unless the address allows to reconnect: then it is tried again
    on the next one. What was written and not flushed may be lost with the server, so no later flush succeeds.
    """

    def __init__(self, address: Address, *, read_only: bool = False, write_cache: bool = True) -> None:
        """Raises UserError."""
        self.path = str(address)
        self._address = address
        self._link: Connection | None = self._connect()
        export = self._link.export
        self.size = export.size // export.least * export.least
        self.alignment = export.least
        self.read_only = read_only
        self.write_cache = write_cache
        self._flags = Flag(export.flags)
        self._dirty = False
        """Something was written that no flush covers."""
        self._failed: OSError | None = None
        """Why no flush succeeds any more."""
        self._changing = threading.Lock()
        """Over changes of ``_link``. Nobody who holds it waits for another lock of ours."""
        if not read_only and Flag.READ_ONLY in self._flags:
            self.close()
            raise UserError("the NBD server allows only to read", self.path, "say ro")

    def _connect(self) -> Connection:
        address = self._address
        link = None
        try:
            if address.path is not None:
                link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                link.settimeout(address.timeout)
                link.connect(address.path)
            else:
                link = socket.create_connection((address.host, address.port), address.timeout)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Connection(link, shake_hands(link, address.export, self.path))
        except (OSError, UserError) as error:
            if link is not None:
                link.close()
            if isinstance(error, UserError):
                raise
            what = error.strerror or str(error)
            raise UserError(f"the NBD server cannot be reached: {what}", self.path) from None

    def _request(
        self, command: Command, offset: int, length: int, flags: int = 0, data: Buffers = (), room: Buffers = ()
    ) -> Sequence[tuple[int, int]]:
        """As :meth:`Connection.request`; again on another connection, if this one is lost and that is allowed."""
        ends = None
        while True:
            link = self._link
            if link is None:
                raise OSError(errno.EBADF, "the NBD connection is closed", self.path)
            try:
                return link.request(command, offset, length, flags, data, room)
            except OSError:
                if link.lost is None or not self._address.reconnect:
                    raise
            ends = time.monotonic() + self._address.reconnect if ends is None else ends
            self._reconnect(link, ends)

    def _reconnect(self, lost: Connection, ends: float) -> None:
        with self._changing:
            if self._link is not lost:
                return
            if self._dirty and self._failed is None:
                self._failed = OSError(errno.EIO, "what was written may be lost with the NBD connection", self.path)
            while True:
                try:
                    link = self._connect()
                except UserError:
                    if time.monotonic() + _PAUSE > ends:
                        raise lost.lost or OSError(errno.EIO, "the NBD connection is lost", self.path) from None
                    time.sleep(_PAUSE)
                    continue
                if (link.export.size, link.export.least) != (lost.export.size, lost.export.least):
                    link.close()
                    raise OSError(errno.EIO, "the NBD server offers another disk now", self.path)
                self._link = link
                lost.close()
                return

    # Transfers.

    def preadv(self, buffers: Buffers, offset: int) -> None:
        for part, at, n in self._parts(buffers, offset):
            self._request(Command.READ, at, n, room=part)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        for part, at, n in self._parts(buffers, offset):
            self._change(Command.WRITE, at, n, data=part)

    def _parts(self, buffers: Buffers, offset: int) -> Iterator[tuple[Buffers, int, int]]:
        """What one request each may move."""
        length = sum(map(len, buffers))
        if offset + length > self.size:
            raise OSError(errno.ENOSPC, "the NBD export ends before", self.path)
        link = self._link
        most = length if link is None else link.export.most
        while length:
            n = min(most, length)
            part, buffers = split(buffers, n)
            yield part, offset, n
            offset += n
            length -= n

    def _change(self, command: Command, offset: int, length: int, flags: int = 0, data: Buffers = ()) -> None:
        through = not self.write_cache
        fua = through and Flag.SEND_FUA in self._flags
        self._dirty = self._dirty or not fua
        self._request(command, offset, length, flags | (FUA if fua else 0), data)
        if through and not fua:
            self.flush()

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        return None

    def discard(self, offset: int, length: int) -> None:
        if Flag.SEND_TRIM in self._flags:
            for at in range(offset, offset + length, _STEP):
                self._change(Command.TRIM, at, min(_STEP, offset + length - at))

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if Flag.SEND_WRITE_ZEROES not in self._flags:
            write_zeroes_as_data(self, offset, length)
            return
        hole = 0 if unmap else NO_HOLE
        for at in range(offset, offset + length, _STEP):
            self._change(Command.WRITE_ZEROES, at, min(_STEP, offset + length - at), hole)

    def flush(self) -> None:
        if self._failed is not None:
            raise self._failed
        if Flag.SEND_FLUSH not in self._flags:
            return
        self._dirty = False
        try:
            self._request(Command.FLUSH, 0, 0)
        except OSError as error:
            self._failed = error
            raise
        if self._failed is not None:
            raise self._failed

    # As a file.

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = min(offset + length, self.size)
        link = self._link
        known = link is not None and link.export.context is not None
        while offset < end:
            first = offset // self.alignment * self.alignment
            n = min(_STEP, -(-(end - first) // self.alignment) * self.alignment)
            found = self._request(Command.BLOCK_STATUS, first, n) if known else [(end - first, 0)]
            at, before = first, offset
            for part, flags in found:
                stop = min(at + part, end)
                if stop > offset:
                    zero = bool(flags & _ZERO)
                    yield Extent(offset, stop - offset, data=not zero, zero=zero, host=offset)
                    offset = stop
                at += part
                if offset >= end:
                    break
            if offset == before:
                raise ProtocolError("the status of none of the blocks that were asked for")

    def resize(self, size: int) -> None:
        if size != self.size:
            raise OSError(errno.ENOSPC, "the size of an NBD export stays", self.path)

    def allocate(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, False)

    def allocated(self) -> int | None:
        return None

    @property
    def is_open(self) -> bool:
        return self._link is not None

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
