"""What every disk image format must do, as tests: mix :class:`ImageConformance` into a test class of each.

    class TestQcow2(ImageConformance):
        format = "qcow2"
        variants = ({}, {"cluster_size": "512"})

The random traffic comes from a seed, so a failure happens again.
"""

from __future__ import annotations

import bisect
import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

import pytest

from skep.block.backend import Buffers, Extent, File, read_at, write_at
from skep.block.file import open_file
from skep.block.format import Can, Image
from skep.block.image import create_image, open_image
from skep.block.over import Over
from skep.block.record import Kind, Recorder, Replay, mark, read_log
from skep.block.registry import format_named
from skep.errors import UserError

SECTOR = 512


class ImageConformance:
    """The promises of :class:`skep.block.format.Image`, and that QEMU's tools see the same in it."""

    format: ClassVar[str]
    variants: ClassVar[tuple[Mapping[str, str], ...]] = ({},)
    """Options of creation to try, each by itself."""
    size: ClassVar[int] = 3 << 20
    """Of the disks, bytes."""
    qemu: ClassVar[str | None] = None
    """QEMU's name for it, where it is another; '' if QEMU has none."""
    qemu_checks: ClassVar[bool] = False
    """`qemu-img check` knows it."""
    steps: ClassVar[int] = 30
    """Of random traffic."""
    cuts: ClassVar[int] = 5
    """Of the power, a variant; the slow test makes as many in each of 40 runs of its own."""

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.path = tmp_path / f"disk.{self.format}"

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        create_image(path or self.path, self.format, self.size, options=options)
        return path or self.path

    def open(self, path: Path | None = None, **how: bool) -> Image:
        return open_image(path or self.path, format=self.format, **how)  # type: ignore[arg-type]

    def each(self) -> Iterator[Mapping[str, str]]:
        for options in self.variants:
            yield options
            self.path.unlink()

    # The tests.

    def test_a_new_image_is_zeros(self) -> None:
        for options in self.each():
            self.make(options)
            with self.open() as image:
                assert image.size == self.size
                assert not any(read_at(image, 0, self.size))
                self.extents_are_true(image)
            self.judge(bytes(self.size))

    def test_it_is_found_out(self) -> None:
        for options in self.each():
            self.make(options)
            with open_image(self.path, read_only=True) as image:
                assert image.format == self.format

    def test_random_traffic(self) -> None:
        for options in self.each():
            self.make(options)
            rng = random.Random(f"{self.format} {options}")
            model = bytearray(self.size)
            for _ in range(2):
                with self.open() as image:
                    self.traffic(image, model, rng, self.steps)
                    self.extents_are_true(image)
                    image.flush()
                with self.open(read_only=True) as image:
                    self.same(image, model)
                self.judge(model)

    def test_many_threads(self) -> None:
        """Each has stripes of its own, so that they meet in clusters and tables."""
        stripe, count = 3 * SECTOR, 4
        for options in self.each():
            self.make(options)
            model = bytearray(self.size)
            failed: list[BaseException] = []

            def work(which: int, image: Image, model: bytearray = model, failed: list[BaseException] = failed) -> None:
                rng = random.Random(which)
                try:
                    for _ in range(40):
                        at = (rng.randrange(self.size // stripe // count) * count + which) * stripe
                        data = rng.randbytes(min(stripe, self.size - at))
                        match rng.randrange(8):
                            case 0:
                                image.flush()
                            case 1:
                                image.write_zeroes(at, len(data), rng.random() < 0.5)
                                model[at : at + len(data)] = bytes(len(data))
                            case 2 | 3:
                                assert read_at(image, at, len(data)) == model[at : at + len(data)]
                            case _:
                                write_at(image, at, data)
                                model[at : at + len(data)] = data
                except BaseException as error:
                    failed.append(error)

            with self.open() as image:
                threads = [threading.Thread(target=work, args=(which, image)) for which in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not failed, failed
                self.same(image, model)
                image.flush()
            self.judge(model)

    def test_read_only(self) -> None:
        for options in self.each():
            before = self.make(options).read_bytes()
            with self.open(read_only=True) as image, self.open(read_only=True) as other:
                assert image.read_only and other.read_only
                for write in (
                    lambda image=image: write_at(image, 0, bytes(SECTOR)),
                    lambda image=image: write_at(image, 0, b"x" * SECTOR),
                ):
                    with pytest.raises(OSError):
                        write()
            assert self.path.read_bytes() == before

    def test_resize(self) -> None:
        if Can.RESIZE not in format_named(self.format).can:
            pytest.skip("it cannot")
        for options in self.each():
            self.make(options)
            rng = random.Random(5)
            model = bytearray(self.size)
            with self.open() as image:
                self.traffic(image, model, rng, 20)
                image.resize(2 * self.size)
                model += bytes(self.size)
                assert image.size == 2 * self.size
                self.same(image, model)
                self.traffic(image, model, rng, 20)
                self.same(image, model)
                self.extents_are_true(image)
            self.judge(model)

    def test_power_cuts(self) -> None:
        """After each, no error in the image, leaks at most; what was flushed is there, the rest old or new."""
        if Can.WRITE not in format_named(self.format).can:
            pytest.skip("it is only read")
        for options in self.each():
            self.power_cuts(options, random.Random(f"{self.format} {options}"), self.steps, self.cuts)

    @pytest.mark.slow
    def test_many_power_cuts(self) -> None:
        if Can.WRITE not in format_named(self.format).can:
            pytest.skip("it is only read")
        for options in self.each():
            for seed in range(40):
                self.power_cuts(options, random.Random(seed), 2 * self.steps, 2 * self.cuts)
                self.path.unlink()
            self.make(options)

    # How the above is done.

    def traffic(self, image: Image, model: bytearray, rng: random.Random, steps: int) -> None:
        """Writes, zeros, discards and reads, small and large; ``model`` is what the disk is to be."""
        for _ in range(steps):
            offset, length = self.somewhere(image, rng)
            match rng.randrange(10):
                case 0:
                    image.write_zeroes(offset, length, rng.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                case 1:
                    image.discard(offset, length)
                    model[offset : offset + length] = read_at(image, offset, length)
                case 2:
                    image.flush()
                case 3 | 4:
                    room = bytearray(length)
                    cut = rng.randrange(length)
                    with memoryview(room) as view:
                        if not image.read_now([view[:cut], view[cut:]], offset):
                            image.preadv([view[:cut], view[cut:]], offset)
                    assert room == model[offset : offset + length]
                case _:
                    data = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
                    cut = rng.randrange(length)
                    with memoryview(data) as view:
                        if not image.write_now([view[:cut], view[cut:]], offset):
                            image.pwritev([view[:cut], view[cut:]], offset)
                    model[offset : offset + length] = data

    def somewhere(self, image: Image, rng: random.Random) -> tuple[int, int]:
        sectors = image.size // SECTOR
        length = min(rng.choice((1, 1, 3, 8, 64, 128, 129, 512, 1024)), sectors)
        first = rng.randrange(sectors - length + 1)
        if rng.random() < 0.5:
            first = min(first & ~127, sectors - length)
        return first * SECTOR, length * SECTOR

    def same(self, image: Image, model: bytes | bytearray) -> None:
        for at in range(0, image.size, 1 << 20):
            n = min(1 << 20, image.size - at)
            assert read_at(image, at, n) == model[at : at + n], f"at {at:#x}"

    def extents_are_true(self, image: Image) -> None:
        at = 0
        for extent in image.extents():
            assert extent.offset == at and extent.length > 0, extent
            at += extent.length
            data = read_at(image, extent.offset, extent.length)
            if extent.zero:
                assert not any(data), extent
            if extent.host is not None and extent.data and not extent.compressed:
                assert self.stored(image, extent) == data, extent
        assert at == image.size

    def stored(self, image: Image, extent: Extent) -> bytes | bytearray:
        """What is where an extent says."""
        host, length = extent.host or 0, extent.length
        if extent.file is None:
            return read_at(image.file, host, length)
        with open_file(extent.file, read_only=True, lock=False) as file:
            return read_at(file, host, length)

    def judge(self, model: bytes | bytearray) -> None:
        """QEMU's tools find the image right, and the same in it; so does our own check."""
        if Can.CHECK in format_named(self.format).can:
            with self.open(read_only=True) as image:
                result = image.check()
                assert result.clean, result
        qemu = self.format if self.qemu is None else self.qemu
        if not qemu:
            return
        assert shutil.which("qemu-img"), "the package qemu-utils"
        if self.qemu_checks:
            run("qemu-img", "check", "-f", qemu, self.path)
        raw = self.path.with_suffix(".model")
        write_sparse(raw, model)
        run("qemu-img", "compare", "-f", qemu, "-F", "raw", self.path, raw)
        raw.unlink()

    def power_cuts(self, options: Mapping[str, str], rng: random.Random, steps: int, cuts: int) -> None:
        recording = Recording(self.make(options))
        model = bytearray(self.size)
        history = [bytes(model)]
        """What the disk was, step by step."""
        durable = [0]
        """Of those, the ones that had just been flushed."""
        ends = [0]
        """The moments at which they were so."""
        with self.recorded(recording) as image:
            for _ in range(steps):
                self.traffic(image, model, rng, 1)
                flushes = rng.random() < 0.2
                if flushes:
                    image.flush()
                    durable.append(len(history))
                history.append(bytes(model))
                ends.append(recording.moment)
        with recording.replayed() as replayed:
            for moment in sorted(rng.randrange(recording.moment + 1) for _ in range(cuts)):
                now = bisect.bisect_right(ends, moment) - 1
                flushed = max(one for one in durable if one <= now)
                self.survived(replayed.cut(moment, rng), history[flushed : now + 2])

    def recorded(self, recording: Recording) -> Image:
        image = format_named(self.format)(recording.open())  # type: ignore[call-arg]
        image.open_files(recording.open)
        return image

    def survived(self, cut: Path, allowed: list[bytes]) -> None:
        """Each sector is as in one of ``allowed``, the disk from the last flush on."""
        with self.open(cut) as image:
            disk = read_at(image, 0, image.size)
            if Can.CHECK in image.can:
                result = image.check()
                assert not result.corruptions and not result.errors, result
        if self.qemu_checks:
            found = subprocess.run(
                ["qemu-img", "check", "-f", self.qemu or self.format, cut], capture_output=True, check=False, timeout=60
            )
            assert found.returncode in (0, 3), found.stdout  # 3: leaks only
        step = 128 * SECTOR
        for first in range(0, len(disk), step):
            if any(one[first : first + step] == disk[first : first + step] for one in allowed):
                continue
            for at in range(first, min(first + step, len(disk)), SECTOR):
                sector = disk[at : at + SECTOR]
                assert any(one[at : at + SECTOR] == sector for one in allowed), f"sector {at // SECTOR}"


class Recording:
    """Logs of all the files that an image is in, and of which entry of each came when: the power of all goes at one
    moment. A moment is over when a request to any of them has completed."""

    def __init__(self, path: Path) -> None:
        self.moment = 0
        self._path = path
        self._parts: list[_Part] = []

    def open(self, name: str | None = None) -> File:
        """The file of that name beside the first one, or the first one."""
        path = self._path if name is None else self._path.with_name(name)
        self._parts.append(part := _Part(path, path.read_bytes(), path.with_name(f"{path.name}.log"), self.moment))
        return _Moments(Recorder(open_file(str(path), lock=False), str(part.log)), self._next)

    def _next(self) -> None:
        self.moment += 1
        for part in self._parts:
            fd = os.open(part.log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            mark(fd, b"")
            os.close(fd)

    @contextmanager
    def replayed(self) -> Iterator[Replayed]:
        """When the image is closed."""
        directory, names = self._path.with_name("cut"), {part.path.name for part in self._parts}
        directory.mkdir()
        for other in self._path.parent.iterdir():  # what lies below is not touched
            if other.is_file() and other.name not in names:
                (directory / other.name).symlink_to(other)
        try:
            with ExitStack() as stack:
                yield Replayed(directory, self._path.name, [one.replayed(stack) for one in self._parts])
        finally:
            shutil.rmtree(directory)
            for part in self._parts:
                part.log.unlink()


@dataclass(frozen=True)
class _Part:
    """One of the files."""

    path: Path
    start: bytes
    """What was in it when it was opened."""
    log: Path
    born: int
    """The moment when it was."""

    def replayed(self, stack: ExitStack) -> ReplayedPart:
        sure = stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent, buffering=0))  # noqa: SIM115
        sure.write(self.start)
        entries = read_log(str(self.log))
        ends = [0] * (self.born + 1) + [i for i, entry in enumerate(entries) if entry.kind is Kind.MARK]
        return ReplayedPart(self.path.name, sure, Replay(entries, sure.fileno()), ends)


class ReplayedPart(NamedTuple):
    name: str
    sure: IO[bytes]
    """What is certainly left."""
    replay: Replay
    ends: list[int]
    """Of each moment, how many entries there were then."""


class Replayed:
    """What losses of power leave, one after another, in files of the same names in another directory."""

    def __init__(self, directory: Path, first: str, parts: list[ReplayedPart]) -> None:
        self._directory = directory
        self._first = first
        self._parts = parts

    def cut(self, moment: int, rng: random.Random) -> Path:
        """The power goes at this moment, which is no earlier than the last. Returns the first file."""
        for part in self._parts:
            part.replay.advance(part.ends[moment])
            with open(self._directory / part.name, "wb") as left:
                part.sure.seek(0)
                shutil.copyfileobj(part.sure, left)
                left.flush()
                for offset, piece in part.replay.survivors(rng):
                    os.pwrite(left.fileno(), piece, offset)
        return self._directory / self._first


class _Moments(Over):
    """Tells when a request that changes the file has completed."""

    def __init__(self, below: File, ended: Callable[[], None]) -> None:
        super().__init__(below)
        self._ended = ended

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        super().pwritev(buffers, offset)
        self._ended()

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, length)
        self._ended()

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        super().write_zeroes(offset, length, unmap)
        self._ended()

    def resize(self, size: int) -> None:
        super().resize(size)
        self._ended()

    def allocate(self, offset: int, length: int) -> None:
        super().allocate(offset, length)
        self._ended()

    def flush(self) -> None:
        super().flush()
        self._ended()


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


class ReadOnlyConformance(ImageConformance):
    """Of formats that are only read: subclasses make images by other means, in ``make``."""

    def test_it_is_only_read(self) -> None:
        self.make({})
        with pytest.raises(UserError, match="only read"):
            self.open()


def write_sparse(path: Path, data: bytes | bytearray) -> None:
    with open(path, "wb") as file:
        for at in range(0, len(data), 65536):
            piece = data[at : at + 65536]
            if any(piece):
                file.seek(at)
                file.write(piece)
        file.truncate(len(data))
