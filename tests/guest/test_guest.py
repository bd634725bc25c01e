"""The cpio writer against GNU cpio, module order, and the cache."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from skep.errors import UserError
from skep.guest import debian
from skep.guest.cpio import Archive
from tests.boot.test_payload import image


def module(depends: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def test_modules_come_after_those_that_they_need() -> None:
    modules = {
        "virtio_pci": module("virtio-ring,virtio"),
        "virtio": module("virtio_ring"),
        "virtio_ring": module(""),
        "other": module(""),
    }
    assert debian.module_order("virtio_pci", modules) == ["virtio_ring", "virtio", "virtio_pci"]


def test_a_module_may_ask_for_what_answers_to_a_name() -> None:
    modules = {
        "ext4": b"\0softdep=pre: crc32c\0depends=jbd2\0",
        "jbd2": b"\0depends=\0",
        "crc32c_generic": b"\0alias=crypto-crc32c\0alias=crc32c\0depends=\0",
        "crc32c_intel": b"\0alias=crc32c\0depends=\0",
    }
    assert debian.module_order("ext4", modules) == ["jbd2", "crc32c_generic", "ext4"]
    assert debian.module_order("ext4", {"ext4": modules["ext4"]}) == ["ext4"]


def test_a_module_that_is_built_in_is_not_loaded() -> None:
    assert debian.module_order("x", {"x": module("crc16")}) == ["x"]
    assert debian.module_order("absent", {}) == []


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the cpio package")
def test_cpio_agrees(tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("bin", 0o750)
    archive.file("bin/a", b"hello", 0o755)
    archive.file("empty", b"")
    archive.symlink("bin/b", "a")
    archive.character_device("console", 5, 1)
    listing = subprocess.run(
        ["cpio", "-itvn", "--quiet"], input=archive.finish(), capture_output=True, check=True, timeout=20
    ).stdout.decode()
    lines = [line.split() for line in listing.splitlines()]
    assert [line[0] for line in lines] == ["drwxr-x---", "-rwxr-xr-x", "-rw-r--r--", "lrwxrwxrwx", "crw-------"]
    assert [line[-1] for line in lines] == ["bin", "bin/a", "empty", "a", "console"]
    assert lines[4][4:6] == ["5,", "1"]
    subprocess.run(
        ["cpio", "-id", "--quiet", "bin", "bin/a", "bin/b"],
        input=archive.finish(),
        check=True,
        cwd=tmp_path,
        timeout=20,
    )
    assert (tmp_path / "bin/b").read_bytes() == b"hello"


def test_the_same_input_gives_the_same_bytes() -> None:

    def pack() -> bytes:
        return debian.initramfs(b"#!/bin/sh\n", b"ELF", ["sh", "ls"], {"virtio_pci": module("")})

    assert pack() == pack()


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(UserError, match=r"--arch: no Debian guest for 's390x'; one of: amd64"):
        debian.obtain("s390x")


def test_without_apt_it_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--kernel BZIMAGE --initrd CPIO") as caught:
        debian.obtain()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_complete_cache_needs_no_package_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    home = tmp_path / "skep" / "guest" / f"debian-amd64-{debian.recipe()}"
    home.mkdir(parents=True)
    (home / "vmlinuz").write_bytes(b"k")
    (home / "initrd.img").write_bytes(b"i")
    guest = debian.obtain()
    assert (guest.kernel.read_bytes(), guest.initrd.read_bytes()) == (b"k", b"i")


def test_the_kernel_inside_is_unpacked_once(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(image(gzip.compress(b"\x7fELF inside")))
    path = debian.vmlinux(kernel)
    assert path.read_bytes() == b"\x7fELF inside" and path.stat().st_mode & 0o777 == 0o644
    kernel.unlink()
    assert debian.vmlinux(kernel) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["vmlinux"]


def failing_client(tmp_path: Path, body: str) -> None:
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        path = tmp_path / tool
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_client(tmp_path, "echo 'E: Unable to locate package' >&2; exit 100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match="Unable to locate package") as caught:
        debian.obtain()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache/skep/guest").iterdir()) == []
