"""A real kernel, from the command line and from the API: what somebody sees who tries Skep for the first time."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.console import boot
from skep.engine.translate import store
from skep.guest import debian
from tests.on_terminal import OnTerminal

BOOT = 300.0
"""Seconds; an idle machine takes less than ten."""


def test_a_shell_in_this_terminal(guest: debian.Guest) -> None:
    options = ("--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--memory", "512M")
    with OnTerminal("-m", "skep.cli", "run", *options, "--cmdline", "console=ttyS0 quiet") as terminal:
        terminal.read_until(b"skep# ", BOOT)
        terminal.type(b"sh -c 'echo $((40+2)); exec sleep 1000'\r")
        terminal.read_until(b"42\r\n", BOOT)  # it runs: before that, keys are the shell's
        terminal.type(b"\x1a")  # Ctrl-Z: the guest's shell has job control
        terminal.read_until(b"skep# ", BOOT)
        terminal.type(b"jobs; cat\r")
        terminal.read_until(b"[1]+  Stopped", BOOT)
        terminal.type(b"\x03")
        terminal.read_until(b"skep# ", BOOT)
        terminal.process.send_signal(signal.SIGTERM)  # the power button, which the guest's acpid answers
        assert terminal.process.wait(BOOT) == 0
        assert terminal.mode() == terminal.before


def test_the_example(guest: debian.Guest) -> None:
    hello = runpy.run_path(str(Path("examples/hello_vm.py")))["hello"]
    assert hello(str(guest.kernel), str(guest.initrd), "echo $((6 * 7))") == "42\n"


def command(guest: debian.Guest, cmdline: str) -> list[str]:
    files = ("--kernel", str(guest.kernel), "--initrd", str(guest.initrd))
    return [
        sys.executable,
        "-m",
        "skep.cli",
        "run",
        *files,
        "--memory",
        "512M",
        "--cmdline",
        f"console=ttyS0 {cmdline}",
    ]


MOST = 150 << 20
"""Bytes that a VM may take besides the guest's memory."""


def peak(guest: debian.Guest, cache: Path) -> int:
    """What is not the guest's at its most in a boot with all the kernel's messages, in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(Path("src").absolute()), "XDG_CACHE_HOME": str(cache)}
    measured = boot(command(guest, "skep.poweroff"), BOOT, environment, watch=True)
    assert measured.resident is not None and measured.resident > 20 << 20
    return measured.resident


def test_memory_that_is_not_the_guests(guest: debian.Guest, tmp_path: Path) -> None:
    """With nothing translated before, with everything, and with as much beside it as is ever kept."""
    assert peak(guest, tmp_path) <= MOST
    code = tmp_path / "skep" / "code"
    (kept,) = code.glob("*.seg")
    identity = kept.name.partition("-")[0]
    before = kept.stat().st_mtime_ns
    assert peak(guest, tmp_path) <= MOST
    assert kept.stat().st_mtime_ns > before  # it was of use
    for number in range(store.LIMIT // kept.stat().st_size - 1):
        shutil.copy(kept, code / f"{identity}-{number}.seg")
    assert peak(guest, tmp_path) <= MOST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cmdline", "typed", "status", "printed", "said"),
    [
        ("quiet", "uname -s; exit\n", 0, "\r\nLinux\r\n", ""),
        ("quiet", "reboot -f\n", 0, "Restarting system", ""),
        ("quiet reboot=t", "reboot -f\n", 3, "Restarting system", "skep: the guest had a triple fault\n"),
    ],
    ids=["power-off", "reboot", "triple fault"],
)
def test_how_a_linux_ends(guest: debian.Guest, cmdline: str, typed: str, status: int, printed: str, said: str) -> None:
    done = subprocess.run(
        [*command(guest, cmdline), "--no-reboot"],
        input=typed.encode(),
        capture_output=True,
        timeout=BOOT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path("src").absolute())},
    )
    assert done.returncode == status
    assert printed in done.stdout.decode()
    assert done.stderr.decode().startswith(said) and bool(done.stderr) == bool(said)
