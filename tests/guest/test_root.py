"""A Debian with systemd, from its disk to the login, at work, and down again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skep
from skep.config.values import size
from skep.guest.root import CMDLINE, Root
from skep.vm import End
from tests.debian import PROMPT, Debian, copy_of
from tests.linux import BOOT, complaints

WORK = Path(__file__).with_name("work.sh")


@pytest.fixture
def disk(root: Root, tmp_path: Path) -> Path:
    return copy_of(root, tmp_path)


def natively(directory: Path) -> str:
    """What work.sh prints on this host."""
    environment = {"PATH": os.environ["PATH"], "WORK": str(directory / "work"), "PYTHON": "/usr/bin/python3"}
    done = subprocess.run(["sh", WORK], env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def script_disk(directory: Path) -> Path:
    """work.sh as a disk: `sh /dev/vdb` runs it."""
    text = WORK.read_bytes()
    disk = directory / "script"
    disk.write_bytes(text + b"\n" * (-len(text) % 512))
    return disk


def check_file_system(disk: Path) -> None:
    """It was unmounted, and nothing is wrong with it."""
    header = subprocess.run(["dumpe2fs", "-h", disk], capture_output=True, text=True, check=True, timeout=60).stdout
    assert re.search(r"Filesystem state: +clean\n", header) and "needs_recovery" not in header
    checked = subprocess.run(["e2fsck", "-f", "-n", disk], capture_output=True, text=True, check=False, timeout=120)
    assert checked.returncode == 0, checked.stdout


def test_a_debian_at_work(root: Root, disk: Path, tmp_path: Path) -> None:
    with Debian(root, disk, disks=(script_disk(tmp_path),)) as debian:
        assert debian("systemctl --failed --no-legend") == ""
        assert debian("apt-get --version").startswith("apt ")
        assert re.search(r"^ii  systemd-sysv ", debian("dpkg -l"), re.MULTILINE)
        assert "dpkg" not in debian("dpkg --audit")
        journal = debian("journalctl --boot --no-pager --output=short-monotonic")
        assert "Startup finished in" in journal
        assert complaints(journal) == []
        assert debian("WORK=/tmp/work PYTHON=/usr/bin/python3 sh /dev/vdb") == natively(tmp_path)
        debian.power_off()
    check_file_system(disk)


@pytest.mark.slow
def test_the_same_work_on_a_cpu_like_the_hosts(root: Root, disk: Path, tmp_path: Path) -> None:
    with Debian(root, disk, disks=(script_disk(tmp_path),), config={"cpu.model": "host"}) as debian:
        for _ in range(3):
            assert debian("WORK=/tmp/work PYTHON=/usr/bin/python3 sh /dev/vdb") == natively(tmp_path)
        debian.power_off()
    check_file_system(disk)


@pytest.mark.slow
def test_with_two_processors(root: Root, disk: Path, tmp_path: Path) -> None:
    """Two at work at once, on the same files' pages and each on its own."""
    with Debian(root, disk, disks=(script_disk(tmp_path),), cpus=2) as debian:
        assert debian("nproc") == "2\n"
        work = "WORK=/tmp/work$i PYTHON=/usr/bin/python3 sh /dev/vdb > /tmp/$i"
        assert debian(f"for i in 1 2; do ({work}) & done; wait; cat /tmp/1") == natively(tmp_path)
        assert debian("cmp /tmp/1 /tmp/2; systemctl --failed --no-legend") == ""
        debian.power_off()
    check_file_system(disk)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["512M", "5G"])
def test_five_boots_of_five(root: Root, disk: Path, memory: str) -> None:
    """From one disk: the first boot gives it an identity, the others find what the one before left."""
    if size(memory) > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip(f"this host has no {memory}")
    identities = set()
    for number in range(1, 6):
        with Debian(root, disk, memory=memory, words="") as debian:
            assert debian("systemctl --failed --no-legend") == ""
            assert len(debian("journalctl --list-boots --quiet").splitlines()) == number
            identities.add(debian("cat /etc/machine-id"))
            debian.power_off()
        check_file_system(disk)
    assert len(identities) == 1 and re.fullmatch(r"[0-9a-f]{32}\n", identities.pop())


