"""`skep image convert --resume`: killed at any moment and run again, it goes on, and what it makes is right."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skep.block.image import open_image

MIB = 1 << 20
SIZE = 24 * MIB


def source(path: Path) -> None:
    """Data, with holes and zeros, no two pieces alike."""
    rng = random.Random(5)
    with path.open("wb") as file:
        for at in range(0, SIZE, 1 << 16):
            kind = rng.randrange(8)
            if kind:
                file.seek(at)
                file.write(bytes(1 << 16) if kind == 1 else rng.randbytes(1 << 15) + bytes(1 << 15))
        file.truncate(SIZE)


def convert(place: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "skep.cli", "image", "convert", "--resume", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=place, env=environment, stdout=pipe, stderr=pipe, text=True)


def killed(place: Path, note: str, *words: str) -> int:
    """Run until there is a note, and a moment longer; what the note says."""
    running = convert(place, "-r", "8M", *words)
    deadline = time.monotonic() + 100
    while not (place / note).exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.Random(note).random() / 2)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    done = json.loads((place / note).read_text())["done"]
    assert isinstance(done, int)
    return done


@pytest.mark.parametrize(
    "format, extra",
    [
        *(("raw", ()), ("qcow2", ()), ("qcow2", ("-c",)), ("vhdx", ())),
        *(pytest.param(format, (), marks=pytest.mark.slow) for format in ("vmdk", "vdi")),
        pytest.param("vpc", ("-o", "force_size=on"), marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again(tmp_path: Path, format: str, extra: tuple[str, ...]) -> None:
    source(tmp_path / "source")
    words = ("-f", "raw", "-O", format, *extra, "source", "target")
    done = killed(tmp_path, "target.resume", *words)
    again = convert(tmp_path, *words)
    said = again.communicate(timeout=100)
    assert again.returncode == 0 and said[0] == f"Going on at {done} of {SIZE} bytes.\n", said
    assert not [path for path in tmp_path.iterdir() if ".resume" in path.name]
    checks = [["qemu-img", "compare", "-f", "raw", "-F", format, "source", "target"]]
    if format not in ("raw", "vpc"):
        checks.append(["qemu-img", "check", "-q", "-f", format, "target"])
    for check in checks:
        subprocess.run(check, cwd=tmp_path, check=True, timeout=100)
    if format == "qcow2":
        with open_image(tmp_path / "target", read_only=True) as image:
            assert image.check().clean


def test_another_source_begins_anew(tmp_path: Path) -> None:
    source(tmp_path / "source")
    words = ("-f", "raw", "-O", "qcow2", "source", "target")
    killed(tmp_path, "target.resume", *words)
    os.truncate(tmp_path / "source", SIZE - MIB)
    again = convert(tmp_path, *words)
    said = again.communicate(timeout=100)
    assert again.returncode == 0 and said[0] == "", said
    command = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", "source", "target"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    assert not (tmp_path / "target.resume").exists()


def test_a_target_that_is_not_what_was_left_is_refused(tmp_path: Path) -> None:
    source(tmp_path / "source")
    words = ("-f", "raw", "-O", "raw", "source", "target")
    killed(tmp_path, "target.resume", *words)
    with (tmp_path / "target").open("r+b") as file:
        file.write(bytes(8 * MIB))
    again = convert(tmp_path, *words)
    said = again.communicate(timeout=100)
    assert again.returncode == 1 and "is not what was left there" in said[1], said
    (tmp_path / "target.resume").write_text("nonsense")
    again = convert(tmp_path, *words)
    again.communicate(timeout=100)
    assert again.returncode == 0 and (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    source(tmp_path / "source")
    (tmp_path / "there").write_bytes(bytes(SIZE))
    for words in (
        ("-n", "source", "there"),
        ("-O", "vmdk", "-o", "subformat=streamOptimized", "source", "target"),
    ):
        running = convert(tmp_path, "-f", "raw", *words)
        said = running.communicate(timeout=60)
        assert running.returncode == 1 and said[1].count("\n") == 1, said
