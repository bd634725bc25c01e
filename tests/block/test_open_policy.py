"""What a VM opens, and what it does not, whatever its images say and its guest wrote."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skep.block.backend import read_at
from skep.block.format import BackingName, Image
from skep.block.image import create_image, open_disk, open_image
from skep.block.options import BlockOptions
from skep.block.qcow2.header import Extension
from skep.block.qcow2.image import Qcow2Image
from skep.errors import UserError
from skep.guest.debian import Guest
from tests.block.conformance import run
from tests.linux import Linux

MIB = 1 << 20
_IN_OPEN = 0x20
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def never_opened(path: Path) -> Iterator[None]:
    """Fails if somebody opens the file meanwhile (inotify(7))."""
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0 and _libc.inotify_add_watch(fd, os.fsencode(path), _IN_OPEN) >= 0
    try:
        yield
        try:
            event = os.read(fd, 4096)
        except BlockingIOError:
            event = b""
        assert not event, f"{path} was opened"
    finally:
        os.close(fd)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secrets" / "shadow"
    path.parent.mkdir()
    path.write_bytes(b"root:$y$j9T$".ljust(MIB, b"!"))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def vm_disk(path: Path, format: str = "qcow2", backing: Path | str | None = None) -> Image:
    options = BlockOptions(path=str(path), format=format, backing=None if backing is None else str(backing))
    disk = open_disk(options)
    assert isinstance(disk, Image)
    return disk


# A raw disk stays raw.

MADE = ("qcow2", "vmdk", "vdi", "vpc", "vhdx", "luks")


@pytest.mark.parametrize("format", MADE)
def test_what_a_guest_writes_to_a_raw_disk_is_data(images: Path, secret: Path, format: str) -> None:
    """A whole image of another format, with a secret below it where it can have one."""
    inner = images / "inner"
    own = {"key-secret": "s", "iter-time": "1"} if format == "luks" else {}
    create_image(inner, format, MIB, options=own, secrets={"s": b"x"})
    if format == "qcow2":
        set_backing(inner, BackingName(str(secret), "raw"))
    written = inner.read_bytes()
    disk = images / "disk"
    disk.write_bytes(bytes(4 * MIB))
    with vm_disk(disk, "raw") as image:
        image.pwritev([memoryview(written)], 0)
    with never_opened(secret), vm_disk(disk, "raw") as image:
        assert image.format == "raw" and image.size == 4 * MIB
        assert read_at(image, 0, len(written)) == written
        with open_image(disk, read_only=True, backing=False, lock=False, may_stay_locked=True) as guessed:
            assert guessed.format == (format if format != "vpc" else guessed.format), "a tool that guesses would differ"


def test_a_backing_file_of_a_raw_image_stays_raw(images: Path, secret: Path) -> None:
    base, over = images / "base", images / "over"
    create_image(base, "qcow2", MIB)
    set_backing(base, BackingName(str(secret), "raw"))
    create_image(over, "qcow2", BASE_SIZE := 4 * MIB, backing=BackingName("base", "raw"))
    with never_opened(secret), vm_disk(over, backing=images) as image:
        assert image.size == BASE_SIZE and image.backing is not None and image.backing.format == "raw"
        assert read_at(image, 0, 4) == b"QFI\xfb"


@pytest.mark.slow
def test_from_the_guest_down(guest: Guest, images: Path, secret: Path) -> None:
    """A Linux guest makes its raw disk begin like a qcow2 image over a secret; at the next start it reads what it
    wrote, and not the secret."""
    inner, disk = images / "inner", images / "disk"
    create_image(inner, "qcow2", MIB)
    set_backing(inner, BackingName(str(secret), "raw"))
    disk.write_bytes(bytes(4 * MIB))
    with never_opened(secret):
        with Linux(guest, disks=[str(disk), f"{inner},format=raw,ro"]) as linux:
            linux("cat /dev/vdb > /dev/vda && sync")
        assert disk.read_bytes()[: inner.stat().st_size] == inner.read_bytes()
        with Linux(guest, disks=[str(disk)]) as linux:
            assert linux("head -c 3 /dev/vda") == "QFI" and linux("cat /sys/block/vda/size").strip() == "8192"
            assert linux("grep -c root: /dev/vda || true").strip() == "0"


# Names in images.


def set_backing(path: Path, name: BackingName) -> None:
    with open_image(path, format="qcow2", backing=False) as image:
        image.set_backing(name)


def names(secret: Path, images: Path) -> list[str]:
    (images / "link").symlink_to(secret)
    (images / "directory").symlink_to(secret.parent)
    return [
        str(secret),
        f"file:{secret}",
        f"../secrets/{secret.name}",
        f"{images}/../secrets/{secret.name}",
        "link",
        f"directory/{secret.name}",
        f"/proc/self/root{secret}",
        f'json:{{"driver":"file","filename":"{secret}"}}',
        f"nbd:unix:{secret}",
        f"nbd+unix:///?socket={secret}",
        "nbd://127.0.0.1:1/x",
        f"fat:{secret.parent}",
        "http://127.0.0.1:1/x",
        "/dev/fd/0",
        "/dev/zero",
        "",
        "x\udcff",
    ]


def test_names_of_backing_files(images: Path, secret: Path) -> None:
    path = images / "over"
    create_image(path, "qcow2", MIB)
    base = images / "base"
    base.write_bytes(b"b" * MIB)
    for name in filter(None, names(secret, images)):
        set_backing(path, BackingName(name, "raw"))
        for allowed in (None, images, images / "base", f"{images}:{images / 'base'}"):
            with never_opened(secret), pytest.raises(UserError):
                vm_disk(path, backing=allowed)
    for name in ("base", str(base), "file:base", "../images/base", "./base"):
        set_backing(path, BackingName(name, "raw"))
        with pytest.raises(UserError, match="not allowed"):
            vm_disk(path)
        for allowed in (images, base, f"/nowhere:{images}"):
            with vm_disk(path, backing=allowed) as image:
                assert read_at(image, 0, 4) == b"bbbb"


def test_the_whole_chain_is_looked_at(images: Path, secret: Path) -> None:
    """What is allowed may say itself what it lies over; and its format is written down everywhere."""
    for name in ("one", "two"):
        create_image(images / name, "qcow2", MIB)
    set_backing(images / "one", BackingName("two", "qcow2"))
    set_backing(images / "two", BackingName(str(secret), "raw"))
    with never_opened(secret), pytest.raises(UserError, match="not allowed"):
        vm_disk(images / "one", backing=images)
    set_backing(images / "two", BackingName("base", None))
    (images / "base").write_bytes(b"b" * MIB)
    with never_opened(images / "base"), pytest.raises(UserError, match="nothing of the format"):
        vm_disk(images / "one", backing=images)
    set_backing(images / "two", BackingName("one", "qcow2"))
    with pytest.raises(UserError, match="a loop"):
        vm_disk(images / "one", backing=images)


def test_names_of_data_files(images: Path, secret: Path) -> None:
    path = images / "disk"
    for name in names(secret, images):
        create_image(path, "qcow2", MIB, options={"data_file": str(images / "data")})
        with open_image(path, format="qcow2") as image:
            assert isinstance(image, Qcow2Image)
            image.header.extensions[Extension.DATA_FILE] = name.encode(errors="surrogateescape")
            image.write_header()
        for allowed in (None, images, images / "data"):
            with never_opened(secret), pytest.raises(UserError):
                vm_disk(path, backing=allowed)


def test_names_of_vmdk_extents(images: Path, secret: Path) -> None:
    path = images / "disk"
    create_image(path, "vmdk", MIB, options={"subformat": "monolithicFlat"})
    text = path.read_bytes()
    for name in names(secret, images)[:-1]:
        path.write_bytes(text.replace(b"disk-flat.vmdk", name.replace('"', "'").encode()))
        for allowed in (None, images, images / "base"):
            with never_opened(secret), pytest.raises(UserError):
                vm_disk(path, "vmdk", backing=allowed)


@pytest.mark.parametrize("format", ["vpc", "vhdx", "vmdk"])
def test_names_of_parents(images: Path, secret: Path, format: str) -> None:
    """Of formats that say how to know the parent again."""
    parent, path = images / "parent", images / "disk"
    create_image(parent, format, MIB)
    create_image(path, format, backing=BackingName("parent", format))
    with never_opened(parent), pytest.raises(UserError, match="not allowed"):
        vm_disk(path, format)
    with never_opened(parent), pytest.raises(UserError, match="not allowed"):
        vm_disk(path, format, backing=secret.parent)
    vm_disk(path, format, backing=images).close()


def test_a_tool_follows_names_unless_told_where_to(images: Path, secret: Path) -> None:
    path = images / "over"
    run("qemu-img", "create", "-f", "qcow2", "-b", secret, "-F", "raw", path)
    with open_image(path) as image:
        assert read_at(image, 0, 5) == b"root:"
    with never_opened(secret), pytest.raises(UserError, match="not allowed"):
        open_image(path, inside=[str(images)])
    told = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(secret)}})
    run("qemu-img", "create", "-f", "qcow2", "-b", f"json:{told}", "-F", "raw", path)
    with open_image(path) as image:
        assert read_at(image, 0, 5) == b"root:"
    with never_opened(secret), pytest.raises(UserError, match="not a file"):
        open_image(path, inside=["/"])


def test_what_would_wait_for_ever_is_not_opened(images: Path) -> None:
    """A pipe without a writer, as a backing file."""
    path = images / "over"
    os.mkfifo(images / "pipe")
    create_image(path, "qcow2", MIB)
    set_backing(path, BackingName("pipe", "raw"))
    watchdog = threading.Timer(20, os.kill, (os.getpid(), 9))
    watchdog.start()
    try:
        with pytest.raises(UserError, match="neither a file nor a block device"):
            vm_disk(path, backing=images)
    finally:
        watchdog.cancel()


def test_inotify_tells(secret: Path) -> None:
    """The judge of the tests above."""
    with pytest.raises(AssertionError, match="was opened"), never_opened(secret):
        secret.read_bytes()
