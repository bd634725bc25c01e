"""What an image takes of this host: memory that does not grow with it, files and reads that grow with its chain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import skep
from skep.block.backend import read_at, write_at
from skep.block.format import BackingName
from skep.block.image import create_image, open_image

MIB, TIB = 1 << 20, 1 << 40
MOST = 60
"""MiB of memory."""

USE = """
import random, re, sys
from skep.block.backend import read_at, write_at
from skep.block.format import Can
from skep.block.image import create_image, open_image

format, path, size, options, secrets = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4]), {"s": b"x"}
create_image(path, format, size, options=options, secrets=secrets)
told = {"key-secret": "s"} if format == "luks" else {}
rng = random.Random(1)
with open_image(path, format=format, options=told, secrets=secrets) as image:
    image.info(), image.allocated()
    for _ in range(200):
        at = rng.randrange(image.size // 512) * 512
        write_at(image, at, b"x" * 512)
        assert read_at(image, at, 512) == b"x" * 512
    image.flush()
    if Can.SNAPSHOT in image.can:
        image.snapshot_create("s")
        image.snapshot_apply("s")
    if Can.CHECK in image.can:
        assert not image.check().corruptions
with open("/proc/self/status") as status:
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) >> 10)  # ru_maxrss has what forked us in it
"""
LARGE: Mapping[str, tuple[str, int, Mapping[str, str]]] = {
    "raw": ("raw", 7 * TIB, {}),
    "qcow2": ("qcow2", 512 * TIB, {}),
    "qcow2, the largest": ("qcow2", 2048 * TIB, {}),
    "qcow2, small clusters": ("qcow2", TIB // 64, {"cluster_size": "512"}),
    "qcow2, large clusters": ("qcow2", 64 * TIB, {"cluster_size": "2M", "extended_l2": "on"}),
    "vhdx": ("vhdx", 64 * TIB, {}),
    "vmdk": ("vmdk", 2 * TIB, {}),
    "vmdk in pieces": ("vmdk", TIB // 4, {"subformat": "twoGbMaxExtentSparse"}),
    "vpc": ("vpc", 2040 << 30, {"force_size": "on"}),
    "vdi": ("vdi", 4 * TIB, {}),
    "luks": ("luks", 7 * TIB, {"key-secret": "s", "iter-time": "1"}),
}


@pytest.mark.parametrize("which", LARGE)
def test_memory(tmp_path: Path, which: str) -> None:
    format, size, options = LARGE[which]
    command = [sys.executable, "-c", USE, format, str(tmp_path / "disk"), str(size), repr(dict(options))]
    sources = {**os.environ, "PYTHONPATH": str(Path(skep.__file__ or "").parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=sources)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MOST


def reads() -> int:
    """System calls of this process that read, so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("syscr:")).split()[1])


def test_a_chain_opens_in_time_linear_in_its_length(tmp_path: Path) -> None:
    """By the reads that each layer costs, and the files that are open then."""
    create_image(tmp_path / "0", "qcow2", MIB)
    with open_image(tmp_path / "0") as image:
        write_at(image, 0, b"at the bottom".ljust(512))
    for i in range(1, 51):
        below = BackingName(str(i - 1), "qcow2")
        create_image(tmp_path / str(i), "qcow2", MIB, backing=below, check_backing=False)
    cost = {}
    for length in (1, 25, 50):
        before, files = reads(), len(os.listdir("/proc/self/fd"))
        with open_image(tmp_path / str(length)) as image:
            cost[length] = reads() - before
            assert len(os.listdir("/proc/self/fd")) - files == length + 1
            assert read_at(image, 0, 13) == b"at the bottom"
    each = (cost[50] - cost[25]) / 25
    assert each <= 8 and cost[50] <= cost[1] + 50 * each
