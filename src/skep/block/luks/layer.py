"""A file over another one, which holds it encrypted."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from skep.block.backend import Buffers, Extent, File, split, write_at, write_zeroes_as_data
from skep.block.luks.cipher import SECTOR, SectorCipher
from skep.block.over import Over

_PIECE = 256 << 10


class EncryptedFile(Over):
    """The bytes of ``below`` from ``start`` on, decrypted; sectors are counted from there. It takes whole sectors.

    What was never written reads as what zeros, or nothing, decrypt to. A buffer of the caller's never holds what is
    not decrypted: it may be a guest's.
    """

    def __init__(self, below: File, cipher: SectorCipher, start: int = 0) -> None:
        super().__init__(below)
        self._cipher = cipher
        self._start = start

    @property
    def size(self) -> int:
        return max(0, self.below.size - self._start) // SECTOR * SECTOR

    def preadv(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        while length:
            n = min(length, _PIECE)
            now, buffers = split(buffers, n)
            packed = bytearray(n)
            with memoryview(packed) as view:
                self.below.preadv([view], self._start + offset)
            data = memoryview(self._cipher.decrypt(packed, offset // SECTOR))
            for buffer in now:
                buffer[:], data = data[: len(buffer)], data[len(buffer) :]
            offset += n
            length -= n

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        while length:
            n = min(length, _PIECE)
            now, buffers = split(buffers, n)
            write_at(self.below, self._start + offset, self._cipher.encrypt(b"".join(now), offset // SECTOR))
            offset += n
            length -= n

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        write_zeroes_as_data(self, offset, length)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(self._start + offset, length)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = min(offset + length, self.size)
        if offset < end:
            yield Extent(offset, end - offset, data=True)

    def resize(self, size: int) -> None:
        """What is beyond the old end is anything: to make it zeros takes as long as to write it."""
        self.below.resize(self._start + size)

    def allocate(self, offset: int, length: int) -> None:
        self.below.allocate(self._start + offset, length)


class LockedFile(Over):
    """A file whose data nobody can read or write: its password was not told."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        raise self._locked()

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        raise self._locked()

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def discard(self, offset: int, length: int) -> None:
        raise self._locked()

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        raise self._locked()

    def _locked(self) -> OSError:
        return OSError(errno.EACCES, "the image is encrypted, and its password was not told", self.path)
