"""Disks of a TiB, and more: little memory, whatever is done with them, and little time to open one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from skep.block.image import create_image

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


@pytest.mark.parametrize("format", ["vhdx", "vmdk", "vpc", "vdi"])
def test_opening_takes_little_time(tmp_path: Path, format: str) -> None:
    """Tens of milliseconds of CPU above what Python itself takes; more here, for machines that have much else to do."""
    path = tmp_path / "disk"
    create_image(path, format, 1 << 40)
    opening = "import sys; from skep.block.image import open_image; open_image(sys.argv[1], read_only=True).info()"
    took = min(python(opening, path)[1] for _ in range(3)) - min(python("", path)[1] for _ in range(3))
    assert took < 0.3, took
