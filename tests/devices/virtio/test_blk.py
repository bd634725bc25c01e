"""virtio-blk against virtio 1.2, 5.2, through the PCI transport and real images."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.block.backend import Buffers
from skep.block.options import BlockOptions, BlockSizes
from skep.block.record import Kind, read_log
from skep.devices.virtio.blk import (
    F_DISCARD,
    F_MQ,
    F_WRITE_ZEROES,
    MAX_DISCARD,
    MAX_WRITE_ZEROES,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    UNMAP,
)
from tests.devices.virtio.disk import ALL, SIZE, Disk, Nowhere, disk
from tests.devices.virtio.driver import NEEDS_RESET, Driver

F_RO, F_FLUSH, F_CONFIG_WCE = 1 << 5, 1 << 9, 1 << 11
OK, IOERR, UNSUPP = 0, 1, 2
WRITEBACK = 32


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def started(image: Path) -> Iterator[Disk]:
    with disk(image) as made:
        made.start()
        yield made


def test_5_2_4_configuration(image: Path) -> None:
    with disk(image, block=BlockSizes(512, 4096)) as made:
        made.start()
        driver = made.driver
        assert driver.config(0, 4) | driver.config(4, 4) << 32 == SIZE // 512  # capacity
        assert driver.config(8, 4) == 0  # size_max, not offered
        assert driver.config(12, 4) == 254  # seg_max: a queue less header and status
        assert driver.config(20, 4) == 512  # blk_size
        assert (driver.config(24, 1), driver.config(25, 1), driver.config(26, 2)) == (3, 0, 8)  # topology
        assert driver.config(WRITEBACK, 1) == 1
        assert driver.config(34, 2) == 1  # num_queues
        assert driver.config(0xFFC, 4) == 0


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("msix", [False, True])
def test_5_2_6_in_and_out(image: Path, indirect: bool, msix: bool) -> None:
    with disk(image) as made:
        made.start(indirect=indirect, msix=msix)
        content = image.read_bytes()
        assert made.read(0, 512) == content[:512]
        assert made.read(SIZE // 512 - 8, 4096) == content[-4096:]
        made.write(5, b"n" * 1536)
        assert made.read(4, 2560) == content[2048:2560] + b"n" * 1536 + content[4096:4608]
        made.flush()
    assert image.read_bytes() == content[:2560] + b"n" * 1536 + content[4096:]


@settings(max_examples=100, deadline=None)
@given(
    cuts_out=st.lists(st.integers(1, 1039), max_size=4),
    cuts_in=st.lists(st.integers(1, 1024), max_size=4),
    data=st.binary(min_size=1024, max_size=1024),
)
def test_2_7_4_framing_means_nothing(framed: Disk, cuts_out: list[int], cuts_in: list[int], data: bytes) -> None:
    """Header, data and status may lie in buffers cut anyhow."""

    def send(kind: int, sector: int, payload: bytes, room: int, edges: list[int]) -> tuple[int, bytes, int]:
        driver, memory = framed.driver, framed.board.memory
        mark = driver.mark
        message = kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little") + payload
        source, target = driver.allocate(len(message)), driver.allocate(room + 1)
        memory.write(source, message)
        out_edges = sorted({0, len(message), *(e for e in edges if e < len(message))})
        in_edges = sorted({0, room + 1, *(e for e in edges if e < room + 1)})
        framed.queue.add(
            [(source + a, b - a, False) for a, b in itertools.pairwise(out_edges)]
            + [(target + a, b - a, True) for a, b in itertools.pairwise(in_edges)]
        )
        framed.queue.kick()
        ((_, written),) = framed.queue.wait()
        got = memory.read(target, room + 1)
        driver.free_all(mark)
        return got[-1], got[:-1], written

    assert send(T_OUT, 7, data, 0, cuts_out) == (OK, b"", 1)
    assert send(T_IN, 7, b"", 1024, cuts_in) == (OK, data, 1025)
    assert send(T_GET_ID, 0, b"", 20, cuts_in) == (OK, b"SN-1".ljust(20, b"\0"), 21)


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with disk(tmp_path_factory.mktemp("framed") / "disk.img", serial="SN-1") as made:
        made.start()
        yield made


def test_5_2_6_get_id(image: Path) -> None:
    with disk(image, serial="x" * 20) as made:
        made.start()
        assert made.identity() == b"x" * 20
        assert made.request(T_GET_ID, room=[4]) == (OK, b"xxxx", 5)
        status, data, written = made.request(T_GET_ID, room=[32])
        assert (status, data[:20], written) == (OK, b"x" * 20, 20)  # what is behind the identity was not written
    with disk(image) as made:
        made.start()
        first = made.identity()
        assert first.startswith(b"SKEP-") and len(first) <= 20


@pytest.mark.parametrize(
    ("kind", "sector", "out", "room"),
    [
        (T_IN, SIZE // 512, [], [512]),
        (T_IN, SIZE // 512 - 1, [], [1024]),
        (T_IN, (1 << 64) - 1, [], [512]),
        (T_IN, 1 << 55, [], [512]),
        (T_IN, 0, [], [511]),
        (T_IN, 0, [], [512, 1]),
        (T_OUT, SIZE // 512, [b"x" * 512], []),
        (T_OUT, (1 << 64) - 1, [b"x" * 512], []),
        (T_OUT, 0, [b"x" * 100], []),
    ],
)
def test_5_2_6_requests_beyond_the_disk_or_of_part_of_a_sector(
    started: Disk, image: Path, kind: int, sector: int, out: list[bytes], room: list[int]
) -> None:
    before = image.read_bytes()
    status, data, written = started.request(kind, sector, out, room)
    assert status == IOERR
    assert data == b"\xaa" * sum(room), "nothing may be written to the buffer"
    assert written == (0 if room else 1)
    assert image.read_bytes() == before
    assert started.read(0, 512) == before[:512], "the device goes on"


@pytest.mark.parametrize("kind", [2, 3, 7, 14, 0xFFFF_FFFF])
def test_5_2_6_other_requests_are_unsupported(started: Disk, kind: int) -> None:
    assert started.request(kind, room=[8]) == (UNSUPP, b"\xaa" * 8, 0)


def test_5_2_6_2_read_only(image: Path) -> None:
    before = image.read_bytes()
    with disk(image, read_only=True) as made:
        made.start()
        assert made.driver.features & F_RO
        assert made.read(1, 512) == before[512:1024]
        assert made.request(T_OUT, 0, out=[b"x" * 512])[0] == IOERR
        assert made.request(T_FLUSH)[0] == OK
    assert image.read_bytes() == before
    with disk(image) as made:
        made.start()
        assert not made.driver.features & F_RO


class Failing(Nowhere):
    """A backend whose host refuses everything."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    pwritev = preadv

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        self.preadv(buffers, offset)
        return True

    write_now = read_now

    def discard(self, offset: int, length: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        raise OSError(errno.ENOSPC, "no space")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "no space")


