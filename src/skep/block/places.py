"""Who has which part of an image's file: what a check of any format asks.

It looks at the file through a window, so that the memory it takes does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import gcd
from typing import NamedTuple

from skep.block.file import HostFile
from skep.block.format import SECTOR, CheckResult

_WINDOW = 1 << 24
"""Units, one byte of memory each."""


class Owned(NamedTuple):
    """Entry ``number`` has ``length`` bytes at ``host``; or it makes no sense, for the reason ``wrong``."""

    number: int
    host: int
    length: int
    wrong: str | None = None


def examine(
    file: HostFile,
    unit: int,
    reserved: Callable[[], Iterable[tuple[int, int]]],
    owned: Callable[[], Iterable[Owned]],
    forget: Callable[[int], None] | None,
    mend: bool = False,
) -> CheckResult:
    """Find what two have, and what nobody has. ``unit`` is what a block takes. With ``forget`` entries that are wrong
    are dropped; with ``mend`` space that nobody has is given back.

    What is neither anybody's nor takes space on the host is no leak: new blocks come at the end, and holes stay. Nor is
    what is shorter than a block: things are aligned.
    """
    result = CheckResult()
    step = _grain(unit, reserved, owned)
    first = True
    base = 0
    while first or base < file.size:
        end = min(file.size, base + _WINDOW * step)
        marks = bytearray(-(-(end - base) // step))
        for host, length in reserved():
            _claim(marks, (host - base) // step, -(-(host + length - base) // step))
        for number, host, length, wrong in owned():
            if wrong is not None:
                taken = first
            else:
                taken = not _claim(marks, (host - base) // step, -(-(host + length - base) // step))
                if taken:
                    wrong = f"entry {number} has a place in the file, {host:#x}, that is not its own"
                if first:
                    result.allocated += 1
                result.end = max(result.end, host + length)
            if taken:
                result.corrupt(str(wrong))
                if forget is not None:
                    forget(number)
                    result.corruptions_fixed += 1
        _leaks(file, result, marks, base, step, unit, mend)
        base = end
        first = False
    result.end = max([result.end, *(host + length for host, length in reserved())])
    return result


def _grain(unit: int, reserved: Callable[[], Iterable[tuple[int, int]]], owned: Callable[[], Iterable[Owned]]) -> int:
    """The largest step at which everything begins."""
    step = unit
    for host, length in reserved():
        step = gcd(step, host, length)
    for _, host, _, wrong in owned():
        if wrong is None:
            step = gcd(step, host)
            if step <= SECTOR:
                break
    return max(step, SECTOR)


def _claim(marks: bytearray, first: int, end: int) -> bool:
    """Mark what of it is in the window. False: somebody has part of it."""
    first, end = max(0, first), min(len(marks), end)
    if first >= end:
        return True
    free = marks.find(1, first, end) < 0
    marks[first:end] = b"\1" * (end - first)
    return free


def _leaks(file: HostFile, result: CheckResult, marks: bytearray, base: int, step: int, unit: int, mend: bool) -> None:
    for first, end in _runs(marks):
        offset, length = base + first * step, (end - first) * step
        length = min(length, file.size - offset)
        taken = sum(extent.length for extent in file.extents(offset, length) if extent.data) if length >= unit else 0
        if not taken:
            continue
        count = -(-taken // unit)
        result.leak(f"{taken} bytes at {offset:#x}", count)
        if mend:
            file.discard(offset, length)
            result.leaks_fixed += count


def _runs(marks: bytearray) -> Iterator[tuple[int, int]]:
    """Of units that nobody has."""
    at = 0
    while (first := marks.find(0, at)) >= 0:
        at = marks.find(1, first)
        if at < 0:
            yield first, len(marks)
            return
        yield first, at
