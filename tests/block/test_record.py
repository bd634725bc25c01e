"""The log of writes and flushes, and the images that a loss of power could leave."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.block.image import open_disk
from skep.block.options import BlockOptions
from skep.block.record import Entry, Kind, Recorder, mark, read_log, replay
from skep.errors import UserError

SECTORS = 16
BLANK = bytes(SECTORS * 512)


def sector(fill: int) -> memoryview:
    return memoryview(bytes([fill]) * 512)


def after_power_loss(entries: Sequence[Entry], survivors: random.Random | None = None) -> bytes:
    image = os.memfd_create("image")
    try:
        os.write(image, BLANK)
        replay(entries, image, survivors)
        return os.pread(image, len(BLANK), 0)
    finally:
        os.close(image)


@pytest.fixture
def disk(tmp_path: Path) -> Recorder:
    (tmp_path / "disk.img").write_bytes(BLANK)
    opened = open_disk(BlockOptions(path=str(tmp_path / "disk.img"), record=str(tmp_path / "log")))
    assert isinstance(opened, Recorder)
    return opened


def test_reads_see_what_was_written(disk: Recorder, tmp_path: Path) -> None:
    disk.pwritev([sector(7), sector(8)], 1024)
    target = memoryview(bytearray(512))
    disk.preadv([target], 1536)
    assert target == sector(8)
    disk.close()
    assert (tmp_path / "disk.img").read_bytes()[1024:2048] == bytes(sector(7)) + bytes(sector(8))


def test_only_flushed_writes_survive(disk: Recorder, tmp_path: Path) -> None:
    disk.pwritev([sector(1)], 0)
    disk.flush()
    disk.pwritev([sector(2)], 0)
    disk.pwritev([sector(3)], 512)
    disk.close()
    entries = read_log(str(tmp_path / "log"))
    assert [entry.kind for entry in entries] == [Kind.WRITE, Kind.FLUSH, Kind.WRITE, Kind.WRITE]
    assert after_power_loss(entries)[:1024] == bytes(sector(1)) + bytes(512)
    assert after_power_loss(entries[:1]) == BLANK


def test_without_a_write_cache_every_write_survives(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(BLANK)
    options = BlockOptions(path=str(tmp_path / "disk.img"), record=str(tmp_path / "log"), synchronous=True)
    disk = open_disk(options)
    disk.pwritev([sector(1)], 512)
    disk.close()
    assert after_power_loss(read_log(str(tmp_path / "log")))[512:1024] == sector(1)


def test_marks_and_a_torn_end(disk: Recorder, tmp_path: Path) -> None:
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_APPEND)
    disk.pwritev([sector(1)], 0)
    mark(log, b"said 1")
    disk.pwritev([sector(2)], 0)
    os.close(log)
    disk.close()
    os.truncate(tmp_path / "log", os.stat(tmp_path / "log").st_size - 1)
    assert [(e.kind, e.data[:6]) for e in read_log(str(tmp_path / "log"))] == [
        (Kind.WRITE, b"\1" * 6),
        (Kind.MARK, b"said 1"),
    ]


def test_something_else_is_not_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 100)
    with pytest.raises(UserError):
        read_log(str(tmp_path / "log"))


def test_a_flush_covers_what_had_completed_when_it_began() -> None:
    """A write that completes while a flush is under way is logged before it, and not covered."""
    log = [
        Entry(Kind.WRITE, 0, bytes(sector(1))),
        Entry(Kind.WRITE, 512, bytes(sector(2))),
        Entry(Kind.FLUSH, 1, b""),
    ]
    assert after_power_loss(log)[:1024] == bytes(sector(1)) + bytes(512)


operations = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(0, SECTORS - 2), st.integers(1, 255), st.integers(1, 2))), max_size=30
)


@settings(max_examples=200, deadline=None)
@given(operations=operations, cut=st.integers(0, 30), seed=st.integers(0, 1 << 32))
def test_what_survives_is_flushed_or_was_written_since(
    operations: list[tuple[int, int, int] | None], cut: int, seed: int
) -> None:
    """Every sector holds what the last flush saw, or something written to it after that flush."""
    entries, writes = [], 0
    for operation in operations:
        if operation is None:
            entries.append(Entry(Kind.FLUSH, writes, b""))
        else:
            at, fill, n = operation
            entries.append(Entry(Kind.WRITE, at * 512, bytes([fill]) * 512 * n))
            writes += 1
    entries = entries[:cut]
    allowed = [{0} for _ in range(SECTORS)]
    current = [0] * SECTORS
    for entry in entries:
        if entry.kind is Kind.FLUSH:
            allowed = [{fill} for fill in current]
        else:
            for at in range(entry.offset // 512, (entry.offset + len(entry.data)) // 512):
                current[at] = entry.data[0]
                allowed[at].add(entry.data[0])
    strict = after_power_loss(entries)
    loose = after_power_loss(entries, random.Random(seed))
    flushed = max((i for i, entry in enumerate(entries) if entry.kind is Kind.FLUSH), default=-1)
    assert strict == after_power_loss(entries[: flushed + 1])
    for at in range(SECTORS):
        piece = loose[at * 512 : at * 512 + 512]
        assert piece in {bytes([fill]) * 512 for fill in allowed[at]}
