"""Debian's kernel failing to boot in earnest: what ``skep run`` says about it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import skep
from skep.explain import Activity, Cause, Explanation
from skep.explain.amd64 import AddressSpace
from skep.explain.linux import Physical, find_image, find_symbols
from skep.guest.cpio import Archive
from skep.guest.debian import Guest
from tests.boot.bzimage import bzimage
from tests.boot.elf import vmlinux
from tests.linux import BOOT


def run(*options: str, until: str | None = None) -> tuple[int, list[str], str]:
    """``skep run`` of a guest that fails: its status, the report's lines, what the guest said. ``until``: a line on
    standard error after which the VM is stopped, as it will not end by itself."""
    command = [sys.executable, "-m", "skep.cli", "run", "--memory", "256M", "--engine", "translate", *options]
    environment = {**os.environ, "PYTHONPATH": "src"}
    with (
        tempfile.TemporaryFile("w+") as console,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.PIPE, env=environment, text=True
        ) as process,
    ):
        late = threading.Timer(BOOT, process.kill)
        late.start()
        told = []
        assert process.stderr is not None
        for line in process.stderr:
            told.append(line.rstrip("\n"))
            if until is not None and until in line:
                threading.Timer(2, process.send_signal, (signal.SIGINT,)).start()
        status = process.wait()
        late.cancel()
        console.seek(0)
        return status, told, console.read()


def initrd(tmp_path: Path, guest: Guest, init: str) -> Path:
    """Debian's initramfs, with another init behind it: the later one counts."""
    archive = Archive()
    archive.file("init", init.encode(), 0o755)
    path = tmp_path / "initrd.img"
    path.write_bytes(guest.initrd.read_bytes() + archive.finish())
    return path


@pytest.fixture(scope="module")
def silent(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Path]:
    """What is said of a kernel that panicked without a console; and its System.map, written from the table in its
    memory as its build would have."""
    cmdline = "console=ttyS1 root=/dev/vda1"
    with skep.Vm(kernel=guest.kernel, memory="256M", cmdline=cmdline, engine="translate") as vm:
        vm.start()
        deadline = time.monotonic() + BOOT
        while not (log := (explanation := vm.explain()).log) or "---[ end Kernel panic" not in log[-1]:
            assert time.monotonic() < deadline, str(explanation)
            time.sleep(1)
        time.sleep(1)  # it has said its last word, and comes to rest
        explanation = vm.explain()
        space = AddressSpace(vm.board.memory, dict(explanation.processors[0].registers))
        image = find_image(space)
        assert image is not None
        symbols = find_symbols(Physical(vm.board.memory), image)
        assert symbols is not None
    slide = image.va - 0xFFFF_FFFF_8100_0000
    path = tmp_path_factory.mktemp("map") / "System.map"
    base = symbols._base - 1 - slide
    rows = ((base - offset, symbols._symbol(at)) for at, offset in enumerate(symbols._offsets) if offset < 0)
    path.write_text("".join(f"{address:016x} {name[0]} {name[1:]}\n" for address, name in rows))
    return explanation, path


def test_a_console_that_is_connected_to_nothing(silent: tuple[Explanation, Path]) -> None:
    """Nothing came out of the guest, and its log tells all."""
    explanation, _ = silent
    assert explanation.cause is Cause.PANIC, explanation
    findings = [str(finding) for finding in explanation.findings]
    assert findings[0] == "the kernel was told to talk on ttyS1, which is connected to nothing; use console=ttyS0"
    assert findings[1].startswith("the root device /dev/vda1 was not found: the machine has no disk")
    assert re.match(r"\[ +0\.000000\] Linux version 6\.", explanation.log[0])
    assert explanation.log[1].endswith("Command line: console=ttyS1 root=/dev/vda1")
    assert explanation.processors[0].activity in (Activity.RUNNING, Activity.SPINNING)
    assert {"panic", "delay_tsc"} & set(explanation.processors[0].places)
    assert explanation.symbols == "names from the kernel's own table"
    assert explanation.unanswered["port", 0x2F8] > 1000
    report = str(explanation).splitlines()
    assert len(report) <= 40 and report[-1].strip() == explanation.log[-1]


@pytest.mark.parametrize("named", [False, True])
def test_no_root_disk(guest: Guest, silent: tuple[Explanation, Path], named: bool) -> None:
    _, system_map = silent
    cmdline = "console=ttyS0 root=/dev/vda1 panic=-1"
    options = ["--kernel", str(guest.kernel), "--no-reboot", "--cmdline", cmdline]
    status, report, said = run(*options, *(["--system-map", str(system_map)] if named else []))
    assert status == 0, report
    assert report[0] == "skep: the guest's kernel panicked: VFS: Unable to mount root fs on unknown-block(0,0)"
    assert report[1] == "  probably: the root device /dev/vda1 was not found: the machine has no disk; add --disk IMAGE"
    assert len(report) <= 40 and all(line.startswith("  ") for line in report[1:])
    text = "\n".join(report)
    stack = text[text.index("called, as the stack looks, from") :]
    for function in ("panic+0x", "mount_block_root+0x", "prepare_namespace+0x", "kernel_init"):
        assert function in stack, text
    assert "out 0x3f8 (com1) 0x" in text and "io_serial_out+0x" in text
    assert "out 0xcf9 (pci) 0x6" in text, "how it rebooted"
    assert "no device answered: port 0x2" in text and "(COM2)" in text and "MSRs it was refused: rdmsr 0x" in text
    assert "the kernel's log ends" not in text, "it is on the console"
    slide = re.search(r"Kernel Offset: (0x\w+)", said)
    assert slide is not None
    if named:
        assert f"names from {system_map}, moved by {slide[1]}" in text
    else:
        assert "names from the kernel's own table" in text


