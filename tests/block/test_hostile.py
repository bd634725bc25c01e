"""No image makes us do anything but refuse it, whatever is in it, in little time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORMATS = ("qcow2", "vhdx", "vmdk", "vpc", "vdi", "qcow", "parallels", "dmg", "luks")
MEMORY = 100 << 10
"""KiB: of the process, with the interpreter, the test's own code and its sound images."""


def harm(format: str, count: int, seed: int, seconds: int) -> None:
    command = [sys.executable, "-m", "tests.block.hostile", format, str(count), str(seed)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < MEMORY, done.stdout


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_images(format: str) -> None:
    harm(format, 500 if format == "qcow2" else 2000, 0, 200)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_many_damaged_images(format: str) -> None:
    harm(format, 50_000, 1, 6000)
