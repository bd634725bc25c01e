"""Compressed clusters: raw deflate streams with a window of 4 KiB, or zstd frames."""

from __future__ import annotations

import ctypes
import zlib
from functools import cache

from skep.block.format import ImageError
from skep.block.qcow2.header import Compression
from skep.errors import HostError


def compress(kind: int, data: bytes | memoryview, level: int | None = None) -> bytes | None:
    """None: it does not get smaller."""
    if kind == Compression.ZSTD:
        packed = _zstd().compress(bytes(data), 3 if level is None else level)
    else:
        engine = zlib.compressobj(-1 if level is None else level, zlib.DEFLATED, -12)
        packed = engine.compress(data) + engine.flush()
    return packed if len(packed) < len(data) else None


def decompress(kind: int, data: bytes | bytearray, size: int) -> bytes:
    """The ``size`` bytes that a cluster is; behind the stream there may be anything. Raises ValueError."""
    if kind == Compression.ZSTD:
        found = _zstd().decompress(bytes(data), size)
    else:
        try:
            found = zlib.decompressobj(-15).decompress(data, size)
        except zlib.error as error:
            raise ValueError(str(error)) from None
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes instead of {size}")
    return found


class _Zstd:
    """libzstd, by its stable interface. Python has none before 3.14."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lib = library
        for name in ("ZSTD_compressBound", "ZSTD_compress", "ZSTD_decompress", "ZSTD_findFrameCompressedSize"):
            getattr(library, name).restype = ctypes.c_size_t
        library.ZSTD_compressBound.argtypes = (ctypes.c_size_t,)
        library.ZSTD_findFrameCompressedSize.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
        library.ZSTD_isError.argtypes = (ctypes.c_size_t,)
        pair = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
        library.ZSTD_compress.argtypes = (*pair, ctypes.c_int)
        library.ZSTD_decompress.argtypes = pair

    def compress(self, data: bytes, level: int) -> bytes:
        room = ctypes.create_string_buffer(self._lib.ZSTD_compressBound(len(data)))
        n = self._lib.ZSTD_compress(room, len(room), data, len(data), level)
        if self._lib.ZSTD_isError(n):
            raise ImageError("libzstd cannot compress")
        return room.raw[:n]

    def decompress(self, data: bytes, size: int) -> bytes:
        frame = self._lib.ZSTD_findFrameCompressedSize(data, len(data))
        if self._lib.ZSTD_isError(frame):
            raise ValueError("no zstd frame")
        room = ctypes.create_string_buffer(size)
        n = self._lib.ZSTD_decompress(room, size, data, frame)
        if self._lib.ZSTD_isError(n):
            raise ValueError("a damaged zstd frame")
        return room.raw[:n]


@cache
def _zstd() -> _Zstd:
    try:
        return _Zstd(ctypes.CDLL("libzstd.so.1"))
    except OSError:
        raise HostError("libzstd.so.1 is missing, which packs zstd clusters", None, "install libzstd1") from None
