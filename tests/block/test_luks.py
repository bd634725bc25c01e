"""LUKS images: what all formats promise, as far as a disk that is not zeros can; QEMU and cryptsetup agree with us."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from skep.block.backend import read_at, write_at
from skep.block.format import Image
from skep.block.image import create_image, open_image
from skep.block.luks.cipher import SectorCipher
from skep.block.luks.image import LuksImage
from skep.errors import UserError
from tests.block.conformance import SECTOR, ImageConformance, Recording, run, write_sparse

MIB = 1 << 20
SECRETS = {"one": b"open sesame", "two": b"12345", "wrong": b"please"}
KEY = {"key-secret": "one"}
VARIANTS: tuple[Mapping[str, str], ...] = (
    {},
    {"cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha512"},
    {"cipher-mode": "cbc", "ivgen-alg": "plain", "cipher-alg": "aes-128", "hash-alg": "sha1"},
    {"cipher-mode": "ecb", "hash-alg": "ripemd160"},
)


def qemu(path: Path, secret: str = "one") -> tuple[str, ...]:
    told = f"secret,id={secret},data={SECRETS[secret].decode()}"
    return ("--object", told, "--image-opts", f"driver=luks,key-secret={secret},file.filename={path}")


class TestLuks(ImageConformance):
    format = "luks"
    variants = VARIANTS[:1]
    cuts: ClassVar[int] = 3

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        path = path or self.path
        create_image(path, "luks", self.size, options={**KEY, "iter-time": "1", **options}, secrets=SECRETS)
        with self.open(path) as image:
            image.write_zeroes(0, image.size, False)
        return path

    def open(self, path: Path | None = None, **how: bool) -> Image:
        return open_image(path or self.path, format="luks", options=KEY, secrets=SECRETS, **how)  # type: ignore[arg-type]

    def recorded(self, recording: Recording) -> Image:
        return LuksImage.open(recording.open(), KEY, SECRETS)

    def judge(self, model: bytes | bytearray) -> None:
        raw = self.path.with_suffix(".model")
        write_sparse(raw, model)
        opened, other = qemu(self.path), f"driver=raw,file.filename={raw}"
        run("qemu-img", "compare", *opened, other)

    def test_it_is_found_out(self) -> None:
        self.make({})
        with open_image(self.path, read_only=True, may_stay_locked=True) as image:
            assert image.format == "luks" and image.locked

    def test_resize(self) -> None:
        """What is beyond the old end is anything."""
        self.make({})
        with self.open() as image:
            write_at(image, 0, b"x" * self.size)
            image.resize(2 * self.size)
            write_at(image, self.size, b"y" * self.size)
            self.same(image, model := b"x" * self.size + b"y" * self.size)
        self.judge(model)


@pytest.mark.parametrize("options", VARIANTS)
def test_qemu_and_cryptsetup_agree(tmp_path: Path, options: Mapping[str, str]) -> None:
    """Made by us, filled by QEMU; read by us; another password by us, known to both."""
    path, data = tmp_path / "disk.luks", random.Random(1).randbytes(MIB)
    create_image(path, "luks", MIB, options={**KEY, "iter-time": "1", **options}, secrets=SECRETS)
    (tmp_path / "raw").write_bytes(data)
    secret, told, _, target = qemu(path)
    run("qemu-img", "convert", "-n", "--target-image-opts", "-f", "raw", tmp_path / "raw", secret, told, target)
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        assert read_at(image, 0, MIB) == data
        assert read_at(image, 5 * SECTOR, 7 * SECTOR) == data[5 * SECTOR : 12 * SECTOR]
        image.amend({"state": "active", "new-secret": "two", "iter-time": "1", "keyslot": "5"}, SECRETS)
    assert run("qemu-img", "compare", *qemu(path, "two"), f"driver=raw,file.filename={tmp_path}/raw")
    if options.get("cipher-mode") != "ecb":  # cryptsetup has none with IVs
        assert cryptsetup_knows(path, b"12345") and cryptsetup_knows(path, b"open sesame")
        assert not cryptsetup_knows(path, b"please")
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        image.amend({"state": "inactive", "old-secret": "one"}, SECRETS)
        with pytest.raises(UserError, match="All the active keyslots"):
            image.amend({"state": "inactive", "keyslot": "5"}, SECRETS)
    with pytest.raises(UserError, match="Invalid password"):
        open_image(path, options=KEY, secrets=SECRETS)
    run("qemu-img", "compare", *qemu(path, "two"), f"driver=raw,file.filename={tmp_path}/raw")


def cryptsetup_knows(path: Path, password: bytes) -> bool:
    tool = shutil.which("cryptsetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert tool, "the package cryptsetup-bin"
    command = [tool, "open", "--test-passphrase", "--type", "luks1", "--key-file", "-", path]
    return subprocess.run(command, input=password, capture_output=True, check=False, timeout=60).returncode == 0


def test_a_key_of_192_bits(tmp_path: Path) -> None:
    """Its material is no whole number of sectors; QEMU 7.2 cannot, and ends in an assertion."""
    path, options = tmp_path / "disk.luks", {"cipher-alg": "aes-192", "cipher-mode": "cbc", "iter-time": "1"}
    create_image(path, "luks", MIB, options={**KEY, **options}, secrets=SECRETS)
    open_image(path, options=KEY, secrets=SECRETS).close()
    assert cryptsetup_knows(path, b"open sesame")


def test_made_by_cryptsetup(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    path.write_bytes(bytes(4 * MIB))
    tool = shutil.which("cryptsetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert tool, "the package cryptsetup-bin"
    command = [tool, "luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", "-", path]
    subprocess.run(command, input=b"open sesame", check=True, capture_output=True, timeout=60)
    with open_image(path, options=KEY, secrets=SECRETS) as image:
        write_at(image, 512, b"hello".ljust(SECTOR))
    assert b"hello" not in path.read_bytes()
    assert "read 512/512" in run("qemu-io", *qemu(path), "-c", "read -P 0x20 768 256", "-c", "read 512 512")


def test_without_a_password(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    with pytest.raises(UserError, match="'key-secret' is required"):
        create_image(path, "luks", MIB)
    assert not path.exists()
    create_image(path, "luks", MIB, options={**KEY, "iter-time": "1"}, secrets=SECRETS)
    with pytest.raises(UserError, match="password was not told"):
        open_image(path)
    with pytest.raises(UserError, match="no such secret"):
        open_image(path, options={"key-secret": "three"}, secrets=SECRETS)
    with pytest.raises(UserError, match="Invalid password"):
        open_image(path, options={"key-secret": "wrong"}, secrets=SECRETS)
    with open_image(path, may_stay_locked=True) as image:
        assert image.encrypted and image.info()["cipher-alg"] == "aes-256"
        with pytest.raises(OSError, match="password was not told"):
            read_at(image, 0, SECTOR)
        with pytest.raises(OSError, match="password was not told"):
            write_at(image, 0, bytes(SECTOR))


@pytest.mark.parametrize(
    ("at", "field", "why"),
    [
        (164, b"\xff\xff\xff\xff", "iterations"),
        (164, bytes(4), "no iterations"),
        (212, b"\x7f\xff\xff\xff", "iterations"),
        (208, struct.pack(">I", 5), "in state 0x5"),
        (208 + 44, struct.pack(">I", 1), "stripes"),
        (208 + 44, b"\xff\xff\xff\xff", "stripes"),
        (208 + 40, struct.pack(">I", 1), "something else"),
        (208 + 48 + 40, struct.pack(">I", 8), "something else"),
        (208 + 40, b"\xff\xff\xff\xff", "beyond the end|payload"),
        (104, struct.pack(">I", 100), "payload"),
        (104, b"\xff\xff\xff\xff", "before its payload"),
        (108, b"\xff\xff\xff\xff", "a key of"),
        (8, b"serpent\0", "cipher"),
        (40, b"xts-random\0", "mode"),
        (40, b"cbc-essiv:md4\0", "mode"),
        (72, b"md4\0", "hash"),
        (6, b"\0\2", "version 2"),
        (168, b"\xff" * 4, "the name"),
    ],
)
def test_a_hostile_header(tmp_path: Path, at: int, field: bytes, why: str) -> None:
    path = tmp_path / "disk.luks"
    create_image(path, "luks", MIB, options={**KEY, "iter-time": "1"}, secrets=SECRETS)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(field)
    with pytest.raises(UserError, match=why):
        open_image(path, format="luks", options=KEY, secrets=SECRETS)


@pytest.mark.parametrize("bits", [128, 256])
def test_xts_is_that_of_the_standard(bits: int) -> None:
    """Many sectors at once, as one by one by the library's own XTS."""
    key = random.Random(bits).randbytes(bits // 4)
    data = random.Random(1).randbytes(600 * SECTOR)
    cipher = SectorCipher(key, "xts", "plain64")
    for first in (0, 1, (1 << 32) - 2, 1 << 40):
        alone = b"".join(
            Cipher(algorithms.AES(key), modes.XTS((first + i).to_bytes(16, "little")))
            .encryptor()
            .update(data[i * SECTOR : (i + 1) * SECTOR])
            for i in range(600)
        )
        assert cipher.encrypt(data, first) == alone
        assert cipher.decrypt(alone, first) == data
