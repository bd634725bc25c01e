"""What a Linux guest may do to its disks besides reading and writing: discard, zeros, queues, sizes of blocks."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from skep.guest.debian import Guest
from tests.linux import Linux
from tests.programs import add_programs

MIB = 1 << 20


def image(path: Path, size: int, seed: int | None = None) -> Path:
    path.write_bytes(bytes(size) if seed is None else random.Random(seed).randbytes(size))
    return path


def kib(path: Path) -> int:
    """What it takes of the host's disk."""
    return path.stat().st_blocks // 2


def test_discard_and_zeros(guest: Guest, tmp_path: Path) -> None:
    initrd = add_programs(guest.initrd, tmp_path / "initrd", ["blkdiscard", "fallocate"])
    trimmed = image(tmp_path / "trimmed", 8 * MIB, seed=1)
    kept = image(tmp_path / "kept", 8 * MIB, seed=2)
    files = image(tmp_path / "files", 32 * MIB)
    large = image(tmp_path / "large", 4 * MIB, seed=3)
    content, other = bytearray(trimmed.read_bytes()), bytearray(kept.read_bytes())
    disks = [f"{trimmed},queues=4,ser=TRIM-1", f"{kept},nodelete", str(files), f"{large},sectorsize=512/4096"]
    with Linux(Guest(guest.kernel, initrd), disks=disks) as linux:

        def limit(name: str) -> list[str]:
            return linux(f"cat /sys/block/vd?/queue/{name}").split()

        assert limit("discard_max_bytes") == [str(1 << 31), "0", str(1 << 31), str(1 << 31)]
        assert limit("write_zeroes_max_bytes") == [str(1 << 26)] * 4
        assert limit("physical_block_size") == ["512", "512", "512", "4096"]
        assert limit("logical_block_size") == ["512"] * 4
        assert linux("cat /sys/block/vda/serial") == "TRIM-1"
        last = int(linux("cat /sys/devices/system/cpu/possible").strip().split("-")[-1])
        assert linux("ls /sys/block/vda/mq").split() == [str(number) for number in range(min(4, last + 1))]
        assert linux("ls /sys/block/vdb/mq").split() == ["0"]

        # Discarded: the host has its space back. Zeroed: it reads as zeros, and is the guest's as before.
        before = kib(trimmed)
        linux("/bin/blkdiscard -o 1M -l 2M /dev/vda")
        content[MIB : 3 * MIB] = bytes(2 * MIB)
        assert kib(trimmed) <= before - 2000
        linux("/bin/blkdiscard -z -o 4M -l 1M /dev/vda")
        linux("/bin/fallocate -z -o 6M -l 64K /dev/vda")
        content[4 * MIB : 5 * MIB] = bytes(MIB)
        content[6 * MIB : 6 * MIB + 65536] = bytes(65536)
        linux("/bin/fallocate -p -o 7M -l 512 /dev/vda")
        content[7 * MIB : 7 * MIB + 512] = bytes(512)
        linux("/bin/blkdiscard -o 3M -l 512 /dev/vda && /bin/blkdiscard -z -o 3M -l 512 /dev/vda")
        content[3 * MIB : 3 * MIB + 512] = bytes(512)
        linux("/bin/blkdiscard /dev/vdb", status=1)
        linux("/bin/blkdiscard -z -o 512K -l 1M /dev/vdb")
        other[MIB // 2 : 3 * MIB // 2] = bytes(MIB)

        # A file system that trims.
        linux("mkfs.ext2 /dev/vdc && mount /dev/vdc /mnt && dd if=/dev/urandom of=/mnt/file bs=1M count=20 && sync")
        before = kib(files)
        linux("rm /mnt/file && sync && fstrim /mnt")
        assert kib(files) < before - 19_000
        linux("umount /mnt")

        # Around the guest's cache, and in the middle of a block of the host's.
        linux("dd if=/dev/zero of=/dev/vdd bs=512 seek=3 count=2 oflag=direct conv=notrunc")
        digest = linux("dd if=/dev/vdd bs=1M iflag=direct 2> /dev/null | sha256sum").split()[0]
        linux("dmesg -c > /dev/null")  # where it complains of what it could not discard
        linux.power_off()
    assert trimmed.read_bytes() == content
    assert kept.read_bytes() == other and kib(kept) >= 8 * 1024
    zeroed = bytearray(random.Random(3).randbytes(4 * MIB))
    zeroed[3 * 512 : 5 * 512] = bytes(1024)
    assert large.read_bytes() == zeroed
    assert digest == hashlib.sha256(zeroed).hexdigest()


def test_a_queue_for_each_processor(guest: Guest, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk", 8 * MIB, seed=4)
    with Linux(guest, cpus=2, disks=[disk]) as linux:
        assert linux("ls /sys/block/vda/mq; cat /sys/block/vda/mq/?/cpu_list").split() == ["0", "1", "0", "1"]
        whole = hashlib.sha256(disk.read_bytes()).hexdigest()
        for cpu in (0, 1):
            before = interrupts(linux)
            command = f"taskset {1 << cpu} dd if=/dev/vda bs=64k iflag=direct 2> /dev/null | sha256sum"
            assert linux(command).split()[0] == whole
            after = interrupts(linux)
            assert after[cpu] - before[cpu] >= 10 and after[1 - cpu] - before[1 - cpu] < 10
        linux.power_off()


def interrupts(linux: Linux) -> list[int]:
    """How many have come from each of the disk's queues."""
    lines = linux("grep virtio0-req /proc/interrupts").splitlines()
    return [sum(map(int, line.split()[1:3])) for line in lines]
