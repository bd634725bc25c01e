"""What a guest's words mean on this machine. The words are those of Linux 6.1, initramfs-tools, dracut and systemd."""

from __future__ import annotations

import pytest

from skep.config import Tree
from skep.explain.findings import Machine, find, panic, panicked_cpu

NO_ROOT = """\
[    3.040781] /dev/root: Can't open blockdev
[    3.042678] VFS: Cannot open root device "vda1" or unknown-block(0,0): error -6
[    3.043476] Please append a correct "root=" boot option; here are the available partitions:
[    3.045173] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)
"""
NO_ROOT_NAMED = NO_ROOT.replace('"vda1"', '"(null)"')
WITH_A_DISK = NO_ROOT.replace("partitions:", "partitions:\n[    3.04] fe00    1048576 vda \n  driver: virtio_blk")
INIT = "[    2.1] Run /init as init process\n"


def machine(cmdline: str = "console=ttyS0 root=/dev/vda1", initrd: bool = False, disks: int = 0) -> Machine:
    tree = Tree({"boot.cmdline": cmdline, "lpc.com1.path": "stdio", "lpc.com2.path": "none"})
    if initrd:
        tree["boot.initrd"] = "initrd.img"
    for number in range(disks):
        tree[f"pci.0.{number + 2}.0.device"] = "virtio-blk"
    return Machine.of(tree.freeze(), 64 << 20)


NO_DISK = "the root device /dev/vda1 was not found: the machine has no disk; add --disk IMAGE"


@pytest.mark.parametrize(
    ("words", "where", "says"),
    [
        (NO_ROOT, machine(), NO_DISK),
        (NO_ROOT, machine(disks=1), "this kernel has no driver for virtio disks built in; give the initramfs"),
        (NO_ROOT, machine(disks=1, initrd=True), "nobody has loaded the driver of virtio disks"),
        (WITH_A_DISK, machine(disks=1), "was not found, though the kernel found a disk; see what it holds"),
        (NO_ROOT_NAMED, machine("console=ttyS0"), "there is no initramfs, and no root file system was"),
        (NO_ROOT_NAMED, machine("console=ttyS0", initrd=True), "no root file system was named; add root=/dev/vda"),
        ("Waiting for root device /dev/vda1...", machine(), NO_DISK),
        ("ALERT!  /dev/vda1 does not exist.  Dropping to a shell!", machine(initrd=True), NO_DISK),
        ("Gave up waiting for root file system device.  Common problems:", machine(initrd=True), NO_DISK),
        ("Gave up waiting for root device.", machine("root=/dev/vda1"), NO_DISK),
        ("Timed out waiting for device /dev/vdb.", machine(disks=1), "waited for /dev/vdb, which did not come"),
        ("dracut-initqueue[1]: Warning: /dev/vdb does not exist", machine(), "for /dev/vdb: the machine has no disk"),
        ("waiting for /dev/vdb\r\n", machine(), "waited for /dev/vdb: the machine has no disk; add --disk IMAGE"),
        ("Kernel panic - not syncing: No working init found.", machine(), "no /sbin/init, /etc/init, /bin/init"),
        (
            INIT + "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000700",
            machine(),
            "the guest's first program, /init, ended with status 7; it must never end",
        ),
        (
            INIT + "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
            machine(),
            "the guest's first program, /init, was killed by SIGSEGV; it must never end",
        ),
        (
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000007f",
            machine(),
            "the guest's first program was killed by signal 127",
        ),
        ("Failed to execute /init (error -8)", machine(), "could not run /init: exec format error; it is no program"),
        ("Requested init /bin/x failed (error -2).", machine(), "no such file or directory"),
        (
            "Starting init: /bin/sh exists but couldn't execute it (error -13)",
            machine(),
            "could not run /bin/sh: permission denied; its mode",
        ),
        ("Failed to execute /init (error -99999)", machine(), "could not run /init: error 99999"),
        ("Initramfs unpacking failed: invalid magic at start", machine(), "invalid magic at start"),
        ("Kernel panic - not syncing: System is deadlocked on memory", machine(), "64 MiB, is too small; give"),
        ("Warning: unable to open an initial console.", machine(), "the initramfs has no /dev/console"),
        ("You are in emergency mode. After logging in, type", machine(), "systemd went into emergency mode"),
        ("BUG: kernel NULL pointer dereference, address: 0000", machine(), "BUG: kernel NULL pointer dereference"),
        ("No filesystem could mount root, tried: \r\n ext4", machine(), "holds no file system that the kernel knows"),
    ],
)
def test_what_words_mean(words: str, where: Machine, says: str) -> None:
    found = [str(finding) for finding in find(where, "BOOT\n", words)]
    assert len(found) == 1 and says in found[0], found
    assert [str(finding) for finding in find(where, f"BOOT\n{words}", "")] == found, "on the console or in the log"
    assert [str(finding) for finding in find(where, f"BOOT\n{words}", words)] == found, "and once"


@pytest.mark.parametrize(
    ("cmdline", "says"),
    [
        ("console=ttyS0", None),
        ("console=tty0 console=ttyS0,115200n8", None),
        ("", "the kernel was told of no console; add console=ttyS0 to --cmdline"),
        ("quiet", "the kernel was told of no console; add console=ttyS0 to --cmdline"),
        ("console=ttyS1", "the kernel was told to talk on ttyS1, which is connected to nothing; use console=ttyS0"),
        ("console=hvc0 console=tty0", "the kernel was told to talk on hvc0 and tty0, which is connected to nothing"),
    ],
)
def test_consoles_of_a_guest_that_never_spoke(cmdline: str, says: str | None) -> None:
    found = [str(finding) for finding in find(machine(cmdline), "", "")]
    assert [line.startswith(says or "") for line in found] == ([] if says is None else [True]), found
    assert list(find(machine(cmdline), "a word", "")) == []


def test_a_machine_without_any_console() -> None:
    lone = Machine.of(Tree({"boot.cmdline": "console=ttyS0"}).freeze(), 64 << 20)
    assert str(next(find(lone, "", ""))).startswith("no console of the machine leads anywhere")


def test_a_disk_that_only_the_command_line_names_was_not_found() -> None:
    log = "[    0.0] Command line: console=ttyS0 root=/dev/vda\n" + NO_ROOT.replace("vda1", "vda")
    found = [str(finding) for finding in find(machine("console=ttyS0 root=/dev/vda", disks=1), "BOOT", log)]
    assert len(found) == 1 and "this kernel has no driver for virtio disks built in" in found[0]


def test_a_healthy_boot_means_nothing() -> None:
    text = "Linux version 6.1\nRun /init as init process\nBOOT\nskep# \nreboot: Power down\n"
    assert list(find(machine(), text, text)) == []
    assert panic(text) is None


def test_a_panics_reason() -> None:
    text = "Kernel panic - not syncing: no tea\r\nstuff\r\n---[ end Kernel panic - not syncing: no tea ]---\r\n"
    assert panic(text) == "no tea"


def test_the_processor_that_panicked() -> None:
    text = "CPU: 3 PID: 9 Comm: a\nKernel panic - not syncing: no tea\nCPU: 1 PID: 1 Comm: init\nCPU: 2 PID: 3\n"
    assert panicked_cpu(text) == 1
    assert panicked_cpu("CPU: 3 PID: 9 Comm: a") is panicked_cpu("Kernel panic - not syncing: no tea") is None
