"""A Linux guest with a disk of each format that is written: file systems, and the same seen from outside."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from skep.block.backend import read_at
from skep.block.image import create_image, open_image
from skep.guest.debian import Guest
from tests.linux import Linux

MIB = 1 << 20
CHECKED = ("vhdx", "vmdk", "vdi")
"""Formats that `qemu-img check` knows."""


@pytest.mark.slow
def test_a_file_system_on_each(guest: Guest, tmp_path: Path) -> None:
    formats = ("vhdx", "vmdk", "vpc", "vdi")
    for format in formats:
        options = {"force_size": "on"} if format == "vpc" else {}
        create_image(tmp_path / format, format, 24 * MIB, options=options)
    disks = [f"{tmp_path / format},format={format}" for format in formats]
    sums = {}
    with Linux(guest, disks=disks) as linux:
        for letter, format in zip("abcd", formats, strict=True):
            disk = f"/dev/vd{letter}"
            linux(f"mkfs.ext2 {disk} > /dev/null && mount {disk} /mnt")
            linux("dd if=/dev/urandom of=/mnt/file bs=64k count=60 2> /dev/null && sync")
            linux("sha256sum /mnt/file > /mnt/sum")
            linux(f"umount /mnt && mount {disk} /mnt && sha256sum -c /mnt/sum && umount /mnt")
            sums[format] = linux(f"sha256sum < {disk}").split()[0]
    for format in formats:
        with open_image(tmp_path / format, format=format, read_only=True) as image:
            assert image.check().clean
            assert hashlib.sha256(read_at(image, 0, image.size)).hexdigest() == sums[format]
        if format in CHECKED:
            command = ["qemu-img", "check", "-q", "-f", format, str(tmp_path / format)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
