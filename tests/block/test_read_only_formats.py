"""Formats that are only read: qcow, Parallels and DMG, from images of QEMU's and of our own making."""

from __future__ import annotations

import base64
import bz2
import lzma
import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from skep.block.backend import read_at
from skep.block.dmg import _unpack_adc
from skep.block.format import DamagedImage
from skep.block.image import open_image
from skep.errors import UserError
from tests.block.conformance import run

MIB = 1 << 20


def disk(size: int) -> bytes:
    """Some noise, some text, and zeros between."""
    rng = random.Random(size)
    data = bytearray(size)
    for _ in range(12):
        n = rng.choice((512, 4096, 70000))
        at = rng.randrange(size - n)
        data[at : at + n] = rng.randbytes(n) if rng.random() < 0.5 else b"skep" * (n // 4)
    return bytes(data)


@pytest.mark.parametrize(("format", "options"), [("qcow", []), ("qcow", ["-c"]), ("parallels", [])])
def test_what_qemu_wrote_is_read(tmp_path: Path, format: str, options: list[str]) -> None:
    model = disk(5 * MIB + 512 * 7)
    (tmp_path / "raw").write_bytes(model)
    path = tmp_path / "disk"
    command = ["qemu-img", "convert", *options, "-f", "raw", "-O", format, tmp_path / "raw", path]
    # Version 7.2 says 1 for a compressed qcow whatever became of it.
    assert subprocess.run(command, check=False, timeout=60).returncode == bool(options)
    with open_image(path, read_only=True) as image:
        assert image.format == format and image.size >= len(model)
        assert read_at(image, 0, len(model)) == model
        rng = random.Random(7)
        for _ in range(50):
            at, n = rng.randrange(len(model) // 512) * 512, rng.randrange(1, 300) * 512
            assert read_at(image, at, min(n, len(model) - at)) == model[at : at + n]
        at = 0
        for extent in image.extents():
            assert extent.offset == at
            at += extent.length
            if extent.zero:
                assert not any(read_at(image, extent.offset, extent.length))
        assert at == image.size
    with pytest.raises(UserError, match="only read"):
        open_image(path)


def test_a_qcow_overlay(tmp_path: Path) -> None:
    model = bytearray(disk(MIB))
    (tmp_path / "raw").write_bytes(model)
    path = tmp_path / "disk.qcow"
    run("qemu-img", "create", "-q", "-f", "qcow", "-b", tmp_path / "raw", "-F", "raw", path)
    run("qemu-io", "-f", "qcow", "-c", "write -P 7 1000k 3k", path)
    model[1000 << 10 : 1003 << 10] = bytes([7]) * 3072
    with open_image(path, read_only=True) as image:
        assert read_at(image, 0, MIB) == model


def test_one_qcow_table_for_many(tmp_path: Path) -> None:
    """A small file that seems to have a lot in it: whoever looked at all of that would take minutes."""
    path, tables = tmp_path / "disk.qcow", 8192
    head = struct.pack(">4sIQIIQBBxxIQ", b"QFI\xfb", 1, 0, 0, 0, tables << 13 + 12, 12, 13, 0, 512)
    here = 512 + tables * 8
    path.write_bytes(head.ljust(512, b"\0") + struct.pack(">Q", here) * (tables + (1 << 13)))
    with open_image(path, read_only=True) as image:
        assert len(read_at(image, 0, 4096)) == 4096
        with pytest.raises(DamagedImage, match=f"{tables} tables"):
            list(image.extents())


def test_a_parallels_image_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "disk.hds"
    run("qemu-img", "create", "-q", "-f", "parallels", path, "8M")
    run("qemu-io", "-f", "parallels", "-c", "write 0 64k", "-c", "write 3M 64k", path)
    with open_image(path, read_only=True) as image:
        assert image.check().clean
    data = bytearray(path.read_bytes())
    data[64:68] = data[64 + 12 : 64 + 16]
    path.write_bytes(data)
    with open_image(path, read_only=True) as image:
        assert image.check().corruptions == 1


def packed(kind: int, data: bytes) -> bytes:
    match kind:
        case 0x80000004:
            parts = (data[i : i + 128] for i in range(0, len(data), 128))
            return b"".join(bytes([0x80 | len(part) - 1]) + part for part in parts)
        case 0x80000005:
            return zlib.compress(data)
        case 0x80000006:
            return bz2.compress(data)
        case 0x80000007:
            return b"bvx-" + struct.pack("<I", len(data)) + data + b"bvx$"
        case 0x80000008:
            return lzma.compress(data)
        case 1:
            return data
        case _:
            return b""


def dmg(model: bytes, kinds: tuple[int, ...], plist: bool = True) -> bytes:
    """An image with chunks of 256 KiB, of these kinds in turn; two tables; zeros are not stored."""
    body, tables, step = bytearray(b"\0" * 100), [], 512
    half = len(model) // 1024 // step * step
    for first, end in ((0, half), (half, len(model) // 512)):
        chunks = b""
        for i, sector in enumerate(range(first, end, step)):
            n = min(step, end - sector)
            part = model[sector * 512 : (sector + n) * 512]
            kind = kinds[i % len(kinds)] if any(part) else 2 * (i % 2)
            stored = packed(kind, part)
            chunks += struct.pack(">IIQQQQ", kind, 0, sector - first, n, len(body) - 100, len(stored))
            body += stored
        chunks += struct.pack(">IIQQQQ", 0xFFFFFFFF, 0, end - first, 0, len(body) - 100, 0)
        head = struct.pack(">4sIQQQII24x136xI", b"mish", 1, first, end - first, 0, 520, 0, len(chunks) // 40)
        tables.append(head + chunks)
    text = resources = b""
    if plist:
        entries = "".join(f"<dict><key>Data</key><data>{base64.b64encode(t).decode()}</data></dict>" for t in tables)
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict><key>resource-fork</key><dict>'
            f"<key>blkx</key><array>{entries}</array><key>plst</key><array></array></dict></dict></plist>"
        ).encode()
    else:
        data = b"".join(struct.pack(">I", len(table)) + table for table in tables)
        resources = struct.pack(">4I", 256, 256 + len(data), len(data), 0).ljust(256, b"\0") + data
    at = len(body)
    places = (0, 100, at - 100, at if resources else 0, len(resources))
    trailer = struct.pack(">4sIII5QII16x", b"koly", 4, 512, 1, *places, 1, 1)
    trailer = trailer.ljust(216, b"\0") + struct.pack(">QQ", at if text else 0, len(text))
    trailer = trailer.ljust(492, b"\0") + struct.pack(">Q", len(model) // 512)
    return bytes(body) + text + resources + trailer.ljust(512, b"\0")


@pytest.mark.parametrize("plist", [True, False])
@pytest.mark.parametrize("kinds", [(1,), (0x80000005,), (0x80000005, 1, *range(0x80000006, 0x80000009), 0x80000004)])
def test_a_dmg(tmp_path: Path, kinds: tuple[int, ...], plist: bool) -> None:
    model = disk(5 * MIB)
    path = tmp_path / "disk.dmg"
    path.write_bytes(dmg(model, kinds, plist))
    with open_image(path, read_only=True) as image:
        assert image.format == "dmg" and image.size == len(model)
        assert read_at(image, 0, len(model)) == model
        rng = random.Random(7)
        for _ in range(50):
            at, n = rng.randrange(len(model) // 512) * 512, rng.randrange(1, 3000) * 512
            assert read_at(image, at, min(n, len(model) - at)) == model[at : at + n]
        assert sum(extent.length for extent in image.extents()) == image.size
    if len(kinds) == 1:
        (tmp_path / "raw").write_bytes(model)
        run("qemu-img", "compare", "-f", "dmg", "-F", "raw", path, tmp_path / "raw")


def test_adc() -> None:
    """All three kinds of codes; a copy may reach into itself."""
    stream = bytearray(b"\x83abcd" + bytes([0x40 | 6, 0, 3]) + bytes([3 << 2, 1]))
    assert _unpack_adc(stream, 100) == b"abcd" + b"abcdabcdab" + b"ababab"
    with pytest.raises(ValueError, match="before the beginning"):
        _unpack_adc(bytearray(b"\x80a\x40\x00\x07"), 100)


@pytest.mark.parametrize("kind", [0x80000003, 0x80000009])
def test_a_dmg_that_we_cannot_unpack(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "disk.dmg"
    path.write_bytes(dmg(b"x" * MIB, (kind,)))
    with pytest.raises(UserError, match="not supported"):
        open_image(path, read_only=True)
