"""Raw images, on real files and, where the host has them, real loop devices."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.block.file import HostFile
from skep.block.image import open_disk
from skep.block.options import BlockOptions, BlockSizes
from skep.block.raw import RawImage
from skep.errors import UserError
from tests.block.conformance import ImageConformance

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (MIB // 256))
    return path


def open_path(path: Path, **options: object) -> RawImage:
    opened = open_disk(BlockOptions(path=str(path), **options))  # type: ignore[arg-type]
    assert isinstance(opened, RawImage)
    return opened


def test_scattered_read_and_gathered_write(image: Path) -> None:
    disk = open_path(image)
    assert (disk.size, disk.read_only, disk.write_cache) == (MIB, False, True)
    parts = [memoryview(bytearray(n)) for n in (1, 511, 0, 1024)]
    disk.preadv(parts, 512)
    assert b"".join(parts) == (bytes(range(256)) * 6)
    disk.pwritev([memoryview(b"a" * 100), memoryview(b"b" * 412)], MIB - 512)
    disk.flush()
    disk.close()
    disk.close()
    assert image.read_bytes()[-512:] == b"a" * 100 + b"b" * 412
    assert image.stat().st_size == MIB


def test_more_buffers_than_the_kernel_takes_at_once(image: Path) -> None:
    disk = open_path(image)
    target = bytearray(3 * 1024)
    disk.preadv([memoryview(target)[i : i + 1] for i in range(len(target))], 0)
    assert target == bytes(range(256)) * 12
    disk.close()


def test_an_image_that_shrank_is_an_io_error(image: Path) -> None:
    disk = open_path(image)
    os.truncate(image, 4096)
    with pytest.raises(OSError) as caught:
        disk.preadv([memoryview(bytearray(1024))], 4096 - 512)
    assert caught.value.errno == errno.EIO
    disk.close()


def test_a_failed_flush_is_never_forgotten(image: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    disk = HostFile(write_end, "pipe", MIB, read_only=False, write_cache=True)
    for _ in range(2):  # fdatasync of a pipe is EINVAL
        with pytest.raises(OSError):
            disk.flush()
    os.dup2(os.open(image, os.O_RDWR), write_end)  # a descriptor on which fdatasync works
    with pytest.raises(OSError):
        disk.flush()
    disk.close()


def test_read_only_is_read_only(image: Path) -> None:
    disk = open_path(image, read_only=True)
    assert disk.read_only
    with pytest.raises(OSError):
        disk.pwritev([memoryview(bytes(512))], 0)
    disk.close()


def test_synchronous_has_no_write_cache(image: Path) -> None:
    disk = open_path(image, synchronous=True)
    assert not disk.write_cache
    flags = int(_fdinfo(disk)["flags"], 8)
    assert flags & os.O_DSYNC
    disk.close()


def _fdinfo(disk: RawImage) -> dict[str, str]:
    lines = Path(f"/proc/self/fdinfo/{disk.file._fd}").read_text().splitlines()
    return dict(line.replace(":", " ").split(None, 1) for line in lines if len(line.split()) > 1)


class TestDirect:
    """O_DIRECT: guest buffers need not have the alignment that the host wants."""

    @pytest.fixture
    def direct(self, image: Path) -> Iterator[RawImage]:
        try:
            disk = open_path(image, no_cache=True, block=BlockSizes(4096, 4096))
        except UserError as e:
            pytest.skip(str(e))
        yield disk
        disk.close()

    @settings(max_examples=30, deadline=None)
    @given(
        cuts=st.lists(st.integers(0, 3 * 4096), max_size=5),
        shift=st.sampled_from([0, 1, 512, 4096]),
        data=st.binary(min_size=8, max_size=8),
    )
    def test_any_alignment(self, cuts: list[int], shift: int, data: bytes) -> None:
        disk = self._disk
        with mmap.mmap(-1, 5 * 4096) as memory:
            whole = memoryview(memory)[shift : shift + 3 * 4096]
            whole[:] = data * (3 * 512)
            edges = [0, *sorted(cuts), 3 * 4096]
            parts = [whole[a:b] for a, b in itertools.pairwise(edges)]
            disk.pwritev(parts, 8192)
            whole[:] = bytes(len(whole))
            disk.preadv(parts, 8192)
            assert whole == data * (3 * 512)
            for part in parts:
                part.release()
            whole.release()

    @pytest.fixture(autouse=True)
    def _keep(self, direct: RawImage) -> None:
        type(self)._disk = direct

    _disk: RawImage

    def test_the_page_cache_is_not_used(self, direct: RawImage) -> None:
        assert int(_fdinfo(direct)["flags"], 8) & os.O_DIRECT

    def test_longer_than_the_bounce_buffer(self, image: Path) -> None:
        image.write_bytes(os.urandom(3 * MIB))
        disk = open_path(image, no_cache=True, block=BlockSizes(4096, 4096), lock=False)
        target = bytearray(3 * MIB + 1)
        with memoryview(target)[1:] as odd:
            disk.preadv([odd], 0)
        assert target[1:] == image.read_bytes()
        disk.close()


@pytest.mark.parametrize(
    ("prepare", "options", "says"),
    [
        (lambda p: None, {}, "there is no such disk image"),
        (lambda p: p.mkdir(), {}, "is a directory"),
        (lambda p: p.mkdir(), {"read_only": True}, "is a directory"),
        (os.mkfifo, {}, "neither a file nor a block device"),
        (lambda p: p.write_bytes(b""), {}, "is empty"),
        (lambda p: p.write_bytes(b"x" * 700), {}, "truncate -s 1024"),
        (lambda p: p.write_bytes(b"x" * 512), {"block": BlockSizes(4096, 4096)}, "not a multiple of 4096"),
        (lambda p: p.write_bytes(b"x" * 512), {"record": "/nonexistent/log"}, "log of writes cannot be made"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_open(
    tmp_path: Path, prepare: Callable[[Path], object], options: dict[str, object], says: str
) -> None:
    path = tmp_path / "what"
    prepare(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UserError) as caught:
        open_path(path, **options)
    message = str(caught.value)
    assert says in message and "\n" not in message and caught.value.exit_status == 2
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_not_writable() -> None:
    """As an ordinary user, since root may write anything."""
    code = (
        "import os, sys\n"
        "from skep.block.image import open_disk; from skep.block.options import BlockOptions\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "open_disk(BlockOptions(path=sys.argv[1]))"
    )
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        image = Path(directory, "disk.img")
        image.write_bytes(bytes(512))
        image.chmod(0o444)
        command = [sys.executable, "-c", code, str(image)]
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20, env=_environment())
    assert "the disk image is not writable; say ro" in run.stderr


def _environment() -> dict[str, str]:
    import skep

    source = str(Path(skep.__file__ or "").parent.parent)
    return {**os.environ, "PYTHONPATH": source}


class TestBlockDevice:
    @pytest.fixture
    def loop(self, image: Path) -> Iterator[Path]:
        command = ["losetup", "-f", "--show", str(image)]
        made = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
        if made.returncode:
            pytest.skip(f"no loop device: {made.stderr.strip()}")
        device = made.stdout.strip()
        yield Path(device)
        subprocess.run(["losetup", "-d", device], check=True, timeout=20)

    def test_reads_and_writes(self, loop: Path, image: Path) -> None:
        disk = open_path(loop)
        assert disk.size == MIB
        disk.pwritev([memoryview(b"z" * 512)], 1024)
        disk.flush()
        disk.close()
        with open(image, "rb") as file:
            assert os.pread(file.fileno(), 512, 1024) == b"z" * 512

    def test_in_use_by_the_host(self, loop: Path) -> None:
        claimed = os.open(loop, os.O_RDWR | os.O_EXCL)
        try:
            with pytest.raises(UserError, match="in use by this host"):
                open_path(loop)
            open_path(loop, read_only=True).close()
        finally:
            os.close(claimed)


class TestConformance(ImageConformance):
    format = "raw"
    variants = ({}, {"preallocation": "falloc"}, {"preallocation": "full"})
