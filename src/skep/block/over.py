"""What every file over another file has of that one."""

from __future__ import annotations

from collections.abc import Iterable

from skep.block.backend import Buffers, Extent, File, Located
from skep.block.closing import Closing


class Over(Closing):
    """A :class:`skep.block.backend.File` that passes everything on. It closes what is below."""

    def __init__(self, below: File) -> None:
        self.below = below

    @property
    def path(self) -> str:
        return self.below.path

    @property
    def size(self) -> int:
        return self.below.size

    @property
    def read_only(self) -> bool:
        return self.below.read_only

    @property
    def write_cache(self) -> bool:
        return self.below.write_cache

    @property
    def alignment(self) -> int:
        return self.below.alignment

    @property
    def is_open(self) -> bool:
        return self.below.is_open

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self.below.preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        self.below.pwritev(buffers, offset)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return self.below.read_now(buffers, offset)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return self.below.write_now(buffers, offset)

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        """Nowhere, unless a layer knows that it leaves the bytes as they are and need not see who reads or writes."""
        return None

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.below.write_zeroes(offset, length, unmap)

    def flush(self) -> None:
        self.below.flush()

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        return self.below.extents(offset, length)

    def resize(self, size: int) -> None:
        self.below.resize(size)

    def allocate(self, offset: int, length: int) -> None:
        self.below.allocate(offset, length)

    def allocated(self) -> int | None:
        return self.below.allocated()

    def close(self) -> None:
        self.below.close()