@pytest.mark.slow
def test_an_init_that_ends(guest: Guest, tmp_path: Path) -> None:
    image = initrd(tmp_path, guest, "#!/bin/sh\nexit 7\n")
    status, report, _ = run(
        "--kernel", str(guest.kernel), "--initrd", str(image), "--no-reboot", "--cmdline", "console=ttyS0 panic=-1"
    )
    assert status == 0
    assert report[0].startswith("skep: the guest's kernel panicked: Attempted to kill init! exitcode=0x00000700")
    assert report[1] == "  probably: the guest's first program, /init, ended with status 7; it must never end"


@pytest.mark.slow
def test_an_init_that_cannot_be_run(guest: Guest, tmp_path: Path) -> None:
    """And nothing else is there."""
    archive = Archive()
    archive.file("init", b"#!/bin/perl\n", 0o755)
    image = tmp_path / "initrd.img"
    image.write_bytes(archive.finish())
    _, report, _ = run(
        "--kernel", str(guest.kernel), "--initrd", str(image), "--no-reboot", "--cmdline", "console=ttyS0 panic=-1"
    )
    text = "\n".join(report)
    assert "probably: the kernel could not run /init: no such file or directory; it, its interpreter" in text, text
    assert "probably: the root file system has no /sbin/init" in text


@pytest.mark.slow
def test_a_root_device_that_is_waited_for(guest: Guest) -> None:
    """With rootwait the kernel sleeps for good, and says so once."""
    cmdline = "console=ttyS0 root=/dev/vda1 rootwait"
    _, report, said = run(
        "--kernel", str(guest.kernel), "--cmdline", cmdline, "--silence", "15", until="said nothing"
    )
    assert "Waiting for root device /dev/vda1" in said
    assert report[0] == "skep: the guest has said nothing for 15 s"
    assert report[1].endswith("the root device /dev/vda1 was not found: the machine has no disk; add --disk IMAGE")


@pytest.mark.slow
def test_an_initramfs_that_waits_for_a_device(guest: Guest, tmp_path: Path) -> None:
    wait = "echo waiting for /dev/vdb\nwhile [ ! -b /dev/vdb ]; do sleep 1; done\n"
    image = initrd(tmp_path, guest, f"#!/bin/sh\nmount -t devtmpfs dev /dev\n{wait}")
    options = ["--kernel", str(guest.kernel), "--initrd", str(image), "--cmdline", "console=ttyS0"]
    _, report, _ = run(*options, "--silence", "15", until="said nothing")
    assert report[0] == "skep: the guest has said nothing for 15 s"
    assert report[1] == "  probably: the guest waited for /dev/vdb: the machine has no disk; add --disk IMAGE"
    assert report[2].startswith("  cpu0 sleeps until an interrupt comes")


@pytest.mark.slow
def test_a_panic_that_stays(guest: Guest) -> None:
    """Without panic= the kernel spins for good, and has halted the other processors: that is told once, and who
    panicked comes first."""
    options = ["--kernel", str(guest.kernel), "-c", "2", "--cmdline", "console=ttyS0 root=/dev/vda1"]
    _, report, said = run(*options, until="the guest's kernel panicked")
    assert sum("panicked" in line for line in report) == 1
    who = re.search(r"not syncing.*?CPU: (\d) PID", said, re.DOTALL)
    assert who is not None
    processors = [line for line in report if re.match(r"  cpu\d ", line)]
    assert len(processors) == 2
    assert processors[0].startswith(f"  cpu{who[1]} ") and "interrupts on" in processors[0]
    assert "halted with interrupts off at stop_this_cpu" in processors[1]


@pytest.mark.parametrize(
    ("kernel", "mode"), [(bzimage(), "64-bit kernel code"), (vmlinux(code=b"\x0f\x0b"), "32-bit kernel code")]
)
def test_a_kernel_of_nothing(tmp_path: Path, kernel: bytes, mode: str) -> None:
    """A file with a kernel's header and bytes behind it that soon are no instructions."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(kernel)
    status, report, _ = run("--kernel", str(path))
    assert status == 3
    assert report[0] == "skep: the guest had a triple fault"
    assert f"({mode}, interrupts off)" in report[1]
    assert any("cannot deliver exceptions: the IDT" in line for line in report)
