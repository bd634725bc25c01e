"""DMG, Apple's disk images (UDIF): read only. Everything is big-endian.

Apple publishes no specification. A trailer at the end of the file, "koly", tells where tables of chunks are, "mish":
in a property list, or in old images in a resource fork. A chunk is so many sectors of the disk, compressed by itself.
"""

from __future__ import annotations

import binascii
import bisect
import bz2
import lzma
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from skep.block.backend import Buffers, Extent, File, fill_zeroes, read_at, split
from skep.block.format import SECTOR, Can, DamagedImage, Image, ImageError

_TRAILER = struct.Struct(">4sIII5Q160x2Q")
_TABLE = struct.Struct(">4sIQQQII24x136xI")
_CHUNK = struct.Struct(">IIQQQQ")

_ZERO, _RAW, _IGNORE = 0, 1, 2
_ADC, _ZLIB, _BZIP2, _LZFSE, _LZMA = 0x80000004, 0x80000005, 0x80000006, 0x80000007, 0x80000008
_COMMENT, _END = 0x7FFFFFFE, 0xFFFFFFFF

_MOST_TABLES = 16 << 20
"""Bytes of the property list, or of the resource fork."""
_LARGEST_CHUNK = 16 << 20
"""Bytes of a compressed chunk's contents, which are unpacked in memory."""
_MOST_SECTORS = 1 << 52

_BLKX = re.compile(rb"<key>blkx</key>\s*<array>(.*?)</array>", re.DOTALL)
_DATA = re.compile(rb"<data>([A-Za-z0-9+/=\s]*)</data>")


class Chunk(NamedTuple):
    sector: int
    """Its first on the disk."""
    sectors: int
    kind: int
    offset: int
    """In the file, bytes."""
    length: int


