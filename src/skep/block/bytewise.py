"""A file that takes any offset and length, over one that takes whole blocks only: another image, some NBD exports."""

from __future__ import annotations

import errno
import threading

from skep.block.backend import Buffers, File, read_at, split, write_at, write_zeroes_as_data
from skep.block.over import Over


class Bytewise(Over):
    """Reads the blocks around what is asked for, and writes into a copy of them. A write beyond the end makes the file
    below longer, by whole blocks."""

    def __init__(self, below: File) -> None:
        super().__init__(below)
        self._unit = below.alignment
        self._lock = threading.Lock()
        """Over writes of part of a block. Files lie over files, so it has no place of its own in the order of locks."""

    @property
    def alignment(self) -> int:
        return 1

    def _whole(self, offset: int, length: int) -> bool:
        return (offset | length) % self._unit == 0

    def preadv(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        if self._whole(offset, length):
            self.below.preadv(buffers, offset)
            return
        if offset + length > self.size:
            raise OSError(errno.EIO, "the file ends before", self.path)
        first = offset // self._unit * self._unit
        around = read_at(self.below, first, -(-(offset + length) // self._unit) * self._unit - first)
        data = memoryview(around)[offset - first :]
        for buffer in buffers:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        end = -(-(offset + length) // self._unit) * self._unit
        if end > self.size:
            self.below.resize(end)
        if self._whole(offset, length):
            self.below.pwritev(buffers, offset)
            return
        with self._lock:
            while length:
                first = offset // self._unit * self._unit
                whole = length // self._unit * self._unit
                n = min(length, first + self._unit - offset) if offset > first else whole or length
                piece, buffers = split(buffers, n)
                if self._whole(offset, n):
                    self.below.pwritev(piece, offset)
                else:
                    block = read_at(self.below, first, self._unit)
                    block[offset - first : offset - first + n] = b"".join(piece)
                    write_at(self.below, first, block)
                offset += n
                length -= n

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return self._whole(offset, sum(map(len, buffers))) and self.below.read_now(buffers, offset)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        length = sum(map(len, buffers))
        return (
            self._whole(offset, length) and offset + length <= self.size and self.below.write_now(buffers, offset)
        )

    def discard(self, offset: int, length: int) -> None:
        first = -(-offset // self._unit) * self._unit
        end = (offset + length) // self._unit * self._unit
        if first < end:
            self.below.discard(first, end - first)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if self._whole(offset, length) and offset + length <= self.size:
            self.below.write_zeroes(offset, length, unmap)
        else:
            write_zeroes_as_data(self, offset, length)

    def resize(self, size: int) -> None:
        self.below.resize(-(-size // self._unit) * self._unit)

    def allocate(self, offset: int, length: int) -> None:
        end = -(-(offset + length) // self._unit) * self._unit
        if end > self.size:
            self.below.resize(end)
        first = offset // self._unit * self._unit
        self.below.allocate(first, end - first)
