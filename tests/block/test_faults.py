"""The host fails in the midst of what a format does to its file: nothing that was written before is lost, what was
flushed is durable, and the image has leaks at most.

Each sector that is written holds the number of its write, so that one knows which of them it has kept.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from skep.block.backend import Buffers, read_at, split, write_at
from skep.block.file import open_file
from skep.block.format import BackingName, Can, Image
from skep.block.image import create_image, open_image
from skep.block.record import Recorder, Replay, read_log
from skep.block.registry import format_named
from tests.block.powercut import QEMU_CHECKS

SECTOR = 512
SIZE = 3 << 20
_SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

IMAGES: dict[str, tuple[str, dict[str, str], bool]] = {
    "raw": ("raw", {}, False),
    "qcow2": ("qcow2", {}, False),
    "qcow2, small clusters": ("qcow2", {"cluster_size": "512"}, False),
    "qcow2, subclusters, an overlay": ("qcow2", {"extended_l2": "on", "cluster_size": "16k"}, True),
    "qcow2, one bit": ("qcow2", {"cluster_size": "4096", "refcount_bits": "1"}, False),
    "vmdk": ("vmdk", {}, False),
    "vmdk, zeroed grains, an overlay": ("vmdk", {"zeroed_grain": "on"}, True),
    "vmdk, a stream": ("vmdk", {"subformat": "streamOptimized"}, False),
    "vhdx": ("vhdx", {"block_size": "1M"}, False),
    "vhdx, an overlay": ("vhdx", {"block_size": "1M"}, True),
    "vpc": ("vpc", {"force_size": "on"}, False),
    "vpc, an overlay": ("vpc", {"force_size": "on"}, True),
    "vdi": ("vdi", {}, False),
}


@dataclass(frozen=True)
class Fault:
    """Of the host's: from its request number ``first`` on, ``count`` of them fail."""

    first: int
    count: int
    code: int
    flushes: bool
    """Those that make durable fail too, and what they were to cover may be gone."""
    torn: bool
    """A write that fails has written its first half."""

    def hits(self, number: int) -> bool:
        return self.first <= number < self.first + self.count


class FailingFile(Recorder):
    """A host's file on a bad disk, or a full one."""

    fault: Fault | None = None

    def __init__(self, path: str, log: str) -> None:
        self.host = open_file(path, lock=False)
        super().__init__(self.host, log)
        self.requests = 0

    def met(self, first: int) -> bool:
        """A request since number ``first`` failed."""
        return self.fault is not None and any(self.fault.hits(number) for number in range(first, self.requests))

    def _next(self) -> Fault | None:
        """The fault that the next request meets."""
        self.requests += 1
        return self.fault if self.fault is not None and self.fault.hits(self.requests - 1) else None

    def _may(self) -> None:
        if fault := self._next():
            raise OSError(fault.code, os.strerror(fault.code))

    def preadv(self, buffers: Buffers, offset: int) -> None:
        if self.fault is not None and self.fault.code == errno.EIO:
            self._may()
        super().preadv(buffers, offset)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        if fault := self._next():
            if fault.torn:
                half = sum(map(len, buffers)) // 2 // SECTOR * SECTOR
                if half:
                    super().pwritev(split(buffers, half)[0], offset)
            raise OSError(fault.code, os.strerror(fault.code))
        super().pwritev(buffers, offset)

    def discard(self, offset: int, length: int) -> None:
        self._may()
        super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._may()
        super().write_zeroes(offset, length, unmap)

    def resize(self, size: int) -> None:
        self._may()
        super().resize(size)

    def allocate(self, offset: int, length: int) -> None:
        self._may()
        super().allocate(offset, length)

    def flush(self) -> None:
        fault = self._next()
        if fault is not None and fault.flushes and self.host._lost is None:
            self.host._lost = OSError(errno.EIO, "what was written is gone")
        super().flush()

    @property
    def lost(self) -> bool:
        return self.host._lost is not None


class Disk:
    """What may be on it. A write that failed leaves what was there, or what it was to write, sector by sector."""

    def __init__(self, sectors: int) -> None:
        self.now: list[set[int]] = [{0} for _ in range(sectors)]
        self.later: list[set[int]] = [{0} for _ in range(sectors)]
        """After a loss of power: all that was there since the last flush."""
        self.lost = False
        """A flush failed."""

    def write(self, first: int, count: int, number: int, done: bool) -> None:
        for at in range(first, first + count):
            self.now[at] = {number} if done else self.now[at] | {number}
            self.later[at] = self.later[at] | {number}

    def flushed(self) -> None:
        self.later = [set(values) for values in self.now]


