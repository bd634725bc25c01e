"""A Debian with systemd, from its disk to the login, at work, and down again."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from skep.guest.root import Root
from tests.debian import Debian, copy_of
from tests.linux import complaints

WORK = Path(__file__).with_name("work.sh")


@pytest.fixture
def disk(root: Root, tmp_path: Path) -> Path:
    return copy_of(root, tmp_path)


def natively(directory: Path) -> str:
    """What work.sh prints on this host."""
    environment = {"PATH": os.environ["PATH"], "WORK": str(directory / "work"), "PYTHON": "/usr/bin/python3"}
    done = subprocess.run(["sh", WORK], env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def script_disk(directory: Path) -> Path:
    """work.sh as a disk: `sh /dev/vdb` runs it."""
    text = WORK.read_bytes()
    disk = directory / "script"
    disk.write_bytes(text + b"\n" * (-len(text) % 512))
    return disk


def check_file_system(disk: Path) -> None:
    """It was unmounted, and nothing is wrong with it."""
    header = subprocess.run(["dumpe2fs", "-h", disk], capture_output=True, text=True, check=True, timeout=60).stdout
    assert re.search(r"Filesystem state: +clean\n", header) and "needs_recovery" not in header
    checked = subprocess.run(["e2fsck", "-f", "-n", disk], capture_output=True, text=True, check=False, timeout=120)
    assert checked.returncode == 0, checked.stdout


def test_a_debian_at_work(root: Root, disk: Path, tmp_path: Path) -> None:
    with Debian(root, disk, disks=(script_disk(tmp_path),)) as debian:
        assert debian("systemctl --failed --no-legend") == ""
        assert debian("apt-get --version").startswith("apt ")
        assert re.search(r"^ii  systemd-sysv ", debian("dpkg -l"), re.MULTILINE)
        assert "dpkg" not in debian("dpkg --audit")
        journal = debian("journalctl --boot --no-pager --output=short-monotonic")
        assert "Startup finished in" in journal
        assert complaints(journal) == []
        assert debian("WORK=/tmp/work PYTHON=/usr/bin/python3 sh /dev/vdb") == natively(tmp_path)
        debian.power_off()
    check_file_system(disk)
