"""Read a file out of a disk image, of any format, without mounting anything: ext2, ext3 and ext4.

    python examples/read_qcow2.py IMAGE /etc/hostname [FIRST_SECTOR]

FIRST_SECTOR is where the file system begins, 0 unless the disk has partitions. The image is opened for reading only; so
is what lies below it.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from itertools import chain, islice

from skep.block.backend import read_at
from skep.block.format import Image
from skep.block.image import open_image

_EXTENTS = 0x80000
_ROOT = 2


class Ext:
    """A file system of the ext family (Linux, Documentation/filesystems/ext4)."""

    def __init__(self, image: Image, start: int = 0) -> None:
        self._image, self._start = image, start
        superblock = self._read(1024, 1024)
        if superblock[56:58] != b"\x53\xef":
            raise ValueError("no ext2, ext3 or ext4 file system is here")
        self._block = 1024 << struct.unpack_from("<I", superblock, 24)[0]
        self._first_block = struct.unpack_from("<I", superblock, 20)[0]
        self._per_group = struct.unpack_from("<I", superblock, 40)[0]
        self._inode_size = struct.unpack_from("<H", superblock, 88)[0]
        wide = struct.unpack_from("<I", superblock, 96)[0] & 0x80
        self._descriptor_size = struct.unpack_from("<H", superblock, 254)[0] if wide else 32

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError."""
        inode = self._inode(_ROOT)
        for name in filter(None, path.split("/")):
            entries = dict(self._entries(inode))
            if name.encode() not in entries:
                raise FileNotFoundError(path)
            inode = self._inode(entries[name.encode()])
        return self._content(inode)

    def _read(self, offset: int, length: int) -> bytes:
        """Any bytes of the file system; an image is read by whole sectors."""
        first = (self._start + offset) // 512 * 512
        skip = self._start + offset - first
        return bytes(read_at(self._image, first, -(-(skip + length) // 512) * 512)[skip : skip + length])

    def _inode(self, number: int) -> bytes:
        group, at = divmod(number - 1, self._per_group)
        descriptor = self._read((self._first_block + 1) * self._block + group * self._descriptor_size, 64)
        table = struct.unpack_from("<I", descriptor, 8)[0]
        if self._descriptor_size > 32:
            table |= struct.unpack_from("<I", descriptor, 40)[0] << 32
        return self._read(table * self._block + at * self._inode_size, 128)

    def _content(self, inode: bytes) -> bytes:
        size = struct.unpack_from("<I", inode, 4)[0] | struct.unpack_from("<I", inode, 108)[0] << 32
        data = bytearray(size)
        flags = struct.unpack_from("<I", inode, 32)[0]
        blocks = self._extents(inode[40:100]) if flags & _EXTENTS else self._pointers(inode[40:100], size)
        for number, place in blocks:
            at = number * self._block
            if place and at < size:
                data[at : at + self._block] = self._read(place * self._block, min(self._block, size - at))
        return bytes(data)

    def _extents(self, node: bytes) -> Iterator[tuple[int, int]]:
        """(number in the file, place on the disk) of every block, from a node of the extent tree."""
        count, depth = struct.unpack_from("<2xH2xH", node)
        for i in range(count):
            entry = node[12 + 12 * i : 24 + 12 * i]
            if depth:
                low, high = struct.unpack_from("<4xIH", entry)
                yield from self._extents(self._read((low | high << 32) * self._block, self._block))
            else:
                number, length, high, low = struct.unpack("<IHHI", entry)
                for block in range(length if length <= 32768 else 0):  # longer ones are not written yet: zeros
                    yield number + block, (low | high << 32) + block

    def _pointers(self, pointers: bytes, size: int) -> Iterator[tuple[int, int]]:
        """The same from the block map of ext2: 12 blocks, then one, two and three levels of tables."""
        words = struct.unpack("<15I", pointers)
        places = chain(self._leaves(words[:12], 0), *(self._leaves((words[11 + n],), n) for n in (1, 2, 3)))
        yield from enumerate(islice(places, -(-size // self._block)))

    def _leaves(self, words: tuple[int, ...], level: int) -> Iterator[int]:
        per_block = self._block // 4
        for word in words:
            if level == 0:
                yield word
            elif word == 0:
                yield from [0] * per_block**level
            else:
                table = struct.unpack(f"<{per_block}I", self._read(word * self._block, self._block))
                yield from self._leaves(table, level - 1)

    def _entries(self, inode: bytes) -> Iterator[tuple[bytes, int]]:
        data, at = self._content(inode), 0
        while at + 8 <= len(data):
            number, length, name_length = struct.unpack_from("<IHB", data, at)
            if number:
                yield data[at + 8 : at + 8 + name_length], number
            at += max(length, 8)


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    start = int(sys.argv[3]) * 512 if len(sys.argv) == 4 else 0
    with open_image(sys.argv[1], read_only=True) as image:
        sys.stdout.buffer.write(Ext(image, start).read(sys.argv[2]))


if __name__ == "__main__":
    main()
