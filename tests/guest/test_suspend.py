"""Linux suspends to RAM: its memory, its devices and its processors come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.chardev.test_chardev import wait_for
from tests.linux import BOOT, ENGINES, Linux

DEVICES = ("virtio-rnd", "virtio-console,console=program")


@pytest.mark.parametrize("engine", ENGINES)
def test_linux_suspends_to_ram_and_wakes(guest: Guest, engine: str, tmp_path: Path) -> None:
    """By its clock's alarm, and by the power button, frozen meanwhile."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    with Linux(guest, engine=engine, cpus=2, disks=[disk], devices=DEVICES) as linux:
        written = linux("dd if=/dev/urandom of=/dev/vda bs=1M count=4 2> /dev/null; md5sum < /dev/vda")
        before = float(linux("cat /proc/uptime").split()[0])
        linux("echo +2 > /sys/class/rtc/rtc0/wakealarm; echo mem > /sys/power/state")
        assert float(linux("cat /proc/uptime").split()[0]) > before + 1, "it knows how long it slept"
        linux.begin("echo mem > /sys/power/state")
        assert wait_for(lambda: linux.vm.asleep, BOOT)
        linux.vm.freeze()
        linux.vm.thaw()
        linux.vm.power_button()
        linux.end()
        assert linux("echo 3 > /proc/sys/vm/drop_caches; md5sum < /dev/vda") == written
        assert linux("cat /sys/devices/system/cpu/online; taskset 2 echo I am") == "0-1\nI am\n"
        assert linux("dd if=/dev/hwrng bs=512 count=4 2> /dev/null | wc -c") == "2048\n"
        linux("echo Good morning > /dev/hvc0")
        linux.vm.serial("console").expect("Good morning", BOOT)
        assert linux("dmesg | grep -c 'PM: suspend exit'") == "2\n"
        linux.power_off()
