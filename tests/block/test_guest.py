"""A Linux guest and its disk: what it wrote is there, whatever ends it.

These boot Debian's cloud kernel by whatever engine this host has.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import skep
from skep.block.record import Entry, Kind, mark, read_log, replay
from skep.guest.debian import Guest
from tests.linux import BOOT, Linux, command_line

MIB = 1 << 20
CUTS = 100
KILLS = [2, pytest.param(10, marks=pytest.mark.slow)]

# On the first disk a file system, on the second the records alone, a sector each.
RECORDS = """
mkdir -p /mnt && mount -t ext4 /dev/vda /mnt || exit 1
i=$FIRST
while [ $i -lt $LAST ]; do
    i=$((i + 1))
    echo "record $i" > /mnt/r.$i
    echo "junk $i" >> /mnt/junk
    dd if=/mnt/r.$i of=/dev/vdb bs=512 seek=$i conv=notrunc,sync,fsync 2> /dev/null || exit 2
    sync
    echo "SYNCED $i"
done
"""

# Several at once, so that writes of one are under way while another flushes.
WRITERS = """
writer() {
    i=0
    while [ $i -lt 25 ]; do
        i=$((i + 1))
        echo "writer $1 record $i" | dd of=/dev/vda bs=512 seek=$(($1 * 100 + i)) conv=notrunc,sync,fsync 2> /dev/null
        echo "SYNCED $1 $i"
    done
}
for number in 0 1 2 3; do
    writer $number &
done
wait
"""


def records(first: int, last: int) -> str:
    return f"FIRST={first} LAST={last}\n{RECORDS}"


@pytest.fixture
def disks(tmp_path: Path) -> tuple[Path, Path]:
    """An ext4 file system with a journal, and nothing."""
    files, raw = tmp_path / "files.img", tmp_path / "raw.img"
    for path in (files, raw):
        with path.open("wb") as file:
            file.truncate(16 * MIB)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-O", "has_journal", str(files))
    return files, raw


def run(*command: str, statuses: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode in statuses, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def check_records(files: Path, raw: Path, synced: int) -> None:
    """Everything that the guest said was synced is there; the file system needs its journal, and no more."""
    run("e2fsck", "-f", "-y", "-E", "journal_only", str(files), statuses=(0, 1))
    run("e2fsck", "-f", "-n", str(files))
    out = files.with_name("out")
    run("rm", "-rf", str(out))
    out.mkdir()
    run("debugfs", "-R", f"rdump / {out}", str(files))
    sectors = raw.read_bytes()
    for number in range(1, synced + 1):
        text = f"record {number}\n"
        assert (out / f"r.{number}").read_text() == text
        assert sectors[512 * number : 512 * number + 512] == text.encode().ljust(512, b"\0")


def test_what_a_guest_copied_is_on_the_disk(guest: Guest, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    with Linux(guest, disks=[image]) as linux:
        linux("mkfs.ext2 /dev/vda && mount /dev/vda /mnt")
        linux("head -c 3000001 /dev/urandom > /mnt/file && sync")
        digest = linux("sha256sum /mnt/file").split()[0]
        linux("umount /mnt")
        linux.power_off()
    run("e2fsck", "-f", "-n", str(image))
    run("debugfs", "-R", f"dump /file {tmp_path / 'file'}", str(image))
    assert run("sha256sum", str(tmp_path / "file")).split()[0] == digest


def losses(entries: list[Entry], lucky: bool) -> int:
    """How many of 100 cuts lose a record that its writer knew to be synced."""
    rng = random.Random(7)
    lost = 0
    for _ in range(CUTS):
        cut = entries[: rng.randint(0, len(entries))]
        image = os.memfd_create("image")
        replay(cut, image, rng if lucky else None)
        for entry in cut:
            if entry.kind is Kind.MARK:
                writer, record = map(int, entry.data.split())
                text = f"writer {writer} record {record}\n".encode()
                if os.pread(image, 512, 512 * (writer * 100 + record)) != text.ljust(512, b"\0"):
                    lost += 1
                    break
        os.close(image)
    return lost


def test_what_several_writers_synced_survives_100_power_cuts(guest: Guest, tmp_path: Path) -> None:
    disk, path = tmp_path / "disk.img", tmp_path / "log"
    disk.write_bytes(bytes(MIB))
    with skep.Vm(
        kernel=guest.kernel,
        initrd=guest.initrd,
        memory="512M",
        cmdline=command_line(WRITERS),
        disks=[f"{disk},record={path}"],
    ) as vm:
        log = os.open(path, os.O_WRONLY | os.O_APPEND)
        vm.start()
        while said := vm.console.expect(r"SYNCED (\d+ \d+)\r\n|EXIT 0", timeout=BOOT)[1]:
            mark(log, said.encode())
        vm.wait(timeout=60)
        os.close(log)
    entries = read_log(str(path))
    assert sum(entry.kind is Kind.MARK for entry in entries) == 100
    assert losses(entries, lucky=False) == losses(entries, lucky=True) == 0
    # And it would be noticed: a disk whose flushes cover one write less loses something.
    lying = [Entry(e.kind, e.offset - 1, e.data) if e.kind is Kind.FLUSH else e for e in entries]
    assert losses(lying, lucky=False) > CUTS // 10


@pytest.mark.parametrize("kills", KILLS)
def test_everything_synced_survives_kill_9(guest: Guest, disks: tuple[Path, Path], kills: int) -> None:
    rng = random.Random(9)
    synced = 0
    for _ in range(kills):
        enough = synced + rng.randint(1, 30)
        with session(guest, disks, records(synced, 20_000)) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said = re.search(r"SYNCED (\d+)", line)
                if said and int(said[1]) >= enough:
                    break
                assert "EXIT" not in line, line
            time.sleep(rng.random() / 4)
            process.kill()
            for line in process.stdout:  # what was said before the end counts
                said = re.search(r"SYNCED (\d+)\s*\n", line) or said
            assert said, "the guest never came so far"
            synced = int(said[1])
        check_records(*disks, synced)


@contextmanager
def session(guest: Guest, disks: tuple[Path, Path], script: str) -> Iterator[subprocess.Popen[str]]:
    source = str(Path(skep.__file__ or "").parent.parent)
    command = [sys.executable, "-m", "skep.cli", "run", "--memory", "512M", "--cmdline", command_line(script)]
    command += ["--kernel", str(guest.kernel), "--initrd", str(guest.initrd)]
    for disk in disks:
        command += ["--disk", str(disk)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": source},
    ) as process:
        try:
            yield process
        finally:
            process.kill()
