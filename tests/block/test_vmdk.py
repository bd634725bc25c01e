"""VMDK images: what all formats promise, and the descriptor, compressed grains, extents, overlays."""

from __future__ import annotations

import json
import os
import random
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName, DamagedImage
from skep.block.image import create_image, open_image
from skep.errors import UserError
from tests.block.conformance import ImageConformance, run

MIB = 1 << 20


class TestSparse(ImageConformance):
    format = "vmdk"
    variants = ({}, {"zeroed_grain": "on"})
    qemu_checks = True
    cuts = 10


class TestStream(ImageConformance):
    format = "vmdk"
    variants = ({"subformat": "streamOptimized"},)
    qemu_checks = True
    cuts = 10


class TestManyFiles(ImageConformance):
    format = "vmdk"
    variants: ClassVar = tuple(
        {"subformat": name} for name in ("monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse")
    )
    qemu_checks = True


class TestSplit(ImageConformance):
    """Three extents of 1 MiB, as if those of 2 GiB were that small."""

    format = "vmdk"
    variants: ClassVar = ({"subformat": "twoGbMaxExtentSparse"}, {"subformat": "twoGbMaxExtentFlat"})
    qemu_checks = True
    cuts = 10

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        path = path or self.path
        lines = []
        for number in range(self.size // MIB):
            part = path.with_name(f"part{number}.vmdk")
            create_image(part, "vmdk", MIB, options=options)
            text = part.read_text()
            lines += [line for line in text.splitlines() if line.startswith("RW ")]
            part.unlink()
        path.write_text(text.replace(lines[-1], "\n".join(lines)))
        return path


class TestOverlay(ImageConformance):
    """Over an image of zeros."""

    format = "vmdk"
    variants: ClassVar = ({}, {"zeroed_grain": "on"})
    qemu_checks = True
    cuts = 10

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        path = path or self.path
        parent = path.with_name("parent.vmdk")
        if not parent.exists():
            create_image(parent, "vmdk", self.size)
        create_image(path, "vmdk", options=options, backing=BackingName("parent.vmdk", "vmdk"))
        return path


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized"])
def test_an_overlay_of_qemu(tmp_path: Path, subformat: str) -> None:
    """QEMU makes it, both write it in turn, grain by part of a grain; a longer disk than what is below."""
    rng = random.Random(1)
    model = bytearray(rng.randbytes(2 * MIB)) + bytes(MIB)
    parent, overlay = tmp_path / "parent.vmdk", tmp_path / "overlay.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", parent, "2M")
    with open_image(parent) as image:
        write_at(image, 0, model[: 2 * MIB])
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", overlay, "3M")
    for i in range(8):
        first, count = rng.randrange(5000), rng.choice((1, 100, 128, 700))
        offset, length = first * 512, count * 512
        if i % 2:
            run("qemu-io", "-f", "vmdk", "-c", f"write -P {i} {offset} {length}", overlay)
        else:
            with open_image(overlay) as image:
                write_at(image, offset, bytes([i]) * length)
        model[offset : offset + length] = bytes([i]) * length
        with open_image(overlay, read_only=True) as image:
            assert read_at(image, 0, len(model)) == model
    (tmp_path / "model").write_bytes(model)
    run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", overlay, tmp_path / "model")
    with open_image(parent) as image:
        write_at(image, 0, bytes(512))
    with pytest.raises(UserError, match="was changed"):
        open_image(overlay)


def test_a_descriptor_opens_what_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, "vmdk", MIB, options={"subformat": "monolithicFlat"})
    with pytest.raises(UserError, match="not allowed"):
        open_image(path, format="vmdk", inside=())
    with open_image(path, format="vmdk", inside=(str(tmp_path),)) as image:
        assert image.size == MIB
    path.write_bytes(path.read_bytes().replace(b"disk-flat.vmdk", b"/etc/passwd"))
    with pytest.raises(UserError, match="not allowed"):
        open_image(path, format="vmdk", inside=(str(tmp_path),))


def test_a_grain_that_is_written_again_is_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, "vmdk", MIB, options={"subformat": "streamOptimized"})
    model = bytearray(MIB)
    for i in range(1, 5):
        with open_image(path) as image:
            write_at(image, 512 * i, bytes([i]) * 65536)
        model[512 * i : 512 * i + 65536] = bytes([i]) * 65536
        assert path.read_bytes()[-512:] == bytes(512)  # the end-of-stream marker
    (tmp_path / "model").write_bytes(model)
    run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", path, tmp_path / "model")


