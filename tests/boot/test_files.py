"""Boot files: kept as they were, in a file that nobody else sees."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from skep.boot.files import BootFile
from skep.memory import GuestMemory

DATA = bytes(range(256)) * 12289
"""A little over three pieces of a MiB."""


def test_it_stays_what_it_was_and_nobody_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").write_bytes(DATA)
    file = BootFile(tmp_path / "file", "kernel")
    (tmp_path / "file").write_bytes(b"another")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert (file.size, file.read(1000)) == (len(DATA), DATA[:1000])
    memory = GuestMemory(16 << 20)
    told: list[tuple[int, int]] = []
    memory.add_write_listener(lambda gpa, n: told.append((gpa, n)))
    file.load(memory, 0x1003, 5, len(DATA) + 100)  # more than there is
    assert memory.read(0x1003, len(DATA)) == DATA[5:] + bytes(5)
    assert told == [(0x1003, len(DATA) - 5)]
    memory.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    file.close()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_a_directory_that_cannot_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    (tmp_path / "file").write_bytes(DATA)
    file = BootFile(tmp_path / "file", "kernel")
    assert file.read(len(DATA) + 1) == DATA
    file.close()


def test_a_file_system_that_becomes_full(tmp_path: Path) -> None:
    """A limit on the size of files of this process: what was copied so far moves to memory with the rest."""
    (tmp_path / "file").write_bytes(DATA)
    code = (
        "import hashlib, resource, signal, sys; from skep.boot.files import BootFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 19, resource.RLIM_INFINITY))\n"
        "import os; real = os.memfd_create\n"
        "def memfd(name):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2); return real(name)\n"
        "os.memfd_create = memfd\n"
        "file = BootFile(sys.argv[1], 'kernel'); print(hashlib.sha256(file.read(1 << 30)).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": "src", "TMPDIR": str(tmp_path)},
    )
    assert done.stdout.strip() == hashlib.sha256(DATA).hexdigest()


def test_a_pipe_will_do(tmp_path: Path) -> None:
    """As in `--initrd <(make-one)`."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(DATA,))
    writer.start()
    file = BootFile(tmp_path / "pipe", "initrd")
    writer.join()
    assert file.read(len(DATA) + 1) == DATA
    file.close()
