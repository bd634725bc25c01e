"""From one image to another: copying, comparing, and moving data along a chain."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from skep.block.backend import Extent, read_at, read_padded
from skep.block.format import SECTOR, BackingName, Can, Image, ImageError
from skep.errors import UserError

PIECE = 2 << 20
"""Bytes that one transfer moves at most."""
_ZEROES = bytes(PIECE)
_COARSE = 1 << 16

Progress = Callable[[float], None]
"""Is told how much is done, from 0 to 1."""


def _nothing(done: float) -> None:
    pass


class Spot(NamedTuple):
    """Where in which image a byte of the source is: sources may be several, one behind the other."""

    image: Image
    extent: Extent
    at: int
    """Of all sources' bytes, the extent's first."""


def pieces(sources: Sequence[Image]) -> Iterator[Spot]:
    """What the sources hold, cut into transfers."""
    base = 0
    for image in sources:
        for extent in image.extents():
            whole = extent.zero and not extent.data
            step = extent.length if whole else PIECE
            for at in range(0, extent.length, step):
                length = min(step, extent.length - at)
                part = extent._replace(offset=extent.offset + at, length=length)
                yield Spot(image, part, base + part.offset)
        base += image.size


def convert(
    sources: Sequence[Image],
    target: Image,
    *,
    compress: bool = False,
    sparse: int = 4096,
    zero_target: bool = False,
    backing_size: int | None = None,
    salvage: bool = False,
    workers: int = 8,
    progress: Progress = _nothing,
    start: int = 0,
    settled: Callable[[int], None] | None = None,
) -> int:
    """Copy disks, one behind the other, into one that is large enough. Returns how many sectors could not be read,
    which are zeros in the target; without ``salvage`` the first of them is an OSError.

    Runs of at least ``sparse`` bytes of zeros are not written; 0 writes everything. ``zero_target``: the target reads
    as zeros now. ``backing_size``: the target lies over an image of that size, which has what the sources have only
    from below. What is before ``start`` is there already; ``settled`` is told, in order, up to where all is written.
    """
    total = sum(image.size for image in sources)
    lost = 0
    unit = target.cluster_size or PIECE
    if compress and Can.COMPRESS not in target.can:
        raise ImageError(f"a {target.format} image has no compressed clusters", target.path)

    rooms = threading.local()
    """Of each thread, what it reads into: as much memory anew for every transfer takes as long as the transfer."""

    def move(spot: Spot) -> int:
        length = spot.extent.length
        if length > len(room := getattr(rooms, "room", b"")):
            room = rooms.room = bytearray(max(PIECE, length))
        with memoryview(room) as view:
            missing = _read_into(spot.image, view[:length], spot.extent.offset, salvage)
            if compress:
                for at in range(0, length, unit):
                    piece = bytes(view[at : min(length, at + unit)])
                    if piece != _ZEROES[: len(piece)] or backing_size is not None:
                        target.write_compressed(piece, spot.at + at)
                return missing
            for start, n, zero in zero_runs(room, sparse, length) if sparse else ((0, length, False),):
                if not zero:
                    target.pwritev([view[start : start + n]], spot.at + start)
                elif not zero_target or backing_size is not None:
                    target.write_zeroes(spot.at + start, n, True)
        return missing

    def clear(spot: Spot) -> int:
        if not sparse:
            for at in range(0, spot.extent.length, PIECE):
                n = min(PIECE, spot.extent.length - at)
                target.pwritev([memoryview(_ZEROES)[:n]], spot.at + at)
        elif not zero_target or (backing_size is not None and spot.at < backing_size):
            target.write_zeroes(spot.at, spot.extent.length, True)
        return 0

    with ThreadPoolExecutor(min(workers, os.cpu_count() or 1), "convert") as pool:
        under_way: deque[tuple[Spot, Future[int]]] = deque()

        def finish(most: int) -> int:
            found = 0
            while len(under_way) > most:
                spot, future = under_way.popleft()
                found += future.result()
                end = spot.at + spot.extent.length
                progress(end / total)
                if settled is not None:
                    settled(end)
            return found

        for spot in _whole_clusters(pieces(sources), unit) if compress else pieces(sources):
            if spot.at + spot.extent.length <= start:
                continue
            if not spot.extent.present and backing_size is not None and spot.extent.depth:
                continue
            if backing_size is not None and spot.extent.depth and spot.at + spot.extent.length <= backing_size:
                continue
            do = clear if spot.extent.zero and not spot.extent.data else move
            under_way.append((spot, pool.submit(do, spot)))
            lost += finish(2 * workers)
        lost += finish(0)
    progress(1)
    return lost


def _whole_clusters(spots: Iterator[Spot], unit: int) -> Iterator[Spot]:
    """Transfers that begin and end at clusters of the target, of all that is not zeros only."""
    end = 0
    for spot in spots:
        if spot.extent.zero and not spot.extent.data:
            continue
        limit = spot.image.size
        base = spot.at - spot.extent.offset
        first = max(end, spot.at // unit * unit)
        last = min(base + limit, -(-(spot.at + spot.extent.length) // unit) * unit)
        while first < last:
            n = min(last - first, max(PIECE, unit))
            yield Spot(spot.image, Extent(first - base, n, data=True), first)
            first += n
        end = max(end, last)


def _read_into(image: Image, room: memoryview, offset: int, salvage: bool) -> int:
    """Fill the room; returns how many sectors could not be read, and are zeros."""
    try:
        image.preadv([room], offset)
        return 0
    except OSError:
        if not salvage:
            raise
    missing = 0
    for at in range(0, len(room), SECTOR):
        try:
            image.preadv([room[at : at + SECTOR]], offset + at)
        except OSError:
            room[at : at + SECTOR] = bytes(len(room[at : at + SECTOR]))
            missing += 1
    return missing


def zero_runs(data: bytes | bytearray, least: int, length: int | None = None) -> Iterator[tuple[int, int, bool]]:
    """(start, length, whether it is zeros) of a buffer's first ``length`` bytes, cut at multiples of ``least``; runs of
    zeros shorter than that count as data."""
    unit = max(SECTOR, least)
    zeros = _ZEROES[:unit]
    length = len(data) if length is None else length
    start = at = 0
    while (found := data.find(zeros, at, length)) >= 0:
        first = end = -(-found // unit) * unit
        while end < length:
            coarse, fine = min(_COARSE, length - end), min(unit, length - end)
            if data[end : end + coarse] == _ZEROES[:coarse]:
                end += coarse
            elif data[end : end + fine] == _ZEROES[:fine]:
                end += fine
            else:
                break
        if first < end:
            if start < first:
                yield start, first - start, False
            yield first, end - first, True
            start = end
        at = max(end, found + 1)
    if start < length:
        yield start, length - start, False


class Difference(NamedTuple):
    offset: int | None
    """The first sector that differs; None: none does."""
    allocation: bool = False
    """It is not what is there that differs, but whether something is."""


def compare(one: Image, other: Image, progress: Progress = _nothing, *, allocation: bool = False) -> Difference:
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


def commit(top: Image, base: Image, *, empty: bool, progress: Progress = _nothing) -> None:
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


def rebase(image: Image, new: Image | None, name: BackingName | None, progress: Progress = _nothing) -> None:
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
