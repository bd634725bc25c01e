"""The interface that programs have: whatever offset, length and kind of memory."""

from __future__ import annotations

import mmap
import random
from array import array
from pathlib import Path

import pytest

from skep.block.image import create_image, open_image
from skep.errors import UserError

MIB = 1 << 20


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vhdx"])
def test_any_offset_and_length(tmp_path: Path, format: str) -> None:
    path, rng = tmp_path / "disk", random.Random(1)
    create_image(path, format, MIB)
    model = bytearray(MIB)
    with open_image(path, format=format) as image:
        assert image.block_sizes == (512, 512) and image.size == MIB
        for _ in range(100):
            at = rng.randrange(MIB)
            data = rng.randbytes(rng.randrange(1, min(5000, MIB - at + 1)))
            if rng.random() < 0.2:
                image.zero(at, len(data))
                data = bytes(len(data))
            else:
                cut = rng.randrange(len(data) + 1)
                image.write_from([data[:cut], b"", memoryview(data)[cut:]], at)
            model[at : at + len(data)] = data
            room = bytearray(rng.randrange(min(5000, MIB - at)))
            image.read_into(room, at)
            assert room == model[at : at + len(room)]
        image.flush()
    with open_image(path, format=format, read_only=True) as image:
        whole = bytearray(MIB)
        image.read_into(whole)
        assert whole == model


def test_kinds_of_memory(tmp_path: Path) -> None:
    create_image(tmp_path / "disk", "qcow2", MIB)
    with open_image(tmp_path / "disk") as image, mmap.mmap(-1, 4096) as page:
        page[:5] = b"hello"
        image.write_from([page, array("I", [1, 2, 3])], 512)
        numbers = array("I", [0] * 3)
        room = bytearray(4096)
        image.read_into([room, numbers], 512)
        assert room[:5] == b"hello" and list(numbers) == [1, 2, 3]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (MIB, 1), (MIB - 511, 512), (0, MIB + 1), (1 << 70, 1)])
def test_what_is_not_on_the_disk(tmp_path: Path, offset: int, length: int) -> None:
    create_image(tmp_path / "disk", "raw", MIB)
    with open_image(tmp_path / "disk", format="raw") as image:
        for call in (image.read_into, image.write_from):
            with pytest.raises(UserError, match="not within the disk"):
                call(bytearray(length), offset)
        with pytest.raises(UserError, match="not within the disk"):
            image.zero(offset, length)
    assert (tmp_path / "disk").stat().st_size == MIB
