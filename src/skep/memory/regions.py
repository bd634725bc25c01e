"""What the guest's CPUs see at guest-physical addresses: RAM, and what lies over it or beside it.

An overlay hides what was there before it, as long as it is there. From RAM and overlays follow *regions*: disjoint,
ascending, each with one backing and one kind of access. What is in none of them is the bus's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol


class Rights(enum.IntEnum):
    """What the guest's CPUs may do without asking; the rest goes to the bus. A bit for reading, one for writing."""

    NONE = 0
    """Nothing: a device's window over RAM."""
    READ = 1
    """Read and execute: ROM, flash. A write is a device's."""
    WRITE = 3
    """All: RAM, a device's own memory."""


class Region(NamedTuple):
    """``size`` bytes at guest-physical ``gpa``, at host address ``host``: those of the file ``fd`` from ``offset``."""

    gpa: int
    size: int
    host: int
    rights: Rights
    fd: int
    offset: int

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def cut(self, start: int, end: int) -> Region:
        """The part of it in [start, end)."""
        start, end = max(start, self.gpa), min(end, self.end)
        inside = start - self.gpa
        return self._replace(gpa=start, size=end - start, host=self.host + inside, offset=self.offset + inside)


class Overlay:
    """What lies at guest-physical ``gpa``, over what was there: ``size`` bytes of the file ``fd`` (a memfd, open as
    long as the overlay is there) from ``offset``, all multiples of 4096. Two overlays may show the same bytes. One does
    not change."""

    __slots__ = ("fd", "gpa", "offset", "rights", "size")

    def __init__(self, gpa: int, size: int, rights: Rights, fd: int = -1, offset: int = 0) -> None:
        self.gpa = gpa
        self.size = size
        self.rights = rights
        self.fd = fd
        self.offset = offset

    @property
    def end(self) -> int:
        return self.gpa + self.size


class MapListener(Protocol):
    """An engine, whose own tables follow the regions."""

    def changing(
        self, before: Sequence[Region], after: Sequence[Region], where: Sequence[tuple[int, int]]
    ) -> AbstractContextManager[None]:
        """Entered while the host's window shows ``before``, left when it shows ``after``; they differ within ``where``,
        ranges (start, end). From its end on no CPU of the guest sees what was before, and none ever sees neither."""


def layered(ram: Iterable[Region], overlays: Iterable[Overlay], base: int) -> tuple[Region, ...]:
    """The regions, where guest-physical 0 is at host address ``base``."""
    regions = list(ram)
    for over in overlays:
        regions = [part for region in regions for part in _around(region, over)]
        if over.rights is not Rights.NONE:
            regions.append(Region(over.gpa, over.size, base + over.gpa, over.rights, over.fd, over.offset))
    return tuple(sorted(regions))


def _around(region: Region, over: Overlay) -> list[Region]:
    """What the overlay leaves of the region."""
    if over.end <= region.gpa or region.end <= over.gpa:
        return [region]
    parts = (region.cut(region.gpa, over.gpa), region.cut(over.end, region.end))
    return [part for part in parts if part.size > 0]


def backings(regions: Iterable[Region], start: int, end: int) -> list[tuple[int, int, int, int]]:
    """(address, size, file, offset) of what lies in [start, end)."""
    parts = [region.cut(start, end) for region in regions if region.gpa < end and start < region.end]
    return [(part.gpa, part.size, part.fd, part.offset) for part in parts]
