"""VHDX images: what all formats promise, and the log, overlays and sectors of 4096 bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from skep.block.backend import read_at, write_at
from skep.block.crc32c import crc32c
from skep.block.file import open_file
from skep.block.format import BackingName
from skep.block.image import create_image, open_image
from skep.block.vhdx import layout
from skep.errors import UserError
from tests.block.conformance import ImageConformance, run

MIB = 1 << 20


class TestVhdx(ImageConformance):
    format = "vhdx"
    variants = ({"block_size": "1M"}, {"subformat": "fixed", "block_size": "1M"})
    qemu_checks = True
    cuts = 10


class TestOverlay(ImageConformance):
    """A differencing image over one of zeros: QEMU knows none, so only we look."""

    format = "vhdx"
    variants: ClassVar[tuple[Mapping[str, str], ...]] = ({"block_size": "1M"},)
    qemu = ""
    cuts = 10

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        path = path or self.path
        parent = path.with_name("parent.vhdx")
        if not parent.exists():
            create_image(parent, "vhdx", self.size)
        create_image(path, "vhdx", options=options, backing=BackingName("parent.vhdx", "vhdx"))
        return path


def test_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"123456789" + bytes(1007)) == crc32c(bytes(7), crc32c(bytes(1000), 0xE3069283))


def test_an_overlay_shows_its_parent_sector_by_sector(tmp_path: Path) -> None:
    rng = random.Random(1)
    model = bytearray(rng.randbytes(4 * MIB))
    parent, overlay = tmp_path / "parent.vhdx", tmp_path / "overlay.vhdx"
    create_image(parent, "vhdx", len(model), options={"block_size": "1M"})
    with open_image(parent) as image:
        write_at(image, 0, model)
    create_image(overlay, "vhdx", options={"block_size": "2M"}, backing=BackingName("parent.vhdx", None))
    for _ in range(3):
        with open_image(overlay) as image:
            for _ in range(40):
                first = rng.randrange(len(model) // 512)
                length = min(rng.choice((1, 7, 8, 9, 64)) * 512, len(model) - first * 512)
                data = rng.randbytes(length)
                match rng.randrange(4):
                    case 0:
                        image.write_zeroes(first * 512, length, True)
                        data = bytes(length)
                    case _:
                        write_at(image, first * 512, data)
                model[first * 512 : first * 512 + length] = data
            image.write_zeroes(2 * MIB, 2 * MIB, False)
            model[2 * MIB :] = bytes(2 * MIB)
            assert read_at(image, 0, len(model)) == model
        with open_image(overlay, read_only=True) as image:
            assert read_at(image, 0, len(model)) == model
            assert image.check().clean
            assert {extent.depth for extent in image.extents()} == {0, 1}


def test_the_parent_must_be_the_one_that_it_was(tmp_path: Path) -> None:
    create_image(tmp_path / "parent.vhdx", "vhdx", MIB)
    create_image(tmp_path / "overlay.vhdx", "vhdx", backing=BackingName("parent.vhdx", "vhdx"))
    with open_image(tmp_path / "parent.vhdx") as parent:
        write_at(parent, 0, b"x" * 512)
    with pytest.raises(UserError, match="was changed"):
        open_image(tmp_path / "overlay.vhdx")


def test_a_log_that_qemu_wrote_is_replayed(tmp_path: Path) -> None:
    """QEMU empties its log after each entry, so we take its last change back, and say that the log counts."""
    path = tmp_path / "disk.vhdx"
    run("qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "8M")
    run("qemu-io", "-f", "vhdx", "-c", "write -P 1 0 64k", "-c", "write -P 2 1M 64k", path)
    with open_file(str(path), lock=False) as file:
        header = layout.read_header(file, str(path))
        entry = read_at(file, header.log_offset + 8192, 64)
        regions = layout.read_regions(file, str(path), layout.Region(header.log_offset, header.log_length))
        header = header.next(log=bytes(entry[32:48]))
        write_at(file, layout.HEADER_AT[header.slot], header.pack())
        write_at(file, regions[layout.BAT].offset, bytes(4096))
    with pytest.raises(UserError, match="log has to be replayed"):
        open_image(path, read_only=True)
    with open_image(path) as image:
        assert [read_at(image, i * MIB, 1)[0] for i in range(3)] == [1, 2, 0]
        assert image.check().corruptions_fixed == 1
    run("qemu-img", "check", "-f", "vhdx", path)


def test_a_log_that_we_left_is_replayed_by_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_image(path, "vhdx", 8 * MIB, options={"block_size": "1M"})
    image = open_image(path)
    for i in range(5):
        write_at(image, i * MIB, bytes([i + 1]) * 512)
        image.flush()
    left = path.read_bytes()
    with open_file(str(path), read_only=True, lock=False) as file:
        header = layout.read_header(file, str(path))
        regions = layout.read_regions(file, str(path), layout.Region(header.log_offset, header.log_length))
    image.close()
    # What the last commit wrote in place is lost; the log has it.
    at = regions[layout.BAT].offset
    path.write_bytes(left[:at] + bytes(4096) + left[at + 4096 :])
    run("qemu-img", "check", "-r", "all", "-f", "vhdx", path)
    with open_image(path, read_only=True) as image:
        assert [read_at(image, i * MIB, 1)[0] for i in range(6)] == [1, 2, 3, 4, 5, 0]


def test_a_table_larger_than_a_log_entry_is_committed(tmp_path: Path) -> None:
    """Changes of more sectors of the BAT than one entry of the log holds."""
    path = tmp_path / "disk.vhdx"
    create_image(path, "vhdx", 128 << 30, options={"block_size": "1M"})
    with open_image(path) as image:
        for i in range(250):
            write_at(image, i * 512 * MIB, i.to_bytes(512, "little"))
    with open_image(path, read_only=True) as image:
        assert [int.from_bytes(read_at(image, i * 512 * MIB, 512), "little") for i in range(250)] == list(range(250))
        assert image.check().clean


def test_repair_drops_what_two_blocks_claim(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_image(path, "vhdx", 8 * MIB, options={"block_size": "1M"})
    with open_image(path) as image:
        write_at(image, 0, b"a" * 512)
        write_at(image, MIB, b"b" * 512)
    with open(path, "r+b") as file:
        fd = file.fileno()
        at = 3 * MIB
        os.pwrite(fd, os.pread(fd, 8, at), at + 8)  # block 1 is where block 0 is
        os.pwrite(fd, (1 << 40 | 6).to_bytes(8, "little"), at + 16)  # block 2 is nowhere
    with open_image(path) as image:
        result = image.check()
        assert (result.corruptions, result.leaks) == (2, 1), result
        with pytest.raises(OSError, match="damaged"):
            read_at(image, 2 * MIB, 512)
        assert image.repair().corruptions_fixed == 2
        assert image.check().clean
        assert bytes(read_at(image, 0, 1)) == b"a"
        assert not any(read_at(image, MIB, 2 * MIB))


def test_there_are_always_sequence_numbers_left(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_image(path, "vhdx", MIB)
    with open_file(str(path)) as file:
        header = replace(layout.read_header(file, str(path)), sequence=(1 << 64) - 1)
        write_at(file, layout.HEADER_AT[header.slot], header.pack())
    with pytest.raises(UserError, match="sequence number"):
        open_image(path)
