"""Copying disks into a new one.

Several threads read, look for zeros and compress, each one piece after another. Each piece gets its place in the new
file when its turn comes, so that the same disk makes the same file, and is written there while others are read, or
written: the kernel lets writers to one file wait for each other, without the help of ours.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from skep.block.backend import Extent, write_zeroes_as_data
from skep.block.copying import PIECE, Progress, Spot, nothing, pieces
from skep.block.file import copy_range
from skep.block.format import SECTOR, Can, Image, ImageError, Write

_ZEROES = bytes(2 << 20)
_COARSE = 1 << 16
_MOST_PACKERS = 4
_WATCHED = 16
"""The number of the piece after which it is known what takes long."""
_SPARE = 2
"""Pieces that are read before their turn, beyond one for each thread, at least."""
_ROOM = 16 << 20
"""Bytes that are read before they are written, or being written."""


class Conversion(NamedTuple):
    """What is asked of :func:`convert`."""

    compress: bool = False
    sparse: int = 4096
    """Runs of at least so many bytes of zeros are not written; 0: everything is."""
    zero_target: bool = False
    """The target reads as zeros now."""
    backing_size: int | None = None
    """The target lies over an image of that size, which has what the sources have only from below."""
    salvage: bool = False
    """What cannot be read becomes zeros."""
    workers: int = 8
    """Pieces at once, at most."""
    ordered: bool = True
    """They get their places in the target's file in their order."""
    start: int = 0
    """What is before that, in bytes, is there already."""
    offload: bool = False
    """The host copies what is plain data in a file of its own on both sides, with the zeros that are in it."""


def convert(
    sources: Sequence[Image],
    target: Image,
    how: Conversion,
    progress: Progress = nothing,
    settled: Callable[[int], None] | None = None,
) -> int:
    """Copy disks, one behind the other, into one that is large enough. Returns how many sectors could not be read;
    unless they are to be salvaged, the first of them is an OSError. ``settled`` is told, in order, up to where all is
    written."""
    if how.compress and Can.COMPRESS not in target.can:
        raise ImageError(f"a {target.format} image has no compressed clusters", target.path)
    step = max(PIECE, target.zero_unit, (target.cluster_size or PIECE) if how.compress else 0)
    spots = pieces(sources, step)
    if how.backing_size is None:
        spots = _coarser(spots, max(how.sparse, target.zero_unit), step)
    if how.compress:
        spots = _whole_clusters(spots, target.cluster_size or PIECE, step)
    if how.backing_size is not None:
        spots = _not_below(spots, how.backing_size)
    elif how.sparse and how.zero_target:
        spots = (spot for spot in spots if not spot.zeros)
    if how.start:
        spots = (spot for spot in spots if spot.end > how.start)
    total = sum(image.size for image in sources)

    def done(spot: Spot) -> None:
        progress(spot.end / total)
        if settled is not None:
            settled(spot.end)

    ordered = how.ordered and target.cluster_size is not None  # else an offset is a place
    line = _Line(spots, ordered, lambda: _Piece(target, how, step), partial(_Batch, target, how), done)
    line.run(min(how.workers, _MOST_PACKERS if how.compress else os.cpu_count() or 1), step, eager=how.compress)
    progress(1)
    return line.missing


def _coarser(spots: Iterator[Spot], least: int, most: int) -> Iterator[Spot]:
    """Zeros that are too few to be left out are read with what is around them, and not a transfer of their own."""
    held: Spot | None = None
    for spot in spots:
        if held is not None:
            length = held.extent.length + spot.extent.length
            few = not spot.zeros or spot.extent.length < least
            if few and not held.zeros and spot.image is held.image and length <= most:
                held = held._replace(extent=Extent(held.extent.offset, length, data=True))
                continue
            yield held
        held = spot
    if held is not None:
        yield held


