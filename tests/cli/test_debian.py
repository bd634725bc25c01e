"""A real kernel, from the command line and from the API: what somebody sees who tries Skep for the first time."""

from __future__ import annotations

import runpy
import signal
from pathlib import Path

import pytest

from skep.errors import UserError
from skep.guest import debian
from tests.on_terminal import OnTerminal

BOOT = 300.0
"""Seconds; an idle machine takes less than ten."""


@pytest.fixture(scope="module")
def guest() -> debian.Guest:
    try:
        return debian.obtain()
    except UserError as error:
        pytest.skip(f"no guest to boot: {error}")


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
