"""A Linux at work, copied while it runs as a live migration would: each engine tells all that was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from skep.guest.debian import Guest
from skep.memory import GuestMemory
from skep.memory.dirty import dirty_ranges
from tests.linux import Linux

PIECE = 1 << 20
WORK = (
    "for i in 1 2 3 4 5 6 7 8; do (echo $i; true) > /dev/null; done",
    "cat /proc/kallsyms | gzip | gunzip | md5sum",
    "dd if=/dev/vda of=/tmp/disk bs=64k 2> /dev/null; sha256sum /tmp/disk",
    "dd if=/dev/urandom of=/dev/vda bs=4k count=64 2> /dev/null; sync",
    "echo 3 > /proc/sys/vm/drop_caches; ls -lR / | md5sum",
)


def follow(memory: GuestMemory, copy: bytearray) -> int:
    """Copy what was written since the last time. Returns how many bytes."""
    copied = 0
    for gpa, n in dirty_ranges(memory.take_dirty()):
        with memory.view(gpa, n) as view:
            copy[gpa : gpa + n] = view
        copied += n
    return copied


@pytest.mark.slow
def test_a_copy_of_a_guest_at_work_is_complete(guest: Guest, engine: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(range(256)) * (4 << 12))
    with Linux(guest, engine=engine, memory="128M", cpus=2, disks=[disk]) as linux:
        memory = linux.vm.board.memory
        memory.start_dirty()
        copy = bytearray(memory.read(0, memory.size))
        for command in WORK:
            linux.begin(command)
            for _ in range(3):
                assert follow(memory, copy) < memory.size
            linux.end()
        linux.vm.freeze()
        follow(memory, copy)
        differ = [at for at in range(0, memory.size, PIECE) if copy[at : at + PIECE] != memory.read(at, PIECE)]
        assert not differ
        assert not any(memory.take_dirty())
        linux.vm.thaw()
        memory.stop_dirty()
        linux.power_off()
