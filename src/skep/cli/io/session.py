"""The image that `skep io` has open, and how requests of any offset and length reach it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

from skep.block.backend import BlockBackend, read_at
from skep.block.closing import Closing
from skep.block.filters import CopyOnRead
from skep.block.format import SECTOR, BackingName, Image
from skep.block.image import create_image, open_image
from skep.block.secrets import Secrets
from skep.cli.opening import CACHES, How, open_by
from skep.errors import UserError

_MISALIGNMENT = 16


@dataclass(slots=True)
class Opening:
    """How an image is opened."""

    how: How = field(default_factory=lambda: How(read_only=False))
    copy_on_read: bool = False
    temporary: bool = False
    """What is written goes to a file that is thrown away."""
    misaligned: bool = False

    def set(self, letter: str) -> None:
        """One of the options r, s, n, C, m, U."""
        match letter:
            case "r":
                self.how = self.how._replace(read_only=True)
            case "U":
                self.how = self.how._replace(shared=True)
            case "n":
                self.how = self.how._replace(cache="none")
            case "s":
                self.temporary = True
            case "C":
                self.copy_on_read = True
            case "m":
                self.misaligned = True

    def set_cache(self, mode: str) -> None:
        if mode not in CACHES:
            raise UserError(f"Invalid cache option: {mode}")
        self.how = self.how._replace(cache=mode)


class Session(Closing):
    """At most one image, and what is done to it. A context manager, which closes it."""

    def __init__(self, secrets: Secrets) -> None:
        self.secrets = secrets
        """For images that are opened by commands."""
        self.image: Image | None = None
        self.opening = Opening()
        self._path = ""
        self._disk: BlockBackend | None = None

    def open(self, path: str, opening: Opening) -> None:
        """Raises UserError."""
        image = _open_temporary(path, opening.how) if opening.temporary else open_by(path, opening.how)
        self.image, self._disk = image, CopyOnRead(image) if opening.copy_on_read and image.backing else image
        self.opening, self._path = opening, path

    def reopen(self, opening: Opening) -> None:
        """The same image in another way; nothing is open if that fails."""
        path = self._path
        self.close()
        self.open(path, opening)

    def close(self) -> None:
        image, self.image, self._disk = self.image, None, None
        if image is not None:
            try:
                if not image.read_only and self.opening.how.cache != "unsafe":
                    image.flush()
            finally:
                image.close()

    @property
    def disk(self) -> BlockBackend:
        assert self._disk is not None
        return self._disk

    def room(self, length: int, byte: int) -> memoryview:
        """Memory of the caller's, full of that byte."""
        odd = _MISALIGNMENT if self.opening.misaligned else 0
        return memoryview(bytearray([byte]) * (length + odd))[odd:]

    def read(self, rooms: Sequence[memoryview], offset: int) -> None:
        length = sum(map(len, rooms))
        if not offset % SECTOR and not length % SECTOR:
            self.disk.preadv(rooms, offset)
            return
        start, end = _whole(offset, offset + length)
        with memoryview(read_at(self.disk, start, end - start)) as view:
            at = offset - start
            for room in rooms:
                room[:] = view[at : at + len(room)]
                at += len(room)

    def write(self, rooms: Sequence[memoryview], offset: int) -> None:
        """What a sector has beside the part that is written stays."""
        length = sum(map(len, rooms))
        start, end = _whole(offset, offset + length)
        if start != offset or end != offset + length:
            head = read_at(self.disk, start, SECTOR)[: offset - start]
            tail = read_at(self.disk, end - SECTOR, SECTOR)[SECTOR - (end - offset - length) :]
            rooms = [memoryview(b"".join([head, *rooms, tail if end != offset + length else b""]))]
        self.disk.pwritev(rooms, start)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        first, last = -(-offset // SECTOR) * SECTOR, (offset + length) // SECTOR * SECTOR
        if first >= last:
            self.write([memoryview(bytes(length))], offset)
            return
        for at, end in ((offset, first), (last, offset + length)):
            if at < end:
                self.write([memoryview(bytes(end - at))], at)
        self.disk.write_zeroes(first, last - first, unmap and self.opening.how.discard)

    def discard(self, offset: int, length: int) -> None:
        """Of whole sectors; parts of some keep what they have."""
        first, last = -(-offset // SECTOR) * SECTOR, (offset + length) // SECTOR * SECTOR
        if first < last and self.opening.how.discard:
            self.disk.discard(first, last - first)


def _whole(start: int, end: int) -> tuple[int, int]:
    """Whole sectors around these bytes."""
    return start // SECTOR * SECTOR, -(-end // SECTOR) * SECTOR


def _open_temporary(path: str, how: How) -> Image:
    """A new image over that one, which nobody else sees."""
    with open_by(path, how._replace(read_only=True)) as below:
        below_format = below.format
    with tempfile.TemporaryDirectory(prefix="skep-io-") as directory:
        name = os.path.join(directory, "snapshot.qcow2")
        create_image(name, "qcow2", backing=BackingName(os.path.abspath(path), below_format))
        return open_image(name, format="qcow2", lock=not how.shared)
