"""Options of a disk, from the command line to the guest; and a host that cannot make durable, as the guest sees it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skep
from skep.block.backend import read_at, write_at
from skep.block.file import open_file
from skep.block.image import create_image, open_image
from skep.block.raw import RawImage
from skep.devices.virtio.blk import VirtioBlk
from skep.devices.virtio.pci import VirtioPci
from skep.guest.debian import Guest
from tests.linux import Linux, command_line
from tests.programs import add_programs

MIB = 1 << 20

LOOK = """
for disk in vda vdb vdc vdd vde; do
    cd /sys/block/$disk
    echo "$disk $(cat ro queue/logical_block_size queue/physical_block_size queue/discard_max_bytes cache_type)"
done | tr '\\n' ' '
echo
cd /
for disk in vda vdb vdc vdd vde; do
    printf "$disk writes "
    dd if=/dev/urandom of=/dev/$disk bs=4096 count=1 seek=8 oflag=direct 2> /dev/null && echo yes || echo no
done
for disk in vda vdd vde; do
    printf "$disk discards "
    /bin/blkdiscard -o 1M -l 1M /dev/$disk 2> /dev/null && echo yes || echo no
done
echo LOOKED
read line
"""


def flags_of(process: int, path: Path) -> int:
    """With which a process has a file open."""
    for number in os.listdir(f"/proc/{process}/fd"):
        if os.readlink(f"/proc/{process}/fd/{number}") == str(path):
            found = re.search(r"flags:\s+(\d+)", Path(f"/proc/{process}/fdinfo/{number}").read_text())
            assert found is not None
            return int(found[1], 8)
    raise AssertionError(f"{path} is not open")


def test_options_from_the_command_line_to_the_guest(guest: Guest, tmp_path: Path) -> None:
    initrd = add_programs(guest.initrd, tmp_path / "initrd", ["blkdiscard"])
    paths = [tmp_path / name for name in ("plain", "direct", "nocache", "ro", "nodelete")]
    for path in paths:
        path.write_bytes(os.urandom(4 * MIB))
    plain, direct, nocache, read_only, kept = paths
    create_image(kept, "qcow2", 4 * MIB)
    with open_image(kept) as image:
        write_at(image, 0, b"x" * 4 * MIB)
    before = read_only.read_bytes()
    try:
        open_file(str(nocache), no_cache=True).close()
    except skep.UserError:
        pytest.skip("no direct I/O on this file system")
    command = [sys.executable, "-m", "skep.cli", "run", "--kernel", str(guest.kernel), "--initrd", str(initrd)]
    command += ["--memory", "512M", "--cmdline", command_line(LOOK)]
    command += ["--disk", str(plain), "--disk", f"{direct},direct", "--disk", f"{nocache},nocache,sectorsize=4096"]
    command += ["--disk", f"{read_only},ro", "--disk", f"{kept},format=qcow2,nodelete,sectorsize=512/4096"]
    environment = {**os.environ, "PYTHONPATH": str(Path(skep.__file__ or "").parent.parent)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
    ) as run:
        assert run.stdin is not None and run.stdout is not None
        said = ""
        for line in run.stdout:
            said += line
            if "LOOKED" in line:
                break
        try:
            assert "LOOKED" in said, said
            flags = {path: flags_of(run.pid, path) for path in paths}
            run.stdin.write("\n")
            run.stdin.close()
            rest = run.stdout.read()
            assert run.wait(60) == 0, said + rest
        finally:
            run.kill()
    assert "vda 0 512 512 2147483648 write back" in said
    assert "vdb 0 512 512 2147483648 write through" in said, "nothing of it is cached anywhere"
    assert "vdc 0 4096 4096 2147483648 write back" in said
    assert "vdd 1 512 512 0" in said
    assert "vde 0 512 4096 0 write back" in said
    writes = re.findall(r"(vd.) writes (\w+)", said)
    assert writes == [("vda", "yes"), ("vdb", "yes"), ("vdc", "yes"), ("vdd", "no"), ("vde", "yes")]
    assert re.findall(r"(vd.) discards (\w+)", said) == [("vda", "yes"), ("vdd", "no"), ("vde", "no")]
    for path, expected in (
        (plain, os.O_RDWR),
        (direct, os.O_RDWR | os.O_DSYNC),
        (nocache, os.O_RDWR | os.O_DIRECT),
        (read_only, os.O_RDONLY),
        (kept, os.O_RDWR),
    ):
        assert flags[path] & (os.O_ACCMODE | os.O_DSYNC | os.O_DIRECT) == expected, path
    assert read_only.read_bytes() == before
    with open_image(kept, format="qcow2", read_only=True) as image:
        assert read_at(image, 0, 32768) == b"x" * 32768 and b"x" * 512 not in read_at(image, 32768, 4096)
        assert read_at(image, MIB, MIB) == b"x" * MIB, "nothing was discarded"


def test_a_flush_that_failed_stays_failed(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host says once that it lost what it had taken; the guest hears of it each time, until the disk is opened
    anew."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MIB))
    sync = os.fdatasync
    bad = [False]
    asked = []

    def fdatasync(fd: int) -> None:
        asked.append(fd)
        if bad[0]:
            bad[0] = False  # as Linux does: the pages are clean then, and the next one succeeds
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    write = "dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync"
    with Linux(guest, disks=[path]) as linux:
        functions = (device.device for device in linux.vm.board.devices if isinstance(device, VirtioPci))
        disk = next(device for device in functions if isinstance(device, VirtioBlk))
        assert isinstance(disk.backend, RawImage)
        linux(write)
        assert asked
        bad[0] = True
        linux(write, status=1)
        before = len(asked)
        linux(f"{write} seek=9", status=1)
        linux("sync /dev/vda", status=1)
        assert len(asked) == before, "nobody asks the host again, which would say that all is well"
        # Nor is a write durable when the cache is off.
        linux("echo 'write through' > /sys/block/vda/cache_type")
        linux("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct", status=1)
        linux("dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct")
        assert "I/O error" in linux("dmesg -c")
    with Linux(guest, disks=[path]) as linux:
        linux(write)
        linux.power_off()
