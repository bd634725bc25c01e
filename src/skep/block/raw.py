"""Raw images: the file's bytes are the disk's bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from skep.block.backend import Buffers, Extent, File, Located, read_padded, write_zeroes_as_data
from skep.block.format import SECTOR, BackingName, Can, Image, ImageError, Option, Write
from skep.block.protocol import create_protocol
from skep.block.secrets import NO_SECRETS, Secrets

_PREALLOCATION = ("off", "falloc", "full")


class RawImage(Image):
    """A file whose last sector is not whole is a disk with zeros at its end."""

    format = "raw"
    fits_devices = True
    create_options: ClassVar = {
        "preallocation": Option("Preallocation mode (allowed values: off, falloc, full)", "off"),
    }
    can = Can.WRITE | Can.DISCARD | Can.ZERO | Can.RESIZE

    def __init__(self, file: File) -> None:
        self.file = file
        self.path = file.path
        self.size = -(-file.size // SECTOR) * SECTOR
        self.read_only = file.read_only
        self.write_cache = file.write_cache

    def preadv(self, buffers: Buffers, offset: int) -> None:
        if self.file.size < self.size:
            read_padded(self.file, buffers, offset)
        else:
            self.file.preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        self.file.pwritev(buffers, offset)

    def placed(self, offset: int, length: int) -> Write:
        return lambda buffers: self.file.pwritev(buffers, offset)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return self.file.read_now(buffers, offset)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return self.file.write_now(buffers, offset)

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        return self.file.locate(offset, length, write)

    def discard(self, offset: int, length: int) -> None:
        self.file.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.file.write_zeroes(offset, length, unmap)

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        for extent in self.file.extents(offset, length):
            yield extent
            offset = extent.offset + extent.length
        if offset < end:
            yield Extent(offset, end - offset, zero=True)

    def resize(self, size: int) -> None:
        self.file.resize(size)
        self.size = size

    def reserve(self, start: int, mode: str) -> None:
        if mode not in _PREALLOCATION:
            raise self.cannot(f"has no preallocation {mode!r}")
        preallocate(self.file, start, max(0, self.size - start), mode)

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        mode = options.get("preallocation", "off")
        if mode not in _PREALLOCATION:
            raise ImageError(f"no such preallocation: {mode!r}", path, f"known are {', '.join(_PREALLOCATION)}")
        with create_protocol(path, size) as file:
            preallocate(file, 0, size, mode)

    @classmethod
    def measure(cls, size: int, data: Sequence[tuple[int, int]], options: Mapping[str, str]) -> tuple[int, int]:
        whole = -(-size // SECTOR) * SECTOR
        return whole, whole


def preallocate(file: File, start: int, size: int, mode: str) -> None:
    """Take the host's space for these bytes of a new file: ``falloc`` reserves it, ``full`` writes zeros."""
    if mode == "falloc" and size:
        file.allocate(start, size)
    elif mode == "full":
        write_zeroes_as_data(file, start, size)
