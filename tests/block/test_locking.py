"""Two programs and one image: Skep against Skep, and Skep against the real qemu-io, qemu-img and qemu-nbd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skep.block.format import BackingName, Image
from skep.block.image import create_image, open_disk, open_image
from skep.block.options import BlockOptions
from skep.cli import main
from skep.errors import UserError


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@contextmanager
def opened(image: Path, *, read_only: bool = False) -> Iterator[None]:
    disk = open_disk(BlockOptions(path=str(image), read_only=read_only))
    try:
        yield
    finally:
        disk.close()


def refused(image: Path, *, read_only: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        open_disk(BlockOptions(path=str(image), read_only=read_only))
    return str(caught.value)


def test_one_writer_excludes_everybody(image: Path) -> None:
    with opened(image):
        assert "another disk of this VM" in refused(image)
        assert "another disk of this VM" in refused(image, read_only=True)
    with opened(image):
        pass


def test_readers_share_and_exclude_a_writer(image: Path) -> None:
    with opened(image, read_only=True), opened(image, read_only=True):
        assert "in use" in refused(image)
    with opened(image):
        pass


def test_lock_false_does_not_ask(image: Path) -> None:
    with opened(image):
        open_disk(BlockOptions(path=str(image), lock=False)).close()


def test_two_that_start_together_never_both_write(image: Path) -> None:
    """Many processes at once: at any moment at most one has the image."""
    code = (
        "import os, sys, time\n"
        "from skep.block.image import open_disk; from skep.block.options import BlockOptions\n"
        "from skep.errors import UserError\n"
        "won = 0\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end:\n"
        "    try: disk = open_disk(BlockOptions(path=sys.argv[1]))\n"
        "    except UserError: continue\n"
        "    os.close(os.open(sys.argv[1] + '.held', os.O_CREAT | os.O_EXCL))\n"
        "    os.unlink(sys.argv[1] + '.held')\n"
        "    disk.close(); won += 1\n"
        "print(won)"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(image)], env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    results = [run.communicate(timeout=30) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], results
    assert sum(int(out) for out, _ in results) > 0


@contextmanager
def qemu_io(image: Path) -> Iterator[subprocess.Popen[str]]:
    """qemu-io with the image open for writing."""
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    process = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("length\n")  # its answer means that the image is open
        process.stdin.flush()
        assert "1 MiB" in process.stdout.readline()
        yield process
    finally:
        process.communicate("quit\n", timeout=20)


def guest_reads(image: Path) -> subprocess.CompletedProcess[str]:
    """A QEMU guest's read-only disk; QEMU ends at once if it may not have it, and the monitor ends it otherwise."""
    return _qemu_guest(f"file={image},format=raw,if=virtio,readonly=on")


def guest_writes(image: Path) -> subprocess.CompletedProcess[str]:
    return _qemu_guest(f"file={image},format=raw,if=virtio")


def _qemu_guest(drive: str) -> subprocess.CompletedProcess[str]:
    machine = ["-nodefaults", "-display", "none", "-S", "-m", "16", "-monitor", "stdio"]
    return _run("qemu-system-x86_64", *machine, "-drive", drive, stdin="quit\n")


def img_resizes(image: Path) -> subprocess.CompletedProcess[str]:
    return _run("qemu-img", "resize", "-f", "raw", str(image), "2M")


def img_copies(image: Path) -> subprocess.CompletedProcess[str]:
    return _run("qemu-img", "convert", "-f", "raw", "-O", "raw", str(image), f"{image}.copy")


def io_writes(image: Path) -> subprocess.CompletedProcess[str]:
    return _run("qemu-io", "-f", "raw", "-c", "write 0 512", str(image))


def _run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=30, input=stdin)


@pytest.mark.parametrize("use", [guest_reads, guest_writes, img_resizes, img_copies, io_writes])
def test_qemu_is_refused_while_skep_writes(
    image: Path, use: Callable[[Path], subprocess.CompletedProcess[str]]
) -> None:
    with opened(image):
        answer = use(image)
        assert answer.returncode == 1
        assert "lock" in answer.stderr
    assert use(image).returncode == 0


def test_qemu_may_read_but_not_write_while_skep_reads(image: Path) -> None:
    with opened(image, read_only=True):
        assert guest_reads(image).returncode == 0
        assert guest_writes(image).returncode == 1


def test_skep_is_refused_while_qemu_writes_and_names_it(image: Path) -> None:
    with qemu_io(image) as process:
        for read_only in (False, True):
            message = refused(image, read_only=read_only)
            assert f"qemu-io (pid {process.pid})" in message
            assert "\n" not in message
    with opened(image):
        pass


# The other formats, and what lies below.

FORMATS = {
    "qcow2": {},
    "vmdk": {},
    "vdi": {},
    "vhdx": {},
    "vpc": {},
    "luks": {"key-secret": "s", "iter-time": "1"},
}
RELAXED = {"luks"}
"""Formats that QEMU has no tables of to keep: so its tools do not mind writers while they read."""
SECRETS = {"s": b"x"}
OBJECT = ("--object", "secret,id=s,data=x")


def made(path: Path, format: str) -> Path:
    create_image(path, format, 1 << 20, options=FORMATS[format], secrets=SECRETS)
    return path


