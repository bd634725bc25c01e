"""From one image to another: comparing, and moving data along a chain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from skep.block.backend import Extent, read_at, read_padded
from skep.block.format import SECTOR, BackingName, Image
from skep.errors import UserError

PIECE = 1 << 20
"""Bytes that one transfer moves: what it read is still in the processor's cache when it is written."""
_ZEROES = bytes(PIECE)

Progress = Callable[[float], None]
"""Is told how much is done, from 0 to 1."""


def nothing(done: float) -> None:
    pass


class Spot(NamedTuple):
    """Where in which image a byte of the source is: sources may be several, one behind the other."""

    image: Image
    extent: Extent
    at: int
    """Of all sources' bytes, the extent's first."""

    @property
    def zeros(self) -> bool:
        """Nothing is to be read."""
        return self.extent.zero and not self.extent.data

    @property
    def end(self) -> int:
        return self.at + self.extent.length


def pieces(sources: Sequence[Image], step: int = PIECE) -> Iterator[Spot]:
    """What the sources hold; data is cut at multiples of ``step``."""
    base = 0
    for image in sources:
        for extent in image.extents():
            at, end = extent.offset, extent.offset + extent.length
            whole = extent.zero and not extent.data
            while at < end:
                stop = end if whole else min(end, (at // step + 1) * step)
                yield Spot(image, extent._replace(offset=at, length=stop - at), base + at)
                at = stop
        base += image.size


class Difference(NamedTuple):
    offset: int | None
    """The first sector that differs; None: none does."""
    allocation: bool = False
    """It is not what is there that differs, but whether something is."""


def compare(one: Image, other: Image, progress: Progress = nothing, *, allocation: bool = False) -> Difference:
    """Where the disks differ first. ``allocation``: also whether what one holds the other holds too."""
    shared = min(one.size, other.size)
    longer = one if one.size > other.size else other
    for offset, length, a, b in _both(one.extents(0, shared), other.extents(0, shared)):
        if allocation and (a.present, a.data) != (b.present, b.data):
            return Difference(offset, True)
        zero_a, zero_b = a.zero and not a.data, b.zero and not b.data
        if zero_a and zero_b:
            continue
        for at in range(offset, offset + length, PIECE):
            n = min(PIECE, offset + length - at)
            first = _ZEROES[:n] if zero_a else read_at(one, at, n)
            second = _ZEROES[:n] if zero_b else read_at(other, at, n)
            if first != second:
                return Difference(at + _first_difference(first, second))
            progress((at + n) / longer.size)
    for extent in longer.extents(shared):
        if extent.zero and not extent.data:
            continue
        for at in range(extent.offset, extent.offset + extent.length, PIECE):
            n = min(PIECE, extent.offset + extent.length - at)
            data = read_at(longer, at, n)
            if data != _ZEROES[:n]:
                return Difference(at + _first_difference(data, _ZEROES[:n]))
    progress(1)
    return Difference(None)


def _first_difference(one: bytes | bytearray, other: bytes | bytearray) -> int:
    for at in range(0, len(one), SECTOR):
        if one[at : at + SECTOR] != other[at : at + SECTOR]:
            return at
    return len(one)


def _both(ones: Iterator[Extent], others: Iterator[Extent]) -> Iterator[tuple[int, int, Extent, Extent]]:
    """Two divisions of the same bytes, as one that is finer."""
    a, b = next(ones, None), next(others, None)
    offset = 0
    while a is not None and b is not None:
        end = min(a.offset + a.length, b.offset + b.length)
        yield offset, end - offset, a, b
        offset = end
        if end == a.offset + a.length:
            a = next(ones, None)
        if end == b.offset + b.length:
            b = next(others, None)


def commit(top: Image, base: Image, *, empty: bool, progress: Progress = nothing) -> None:
    """Write what the layers above ``base`` hold into it; ``base`` is open for writing, by itself. With ``empty`` the
    top layer holds nothing afterwards."""
    old = base.size
    if old < top.size:
        base.resize(top.size)
    for spot in pieces([top]):
        extent = spot.extent
        if extent.depth >= depth_of(top, base.path) or (not extent.present and extent.offset >= old):
            continue
        if extent.zero and not extent.data:
            base.write_zeroes(extent.offset, extent.length, True)
        else:
            base.pwritev([memoryview(read_at(top, extent.offset, extent.length))], extent.offset)
        progress((extent.offset + extent.length) / top.size)
    base.flush()
    if empty:
        top.make_empty()
        top.flush()
    progress(1)


def depth_of(top: Image, path: str) -> int:
    """How many layers lie over the file. Raises UserError where it is not in the chain."""
    depth, image = 0, top
    while True:
        if os.path.realpath(image.path) == os.path.realpath(path):
            return depth
        if image.backing is None:
            raise UserError("is not below the image", path)
        depth, image = depth + 1, image.backing


def rebase(image: Image, new: Image | None, name: BackingName | None, progress: Progress = nothing) -> None:
    """Lay the image over another one, and keep what it reads as: what it had from below and the new one has not is
    written into it."""
    unit = image.cluster_size or 1 << 16
    for extent in list(image.layer(0, image.size)):
        if extent.present:
            continue
        first = extent.offset // unit * unit
        for at in range(first, extent.offset + extent.length, PIECE):
            n = min(PIECE, extent.offset + extent.length - at)
            old, now = bytearray(n), bytearray(n)
            read_padded(image.backing, [memoryview(old)], at)
            read_padded(new, [memoryview(now)], at)
            if old == now:
                continue
            for start in range(0, n, unit):
                piece = old[start : start + unit]
                if piece != now[start : start + unit]:
                    if any(piece):
                        image.pwritev([memoryview(piece)], at + start)
                    else:
                        image.write_zeroes(at + start, len(piece), True)
            progress((at + n) / image.size)
    image.flush()
    image.set_backing(name)
    progress(1)
