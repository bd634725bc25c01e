"""Images whose host fails for real: the guest gets errors, not data, and what it was told is written can be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skep.devices.virtio.blk import T_FLUSH, T_IN, T_OUT
from tests.devices.virtio.disk import Disk, disk

MIB = 1 << 20
OK, IOERR = 0, 1


def fill(made: Disk) -> tuple[list[int], list[int]]:
    """Write the whole disk, 4096 bytes at a time: the blocks that took it, and those that did not."""
    made.start()
    taken, refused = [], []
    for block in range(made.blk.backend.size // 4096):
        status, _, _ = made.request(T_OUT, 8 * block, out=[block.to_bytes(4, "little") * 1024])
        assert status in (OK, IOERR)
        (refused if status else taken).append(block)
    for block in taken:
        assert made.read(8 * block, 4096) == block.to_bytes(4, "little") * 1024
    assert made.driver.status == 15 and len(made.told) == 1, made.told
    return taken, refused


FULL = """
import subprocess, sys
from pathlib import Path
from tests.devices.virtio.disk import disk
from tests.devices.virtio.test_failing_host import MIB, fill
room = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(room)], check=True)
with (room / "disk").open("wb") as file:
    file.truncate(2 * MIB)
with disk(room / "disk") as made:
    taken, refused = fill(made)
    assert len(taken) >= 200 and len(refused) >= 256, (taken, refused)
    assert "No space left on device" in made.told[0], made.told
"""

LIMITED = """
import resource, sys
from pathlib import Path
from tests.devices.virtio.disk import disk
from tests.devices.virtio.test_failing_host import MIB, fill
path = Path(sys.argv[1], "disk")
path.write_bytes(bytes(2 * MIB))
resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
with disk(path) as made:
    taken, refused = fill(made)
    assert taken == list(range(256)) and refused == list(range(256, 512))
    assert "File too large" in made.told[0], made.told
assert path.read_bytes()[MIB:] == bytes(MIB)
"""


LOST = """
import subprocess, sys
from pathlib import Path
from skep.devices.virtio.blk import T_FLUSH, T_OUT
from tests.devices.virtio.disk import disk
from tests.devices.virtio.test_failing_host import IOERR, MIB, OK
room = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(room)], check=True)
with (room / "disk").open("wb") as file:
    file.truncate(2 * MIB)
command = ["losetup", "-f", "--show", str(room / "disk")]
device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
try:
    with disk(Path(device)) as made:
        made.start()
        # A loop device takes a write that is cut short for one that was made, so all of the second is to fail.
        made.write(0, b"x" * (64 << 10))
        assert made.request(T_FLUSH)[0] == OK
        assert made.request(T_OUT, 1024, out=[b"x" * 4096])[0] == OK
        assert made.request(T_FLUSH)[0] == IOERR
        assert made.request(T_FLUSH)[0] == IOERR, "what was lost stays lost"
        made.driver.set_config(32, 1, 0)
        assert made.request(T_OUT, 0, out=[b"x" * 4096])[0] == IOERR, "nor can a write be durable"
finally:
    subprocess.run(["losetup", "-d", device], check=True)
"""


def run(*command: str) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_full_file_system(tmp_path: Path) -> None:
    apart = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespace to mount in")
    run(*apart, sys.executable, "-c", FULL, str(tmp_path))


def test_writes_that_the_host_loses_later(tmp_path: Path) -> None:
    """The host took them into its cache, and cannot write them back."""
    found = subprocess.run(["losetup", "-f"], check=False, capture_output=True)
    if os.geteuid() or found.returncode:
        pytest.skip("no loop device")
    run("unshare", "--mount", sys.executable, "-c", LOST, str(tmp_path))


def test_a_limit_of_file_sizes(tmp_path: Path) -> None:
    run(sys.executable, "-c", LIMITED, str(tmp_path))


def test_a_file_that_somebody_truncates(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with disk(path, os.urandom(MIB)) as made:
        made.start()
        assert len(made.read(1024, 4096)) == 4096
        os.truncate(path, MIB // 2)
        for sector in (1024, 1016, 2040):
            expected = IOERR if sector >= 1024 else OK
            assert made.request(T_IN, sector, room=[4096])[0] == expected
        status, _, _ = made.request(T_IN, 1020, room=[4096])
        assert status == IOERR, "half of it is not there"
        assert made.told[0].endswith("because of its image: the image ends before the disk does")
        made.write(2040, b"x" * 4096)  # which makes it as long as before
        assert made.read(1024, 4096) == bytes(4096)


def test_a_block_device_whose_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "backing"
    path.write_bytes(os.urandom(MIB))
    command = ["losetup", "-f", "--show", str(path)]
    made = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        with disk(Path(device), no_cache=True) as one:
            one.start()
            assert len(one.read(2040, 4096)) == 4096
            os.truncate(path, 4096)
            assert one.request(T_IN, 2040, room=[4096])[0] == IOERR
            assert one.request(T_IN, 0, room=[4096])[0] == OK
            assert one.request(T_FLUSH)[0] == OK
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=20)
