"""After a mistake nothing is left: descriptors, threads, processes, mappings, files, locks, a terminal in raw mode."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.cli import main
from tests.on_terminal import OnTerminal
from tests.tiny_kernel import tiny_kernel

MISTAKES = {
    "kernel missing": "--kernel absent",
    "kernel empty": "--kernel empty",
    "kernel truncated": "--kernel truncated",
    "kernel is none": "--kernel text",
    "kernel is a directory": "--kernel directory",
    "initrd missing": "--kernel good --initrd absent",
    "initrd empty": "--kernel good --initrd empty",
    "initrd larger than memory": "--kernel good --initrd large",
    "no memory": "--kernel good --memory 0",
    "too little memory": "--kernel good --memory 1M",
    "more memory than there is": "--kernel good --memory 512T",
    "no CPUs": "--kernel good --cpus 0",
    "unknown key": "--kernel good -o memroy.size=1G",
    "unknown key of a disk": "--kernel good --disk disk,sectorsiez=512",
    "disk missing": "--kernel good --disk absent",
    "disk is a directory": "--kernel good --disk directory",
    "disk locked": "--kernel good --disk locked",
    "the second disk locked": "--kernel good --disk disk --disk locked",
    "disk twice": "--kernel good --disk disk --disk disk",
    "disk good, initrd too large": "--kernel good --initrd large --disk disk",
    "no such CPU model": "--kernel good -o cpu.model=z80",
    "no such console": "--kernel good --console teletype --disk disk",
}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    good = tiny_kernel()
    (tmp_path / "good").write_bytes(good)
    (tmp_path / "truncated").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("not a kernel, though long enough to be one\n" * 100)
    (tmp_path / "directory").mkdir()
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 32 << 20)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "locked").write_bytes(bytes(1 << 20))
    with (tmp_path / "locked").open("r+b") as holder:
        fcntl.fcntl(holder, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK))
        yield tmp_path


def _lock(kind: int) -> bytes:
    """A struct flock over all of a file."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


def _traces() -> dict[str, object]:
    """What this process has that a VM could have left."""
    maps = Path("/proc/self/maps").read_text()
    return {
        "descriptors": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _open(fd)},
        "threads": {thread.ident for thread in threading.enumerate()},
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "mappings": sorted(re.findall(r"memfd:skep\S*", maps)),
        "switch interval": sys.getswitchinterval(),
    }


def _open(fd: str) -> bool:
    try:
        os.fstat(int(fd))
    except OSError:  # that of the listing itself
        return False
    return True


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_nothing(
    mistake: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("TMPDIR", str(files))
    options = MISTAKES[mistake].split()
    size = [] if "--memory" in options else ["--memory", "16M"]
    arguments = ["run", *size, "--console", "none", *options]
    main(arguments)  # what is only made once in a process is made here
    capsys.readouterr()
    before, listing = _traces(), sorted(files.rglob("*"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert re.match(r"skep: \S", said.err) and "Traceback" not in said.err
    assert _traces() == before
    assert sorted(files.rglob("*")) == listing
    with (files / "disk").open("r+b") as disk:
        fcntl.fcntl(disk, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK))  # raises where somebody still has a byte


@pytest.mark.parametrize("mistake", ["kernel empty", "initrd larger than memory", "disk locked"])
def test_a_mistake_on_a_terminal(mistake: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [str(files / word) if (files / word).exists() else word for word in MISTAKES[mistake].split()]
    with OnTerminal("-m", "skep.cli", "run", "--memory", "16M", *options) as terminal:
        said = terminal.read_until(b"\n", timeout=60)
        assert terminal.process.wait(60) == 2
        assert said.startswith(b"skep: ") and said.count(b"\n") == 1
        assert terminal.mode() == terminal.before
        _no_process_in(terminal.process.pid)


def _no_process_in(session: int) -> None:
    """Nobody of a session is left, but perhaps one who is about to go."""
    deadline = time.monotonic() + 5
    left = _in_session(session)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = _in_session(session)
    assert left == []


def _in_session(session: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, _, its_session = rest.split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(name)
    return found


def test_a_cpu_that_is_too_old(files: Path) -> None:
    """A Nehalem of 2008, as QEMU's user mode emulates it: the whole program runs there, as far as it goes."""
    emulator = "/usr/bin/qemu-x86_64"
    if not os.access(emulator, os.X_OK):
        pytest.skip("no qemu-x86_64 (Debian: qemu-user)")
    done = subprocess.run(
        [
            *(emulator, "-cpu", "Nehalem", sys.executable, "-m", "skep.cli", "run"),
            *("--engine", "translate", "--memory", "16M", "--kernel", str(files / "good")),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path("src").absolute())},
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match(r"skep: engine=translate: this host lacks .*\bBMI2\b.*; use a host of ", done.stderr)