class DmgImage(Image):
    """What no chunk has is zeros."""

    format = "dmg"
    can = Can.NOTHING

    def __init__(self, file: File) -> None:
        self.file = file
        self.path = file.path
        self.read_only = True
        self.write_cache = file.write_cache
        if file.size < SECTOR:
            raise ImageError("this is not a DMG image", self.path)
        fields = _TRAILER.unpack_from(read_at(file, file.size - SECTOR, SECTOR))
        magic, _, _, _, _, fork, _, resources, resources_length, plist, plist_length = fields
        if magic != b"koly":
            raise ImageError("this is not a DMG image", self.path)
        if plist_length:
            tables = _from_plist(self._part(plist, plist_length))
        else:
            tables = _from_resources(self._part(resources, resources_length))
        self._chunks = sorted(chunk for table in tables for chunk in self._read_table(table, fork))
        self._starts = [chunk.sector for chunk in self._chunks]
        if not self._chunks:
            raise ImageError("the DMG has no chunks", self.path)
        for one, other in pairwise(self._chunks):
            if one.sector + one.sectors > other.sector:
                raise ImageError("chunks of the DMG overlap", self.path)
        self.size = (self._chunks[-1].sector + self._chunks[-1].sectors) * SECTOR
        self._lock = threading.Lock()
        self._last: tuple[int, bytes] = (-1, b"")
        """The chunk that was unpacked last, and its contents."""

    def _part(self, offset: int, length: int) -> bytes:
        if length > _MOST_TABLES or offset + length > self.file.size:
            raise ImageError("the tables of the DMG are in no possible place", self.path)
        return bytes(read_at(self.file, offset, length))

    def _read_table(self, table: bytes, fork: int) -> Iterator[Chunk]:
        """Raises ImageError."""
        if len(table) < _TABLE.size:
            raise ImageError("a table of the DMG is too short", self.path)
        magic, _, first, _, start, _, _, count = _TABLE.unpack_from(table)
        if magic != b"mish":
            return
        if _TABLE.size + count * _CHUNK.size > len(table):
            raise ImageError("a table of the DMG is too short", self.path)
        for i in range(count):
            kind, _, sector, sectors, offset, length = _CHUNK.unpack_from(table, _TABLE.size + i * _CHUNK.size)
            if kind == _END:
                return
            if kind == _COMMENT or not sectors:
                continue
            chunk = Chunk(first + sector, sectors, kind, fork + start + offset, length)
            self._check_chunk(chunk)
            yield chunk

    def _check_chunk(self, chunk: Chunk) -> None:
        if chunk.sector + chunk.sectors > _MOST_SECTORS:
            raise ImageError("a chunk of the DMG is beyond any disk", self.path)
        if chunk.kind in (_ZERO, _IGNORE):
            return
        if chunk.kind not in (_RAW, _ADC, _ZLIB, _BZIP2, _LZFSE, _LZMA):
            raise ImageError(f"a DMG compressed by method {chunk.kind:#x} is not supported", self.path)
        if chunk.offset + chunk.length > self.file.size:
            raise ImageError("a chunk of the DMG is beyond the file", self.path)
        if chunk.kind == _RAW:
            if chunk.length < chunk.sectors * SECTOR:
                raise ImageError("a chunk of the DMG is too short", self.path)
        elif chunk.sectors * SECTOR > _LARGEST_CHUNK or chunk.length > _LARGEST_CHUNK:
            raise ImageError("a chunk of the DMG is too large", self.path)

    def _split(self, offset: int, length: int) -> Iterator[tuple[int | None, int, int]]:
        """The chunks that these bytes are in (None: in none), where in each, and how many."""
        index = bisect.bisect_right(self._starts, offset // SECTOR) - 1
        end = offset + length
        while offset < end:
            start = offset
            if 0 <= index < len(self._chunks):
                chunk = self._chunks[index]
                stop = (chunk.sector + chunk.sectors) * SECTOR
                if offset < stop:
                    offset = min(end, stop)
                    yield index, start - chunk.sector * SECTOR, offset - start
                    start = offset
            index += 1
            following = self._starts[index] * SECTOR if index < len(self._chunks) else end
            offset = max(offset, min(end, following))
            if offset > start:
                yield None, 0, offset - start

    def preadv(self, buffers: Buffers, offset: int) -> None:
        for index, start, n in self._split(offset, sum(map(len, buffers))):
            piece, buffers = split(buffers, n)
            chunk = None if index is None else self._chunks[index]
            if index is None or chunk is None or chunk.kind in (_ZERO, _IGNORE):
                fill_zeroes(piece)
            elif chunk.kind == _RAW:
                self.file.preadv(piece, chunk.offset + start)
            else:
                data = memoryview(self._unpacked(index))[start:]
                for buffer in piece:
                    buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def _unpacked(self, index: int) -> bytes:
        with self._lock:
            last, data = self._last
        if last == index:
            return data
        chunk = self._chunks[index]
        try:
            data = _unpack(chunk.kind, read_at(self.file, chunk.offset, chunk.length), chunk.sectors * SECTOR)
        except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as e:
            raise DamagedImage(self.path, f"the chunk at {chunk.offset:#x} cannot be unpacked: {e}") from None
        if len(data) < chunk.sectors * SECTOR:
            raise DamagedImage(self.path, f"the chunk at {chunk.offset:#x} has {len(data)} bytes")
        with self._lock:
            self._last = (index, data)
        return data

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        for index, start, n in self._split(offset, length):
            chunk = None if index is None else self._chunks[index]
            if chunk is None or chunk.kind in (_ZERO, _IGNORE):
                yield Extent(offset, n, zero=True)
            elif chunk.kind == _RAW:
                yield Extent(offset, n, data=True, host=chunk.offset + start)
            else:
                yield Extent(offset, n, data=True, compressed=True)
            offset += n


def _from_plist(text: bytes) -> Iterator[bytes]:
    """The tables in the property list's resource fork. A parser of XML would take many times its length."""
    found = _BLKX.search(text)
    for data in _DATA.finditer(found[1] if found else b""):
        try:
            yield binascii.a2b_base64(data[1])
        except binascii.Error:
            yield b""


def _from_resources(data: bytes) -> Iterator[bytes]:
    """The resources that are tables: each has its length before it."""
    if len(data) < 16:
        return
    at, _, length, _ = struct.unpack_from(">4I", data)
    end = min(len(data), at + length)
    while at + 4 <= end:
        (n,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"mish":
            yield data[at + 4 : at + 4 + n]
        at += 4 + n


def _unpack(kind: int, data: bytearray, size: int) -> bytes:
    if kind == _ZLIB:
        return zlib.decompressobj().decompress(data, size)
    if kind == _BZIP2:
        return bz2.BZ2Decompressor().decompress(data, size)
    if kind == _LZMA:
        return lzma.LZMADecompressor(memlimit=32 << 20).decompress(data, size)
    if kind == _LZFSE:
        from skep.block import lzfse  # some images are

        return lzfse.unpack(data, size)
    return _unpack_adc(data, size)


def _unpack_adc(data: bytearray, size: int) -> bytes:
    """Apple Data Compression: bytes as they are, and two kinds of copies of what was before. Raises ValueError."""
    out = bytearray()
    at = 0
    while at < len(data) and len(out) < size:
        head = data[at]
        if head & 0x80:
            n = (head & 0x7F) + 1
            out += data[at + 1 : at + 1 + n]
            at += 1 + n
            continue
        width = 3 if head & 0x40 else 2
        if at + width > len(data):
            raise ValueError("it ends within a copy")
        if head & 0x40:
            n, back = (head & 0x3F) + 4, data[at + 1] << 8 | data[at + 2]
        else:
            n, back = (head >> 2 & 0xF) + 3, (head & 3) << 8 | data[at + 1]
        at += width
        start = len(out) - back - 1
        if start < 0:
            raise ValueError("a copy of what is before the beginning")
        for i in range(start, start + n):
            out.append(out[i])
    return bytes(out[:size])