def options_of(format: str, path: Path) -> tuple[str, ...]:
    key = ",key-secret=s" if format == "luks" else ""
    return (*OBJECT, "--image-opts", f"driver={format}{key},file.filename={path}")


def skep_opens(path: Path, format: str, **how: bool) -> Image:
    key = {"key-secret": "s"} if format == "luks" else None
    return open_image(path, format=format, options=key, secrets=SECRETS, **how)  # type: ignore[arg-type]


@contextmanager
def qemu_holds(format: str, path: Path, *how: str) -> Iterator[None]:
    """qemu-io with the image open, for writing unless told otherwise."""
    command = ["qemu-io", *how, *options_of(format, path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "MiB" in (answer := process.stdout.readline()), answer
        yield
    finally:
        process.communicate("quit\n", timeout=20)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_keeps_qemu_away(tmp_path: Path, format: str) -> None:
    """A writer everybody, a reader writers; ``-U`` reads all the same."""
    path = made(tmp_path / "disk", format)
    opened = options_of(format, path)
    writes = ("qemu-io", *opened, "-c", "write 0 512")
    reads = () if format in RELAXED else (("qemu-io", "-r", *opened, "-c", "read 0 512"), ("qemu-img", "info", *opened))
    with skep_opens(path, format):
        for command in (writes, *reads):
            answer = _run(*command)
            assert answer.returncode == 1 and "lock" in answer.stderr, answer
        assert _run("qemu-img", "info", "-U", *opened).returncode == 0
    with skep_opens(path, format, read_only=True):
        answer = _run(*writes)
        assert answer.returncode == 1 and "lock" in answer.stderr, answer
        for command in reads:
            assert _run(*command).returncode == 0
    assert _run(*writes).returncode == 0


@pytest.mark.parametrize("format", FORMATS)
def test_qemu_keeps_each_format_from_us(tmp_path: Path, format: str) -> None:
    path = made(tmp_path / "disk", format)
    with qemu_holds(format, path):
        for read_only in (False, True):
            with pytest.raises(UserError, match="in use by qemu-io"):
                skep_opens(path, format, read_only=read_only)
        skep_opens(path, format, read_only=True, lock=False).close()
        assert main(["image", "info", "-f", format, str(path)]) == 1
        assert main(["image", "info", "-U", "-f", format, str(path)]) == 0
    with qemu_holds(format, path, "-r"):
        if format not in RELAXED:
            with pytest.raises(UserError, match="in use by qemu-io"):
                skep_opens(path, format)
        skep_opens(path, format, read_only=True).close()
    skep_opens(path, format).close()


def test_what_lies_below_is_shared_by_readers(tmp_path: Path) -> None:
    """Overlays of ours and of QEMU's over one image, which nobody writes to meanwhile."""
    base = made(tmp_path / "base", "qcow2")
    for name in ("ours", "theirs"):
        create_image(tmp_path / name, "qcow2", backing=BackingName("base", "qcow2"))
    with skep_opens(tmp_path / "ours", "qcow2"), qemu_holds("qcow2", tmp_path / "theirs"):
        with pytest.raises(UserError, match="in use by"):
            skep_opens(base, "qcow2")
        answer = _run("qemu-io", *options_of("qcow2", base), "-c", "write 0 512")
        assert answer.returncode == 1 and "lock" in answer.stderr
        skep_opens(base, "qcow2", read_only=True).close()
    with qemu_holds("qcow2", base), pytest.raises(UserError, match="in use by qemu-io"):
        skep_opens(tmp_path / "ours", "qcow2")
    with skep_opens(base, "qcow2"):
        answer = _run("qemu-io", *options_of("qcow2", tmp_path / "theirs"), "-c", "read 0 512")
        assert answer.returncode == 1 and "lock" in answer.stderr


def test_files_beside_an_image_are_locked_too(tmp_path: Path) -> None:
    """A data file of qcow2, and an extent of VMDK."""
    create_image(tmp_path / "apart", "qcow2", 1 << 20, options={"data_file": str(tmp_path / "data")})
    create_image(tmp_path / "disk", "vmdk", 1 << 20, options={"subformat": "monolithicFlat"})
    for name, format, beside in (("apart", "qcow2", "data"), ("disk", "vmdk", "disk-flat.vmdk")):
        writes = ("qemu-io", "-f", "raw", "-c", "write 0 512", str(tmp_path / beside))
        with skep_opens(tmp_path / name, format):
            answer = _run(*writes)
            assert answer.returncode == 1 and "lock" in answer.stderr, answer
        assert _run(*writes).returncode == 0
        with qemu_holds("raw", tmp_path / beside), pytest.raises(UserError, match="in use by qemu-io"):
            skep_opens(tmp_path / name, format)


def test_making_an_image_takes_none_from_anybody(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "qcow2")
    before = path.read_bytes()
    with qemu_holds("qcow2", path), pytest.raises(UserError, match="in use by qemu-io"):
        create_image(path, "qcow2", 2 << 20)
    assert path.read_bytes()[: len(before)] == before


def _environment() -> dict[str, str]:
    import skep

    return {**os.environ, "PYTHONPATH": str(Path(skep.__file__ or "").parent.parent)}