def _whole_clusters(spots: Iterator[Spot], unit: int, most: int) -> Iterator[Spot]:
    """Transfers that begin and end at clusters of the target, of all that is not zeros only."""
    end = 0
    for spot in spots:
        if spot.zeros:
            continue
        limit = spot.image.size
        base = spot.at - spot.extent.offset
        first = max(end, spot.at // unit * unit)
        last = min(base + limit, -(-spot.end // unit) * unit)
        while first < last:
            n = min(last - first, most)
            yield Spot(spot.image, Extent(first - base, n, data=True), first)
            first += n
        end = max(end, last)


def _not_below(spots: Iterator[Spot], backing_size: int) -> Iterator[Spot]:
    """Those that the image below the target does not have."""
    for spot in spots:
        if not spot.extent.depth or (spot.extent.present and spot.end > backing_size):
            yield spot


class _Piece:
    """Memory for one spot after another."""

    def __init__(self, target: Image, how: Conversion, most: int) -> None:
        self._target, self._how = target, how
        self.room = bytearray(most)  # once, as new memory costs as much as a transfer
        self.packed: list[tuple[int, int, bytes | None]] = []
        """(start, length, compressed) of the clusters in it."""
        self.there = False
        """The host has copied it."""
        self.missing = 0
        """How many sectors of it could not be read."""

    def prepare(self, spot: Spot) -> None:
        self.spot, self.missing = spot, 0
        self.there = self._how.offload and not spot.zeros and self._offloaded(spot)
        if spot.zeros or self.there:
            return
        length = spot.extent.length
        with memoryview(self.room)[:length] as view:
            self.missing = _read_into(spot.image, view, spot.extent.offset, self._how.salvage)
            if self._how.compress:
                self.packed = list(self._pack(view))

    def _offloaded(self, spot: Spot) -> bool:
        length = spot.extent.length
        source = spot.image.locate(spot.extent.offset, length, False)
        target = None if source is None else self._target.locate(spot.at, length, True)
        try:
            return source is not None and target is not None and copy_range(source, target, length)
        finally:
            for place in (source, target):
                if place is not None:
                    place.ended()

    def _pack(self, view: memoryview) -> Iterator[tuple[int, int, bytes | None]]:
        unit = self._target.cluster_size or PIECE
        for at in range(0, len(view), unit):
            n = min(unit, len(view) - at)
            if self._how.backing_size is not None or self.room[at : at + n] != _ZEROES[:n]:
                yield at, n, self._target.pack(view[at : at + n])


class _Batch:
    """Pieces whose turn has come: what lies side by side in them is one write."""

    def __init__(self, target: Image, how: Conversion, pieces: list[_Piece]) -> None:
        self._target, self._how, self.pieces = target, how, pieces
        self._run: list[memoryview] = []
        """Data without a place, which ends at ``_end``."""
        self._end = 0
        self._placed: list[tuple[Write, list[memoryview]]] = []

    def place(self) -> None:
        """Decide where in the target's file it goes. All of it is there after :meth:`write`, which has to follow."""
        for piece in self.pieces:
            if piece.there:
                continue
            if piece.spot.zeros:
                self._place_run()
                self._clear(piece.spot)
            elif self._how.compress:
                self._write_packed(piece)
            else:
                self._place_piece(piece)
        self._place_run()

    def write(self) -> None:
        """All that has its place, even if a part of it fails."""
        failed: BaseException | None = None
        for write, data in self._placed:
            try:
                write(data)
            except BaseException as error:
                failed = failed or error
        self._placed.clear()
        if failed is not None:
            raise failed

    def _place_piece(self, piece: _Piece) -> None:
        how, spot, view = self._how, piece.spot, memoryview(piece.room)
        for start, n, zero in self._runs(piece) if how.sparse else ((0, spot.extent.length, False),):
            at = spot.at + start
            if not zero:
                if self._run and at != self._end:
                    self._place_run()
                self._run.append(view[start : start + n])
                self._end = at + n
            elif not how.zero_target or how.backing_size is not None:
                self._place_run()
                self._target.write_zeroes(at, n, True)

    def _place_run(self) -> None:
        if not (data := self._run):
            return
        self._run = []
        length = sum(map(len, data))
        write = self._target.placed(self._end - length, length)
        if write is None:
            self._target.pwritev(data, self._end - length)
        else:
            self._placed.append((write, data))

    def _runs(self, piece: _Piece) -> Iterator[tuple[int, int, bool]]:
        unit = max(self._how.sparse, self._target.zero_unit)
        return zero_runs(piece.room, unit, piece.spot.extent.length, -piece.spot.at % unit)

    def _write_packed(self, piece: _Piece) -> None:
        with memoryview(piece.room) as view:
            for at, n, packed in piece.packed:
                self._target.write_compressed(view[at : at + n], piece.spot.at + at, packed)

    def _clear(self, spot: Spot) -> None:
        how = self._how
        if not how.sparse:
            write_zeroes_as_data(self._target, spot.at, spot.extent.length)
        elif not how.zero_target or (how.backing_size is not None and spot.at < how.backing_size):
            self._target.write_zeroes(spot.at, spot.extent.length, True)


class _Line:
    """Threads that read pieces, give them their places in turn, and write them. Each does whatever comes next: it reads
    as long as there is room, then it writes what is there at once, while others read. There is no handing over, and one
    waits only if all are before the place of one that is still being read."""

    def __init__(
        self,
        spots: Iterator[Spot],
        ordered: bool,
        make_piece: Callable[[], _Piece],
        make_batch: Callable[[list[_Piece]], _Batch],
        done: Callable[[Spot], None],
    ) -> None:
        self._spots = enumerate(spots)
        self._ordered = ordered
        self._make_piece, self._make_batch = make_piece, make_batch
        self._done = done
        self._taking = threading.Lock()
        self._changed = threading.Condition(threading.Lock())
        """Over everything below."""
        self._free: list[_Piece] = []
        self._ready: dict[int, _Piece] = {}
        """Read, and without a place."""
        self._most = 1
        """Pieces that are written at once."""
        self._next = 0
        """Which gets its place next."""
        self._placing = False
        self._exhausted = False
        self._written: dict[int, Spot] = {}
        """Nobody was told of them, as one before them is still being written."""
        self._told = 0
        self._preparing = self._writing = 0.0
        """Seconds."""
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._reserve: list[threading.Thread] = []
        self.missing = 0

    def run(self, workers: int, step: int, *, eager: bool) -> None:
        """Until there are no more, on this thread and others. Unless ``eager``, that is one, as two read and write by
        turns what the host has in memory, and more come when it turns out that to prepare takes longer than to write.
        Raises what the first thread that failed did."""
        count = workers + _SPARE if eager else max(workers + _SPARE, _ROOM // step)
        self._most = max(1, count // 2)
        self._free += [self._make_piece() for _ in range(count)]
        for n in range(1, workers):
            self._threads.append(threading.Thread(target=self._work, name=f"convert {n}", daemon=True))
        at_once = len(self._threads) if eager else 1
        self._reserve = self._threads[at_once:]
        for thread in self._threads[:at_once]:
            thread.start()
        self._work()
        for thread in self._threads:  # the first may still have started others
            if thread.ident is not None:
                thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                step()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _next_step(self) -> Callable[[], None] | None:
        """None: this thread is not needed any more, or another one failed."""
        with self._changed:
            while self._error is None:
                if not self._exhausted and self._free and len(self._ready) < self._most:
                    return partial(self._begin, self._free.pop())
                if not self._placing and (taken := self._take()):
                    self._placing = True
                    return partial(self._finish, taken)
                if self._exhausted:  # who has the next piece does the rest
                    break
                if self._free:
                    return partial(self._begin, self._free.pop())
                self._changed.wait()
            return None

    def _take(self) -> dict[int, _Piece]:
        """What may get its place now."""
        if not self._ordered:
            return {number: self._ready.pop(number) for number in sorted(self._ready)[: self._most]}
        taken: dict[int, _Piece] = {}
        while len(taken) < self._most and (piece := self._ready.pop(self._next, None)) is not None:
            taken[self._next] = piece
            self._next += 1
        return taken

    def _begin(self, piece: _Piece) -> None:
        with self._taking:
            taken = next(self._spots, None)
        if taken is None:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()
            return
        number, spot = taken
        begun = time.monotonic()
        piece.prepare(spot)
        with self._changed:
            self._preparing += time.monotonic() - begun
            self._ready[number] = piece

    def _finish(self, taken: dict[int, _Piece]) -> None:
        begun = time.monotonic()
        batch = self._make_batch(list(taken.values()))
        try:
            batch.place()
            with self._changed:
                self._placing = False
                self._changed.notify()
        finally:
            batch.write()
        with self._changed:
            self._writing += time.monotonic() - begun
            for number, piece in taken.items():
                self._tell(number, piece)
            self._free += taken.values()
            self._changed.notify_all()
            if _WATCHED in taken and self._preparing > self._writing:
                for thread in self._reserve:
                    thread.start()

    def _tell(self, number: int, piece: _Piece) -> None:
        """A piece is written. The caller is told of all in their order."""
        self.missing += piece.missing
        self._written[number] = piece.spot
        while (first := self._written.pop(self._told, None)) is not None:
            self._told += 1
            self._done(first)


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


def zero_runs(
    data: bytes | bytearray, least: int, length: int | None = None, first: int = 0
) -> Iterator[tuple[int, int, bool]]:
    """(start, length, whether it is zeros) of a buffer's first ``length`` bytes, cut at ``first`` and multiples of
    ``least`` from there on, which are whole sectors; runs of zeros shorter than that count as data."""
    unit = max(1, -(-least // SECTOR)) * SECTOR
    length = len(data) if length is None else length
    units, stride = max(0, length - first) // unit, _COARSE // unit * unit
    with memoryview(data)[first : first + units * unit] as view, view.cast("Q") as words:
        first_words = words[:: unit // 8].tolist()
    start = number = 0
    while True:
        try:
            number = first_words.index(0, number)
        except ValueError:
            break
        at = first + number * unit
        if data[at : at + unit] != _ZEROES[:unit]:
            number += 1
            continue
        end = at + unit
        while end < length:
            coarse, fine = min(stride, length - end), min(unit, length - end)
            if unit < coarse and data[end : end + coarse] == _ZEROES[:coarse]:
                end += coarse
            elif data[end : end + fine] == _ZEROES[:fine]:
                end += fine
            else:
                break
        if start < at:
            yield start, at - start, False
        yield at, end - at, True
        start, number = end, -(-(end - first) // unit)
    if start < length:
        yield start, length - start, False
