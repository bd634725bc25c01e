"""qcow2 images that are encrypted: all that others promise, and QEMU reads and writes the same."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName, Can, Image
from skep.block.image import create_image, open_image
from skep.block.qcow2.image import Qcow2Image
from skep.errors import UserError
from tests.block.conformance import SECTOR, ImageConformance, Recording, run, write_sparse

MIB = 1 << 20
SECRETS = {"one": b"open sesame", "two": b"12345"}
KEY = {"encrypt.key-secret": "one"}
LUKS = {**KEY, "encrypt.format": "luks", "encrypt.iter-time": "1"}


def qemu(path: Path, secret: str = "one", format: str = "luks") -> tuple[str, str, str, str]:
    told = f"secret,id={secret},data={SECRETS[secret].decode()}"
    driver = f"driver=qcow2,encrypt.format={format},encrypt.key-secret={secret},file.filename={path}"
    return ("--object", told, "--image-opts", driver)


class TestEncryptedQcow2(ImageConformance):
    format = "qcow2"
    variants: ClassVar[tuple[Mapping[str, str], ...]] = (
        {},
        {"cluster_size": "16384", "extended_l2": "on", "encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "essiv"},
    )
    cuts: ClassVar[int] = 3

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        path = path or self.path
        create_image(path, "qcow2", self.size, options={**LUKS, **options}, secrets=SECRETS)
        return path

    def open(self, path: Path | None = None, **how: bool) -> Image:
        return open_image(path or self.path, format="qcow2", options=KEY, secrets=SECRETS, **how)  # type: ignore[arg-type]

    def recorded(self, recording: Recording) -> Image:
        return Qcow2Image.open(recording.open(), KEY, SECRETS)

    def judge(self, model: bytes | bytearray) -> None:
        with self.open(read_only=True) as image:
            assert (found := image.check()).clean, found
        run("qemu-img", "check", *qemu(self.path))
        raw = self.path.with_suffix(".model")
        write_sparse(raw, model)
        run("qemu-img", "compare", *qemu(self.path), f"driver=raw,file.filename={raw}")

    def test_it_is_found_out(self) -> None:
        self.make({})
        with open_image(self.path, read_only=True, may_stay_locked=True) as image:
            assert image.format == "qcow2" and image.locked


def test_made_by_qemu(tmp_path: Path) -> None:
    """Filled by both, read by both, and nothing of it lies there unencrypted."""
    path, text = tmp_path / "disk.qcow2", b"all that is gold does not glitter"
    made = ["-o", "encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=10"]
    for attempt in range(10):  # QEMU gives up where the host is busy
        try:
            run("qemu-img", "create", *qemu(path)[:2], "-f", "qcow2", *made, path, "4M")
            break
        except AssertionError:
            assert attempt < 9
    run("qemu-io", *qemu(path), "-c", "write -P 7 1M 64k")
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        assert read_at(image, MIB, 65536) == b"\7" * 65536
        write_at(image, MIB + SECTOR, text.ljust(SECTOR, b"!"))
        image.snapshot_create("now")
        write_at(image, MIB, bytes(SECTOR))
        assert not any(extent.host for extent in image.extents())
    assert text not in path.read_bytes()
    run("qemu-img", "check", *qemu(path))
    reads = ("read -P 0 1M 512", "read -P 0x21 1049160 416", "read -P 7 1025k 63k")
    assert "failed" not in run("qemu-io", *qemu(path), *(word for read in reads for word in ("-c", read)))
    with open_image(path, read_only=True, options=KEY, secrets=SECRETS) as image:
        image.show_snapshot("now")
        assert read_at(image, MIB, SECTOR) == b"\7" * SECTOR


def test_passwords_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", MIB, options=LUKS, secrets=SECRETS)
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        write_at(image, 0, b"x" * SECTOR)
        image.amend({"encrypt.state": "active", "encrypt.new-secret": "two", "encrypt.iter-time": "1"}, SECRETS)
    assert "failed" not in run("qemu-io", *qemu(path, "two"), "-c", "read -P 0x78 0 512")
    run("qemu-img", "amend", *qemu(path, "two"), "-o", "encrypt.state=inactive,encrypt.keyslot=0")
    with pytest.raises(UserError, match="Invalid password"):
        open_image(path, options=KEY, secrets=SECRETS)
    with open_image(path, options={"encrypt.key-secret": "two"}, secrets=SECRETS) as image:
        assert read_at(image, 0, SECTOR) == b"x" * SECTOR and image.check().clean


def test_over_and_below(tmp_path: Path) -> None:
    """Backing images are not encrypted because what lies over them is, and data files are."""
    base, over, data = tmp_path / "base.raw", tmp_path / "over.qcow2", tmp_path / "data.raw"
    base.write_bytes(b"b" * MIB)
    create_image(over, "qcow2", options=LUKS, secrets=SECRETS, backing=BackingName("base.raw", "raw"))
    with open_image(over, options=KEY, secrets=SECRETS) as image:
        write_at(image, 100 * SECTOR, b"over" * 128)
        assert read_at(image, 99 * SECTOR, 3 * SECTOR) == b"b" * SECTOR + b"over" * 128 + b"b" * SECTOR
    run("qemu-io", *qemu(over), "-c", "read -P 0x62 0 50k")
    apart = tmp_path / "apart.qcow2"
    create_image(apart, "qcow2", MIB, options={**LUKS, "data_file": str(data)}, secrets=SECRETS)
    with open_image(apart, options=KEY, secrets=SECRETS) as image:
        write_at(image, 0, b"apart!!!" * 64)
    assert b"apart!!!" not in data.read_bytes()
    assert "failed" not in run("qemu-img", "check", *qemu(apart))
    with open_image(apart, options=KEY, secrets=SECRETS) as image:
        assert read_at(image, 0, SECTOR) == b"apart!!!" * 64


def test_aes_of_old_is_read(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", random.Random(3).randbytes(MIB)
    secret, told, _, target = qemu(path, format="aes")
    made = ("-o", "encrypt.format=aes,encrypt.key-secret=one")
    run("qemu-img", "create", secret, told, "-f", "qcow2", *made, path, "1M")
    (tmp_path / "raw").write_bytes(data)
    run("qemu-img", "convert", "-n", "--target-image-opts", "-f", "raw", tmp_path / "raw", secret, told, target)
    with open_image(path, read_only=True, options=KEY, secrets=SECRETS) as image:
        assert image.info()["encrypt"] == {"format": "aes"}
        assert read_at(image, 0, MIB) == data
        room = bytearray(3 * SECTOR)
        with memoryview(room) as view:
            assert not image.read_now([view], 0)
            image.preadv([view[:100], view[100:]], 65536 - SECTOR)
        assert room == data[65536 - SECTOR : 65536 + 2 * SECTOR]
    with pytest.raises(UserError, match="only read"):
        open_image(path, options=KEY, secrets=SECRETS)


def test_without_a_password(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with pytest.raises(UserError, match="key-secret' is required"):
        create_image(path, "qcow2", MIB, options={"encrypt.format": "luks"})
    with pytest.raises(UserError, match="no longer safe"):
        create_image(path, "qcow2", MIB, options={**LUKS, "encrypt.format": "aes"}, secrets=SECRETS)
    with pytest.raises(UserError, match="says nothing without"):
        create_image(path, "qcow2", MIB, options={"encrypt.cipher-mode": "cbc"})
    assert not path.exists()
    create_image(path, "qcow2", MIB, options=LUKS, secrets=SECRETS)
    with pytest.raises(UserError, match=r"say encrypt.key-secret=ID"):
        open_image(path)
    with open_image(path, may_stay_locked=True) as image:
        assert Can.COMPRESS not in image.can
        write_refused(image)
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        write_at(image, 0, b"x" * SECTOR)
    with open_image(path, may_stay_locked=True) as image:
        assert not image.read_now([memoryview(bytearray(SECTOR))], 0)
        with pytest.raises(OSError, match="password was not told"):
            read_at(image, 0, SECTOR)
        write_refused(image)


def write_refused(image: Image) -> None:
    with pytest.raises(OSError, match="password was not told"):
        write_at(image, 0, b"y" * SECTOR)
    assert not image.write_now([memoryview(b"y" * SECTOR)], 0)


@pytest.mark.parametrize(
    ("pointer", "why"),
    [
        (b"", "does not say where"),
        (struct.pack(">QQ", 1 << 60, 4096), "LUKS header is at"),
        (struct.pack(">QQ", 513, 4096), "LUKS header is at"),
        (struct.pack(">QQ", 0, 4096), "another beginning"),
        (None, "beyond its end"),
    ],
)
def test_a_hostile_pointer(tmp_path: Path, pointer: bytes | None, why: str) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", MIB, options=LUKS, secrets=SECRETS)
    with open_image(path, may_stay_locked=True) as image:
        assert isinstance(image, Qcow2Image)
        offset, _ = struct.unpack(">QQ", image.header.extensions[0x0537BE77])
        image.header.extensions[0x0537BE77] = struct.pack(">QQ", offset, 4096) if pointer is None else pointer
        image.write_header()
    with pytest.raises(UserError, match=why):
        open_image(path, options=KEY, secrets=SECRETS)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_what_is_preallocated_is_zeros(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", MIB, options={**LUKS, "preallocation": preallocation}, secrets=SECRETS)
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        assert not any(read_at(image, 0, MIB)) and image.new_is_zeros
        assert all(extent.data for extent in image.extents())


def test_repair_keeps_the_header_of_luks(tmp_path: Path) -> None:
    """Its clusters are counted like all others, and found again where the counts are lost."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", MIB, options=LUKS, secrets=SECRETS)
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        write_at(image, 0, b"x" * 65536)
        assert isinstance(image, Qcow2Image)
        block = image.refcounts.table[0]
    with open(path, "r+b") as file:
        file.seek(block)
        file.write(bytes(200))
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        assert image.check().corruptions
        assert not image.repair().errors
        write_at(image, MIB // 2, b"y" * 65536)
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        assert image.check().clean
        assert read_at(image, 0, 65536) == b"x" * 65536 and read_at(image, MIB // 2, 65536) == b"y" * 65536
    run("qemu-img", "check", *qemu(path))
