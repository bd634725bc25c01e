"""A whole Debian with systemd, on a disk of its own, that does what a test tells it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from skep.guest.root import CMDLINE, Root
from tests.linux import BOOT, LISTEN, Session

PROMPT = re.escape("root@debian:~# ")
_LISTENER = "; ".join(line.strip() for line in LISTEN.strip().splitlines()).replace("do;", "do")


_PATIENT = f"[Manager]\nDefaultTimeoutStartSec={BOOT:.0f}\nDefaultDeviceTimeoutSec={BOOT:.0f}\n"
"""systemd gives up on a device after 90 s, which on a busy machine may be a fraction of a boot."""


def copy_of(root: Root, directory: Path, name: str = "debian.img") -> Path:
    """A disk that may be written to."""
    disk = directory / name
    subprocess.run(["cp", "--sparse=always", root.image, disk], check=True, timeout=120)
    disk.chmod(0o644)
    settings = directory / "patient.conf"
    settings.write_text(_PATIENT)
    commands = f"cd /etc/systemd\nmkdir system.conf.d\ncd system.conf.d\nwrite {settings} patient.conf\n"
    write = ["debugfs", "-w", "-f", "-", disk]
    subprocess.run(write, input=commands, text=True, check=True, capture_output=True, timeout=60)
    return disk


class Debian(Session):
    """It boots from ``disk``, a :func:`copy_of` the root, to the login that systemd has on the serial port."""

    power_off_command = "systemctl poweroff"

    def __init__(
        self,
        root: Root,
        disk: Path,
        words: str = "quiet",
        memory: str = "512M",
        disks: tuple[Path, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(
            kernel=root.kernel,
            initrd=root.initrd,
            memory=memory,
            cmdline=f"{CMDLINE} {words}",
            disks=[disk, *disks],
            **options,
        )

    def wait_ready(self) -> None:
        """Somebody is logged in on the console, and all that systemd was to start is started."""
        self.log_in()
        assert self("systemctl is-system-running --wait") == "running\n", self("systemctl --failed")

    def log_in(self) -> None:
        """The prompt came, and from now on the session's commands are obeyed there."""
        self.vm.console.expect(PROMPT, timeout=BOOT)
        self.vm.console.send(f"PAGER=cat TERM=dumb exec sh -c '{_LISTENER}'\n")
        super().wait_ready()
