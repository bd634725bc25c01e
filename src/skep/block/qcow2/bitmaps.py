"""Persistent dirty bitmaps: which parts of the disk were written since somebody asked for it.

Those that are enabled (flag AUTO) are marked as in use in the file before the first write, kept up in memory, and
stored when the image is closed; after a crash they stay marked, and nobody relies on them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from skep.block.backend import read_at, write_at
from skep.block.format import Bitmap, DamagedImage, ImageError
from skep.block.qcow2.header import Autoclear, Extension
from skep.block.qcow2.refcounts import from_big_endian

if TYPE_CHECKING:
    from skep.block.qcow2.image import Qcow2Image

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
IN_USE, AUTO = 1, 2
_MOST, _MOST_DIRECTORY, _MOST_NAME = 65535, 1024 * 65535, 1023
_MOST_BYTES, _MOST_LOADED = 64 << 20, 256 << 20
"""Of memory: one bitmap, a bit each for 32 TiB in pieces of 64 KiB; all of an image's."""
_OFFSET = 0x00FF_FFFF_FFFF_FE00


class Marks:
    """One bitmap."""

    def __init__(
        self,
        name: str,
        granularity_bits: int,
        flags: int,
        table_offset: int = 0,
        table_size: int = 0,
        extra: bytes = b"",
    ) -> None:
        self.name, self.granularity_bits, self.flags = name, granularity_bits, flags
        self.table_offset, self.table_size = table_offset, table_size
        """The latter in entries."""
        self.extra = extra
        self.data: bytearray | None = None
        """A bit for each piece of the disk, the least significant first; None while it is only in the file."""

    def touch(self, offset: int, length: int) -> None:
        assert self.data is not None
        first, last = offset >> self.granularity_bits, (offset + length - 1) >> self.granularity_bits
        while first <= last and first & 7:
            self.data[first >> 3] |= 1 << (first & 7)
            first += 1
        while last >= first and last & 7 != 7:
            self.data[last >> 3] |= 1 << (last & 7)
            last -= 1
        if first <= last:
            self.data[first >> 3 : (last + 1) >> 3] = b"\xff" * ((last + 1 - first) >> 3)


