"""A guest on each engine: its processors, its memory, its disk and its time are there, and it has nothing to complain
of."""

from __future__ import annotations

from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.linux import Linux

DISK = 4 << 20


@pytest.mark.parametrize("cpus", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 8))])
def test_processors_and_a_disk(guest: Guest, engine: str, tmp_path: Path, cpus: int) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(range(256)) * (DISK // 256))
    with Linux(guest, engine=engine, cpus=cpus, disks=[disk]) as linux:
        assert linux("nproc; grep -c ^processor /proc/cpuinfo").split() == [str(cpus)] * 2
        assert 0.85 < int(linux("grep MemTotal /proc/meminfo").split()[1]) / (512 << 10) < 1
        # Every processor reads the whole disk, and then writes a block of its own.
        for number in range(cpus):
            linux(f"taskset {1 << number:x} cat /dev/vda | md5sum > /tmp/sum")
            linux(f"(echo {number}; cat /dev/zero) | taskset {1 << number:x} dd of=/dev/vda bs=4k seek={number} count=1"
                  " iflag=fullblock oflag=direct 2> /dev/null")
        assert linux("sleep 0.1; echo slept") == "slept\n"
        linux.power_off()
    assert [disk.read_bytes()[4096 * n :][:2] for n in range(cpus)] == [b"%d\n" % n for n in range(cpus)]
