"""LUKS1 as a disk image format: a header, and behind it the disk, encrypted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from skep.block.backend import Buffers, Extent, File
from skep.block.choices import choice
from skep.block.format import SECTOR, BackingName, Can, Image, ImageError, Option
from skep.block.luks import names
from skep.block.luks import options as said
from skep.block.luks.header import write_header
from skep.block.luks.keys import KeySlots, sector_cipher
from skep.block.luks.layer import EncryptedFile, LockedFile
from skep.block.protocol import create_protocol
from skep.block.raw import preallocate
from skep.block.secrets import NO_SECRETS, Secrets


class LuksImage(Image):
    """Locked until :meth:`unlock`: then it can be read and written. A new disk is not zeros, but anything."""

    format = "luks"
    fits_devices = True
    can = Can.WRITE | Can.DISCARD | Can.RESIZE
    create_options: ClassVar = {
        **names.CREATE,
        "preallocation": Option("Preallocation mode (allowed values: off, falloc, full)", "off"),
    }
    open_options: ClassVar = {"key-secret": names.CREATE["key-secret"]}
    amend_options: ClassVar = names.AMEND

    def __init__(self, file: File) -> None:
        self.file = file
        self.path = file.path
        self.read_only = file.read_only
        self.write_cache = file.write_cache
        self._slots = KeySlots(file)
        self._start = self._slots.header.payload_offset * SECTOR
        if self._start > file.size:
            raise ImageError("the LUKS image ends before its payload begins", self.path)
        self.size = (file.size - self._start) // SECTOR * SECTOR
        self._key: bytes | None = None
        self._data: File = LockedFile(file)

    @classmethod
    def open(cls, file: File, options: Mapping[str, str], secrets: Secrets) -> Self:
        image = cls(file)
        if "key-secret" in options:
            image.unlock(said.password_of(file.path, options, secrets))
        return image

    @property
    def new_is_zeros(self) -> bool:
        return False

    @property
    def encrypted(self) -> bool:
        return True

    @property
    def locked(self) -> bool:
        return self._key is None

    def unlock(self, password: bytes) -> None:
        self._key = self._slots.unlock(password)
        self._data = EncryptedFile(self.file, sector_cipher(self._slots.header.encryption, self._key), self._start)

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self._data.preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        self._data.pwritev(buffers, offset)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._data.write_zeroes(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        self._data.discard(offset, length)

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, data=True)

    def resize(self, size: int) -> None:
        """What is beyond the old end is anything, as in a new image."""
        self.file.resize(self._start + size)
        self.size = size

    def info(self) -> dict[str, Any]:
        return self._slots.header.info()

    def amend(self, options: Mapping[str, str], secrets: Secrets = NO_SECRETS, *, force: bool = False) -> None:
        said.amend(self._slots, self.path, self._key, options, secrets, force)

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        mode = choice(path, options, "preallocation", "off", "falloc", "full")
        said.password_of(path, options, secrets)
        header, key = said.header_of(path, options)
        start = header.payload_offset * SECTOR
        with create_protocol(path, start + size) as file:
            write_header(file, 0, header)
            said.add_first_key(KeySlots(file), key, path, options, secrets)
            preallocate(file, start, size, mode)

    @classmethod
    def measure(cls, size: int, data: Sequence[tuple[int, int]], options: Mapping[str, str]) -> tuple[int, int]:
        header, _ = said.header_of("measure", {**options, "iter-time": "1"})
        whole = header.payload_offset * SECTOR + size
        return whole, whole
