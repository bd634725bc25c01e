"""Tables of an image's metadata: where its blocks are, read by the page, changed in two steps.

A change is seen at once by whoever looks, and is in the file only after a commit, which the image makes when it is
flushed: first what the entry points at has to be durable, then the entry is written. So a loss of power leaves blocks
that no entry points at, which is a leak, and never an entry that points at nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from struct import Struct

from skep.block.backend import BlockBackend, File, read_at
from skep.block.format import DamagedImage

_CACHE_BYTES = 4 << 20
_ROW = 256
"""Words that are compared with zeros at once."""


class Table:
    """``count`` entries of fixed width, in pages of ``per_page`` of them. The caller's lock is held over each call.

    ``where`` gives the offset of a page in the file; None: the page is in none, and its entries are all ``absent``,
    which is 0 or all ones. ``next_page``, where there may be many such, gives the first from one on, and before
    another, that is in the file.
    Raises OSError where the file cannot be read.
    """

    def __init__(
        self,
        file: BlockBackend,
        entry: Struct,
        count: int,
        where: Callable[[int], int | None],
        per_page: int,
        absent: int = 0,
        cache: int = _CACHE_BYTES,
        next_page: Callable[[int, int], int] | None = None,
    ) -> None:
        self.count = count
        self._file = file
        self._entry = entry
        self._where = where
        self._next_page = next_page
        self._per_page = per_page
        self._page_size = per_page * entry.size
        self._absent = entry.pack(absent) * per_page
        self._pages: dict[int, bytearray] = {}
        """As they are in the file, the one that was used last at the end."""
        self._limit = max(1, cache // self._page_size)
        self._hot = -1
        self._new: dict[int, int] = {}
        """Changes of which no commit knows."""
        self._going: dict[int, int] = {}
        """Changes that a commit is writing."""
        self._touched: set[int] = set()
        """Pages of which those are."""

    @property
    def pending(self) -> int:
        """How many changes wait for a commit."""
        return len(self._new)

    def __getitem__(self, index: int) -> int:
        value = self._new.get(index)
        if value is None:
            value = self._going.get(index)
            if value is None:
                page, at = divmod(index, self._per_page)
                value = int(self._entry.unpack_from(self._page(page), at * self._entry.size)[0])
        return value

    def __setitem__(self, index: int, value: int) -> None:
        self._new[index] = value
        self._touched.add(index // self._per_page)

    def cached(self, index: int) -> bool:
        """A look at the entry needs no file."""
        return index // self._per_page in self._pages

    def skip(self, index: int, end: int) -> int:
        """The first index from here on whose entry may not be absent, or ``end``. Large disks are mostly empty."""
        width, end = self._entry.size, min(end, self.count)
        while index < end:
            number, at = divmod(index, self._per_page)
            if number in self._touched:
                break
            page = self._page(number)
            if page[at * width] != self._absent[0]:
                break
            if not at and page == self._absent:
                index = self._page_behind(number, end) * self._per_page
                continue
            rest = page[at * width :]
            present = rest.lstrip(self._absent[:1])
            index += (len(rest) - len(present)) // width
            if present:
                break
        return min(index, end)

    def _page_behind(self, number: int, end: int) -> int:
        """The next page that need not be all absent; of those from ``end`` on nobody wants to know."""
        following = number + 1
        if self._next_page is not None:
            following = self._next_page(following, -(-end // self._per_page))
            if self._touched:
                following = min([following, *(page for page in self._touched if page > number)])
        return following

    def _page(self, number: int) -> bytes | bytearray:
        pages = self._pages
        page = pages.get(number)
        if page is None:
            offset = self._where(number)
            if offset is None:
                return self._absent
            page = self._read(number, offset)
            if len(pages) >= self._limit:
                del pages[next(iter(pages))]
            pages[number] = page
        elif number != self._hot:
            pages[number] = pages.pop(number)
        self._hot = number
        return page

    def _read(self, number: int, offset: int) -> bytearray:
        """The page, and what the file has behind the last entry: a commit writes whole sectors."""
        return read_at(self._file, offset, self._page_size)

    def begin(self) -> Mapping[int, int]:
        """Begin a commit of the changes so far. One at a time; :meth:`landed` ends it."""
        self._going, self._new = self._new, {}
        return self._going

    def units(self, size: int) -> Iterator[tuple[int, bytes]]:
        """What the commit has to write: offsets and contents of the sectors of ``size`` bytes with a change in them."""
        width = self._entry.size
        by_page: dict[int, list[int]] = {}
        for index in self._going:
            by_page.setdefault(index // self._per_page, []).append(index)
        for number in sorted(by_page):
            offset = self._where(number)
            if offset is None:
                continue
            page = bytearray(self._page(number))
            units = set()
            for index in by_page[number]:
                at = index % self._per_page * width
                self._entry.pack_into(page, at, self._going[index])
                units.add(at // size)
            for unit in sorted(units):
                yield offset + unit * size, bytes(page[unit * size : (unit + 1) * size])

    def drop(self, page: int) -> None:
        """``where`` says something else of the page from now on."""
        self._pages.pop(page, None)
        self._hot = -1

    def landed(self) -> None:
        """The commit's changes are in the file."""
        width = self._entry.size
        for index, value in self._going.items():
            page = self._pages.get(index // self._per_page)
            if page is not None:
                self._entry.pack_into(page, index % self._per_page * width, value)
        self._going = {}
        self._touched = {index // self._per_page for index in self._new}


def first_in_use(words: array[int], start: int, stop: int) -> int:
    """The number of the first word from ``start`` on that is not 0; ``stop``, if there is none before that."""
    nothing = array(words.typecode, [0]) * _ROW
    for at in range(start, stop, _ROW):
        row = words[at : min(at + _ROW, stop)]
        if row != nothing[: len(row)]:
            return at + next(i for i, word in enumerate(row) if word)
    return max(start, stop)


def check_room(file: File, tables: int, size: int) -> None:
    """To look at all tables is as much work as the file is long, unless some are said to be in the same place. Raises
    DamagedImage where so many of ``size`` bytes cannot be in it."""
    if tables * size > file.size:
        raise DamagedImage(file.path, f"{tables} tables of {size} bytes have no room in it")


def contiguous(offset: int, page_size: int) -> Callable[[int], int]:
    """Pages one behind the other from ``offset`` on."""
    return lambda number: offset + number * page_size