class Tracker:
    """The bitmaps of an open image."""

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image
        extension = image.header.extensions.get(Extension.BITMAPS)
        there = extension is not None and image.header.autoclear & Autoclear.BITMAPS
        self._place = (0, 0)
        """Of the directory, bytes."""
        self.all: list[Marks] = self._read(extension) if there and extension is not None else []
        self._active = [] if image.read_only else [one for one in self.all if one.flags & (AUTO | IN_USE) == AUTO]
        self._begun = False

    def _read(self, extension: bytes) -> list[Marks]:
        if len(extension) != _EXTENSION.size:
            raise ImageError("the list of bitmaps is damaged", self._image.path)
        count, _, size, offset = _EXTENSION.unpack(extension)
        if not 0 < count <= _MOST or size > _MOST_DIRECTORY or offset % self._image.cluster_size:
            raise ImageError("the list of bitmaps is damaged", self._image.path)
        if offset + size > self._image.file.size:
            raise ImageError("the list of bitmaps is behind the end of the file", self._image.path)
        self._place = (offset, size)
        data = bytes(read_at(self._image.file, offset, size))
        found, at = [], 0
        for _ in range(count):
            if at + _ENTRY.size > size:
                raise ImageError("the list of bitmaps is damaged", self._image.path)
            table, entries, flags, kind, bits, name_size, extra_size = _ENTRY.unpack_from(data, at)
            end = at + _ENTRY.size + extra_size + name_size
            if end > size or kind != 1 or not 9 <= bits <= 31 or not 0 < name_size <= _MOST_NAME:
                raise ImageError("the list of bitmaps is damaged", self._image.path)
            name = data[end - name_size : end].decode(errors="replace")
            extra = data[at + _ENTRY.size : end - name_size]
            found.append(Marks(name, bits, flags, table, entries, extra))
            at = -(-end // 8) * 8
        return found

    def described(self) -> list[Bitmap]:
        names = ((IN_USE, "in-use"), (AUTO, "auto"))
        return [
            Bitmap(one.name, 1 << one.granularity_bits, tuple(name for bit, name in names if one.flags & bit))
            for one in self.all
        ]

    def find(self, name: str) -> Marks:
        for one in self.all:
            if one.name == name:
                return one
        raise ImageError(f"there is no bitmap {name!r}", self._image.path)

    def touch(self, offset: int, length: int) -> None:
        """These bytes of the disk are going to be written."""
        if not self._active or not length:
            return
        if not self._begun:
            self._begin()
        for one in self._active:
            one.touch(offset, length)

    def _begin(self) -> None:
        """The file says that they are in use before anything is written."""
        with self._image.tables_lock:
            if self._begun:
                return
            for one in self._active:
                self.load(one)
                one.flags |= IN_USE
            write_at(self._image.file, self._place[0], self._directory())
            self._image.file.flush()
            self._begun = True

    def load(self, one: Marks) -> bytearray:
        """Its bits in memory."""
        if one.data is not None:
            return one.data
        image = self._image
        cluster, size = image.cluster_size, self._bytes(one)
        entries = -(-size // cluster)
        if one.table_size != entries or one.table_offset % cluster:
            raise DamagedImage(image.path, f"the table of bitmap {one.name!r}")
        if not self._fits(size):
            raise DamagedImage(image.path, f"{size} bytes of bitmap {one.name!r}, and there is no memory for them")
        data = bytearray(entries * cluster)
        for i, entry in enumerate(from_big_endian(read_at(image.file, one.table_offset, entries * 8))):
            place = entry & _OFFSET
            if place % cluster:
                raise DamagedImage(image.path, f"the table of bitmap {one.name!r}")
            if place:
                data[i * cluster : (i + 1) * cluster] = read_at(image.file, place, cluster)
            elif entry & 1:
                data[i * cluster : (i + 1) * cluster] = b"\xff" * cluster
        del data[size:]
        one.data = data
        return data

    def _bytes(self, one: Marks) -> int:
        pieces = -(-self._image.size // (1 << one.granularity_bits))
        return -(-pieces // 8)

    def _fits(self, size: int) -> bool:
        """There is memory for one of so many bytes beside those that are loaded."""
        loaded = sum(len(one.data) for one in self.all if one.data is not None)
        return size <= min(_MOST_BYTES, _MOST_LOADED - loaded)

    def resize(self) -> None:
        """The disk has another size; the loaded ones follow. Others cannot, and are given up, as are those that there
        is no memory for."""
        for one in self.all:
            if one.data is not None:
                old, one.data = one.data, None
                size = self._bytes(one)
                if self._fits(size):
                    del old[size:]
                    old += bytes(size - len(old))
                    one.data = old
        if any(one.data is None for one in self.all):
            self.all = [one for one in self.all if one.data is not None]
            self._begun = True
            self.save()

    def load_all(self) -> None:
        for one in self.all:
            if not one.flags & IN_USE or one in self._active:
                self.load(one)

    def store(self) -> None:
        """The image is going to be closed."""
        if self._begun:
            self.save()

    def save(self) -> None:
        """Write them anew, and the header that says where they are."""
        image = self._image
        image.settle()
        old = self.clusters()
        for one in self.all:
            if one.data is not None:
                self._write(one, one.data)
                one.flags &= ~IN_USE
        header = image.header
        if self.all:
            directory = self._directory()
            offset = image.place_table(directory)
            self._place = (offset, len(directory))
            header.extensions[Extension.BITMAPS] = _EXTENSION.pack(len(self.all), 0, len(directory), offset)
            header.autoclear |= Autoclear.BITMAPS
        else:
            self._place = (0, 0)
            header.extensions.pop(Extension.BITMAPS, None)
            header.autoclear &= ~Autoclear.BITMAPS
        image.flush()
        image.write_header()
        image.flush()
        keep = set(self.clusters())
        image.give_back([index for index in old if index not in keep])
        self._begun = False
        self._active = [one for one in self.all if one.flags & (AUTO | IN_USE) == AUTO]
        for one in self.all:
            one.data = None

    def _write(self, one: Marks, data: bytearray) -> None:
        image, cluster = self._image, self._image.cluster_size
        entries = []
        for at in range(0, len(data), cluster):
            piece = data[at : at + cluster]
            entries.append(image.place_table(bytes(piece.ljust(cluster, b"\0"))) if any(piece) else 0)
        one.table_offset = image.place_table(struct.pack(f">{len(entries)}Q", *entries))
        one.table_size = len(entries)

    def _directory(self) -> bytes:
        parts = []
        for one in self.all:
            name = one.name.encode()
            entry = _ENTRY.pack(
                one.table_offset, one.table_size, one.flags, 1, one.granularity_bits, len(name), len(one.extra)
            )
            whole = entry + one.extra + name
            parts.append(whole + bytes(-len(whole) % 8))
        return b"".join(parts)

    def clusters(self) -> list[int]:
        """Of the file, that they take: the directory's, the tables', the bits'. As the file has it."""
        image, cluster = self._image, self._image.cluster_size

        def span(offset: int, size: int) -> range:
            return range(offset // cluster, -(-(offset + size) // cluster)) if offset else range(0)

        found = list(span(*self._place))
        for one in self.all:
            if one.table_size * 8 > _MOST_BYTES or one.table_offset + one.table_size * 8 > image.file.size + cluster:
                raise DamagedImage(image.path, f"the table of bitmap {one.name!r}")
            found += span(one.table_offset, one.table_size * 8)
            if one.table_offset:
                table = from_big_endian(read_at(image.file, one.table_offset, one.table_size * 8))
                found += [(entry & _OFFSET) // cluster for entry in table if entry & _OFFSET]
        return found

    # What `skep image bitmap` does.

    def add(self, name: str, granularity: int | None) -> None:
        if self._image.header.version < 3:
            raise ImageError("an image of version 2 has no bitmaps", self._image.path, "amend -o compat=1.1")
        if any(one.name == name for one in self.all):
            raise ImageError(f"there is a bitmap {name!r} already", self._image.path)
        if not 0 < len(name.encode()) <= _MOST_NAME:
            raise ImageError("a bitmap's name has 1 to 1023 bytes", self._image.path)
        granularity = granularity or max(4096, min(65536, self._image.cluster_size))
        if granularity & (granularity - 1) or not 512 <= granularity <= 1 << 31:
            raise ImageError(f"{granularity} is not a power of 2 from 512 to 2 GiB", "granularity")
        one = Marks(name, granularity.bit_length() - 1, AUTO)
        if not self._fits(size := self._bytes(one)):
            raise ImageError(f"the bitmap would take {size} bytes", self._image.path, "say a larger granularity")
        one.data = bytearray(size)
        self.all.append(one)
        self.save()

    def change(self, name: str, *, enable: bool | None = None, clear: bool = False) -> None:
        one = self.find(name)
        self._usable(one)
        data = self.load(one)
        if clear:
            data[:] = bytes(len(data))
        if enable is not None:
            one.flags = one.flags & ~AUTO | (AUTO if enable else 0)
        self.save()

    def remove(self, name: str) -> None:
        one = self.find(name)
        self.load_all()
        image, old = self._image, self.clusters()
        self.all.remove(one)
        self.save()
        keep = set(self.clusters())
        image.give_back([index for index in old if index not in keep and image.count_of(index)])

    def merge(self, name: str, granularity_bits: int, bits: bytes | bytearray) -> None:
        """Set what another bitmap, of a disk of the same size, has set."""
        one = self.find(name)
        self._usable(one)
        self.load(one)
        for number in range(len(bits) * 8):
            if bits[number >> 3] >> (number & 7) & 1:
                offset = number << granularity_bits
                one.touch(offset, min(1 << granularity_bits, self._image.size - offset))
        self.save()

    def _usable(self, one: Marks) -> None:
        if one.flags & IN_USE and not self._begun:
            raise ImageError(f"bitmap {one.name!r} was in use when its writer ended", self._image.path, "remove it")
