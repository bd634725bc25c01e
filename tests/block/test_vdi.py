"""VDI images: what all formats promise, the count of blocks, and space that is found again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.image import create_image, open_image
from skep.errors import UserError
from tests.block.conformance import ImageConformance, run

MIB = 1 << 20


class TestVdi(ImageConformance):
    format = "vdi"
    variants = ({}, {"static": "on"})
    qemu_checks = True
    cuts = 10


def test_a_wrong_count_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    create_image(path, "vdi", 4 * MIB)
    with open_image(path) as image:
        write_at(image, MIB, b"x" * 512)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), (0).to_bytes(4, "little"), 0x184)
    with open_image(path, read_only=True) as image:
        assert image.check().corruptions == 1
    with open_image(path) as image:
        assert image.check().clean
    run("qemu-img", "check", "-f", "vdi", path)


def test_space_that_was_leaked_is_used_again_as_zeros(tmp_path: Path) -> None:
    """A map that lost its changes, with the data in the file: blocks have no other places to go."""
    path = tmp_path / "disk.vdi"
    create_image(path, "vdi", 4 * MIB)
    empty = path.read_bytes()
    with open_image(path) as image:
        write_at(image, 0, b"x" * 4 * MIB)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), empty[:MIB], 0)
    with open_image(path) as image:
        assert (image.check().leaks, image.check().corruptions) == (4, 0)
        for block in range(4):
            write_at(image, block * MIB + 512, b"y" * 512)
        for block in range(4):
            assert read_at(image, block * MIB, 2048) == bytes(512) + b"y" * 512 + bytes(1024)
        assert image.check().clean
    run("qemu-img", "check", "-f", "vdi", path)


def test_an_image_over_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    create_image(path, "vdi", MIB)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"\1", 0x1A8)
    with pytest.raises(UserError, match="lies over another"):
        open_image(path)
