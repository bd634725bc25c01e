"""VDI images: what all formats promise, the count of blocks, and space that is found again."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName
from skep.block.image import create_image, open_image, open_layers
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


def test_a_link_in_an_image_that_has_no_parent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    create_image(path, "vdi", MIB)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"\1", 0x1A8)
    with pytest.raises(UserError, match="is not possible"):
        open_image(path)


def differencing(tmp_path: Path) -> str:
    """A parent with two MiB of four, and a child: the layers to open."""
    create_image(tmp_path / "parent", "vdi", 4 * MIB)
    with open_image(tmp_path / "parent") as image:
        write_at(image, 0, b"p" * 2 * MIB)
    create_image(tmp_path / "child", "vdi", backing=BackingName("parent", "vdi"))
    return f"driver=vdi,file.filename={tmp_path}/child,backing.driver=vdi,backing.file.filename={tmp_path}/parent"


def test_differencing(tmp_path: Path) -> None:
    """The file of the child has no name of its parent: whoever opens it says where it is."""
    layers, rng = differencing(tmp_path), random.Random(1)
    before = (tmp_path / "parent").read_bytes()
    model = bytearray(b"p" * 2 * MIB + bytes(2 * MIB))
    for _ in range(3):
        with open_layers(layers) as image:
            assert read_at(image, 0, len(model)) == model
            for _ in range(10):
                at = rng.randrange(7 * MIB // 2048) * 1024
                data = rng.randbytes(rng.choice((512, 4096, 65536)))
                write_at(image, at, data)
                model[at : at + len(data)] = data
            block = rng.randrange(4)
            image.write_zeroes(block * MIB, MIB, True)
            model[block * MIB : (block + 1) * MIB] = bytes(MIB)
            assert read_at(image, 0, len(model)) == model
    with open_layers(layers, read_only=True) as image:
        assert read_at(image, 0, len(model)) == model
        assert sum(extent.length for extent in image.extents()) == image.size
    with open_image(tmp_path / "child", backing=False) as image:
        assert image.check().clean
    assert (tmp_path / "parent").read_bytes() == before


def test_a_child_knows_its_parent(tmp_path: Path) -> None:
    layers = differencing(tmp_path)
    with pytest.raises(UserError, match="has no name of it"):
        open_image(tmp_path / "child")
    shutil.copy(tmp_path / "parent", tmp_path / "copy")
    open_layers(layers.replace("/parent", "/copy")).close()
    create_image(tmp_path / "other", "vdi", 4 * MIB)
    with pytest.raises(UserError, match="over another image"):
        open_layers(layers.replace("/parent", "/other"))
    with open_image(tmp_path / "parent") as image:
        write_at(image, 0, b"q" * 512)
    with pytest.raises(UserError, match="was changed"):
        open_layers(layers)
    with pytest.raises(UserError, match="over a VDI only"):
        create_image(tmp_path / "child", "vdi", backing=BackingName("parent", "raw"))
    with pytest.raises(UserError, match="static"):
        create_image(tmp_path / "child", "vdi", backing=BackingName("parent", "vdi"), options={"static": "on"})
