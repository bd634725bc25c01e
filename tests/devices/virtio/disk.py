"""A virtio-blk driver and its disk, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from skep.block.backend import BlockBackend, Buffers, Located
from skep.block.image import open_disk
from skep.block.options import BlockOptions
from skep.devices.virtio.blk import T_FLUSH, T_GET_ID, T_IN, T_OUT, VirtioBlk
from skep.devices.virtio.pci import VirtioPci
from tests.devices.virtio.driver import F_EVENT_IDX, F_INDIRECT, Board, Driver, DriverQueue

ALL = sum(1 << bit for bit in (2, 5, 6, 9, 10, 11, 12, 13, 14)) | F_EVENT_IDX | F_INDIRECT
SIZE = 1 << 20


class Nowhere:
    """A backend that takes everything and gives nothing, at once; for tests to inherit from."""

    size, read_only, write_cache = SIZE, False, True

    def preadv(self, buffers: Buffers, offset: int) -> None:
        pass

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        pass

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return True

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return True

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        return None

    def discard(self, offset: int, length: int) -> None:
        pass

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class Disk:
    """A board with one virtio-blk device, and the driver's side of it."""

    def __init__(self, options: BlockOptions, backend: BlockBackend | None = None, memory_size: int = 1 << 20) -> None:
        self.board = Board(memory_size)
        self.told: list[str] = []
        blk = VirtioBlk(
            "disk",
            self.board.memory,
            self.board.lock,
            backend or open_disk(options),
            options,
            options.queues or 1,
            self.told.append,
        )
        self.blk = blk
        self.function = VirtioPci(blk)
        self.board.add(self.function)
        self.driver: Driver
        self.queue: DriverQueue

    def start(self, features: int = ALL, *, msix: bool = True, size: int | None = None, indirect: bool = False) -> None:
        self.driver = Driver(self.board, features)
        self.queue = self.driver.start(msix=msix, size=size, indirect=indirect)

    def close(self) -> None:
        self.function.close()
        self.board.memory.close()

    def request(
        self, kind: int, sector: int = 0, out: Sequence[bytes] = (), room: Sequence[int] = ()
    ) -> tuple[int, bytes, int]:
        """One request, waited for: (status, data read, written length). Buffers are cut as ``out`` and ``room`` are."""
        driver, memory = self.driver, self.board.memory
        mark = driver.mark
        header = kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little")
        buffers = []
        for data in (header, *out):
            gpa = driver.allocate(len(data), 1)
            memory.write(gpa, data)
            buffers.append((gpa, len(data), False))
        places = [(driver.allocate(n, 1), n) for n in (*room, 1)]
        for gpa, n in places:
            memory.write(gpa, b"\xaa" * n)
        buffers += [(gpa, n, True) for gpa, n in places]
        self.queue.add(buffers)
        self.queue.kick()
        ((_, written),) = self.queue.wait()
        data = b"".join(memory.read(gpa, n) for gpa, n in places)
        driver.free_all(mark)
        return data[-1], data[:-1], written

    def read(self, sector: int, n: int) -> bytes:
        status, data, written = self.request(T_IN, sector, room=[n])
        assert (status, written) == (0, n + 1)
        return data

    def write(self, sector: int, data: bytes) -> None:
        assert self.request(T_OUT, sector, out=[data]) == (0, b"", 1)

    def flush(self) -> None:
        assert self.request(T_FLUSH) == (0, b"", 1)

    def identity(self) -> bytes:
        status, data, written = self.request(T_GET_ID, room=[20])
        assert (status, written) == (0, 21)
        return data.rstrip(b"\0")


@contextmanager
def disk(path: Path, content: bytes | None = None, **options: object) -> Iterator[Disk]:
    """A disk over a new image, closed and its image left in place afterwards."""
    if not path.exists():
        path.write_bytes(os.urandom(SIZE) if content is None else content)
    made = Disk(BlockOptions(path=str(path), **options))  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()
