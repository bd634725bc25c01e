"""A Debian guest's consoles on everything they can be plugged into, with the programs that people use; and its VM asked
from outside meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.cli.test_ctl import gdb, skep
from tests.cli.test_run import Run, Started
from tests.linux import command_line
from tests.tiny_kernel import printing, tiny_kernel

pytestmark = pytest.mark.slow
WAIT = 300.0

SHELL = "stty -F /dev/ttyS0 -echo; exec sh </dev/ttyS0 >/dev/ttyS0 2>&1"


class Skep(Started):
    """``skep run web`` of Debian's kernel; its initramfs runs ``script``."""

    def __init__(self, guest: Guest, script: str, *arguments: str) -> None:
        words = ("--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--memory", "512M")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "skep.cli", "run", "web", *words),
                *("--cmdline", command_line(script, "quiet", "nokaslr"), *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path("src").absolute())},
        )

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=WAIT)
        return self.process.returncode, output, errors


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield


def socat(*arguments: str) -> subprocess.Popen[bytes]:
    if shutil.which("socat") is None:
        pytest.skip("no socat")
    return subprocess.Popen(["socat", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def until(path: Path) -> None:
    deadline = time.monotonic() + WAIT
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def converse(client: subprocess.Popen[bytes], command: bytes, answer: bytes) -> bytes:
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(command)
    client.stdin.flush()
    got = b""
    killer = threading.Timer(WAIT, client.kill)
    killer.start()
    while not re.search(answer, got):
        data = client.stdout.read1(4096)  # type: ignore[attr-defined]
        assert data, got
        got += data
    killer.cancel()
    return got


def test_four_ports_at_once(guest: Guest, tmp_path: Path) -> None:
    """A Unix socket, TCP, a pseudo-terminal, with a shell on each; and a file."""
    script = "for n in 1 2; do (stty -F /dev/ttyS$n raw -echo; sh </dev/ttyS$n >/dev/ttyS$n 2>&1) & done\n"
    script += "echo into the file >/dev/ttyS3\n" + SHELL
    com1 = tmp_path / "com1"
    ports = ("--console", f"unix:{com1}", "--console", "com2=tcp:127.0.0.1:0", "--console", "com3=pty")
    with Skep(guest, script, *ports, "--console", f"com4=file:{tmp_path}/log") as vm:
        assert vm.process.stderr is not None
        address = re.fullmatch(r"skep: com2: it listens on (\S+)\n", vm.process.stderr.readline())
        terminal = re.fullmatch(r"skep: com3: its terminal is (\S+)\n", vm.process.stderr.readline())
        assert address is not None and terminal is not None
        until(com1)
        for _ in range(2):  # it may leave and come back
            with socat("-", f"UNIX-CONNECT:{com1}") as client:
                converse(client, b"echo $((6*7)) on $(uname -s)\n", rb"42 on Linux\r\n")
                client.kill()
        with socat("-", f"TCP:{address[1]}") as client, socat("-", f"OPEN:{terminal[1]},raw,echo=0") as third:
            converse(client, b"echo second $((1+1))\n", rb"second 2\n")
            converse(third, b"echo third $((1+2))\n", rb"third 3\n")
            third.kill()
            client.kill()
        with socat("-", f"UNIX-CONNECT:{com1}") as client:
            converse(client, b"poweroff -f\n", rb"Power down|$")
            assert vm.process.wait(WAIT) == 0
        assert (tmp_path / "log").read_bytes() == b"into the file\r\n"
        assert not com1.exists()


def test_a_reader_that_stops_does_not_stop_the_guest(tmp_path: Path) -> None:
    """A guest that only prints takes as long for a client that reads nothing as for nobody at all."""
    count, path = 1_500_000, tmp_path / "com1"
    (tmp_path / "kernel").write_bytes(tiny_kernel(printing(count)))
    seconds = {}
    for console in ("none", f"unix:{path}"):
        vm = Run("--kernel", str(tmp_path / "kernel"), "--engine", "translate", "--console", console)
        with socket.socket(socket.AF_UNIX) as stuck:
            if console != "none":
                until(path)
                stuck.connect(str(path))
            began = time.monotonic()
            status, _, errors = vm.end(wait=WAIT)
            seconds[console[:4]] = time.monotonic() - began
            assert status == 0
            if console != "none":
                got = stuck.makefile("rb").read()
    assert seconds["unix"] < 3 * seconds["none"] + 5, seconds
    said = re.fullmatch(
        r"skep: com1: nobody reads its output, of which only the last MiB is kept\n"
        r"skep: com1: (\d+) bytes of output were dropped, nobody read them\n", errors
    )  # fmt: skip
    assert said is not None and got == b"." * len(got)
    assert len(got) > 10_000 and len(got) + int(said[1]) == count, "each byte was read or is counted"


def test_asked_all_the_time(guest: Guest, tmp_path: Path) -> None:
    """Freezes, thaws, registers, threads and dumps while the guest boots and works: it never notices."""
    script = (
        "for n in $(seq 1 20); do seq 1 20000 | sha256sum; done | sort | uniq -c;"
        " dmesg | grep -E 'detected stalls|lockup|unstable|BUG:'; grep -E ' linux_banner$' /proc/kallsyms;"
        " uname -r; echo finished; sleep 20; poweroff -f"
    )
    with Skep(guest, script) as vm:
        answers = []
        while not (tmp_path / "skep/web.sock").exists():
            time.sleep(0.05)
        for number in range(12):
            for words in (("freeze",), ("registers", "--json"), ("threads",), ("status",), ("thaw",)):
                answers.append(skep("ctl", "web", *words))
            if number == 6:
                skep("ctl", "web", "dump", str(tmp_path / "early"))
        assert vm.process.stdout is not None
        lines = []
        while not (line := vm.process.stdout.readline()).startswith("finished"):
            assert line, vm.end()
            lines.append(line.strip())
        skep("ctl", "web", "dump", str(tmp_path / "core"))
        assert json.loads(skep("list", "--json"))[0]["state"] == "running"
        skep("ctl", "web", "stop")
        assert vm.end()[0] == 0
    assert lines.pop(0) == "BOOT" and len(lines) == 3, lines
    assert lines[0].split()[0] == "20", "twenty times the same sum"
    banner = lines[1].split()[0]
    text = gdb(tmp_path / "core", f"x/s 0x{banner}", "info threads", "x/i $rip")
    assert f'"Linux version {lines[2]} ' in text
    assert (tmp_path / "early").read_bytes()[:4] == b"\x7fELF"


def test_the_power_button_and_a_kill(guest: Guest, tmp_path: Path) -> None:
    with Skep(guest, "echo up; sleep 1000") as vm:
        assert vm.process.stdout is not None and [vm.process.stdout.readline() for _ in range(2)][1] == "up\n"
        skep("ctl", "web", "power")  # this initramfs does not listen to it, and nothing happens
        assert json.loads(skep("ctl", "web", "status", "--json"))["state"] == "running"
        vm.process.send_signal(signal.SIGKILL)
        vm.process.wait(WAIT)
    assert skep("list").count("\n") == 1
    assert list((tmp_path / "skep").iterdir()) == []
