"""The queue before an image, and the io_uring below it, on real files."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from skep.block import load
from skep.block.backend import Buffers
from skep.block.image import create_image, open_image
from skep.block.queue import Queue, Transfers, Vector, locate
from skep.block.uring import READ, Ring, make_ring

SIZE = 8 << 20

has_ring = pytest.mark.skipif(make_ring(2) is None, reason="this host has no io_uring")


@has_ring
class TestRing:
    def test_each_completion_has_its_number(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(range(256)))
        rooms = [Vector([memoryview(bytearray(1))]) for _ in range(8)]
        fd = os.open(path, os.O_RDONLY)
        ring = Ring(8)
        for turn in range(20):  # the rings wrap
            for number, room in enumerate(rooms):
                ring.prepare(READ, fd, turn * 8 + number, room.address, 1, number + 1000)
            ended: list[tuple[int, int]] = []
            ring.enter(8)
            ended += ring.take()
            assert sorted(ended) == [(number + 1000, 1) for number in range(8)]
            assert [room.buffers[0][0] for room in rooms] == list(range(turn * 8, turn * 8 + 8))
        assert ring.take() == []
        ring.close()
        ring.close()
        os.close(fd)

    def test_what_the_kernel_refuses_is_a_number(self, tmp_path: Path) -> None:
        room = Vector([memoryview(bytearray(512))])
        ring = Ring(2)
        ring.prepare(READ, 1 << 20, 0, room.address, room.count, 1)
        ring.enter(1)
        assert ring.take() == [(1, -errno.EBADF)]
        ring.close()

    def test_closing_leaves_no_descriptor(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        Ring(4).close()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_too_large_is_refused(self) -> None:
        with pytest.raises(OSError, match="io_uring_setup"):
            Ring(1 << 24)
        assert make_ring(1 << 24) is None


class TestVector:
    def test_one_buffer_and_several(self) -> None:
        one, other = memoryview(bytearray(512)), memoryview(bytearray(1024))
        single = Vector([one])
        assert (single.single, single.length, single.count) == (True, 512, 512)
        several = Vector([one, memoryview(bytearray()), other])
        assert (several.single, several.length, several.count) == (False, 1536, 2)
        assert several.bits & 511 == single.bits & 511 | Vector([other]).bits & 511

    def test_memory_that_is_only_read_has_no_address(self) -> None:
        with pytest.raises(TypeError):
            Vector([memoryview(bytes(512))])


class Ends:
    """Waits for transfers."""

    def __init__(self) -> None:
        self._left = threading.Semaphore(0)
        self.errors: list[Exception | None] = []
        self.threads: set[str] = set()

    def done(self, error: Exception | None) -> None:
        self.errors.append(error)
        self.threads.add(threading.current_thread().name)
        self._left.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self._left.acquire(timeout=60)


@pytest.mark.parametrize("no_cache", [False, True])
@pytest.mark.parametrize("kind", ["raw", "qcow2", "vdi"])
def test_many_transfers_at_once_move_what_they_are_to(tmp_path: Path, kind: str, no_cache: bool) -> None:
    """Half of the disk has its place, so part goes through the ring, and part through the pool."""
    path = tmp_path / f"disk.{kind}"
    chance = random.Random(4)
    create_image(path, kind, SIZE)
    content = bytearray(SIZE)
    with open_image(path, format=kind) as image:
        content[: SIZE // 2] = chance.randbytes(SIZE // 2)
        image.pwritev([memoryview(content)[: SIZE // 2]], 0)
    memory = mmap.mmap(-1, SIZE)
    whole = memoryview(memory)
    with open_image(path, format=kind, no_cache=no_cache) as image:
        queue = Queue("disk", 4)
        ends = Ends()
        for write in (True, False):
            places = [at << 12 for at in chance.sample(range(SIZE >> 12), 300)]
            for at in places:
                cut = chance.choice((512, 2048, 4096))
                buffers: Buffers = [whole[at : at + cut], whole[at + cut : at + 4096]]
                if write:
                    whole[at : at + 4096] = content[at : at + 4096] = chance.randbytes(4096)
                queue.transfer(image, write, buffers, at, ends.done)
            ends.wait(len(places))
            assert ends.errors == [None] * len(places)
            for at in places:
                assert whole[at : at + 4096] == content[at : at + 4096]
            whole[:] = bytes(SIZE)
            ends.errors.clear()
        if make_ring(2) is not None and kind != "vdi":
            assert "disk ring" in ends.threads
        queue.close()
        queue.close()
        image.flush()
        back = bytearray(SIZE)
        image.preadv([memoryview(back)], 0)
        assert back == content
    assert not [one for one in threading.enumerate() if one.name.startswith("disk")]


@has_ring
def test_a_file_that_lost_its_end_is_an_io_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    create_image(path, "raw", SIZE)
    with open_image(path, format="raw") as image:
        os.truncate(path, SIZE - 1024)
        queue, ends = Queue("disk", 1), Ends()
        queue.transfer(image, False, [memoryview(bytearray(4096))], SIZE - 4096, ends.done)
        ends.wait(1)
        assert isinstance(ends.errors[0], OSError)
        assert ends.errors[0].errno == errno.EIO
        queue.close()


@has_ring
def test_what_the_image_did_not_place_stays_its_own(tmp_path: Path) -> None:
    """No place for what is not written yet, nor for what a direct transfer cannot take; and none stays claimed."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", SIZE)
    room = Vector([memoryview(bytearray(512))])
    with open_image(path, format="qcow2") as image:
        assert locate(image, True, room, 0, print) is None
        image.pwritev([memoryview(bytes(65536))], 0)
        found = locate(image, False, room, 1024, print)
        assert found is not None and found.place.file is image.file
        transfers = Transfers(Ring(4))
        transfers.start(found)
        transfers.wait()
        assert len(transfers) == 0
        transfers.close()
    with open_image(path, format="qcow2", no_cache=True) as image:
        odd = Vector([memoryview(bytearray(1024))[3:515]])
        assert locate(image, False, odd, 0, print) is None
        image.discard(0, 65536)
        image.flush()
        assert locate(image, False, room, 0, print) is None


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("no_cache", [False, True])
def test_load_sends_what_it_says(tmp_path: Path, no_cache: bool, threads: bool, write: bool) -> None:
    one = load.Load(500, 16, 4096, 0, 3 << 12, write, 0x5A, 100, threads)
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", SIZE)
    with open_image(path, format="qcow2", no_cache=no_cache) as image:
        load.run(image, one)
        written = [extent.length for extent in image.extents() if extent.data]
        room = bytearray(4096)
        image.preadv([memoryview(room)], 3 << 12)
        assert room == (b"\x5a" if one.write else b"\0") * 4096
    assert bool(written) == one.write


WITHOUT_RING = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 425, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(program)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxQ", 4, ctypes.addressof(code)), 0, 0) == 0
import threading
from skep.block.image import open_image
from skep.block.queue import Queue
from skep.block.uring import make_ring
assert make_ring(4) is None
with open_image(sys.argv[1], format="raw") as image:
    queue = Queue("disk", 2)
    ends = threading.Semaphore(0)
    rooms = [bytearray(512) for _ in range(64)]
    for i, room in enumerate(rooms):
        queue.transfer(image, False, [memoryview(room)], i * 512, lambda error: error or ends.release())
    for _ in rooms:
        assert ends.acquire(timeout=60)
    queue.close()
print(b"".join(rooms).hex())
"""


def test_where_a_filter_refuses_io_uring_threads_do_it(tmp_path: Path) -> None:
    content = random.Random(5).randbytes(64 * 512)
    (tmp_path / "disk.raw").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RING, str(tmp_path / "disk.raw")],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert bytes.fromhex(done.stdout) == content