class FailingLater(Failing):
    """The same, of a host that has to wait before it knows."""

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    write_now = read_now


@pytest.mark.parametrize("backend", [Failing, FailingLater])
def test_5_2_6_what_the_host_refuses_is_an_io_error(backend: type[Failing]) -> None:
    made = Disk(BlockOptions(path="none"), backend())
    made.start()
    for _ in range(2):
        assert made.request(T_IN, room=[512]) == (IOERR, b"\xaa" * 512, 0)
        assert made.request(T_OUT, out=[b"x" * 512])[0] == IOERR
        assert made.request(T_FLUSH)[0] == IOERR
        assert made.request(T_DISCARD, out=[ranges((0, 8, 0))])[0] == IOERR
        assert made.request(T_WRITE_ZEROES, out=[ranges((0, 8, 0))])[0] == IOERR
    because = "disk: the guest gets I/O errors, because of its image:"
    assert made.told == [f"{because} I/O error", f"{because} no space"]
    assert made.driver.status == 15
    made.close()


def ranges(*those: tuple[int, int, int]) -> bytes:
    """The data of a discard: (sector, sectors, flags) each."""
    return b"".join(struct.pack("<QII", *one) for one in those)


class TestDiscardAndWriteZeroes:
    def test_5_2_4_limits(self, image: Path) -> None:
        with disk(image, block=BlockSizes(512, 4096)) as made:
            made.start()
            config = made.driver.config
            assert (config(36, 4), config(40, 4), config(44, 4)) == (MAX_DISCARD, 32, 8)
            assert (config(48, 4), config(52, 4), config(56, 1)) == (MAX_WRITE_ZEROES, 1, 1)
        with disk(image, no_delete=True) as made:
            made.start()
            config = made.driver.config
            assert not made.driver.features & F_DISCARD and made.driver.features & F_WRITE_ZEROES
            assert (config(36, 4), config(40, 4), config(48, 4), config(56, 1)) == (0, 0, MAX_WRITE_ZEROES, 0)
            assert made.request(T_DISCARD, out=[ranges((0, 8, 0))])[0] == UNSUPP
        with disk(image, read_only=True) as made:
            made.start()
            assert not made.driver.features & (F_DISCARD | F_WRITE_ZEROES)

    @pytest.mark.parametrize(("kind", "flags"), [(T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, UNMAP)])
    def test_5_2_6_2_what_is_cleared_reads_as_zeros(self, image: Path, kind: int, flags: int) -> None:
        expected = bytearray(image.read_bytes())
        before = image.stat().st_blocks
        with disk(image) as made:
            made.start()
            those = [(16, 256, flags), (1000, 1, flags)]
            for out in [ranges(*those)] if kind == T_DISCARD else [ranges(one) for one in those]:
                assert made.request(kind, out=[out]) == (OK, b"", 1)
            expected[16 * 512 : 272 * 512] = bytes(256 * 512)
            expected[512000:512512] = bytes(512)
            assert made.read(0, SIZE // 2) == expected[: SIZE // 2]
        assert image.read_bytes() == expected
        if kind == T_DISCARD or flags:
            assert image.stat().st_blocks <= before - 240, "the host has its space back"
        else:
            assert image.stat().st_blocks >= before - 8, "and it has not"

    def test_nodelete_gives_no_space_back(self, image: Path) -> None:
        before = image.stat().st_blocks
        with disk(image, no_delete=True) as made:
            made.start()
            assert made.request(T_WRITE_ZEROES, out=[ranges((16, 256, UNMAP))])[0] == OK
            assert made.read(16, 256 * 512) == bytes(256 * 512)
        assert image.stat().st_blocks >= before - 8

    @pytest.mark.parametrize(
        ("kind", "those", "status"),
        [
            (T_DISCARD, [(0, 8, UNMAP)], UNSUPP),
            (T_DISCARD, [(0, 8, 2)], UNSUPP),
            (T_WRITE_ZEROES, [(0, 8, 2)], UNSUPP),
            (T_DISCARD, [(0, 8, 0), (8, 8, 1 << 31)], UNSUPP),
            (T_DISCARD, [(SIZE // 512, 1, 0)], IOERR),
            (T_DISCARD, [((1 << 64) - 1, 1, 0)], IOERR),
            (T_DISCARD, [(0, 0xFFFF_FFFF, 0)], IOERR),
            (T_WRITE_ZEROES, [(0, MAX_WRITE_ZEROES + 1, 0)], IOERR),
            (T_DISCARD, [(0, 1, 0), (SIZE // 512 - 1, 2, 0)], IOERR),
            (T_WRITE_ZEROES, [(0, 1, 0)] * 2, IOERR),
            (T_DISCARD, [], IOERR),
            (T_DISCARD, [(0, 1, 0)] * 33, IOERR),
            (T_DISCARD, [(0, 0, 0)], OK),
        ],
    )
    def test_5_2_6_2_what_is_refused_changes_nothing(
        self, started: Disk, image: Path, kind: int, those: list[tuple[int, int, int]], status: int
    ) -> None:
        before = image.read_bytes()
        out = [ranges(*those)] if those else []
        assert started.request(kind, out=out)[0] == status
        assert image.read_bytes() == before

    def test_5_2_6_1_half_a_range(self, started: Disk) -> None:
        assert started.request(T_DISCARD, out=[ranges((0, 8, 0))[:15]])[0] == IOERR
        assert started.request(T_DISCARD, out=[ranges((0, 8, 0))[:7], ranges((0, 8, 0))[7:]])[0] == OK

    def test_not_negotiated_not_supported(self, image: Path) -> None:
        with disk(image) as made:
            made.start(ALL & ~F_DISCARD & ~F_WRITE_ZEROES)
            for kind in (T_DISCARD, T_WRITE_ZEROES):
                assert made.request(kind, out=[ranges((0, 8, 0))])[0] == UNSUPP

    @pytest.mark.parametrize("features", [ALL, ALL & ~F_CONFIG_WCE & ~F_FLUSH])
    def test_it_is_a_write_to_a_flush_and_to_the_log(self, image: Path, features: int) -> None:
        log = image.with_name("log")
        with disk(image, record=str(log)) as made:
            made.start(features)
            made.request(T_WRITE_ZEROES, out=[ranges((0, 2048, 0))])
            entries = read_log(str(log))
            assert [(e.kind, e.offset, e.data) for e in entries[:1]] == [(Kind.WRITE, 0, bytes(SIZE))]
            if features & F_FLUSH:
                made.flush()
            assert [(e.kind, e.offset) for e in read_log(str(log))[1:]] == [(Kind.FLUSH, 1)]


def test_a_block_is_the_least_that_is_transferred(image: Path) -> None:
    with disk(image, block=BlockSizes(4096, 4096)) as made:
        made.start()
        assert made.driver.config(20, 4) == 4096
        assert len(made.read(8, 4096)) == 4096
        for kind, sector, out, room in (
            (T_IN, 8, [], [512]),
            (T_IN, 9, [], [4096]),
            (T_OUT, 8, [bytes(512)], []),
            (T_OUT, 1, [bytes(4096)], []),
            (T_DISCARD, 0, [ranges((1, 8, 0))], []),
            (T_WRITE_ZEROES, 0, [ranges((8, 4, 0))], []),
        ):
            assert made.request(kind, sector, out, room)[0] == IOERR


class TestManyQueues:
    def test_5_2_2_requests_come_by_any_of_them(self, image: Path) -> None:
        content = image.read_bytes()
        with disk(image, queues=4) as made:
            made.start()
            assert made.driver.features & F_MQ and made.driver.config(34, 2) == 4
            assert made.driver.read(0x12, 2) == 4
            for sector, queue in enumerate(made.driver.start_all(4)):
                made.queue = queue
                assert made.read(sector, 512) == content[512 * sector : 512 * sector + 512]

    def test_they_share_the_device_fairly(self) -> None:
        """One that is never empty does not keep the others waiting."""

        class Slower(Nowhere):
            def __init__(self) -> None:
                self.lengths: list[int] = []

            def read_now(self, buffers: Buffers, offset: int) -> bool:
                time.sleep(0.001)
                self.lengths.append(sum(map(len, buffers)))
                return True

        backend = Slower()
        made = Disk(BlockOptions(path="none", queues=2), backend)
        made.start()
        busy, quiet = made.driver.start_all(2)
        driver = made.driver
        header, data, status = driver.allocate(16), driver.allocate(1024), driver.allocate(1)
        made.board.memory.write(header, bytes(16))
        for _ in range(80):
            busy.add([(header, 16, False), (data, 1024, True), (status, 1, True)])
        quiet.add([(header, 16, False), (data, 512, True), (status, 1, True)])
        busy.kick()
        quiet.kick()
        busy.wait(80)
        assert backend.lengths.index(512) < 40
        made.close()

    def test_one_queue_is_not_many(self, started: Disk) -> None:
        assert not started.driver.features & F_MQ and started.driver.config(34, 2) == 1


class TestWriteCache:
    """5.2.5.2, 5.2.6.2: which writes are durable when they complete. The log of a recording layer tells."""

    def flushed(self, image: Path, features: int, writeback: int | None = None, **options: object) -> bool:
        log = image.with_name("log")
        with disk(image, None, record=str(log), **options) as made:
            made.start(features)
            if writeback is not None:
                made.driver.set_config(WRITEBACK, 1, writeback)
            made.write(0, b"x" * 512)
            entries = [entry.kind for entry in read_log(str(log))]
        assert entries[0] is Kind.WRITE
        return Kind.FLUSH in entries

    def test_the_driver_flushes(self, image: Path) -> None:
        assert not self.flushed(image, ALL)
        assert not self.flushed(image, ALL & ~F_CONFIG_WCE)

    def test_a_driver_that_cannot_flush_gets_durable_writes(self, image: Path) -> None:
        assert self.flushed(image, ALL & ~F_CONFIG_WCE & ~F_FLUSH)
        assert self.flushed(image, ALL & ~F_FLUSH)

    def test_the_driver_switches_the_cache(self, image: Path) -> None:
        assert self.flushed(image, ALL, writeback=0)
        assert not self.flushed(image, ALL, writeback=1)
        assert not self.flushed(image, ALL & ~F_CONFIG_WCE, writeback=0), "not negotiated, not writable"

    def test_the_user_switches_it_off(self, image: Path) -> None:
        assert self.flushed(image, ALL, write_cache=False)
        assert self.flushed(image, ALL & ~F_CONFIG_WCE, write_cache=False)
        assert not self.flushed(image, ALL, write_cache=False, writeback=1)

    def test_a_synchronous_image_needs_no_switch(self, image: Path) -> None:
        assert self.flushed(image, ALL, synchronous=True, writeback=1)

    def test_a_flush_is_a_flush(self, image: Path) -> None:
        log = image.with_name("log")
        with disk(image, record=str(log)) as made:
            made.start()
            made.write(0, b"x" * 512)
            made.flush()
            assert [entry.kind for entry in read_log(str(log))] == [Kind.WRITE, Kind.FLUSH]

    @pytest.mark.parametrize(
        ("features", "write_cache", "shown"),
        [(ALL, True, 1), (ALL, False, 0), (ALL & ~F_FLUSH, True, 0)],
    )
    def test_how_it_starts(self, image: Path, features: int, write_cache: bool, shown: int) -> None:
        with disk(image, write_cache=write_cache) as made:
            driver = Driver(made.board, features)
            driver.negotiate()
            assert driver.config(WRITEBACK, 1) == shown

    def test_a_reset_undoes_the_switch(self, started: Disk) -> None:
        """QEMU once leaked one driver's setting into the next."""
        started.driver.set_config(WRITEBACK, 1, 0)
        assert started.driver.config(WRITEBACK, 1) == 0
        started.driver.reset()
        assert started.driver.config(WRITEBACK, 1) == 1


@pytest.mark.parametrize(
    "buffers",
    [
        [(0x4000, 16, False)],
        [(0x4000, 15, False), (0x5000, 1, True)],
        [(0x5000, 1, True)],
        [(0x4000, 16, False), (0xFFFF_F000, 512, True), (0x5000, 1, True)],
    ],
)
def test_2_1_2_a_request_without_header_or_status_needs_a_reset(
    started: Disk, buffers: list[tuple[int, int, bool]]
) -> None:
    driver = started.driver
    started.queue.add(buffers)
    started.queue.kick()
    assert started.board.messages.wait(driver.CONFIG_DATA)
    assert driver.status & NEEDS_RESET
    assert started.blk.complaints
    started.start()
    assert not started.driver.status & NEEDS_RESET
    assert len(started.read(0, 512)) == 512
