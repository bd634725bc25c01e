"""Disks of a TiB, and more: little memory, whatever is done with them, and little time to open one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName, ImageError
from skep.block.image import create_image, open_image
from skep.block.qcow2.create import parse_size
from skep.block.qcow2.image import Qcow2Image

USE = r"""
import random, re, sys
from skep.block.backend import read_at, write_at
from skep.block.image import open_image

with open_image(sys.argv[1], format=sys.argv[2]) as image:
    rng = random.Random(1)
    places = [rng.randrange(image.size // 512) * 512 for _ in range(1000)]
    for place in places:
        write_at(image, place, place.to_bytes(512, "little"))
with open_image(sys.argv[1], format=sys.argv[2]) as image:
    assert all(int.from_bytes(read_at(image, place, 512), "little") == place for place in places[::10])
    at = 0
    for extent in image.extents():
        assert extent.offset == at
        at += extent.length
    assert at == image.size
    assert image.check().clean
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])  # ru_maxrss has what forked us in it
"""
LARGE = (
    ("qcow2", 1 << 40, {"cluster_size": "2M"}),
    pytest.param("qcow2", 1 << 40, {}, marks=pytest.mark.slow),
    pytest.param("qcow2", 1 << 46, {"extended_l2": "on"}, marks=pytest.mark.slow),
    ("vhdx", 1 << 40, {}),
    pytest.param("vhdx", 1 << 46, {"block_size": "1M"}, marks=pytest.mark.slow),
    ("vmdk", 1 << 40, {}),
    ("vmdk", 1 << 40, {"subformat": "streamOptimized"}),
    ("vpc", 1 << 40, {}),
    ("vdi", 1 << 40, {}),
)


def python(code: str, *arguments: str | Path) -> tuple[str, float]:
    """What it prints, and the seconds of CPU that it took, the interpreter's start with them."""
    before = os.times()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    after = os.times()
    return done.stdout, after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize(("format", "size", "options"), LARGE)
def test_memory_is_bounded(tmp_path: Path, format: str, size: int, options: Mapping[str, str]) -> None:
    path = tmp_path / "disk"
    create_image(path, format, size, options=options)
    said, _ = python(USE, path, format)
    assert int(said) < 60 << 10


@pytest.mark.parametrize("format", ["qcow2", "vhdx", "vmdk", "vpc", "vdi"])
def test_opening_takes_little_time(tmp_path: Path, format: str) -> None:
    """Tens of milliseconds of CPU above what Python itself takes; more here, for machines that have much else to do."""
    path = tmp_path / "disk"
    create_image(path, format, 1 << 40)
    opening = "import sys; from skep.block.image import open_image; open_image(sys.argv[1], read_only=True).info()"
    took = min(python(opening, path)[1] for _ in range(3)) - min(python("", path)[1] for _ in range(3))
    assert took < 0.3, took


def test_a_chain_opens_in_time_linear_in_its_length(tmp_path: Path) -> None:
    create_image(tmp_path / "0", "qcow2", 1 << 30)
    for i in range(1, 101):
        below = BackingName(f"{i - 1}", "qcow2")
        create_image(tmp_path / f"{i}", "qcow2", 1 << 30, backing=below, check_backing=False)
    opening = "import sys; from skep.block.image import open_image; open_image(sys.argv[1], read_only=True)"
    base, short, long = (min(python(opening, tmp_path / name)[1] for _ in range(3)) for name in ("0", "50", "100"))
    assert long - base < 3 * (short - base) + 0.02, (base, short, long)


@pytest.mark.parametrize("size", ["0", "64k", "1M"])
def test_tables_in_memory_are_as_many_as_is_said(tmp_path: Path, size: str) -> None:
    """And a copy that has room for few of them is the same disk."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", 4 << 30, options={"cluster_size": "4k"})
    options = {"l2-cache-size": size, "refcount-cache-size": size}
    chance = random.Random(3)
    places = [chance.randrange((4 << 30) // 4096) * 4096 for _ in range(1000)]
    with open_image(path, format="qcow2", options=options) as image:
        for place in places:
            write_at(image, place, place.to_bytes(4096, "little"))
        most = max(8, (parse_size(size) or 0) // 4096)
        assert isinstance(image, Qcow2Image) and image.tables_in_memory <= most + 2
    with open_image(path, format="qcow2", read_only=True, options=options) as image:
        assert all(int.from_bytes(read_at(image, place, 4096), "little") == place for place in places)
        assert image.check().clean


@pytest.mark.parametrize("size", ["-1", "2G", "much"])
def test_a_size_of_tables_that_will_not_do(tmp_path: Path, size: str) -> None:
    create_image(tmp_path / "disk.qcow2", "qcow2", 1 << 20)
    with pytest.raises(ImageError, match="l2-cache-size"):
        open_image(tmp_path / "disk.qcow2", format="qcow2", options={"l2-cache-size": size})