def test_a_footer_counts_more_than_the_header(tmp_path: Path) -> None:
    """As VMware writes streams: the header says that the grain directory is in the footer."""
    path = tmp_path / "disk.vmdk"
    create_image(path, "vmdk", MIB, options={"subformat": "streamOptimized"})
    with open_image(path) as image:
        write_at(image, 0, b"x" * 65536)
    data = bytearray(path.read_bytes()[:-512])
    marker = (1).to_bytes(8, "little") + bytes(4) + (3).to_bytes(4, "little")
    data += marker.ljust(512, b"\0") + data[:512] + bytes(512)
    data[56:64] = b"\xff" * 8
    path.write_bytes(data)
    (tmp_path / "model").write_bytes(b"x" * 65536 + bytes(MIB - 65536))
    run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", path, tmp_path / "model")
    with open_image(path, read_only=True) as image:
        assert read_at(image, 0, MIB) == (tmp_path / "model").read_bytes()


def esx(path: Path, tables: int, places: list[int], rest: bytes) -> None:
    """An ESX sparse extent by hand, of grains of a sector, with such a grain directory, and with ``rest`` behind it."""
    grains = tables * 4096
    head = struct.pack("<4sIIIIIII", b"COWD", 1, 3, grains, 1, 4, tables, 100).ljust(4 * 512, b"\0")
    extent = path.with_name("disk-delta.vmdk")
    extent.write_bytes(head + struct.pack(f"<{tables}I", *places).ljust(-(-tables * 4 // 512) * 512, b"\0") + rest)
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="vmfsSparse"\n\n# Extent description\nRW {grains} VMFSSPARSE "{extent.name}"\n'
    )


def test_an_esx_sparse_extent_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    entries, data, model = array("I", [0] * 4096), b"", bytearray(4096 * 512)
    for i, grain in enumerate((3, 4, 1000)):
        entries[grain] = 40 + i
        model[grain * 512 : grain * 512 + 512] = piece = bytes([i + 1]) * 512
        data += piece
    esx(path, 1, [5], entries.tobytes().ljust(35 * 512, b"\0") + data)
    (tmp_path / "model").write_bytes(model)
    run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", path, tmp_path / "model")
    with open_image(path, read_only=True) as image:
        assert read_at(image, 0, image.size) == model
    with pytest.raises(UserError, match="only read"):
        open_image(path)


def test_one_grain_table_for_many(tmp_path: Path) -> None:
    """A small file that seems to have a lot in it: whoever looked at all of that would take minutes."""
    path, tables = tmp_path / "disk.vmdk", 12_800
    here = 4 + tables * 4 // 512
    esx(path, tables, [here] * tables, bytes(4096 * 4))
    with open_image(path, read_only=True) as image:
        for look in (lambda: list(image.extents()), image.check):
            with pytest.raises(DamagedImage, match=f"{tables} tables"):
                look()


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "streamOptimized"])
def test_info_is_that_of_qemu(tmp_path: Path, subformat: str) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, "vmdk", 3 << 30, options={"subformat": subformat})
    theirs = json.loads(run("qemu-img", "info", "--output=json", path))
    with open_image(path, read_only=True) as image:
        assert image.info() == theirs["format-specific"]["data"]
        assert image.cluster_size == theirs.get("cluster-size")


