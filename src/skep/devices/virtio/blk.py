"""The block device (virtio 1.2, 5.2): a disk over any block backend.

What it promises about writes is 5.2.6.2's: one that completed is stable once a flush has completed that was sent later;
or at once, while the write cache is off, because the driver said so (``writeback``), because it knows of no flush, or
because the user did (``wce``).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from skep.block.backend import BlockBackend
from skep.block.options import SECTOR, BlockOptions
from skep.devices.virtio.device import VirtioDevice
from skep.devices.virtio.flusher import Flusher
from skep.devices.virtio.queue import Chain, DriverError
from skep.locks import Lock
from skep.memory import GuestMemory

# 5.2.3, feature bits.
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10, 1 << 11

# 5.2.6, request types and the status byte.
T_IN, T_OUT, T_FLUSH, T_GET_ID = 0, 1, 4, 8
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

QUEUE_SIZE = 256
ID_LENGTH = 20

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
# 5.2.4: capacity; size_max, seg_max; geometry; blk_size; topology; writeback, unused, num_queues. What follows is of
# features that are not offered, and 0.
_CONFIG = struct.Struct("<Q II HBB I BBHI BBH")
CONFIG_SIZE = 60
_WRITEBACK = 32

_STATUS = {status: bytes([status]) for status in (S_OK, S_IOERR, S_UNSUPP)}


class VirtioBlk(VirtioDevice):
    state_fields = (*VirtioDevice.state_fields, "writeback")
    device_id = 2
    class_code = 0x01_8000  # mass storage, other

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        lock: Lock,
        backend: BlockBackend,
        options: BlockOptions,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``backend`` is this device's own from now on, and closed with it."""
        features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE
        super().__init__(name, memory, lock, features | (F_RO if backend.read_only else 0), [QUEUE_SIZE], say)
        self._backend = backend
        self._flusher = Flusher(f"{name} flush", backend.flush, self._flushed)
        self._options = options
        self._id = (options.serial or default_serial(options.path)).encode("ascii").ljust(ID_LENGTH, b"\0")
        self.power_on()

    def power_on(self) -> None:
        self.writeback = self._options.write_cache and self._backend.write_cache

    def close(self) -> None:
        super().close()
        self._flusher.close()
        self._backend.close()

    # Configuration space.

    def config_read(self, offset: int, size: int) -> int:
        logical, physical = self._options.block
        ratio = physical // logical
        config = _CONFIG.pack(
            *(self._backend.size // SECTOR, 0, QUEUE_SIZE - 2, 0, 0, 0, logical),
            *(ratio.bit_length() - 1, 0, min(ratio, 0xFFFF), 0, self.writeback, 0, 1),
        )
        return int.from_bytes(config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset == _WRITEBACK and size == 1 and self.driver_features & F_CONFIG_WCE:
            self.writeback = bool(value)

    def negotiated(self) -> None:
        """5.2.5.2: a driver that cannot flush gets no write cache, unless it asks for one."""
        if self.writeback and self.driver_features & (F_CONFIG_WCE | F_FLUSH) == F_CONFIG_WCE:
            self.writeback = False
            self.config_changed()

    @property
    def write_through(self) -> bool:
        """Writes are to be stable when they complete."""
        if self.driver_features & F_CONFIG_WCE:
            return not self.writeback
        return not self.driver_features & F_FLUSH or not self._options.write_cache

    # Requests.

    def serve(self, chain: Chain) -> int | None:
        """5.2.6: a header of 16 bytes and the data to write; the data read and a status byte. In buffers cut anyhow."""
        if not chain.writable:
            raise DriverError("a block request without a status byte")
        header, payload = _take_header(chain.readable)
        kind, _, sector = _HEADER.unpack(header)
        if kind == T_IN:
            return self._read(chain, sector)
        if kind == T_OUT:
            return self._write(chain, sector, payload)
        if kind == T_FLUSH:
            self._flusher.submit(chain)
            return None
        if kind == T_GET_ID:
            return _answer(chain, S_OK, _scatter(self._id, _room(chain)))
        return _answer(chain, S_UNSUPP)

    def _read(self, chain: Chain, sector: int) -> int:
        room = _room(chain)
        length = sum(map(len, room))
        if not self._inside(sector, length):
            return _answer(chain, S_IOERR)
        if length:
            try:
                self._backend.preadv(room, sector * SECTOR)
            except OSError:
                return _answer(chain, S_IOERR)
        return _answer(chain, S_OK, length)

    def _write(self, chain: Chain, sector: int, payload: list[memoryview]) -> int | None:
        length = sum(map(len, payload))
        if self._backend.read_only or not self._inside(sector, length):
            return _answer(chain, S_IOERR)
        if length:
            # Looked at before the write: it is to be durable if the cache was off all the time (5.2.6.2).
            durable = self.write_through and self._backend.write_cache
            try:
                self._backend.pwritev(payload, sector * SECTOR)
            except OSError:
                return _answer(chain, S_IOERR)
            if durable:
                self._flusher.submit(chain)
                return None
        return _answer(chain, S_OK)

    def _flushed(self, chain: Chain, success: bool) -> None:
        """On the flusher's thread."""
        self.finish(chain, _answer(chain, S_OK if success else S_IOERR))

    def _inside(self, sector: int, length: int) -> bool:
        return not length % SECTOR and sector * SECTOR + length <= self._backend.size


def default_serial(path: str) -> str:
    """The same for the same path: guests name disks by it (/dev/disk/by-id)."""
    return f"SKEP-{zlib.crc32(path.encode(errors='surrogateescape')):08X}"


def _take_header(readable: list[memoryview]) -> tuple[bytes | memoryview, list[memoryview]]:
    """The request's header, and the data behind it (2.7.4: the framing means nothing). Raises DriverError."""
    if readable and len(readable[0]) == _HEADER.size:
        # One copy, since the driver may change it while we look.
        return bytes(readable[0]), readable[1:]
    header = bytearray()
    rest = list(readable)
    while rest and len(header) < _HEADER.size:
        missing = _HEADER.size - len(header)
        header += rest[0][:missing]
        rest[:1] = [rest[0][missing:]] if len(rest[0]) > missing else []
    if len(header) < _HEADER.size:
        raise DriverError("a block request without a header")
    return bytes(header), rest


def _room(chain: Chain) -> list[memoryview]:
    """Where the data goes: all that is writable, but for the status byte at its end."""
    *room, last = chain.writable
    if len(last) > 1:
        room.append(last[:-1])
    return room


def _answer(chain: Chain, status: int, written: int = 0) -> int:
    """Set the status byte; returns the length to report, ``written`` bytes of the data having been written.

    What is reported is counted from the start (2.7.8): the status byte counts only if all before it was written.
    """
    chain.writable[-1][-1:] = _STATUS[status]
    return written + (written == sum(map(len, chain.writable)) - 1)


def _scatter(data: bytes, room: list[memoryview]) -> int:
    """Copy as much as there is room for; returns how much."""
    at = 0
    for piece in room:
        part = data[at : at + len(piece)]
        piece[: len(part)] = part
        at += len(part)
    return at
