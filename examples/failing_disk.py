"""A disk that goes bad under a running guest: reads of some sectors fail from a moment on that the program chooses.

    python examples/failing_disk.py KERNEL INITRD
"""

from __future__ import annotations

import errno
import sys
import tempfile
from pathlib import Path

import skep
from skep.block.backend import BlockBackend, Buffers
from skep.devices.virtio.blk import VirtioBlk
from skep.devices.virtio.pci import VirtioPci

SECTOR = 512


class Failing:
    """A layer over any backend."""

    def __init__(self, backend: BlockBackend) -> None:
        self._backend = backend
        self.size, self.read_only, self.write_cache = backend.size, backend.read_only, backend.write_cache
        self.pwritev, self.write_now, self.flush = backend.pwritev, backend.write_now, backend.flush
        self.discard, self.write_zeroes, self.close = backend.discard, backend.write_zeroes, backend.close
        self.bad: set[int] = set()
        """Sectors that cannot be read."""

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False  # so that every read comes by preadv

    def locate(self, offset: int, length: int, write: bool) -> None:
        return None  # as above

    def preadv(self, buffers: Buffers, offset: int) -> None:
        first, count = offset // SECTOR, sum(map(len, buffers)) // SECTOR
        if not self.bad.isdisjoint(range(first, first + count)):
            raise OSError(errno.EIO, "the medium has an error")
        self._backend.preadv(buffers, offset)


def break_a_disk(kernel: str, initrd: str, image: Path) -> tuple[str, str]:
    """What the guest says of the same read before and after the disk went bad."""
    image.write_bytes(bytes(range(256)) * 8192)
    command_line = "console=ttyS0 quiet"
    with skep.Vm(kernel=kernel, initrd=initrd, memory="512M", cmdline=command_line, disks=[image]) as vm:
        functions = (device.device for device in vm.board.devices if isinstance(device, VirtioPci))
        disk = next(device for device in functions if isinstance(device, VirtioBlk))
        failing = disk.backend = Failing(disk.backend)
        vm.start()
        vm.console.expect("skep# ", timeout=300)

        def read() -> str:
            vm.console.send("dd if=/dev/vda of=/dev/null bs=4k skip=16 count=1 iflag=direct; echo STATUS $?\n")
            done = vm.console.expect(r"STATUS (\d+)\r\n", timeout=60)
            return done.string[: done.end()]

        before = read()
        failing.bad.add(16 * 8 + 3)
        return before, read()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} KERNEL INITRD; `skep guest debian` makes both")
    with tempfile.TemporaryDirectory() as place:
        print(*break_a_disk(sys.argv[1], sys.argv[2], Path(place) / "disk.img"), sep="\n")
