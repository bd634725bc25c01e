"""The fuzzer begins with inputs that are sound: it would find nothing in a heap of refused ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from skep.block.registry import FORMATS
from tests.block import test_hostile
from tests.block.damage import Sparse
from tests.block.hostile import use
from tests.fuzz import nbd
from tests.fuzz.__main__ import LARGEST
from tests.fuzz.images import pack, sound_images, unpack
from tests.fuzz.targets import inputs, target


@pytest.mark.parametrize("format", test_hostile.FORMATS)
def test_sound_images_are_used(tmp_path: Path, format: str) -> None:
    images = sound_images(format, tmp_path)
    for image in images:
        data = pack(image, 7)
        assert len(data) < LARGEST
        again, way = unpack(data)
        assert (again.size, again.sectors, way) == (image.size, image.sectors, 7)
        again.put(tmp_path / "image")
        assert Sparse.of(tmp_path / "image").sectors == image.sectors
        assert use(tmp_path / "image", format, random.Random(1)) in ("used", "read")
    run = target(format, tmp_path)
    for data in (b"", b"x" * 40, pack(images[0], 1)[:-100]):
        run(data)


def test_every_format_is_among_them() -> None:
    assert {*test_hostile.FORMATS, "raw"} == set(FORMATS)


def test_what_servers_said_is_understood(tmp_path: Path) -> None:
    said = inputs("nbd", tmp_path)
    assert [len(one) > 400 for one in said] == [True, True]
    for one in (*said, b"", said[0][:100], said[1][:-50]):
        nbd.run(one)
