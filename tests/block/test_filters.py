"""Layers over a disk: each does what it says, and hands on the rest."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.filters import CopyOnRead, Delay, Faulty
from skep.block.format import BackingName
from skep.block.image import create_image, open_disk, open_image
from skep.block.options import BlockOptions
from skep.errors import UserError

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    return path


def options(path: Path, **more: object) -> BlockOptions:
    return BlockOptions(path=str(path), **more)  # type: ignore[arg-type]


BYTES, REQUESTS = {"bytes_per_second": 8 * MIB}, {"requests_per_second": 32}


@pytest.mark.parametrize(("limit", "size"), [(BYTES, 256 << 10), (REQUESTS, 512)])
def test_a_rate_is_kept_by_all_threads_together(raw: Path, limit: dict[str, int], size: int) -> None:
    disk = open_disk(options(raw, **limit))

    def work() -> None:
        for i in range(4):
            read_at(disk, i * size, size)
            write_at(disk, i * size, bytes(size))

    threads = [threading.Thread(target=work) for _ in range(2)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # 16 requests are half a second's worth, of which a tenth comes at once.
    assert time.monotonic() - begun >= 0.35
    assert not disk.read_now([memoryview(bytearray(512))], 0), "who may not wait is told to"
    disk.close()


def test_a_trace_has_every_request(raw: Path, tmp_path: Path) -> None:
    disk = open_disk(options(raw, trace=str(tmp_path / "trace")))
    read_at(disk, 512, 1024)
    write_at(disk, 4096, bytes(512))
    disk.write_zeroes(0, 512, True)
    disk.discard(8192, 4096)
    disk.flush()
    disk.close()
    lines = [line.split() for line in (tmp_path / "trace").read_text().splitlines()]
    found = [(what, int(offset), int(length)) for _, what, offset, length in lines]
    data = [("read", 512, 1024), ("write", 4096, 512), ("zero", 0, 512), ("discard", 8192, 4096)]
    assert found == [*data, ("flush", 0, 0)]
    times = [float(line[0]) for line in lines]
    assert times == sorted(times)


def test_faults_and_delays(raw: Path) -> None:
    with open_image(raw, format="raw") as image:
        faulty = Faulty(image, lambda what, offset, length: (what == "write" and offset < 4096) or what == "flush")
        read_at(faulty, 0, 512)
        write_at(faulty, 4096, b"x" * 512)
        for broken in (lambda: write_at(faulty, 512, bytes(512)), faulty.flush):
            with pytest.raises(OSError):
                broken()
        assert read_at(image, 4096, 512) == b"x" * 512
        begun = time.monotonic()
        read_at(Delay(faulty, 0.05), 0, 512)
        assert time.monotonic() - begun >= 0.05


def test_what_is_read_from_below_stays(raw: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    create_image(overlay, "qcow2", 5 * MIB, backing=BackingName("raw", "raw"))
    model = bytearray(raw.read_bytes() + bytes(MIB))
    disk = open_disk(options(overlay, format="qcow2", backing=str(tmp_path), copy_on_read=True))
    assert isinstance(disk, CopyOnRead)
    failed: list[BaseException] = []

    def work(which: int) -> None:
        rng = random.Random(which)
        try:
            for _ in range(40):
                at = (rng.randrange(5 * MIB // 2048) * 4 + which) * 512  # sectors of its own
                if rng.random() < 0.5:
                    assert read_at(disk, at, 512) == model[at : at + 512]
                else:
                    model[at : at + 512] = rng.randbytes(512)
                    write_at(disk, at, model[at : at + 512])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert read_at(disk, 0, 5 * MIB) == model
    disk.flush()
    disk.close()
    with open_image(overlay, read_only=True) as image:
        assert all(extent.depth == 0 for extent in image.extents())
        assert image.check().clean
    raw.unlink()
    with open_image(overlay, backing=False, read_only=True) as image:
        assert read_at(image, 0, 5 * MIB) == model, "nothing below is needed any more"


def test_mistakes(raw: Path, tmp_path: Path) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for wrong, says in (({"copy_on_read": True}, "over another"), ({"trace": str(tmp_path / "a/b")}, "trace")):
        with pytest.raises(UserError, match=says):
            open_disk(options(raw, record=str(tmp_path / "log"), **wrong))
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
