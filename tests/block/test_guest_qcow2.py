"""A Linux guest on qcow2: an overlay, a file system, space given back; and what a guest cannot make of its disks."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest

from skep.block.backend import read_at
from skep.block.format import BackingName
from skep.block.image import create_image, open_disk, open_image
from skep.block.naming import backing_path
from skep.block.options import BlockOptions
from skep.errors import UserError
from skep.guest.debian import Guest
from tests.linux import Linux
from tests.programs import add_programs

MIB = 1 << 20


def test_a_file_system_on_an_overlay(guest: Guest, tmp_path: Path) -> None:
    initrd = add_programs(guest.initrd, tmp_path / "initrd", ["blkdiscard"])
    base, overlay, raw = tmp_path / "base.img", tmp_path / "overlay.qcow2", tmp_path / "raw.img"
    content = random.Random(1).randbytes(8 * MIB)
    base.write_bytes(content)
    create_image(overlay, "qcow2", 32 * MIB, backing=BackingName("base.img", "raw"))
    raw.write_bytes(bytes(4 * MIB))
    disks = [f"{overlay},format=qcow2,backing={base}", str(raw)]
    with Linux(Guest(guest.kernel, initrd), disks=disks) as linux:
        assert linux("cat /sys/block/vda/size").split() == ["65536"]
        there = linux("dd if=/dev/vda bs=1M count=8 2> /dev/null | sha256sum").split()[0]
        assert there == hashlib.sha256(content).hexdigest()
        # A raw disk stays raw, whatever the guest writes to its beginning.
        linux("dd if=/dev/vda of=/dev/vdb bs=1M count=1 2> /dev/null; printf 'QFI\\373\\0\\0\\0\\003' > /dev/vdb; sync")
        linux("mkfs.ext2 /dev/vda > /dev/null && mount /dev/vda /mnt")
        linux("dd if=/dev/urandom of=/mnt/file bs=64k count=100 2> /dev/null && sync && sha256sum /mnt/file > /mnt/sum")
        linux("umount /mnt && mount /dev/vda /mnt && sha256sum -c /mnt/sum && umount /mnt")
        linux("/bin/blkdiscard -f -o 30M /dev/vda")
        expected = linux("sha256sum < /dev/vda").split()[0]
    with open_image(overlay, format="qcow2", read_only=True) as image:
        assert image.check().clean
        assert hashlib.sha256(read_at(image, 0, image.size)).hexdigest() == expected
    subprocess.run(["qemu-img", "check", str(overlay)], check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert base.read_bytes() == content, "what is below is never written"
    disk = open_disk(BlockOptions(path=str(raw)))
    assert disk.size == 4 * MIB
    assert read_at(disk, 0, 8) == b"QFI\xfb\0\0\0\3"
    disk.close()


def test_what_is_below_opens_only_where_it_is_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "images", tmp_path / "secret"
    inside.mkdir()
    outside.write_bytes(b"secret".ljust(MIB, b"x"))
    (inside / "base").write_bytes(bytes(MIB))
    (inside / "link").symlink_to(outside)
    for name, format, backing, says in (
        ("base", "raw", None, "not allowed"),
        (str(outside), "raw", str(inside), "not allowed"),
        ("../secret", "raw", str(inside), "not allowed"),
        ("link", "raw", str(inside), "not allowed"),
        ("base", None, str(inside), "says nothing of the format"),
        ("nbd://host/disk", "raw", str(inside), "not allowed|not a file"),
        ("json:{}", "raw", str(inside), "not a file"),
        ("disk", "qcow2", str(inside), "loop"),
        ("base", "raw", str(inside), None),
        ("base", "raw", f"/nowhere:{inside / 'base'}", None),
    ):
        create_image(inside / "disk", "qcow2", MIB, backing=BackingName(name, format), check_backing=False)
        options = BlockOptions(path=str(inside / "disk"), format="qcow2", backing=backing)
        if says is None:
            open_disk(options).close()
            continue
        with pytest.raises(UserError, match=says):
            open_disk(options)


@pytest.mark.parametrize("name", ["ba\0se", "ba\ud800se", "nbd://host/disk", "json:{}"])
def test_what_is_no_file_at_all(name: str) -> None:
    with pytest.raises(UserError, match="not a file"):
        backing_path("overlay", name)
