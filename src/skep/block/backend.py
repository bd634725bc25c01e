"""The interfaces between a disk device and what holds its data, layer on layer.

A :class:`BlockBackend` is what a device needs. A :class:`Storage` is what one layer is to the next: a *protocol* (a
file of the host's, an NBD export) below a *format* (:mod:`skep.block.format`), with *filters* below or above it. A
format asks of what it lies over that it is a :class:`File`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from skep.block.file import HostFile

Buffers = Sequence[memoryview]
"""Pieces of guest memory, in order: one transfer scattered over, or gathered from, all of them."""


def _nothing() -> None:
    pass


class Located(NamedTuple):
    """Bytes of a disk that are in a file, in a row and as they are, for who reads or writes them there by himself."""

    file: HostFile
    offset: int
    ended: Callable[[], None] = _nothing
    """To be called once, after that. Until then they stay where they are."""


class BlockBackend(Protocol):
    """A disk's data. Offsets and lengths are bytes, and multiples of 512.

    All methods may be called from several threads at once. What the host refuses comes out as OSError, which the device
    turns into its own I/O error; the caller has checked offset and length against ``size``.

    A write that returned is seen by every later read. It is durable, that is, survives a loss of power, when a
    ``flush`` that began after it returned has returned; or at once, where ``write_cache`` is False.
    """

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool: ...

    @property
    def write_cache(self) -> bool:
        """False: every write is durable when it returns."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Fill all the buffers."""

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        """Write all the buffers."""

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        """As ``preadv``, if that takes hardly any time, because the host has the data in its memory. False: it would
        have to wait, and nobody knows what is in the buffers."""

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        """As ``pwritev``, if that takes hardly any time. False: it would have to wait, and part may be written."""

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        """Where these bytes are, if reading or writing them there is all that ``preadv`` or ``pwritev`` would do, and
        it takes hardly any time to know. None: call those."""

    def discard(self, offset: int, length: int) -> None:
        """Nobody needs this data any more. What is read there later is anything, and the same each time."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """A write of zeros. ``unmap``: the host may take back the space, otherwise it stays reserved."""

    def flush(self) -> None:
        """Make what was written durable. After one failure every later flush fails: what was lost stays lost."""

    def close(self) -> None:
        """No transfer is under way, none follows. Closing twice is closing once."""


class Extent(NamedTuple):
    """Bytes of a disk that are kept in one way."""

    offset: int
    length: int
    data: bool = False
    """They are stored somewhere, and have to be read."""
    zero: bool = False
    """They read as zeros."""
    host: int | None = None
    """Where in the layer's own file, or ``file``, they are; None: nowhere, or not as they are."""
    depth: int = 0
    """How many backing files down the chain they were found."""
    present: bool = True
    """Some layer says what they are; False: none in the chain does, so they are zeros."""
    compressed: bool = False
    file: str | None = None
    """Another file of the layer's, by its path."""


class Storage(BlockBackend, Protocol):
    """One layer to the next."""

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        """How the bytes are kept, in order and without a gap, up to the end. Two neighbours may be alike."""

    def resize(self, size: int) -> None:
        """Grow by zeros, or cut off. What a power cut leaves of that before the next flush is either size."""


class File(Storage, Protocol):
    """What a format lies over. It takes any offset and length, not only whole sectors; a write beyond its end makes it
    longer, where it can be, and a read there is EIO."""

    @property
    def path(self) -> str:
        """Its name, for people and for what an image says of others beside it."""

    @property
    def alignment(self) -> int:
        """Bytes: transfers that are no multiples of it are slow."""

    @property
    def is_open(self) -> bool: ...

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space, so that a write there cannot run out of it."""

    def allocated(self) -> int | None:
        """Bytes of the host\'s that it takes; None: nobody here knows."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def read_at(storage: BlockBackend, offset: int, length: int) -> bytearray:
    """``length`` bytes; what lies beyond the end, zeros. The caller bounds the length."""
    data = bytearray(length)
    there = min(length, storage.size - offset)
    if there > 0:
        with memoryview(data) as view:
            storage.preadv([view[:there]], offset)
    return data


def write_at(storage: BlockBackend, offset: int, data: bytes | bytearray | memoryview) -> None:
    if data:
        storage.pwritev([memoryview(data)], offset)


def split(buffers: Buffers, n: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``n`` bytes, and the rest."""
    for i, buffer in enumerate(buffers):
        if n < len(buffer):
            return [*buffers[:i], buffer[:n]] if n else list(buffers[:i]), [buffer[n:], *buffers[i + 1 :]]
        n -= len(buffer)
    return list(buffers), []


ZEROES = memoryview(bytes(2 << 20))
"""As many as the largest cluster of any format has."""


def fill_zeroes(buffers: Buffers) -> None:
    for buffer in buffers:
        for at in range(0, len(buffer), len(ZEROES)):
            n = min(len(ZEROES), len(buffer) - at)
            buffer[at : at + n] = ZEROES[:n]


def read_padded(storage: BlockBackend | None, buffers: Buffers, offset: int) -> None:
    """Fill the buffers; zeros beyond the end, or where there is nothing."""
    there, beyond = split(buffers, 0 if storage is None else max(0, storage.size - offset))
    if there and storage is not None:
        storage.preadv(there, offset)
    fill_zeroes(beyond)


def write_zeroes_as_data(storage: BlockBackend, offset: int, length: int) -> None:
    end = offset + length
    for at in range(offset, end, len(ZEROES)):
        storage.pwritev([ZEROES[: end - at]], at)