def sesparse(path: Path, model: bytes, entries: dict[int, int] | None = None) -> None:
    """A seSparse disk by hand: nobody but ESXi makes them. ``entries`` are put into the grain table."""
    grains = len(model) // 4096
    fields = [0xCAFEBABE, 0x2_0000_0001, len(model) // 512, 8, 64, 0, 0, 0, 0, 0]
    fields += [1, 1, 2, 1, 3, 1, 4, 1, 8, 64, 0, 0, 0, 0, 128, grains * 8]
    table, data = [0] * 4096, b""
    for i in range(grains):
        piece = model[i * 4096 : (i + 1) * 4096]
        if any(piece):
            number = len(data) // 4096
            table[i] = 3 << 60 | (number & 0xFFF) << 48 | number >> 12
            data += piece
        elif i % 3:
            table[i] = (1 + i % 2) << 60
    for at, entry in (entries or {}).items():
        table[at] = entry
    parts = {0: struct.pack("<26Q", *fields), 1: struct.pack("<4Q", 0xCAFECAFE, 0, 0, 0)}
    parts |= {4: struct.pack("<Q", 0x1000_0000 << 32), 8: struct.pack("<4096Q", *table), 128: data}
    with open(path.with_name("disk-sesparse.vmdk"), "wb") as file:
        for sector, part in parts.items():
            file.seek(sector * 512)
            file.write(part)
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff", 'createType="seSparse"']
    path.write_text("\n".join([*lines, f'RW {len(model) // 512} SESPARSE "disk-sesparse.vmdk"', ""]))


def test_sesparse_is_read(tmp_path: Path) -> None:
    path, rng = tmp_path / "disk.vmdk", random.Random(1)
    model = b"".join(rng.randbytes(4096) if rng.random() < 0.2 else bytes(4096) for _ in range(4096))
    sesparse(path, model)
    with open_image(path, read_only=True) as image:
        assert image.info()["create-type"] == "seSparse" and image.cluster_size == 4096
        assert read_at(image, 0, len(model)) == model and image.check().clean
        assert read_at(image, 4096 * 7 + 512, 8192) == model[4096 * 7 + 512 :][:8192]
        assert sum(extent.length for extent in image.extents()) == image.size
    (tmp_path / "model").write_bytes(model)
    run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", path, tmp_path / "model")
    with pytest.raises(UserError, match="only read"):
        open_image(path)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 1), (8, 1), (16, 0), (16, 1 << 63), (24, 16), (40, 1), (80, 1 << 60), (128, 1 << 60), (512 + 24, 1)],
)
def test_a_bad_sesparse_header(tmp_path: Path, at: int, value: int) -> None:
    path = tmp_path / "disk.vmdk"
    sesparse(path, b"x" * MIB)
    with open(tmp_path / "disk-sesparse.vmdk", "r+b") as file:
        file.seek(at)
        file.write(struct.pack("<Q", value))
    with pytest.raises(UserError, match="seSparse"):
        open_image(path, read_only=True)


@pytest.mark.parametrize("entry", [1, 3 << 60 | 1 << 40, 4 << 60, (1 << 64) - 1])
def test_a_bad_sesparse_entry(tmp_path: Path, entry: int) -> None:
    path = tmp_path / "disk.vmdk"
    sesparse(path, b"x" * MIB, {5: entry})
    with open_image(path, read_only=True) as image:
        assert read_at(image, 0, 4096) == b"x" * 4096
        with pytest.raises(OSError, match="damaged"):
            read_at(image, 5 * 4096, 512)
        assert image.check().corruptions == 1


def test_grains_that_qemu_forgot_are_given_back(tmp_path: Path) -> None:
    """QEMU notes zeros, and forgets the grain that was there; the first shares a block of the host's with tables."""
    path = tmp_path / "disk.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on", path, str(9 * MIB))
    for command in ("write -P 1 1M 64k", "write -P 2 2M 64k", "write -z 1M 64k"):
        run("qemu-io", "-f", "vmdk", "-c", command, path)
    for offset, size in ((0x3E00, 0x10200), (0x20000, 0x10000)):
        fd = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(fd, offset, size)
        finally:
            os.close(fd)
    with open_image(path) as image:
        assert image.check().leaks
        image.repair()
        assert image.check().clean
        assert not any(read_at(image, MIB, 65536)) and set(read_at(image, 2 * MIB, 65536)) == {2}
    run("qemu-img", "check", path)


def test_tables_that_lie_over_each_other_are_not_mended(tmp_path: Path) -> None:
    """A write of one of them would change the other."""
    path = tmp_path / "disk.vmdk"
    create_image(path, "vmdk", 1 << 20)
    data = bytearray(path.read_bytes())
    redundant = int.from_bytes(data[48:56], "little")
    data[redundant * 512 : redundant * 512 + 4] = redundant.to_bytes(4, "little")
    path.write_bytes(data)
    with open_image(path) as image:
        assert image.check().messages == [f"ERROR the tables at {redundant * 512:#x} lie over others"]
        found = image.repair()
        assert (found.corruptions, found.corruptions_fixed) == (1, 0)
