"""What a Linux guest sees of its disks, and what it may do to them."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skep.block.record import Entry, Kind, read_log
from skep.guest.debian import Guest
from tests.linux import Linux

MIB = 1 << 20
SERIAL = "A serial of 20 bytes"


def image(path: Path, size: int, seed: int | None = None) -> Path:
    path.write_bytes(bytes(size) if seed is None else random.Random(seed).randbytes(size))
    return path


def flushes_behind(log: list[Entry], first: int, last: int) -> list[bool]:
    """For each write to the sectors from ``first`` to ``last``: whether it was durable before the next was made."""
    found, writes = [], 0
    for at, entry in enumerate(log):
        if entry.kind is Kind.WRITE:
            writes += 1
            if first <= entry.offset // 512 <= last:
                behind = log[at + 1] if at + 1 < len(log) else None
                found.append(behind is not None and behind.kind is Kind.FLUSH and behind.offset >= writes)
    return found


def test_what_a_guest_sees_of_four_disks(guest: Guest, tmp_path: Path) -> None:
    switched = image(tmp_path / "switched", MIB)
    fixed = image(tmp_path / "fixed", 2 * MIB, seed=1)
    through = image(tmp_path / "through", 3 * MIB)
    large = image(tmp_path / "large", 4 * MIB)
    disks = [
        f"{switched},ser={SERIAL},record={tmp_path / 'switched.log'}",
        f"{fixed},ro",
        f"{through},wce=false,record={tmp_path / 'through.log'}",
        f"{large},sectorsize=4096",
    ]
    before = fixed.read_bytes()
    with Linux(guest, disks=disks) as linux:

        def attributes(name: str) -> list[str]:
            return linux(f'for disk in vda vdb vdc vdd; do echo "$(cat /sys/block/$disk/{name})"; done').splitlines()

        assert attributes("size") == ["2048", "4096", "6144", "8192"]
        assert attributes("ro") == ["0", "1", "0", "0"]
        assert attributes("serial")[0] == SERIAL
        assert len(set(attributes("serial"))) == 4
        assert attributes("queue/logical_block_size") == ["512", "512", "512", "4096"]
        assert attributes("cache_type") == ["write back", "write back", "write through", "write back"]
        assert attributes("queue/write_cache") == attributes("cache_type")

        # Each disk is itself.
        assert linux("sha256sum < /dev/vdb").split()[0] == hashlib.sha256(before).hexdigest()
        linux("dd if=/dev/vdb of=/dev/vdd bs=64k 2> /dev/null && sync")
        linux("dd if=/dev/vdb of=/dev/vdc bs=4096 count=1 2> /dev/null")

        # The cache, as it is and switched both ways. When a device is closed, Linux writes, and sends no flush.
        write = "dd if=/dev/urandom of=/dev/vda bs=4096 count=1"
        linux(f"{write} seek=0 2> /dev/null")
        linux("echo 'write through' > /sys/block/vda/cache_type")
        assert attributes("cache_type")[0] == attributes("queue/write_cache")[0] == "write through"
        linux(f"{write} seek=1 2> /dev/null")
        linux("echo 'write back' > /sys/block/vda/cache_type")
        assert attributes("cache_type")[0] == attributes("queue/write_cache")[0] == "write back"
        linux(f"{write} seek=2 2> /dev/null")

        # Not even root writes to a disk that is read-only.
        linux("dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync", status=1)
        linux("blockdev --setrw /dev/vdb; dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync; true")
        linux("dmesg -c > /dev/null")  # where it told of that
        linux.power_off()
    assert fixed.read_bytes() == before
    assert large.read_bytes() == before + bytes(2 * MIB)
    assert through.read_bytes() == before[:4096] + bytes(3 * MIB - 4096)
    log = read_log(str(tmp_path / "switched.log"))
    assert flushes_behind(log, 0, 7) == [False]
    assert flushes_behind(log, 8, 15) == [True]
    assert flushes_behind(log, 16, 23) == [False]
    assert flushes_behind(read_log(str(tmp_path / "through.log")), 0, 7) == [True]


def refused(*command: str) -> tuple[int, list[str]]:
    """With what status a command ends, and the lines of its complaint."""
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "src"},
        timeout=60,
    )
    return done.returncode, done.stderr.splitlines()


def test_freezes_under_load_locks_and_a_reboot(guest: Guest, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk", 32 * MIB)
    with Linux(guest, disks=[disk]) as linux:
        linux("mkfs.ext2 /dev/vda && mount /dev/vda /mnt")

        # While a guest writes, the image is its own.
        skep_run = (sys.executable, "-m", "skep.cli", "run", "--kernel", str(guest.kernel), "--disk", str(disk))
        linux.begin("for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/mnt/$i bs=4k count=256 conv=fsync || exit; done")
        status, lines = refused(*skep_run)
        assert (status, len(lines)) == (2, 1) and lines[0].startswith(f"skep: {disk}: the image is in use by "), lines
        status, lines = refused("qemu-img", "resize", "-f", "raw", str(disk), "64M")
        assert status == 1 and 'Failed to get "write" lock' in lines[0], lines

        # Frozen, it writes no more; thawed, it goes on where it was.
        for _ in range(5):
            linux.vm.freeze()
            held = hashlib.sha256(disk.read_bytes()).digest()
            time.sleep(0.2)
            assert hashlib.sha256(disk.read_bytes()).digest() == held
            linux.vm.thaw()
            time.sleep(0.05)
        linux.end()
        digests = linux("cat /mnt/? | sha256sum; sync; umount /mnt").split()[0]

        # After a reboot in this process the disk works as before, and holds what was written.
        linux.begin("reboot -f")
        linux.wait_ready()
        assert linux("mount /dev/vda /mnt && cat /mnt/? | sha256sum").split()[0] == digests
        linux("umount /mnt")
        linux.power_off()
    checked = subprocess.run(["e2fsck", "-f", "-n", str(disk)], check=False, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
def test_reboots_with_a_disk_under_load(guest: Guest, tmp_path: Path) -> None:
    """A reset comes in the middle of requests; the next boot's disk works."""
    rng = random.Random(1)
    disk = image(tmp_path / "disk", 32 * MIB)
    with Linux(guest, disks=[disk]) as linux:
        for _ in range(5):
            linux("mkfs.ext2 /dev/vda && mount /dev/vda /mnt")
            linux.begin(
                "echo o$((1))k; while true; do dd if=/dev/urandom of=/mnt/file bs=4k count=256 conv=fsync || exit; done"
            )
            linux.vm.console.expect("o1k")  # it has read all of that, and leaves nothing to the next boot
            time.sleep(rng.random())
            linux.vm.reset()
            linux.wait_ready()
        linux.power_off()
