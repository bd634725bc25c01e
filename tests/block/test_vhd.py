"""VHD images: what all formats promise, geometries, overlays, and what libvhdi reads."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName
from skep.block.image import create_image, open_image
from skep.errors import UserError
from tests.block.conformance import ImageConformance, run

MIB = 1 << 20


class TestVhd(ImageConformance):
    format = "vpc"
    variants = ({"force_size": "on"}, {"force_size": "on", "subformat": "fixed"})
    size = 5 << 20
    cuts = 10


class TestOverlay(ImageConformance):
    """Over an image of zeros; QEMU knows no differencing images."""

    format = "vpc"
    variants: ClassVar = ({"force_size": "on"},)
    qemu = ""
    cuts = 10

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        path = path or self.path
        parent = path.with_name("parent.vhd")
        if not parent.exists():
            create_image(parent, "vpc", self.size, options=options)
        create_image(path, "vpc", options=options, backing=BackingName("parent.vhd", "vpc"))
        return path


@pytest.mark.parametrize("size", ["100k", "1M", "5M", "100M", "3G", "31G", "100G", "127G", "130G", "2000G"])
def test_sizes_are_rounded_as_by_qemu(tmp_path: Path, size: str) -> None:
    theirs, ours = tmp_path / "theirs.vhd", tmp_path / "ours.vhd"
    run("qemu-img", "create", "-q", "-f", "vpc", theirs, size)
    number = int(size[:-1]) << {"k": 10, "M": 20, "G": 30}[size[-1]]
    create_image(ours, "vpc", number)
    said = json.loads(run("qemu-img", "info", "--output=json", theirs))["virtual-size"]
    with open_image(theirs) as one, open_image(ours) as other:
        assert one.size == other.size == said
    assert ours.read_bytes()[48:64] == theirs.read_bytes()[48:64]


@pytest.mark.parametrize("format", ["vpc", "vhdx"])
def test_overlays_are_as_libvhdi_reads_them(tmp_path: Path, format: str) -> None:
    rng = random.Random(3)
    size = 5 * MIB
    # Version 20210425 takes all sectors of a VHD bitmap's byte behind one that is there for being there.
    unit = 4096 if format == "vpc" else 512
    parent, overlay = tmp_path / f"parent.{format}", tmp_path / f"overlay.{format}"
    options = {"force_size": "on"} if format == "vpc" else {"block_size": "1M"}
    create_image(parent, format, size, options=options)
    model = bytearray(rng.randbytes(3 * MIB)) + bytes(2 * MIB)
    with open_image(parent) as image:
        write_at(image, 0, model[: 3 * MIB])
    create_image(overlay, format, options=options, backing=BackingName(parent.name, format))
    with open_image(overlay) as image:
        for i in range(30):
            offset = rng.randrange((size - 300 * 512) // unit) * unit
            data = bytes([i]) * unit * rng.choice((1, 2, 8, 30))
            write_at(image, offset, data)
            model[offset : offset + len(data)] = data
        assert read_at(image, 0, size) == model
    reader = (
        "import pyvhdi, sys; child, parent = pyvhdi.file(), pyvhdi.file(); child.open(sys.argv[1]); "
        "parent.open(sys.argv[2]); child.set_parent(parent); "
        "open(sys.argv[3], 'wb').write(child.read_buffer_at_offset(child.get_media_size(), 0))"
    )
    run("/usr/bin/python3", "-c", reader, overlay, parent, tmp_path / "read")
    assert (tmp_path / "read").read_bytes() == model


def test_another_parent_is_refused(tmp_path: Path) -> None:
    create_image(tmp_path / "parent.vhd", "vpc", MIB)
    create_image(tmp_path / "overlay.vhd", "vpc", backing=BackingName("parent.vhd", "vpc"))
    create_image(tmp_path / "parent.vhd", "vpc", MIB)
    with pytest.raises(UserError, match="not its parent"):
        open_image(tmp_path / "overlay.vhd")


def test_the_footer_is_at_the_end_after_each_flush(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_image(path, "vpc", 20 * MIB)
    with open_image(path) as image:
        for i in range(5):
            write_at(image, i * 2 * MIB, b"x" * 512)
            image.flush()
            data = path.read_bytes()
            assert data[-512:] == data[:512]


def test_one_repair_is_enough(tmp_path: Path) -> None:
    """An entry is dropped for lying in another's block: what else it had is nobody's then. The footer stays in its
    place."""
    path = tmp_path / "disk.vhd"
    create_image(path, "vpc", 6 * MIB)
    with open_image(path) as image:
        for number in range(2):
            write_at(image, number * 2 * MIB, b"x" * MIB)
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[528:536], "big")  # "Table Offset" of the dynamic disk header
    first = int.from_bytes(data[table : table + 4], "big")
    data[table + 4 : table + 8] = (first + 2048).to_bytes(4, "big")
    path.write_bytes(data)
    with open_image(path) as image:
        result = image.repair()
        assert (result.corruptions, result.corruptions_fixed) == (1, 1) and result.leaks == result.leaks_fixed > 0
        assert (found := image.check()).clean, found
        assert read_at(image, 0, MIB) == b"x" * MIB
    assert len(path.read_bytes()) == len(data)
