"""What a driver was told is durable survives: a loss of power at random points, and the end of the process.

The driver here is the tests' own; ``tests/block/test_guest.py`` does the same with a Linux guest.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from skep.block.record import Entry, Kind, mark, read_log, replay
from skep.devices.virtio.blk import T_FLUSH, T_IN, T_OUT
from tests.devices.virtio.disk import ALL, disk

SECTORS = 64
CUTS = 100
F_CONFIG_WCE, F_FLUSH = 1 << 11, 1 << 9


def version(number: int) -> bytes:
    return number.to_bytes(4, "little") * 128


def versions_of(image: bytes) -> list[int]:
    """The number that each sector holds, which it holds from its start to its end."""
    found = []
    for at in range(0, len(image), 512):
        sector = image[at : at + 512]
        assert sector == sector[:4] * 128, "half a sector"
        found.append(int.from_bytes(sector[:4], "little"))
    return found


def record_a_session(tmp_path: Path, features: int, *, syncs: bool) -> list[Entry]:
    """A driver writes sectors with rising numbers and now and then makes them durable; then it marks, in the log, what
    it relies on from there."""
    rng = random.Random(11)
    log_path = tmp_path / "log"
    with disk(tmp_path / "disk.img", bytes(SECTORS * 512), record=str(log_path)) as made:
        made.start(features)
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
        current = [0] * SECTORS
        for number in range(1, 400):
            at, n = rng.randrange(SECTORS - 4), rng.randint(1, 4)
            made.write(at, version(number) * n)
            current[at : at + n] = [number] * n
            if rng.random() < 0.2:
                if syncs:
                    made.flush()
                mark(log, b"".join(number.to_bytes(4, "little") for number in current))
        os.close(log)
    return read_log(str(log_path))


class UnderWay(NamedTuple):
    """A request; a flush has no sector, and ``covers`` what each of them held when it was sent."""

    slot: int
    number: int
    sector: int
    covers: list[int] | None


def record_many_in_flight(tmp_path: Path, features: int) -> list[Entry]:
    """The same with up to 16 requests under way on two queues, and flushes among them: such a flush covers the writes
    that had completed when it was sent. Where there are none, a write that completed is durable."""
    rng = random.Random(12)
    log_path = tmp_path / "log"
    with disk(tmp_path / "disk.img", bytes(SECTORS * 512), record=str(log_path), queues=2) as made:
        made.start(features)
        driver, memory = made.driver, made.board.memory
        queues = driver.start_all(2)
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
        flushes = bool(features & F_FLUSH)
        completed, relied_on = [0] * SECTORS, [0] * SECTORS
        under_way: dict[tuple[int, int], UnderWay] = {}
        slots = [tuple(driver.allocate(n) for n in (16, 512, 1)) for _ in range(16)]
        number = most = 0
        while number < 600 or under_way:
            for index, queue in enumerate(queues):
                for head, _ in queue.take():
                    done = under_way.pop((index, head))
                    assert memory.load_u8(slots[done.slot][2]) == 0
                    if done.covers is None:
                        completed[done.sector] = done.number
                    covered = completed if not flushes else done.covers or relied_on
                    relied_on = list(map(max, relied_on, covered))
                    mark(log, b"".join(word.to_bytes(4, "little") for word in relied_on))
            free = sorted(set(range(16)) - {one.slot for one in under_way.values()})
            sector = rng.randrange(SECTORS)
            if number < 600 and free and all(one.sector != sector for one in under_way.values()):
                number += 1
                header, data, status = slots[free[0]]
                index = rng.randrange(2)
                if flushes and rng.random() < 0.1:
                    request = UnderWay(free[0], number, -1, list(completed))
                    memory.write(header, T_FLUSH.to_bytes(16, "little"))
                    buffers = [(header, 16, False), (status, 1, True)]
                else:
                    request = UnderWay(free[0], number, sector, None)
                    memory.write(header, T_OUT.to_bytes(8, "little") + sector.to_bytes(8, "little"))
                    memory.write(data, version(number))
                    buffers = [(header, 16, False), (data, 512, False), (status, 1, True)]
                under_way[index, queues[index].add(buffers)] = request
                most = max(most, len(under_way))
                queues[index].kick()
        os.close(log)
    assert most > 8
    return read_log(str(log_path))


def losses(entries: list[Entry], *, lucky: bool) -> int:
    """How many of 100 cuts lose something that the driver relied on. ``lucky``: some unflushed sectors survive."""
    rng = random.Random(5)
    lost = 0
    for _ in range(CUTS):
        cut = entries[: rng.randint(0, len(entries))]
        image = os.memfd_create("image")
        os.truncate(image, SECTORS * 512)
        replay(cut, image, rng if lucky else None)
        found = versions_of(os.pread(image, SECTORS * 512, 0))
        os.close(image)
        marks = [entry.data for entry in cut if entry.kind is Kind.MARK]
        relied_on = _words(marks[-1]) if marks else [0] * SECTORS
        lost += any(have < want for have, want in zip(found, relied_on, strict=True))
    return lost


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


@pytest.mark.parametrize("lucky", [False, True])
@pytest.mark.parametrize(
    ("features", "syncs"),
    [(ALL, True), (ALL & ~F_CONFIG_WCE & ~F_FLUSH, False)],
    ids=["a driver that flushes", "a driver that knows no flush"],
)
def test_everything_synced_survives_100_cuts(tmp_path: Path, features: int, syncs: bool, lucky: bool) -> None:
    assert losses(record_a_session(tmp_path, features, syncs=syncs), lucky=lucky) == 0


@pytest.mark.parametrize("lucky", [False, True])
@pytest.mark.parametrize("features", [ALL, ALL & ~F_CONFIG_WCE & ~F_FLUSH], ids=["flushes", "knows no flush"])
def test_everything_synced_survives_100_cuts_with_many_in_flight(tmp_path: Path, features: int, lucky: bool) -> None:
    entries = record_many_in_flight(tmp_path, features)
    assert losses(entries, lucky=lucky) == 0
    # And a disk whose flushes cover one write less would be noticed.
    lying = [Entry(e.kind, e.offset - 1, e.data) if e.kind is Kind.FLUSH else e for e in entries]
    assert lucky or losses(lying, lucky=False) > 0


def test_a_driver_that_only_hopes_would_be_noticed(tmp_path: Path) -> None:
    """The above can fail: with the write cache on and no flush, most cuts lose something."""
    assert losses(record_a_session(tmp_path, ALL, syncs=False), lucky=False) > CUTS // 2


SESSION = """
import sys
from pathlib import Path
from tests.devices.virtio.disk import disk
with disk(Path(sys.argv[1])) as made:
    made.start()
    number = int(sys.argv[2])
    while True:
        number += 1
        made.write(number % 64, number.to_bytes(4, "little") * 128)
        made.flush()
        print(number, flush=True)
"""


def test_everything_synced_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * 512))
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    rng = random.Random(3)
    number = 0
    for _ in range(3):
        command = [sys.executable, "-c", SESSION, str(path), str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _ in range(rng.randint(1, 200)):
                number = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            for line in process.stdout:  # what was said before the end counts
                number = int(line) if line.endswith("\n") else number
        held = versions_of(path.read_bytes())
        for at, have in enumerate(held):
            want = number - (number - at) % 64  # the last number up to this one that went there
            assert have >= want, f"sector {at} holds {have}"
        number = max(held)
    with disk(path) as made:  # and the dead one's lock is gone
        made.start()
        assert made.request(T_IN, room=[512])[0] == 0
        assert made.request(T_OUT, out=[bytes(512)])[0] == 0
