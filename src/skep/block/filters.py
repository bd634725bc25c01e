"""Layers that change when and how requests are answered, not where the data is. Each goes over a file
or an image."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TextIO

from skep.block.backend import Buffers, File
from skep.block.format import Image
from skep.block.over import Over
from skep.errors import UserError
from skep.locks import Lock, Order

REQUESTS = ("read", "write", "zero", "discard", "flush")


class Filter(Over):
    """Passes everything on; the others say what they do besides, in ``before``. Nothing is answered at once, so that
    whoever has to wait does so on a thread that may.

    It lies over a file, below a format; or over an image, and takes whole sectors then.
    """

    def before(self, what: str, offset: int, length: int) -> None:
        """A request is going to be made, one of ``REQUESTS``. Raises OSError where it is not to be."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self.before("read", offset, sum(map(len, buffers)))
        self.below.preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        self.before("write", offset, sum(map(len, buffers)))
        self.below.pwritev(buffers, offset)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def discard(self, offset: int, length: int) -> None:
        self.before("discard", offset, length)
        self.below.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.before("zero", offset, length)
        self.below.write_zeroes(offset, length, unmap)

    def flush(self) -> None:
        self.before("flush", 0, 0)
        self.below.flush()


class Throttle(Filter):
    """So many bytes and so many requests a second, reads and writes together; up to a tenth of a second's may come at
    once. What space is given back by costs a request and no bytes."""

    def __init__(self, below: File, bytes_: int | None = None, requests: int | None = None) -> None:
        super().__init__(below)
        self._per_byte = 1 / bytes_ if bytes_ else 0.0
        self._per_request = 1 / requests if requests else 0.0
        self._lock = Lock("disk throttle", Order.BLOCK_LOG)
        self._free_at = time.monotonic()
        """When all that was let through has been paid for."""

    def before(self, what: str, offset: int, length: int) -> None:
        if what == "flush":
            return
        cost = max(self._per_request, self._per_byte * length if what in ("read", "write") else 0.0)
        with self._lock:
            now = time.monotonic()
            ends = self._free_at = max(self._free_at, now - 0.1) + cost
        if ends > now:
            time.sleep(ends - now)


class Delay(Filter):
    """Every request takes so many seconds longer."""

    def __init__(self, below: File, seconds: float) -> None:
        super().__init__(below)
        self._seconds = seconds

    def before(self, what: str, offset: int, length: int) -> None:
        time.sleep(self._seconds)


class Faulty(Filter):
    """Fails what ``fails(what, offset, length)`` says is to fail, with EIO."""

    def __init__(self, below: File, fails: Callable[[str, int, int], bool]) -> None:
        super().__init__(below)
        self._fails = fails

    def before(self, what: str, offset: int, length: int) -> None:
        if self._fails(what, offset, length):
            raise OSError(errno.EIO, f"this {what} is to fail")


class Fault:
    """Which requests fail: those of kind ``what``, or of all but reads where that is None, that touch the bytes from
    ``start`` up to ``end``; the first ``after`` of them do not, and no more than ``times``."""

    def __init__(
        self,
        what: str | None = None,
        start: int = 0,
        end: int | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> None:
        self._what = what
        self._start = start
        self._end = end
        self._after = after
        self._times = times
        self._seen = 0
        self._lock = Lock("disk faults", Order.BLOCK_LOG)

    def __call__(self, what: str, offset: int, length: int) -> bool:
        if what != self._what if self._what is not None else what == "read":
            return False
        if what != "flush" and (offset + length <= self._start or (self._end is not None and offset >= self._end)):
            return False
        with self._lock:
            self._seen += 1
            nth = self._seen - self._after
        return nth > 0 and (self._times is None or nth <= self._times)


class Trace(Filter):
    """A line for each request, ``SECONDS WHAT OFFSET LENGTH``, as it begins."""

    def __init__(self, below: File, path: str) -> None:
        super().__init__(below)
        try:
            self._file: TextIO = open(path, "w", encoding="ascii", buffering=1)  # noqa: SIM115 - closed with us
        except OSError as error:
            raise UserError(f"the trace cannot be made: {error.strerror}", path) from None
        self._begun = time.monotonic()

    def before(self, what: str, offset: int, length: int) -> None:
        self._file.write(f"{time.monotonic() - self._begun:.6f} {what} {offset} {length}\n")

    def close(self) -> None:
        super().close()
        self._file.close()


class CopyOnRead(Filter):
    """What is read from below an image is kept in the image."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self._image = image
        self._lock = Lock("copy on read", Order.COPY_ON_READ)
        """Between finding that the image has nothing there and writing it, nobody else writes."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        if any(not extent.present for extent in self._image.layer(offset, length)):
            with self._lock:
                self._keep(offset, length)
        super().preadv(buffers, offset)

    def _keep(self, offset: int, length: int) -> None:
        unit = self._image.cluster_size or os.sysconf("SC_PAGE_SIZE")
        first = offset // unit * unit
        last = min(self.size, -(-(offset + length) // unit) * unit)
        for extent in list(self._image.layer(first, last - first)):
            if not extent.present:
                data = memoryview(bytearray(extent.length))
                self._image.preadv([data], extent.offset)
                self._image.pwritev([data], extent.offset)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        with self._lock:
            super().pwritev(buffers, offset)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        with self._lock:
            super().write_zeroes(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        with self._lock:
            super().discard(offset, length)
