"""The block device (virtio 1.2, 5.2): a disk over any block backend.

What it promises about writes is 5.2.6.2's: one that completed is stable once a flush has completed that was sent later;
or at once, while the write cache is off, because the driver said so (``writeback``), because it knows of no flush, or
because the user did (``wce``). What a flush covers had completed before it was taken from its queue.

The worker does by itself what the host can do at once, a read from the page cache before all, and that even on the
thread of the vCPU that asks; whatever may have to wait goes to an io_uring, or to a pool of threads where that cannot
do it, and requests pass each other there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from skep.block.backend import BlockBackend
from skep.block.format import SECTOR
from skep.block.options import BlockOptions
from skep.block.queue import Queue as Requests
from skep.devices.virtio.device import HAND_OVER, VirtioDevice
from skep.devices.virtio.flusher import Flusher
from skep.devices.virtio.queue import Chain, DriverError
from skep.locks import Lock
from skep.memory import GuestMemory

# 5.2.3, feature bits.
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10, 1 << 11
F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 12, 1 << 13, 1 << 14

# 5.2.6, request types and the status byte.
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
UNMAP = 1 << 0

QUEUE_SIZE = 256
ID_LENGTH = 20
MAX_DISCARD, MAX_DISCARD_SEGMENTS = (1 << 31) // SECTOR, 32
MAX_WRITE_ZEROES, MAX_WRITE_ZEROES_SEGMENTS = (1 << 26) // SECTOR, 1
"""Sectors of a range, and ranges of a request. Zeros may have to be written, and a pause waits for it."""
_LONG = 1 << 16
"""Bytes that a visitor should not have to copy."""
_THREADS = 16
"""Requests that wait for the host at the same time and that no io_uring can do, flushes not counted."""

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_RANGE = struct.Struct("<QII")  # sector, num_sectors, flags
# 5.2.4: capacity; size_max, seg_max; geometry; blk_size; topology; writeback, unused, num_queues; the limits of
# discard, and its alignment; those of write zeroes, write_zeroes_may_unmap. What follows is of features not offered.
_CONFIG = struct.Struct("<Q II HBB I BBHI BBH III IIB3x")
CONFIG_SIZE = _CONFIG.size
_WRITEBACK = 32

_STATUS = {status: bytes([status]) for status in (S_OK, S_IOERR, S_UNSUPP)}


class Range(NamedTuple):
    """What a discard or a write of zeros is to touch."""

    offset: int
    length: int
    """Bytes, both."""
    unmap: bool


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
        queues: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``backend`` is this device's own from now on, and closed with it."""
        features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE
        features |= F_MQ if queues > 1 else 0
        features |= F_RO if backend.read_only else F_WRITE_ZEROES | (0 if options.no_delete else F_DISCARD)
        super().__init__(name, memory, lock, features, [QUEUE_SIZE] * queues, say)
        self.backend = backend
        """What holds the data. Before the VM starts, a program may put a layer of its own in front of it."""
        self._flusher = Flusher(f"{name} flush", self._flush, self._flushed)
        self._requests = Requests(f"{name} i/o", _THREADS)
        self._options = options
        self._id = (options.serial or default_serial(options.path)).encode("ascii").ljust(ID_LENGTH, b"\0")
        self._host_errors: set[int | None] = set()
        self.power_on()

    def power_on(self) -> None:
        self.writeback = self._options.write_cache and self.backend.write_cache

    def close(self) -> None:
        super().close()
        self._requests.close()
        self._flusher.close()
        self.backend.close()

    # Configuration space.

    def config_read(self, offset: int, size: int) -> int:
        logical, physical = self._options.block
        ratio = physical // logical
        discard = (MAX_DISCARD, MAX_DISCARD_SEGMENTS, physical // SECTOR) if self.features & F_DISCARD else (0, 0, 0)
        zeroes = (MAX_WRITE_ZEROES, MAX_WRITE_ZEROES_SEGMENTS) if self.features & F_WRITE_ZEROES else (0, 0)
        config = _CONFIG.pack(
            *(self.backend.size // SECTOR, 0, QUEUE_SIZE - 2, 0, 0, 0, logical),
            *(ratio.bit_length() - 1, 0, min(ratio, 0xFFFF), 0, self.writeback, 0, len(self.queues)),
            *(*discard, *zeroes, bool(self.features & F_DISCARD)),
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

    # Requests, on the worker's thread.

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
        if kind == T_DISCARD and self.driver_features & F_DISCARD:
            return self._clear(chain, payload, MAX_DISCARD, MAX_DISCARD_SEGMENTS, discard=True)
        if kind == T_WRITE_ZEROES and self.driver_features & F_WRITE_ZEROES:
            return self._clear(chain, payload, MAX_WRITE_ZEROES, MAX_WRITE_ZEROES_SEGMENTS, discard=False)
        return _answer(chain, S_UNSUPP)

    def _read(self, chain: Chain, sector: int) -> int | None:
        room = _room(chain)
        length = sum(map(len, room))
        offset = sector * SECTOR
        if not self._inside(offset, length):
            return _answer(chain, S_IOERR)
        if self.visited and length > _LONG:
            return HAND_OVER
        try:
            if not length or self.backend.read_now(room, offset):
                return _answer(chain, S_OK, length)
        except OSError as error:
            return self._refused(chain, error)
        self._requests.transfer(self.backend, False, room, offset, partial(self._done, chain, length, False))
        return None

    def _write(self, chain: Chain, sector: int, payload: list[memoryview]) -> int | None:
        length = sum(map(len, payload))
        offset = sector * SECTOR
        if self.backend.read_only or not self._inside(offset, length):
            return _answer(chain, S_IOERR)
        if not length:
            return _answer(chain, S_OK)
        if self.visited:  # even into the page cache a write may have to wait
            return HAND_OVER
        durable = self._durable
        try:
            if self.backend.write_now(payload, offset):
                if not durable:
                    return _answer(chain, S_OK)
                self._flusher.submit(chain)
                return None
        except OSError as error:
            return self._refused(chain, error)
        self._requests.transfer(self.backend, True, payload, offset, partial(self._done, chain, 0, durable))
        return None

    def _clear(
        self, chain: Chain, payload: list[memoryview], most: int, segments: int, *, discard: bool
    ) -> int | None:
        ranges = self._ranges(payload, most, segments, discard)
        if isinstance(ranges, int):
            return _answer(chain, ranges)
        self._requests.submit(partial(self._clear_all, chain, ranges, discard, self._durable))
        return None

    def _ranges(self, payload: list[memoryview], most: int, segments: int, discard: bool) -> list[Range] | int:
        """The ranges of a request (5.2.6), of so many sectors each and so many of them; or the status that it gets
        instead."""
        length = sum(map(len, payload))
        if self.backend.read_only or length % _RANGE.size or not 0 < length <= segments * _RANGE.size:
            return S_IOERR
        ranges = []
        for sector, count, flags in _RANGE.iter_unpack(b"".join(payload)):
            if flags & ~UNMAP or (discard and flags):
                return S_UNSUPP
            if count > most or not self._inside(sector * SECTOR, count * SECTOR):
                return S_IOERR
            if count:
                ranges.append(Range(sector * SECTOR, count * SECTOR, bool(flags) and not self._options.no_delete))
        return ranges

    @property
    def _durable(self) -> bool:
        """A write that begins now is to be flushed before it completes: it is to be durable if the cache was off all
        the time (5.2.6.2), so one looks before the write."""
        return self.write_through and self.backend.write_cache

    def _inside(self, offset: int, length: int) -> bool:
        unit = self._options.block.logical
        return not (offset % unit or length % unit) and offset + length <= self.backend.size

    # Requests, on other threads.

    def _done(self, chain: Chain, written: int, durable: bool, error: Exception | None) -> None:
        """A transfer ended, which put so many bytes into the guest's buffers."""
        if error is not None:
            self.finish((chain, self._refused(chain, error)))
        elif durable:
            self._flusher.submit(chain)
        else:
            self.finish((chain, _answer(chain, S_OK, written)))

    def _clear_all(self, chain: Chain, ranges: list[Range], discard: bool, durable: bool) -> None:
        problem: Exception | None = None
        try:
            for offset, length, unmap in ranges:
                if discard:
                    self.backend.discard(offset, length)
                else:
                    self.backend.write_zeroes(offset, length, unmap)
        except Exception as error:
            problem = error
        self._done(chain, 0, durable, problem)

    def _flush(self) -> None:
        self.backend.flush()

    def _flushed(self, chains: list[Chain], error: Exception | None) -> None:
        if error is None:
            self.finish(*((chain, _answer(chain, S_OK)) for chain in chains))
        else:
            self.finish(*((chain, self._refused(chain, error)) for chain in chains))

    def _refused(self, chain: Chain, error: Exception) -> int:
        """The guest gets an I/O error, the user a line for each kind of it. Any other exception is our mistake."""
        if not isinstance(error, OSError):
            self.fail(error)
        elif error.errno not in self._host_errors:
            self._host_errors.add(error.errno)
            self.complain(f"the guest gets I/O errors, because of its image: {error.strerror or error}")
        return _answer(chain, S_IOERR)


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
