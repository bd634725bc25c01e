"""Debian's kernels, from the command line: they boot, have nothing to complain of, and power off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from skep.errors import UserError
from skep.guest import debian
from skep.guest.debian import Guest
from tests.linux import BOOT, complaints

MEMORY = {"512M": 512 << 20, "1G": 1 << 30, "5G": 5 << 30}
"""The last has RAM below and above the hole of 32-bit devices."""


def boot(guest: Guest, memory: str, console: Path, *options: str) -> str:
    """One boot to init and power-off; the console's output is kept in a file, and returned."""
    if MEMORY[memory] > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip(f"this host has no {memory}")
    command = [sys.executable, "-m", "skep.cli", "run", "--memory", memory, "--cmdline", "console=ttyS0 skep.poweroff"]
    command += ["--kernel", str(guest.kernel), "--initrd", str(guest.initrd), *options]
    with console.open("wb") as output:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": "src"},
            timeout=BOOT,
        )
    log = console.read_text(errors="replace")
    assert done.returncode == 0, f"{console}: {log[-2000:]}"
    assert re.search(r"^BOOT\r?$", log, re.MULTILINE), f"{console}: {log[-2000:]}"
    assert "reboot: Power down" in log, f"{console}: {log[-2000:]}"
    assert complaints(log) == [], console
    return log


@pytest.mark.parametrize("memory", ["512M", "5G"])
def test_a_boot_and_power_off(guest: Guest, tmp_path: Path, memory: str) -> None:
    log = boot(guest, memory, tmp_path / "console")
    seen = re.search(r"Memory: \d+K/(\d+)K available", log)
    assert seen, log
    assert 0.999 < (int(seen[1]) << 10) / MEMORY[memory] < 1


def test_little_room_for_code(guest: Guest, tmp_path: Path) -> None:
    """What was translated goes again and again, and the guest notices nothing."""
    boot(guest, "512M", tmp_path / "console", "-o", "code_size=8M", "-o", "code_cache=off")


def form(name: str) -> Guest:
    """The cloud or the full kernel, as it is packed or unpacked: "full vmlinux"."""
    kernel, file = name.split()
    try:
        guest = debian.obtain(full=kernel == "full")
    except UserError as error:
        pytest.skip(f"no guest to boot: {error}")
    return Guest(debian.vmlinux(guest.kernel), guest.initrd) if file == "vmlinux" else guest


def test_an_unpacked_kernel_boots_by_pvh(tmp_path: Path) -> None:
    boot(form("cloud vmlinux"), "512M", tmp_path / "console")


@pytest.mark.parametrize("cpus", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (48, 64))])
def test_several_processors(guest: Guest, tmp_path: Path, cpus: int) -> None:
    log = boot(guest, "1G" if cpus > 8 else "512M", tmp_path / "console", "--cpus", str(cpus))
    assert f"smp: Brought up 1 node, {cpus} CPUs" in log


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["512M", "5G"])
@pytest.mark.parametrize("name", ["cloud vmlinuz", "cloud vmlinux", "full vmlinuz", "full vmlinux"])
def test_every_form_boots_five_times(tmp_path: Path, name: str, memory: str) -> None:
    for number in range(5):
        boot(form(name), memory, tmp_path / f"console.{number}")


@pytest.mark.slow
def test_boots_one_after_the_other(guest: Guest, tmp_path: Path) -> None:
    for number in range(20):
        boot(guest, "512M", tmp_path / f"console.{number}")