@pytest.mark.slow
def test_a_reboot_comes_up_again(root: Root, disk: Path) -> None:
    with Debian(root, disk) as debian:
        before = debian("cat /proc/sys/kernel/random/boot_id")
        debian("echo left by the first > /root/note")
        debian.begin("systemctl reboot")
        debian.wait_ready()
        assert debian("cat /root/note") == "left by the first\n"
        assert debian("cat /proc/sys/kernel/random/boot_id") != before
        assert complaints(debian("journalctl --boot=-1 --no-pager")) == []
        debian.power_off()
    check_file_system(disk)


@pytest.mark.slow
def test_the_power_button_shuts_systemd_down(root: Root, disk: Path) -> None:
    with Debian(root, disk) as debian:
        debian.vm.power_button()
        outcome = debian.vm.wait(BOOT)
        assert outcome is not None and outcome.end is End.POWERED_OFF, outcome
    check_file_system(disk)
    with Debian(root, disk) as debian:
        said = debian("journalctl --boot=-1 --no-pager")
        assert "Power key pressed" in said and "System is powering down" in said
        debian.power_off()


@pytest.mark.slow
def test_sigterm_presses_it(root: Root, disk: Path) -> None:
    """`skep run` as a service manager would run it."""
    command = [sys.executable, "-m", "skep.cli", "run", "--memory", "512M", "--disk", str(disk)]
    command += ["--kernel", str(root.kernel), "--initrd", str(root.initrd), "--cmdline", f"{CMDLINE} quiet"]
    environment = {**os.environ, "PYTHONPATH": "src"}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            printed = b""
            while b"root@debian:~# " not in printed:
                printed += (read := os.read(process.stdout.fileno(), 4096))
                assert read, printed
            process.terminate()
            process.communicate(timeout=BOOT)
            assert process.returncode == 0
        finally:
            process.kill()
    check_file_system(disk)


VIRTIO_CONSOLE = "virtio-console,console=program,org.example.agent=program"


@pytest.mark.slow
def test_a_login_on_virtio_console_beside_the_serial_one(root: Root, disk: Path) -> None:
    """Also where it is not the kernel's console; and udev gives a port its name."""
    with Debian(root, disk, devices=[VIRTIO_CONSOLE]) as debian:
        terminal = debian.vm.serial("console")
        terminal.expect(PROMPT, timeout=BOOT)
        terminal.send("tty; echo $((6 * 7))\n")
        terminal.expect(r"/dev/hvc0\r\n42\r\n", timeout=BOOT)
        assert debian("tty") == "/dev/ttyS0\n"
        assert sorted(line.split()[1] for line in debian("who").splitlines()) == ["hvc0", "ttyS0"]
        agent = debian.vm.serial("org.example.agent")
        debian.begin("read -r line < /dev/virtio-ports/org.example.agent; echo got $line")
        agent.send("a word\n")
        assert debian.end() == "got a word\n"
        terminal.send("exit\n")
        terminal.expect(PROMPT, timeout=BOOT)  # another login
        assert debian("systemctl --failed --no-legend") == ""
        debian.power_off()
    check_file_system(disk)


@pytest.mark.slow
def test_virtio_console_alone(root: Root, disk: Path) -> None:
    """The kernel's messages, systemd's and the login, without a serial port."""
    with skep.Vm(
        kernel=root.kernel,
        initrd=root.initrd,
        memory="512M",
        cmdline="console=hvc0 root=/dev/vda",
        disks=[disk],
        devices=[VIRTIO_CONSOLE],
        console="none",
    ) as vm:
        vm.start()
        terminal = vm.serial("console")
        terminal.expect("Welcome to .*Debian GNU/Linux 12", timeout=BOOT)
        terminal.expect("debian login: root", timeout=BOOT)
        terminal.expect(PROMPT, timeout=BOOT)
        terminal.send("systemctl poweroff\n")
        outcome = vm.wait(BOOT)
        assert outcome is not None and outcome.end is End.POWERED_OFF, outcome
    check_file_system(disk)
