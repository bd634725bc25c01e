"""Who has which part of an image's file: what a check of any format asks.

Memory is bounded, whatever the tables say and however long the file is: where too many parts of it are somebody's to
remember at once, the tables are gone through again for the rest.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from math import gcd
from typing import NamedTuple

from skep.block.backend import File
from skep.block.format import SECTOR, CheckResult

_WORD = 512
"""Units, one bit of an integer each."""
_FULL = (1 << _WORD) - 1
_MOST_WORDS = 1 << 17
"""About 30 MiB."""
_PAGE = 4096
"""Of a host's file: it gives back no less."""
_LONG = 16
"""Words of one owner that are remembered as a run."""


class Owned(NamedTuple):
    """Entry ``number`` has ``length`` bytes at ``host``; or it makes no sense, for the reason ``wrong``."""

    number: int
    host: int
    length: int
    wrong: str | None = None


Reserved = Callable[[], Iterable[tuple[int, int]]]
"""Offsets and lengths of what is no entry's."""


def examine(
    file: File,
    unit: int,
    reserved: Reserved,
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
    step = _step(unit, reserved, owned)

    def bad(number: int, why: str) -> None:
        result.corrupt(why)
        if forget is not None:
            forget(number)
            result.corruptions_fixed += 1

    for number, host, length, why in owned():
        if why is None:
            result.allocated += 1
            result.end = max(result.end, host + length)
        else:
            bad(number, why)
    last = -(-file.size // step // _WORD)
    first = 0
    while first < last:
        marks, crossed, taken = _mark(first, last, step, reserved, owned)
        for host in crossed:  # writing one changes the other, and no entry is to blame
            result.corrupt(f"the tables at {host:#x} lie over others")
        for number in taken:
            bad(number, f"entry {number} has a place in the file that is not its own")
        if taken and forget is not None:  # what else they claimed may be nobody's now
            marks, _, _ = _mark(first, marks.end, step, reserved, owned)
        for start, end in marks.free(step, file.size):
            if end - start >= unit:
                _leak(file, result, start, end, unit, mend)
        first = marks.end
    result.end = max([result.end, *(host + length for host, length in reserved())])
    return result


def _step(unit: int, reserved: Reserved, owned: Callable[[], Iterable[Owned]]) -> int:
    """The largest step at which everything begins."""
    step = unit
    for host, length in reserved():
        step = gcd(step, host, length)
    for _, host, length, wrong in owned():
        if wrong is None:
            step = gcd(step, host, -(-length // SECTOR) * SECTOR)
            if step <= SECTOR:
                break
    return max(step, SECTOR)


class _Marks:
    """Units that are somebody's, in words from ``first`` up to ``end``, which comes down as memory runs out."""

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self._words: dict[int, int] = {}
        self._starts: list[int] = []
        """Long runs of words that are somebody's altogether, and in no dictionary: where they begin, in order."""
        self._ends: list[int] = []

    def claim(self, first: int, end: int) -> bool:
        """Mark units, as far as they are in these words. False: somebody has one of them."""
        first, end = max(first, self.first * _WORD), min(end, self.end * _WORD)
        if first >= end:
            return True
        begin, stop = -(-first // _WORD), end // _WORD
        if stop - begin < _LONG:
            return self._claim_words(range(first // _WORD, -(-end // _WORD)), first, end)
        free = self._claim_run(begin, stop)
        free &= self._claim_words(range(first // _WORD, begin), first, end)
        return self._claim_words(range(stop, -(-end // _WORD)), first, end) and free

    def _claim_words(self, words: range, first: int, end: int) -> bool:
        free = True
        for word in words:
            if self._starts and self._in_run(word):
                free = False
                continue
            base = word * _WORD
            mask = _FULL
            if first > base:
                mask &= _FULL << first - base
            if end < base + _WORD:
                mask &= (1 << end - base) - 1
            old = self._words.get(word, 0)
            free = free and not old & mask
            self._words[word] = old | mask
            if not old and self._is_full():
                break
        return free

    def _claim_run(self, first: int, end: int) -> bool:
        low, high = bisect_right(self._ends, first), bisect_left(self._starts, end)
        if len(self._words) < end - first:
            inside = [word for word in self._words if first <= word < end]
        else:
            inside = [word for word in range(first, end) if word in self._words]
        for word in inside:
            del self._words[word]
        free = low == high and not inside
        if low < high:
            first, end = min(first, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high], self._ends[low:high] = [first], [end]
        self._is_full()
        return free

    def _in_run(self, word: int) -> bool:
        at = bisect_right(self._starts, word) - 1
        return at >= 0 and word < self._ends[at]

    def _is_full(self) -> bool:
        """There is no memory for more: the second half is left to another time."""
        if len(self._words) + len(self._starts) <= _MOST_WORDS:
            return False
        self.end = sorted([*self._words, *self._starts])[_MOST_WORDS // 2]
        return True

    def free(self, step: int, size: int) -> Iterator[tuple[int, int]]:
        """Parts of the file, of ``size`` bytes, that are nobody's."""
        since = self.first * _WORD
        for word, end in sorted([*zip(self._words, repeat(0)), *zip(self._starts, self._ends, strict=True)]):
            base = word * _WORD
            if end:
                if base > since:
                    yield since * step, base * step
                since = end * _WORD
                continue
            bits = self._words[word]
            at = 0
            while at < _WORD:
                rest = bits >> at
                if not rest:
                    break
                zeros = (rest & -rest).bit_length() - 1
                if base + at + zeros > since:
                    yield since * step, (base + at + zeros) * step
                ones = ~(rest >> zeros)
                at += zeros + (ones & -ones).bit_length() - 1
                since = base + at
        end = min(self.end * _WORD * step, size)
        if since * step < end:
            yield since * step, end


def _mark(
    first: int, last: int, step: int, reserved: Reserved, owned: Callable[[], Iterable[Owned]]
) -> tuple[_Marks, array[int], array[int]]:
    """The marks of as many words as there is memory for, where what is no entry's lies over something like it, and the
    entries that claim what is another's."""
    while True:
        marks = _Marks(first, last)
        crossed, taken = array("Q"), array("Q")
        for host, length in reserved():
            if not marks.claim(host // step, -(-(host + length) // step)):
                crossed.append(host)
        for number, host, length, wrong in owned():
            if wrong is None and not marks.claim(host // step, -(-(host + length) // step)):
                taken.append(number)
            if marks.end < last:
                break
        if marks.end == last:
            return marks, crossed, taken
        last = marks.end


def _leak(file: File, result: CheckResult, start: int, end: int, unit: int, mend: bool) -> None:
    start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
    taken = sum(extent.length for extent in file.extents(start, max(0, end - start)) if extent.data)
    if not taken:
        return
    count = -(-taken // unit)
    result.leak(f"{taken} bytes at {start:#x}", count)
    if mend:
        file.discard(start, end - start)
        result.leaks_fixed += count
