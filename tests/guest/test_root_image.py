"""The image of a Debian root, without booting it; and what happens where it cannot be made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from skep.cli import main
from skep.errors import UserError
from skep.guest import root as debian_root
from skep.guest.root import Root


def debugfs(image: Path, request: str) -> str:
    """What e2fsprogs finds in it, unmounted."""
    done = subprocess.run(["debugfs", "-R", request, image], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def check(image: Path, length: int) -> None:
    status = image.stat()
    assert status.st_size == length and status.st_blocks * 512 < 600 << 20, "it is sparse"
    assert status.st_mode & 0o222 == 0
    checked = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, text=True, check=False, timeout=120)
    assert checked.returncode == 0, checked.stdout


def test_what_is_in_it(root: Root) -> None:
    check(root.image, 1 << 30)
    assert 'Fast link dest: "/lib/systemd/systemd"' in debugfs(root.image, "stat /usr/sbin/init")
    assert debugfs(root.image, "cat /etc/machine-id") == ""
    assert [line.split("/")[5] for line in debugfs(root.image, "ls -p /dev").split()] == [".", ".."]
    assert "User:     0   Group:    42" in debugfs(root.image, "stat /etc/shadow"), "owners are kept"
    release = root.kernel.with_name("packages").read_text().partition("_")[0].removeprefix("linux-image-")
    assert "modules.dep" in debugfs(root.image, f"ls /usr/lib/modules/{release}")


def test_a_larger_one(root: Root) -> None:
    larger = debian_root.obtain(size="3G")
    assert larger.image != root.image and larger.kernel == root.kernel
    check(larger.image, 3 << 30)


@pytest.mark.parametrize("options", ["--root --size 100M", "--root --size 20T", "--root --size huge", "--size 2G"])
def test_a_size_that_cannot_be(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "debian", *options.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("skep: --size: ") and said.err.count("\n") == 1


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with only those programs that a test puts there, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setattr(debian_root, "_environment", lambda: {**os.environ, "PATH": str(directory)})
    return directory


def program(path: Path, script: str = "") -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_without_debootstrap_it_says_what_to_install(tools: Path) -> None:
    with pytest.raises(UserError, match="debootstrap is not installed; apt-get install debootstrap"):
        debian_root.obtain()
    assert not (tools.parent / "cache").exists()


def test_a_user_without_users_of_his_own(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for tool in ("debootstrap", "mke2fs", "resize2fs"):
        program(tools / tool)
    program(tools / "unshare", "exit 1")
    with pytest.raises(UserError, match=r"run it as root, or install uidmap and have a range .* in /etc/subuid"):
        debian_root.obtain()
    assert not (tools.parent / "cache").exists()


def test_what_debootstrap_complains_of_is_one_line_and_nothing_is_left(
    root: Root, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything else as it is: only the archive is not there."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tools.parent / "cache"))
    monkeypatch.setattr(debian_root, "archive", lambda arch: ("bookworm", "file:///nonexistent"))
    monkeypatch.setattr(debian_root.debian, "build", lambda arch, scratch, made: program(scratch / "linux-image-1.deb"))
    with pytest.raises(UserError, match=r"the root could not be made: .*nonexistent.*; making ") as caught:
        debian_root.obtain()
    assert "\n" not in str(caught.value)
    assert list((tools.parent / "cache/skep/guest").iterdir()) == []