def number_of(sector: bytes | bytearray) -> int:
    number = int.from_bytes(sector[:4], "little")
    assert sector == number.to_bytes(4, "little") * (SECTOR // 4), "half a sector"
    return number


def compare(data: bytes | bytearray, first: int, allowed: list[set[int]]) -> None:
    for i in range(len(data) // SECTOR):
        number = number_of(data[i * SECTOR : (i + 1) * SECTOR])
        assert number in allowed[first + i], f"sector {first + i} has {number}, not one of {allowed[first + i]}"


faults = st.builds(
    Fault,
    first=st.integers(0, 120),
    count=st.sampled_from((1, 1, 2, 5, 20, 1 << 30)),
    code=st.sampled_from((errno.EIO, errno.ENOSPC)),
    flushes=st.booleans(),
    torn=st.booleans(),
)


@pytest.mark.parametrize("name", IMAGES)
def test_the_host_fails_somewhere(name: str) -> None:
    fail_somewhere(name, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_the_host_fails_in_many_places(name: str) -> None:
    fail_somewhere(name, 400)


def test_a_new_table_of_qcow2_with_nothing_in_it(tmp_path: Path) -> None:
    """The table that is made for a write stays when the write fails, though nothing follows it in the file."""
    pristine = make(tmp_path, "qcow2", {"cluster_size": "512"}, False)
    path, log, nothing = tmp_path / "disk.qcow2", tmp_path / "log", [{0}] * (SIZE // SECTOR)
    shutil.copyfile(pristine, path)
    file = FailingFile(str(path), str(log))
    image: Image = format_named("qcow2")(file)  # type: ignore[call-arg]
    file.requests, file.fault = 0, Fault(0, 1, errno.ENOSPC, flushes=False, torn=False)
    with pytest.raises(OSError, match="No space left"):
        write_at(image, 1 << 20, b"x" * SECTOR)
    file.fault = None
    image.flush()
    look(path, "qcow2", nothing, by_qemu=True)
    image.close()
    for length in range(len(read_log(str(log))) + 1):
        for seed in range(6):
            lose_power(pristine, path, log, random.Random(seed), length)
            look(path, "qcow2", nothing, by_qemu=False)


def fail_somewhere(name: str, examples: int) -> None:
    format, options, over = IMAGES[name]
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as directory:
        pristine = make(Path(directory), format, options, over)

        # To find a smaller fault takes longer than to understand a large one.
        phases, checks = (Phase.explicit, Phase.generate), list(HealthCheck)

        @settings(max_examples=examples, deadline=None, database=None, phases=phases, suppress_health_check=checks)
        @given(fault=faults, seed=st.integers(0, 1 << 32), cut=st.booleans())
        def fail(fault: Fault, seed: int, cut: bool) -> None:
            session(pristine, format, over, fault, random.Random(seed), cut)

        fail()


def make(directory: Path, format: str, options: Mapping[str, str], over: bool) -> Path:
    path = directory / f"pristine.{format}"
    if over:
        create_image(directory / f"below.{format}", format, SIZE, options=options)
    below = BackingName(f"below.{format}", format) if over else None
    create_image(path, format, None if over else SIZE, options=options, backing=below)
    return path


def session(pristine: Path, format: str, over: bool, fault: Fault, rng: random.Random, cut: bool) -> None:
    """Traffic; then the image is closed, or the power goes; then it is looked at."""
    path, log = pristine.with_name(f"disk.{format}"), pristine.with_name("log")
    shutil.copyfile(pristine, path)
    file = FailingFile(str(path), str(log))
    image: Image = format_named(format)(file)  # type: ignore[call-arg]  # every format is made from a file
    if over:
        image.backing = open_image(pristine.with_name(f"below.{format}"), format=format, read_only=True, lock=False)
    disk = Disk(image.size // SECTOR)
    file.requests, file.fault = 0, fault
    for number in range(1, 40):
        step(image, file, disk, number, rng)
    file.fault = None
    allowed = disk.now if flush(image, disk) else disk.later
    if cut or file.lost:
        lose_power(pristine, path, log, rng)
    with suppress(OSError):  # whoever wants to know has flushed
        image.close()
    look(path, format, allowed, format in QEMU_CHECKS and not (format == "vhdx" and over))


def step(image: Image, file: FailingFile, disk: Disk, number: int, rng: random.Random) -> None:
    length = rng.choice((1, 1, 3, 8, 64, 128, 129, 512))
    first = rng.randrange(image.size // SECTOR - length + 1) & rng.choice((-1, ~127))
    offset, size = first * SECTOR, length * SECTOR
    match rng.randrange(10):
        case 0:
            attempt_write(disk, first, length, 0, lambda: image.write_zeroes(offset, size, rng.random() < 0.5))
        case 1:
            # Here it is what was there, or zeros.
            with suppress(OSError):
                image.discard(offset, size)
            for at in range(first, first + length):
                disk.now[at] |= {0}
                disk.later[at] |= {0}
        case 2 | 3:
            flush(image, disk)
        case 4 | 5:
            before = file.requests
            try:
                data = read_at(image, offset, size)
            except OSError:
                assert file.lost or file.met(before), "what was written cannot be read"
            else:
                compare(data, first, disk.now)
        case _:
            data = number.to_bytes(4, "little") * (size // 4)
            attempt_write(disk, first, length, number, lambda: write_at(image, offset, data))


def attempt_write(disk: Disk, first: int, length: int, number: int, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError:
        disk.write(first, length, number, False)
    else:
        disk.write(first, length, number, True)


def flush(image: Image, disk: Disk) -> bool:
    try:
        image.flush()
    except OSError:
        disk.lost = True
        return False
    assert not disk.lost, "a flush that failed stays failed"
    disk.flushed()
    return True


def lose_power(pristine: Path, path: Path, log: Path, rng: random.Random, length: int | None = None) -> None:
    """After so many entries of the log. What is left goes to another file of the same name; the old one is still
    open."""
    left = path.with_name("left")
    shutil.copyfile(pristine, left)
    with left.open("r+b", buffering=0) as file:
        replay = Replay(entries := read_log(str(log))[:length], file.fileno())
        replay.advance(len(entries))
        for offset, data in replay.survivors(rng):
            os.pwrite(file.fileno(), data, offset)
    left.rename(path)


def look(path: Path, format: str, allowed: list[set[int]], by_qemu: bool) -> None:
    with open_image(path, format=format, lock=False) as image:  # for writing: a log is replayed
        if Can.CHECK in image.can:
            found = image.check()
            assert not found.corruptions and not found.errors, found
        compare(read_at(image, 0, image.size), 0, allowed)
    if by_qemu:
        command = ("qemu-img", "check", "-f", format, path)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: leaks only
